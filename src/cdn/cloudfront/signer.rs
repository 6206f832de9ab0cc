//! Signed URLs and cookies, by a custom policy: what is asked for, and until when.
//!
//! ```text
//! policy     {"Statement":[{"Resource":"…","Condition":{"DateLessThan":{"AWS:EpochTime":…}}}]}
//! signature  over the policy: SHA-256 with RSA (PKCS #1 v1.5) or with ECDSA on P-256 (ASN.1 DER)
//! both       base64, with + = / written - _ ~
//! ```
//!
//! SHA-256 has to be named beside the signature (`Hash-Algorithm`); without, CloudFront takes it for SHA-1, which no key
//! here signs with. Keys that an operator brings are read as OpenSSL writes them: PKCS #8, PKCS #1, SEC 1.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{COOKIE, HeaderMap, HeaderValue};
use rustls::SignatureScheme;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;
use url::Url;

use super::super::{CdnError, CdnFault, ProbeHeaders};
use super::SignerSettings;
use super::key_files::KeyFiles;
use crate::clock::Clock;
use crate::keys::Timestamp;

const SCHEMES: [SignatureScheme; 2] =
    [SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::RSA_PKCS1_SHA256];
const HASH: &str = "SHA256";
/// For how long the shield's own questions to the edge are signed.
const PROBE_LIFE_SECS: u64 = 300;

/// A cookie that a viewer is to be given.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedCookie {
    pub name: &'static str,
    pub value: String,
}

impl fmt::Debug for SignedCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever has it, views.
        write!(f, "SignedCookie({})", self.name)
    }
}

/// Signs by the key that the folder names.
#[derive(Debug, Clone)]
pub struct Signer {
    settings: SignerSettings,
    files: KeyFiles,
    clock: Clock,
}

struct Signed {
    policy: String,
    signature: String,
    key_id: String,
}

impl Signer {
    pub fn new(settings: SignerSettings, clock: Clock) -> Self {
        let files = KeyFiles::new(settings.directory.clone());
        Self { settings, files, clock }
    }

    /// The URL with what lets its viewer in until `expires`.
    ///
    /// # Errors
    /// What is no URL of one thing, a time that has passed or is beyond the longest life, a key that cannot be read.
    pub fn sign_url(&self, url: &str, expires: Timestamp) -> Result<String, CdnError> {
        let parsed = Url::parse(url).ok().filter(|parsed| matches!(parsed.scheme(), "http" | "https"));
        if parsed.is_none_or(|parsed| parsed.fragment().is_some()) {
            return Err(invalid(format!("{url:?} is no absolute http or https URL without a fragment")));
        }
        let Signed { policy, signature, key_id } = self.signed(url, expires)?;
        let joint = if url.contains('?') { '&' } else { '?' };
        Ok(format!(
            "{url}{joint}Policy={policy}&Signature={signature}&Key-Pair-Id={key_id}&Hash-Algorithm={HASH}"
        ))
    }

    /// Cookies that let their viewer in until `expires`, wherever the pattern fits: `https://cdn.example.com/live/*`.
    ///
    /// # Errors
    /// As [`Self::sign_url`].
    pub fn sign_cookies(&self, pattern: &str, expires: Timestamp) -> Result<Vec<SignedCookie>, CdnError> {
        if !pattern.starts_with("http") || !pattern.contains("://") {
            return Err(invalid(format!("{pattern:?} is no pattern such as https://cdn.example.com/live/*")));
        }
        let Signed { policy, signature, key_id } = self.signed(pattern, expires)?;
        Ok(vec![
            SignedCookie { name: "CloudFront-Policy", value: policy },
            SignedCookie { name: "CloudFront-Signature", value: signature },
            SignedCookie { name: "CloudFront-Key-Pair-Id", value: key_id },
            SignedCookie { name: "CloudFront-Hash-Algorithm", value: HASH.to_owned() },
        ])
    }

    fn signed(&self, resource: &str, expires: Timestamp) -> Result<Signed, CdnError> {
        let now = self.clock.now();
        if expires <= now || expires.since(now) > self.settings.longest_life {
            return Err(invalid(format!(
                "a signature is good for at most {} s from now (signer_longest_life_secs): an old key stays in the group no longer",
                self.settings.longest_life.as_secs()
            )));
        }
        let key_id = self.files.signing()?.ok_or_else(|| {
            invalid(format!(
                "{} names no key that signs: rotate the key group once",
                self.settings.directory.display()
            ))
        })?;
        let seconds = expires.as_unix_millis() / 1_000;
        let condition = json!({"DateLessThan": {"AWS:EpochTime": seconds}});
        let policy = json!({"Statement": [{"Resource": resource, "Condition": condition}]}).to_string();
        let signature = self.signature(&key_id, policy.as_bytes())?;
        Ok(Signed { policy: safe(policy.as_bytes()), signature: safe(&signature), key_id })
    }

    fn signature(&self, key_id: &str, message: &[u8]) -> Result<Vec<u8>, CdnError> {
        let bad = |why: &dyn fmt::Display| {
            let directory = self.settings.directory.display();
            invalid(format!("{directory}/{key_id}.pem is no private key that CloudFront takes: {why}"))
        };
        let pem = self.files.private_key(key_id)?;
        // A parser's error may quote what it stumbled over.
        let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| bad(&"no PEM of a private key"))?;
        let key = rustls::crypto::ring::sign::any_supported_type(&der).map_err(|error| bad(&error))?;
        let signer = key.choose_scheme(&SCHEMES).ok_or_else(|| bad(&"use RSA or ECDSA on P-256"))?;
        signer.sign(message).map_err(|error| bad(&error))
    }
}

impl ProbeHeaders for Signer {
    /// Cookies for all of the URL's host, for a few minutes.
    fn headers(&self, url: &Url) -> Result<HeaderMap, CdnError> {
        let life = std::time::Duration::from_secs(PROBE_LIFE_SECS).min(self.settings.longest_life);
        let pattern = format!("{}/*", url.origin().ascii_serialization());
        let cookies = self.sign_cookies(&pattern, self.clock.now().plus(life))?;
        let pairs: Vec<_> =
            cookies.iter().map(|cookie| format!("{}={}", cookie.name, cookie.value)).collect();
        let value = HeaderValue::try_from(pairs.join("; "));
        let mut value = value.map_err(|_| invalid("a signed cookie is no header".into()))?;
        value.set_sensitive(true);
        Ok(HeaderMap::from_iter([(COOKIE, value)]))
    }
}

fn invalid(what: String) -> CdnError {
    CdnError::new(CdnFault::Invalid, what)
}

/// Base64 without what has a meaning in URLs and cookies.
fn safe(bytes: &[u8]) -> String {
    let replaced = |c| match c {
        '+' => '-',
        '=' => '_',
        '/' => '~',
        c => c,
    };
    STANDARD.encode(bytes).chars().map(replaced).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: Timestamp = Timestamp::from_unix_millis(1_800_000_000_000);

    fn signer() -> (tempfile::TempDir, Signer) {
        let dir = tempfile::tempdir().unwrap();
        let files = KeyFiles::new(dir.path().to_owned());
        files.make_new("ab").unwrap();
        files.name_new("ab", "K1").unwrap();
        files.set_signing("K1").unwrap();
        let settings = SignerSettings {
            key_group_id: "G1".into(),
            directory: dir.path().to_owned(),
            longest_life: Duration::from_secs(3_600),
        };
        (dir, Signer::new(settings, Clock::manual(NOW)))
    }

    #[test]
    fn what_is_signed_stands_behind_the_urls_own_query() {
        let (_dir, signer) = signer();
        let until = NOW.plus(Duration::from_secs(60));
        let signed = signer.sign_url("https://cdn.example.com/a.m3u8?x=1", until).unwrap();
        assert!(signed.starts_with("https://cdn.example.com/a.m3u8?x=1&Policy=eyJ"), "{signed}");
        assert!(signed.ends_with("&Key-Pair-Id=K1&Hash-Algorithm=SHA256"), "{signed}");
        let plain = signer.sign_url("https://cdn.example.com/a.m3u8", until).unwrap();
        assert!(plain.starts_with("https://cdn.example.com/a.m3u8?Policy="), "{plain}");
        for wrong in ["/a", "ftp://cdn.example.com/a", "https://cdn.example.com/a#b"] {
            assert!(signer.sign_url(wrong, until).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nothing_is_signed_for_longer_than_an_old_key_stays() {
        let (_dir, signer) = signer();
        let sign = |expires| signer.sign_cookies("https://cdn.example.com/*", expires);
        assert!(sign(NOW.plus(Duration::from_secs(3_600))).is_ok());
        assert!(
            sign(NOW.plus(Duration::from_secs(3_601))).unwrap_err().what.contains("signer_longest_life_secs")
        );
        assert!(sign(NOW).is_err(), "it has passed");
    }

    #[test]
    fn a_question_to_the_edge_carries_the_cookies_and_shows_them_to_nobody() {
        let (_dir, signer) = signer();
        let url = Url::parse("https://cdn.example.com/api/hls/keys/ab/check").unwrap();
        let headers = signer.headers(&url).unwrap();
        let cookie = headers[COOKIE].to_str().unwrap();
        for part in ["CloudFront-Policy=", "CloudFront-Signature=", "CloudFront-Key-Pair-Id=K1"] {
            assert!(cookie.contains(part), "{cookie}");
        }
        assert!(headers[COOKIE].is_sensitive());
        let cookies = signer.sign_cookies("https://a/*", NOW.plus(Duration::from_secs(1))).unwrap();
        assert!(!format!("{cookies:?}").contains(&cookies[1].value));
    }

    #[test]
    fn a_folder_without_a_key_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let settings = SignerSettings {
            key_group_id: "G1".into(),
            directory: dir.path().to_owned(),
            longest_life: Duration::from_secs(3_600),
        };
        let signer = Signer::new(settings, Clock::manual(NOW));
        let sign = || signer.sign_url("https://a/b", NOW.plus(Duration::from_secs(1))).unwrap_err().what;
        assert!(sign().contains("rotate the key group once"), "{}", sign());
        std::fs::write(dir.path().join("signing"), "K9\n").unwrap();
        assert!(sign().contains("K9.pem"), "{}", sign());
        std::fs::write(dir.path().join("K9.pem"), "-----BEGIN JUNK-----\nc2VjcmV0\n-----END JUNK-----\n")
            .unwrap();
        assert!(sign().contains("no PEM of a private key") && !sign().contains("c2VjcmV0"), "{}", sign());
    }
}
