//! Azure Key Vault and Managed HSM: an RSA key that wraps by RSA-OAEP-256, over their REST API.
//!
//! OAEP binds no context, and what it wraps anybody can wrap who knows the public key. So a DEK is sealed here, with its
//! context, under a random key of its own, and the vault wraps that one. What is stored:
//!
//! ```text
//! format (1) ‖ length of the wrapped key (2, big endian) ‖ wrapped key ‖ sealed DEK, as keys::seal makes it
//! ```
//!
//! A key's name stands for its newest version, which is looked up before it wraps; a DEK is unwrapped by the version
//! that wrapped it. Deliberately absent: the client library for keys, which knows no bound for an answer
//! (docs/design/016); symmetric keys, which Managed HSM alone has; and the token's challenge, since whom a token is for is
//! a matter of the configuration and not of whoever answers.

mod identity;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use parking_lot::Mutex;
use reqwest::header::{AUTHORIZATION, DATE, HeaderMap};
use reqwest::{Client, Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use url::Url;
use zeroize::Zeroizing;

pub use self::identity::AzureIdentity;
use self::identity::Tokens;
use super::{Cause, KeyDescription, Kms, KmsError, WrappedKey, named_by};
use crate::entropy;
use crate::keys::{Context, DataEncryptionKey, EnvelopeError, NONCE_LEN, open, seal};
use crate::rest::{self, Answer, said};

const PROVIDER: &str = "azure";
const API_VERSION: &str = "7.4";
const ALGORITHM: &str = "RSA-OAEP-256";
/// The format of what is stored, whose wrapped key is RSA-OAEP-256's.
const FORMAT: u8 = 1;
/// What the key must be allowed to do.
const OPERATIONS: [&str; 2] = ["wrapKey", "unwrapKey"];

/// Where the key is, and how this shield gets at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AzureSettings {
    /// `https://video.vault.azure.net/`, and nothing behind the host.
    pub vault: Url,
    pub key: String,
    /// What a token is for: `https://vault.azure.net`
    pub resource: String,
    pub identity: AzureIdentity,
    /// Who gives tokens: `https://login.microsoftonline.us`. Azure's public cloud where there is none.
    pub authority: Option<String>,
    /// PEM; the system's authorities where there is none.
    pub ca_file: Option<PathBuf>,
}

impl AzureSettings {
    /// `https://video.vault.azure.net/keys/keyshield`
    pub fn key_name(&self) -> String {
        format!("{}keys/{}", self.vault, self.key)
    }
}

/// One key, in its newest version.
pub struct AzureKms {
    client: Client,
    settings: AzureSettings,
    tokens: Mutex<Arc<Tokens>>,
}

impl fmt::Debug for AzureKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureKms").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct KeyBundle {
    key: JsonWebKey,
    #[serde(default)]
    attributes: Attributes,
}

#[derive(Deserialize)]
struct JsonWebKey {
    kid: String,
    kty: String,
    #[serde(default)]
    key_ops: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Attributes {
    enabled: bool,
    /// Seconds since 1970.
    exp: Option<u64>,
    nbf: Option<u64>,
}

#[derive(Serialize)]
struct Operation<'b> {
    alg: &'static str,
    value: &'b str,
}

#[derive(Deserialize)]
struct OperationResult {
    kid: String,
    value: String,
}

/// A version of a key of the vault that is configured.
#[derive(Debug, PartialEq, Eq)]
struct KeyVersion<'k> {
    name: &'k str,
    version: &'k str,
}

impl AzureKms {
    /// `timeout` is for connecting; the [`super::Guard`] has one for the whole call.
    ///
    /// # Errors
    /// A CA file that cannot be read or is none, and credentials that cannot be any.
    pub fn new(settings: AzureSettings, timeout: Duration) -> Result<Self, KmsError> {
        let failed = |cause| KmsError { provider: PROVIDER, key: settings.key_name(), cause };
        let client = rest::client(settings.ca_file.as_deref(), timeout)
            .map_err(|why| failed(Cause::Refused(format!("kms.azure.{why}"))))?;
        let tokens = Mutex::new(Arc::new(Tokens::new(&settings, client.clone()).map_err(failed)?));
        Ok(Self { client, settings, tokens })
    }

    /// `https://video.vault.azure.net/keys/keyshield`
    pub fn key_name(&self) -> String {
        self.settings.key_name()
    }

    /// Calls with a token, and once more with a new one if it is not taken.
    async fn call<T: DeserializeOwned>(
        &self,
        (method, path): (Method, &str),
        body: Option<&Operation<'_>>,
    ) -> Result<(T, HeaderMap), Cause> {
        let vault = &self.settings.vault;
        let url = format!("{vault}keys/{path}?api-version={API_VERSION}");
        let send = async |tokens: &Tokens| {
            let authorization = tokens.authorization().await?;
            let mut request = self.client.request(method.clone(), &url).header(AUTHORIZATION, authorization);
            if let Some(body) = body {
                request = rest::with_json(request, body);
            }
            Ok::<_, Cause>(rest::send(request, vault.as_str()).await?)
        };
        let tokens = Arc::clone(&self.tokens.lock());
        let mut answer = send(&tokens).await?;
        if answer.status == StatusCode::UNAUTHORIZED {
            // The library keeps a token for as long as it was made for, whatever is said of it.
            let anew = Arc::new(Tokens::new(&self.settings, self.client.clone())?);
            *self.tokens.lock() = Arc::clone(&anew);
            answer = send(&anew).await?;
        }
        if !answer.status.is_success() {
            return Err(self.cause(&answer, path));
        }
        let not_its = || Cause::Refused(format!("{vault}: an answer that is not Key Vault's; is it one?"));
        Ok((answer.json().ok_or_else(not_its)?, answer.headers))
    }

    /// The newest version of the key, if it may wrap.
    async fn newest(&self) -> Result<String, Cause> {
        let (bundle, headers): (KeyBundle, _) = self.call((Method::GET, &self.settings.key), None).await?;
        let KeyBundle { key: JsonWebKey { kid, kty, key_ops }, attributes } = bundle;
        let refused = |why: &str| Err(Cause::Refused(format!("{}: {why}", said(&kid))));
        if kty != "RSA" && kty != "RSA-HSM" {
            return refused(&format!(
                "it is of type {}, which does not do {ALGORITHM}; make one of type RSA or RSA-HSM",
                said(&kty)
            ));
        }
        if !attributes.enabled {
            return refused("it is disabled; run: az keyvault key set-attributes --enabled true");
        }
        // By the vault's clock, which is the one that it keeps to.
        if let Some(now) = date(&headers) {
            if attributes.exp.is_some_and(|exp| exp <= now) {
                return refused("it has expired; make a new version: az keyvault key rotate");
            }
            if attributes.nbf.is_some_and(|nbf| nbf > now) {
                return refused("it may not be used yet: its activation date lies ahead");
            }
        }
        if let Some(missing) = OPERATIONS.iter().find(|wanted| !key_ops.iter().any(|op| op == *wanted)) {
            return refused(&format!(
                "it does not permit {missing}; run: az keyvault key set-attributes --ops"
            ));
        }
        match self.version(&kid) {
            Some(_) => Ok(kid),
            None => {
                refused("the vault answers with a key that is not its own; is kms.azure.vault the right one?")
            }
        }
    }

    async fn wrap_here(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, Cause> {
        let kid = self.newest().await?;
        let under = entropy::random::<32>();
        let value = Zeroizing::new(URL_SAFE_NO_PAD.encode(&under[..]));
        let (made, kid) = self.operate(&kid, "wrapkey", &value).await?;
        let wrapped = URL_SAFE_NO_PAD.decode(made.as_bytes()).ok();
        let len = wrapped.as_ref().and_then(|wrapped| u16::try_from(wrapped.len()).ok());
        let (Some(wrapped), Some(len)) = (wrapped, len) else {
            return Err(Cause::Refused("the wrapped key that it answers with is none".into()));
        };
        let sealed = seal(&under, *entropy::random::<NONCE_LEN>(), context, key.expose());
        let bytes = [&[FORMAT][..], &len.to_be_bytes(), &wrapped, &sealed].concat();
        Ok(WrappedKey { kek_id: format!("{PROVIDER}:{kid}"), bytes })
    }

    async fn unwrap_here(
        &self,
        kid: &str,
        context: &Context<'_>,
        bytes: &[u8],
    ) -> Result<DataEncryptionKey, Cause> {
        let (wrapped, sealed) = parts(bytes)?;
        let (value, _) = self.operate(kid, "unwrapkey", &URL_SAFE_NO_PAD.encode(wrapped)).await?;
        let under = Zeroizing::new(URL_SAFE_NO_PAD.decode(value.as_bytes()).unwrap_or_default());
        let under: Zeroizing<[u8; 32]> = match under[..].try_into() {
            Ok(under) => Zeroizing::new(under),
            Err(_) => return Err(Cause::Rejected("it holds no key of 256 bits".into())),
        };
        let plaintext = open(&under, context, sealed)?;
        let fixed = <[u8; DataEncryptionKey::LEN]>::try_from(&plaintext[..])
            .map_err(|_| EnvelopeError::TooShort { found: plaintext.len() })?;
        Ok(DataEncryptionKey::from_bytes(fixed))
    }

    /// Lets a version wrap or unwrap. Gives what it made, and which version it says it was.
    async fn operate(
        &self,
        kid: &str,
        what: &str,
        value: &str,
    ) -> Result<(Zeroizing<String>, String), Cause> {
        let KeyVersion { name, version } = self.version(kid).ok_or(Cause::Foreign)?;
        let path = format!("{name}/{version}/{what}");
        let body = Operation { alg: ALGORITHM, value };
        let (result, _): (OperationResult, _) = self.call((Method::POST, &path), Some(&body)).await?;
        let value = Zeroizing::new(result.value);
        match result.kid == kid {
            true => Ok((value, result.kid)),
            false => Err(Cause::Refused(format!("{path}: the vault used {} instead", said(&result.kid)))),
        }
    }

    /// The name and version in a key's identifier, `https://video.vault.azure.net/keys/keyshield/0f3c…`. `None` for
    /// another vault's, which gets no token of ours, and for any other text: it goes into a URL.
    fn version<'k>(&self, kid: &'k str) -> Option<KeyVersion<'k>> {
        let url = Url::parse(kid).ok()?;
        if url.origin() != self.settings.vault.origin() {
            return None;
        }
        let (_, path) = kid.split_once("://")?.1.split_once('/')?;
        let mut parts = path.strip_prefix("keys/")?.split('/');
        let (name, version) = (parts.next()?, parts.next()?);
        let is_name = |part: &str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        (parts.next().is_none() && is_name(name) && is_name(version)).then_some(KeyVersion { name, version })
    }

    /// What an error means to an operator.
    fn cause(&self, answer: &Answer, path: &str) -> Cause {
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Body {
            error: Failure,
        }
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Failure {
            code: String,
            message: String,
            innererror: Option<Box<Failure>>,
        }
        let Failure { code, message, innererror } = answer.json::<Body>().unwrap_or_default().error;
        // The inner one is the reason: Forbidden, because KeyDisabled.
        let code = innererror.map(|inner| inner.code).filter(|inner| !inner.is_empty()).unwrap_or(code);
        let code = if code.is_empty() { answer.status.as_u16().to_string() } else { said(&code) };
        let told = format!("{path}: {code}: {}", said(&message));
        match answer.status.as_u16() {
            429 => Cause::Unavailable(format!("the vault limits the rate of calls: {told}")),
            408 | 500.. => Cause::Unavailable(format!("it answers {}: {told}", answer.status.as_u16())),
            401 => Cause::Refused(format!(
                "{told}; the token is not taken: check that its tenant is the vault's and that it is for {}",
                self.settings.resource
            )),
            403 => Cause::Refused(format!(
                "{told}; check that the version is enabled and that the identity has the role of docs/kms.md"
            )),
            404 => Cause::Refused(format!(
                "{told}; check vault and key, or make it: az keyvault key create --kty RSA --name {}",
                self.settings.key
            )),
            400 if path.ends_with("/unwrapkey") => Cause::Rejected(format!("{code}: {}", said(&message))),
            status => Cause::Refused(format!("it answers {status}: {told}")),
        }
    }

    fn failed(&self, cause: Cause) -> KmsError {
        KmsError { provider: PROVIDER, key: self.key_name(), cause }
    }
}

/// The wrapped key and the sealed DEK of what is stored.
fn parts(bytes: &[u8]) -> Result<(&[u8], &[u8]), Cause> {
    let short = EnvelopeError::TooShort { found: bytes.len() };
    let (&[format, high, low], rest) = bytes.split_first_chunk::<3>().ok_or(short)?;
    if format != FORMAT {
        let why = format!("it is of format {format}, which this version does not know");
        return Err(Cause::Rejected(why));
    }
    let len = usize::from(u16::from_be_bytes([high, low]));
    Ok(rest.split_at_checked(len).ok_or(EnvelopeError::TooShort { found: bytes.len() })?)
}

/// When the vault says it is: seconds since 1970.
fn date(headers: &HeaderMap) -> Option<u64> {
    let date = httpdate::parse_http_date(headers.get(DATE)?.to_str().ok()?).ok()?;
    Some(date.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

#[async_trait]
impl Kms for AzureKms {
    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.wrap_here(context, key).await.map_err(|cause| self.failed(cause))
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        let failed = |cause| KmsError { provider: PROVIDER, key: wrapped.kek_id.clone(), cause };
        let kid = named_by(PROVIDER, &wrapped.kek_id);
        let kid = kid.ok_or_else(|| failed(Cause::Foreign))?;
        self.unwrap_here(kid, context, &wrapped.bytes).await.map_err(failed)
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        let kid = self.newest().await.map_err(|cause| self.failed(cause))?;
        // Versions have no order that a number could say.
        Ok(KeyDescription { kek_id: format!("{PROVIDER}:{kid}"), version: None })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Secret;
    use super::*;

    fn kms() -> AzureKms {
        let identity = AzureIdentity::ClientSecret {
            tenant_id: "tenant".into(),
            client_id: "client".into(),
            secret: Secret::new("sesame".into()),
        };
        let settings = AzureSettings {
            vault: "https://video.vault.azure.net".parse().unwrap(),
            key: "keyshield".into(),
            resource: "https://vault.azure.net".into(),
            identity,
            authority: None,
            ca_file: None,
        };
        AzureKms::new(settings, Duration::from_secs(1)).unwrap()
    }

    #[test]
    fn a_version_is_this_vaults_or_not_asked_for() {
        let kms = kms();
        let version = KeyVersion { name: "k-1", version: "0f3c" };
        assert_eq!(kms.version("https://video.vault.azure.net/keys/k-1/0f3c"), Some(version));
        for kid in [
            "https://video.vault.azure.net/keys/k-1",
            "https://video.vault.azure.net/keys/k-1/0f3c/more",
            "https://video.vault.azure.net/keys/../0f3c",
            "https://video.vault.azure.net/keys/k-1/0f3c?a=b",
            "https://video.vault.azure.net/secrets/k-1/0f3c",
            "https://video.vault.azure.net:8443/keys/k-1/0f3c",
            "http://video.vault.azure.net/keys/k-1/0f3c",
            "https://video.vault.azure.net@evil.example/keys/k-1/0f3c",
            "https://evil.example/keys/k-1/0f3c",
            "",
        ] {
            assert_eq!(kms.version(kid), None, "{kid}");
        }
    }

    #[test]
    fn what_is_stored_is_taken_apart_within_its_bounds() {
        assert_eq!(parts(&[1, 0, 2, 7, 8, 9]), Ok((&[7, 8][..], &[9][..])));
        for cut in [&[][..], &[1], &[1, 0], &[1, 0, 2, 7], &[2, 0, 0]] {
            assert!(parts(cut).is_err(), "{cut:?}");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert!(!format!("{:?}", kms()).contains("sesame"));
    }
}
