//! JWTs of an identity provider (RFC 7519), by its published keys.
//!
//! The algorithm is the key's and never the token's to choose: a token that names `none`, an HMAC, or another
//! algorithm than its key is for is refused before anything is computed (RFC 8725 §3.1). Issuer, audience and
//! expiry must be there and right.

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Validation, decode, decode_header};
use serde_json::{Map, Value};

use super::issuer_keys::IssuerKeys;
use super::{AccessError, AuthError, Identity, JwtSettings, Role};

/// How far the clocks may be apart.
const LEEWAY_SECS: u64 = 30;
/// Names go into logs and into the history of keys.
const MAX_ACTOR_LEN: usize = 256;

pub(super) struct JwtVerifier {
    keys: IssuerKeys,
    issuer: String,
    audience: String,
    roles_claim: String,
}

impl JwtVerifier {
    pub(super) fn new(settings: JwtSettings) -> Result<Self, AccessError> {
        let JwtSettings { jwks, issuer, audience, roles_claim } = settings;
        Ok(Self { keys: IssuerKeys::new(jwks)?, issuer, audience, roles_claim })
    }

    /// # Errors
    /// [`AuthError::Jwt`] with the reason, [`AuthError::NoIssuerKeys`].
    pub(super) async fn verify(&self, token: &str) -> Result<Identity, AuthError> {
        let wrong = |why: &str| AuthError::Jwt(why.to_owned());
        let header = decode_header(token).map_err(|error| refusal(error.kind()))?;
        // RFC 7515 §4.1.11: we understand no extension.
        if header.crit.is_some() {
            return Err(wrong("it has critical extensions"));
        }
        let kid = header.kid.as_deref().ok_or_else(|| wrong("it names no key (kid)"))?;
        let key = self.keys.find(kid, header.alg).await?;
        let claims = decode::<Map<String, Value>>(token, &key.key, &self.validation(header.alg))
            .map_err(|error| refusal(error.kind()))?
            .claims;
        let actor = claims.get("sub").and_then(Value::as_str).unwrap_or_default();
        if actor.is_empty() || actor.len() > MAX_ACTOR_LEN || actor.chars().any(char::is_control) {
            return Err(wrong("its subject (sub) is missing or no name"));
        }
        Ok(Identity { actor: actor.to_owned(), roles: self.roles(&Value::Object(claims.clone())) })
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.leeway = LEEWAY_SECS;
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation
    }

    /// The roles that are known here; the claim may well have others, for other services.
    fn roles(&self, claims: &Value) -> Vec<Role> {
        let claim = match self.roles_claim.starts_with('/') {
            true => claims.pointer(&self.roles_claim),
            false => claims.get(&self.roles_claim),
        };
        let names: Vec<&str> = match claim {
            Some(Value::String(names)) => names.split_whitespace().collect(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        names.into_iter().filter_map(|name| name.parse().ok()).collect()
    }
}

fn refusal(kind: &ErrorKind) -> AuthError {
    let why = match kind {
        ErrorKind::ExpiredSignature => "it has expired",
        ErrorKind::ImmatureSignature => "it is not valid yet",
        ErrorKind::InvalidIssuer => "it is from another issuer",
        ErrorKind::InvalidAudience => "it is for another audience",
        ErrorKind::InvalidSignature => "its signature is wrong",
        ErrorKind::MissingRequiredClaim(claim) => return AuthError::Jwt(format!("it has no {claim}")),
        _ => "it is no JWT that is taken here",
    };
    AuthError::Jwt(why.to_owned())
}

#[cfg(test)]
#[path = "jwt_tests.rs"]
mod tests;
