//! Who may use the control plane: tokens by their hashes, and an issuer of JSON Web Tokens.
//!
//! Checked here, used by the control plane. A token itself is never configured, only its hash, so that whoever
//! reads the file cannot act as an operator.

use std::fmt;
use std::path::PathBuf;

use super::ConfigError;
use super::checks::{entry, field, private_url};
use super::raw::{RawJwt, RawToken};

/// What an operator is allowed to do; the control plane says what that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    Admin,
    Operator,
    Security,
    Auditor,
    Viewer,
}

impl Role {
    pub const ALL: [Role; 5] = [Role::Admin, Role::Operator, Role::Security, Role::Auditor, Role::Viewer];

    /// As it is configured, and as it stands in a token's claim.
    pub fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Security => "security",
            Role::Auditor => "auditor",
            Role::Viewer => "viewer",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// A bearer token, by the SHA-256 of its text.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessToken {
    pub name: String,
    pub role: Role,
    pub sha256: [u8; 32],
}

impl fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, role, sha256: _ } = self;
        f.debug_struct("AccessToken").field("name", name).field("role", role).finish_non_exhaustive()
    }
}

/// Where the issuer's public keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JwksSource {
    File(PathBuf),
    /// `https`, or `http` on loopback.
    Url(String),
}

/// The issuer whose JSON Web Tokens are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtConfig {
    pub jwks: JwksSource,
    pub issuer: String,
    pub audience: String,
    /// The claim that names the roles.
    pub roles_claim: String,
}

pub(super) fn tokens(raw: &[RawToken]) -> Result<Vec<AccessToken>, ConfigError> {
    let mut tokens: Vec<AccessToken> = Vec::with_capacity(raw.len());
    for (at, raw) in raw.iter().enumerate() {
        let token = token(at, raw)?;
        let place = |key| format!("control.tokens[{at}].{key}");
        if tokens.iter().any(|other| other.name == token.name) {
            return Err(field(&place("name"), &raw.name, "another token has this name"));
        }
        if let Some(other) = tokens.iter().find(|other| other.sha256 == token.sha256) {
            let why = format!("token {:?} has the hash of token {:?}", token.name, other.name);
            return Err(entry(&place("sha256"), &why));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

fn token(at: usize, raw: &RawToken) -> Result<AccessToken, ConfigError> {
    let RawToken { name, role, sha256 } = raw;
    let place = |key| format!("control.tokens[{at}].{key}");
    // Names go into logs and records.
    if !(1..=64).contains(&name.len()) || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(field(&place("name"), name, "must be 1 to 64 visible ASCII characters without a space"));
    }
    let role = Role::from_name(role).ok_or_else(|| {
        let roles = Role::ALL.map(Role::name).join(", ");
        field(&place("role"), role, &format!("token {name:?} needs one of the roles {roles}"))
    })?;
    let mut hash = [0; 32];
    // Not shown: it may be the token itself, pasted where its hash belongs.
    hex::decode_to_slice(sha256, &mut hash).map_err(|_| {
        let why = format!("token {name:?} needs the SHA-256 of its text: 64 hexadecimal digits");
        entry(&place("sha256"), &why)
    })?;
    Ok(AccessToken { name: name.clone(), role, sha256: hash })
}

pub(super) fn jwt(raw: &RawJwt) -> Result<JwtConfig, ConfigError> {
    let jwks = match (given(raw.jwks_file.as_deref()), given(raw.jwks_url.as_deref())) {
        (Some(path), None) => JwksSource::File(path.into()),
        // Whoever could change the keys on their way could sign in as anybody.
        (None, Some(url)) => JwksSource::Url(private_url("control.jwt.jwks_url", url)?),
        _ => return Err(entry("control.jwt", "exactly one of jwks_file and jwks_url must be given")),
    };
    for (name, value) in
        [("issuer", &raw.issuer), ("audience", &raw.audience), ("roles_claim", &raw.roles_claim)]
    {
        if value.is_empty() {
            return Err(entry(&format!("control.jwt.{name}"), "must be given"));
        }
    }
    let RawJwt { issuer, audience, roles_claim, .. } = raw.clone();
    Ok(JwtConfig { jwks, issuer, audience, roles_claim })
}

/// An environment variable cannot be unset in every place that sets one: empty is not given.
fn given(text: Option<&str>) -> Option<&str> {
    text.filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b";

    fn raw(name: &str, role: &str, sha256: &str) -> RawToken {
        RawToken { name: name.into(), role: role.into(), sha256: sha256.into() }
    }

    fn refused(raw: &[RawToken]) -> String {
        tokens(raw).unwrap_err().to_string()
    }

    #[test]
    fn a_token_is_its_name_its_role_and_a_hash() {
        let tokens = tokens(&[raw("ci", "operator", HASH), raw("me", "admin", &"AB".repeat(32))]).unwrap();
        assert_eq!((tokens[0].name.as_str(), tokens[0].role), ("ci", Role::Operator));
        assert_eq!((tokens[0].sha256[0], tokens[1].sha256), (0x2b, [0xab; 32]));
        assert!(!format!("{tokens:?}").contains("43"), "{tokens:?}");
    }

    #[test]
    fn every_role_is_found_by_its_name() {
        for role in Role::ALL {
            assert_eq!(Role::from_name(role.name()), Some(role));
        }
        assert_eq!(Role::from_name("Admin"), None);
    }

    #[test]
    fn a_wrong_token_is_named() {
        let good = raw("ci", "viewer", HASH);
        let error = refused(&[good.clone(), raw("boss", "boss", HASH)]);
        assert!(error.contains("control.tokens[1].role") && error.contains("token \"boss\""), "{error}");
        let error = refused(&[raw("me", "admin", "my-secret-token")]);
        assert!(error.contains("\"me\"") && !error.contains("my-secret-token"), "{error}");
        assert!(refused(&[raw("", "admin", HASH)]).contains("control.tokens[0].name"));
        let error = refused(&[good.clone(), raw("ci", "admin", &"ab".repeat(32))]);
        assert!(error.contains("another token") && error.contains("ci"), "{error}");
        let error = refused(&[good, raw("other", "admin", HASH)]);
        assert!(error.contains("\"other\" has the hash of token \"ci\"") && !error.contains(HASH), "{error}");
    }

    fn issuer() -> RawJwt {
        RawJwt {
            jwks_url: Some("https://id.example/jwks".into()),
            issuer: "https://id.example".into(),
            audience: "keyshield".into(),
            ..RawJwt::default()
        }
    }

    #[test]
    fn the_keys_of_an_issuer_are_in_a_file_or_at_a_url() {
        let at_url = jwt(&issuer()).unwrap();
        assert_eq!(at_url.jwks, JwksSource::Url("https://id.example/jwks".into()));
        assert_eq!(at_url.roles_claim, "roles");
        let file = Some("jwks.json".to_owned());
        let in_file = jwt(&RawJwt { jwks_file: file.clone(), jwks_url: None, ..issuer() }).unwrap();
        assert_eq!(in_file.jwks, JwksSource::File("jwks.json".into()));
        for wrong in [RawJwt { jwks_file: file, ..issuer() }, RawJwt { jwks_url: None, ..issuer() }] {
            let error = jwt(&wrong).unwrap_err().to_string();
            assert!(error.contains("exactly one of jwks_file and jwks_url"), "{error}");
        }
    }

    #[test]
    fn issuer_and_audience_are_required() {
        for (wrong, named) in [
            (RawJwt { issuer: String::new(), ..issuer() }, "control.jwt.issuer"),
            (RawJwt { audience: String::new(), ..issuer() }, "control.jwt.audience"),
            (RawJwt { roles_claim: String::new(), ..issuer() }, "control.jwt.roles_claim"),
        ] {
            assert!(jwt(&wrong).unwrap_err().to_string().contains(named));
        }
    }

    #[test]
    fn keys_come_over_https_or_loopback() {
        let check = |url: &str| jwt(&RawJwt { jwks_url: Some(url.into()), ..issuer() });
        for url in ["https://id.example/jwks", "http://127.0.0.1:9/", "http://[::1]/a", "http://localhost/a"]
        {
            assert!(check(url).is_ok(), "{url}");
        }
        for url in ["http://id.example/jwks", "http://localhost.example/", "ftp://127.0.0.1/", "/jwks.json"] {
            assert!(check(url).unwrap_err().to_string().contains("control.jwt.jwks_url"), "{url}");
        }
        let error = check("https://user:secret@id.example/").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }
}
