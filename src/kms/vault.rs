//! Vault and OpenBao: the transit secrets engine over HTTP.
//!
//! The context of a key goes along as `associated_data`, which transit authenticates with the ciphertext. Nothing is
//! ever created: `encrypt` makes a key that it does not find, so the key is described before. `rewrap` ignores
//! associated data and is not used.

mod login;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Client, Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::{Zeroize, Zeroizing};

use self::login::Session;
use super::{Cause, KeyDescription, Kms, KmsError, Secret, WrappedKey, deepest, named_by};
use crate::keys::{Context, DataEncryptionKey};

const PROVIDER: &str = "vault";
const AGENT: &str = concat!("keyshield/", env!("CARGO_PKG_VERSION"));
/// Answers are a few hundred bytes.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Key types that authenticate associated data.
const AEAD_TYPES: [&str; 4] = ["aes128-gcm96", "aes256-gcm96", "chacha20-poly1305", "xchacha20-poly1305"];

/// Where the key is, and how this shield gets at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultSettings {
    /// `https://vault.example:8200`
    pub address: String,
    /// Where the transit engine is mounted.
    pub mount: String,
    pub key: String,
    pub namespace: Option<String>,
    pub login: Login,
    /// PEM; the system's authorities where there is none.
    pub ca_file: Option<PathBuf>,
}

/// How a token is come by. Files are read anew at every login, so that they can be replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Login {
    Token(Secret),
    TokenFile(PathBuf),
    AppRole { role_id: String, secret_id_file: PathBuf },
    Kubernetes { role: String, jwt_file: PathBuf },
}

/// One transit key.
pub struct VaultKms {
    client: Client,
    settings: VaultSettings,
    session: Session,
}

impl fmt::Debug for VaultKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VaultKms").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct DataKey {
    plaintext: String,
    ciphertext: String,
}

#[derive(Deserialize)]
struct Encrypted {
    ciphertext: String,
}

#[derive(Deserialize)]
struct Decrypted {
    plaintext: String,
}

#[derive(Deserialize)]
struct TransitKey {
    #[serde(rename = "type")]
    kind: String,
    derived: bool,
    latest_version: u64,
}

impl VaultKms {
    /// `timeout` is for connecting; the [`super::Guard`] has one for the whole call.
    ///
    /// # Errors
    /// A CA file that cannot be read or is none.
    pub fn new(settings: VaultSettings, timeout: Duration) -> Result<Self, KmsError> {
        // The provider that the data plane's connections use too. An error says that it is there already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut client = Client::builder()
            .connect_timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(AGENT);
        let failed = |why: String| KmsError {
            provider: PROVIDER,
            key: format!("{}/{}", settings.mount, settings.key),
            cause: Cause::Refused(why),
        };
        if let Some(path) = &settings.ca_file {
            let bad =
                |error: &dyn fmt::Display| failed(format!("kms.vault.ca_file {}: {error}", path.display()));
            let pem = std::fs::read(path).map_err(|error| bad(&error))?;
            let authorities = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| bad(&error))?;
            if authorities.is_empty() {
                return Err(bad(&"holds no certificate"));
            }
            client = client.tls_certs_only(authorities);
        }
        let client = client.build().map_err(|error| failed(error.to_string()))?;
        let session = Session::new(settings.login.clone());
        Ok(Self { client, settings, session })
    }

    /// `transit/keyshield`
    pub fn key_name(&self) -> String {
        format!("{}/{}", self.settings.mount, self.settings.key)
    }

    fn kek_id(&self) -> String {
        format!("{PROVIDER}:{}", self.key_name())
    }

    fn failed(&self, cause: Cause) -> KmsError {
        KmsError { provider: PROVIDER, key: self.key_name(), cause }
    }

    /// The mount and name of the key that wrapped something.
    fn wrapped_by<'k>(&self, kek_id: &'k str) -> Result<(&'k str, &'k str), KmsError> {
        let named = named_by(PROVIDER, kek_id);
        let parts = named.and_then(|name| name.rsplit_once('/'));
        // It comes from the database, and goes into a path.
        let is_name = |text: &str| {
            let is_part = |part: &str| {
                !part.is_empty()
                    && !part.bytes().all(|byte| byte == b'.')
                    && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            };
            text.split('/').all(is_part)
        };
        parts.filter(|(mount, key)| is_name(mount) && is_name(key)).ok_or_else(|| KmsError {
            provider: PROVIDER,
            key: kek_id.to_owned(),
            cause: Cause::Foreign,
        })
    }

    /// Calls with a token, and once more with a new one if it is refused.
    async fn call<T: for<'d> Deserialize<'d>>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, KmsError> {
        let token = self.session.token(self).await?;
        let mut answer = self.send(method.clone(), path, body, Some(&token)).await?;
        if answer.status == StatusCode::FORBIDDEN && self.session.forget(&token).await {
            let token = self.session.token(self).await?;
            answer = self.send(method, path, body, Some(&token)).await?;
        }
        self.data(path, answer)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        token: Option<&Secret>,
    ) -> Result<Answer, KmsError> {
        let url = format!("{}/v1/{path}", self.settings.address.trim_end_matches('/'));
        let mut request = self.client.request(method, url).header("X-Vault-Request", "true");
        if let Some(namespace) = &self.settings.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = token {
            let mut value = reqwest::header::HeaderValue::from_str(token.expose())
                .map_err(|_| self.failed(Cause::Refused("the token is not one line of ASCII text".into())))?;
            value.set_sensitive(true);
            request = request.header("X-Vault-Token", value);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        let unreachable = |error: reqwest::Error| {
            let cause = deepest(&error);
            let why = format!("{} cannot be reached: {cause}", self.settings.address);
            self.failed(Cause::Unavailable(why))
        };
        let mut response = request.send().await.map_err(unreachable)?;
        let (status, mut body) = (response.status(), Zeroizing::new(Vec::new()));
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                let why = format!("{} answers at too great length; is it a Vault?", self.settings.address);
                return Err(self.failed(Cause::Refused(why)));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, body })
    }

    /// What an answer holds, or what its error means to an operator.
    fn data<T: for<'d> Deserialize<'d>>(&self, path: &str, answer: Answer) -> Result<T, KmsError> {
        #[derive(Deserialize)]
        struct Body<T> {
            data: T,
        }
        if answer.status.is_success() {
            let body: Result<Body<T>, _> = serde_json::from_slice(&answer.body);
            // The error may quote what it stumbled over.
            return body.map(|body| body.data).map_err(|_| {
                self.failed(Cause::Refused(format!(
                    "{path}: an answer that is not transit's; is it a Vault?"
                )))
            });
        }
        Err(self.failed(answer.cause(path, &self.settings)))
    }

    fn key_of(&self, plaintext: String) -> Result<DataEncryptionKey, KmsError> {
        let plaintext = Zeroizing::new(plaintext);
        let mut bytes = Zeroizing::new(STANDARD.decode(plaintext.as_bytes()).unwrap_or_default());
        let fixed = <[u8; DataEncryptionKey::LEN]>::try_from(&bytes[..]);
        bytes.zeroize();
        let fixed = fixed.map_err(|_| {
            self.failed(Cause::Rejected("it holds no data encryption key of 256 bits".into()))
        })?;
        Ok(DataEncryptionKey::from_bytes(fixed))
    }
}

/// An answer, read to its end.
struct Answer {
    status: StatusCode,
    body: Zeroizing<Vec<u8>>,
}

impl Answer {
    fn cause(&self, path: &str, settings: &VaultSettings) -> Cause {
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Errors {
            errors: Vec<String>,
        }
        let errors: Errors = serde_json::from_slice(&self.body).unwrap_or_default();
        let said = match errors.errors.join("; ").trim().replace('\n', " ") {
            nothing if nothing.is_empty() => "no reason given".to_owned(),
            said => said,
        };
        let VaultSettings { address, mount, key, .. } = settings;
        let missing = || {
            Cause::Refused(format!(
                "there is no such key, and the shield makes none; run: vault write -f {mount}/keys/{key}"
            ))
        };
        match self.status.as_u16() {
            403 => Cause::Refused(format!(
                "{path}: {said}; check that the token is valid and that its policy allows this path"
            )),
            404 if said.contains("no handler for route") => Cause::Refused(format!(
                "{said} Is transit mounted there? Run: vault secrets enable -path={mount} transit"
            )),
            404 => missing(),
            400 if said.contains("encryption key not found") => missing(),
            400 if path.contains("/decrypt/") => Cause::Rejected(said),
            429 => Cause::Unavailable(format!("{address} limits the rate of calls: {said}")),
            503 => Cause::Unavailable(format!("{address}: {said}; if it is sealed, unseal it")),
            status @ 500.. => Cause::Unavailable(format!("{address} answers {status}: {said}")),
            status => Cause::Refused(format!("{path}: {address} answers {status}: {said}")),
        }
    }
}

fn associated_data(context: &Context<'_>) -> String {
    STANDARD.encode(context.aad())
}

#[async_trait]
impl Kms for VaultKms {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        let VaultSettings { mount, key, .. } = &self.settings;
        let path = format!("{mount}/datakey/plaintext/{key}");
        let body = json!({ "associated_data": associated_data(context), "bits": 256 });
        let made: DataKey = self.call(Method::POST, &path, Some(&body)).await?;
        let wrapped = WrappedKey { kek_id: self.kek_id(), bytes: made.ciphertext.into_bytes() };
        Ok((self.key_of(made.plaintext)?, wrapped))
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        // A token that may create keys would create this one.
        self.describe().await?;
        let path = format!("{}/encrypt/{}", self.settings.mount, self.settings.key);
        let plaintext = STANDARD.encode(key.expose());
        let mut body = json!({ "plaintext": plaintext, "associated_data": associated_data(context) });
        let encrypted: Result<Encrypted, _> = self.call(Method::POST, &path, Some(&body)).await;
        if let Some(Value::String(plaintext)) = body.get_mut("plaintext") {
            plaintext.zeroize();
        }
        Ok(WrappedKey { kek_id: self.kek_id(), bytes: encrypted?.ciphertext.into_bytes() })
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        let (mount, key) = self.wrapped_by(&wrapped.kek_id)?;
        let ciphertext = String::from_utf8_lossy(&wrapped.bytes);
        let body = json!({ "ciphertext": ciphertext, "associated_data": associated_data(context) });
        let path = format!("{mount}/decrypt/{key}");
        let opened: Decrypted = self.call(Method::POST, &path, Some(&body)).await?;
        self.key_of(opened.plaintext)
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        let path = format!("{}/keys/{}", self.settings.mount, self.settings.key);
        let key: TransitKey = self.call(Method::GET, &path, None).await?;
        if !AEAD_TYPES.contains(&key.kind.as_str()) || key.derived {
            let derived = if key.derived { ", derived" } else { "" };
            let why = format!(
                "it is of type {}{derived}, which cannot bind a key to its stream; use one of type aes256-gcm96",
                key.kind
            );
            return Err(self.failed(Cause::Refused(why)));
        }
        Ok(KeyDescription { kek_id: self.kek_id(), version: Some(key.latest_version) })
    }

    fn version_of(&self, wrapped: &WrappedKey) -> Option<u64> {
        let text = std::str::from_utf8(&wrapped.bytes).ok()?;
        let (version, _) = text.strip_prefix("vault:v")?.split_once(':')?;
        version.parse().ok()
    }
}
