//! The code of `edge/fastly/` with one service's settings: what [`super::Fastly::deploy`] puts there.
//!
//! Settings are tables of VCL, so that the code itself is the same file everywhere. The secrets are not among them: VCL
//! can be read by whoever may read the service, a private dictionary's items by nobody.

use std::time::Duration;

use crate::cdn::{CdnError, CdnFault};
use crate::keys::EdgeSecret;
use crate::rest::Secret;

/// Holds sealed keys.
pub(super) const KEYS: &str = "keyshield_keys";
/// Holds what opens them; write-only.
pub(super) const SECRETS: &str = "keyshield_secrets";

/// What the code at the edge of one service is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FastlyEdgeCode {
    /// What stands before key IDs: `/api/hls/keys/`.
    pub key_path: String,
    /// How long a player may keep a key, as the shield says it too.
    pub key_max_age: Duration,
    /// Origins whose scripts may read keys; `*` for all.
    pub cors_origins: Vec<String>,
    /// What keys for this CDN are sealed under.
    pub secret: EdgeSecret,
    /// Whether a key is given out against a viewer's token alone.
    pub needs_token: bool,
}

/// A piece of VCL and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snippet {
    pub name: &'static str,
    /// `init`, `recv`, `error` or `fetch`.
    pub place: &'static str,
    /// Lower ones run first.
    pub priority: &'static str,
    pub content: String,
}

/// What keeps `no-store` out of Fastly's caches: wanted in either mode.
pub(super) fn caching_rule() -> Snippet {
    snippet("keyshield_fetch", "fetch", "50", include_str!("../../../edge/fastly/fetch.vcl"))
}

fn snippet(name: &'static str, place: &'static str, priority: &'static str, content: &str) -> Snippet {
    Snippet { name, place, priority, content: content.trim_end().to_owned() }
}

impl FastlyEdgeCode {
    /// # Errors
    /// A setting that cannot stand in a string of VCL.
    pub(super) fn snippets(&self) -> Result<Vec<Snippet>, CdnError> {
        Ok(vec![
            snippet("keyshield_settings", "init", "90", &self.settings()?),
            snippet("keyshield_code", "init", "100", include_str!("../../../edge/fastly/keyshield.vcl")),
            // Before what the service itself does with a request: its rewrites and its own answers.
            snippet("keyshield_recv", "recv", "50", include_str!("../../../edge/fastly/recv.vcl")),
            snippet("keyshield_error", "error", "50", include_str!("../../../edge/fastly/error.vcl")),
            caching_rule(),
        ])
    }

    /// The items of the private dictionary; `None` for one that must not be there.
    pub(super) fn secrets(&self) -> [(&'static str, Option<Secret>); 3] {
        let secret = |text: &str| Some(Secret::new(text.to_owned()));
        [
            ("encryption_key", secret(&self.secret.encryption_key())),
            ("mac_key", secret(&self.secret.mac_key())),
            ("token_key", self.needs_token.then_some(()).and_then(|()| secret(&self.secret.token_key()))),
        ]
    }

    fn settings(&self) -> Result<String, CdnError> {
        let token = if self.needs_token { "required" } else { "none" };
        let max_age = self.key_max_age.as_secs().to_string();
        let settings = [("key_path", &*self.key_path), ("key_max_age", &max_age), ("viewer_token", token)];
        let origins: Vec<_> = self.cors_origins.iter().map(|origin| (&**origin, "")).collect();
        Ok(format!("{}\n{}", table("keyshield_settings", &settings)?, table("keyshield_origins", &origins)?))
    }
}

fn table(name: &str, items: &[(&str, &str)]) -> Result<String, CdnError> {
    let mut text = format!("table {name} {{\n");
    for (key, value) in items {
        if let Some(bad) = [key, value].into_iter().find(|text| !stands_in_a_string(text)) {
            let what = format!(
                "{bad:?} cannot stand in a string of VCL: it must be of printable ASCII without \" and %"
            );
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        text.push_str(&format!("  \"{key}\": \"{value}\",\n"));
    }
    text.push('}');
    Ok(text)
}

/// VCL has no escape but `%xx`, and that in some strings only.
fn stands_in_a_string(text: &str) -> bool {
    text.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'"' && b != b'%')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(key_path: &str) -> FastlyEdgeCode {
        FastlyEdgeCode {
            key_path: key_path.to_owned(),
            key_max_age: Duration::from_secs(300),
            cors_origins: vec!["https://a.example".to_owned()],
            secret: "ab".repeat(32).parse().unwrap(),
            needs_token: false,
        }
    }

    #[test]
    fn settings_are_tables_and_secrets_are_not_among_them() {
        let code = code("/k/");
        let snippets = code.snippets().unwrap();
        assert!(snippets[0].content.contains("\"key_path\": \"/k/\""), "{}", snippets[0].content);
        assert!(snippets[0].content.contains("\"https://a.example\": \"\""));
        for (_, secret) in code.secrets() {
            assert!(secret.is_none_or(|it| snippets.iter().all(|s| !s.content.contains(it.expose()))));
        }
        assert!(
            code.secrets()[2].1.is_none()
                && FastlyEdgeCode { needs_token: true, ..code }.secrets()[2].1.is_some()
        );
    }

    #[test]
    fn what_ends_a_string_of_vcl_does_not_get_into_one() {
        for bad in ["/k\"/", "/k%2f/", "/k\n/", "/kü/"] {
            assert_eq!(code(bad).snippets().unwrap_err().fault, CdnFault::Invalid, "{bad}");
        }
    }
}
