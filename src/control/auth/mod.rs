//! Who asks, and what they may: bearer tokens and JWTs in, a name and its roles out.
//!
//! Everything is refused that is not permitted: a call that the table does not know, a token that matches
//! nothing, an issuer whose keys cannot be had. Deliberately absent: sessions, passwords, and a way to make
//! tokens over the API.

mod issuer_keys;
mod jwt;
mod permissions;
mod tokens;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use thiserror::Error;

pub(super) use permissions::Call;
pub use tokens::{hash_token, new_token};

use super::Control;
use super::problem::{Kind, Problem};
use jwt::JwtVerifier;

/// A longer token is none of ours.
const MAX_TOKEN_LEN: usize = 16 << 10;
/// RFC 6750 §3.
const CHALLENGE: &str = "Bearer realm=\"keyshield\"";
const CHALLENGE_INVALID: &str = "Bearer realm=\"keyshield\", error=\"invalid_token\"";
const CHALLENGE_SCOPE: &str = "Bearer realm=\"keyshield\", error=\"insufficient_scope\"";

/// What somebody is to the shield.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Admin,
    Operator,
    Security,
    Auditor,
    Viewer,
}

impl Role {
    pub const ALL: [Role; 5] = [Role::Viewer, Role::Auditor, Role::Operator, Role::Security, Role::Admin];

    /// The name in the configuration and in tokens.
    pub fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Security => "security",
            Role::Auditor => "auditor",
            Role::Viewer => "viewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|role| role.name() == text);
        named.ok_or("must be admin, operator, security, auditor or viewer")
    }
}

/// Who may call the control API.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AccessSettings {
    pub tokens: Vec<AccessToken>,
    pub jwt: Option<JwtSettings>,
}

/// A token's holder. The token itself is known to them alone.
#[derive(Debug, Clone, PartialEq)]
pub struct AccessToken {
    /// Who is named in logs and in the history of keys.
    pub name: String,
    pub role: Role,
    /// Of the whole token, as [`hash_token`] makes it.
    pub sha256: [u8; 32],
}

/// Whose JWTs are taken, and where the keys are that they are signed by.
#[derive(Debug, Clone, PartialEq)]
pub struct JwtSettings {
    pub jwks: JwksSource,
    pub issuer: String,
    pub audience: String,
    /// The claim with the roles; when it begins with a slash, a JSON pointer (RFC 6901) to it.
    pub roles_claim: String,
}

/// Where a JWK Set (RFC 7517) is.
#[derive(Debug, Clone, PartialEq)]
pub enum JwksSource {
    File(PathBuf),
    Url(String),
}

/// Who asks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Identity {
    pub(super) actor: String,
    roles: Vec<Role>,
}

impl Identity {
    fn may(&self, call: Call) -> bool {
        self.roles.iter().any(|role| call.permitted().contains(role))
    }
}

/// Why nobody is recognised.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum AuthError {
    #[error(
        "nobody may call this API yet: add [[control.tokens]] to the configuration (`keyshield token` makes one)"
    )]
    NothingConfigured,
    #[error("send the token as Authorization: Bearer <token>")]
    NoToken,
    #[error("this token is not known here")]
    Unknown,
    #[error("this token is not valid: {0}")]
    Jwt(String),
    #[error("the keys of the tokens' issuer could not be had; the log says why")]
    NoIssuerKeys,
}

impl From<AuthError> for Problem {
    fn from(error: AuthError) -> Self {
        let detail = error.to_string();
        match error {
            AuthError::NothingConfigured | AuthError::NoToken => {
                Problem::new(Kind::Unauthenticated, detail).with_challenge(CHALLENGE)
            }
            AuthError::Unknown | AuthError::Jwt(_) => {
                Problem::new(Kind::Unauthenticated, detail).with_challenge(CHALLENGE_INVALID)
            }
            AuthError::NoIssuerKeys => Problem::new(Kind::NoIssuerKeys, detail),
        }
    }
}

/// A fault in [`AccessSettings`] that shows at the start.
#[derive(Debug, Error)]
pub enum AccessError {
    #[error("the client for the JWKS could not be made: {0}")]
    Client(#[from] reqwest::Error),
}

/// Recognises callers.
pub struct Access {
    tokens: Vec<AccessToken>,
    jwt: Option<JwtVerifier>,
}

impl Access {
    /// # Errors
    /// [`AccessError`]. Keys of an issuer are fetched when the first token comes.
    pub fn new(settings: AccessSettings) -> Result<Self, AccessError> {
        let jwt = settings.jwt.map(JwtVerifier::new).transpose()?;
        Ok(Self { tokens: settings.tokens, jwt })
    }

    async fn identify(&self, headers: &HeaderMap) -> Result<Identity, AuthError> {
        if self.tokens.is_empty() && self.jwt.is_none() {
            return Err(AuthError::NothingConfigured);
        }
        let token = bearer(headers)?;
        if let Some(known) = tokens::find(&self.tokens, token) {
            return Ok(Identity { actor: known.name.clone(), roles: vec![known.role] });
        }
        match &self.jwt {
            // A JWS in its compact form (RFC 7515 §7.1) has two dots; a token of ours has none.
            Some(jwt) if token.matches('.').count() == 2 => jwt.verify(token).await,
            _ => Err(AuthError::Unknown),
        }
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, AuthError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return Err(AuthError::NoToken) };
    let text = value.to_str().map_err(|_| AuthError::NoToken)?;
    let (scheme, token) = text.split_once(' ').ok_or(AuthError::NoToken)?;
    if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
        return Err(AuthError::NoToken);
    }
    if token.len() > MAX_TOKEN_LEN { Err(AuthError::Unknown) } else { Ok(token.trim()) }
}

/// Lets a request through when its call is one that the caller's roles permit. Runs before anything of the
/// request is read, so that a stranger learns nothing from errors.
pub(super) async fn authorize(
    State(control): State<Control>,
    path: MatchedPath,
    mut request: Request,
    next: Next,
) -> Response {
    let identity = match control.access.identify(request.headers()).await {
        Ok(identity) => identity,
        Err(error) => {
            tracing::info!(%error, path = path.as_str(), "a call without a valid token");
            return Problem::from(error).into_response();
        }
    };
    match Call::of(request.method(), path.as_str()) {
        Some(call) if identity.may(call) => {
            request.extensions_mut().insert(identity);
            next.run(request).await
        }
        call => {
            tracing::warn!(actor = identity.actor, roles = ?identity.roles, ?call, "a call that is not permitted");
            let who: Vec<_> =
                call.map_or(&[] as &[_], Call::permitted).iter().map(|role| role.name()).collect();
            let detail = format!("this call is permitted to: {}", who.join(", "));
            Problem::new(Kind::Forbidden, detail).with_challenge(CHALLENGE_SCOPE).into_response()
        }
    }
}

/// Who asks, for a handler.
pub(super) struct Caller(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        // Missing only on a route that is not behind `authorize`.
        let identity = parts.extensions.get::<Identity>();
        identity.map(|identity| Self(identity.actor.clone())).ok_or_else(|| AuthError::NoToken.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn a_bearer_token_is_one_header_of_that_scheme() {
        assert_eq!(bearer(&headers(&["Bearer ks_1"])), Ok("ks_1"));
        assert_eq!(bearer(&headers(&["bearer ks_1"])), Ok("ks_1"));
        for wrong in [&[][..], &["ks_1"], &["Basic ks_1"], &["Bearer "], &["Bearer a", "Bearer b"]] {
            assert_eq!(bearer(&headers(wrong)), Err(AuthError::NoToken), "{wrong:?}");
        }
        let long = format!("Bearer {}", "x".repeat(MAX_TOKEN_LEN + 1));
        assert_eq!(bearer(&headers(&[&long])), Err(AuthError::Unknown));
    }

    #[test]
    fn a_role_reads_back_as_written() {
        for role in Role::ALL {
            assert_eq!(role.name().parse(), Ok(role));
        }
        assert!("root".parse::<Role>().is_err());
    }
}
