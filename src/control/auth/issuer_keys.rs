//! The keys that an issuer signs by: a JWK Set (RFC 7517) from a file or a URL, kept and kept fresh.
//!
//! A key that is not known is looked for once more, because issuers rotate theirs; but not oftener than
//! [`Pace::pause`], because anybody can name a key that does not exist. What is known stays in use while the
//! source fails. Symmetric keys are left out: whoever can read them could sign.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use parking_lot::RwLock;
use serde::Deserialize;
use serde_json::Value;
use url::{Host, Url};

use super::{AccessError, AuthError, JwksSource};

const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BYTES: usize = 256 << 10;
const AGENT: &str = concat!("keyshield/", env!("CARGO_PKG_VERSION"));

/// How often a source is asked.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// What is older is asked for again: an issuer takes keys back by leaving them out.
    max_age: Duration,
    /// At least between two questions, whatever comes.
    pause: Duration,
}

const URL_PACE: Pace = Pace { max_age: Duration::from_secs(600), pause: Duration::from_secs(30) };
/// A look at a file's time costs nothing.
const FILE_PACE: Pace = Pace { max_age: Duration::from_secs(3), pause: Duration::from_secs(3) };

/// A public key, and what it may verify.
pub(super) struct IssuerKey {
    id: String,
    algorithms: Vec<Algorithm>,
    pub(super) key: DecodingKey,
}

#[derive(Default)]
struct Known {
    keys: Vec<Arc<IssuerKey>>,
    /// When they were read or found unchanged.
    loaded_at: Option<Instant>,
    asked_at: Option<Instant>,
    /// Of the file that they were read from.
    modified: Option<SystemTime>,
}

/// A JWK Set's text, and the time of the file that it was read from.
type Read = (Vec<u8>, Option<SystemTime>);

pub(super) struct IssuerKeys {
    source: JwksSource,
    pace: Pace,
    client: reqwest::Client,
    known: RwLock<Known>,
    /// Whoever holds it asks the source.
    turn: tokio::sync::Mutex<()>,
}

impl IssuerKeys {
    pub(super) fn new(source: JwksSource) -> Result<Self, AccessError> {
        let pace = if matches!(source, JwksSource::Url(_)) { URL_PACE } else { FILE_PACE };
        // The provider that the data plane's connections use too. An error says that it is there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = reqwest::Client::builder()
            .timeout(FETCH_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(AGENT);
        // An issuer elsewhere may be reached through the environment's proxy alone. One on this machine is not reached
        // through any, and a proxy that answers in its place would say who may call.
        if matches!(&source, JwksSource::Url(url) if is_on_loopback(url)) {
            client = client.no_proxy();
        }
        Ok(Self {
            source,
            pace,
            client: client.build()?,
            known: RwLock::default(),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// The key of that ID, if it is one for that algorithm.
    ///
    /// # Errors
    /// [`AuthError::Jwt`], or [`AuthError::NoIssuerKeys`] when no keys were ever had.
    pub(super) async fn find(&self, kid: &str, algorithm: Algorithm) -> Result<Arc<IssuerKey>, AuthError> {
        // Whoever finds them old asks; the others go on with what is known.
        if self.known.read().is_older_than(self.pace.max_age)
            && let Ok(_turn) = self.turn.try_lock()
        {
            self.refresh().await;
        }
        if let Some(found) = self.known.read().find(kid, algorithm) {
            return found;
        }
        let _turn = self.turn.lock().await;
        // Another may have asked while this one waited.
        if let Some(found) = self.known.read().find(kid, algorithm) {
            return found;
        }
        self.refresh().await;
        let known = self.known.read();
        match known.find(kid, algorithm) {
            Some(found) => found,
            None if known.loaded_at.is_none() => Err(AuthError::NoIssuerKeys),
            None => Err(AuthError::Jwt("it is signed by a key that its issuer does not publish".into())),
        }
    }

    /// Asks the source, unless it was asked a moment ago. The caller holds `turn`.
    async fn refresh(&self) {
        if self.known.read().asked_at.is_some_and(|at| at.elapsed() < self.pace.pause) {
            return;
        }
        self.known.write().asked_at = Some(Instant::now());
        let read = match &self.source {
            // A small file, once in a few seconds: not worth a thread.
            JwksSource::File(path) => self.read_file(path),
            JwksSource::Url(url) => self.fetch(url).await.map(|body| Some((body, None))),
        };
        let keys = read.and_then(|read| {
            read.map(|(body, modified)| parse(&body).map(|keys| (keys, modified))).transpose()
        });
        let mut known = self.known.write();
        match keys {
            Ok(Some((keys, modified))) => {
                tracing::info!(keys = keys.len(), "read the keys of the tokens' issuer");
                known.keys = keys;
                known.modified = modified;
                known.loaded_at = Some(Instant::now());
            }
            Ok(None) => known.loaded_at = Some(Instant::now()),
            Err(why) => {
                tracing::warn!(why, known = known.keys.len(), "cannot read the keys of the tokens' issuer")
            }
        }
    }

    /// `None`: as it was.
    fn read_file(&self, path: &Path) -> Result<Option<Read>, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        let about = std::fs::metadata(path).map_err(failed)?;
        let modified = about.modified().ok();
        if modified.is_some() && modified == self.known.read().modified {
            return Ok(None);
        }
        if about.len() > MAX_BYTES as u64 {
            return Err(format!("{}: longer than {MAX_BYTES} bytes", path.display()));
        }
        Ok(Some((std::fs::read(path).map_err(failed)?, modified)))
    }

    async fn fetch(&self, url: &str) -> Result<Vec<u8>, String> {
        let failed = |error: reqwest::Error| format!("{url}: {error}");
        let mut response = self.client.get(url).send().await.map_err(failed)?;
        if !response.status().is_success() {
            return Err(format!("{url}: answered {}", response.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(format!("{url}: longer than {MAX_BYTES} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }
}

impl Known {
    fn is_older_than(&self, age: Duration) -> bool {
        self.loaded_at.is_none_or(|at| at.elapsed() >= age)
    }

    fn find(&self, kid: &str, algorithm: Algorithm) -> Option<Result<Arc<IssuerKey>, AuthError>> {
        let mut named = self.keys.iter().filter(|key| key.id == kid).peekable();
        named.peek()?;
        let fit = named.find(|key| key.algorithms.contains(&algorithm));
        Some(fit.cloned().ok_or_else(|| AuthError::Jwt("its algorithm is not that of its key".into())))
    }
}

fn is_on_loopback(url: &str) -> bool {
    Url::parse(url).is_ok_and(|url| match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    })
}

/// The usable keys of a JWK Set. Keys that are none of ours, of a kind or a use that is not known here, are left
/// out and not errors (RFC 7517 §5).
fn parse(body: &[u8]) -> Result<Vec<Arc<IssuerKey>>, String> {
    #[derive(Deserialize)]
    struct JwkSet {
        keys: Vec<Value>,
    }
    let set: JwkSet = serde_json::from_slice(body).map_err(|error| format!("not a JWK Set: {error}"))?;
    Ok(set.keys.into_iter().filter_map(usable).map(Arc::new).collect())
}

fn usable(jwk: Value) -> Option<IssuerKey> {
    let jwk: Jwk = serde_json::from_value(jwk).ok()?;
    if jwk.common.public_key_use.as_ref().is_some_and(|of| *of != PublicKeyUse::Signature) {
        return None;
    }
    let of_kind: &[Algorithm] = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => &[
            Algorithm::RS256,
            Algorithm::RS384,
            Algorithm::RS512,
            Algorithm::PS256,
            Algorithm::PS384,
            Algorithm::PS512,
        ],
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => &[Algorithm::ES256],
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => &[Algorithm::ES384],
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => &[Algorithm::EdDSA],
        _ => return None,
    };
    let algorithms = match jwk.common.key_algorithm {
        None => of_kind.to_vec(),
        Some(named) => {
            let named = Algorithm::try_from(named).ok()?;
            of_kind.iter().copied().filter(|algorithm| *algorithm == named).collect()
        }
    };
    let id = jwk.common.key_id.clone()?;
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    (!algorithms.is_empty()).then_some(IssuerKey { id, algorithms, key })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;
    use serde_json::json;

    use super::*;

    #[test]
    fn an_issuer_on_this_machine_is_known_by_its_host() {
        for url in [
            "http://localhost:1/jwks",
            "http://127.0.0.2/jwks",
            "https://[::1]:8/jwks",
            "http://a.localhost/",
        ] {
            assert!(is_on_loopback(url), "{url}");
        }
        for url in
            ["https://idp.example/jwks", "https://10.0.0.1/jwks", "https://localhost.example/jwks", "x"]
        {
            assert!(!is_on_loopback(url), "{url}");
        }
    }

    /// The public key of RFC 8037 appendix A.2.
    fn set(kid: &str) -> String {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid}]}).to_string()
    }

    const IMPATIENT: Pace = Pace { max_age: Duration::ZERO, pause: Duration::ZERO };

    #[test]
    fn only_keys_that_can_verify_a_signature_are_taken() {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let okp = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "kid": "a"});
        let with = |name: &str, value: &str| {
            let mut jwk = okp.clone();
            jwk[name] = json!(value);
            jwk
        };
        let mut without_id = okp.clone();
        without_id.as_object_mut().unwrap().remove("kid");
        let set = json!({"keys": [
            okp,
            with("use", "enc"),
            with("alg", "RS256"),
            with("alg", "HS256"),
            with("crv", "X25519"),
            without_id,
            {"kty": "oct", "k": "c2VjcmV0", "kid": "b"},
            {"kty": "EC", "crv": "P-521", "x": x, "y": x, "kid": "c"},
            {"kty": "new", "kid": "d"},
            5,
        ]});
        let keys = parse(set.to_string().as_bytes()).unwrap();
        assert_eq!(keys.len(), 1);
        assert_eq!((keys[0].id.as_str(), &keys[0].algorithms[..]), ("a", &[Algorithm::EdDSA][..]));
        assert!(parse(b"<html>").is_err() && parse(b"{}").is_err());
    }

    #[tokio::test]
    async fn a_file_is_read_again_when_its_time_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("jwks.json");
        let mut keys = IssuerKeys::new(JwksSource::File(path.clone())).unwrap();
        keys.pace = IMPATIENT;
        let gone = keys.find("a", Algorithm::EdDSA).await.err();
        assert_eq!(gone, Some(AuthError::NoIssuerKeys));
        std::fs::write(&path, set("a")).unwrap();
        assert!(keys.find("a", Algorithm::EdDSA).await.is_ok());

        std::fs::write(&path, set("b")).unwrap();
        let later = std::fs::metadata(&path).unwrap().modified().unwrap() + Duration::from_secs(5);
        std::fs::File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert!(keys.find("b", Algorithm::EdDSA).await.is_ok());
        assert!(matches!(keys.find("a", Algorithm::EdDSA).await, Err(AuthError::Jwt(_))));

        std::fs::remove_file(&path).unwrap();
        assert!(keys.find("b", Algorithm::EdDSA).await.is_ok(), "kept while the source fails");
        let other = keys.find("b", Algorithm::ES256).await.err().unwrap();
        assert!(other.to_string().contains("algorithm"), "{other}");
    }

    #[tokio::test]
    async fn a_url_is_asked_again_for_an_unknown_key_but_not_at_will() {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        // The issuer rotates its key with the second question, and fails from the third on.
        let answer = move || {
            let at = count.fetch_add(1, Ordering::SeqCst);
            async move {
                match at {
                    0 => (StatusCode::OK, set("a")),
                    1 => (StatusCode::OK, set("b")),
                    _ => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
                }
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/jwks", get(answer))).await });

        let mut keys = IssuerKeys::new(JwksSource::Url(url)).unwrap();
        assert!(keys.find("a", Algorithm::EdDSA).await.is_ok());
        assert!(keys.find("a", Algorithm::EdDSA).await.is_ok());
        for _ in 0..3 {
            assert!(matches!(keys.find("b", Algorithm::EdDSA).await, Err(AuthError::Jwt(_))));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1, "a moment ago it was not there");

        keys.pace.pause = Duration::ZERO;
        assert!(keys.find("b", Algorithm::EdDSA).await.is_ok());
        assert!(keys.find("c", Algorithm::EdDSA).await.is_err());
        assert_eq!(asked.load(Ordering::SeqCst), 3);
        assert!(keys.find("b", Algorithm::EdDSA).await.is_ok(), "kept while the issuer fails");
    }
}
