//! Google Cloud KMS: a symmetric key of a key ring, by its REST API.
//!
//! There is no call that makes a data key: it is made here and encrypted there. The context of a key goes along as
//! `additionalAuthenticatedData`. Checksums (CRC32C) go both ways and every one is checked, because a key that was
//! damaged on its way to be encrypted is lost when it leaves the memory, and nobody hears of it before. Deliberately
//! absent: the client library, which brings gRPC and tracing for three calls (docs/design/016).

mod session;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crc::{CRC_32_ISCSI, Crc};
use reqwest::{Client, Method, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use self::session::Session;
use super::{Cause, KeyDescription, Kms, KmsError, WrappedKey, named_by};
use crate::keys::{Context, DataEncryptionKey};
use crate::rest::{self, Answer, said};

const PROVIDER: &str = "gcp";
/// CRC32C, as RFC 3720 has it.
const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// Where the key is, and how this shield gets at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcpSettings {
    /// `https://cloudkms.googleapis.com`
    pub endpoint: String,
    pub project: String,
    /// `europe-west1`, `global`
    pub location: String,
    pub key_ring: String,
    pub key: String,
    /// JSON, as `gcloud` makes it; Application Default Credentials where there is none.
    pub credentials_file: Option<PathBuf>,
}

impl GcpSettings {
    /// `projects/p/locations/l/keyRings/r/cryptoKeys/k`
    pub fn key_name(&self) -> String {
        let Self { project, location, key_ring, key, .. } = self;
        format!("projects/{project}/locations/{location}/keyRings/{key_ring}/cryptoKeys/{key}")
    }
}

/// One key.
pub struct GcpKms {
    client: Client,
    settings: GcpSettings,
    /// Of the key that wraps.
    name: String,
    session: Session,
}

impl fmt::Debug for GcpKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GcpKms").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Encrypt<'b> {
    plaintext: &'b str,
    plaintext_crc32c: String,
    additional_authenticated_data: &'b str,
    additional_authenticated_data_crc32c: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Encrypted {
    /// The version that encrypted.
    name: String,
    ciphertext: String,
    ciphertext_crc32c: Option<Int64>,
    // What is false is left out.
    #[serde(default)]
    verified_plaintext_crc32c: bool,
    #[serde(default)]
    verified_additional_authenticated_data_crc32c: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Decrypt<'b> {
    ciphertext: &'b str,
    ciphertext_crc32c: String,
    additional_authenticated_data: &'b str,
    additional_authenticated_data_crc32c: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Decrypted {
    #[serde(default)]
    plaintext: String,
    plaintext_crc32c: Option<Int64>,
}

#[derive(Deserialize)]
struct CryptoKey {
    #[serde(default)]
    purpose: String,
    primary: Option<CryptoKeyVersion>,
}

#[derive(Deserialize)]
struct CryptoKeyVersion {
    name: String,
    #[serde(default)]
    state: String,
}

/// JSON of protocol buffers writes 64 bits as text, and readers take both.
#[derive(Deserialize)]
#[serde(untagged)]
enum Int64 {
    Text(String),
    Number(i64),
}

impl Int64 {
    fn is_checksum_of(&self, bytes: &[u8]) -> bool {
        let checksum = i64::from(CRC32C.checksum(bytes));
        match self {
            Int64::Text(text) => text.parse() == Ok(checksum),
            Int64::Number(number) => *number == checksum,
        }
    }
}

impl GcpKms {
    /// `timeout` is for connecting; the [`super::Guard`] has one for the whole call.
    ///
    /// # Errors
    /// A machine on which no HTTP client can be made.
    pub fn new(settings: GcpSettings, timeout: Duration) -> Result<Self, KmsError> {
        let name = settings.key_name();
        let failed = |why| KmsError { provider: PROVIDER, key: name.clone(), cause: Cause::Refused(why) };
        let client = rest::client(None, timeout).map_err(failed)?;
        let session = Session::new(settings.credentials_file.clone());
        Ok(Self { client, settings, name, session })
    }

    /// `projects/p/locations/l/keyRings/r/cryptoKeys/k`
    pub fn key_name(&self) -> &str {
        &self.name
    }

    /// Calls with a token, and once more with a new one if it is not taken.
    async fn call<T: DeserializeOwned>(
        &self,
        (method, key, verb): (Method, &str, &str),
        body: &impl Serialize,
    ) -> Result<T, Cause> {
        let endpoint = self.settings.endpoint.trim_end_matches('/');
        let url = format!("{endpoint}/v1/{key}{verb}");
        let mut is_second = false;
        loop {
            let headers = self.session.headers().await?;
            let request = self.client.request(method.clone(), &url).headers(headers);
            let request = if method == Method::GET { request } else { rest::with_json(request, body) };
            let answer = rest::send(request, endpoint).await?;
            if answer.status == StatusCode::UNAUTHORIZED && !is_second {
                self.session.forget().await;
                is_second = true;
                continue;
            }
            return match answer.status.is_success() {
                true => answer.json().ok_or_else(|| {
                    Cause::Refused(format!(
                        "{endpoint}: an answer that is not Cloud KMS's; is it the address?"
                    ))
                }),
                false => Err(cause(&answer, verb, key)),
            };
        }
    }

    async fn encrypt(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, Cause> {
        let aad = context.aad();
        let plaintext = Zeroizing::new(STANDARD.encode(key.expose()));
        let body = Encrypt {
            plaintext: &plaintext,
            plaintext_crc32c: CRC32C.checksum(key.expose()).to_string(),
            additional_authenticated_data: &STANDARD.encode(&aad),
            additional_authenticated_data_crc32c: CRC32C.checksum(&aad).to_string(),
        };
        let made: Encrypted = self.call((Method::POST, &self.name, ":encrypt"), &body).await?;
        if !made.verified_plaintext_crc32c || !made.verified_additional_authenticated_data_crc32c {
            return Err(damaged("the key or its context", "to"));
        }
        let bytes = STANDARD.decode(&made.ciphertext).ok();
        let bytes = bytes.filter(|bytes| made.ciphertext_crc32c.is_some_and(|crc| crc.is_checksum_of(bytes)));
        let bytes = bytes.ok_or_else(|| damaged("the wrapped key", "from"))?;
        if split(&made.name).is_none_or(|(_, version)| version.is_none()) {
            let why = format!("it says that {} encrypted, which names no version", said(&made.name));
            return Err(Cause::Refused(why));
        }
        Ok(WrappedKey { kek_id: format!("{PROVIDER}:{}", made.name), bytes })
    }

    async fn decrypt(
        &self,
        key: &str,
        context: &Context<'_>,
        ciphertext: &[u8],
    ) -> Result<DataEncryptionKey, Cause> {
        let aad = context.aad();
        let body = Decrypt {
            ciphertext: &STANDARD.encode(ciphertext),
            ciphertext_crc32c: CRC32C.checksum(ciphertext).to_string(),
            additional_authenticated_data: &STANDARD.encode(&aad),
            additional_authenticated_data_crc32c: CRC32C.checksum(&aad).to_string(),
        };
        let opened: Decrypted = self.call((Method::POST, key, ":decrypt"), &body).await?;
        let plaintext = Zeroizing::new(opened.plaintext);
        let bytes = Zeroizing::new(STANDARD.decode(plaintext.as_bytes()).unwrap_or_default());
        if !opened.plaintext_crc32c.is_some_and(|crc| crc.is_checksum_of(&bytes)) {
            return Err(damaged("the key", "from"));
        }
        let fixed = <[u8; DataEncryptionKey::LEN]>::try_from(&bytes[..]);
        let fixed =
            fixed.map_err(|_| Cause::Rejected("it holds no data encryption key of 256 bits".to_owned()))?;
        Ok(DataEncryptionKey::from_bytes(fixed))
    }

    async fn look(&self) -> Result<KeyDescription, Cause> {
        let key: CryptoKey = self.call((Method::GET, &self.name, ""), &()).await?;
        if key.purpose != "ENCRYPT_DECRYPT" {
            let why = format!(
                "its purpose is {}; make one: gcloud kms keys create NAME --purpose=encryption",
                said(&key.purpose)
            );
            return Err(Cause::Refused(why));
        }
        let none = || "it has no primary version; run: gcloud kms keys set-primary-version".to_owned();
        let primary = key.primary.ok_or_else(|| Cause::Refused(none()))?;
        let version = split(&primary.name).and_then(|(_, version)| version);
        if primary.state != "ENABLED" {
            let version = version.map_or_else(|| said(&primary.name), |version| version.to_string());
            let why = format!(
                "its primary version {version} is {}; run: gcloud kms keys versions enable {version}",
                said(&primary.state)
            );
            return Err(Cause::Refused(why));
        }
        Ok(KeyDescription { kek_id: format!("{PROVIDER}:{}", primary.name), version })
    }

    fn failed(&self, cause: Cause) -> KmsError {
        KmsError { provider: PROVIDER, key: self.name.clone(), cause }
    }
}

/// The key, and the version if one is named, of `projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1`.
/// `None` for any other text: it goes into a URL.
fn split(name: &str) -> Option<(&str, Option<u64>)> {
    let (key, version) = match name.split_once("/cryptoKeyVersions/") {
        Some((key, version)) => (key, Some(version.parse().ok()?)),
        None => (name, None),
    };
    let parts: Vec<_> = key.split('/').collect();
    let (fixed, named): (Vec<_>, Vec<_>) = parts.chunks_exact(2).map(|pair| (pair[0], pair[1])).unzip();
    let is_whole = parts.len() == 8 && fixed == ["projects", "locations", "keyRings", "cryptoKeys"];
    let is_name = |name: &&str| {
        name.bytes().any(|byte| byte.is_ascii_alphanumeric())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    // A project may belong to a domain: example.com:video.
    let is_whole = is_whole && is_name(&&*named[0].replacen(':', ".", 1)) && named[1..].iter().all(is_name);
    is_whole.then_some((key, version))
}

fn damaged(what: &str, way: &str) -> Cause {
    Cause::Unavailable(format!("{what} was damaged on the way {way} the KMS: a checksum does not match"))
}

/// What an error means to an operator. `verb` is the call's: `:decrypt`.
fn cause(answer: &Answer, verb: &str, key: &str) -> Cause {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Body {
        error: Status,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Status {
        status: String,
        message: String,
    }
    let Status { status, message } = answer.json::<Body>().unwrap_or_default().error;
    let what = match verb {
        "" => "get",
        verb => &verb[1..],
    };
    let told = format!("{what}: {}", said(&message));
    match (answer.status.as_u16(), status.as_str()) {
        (429, _) | (_, "RESOURCE_EXHAUSTED") => {
            Cause::Unavailable(format!("the quota of calls is used up: {told}"))
        }
        (408 | 500.., _) | (_, "UNAVAILABLE" | "DEADLINE_EXCEEDED" | "ABORTED" | "INTERNAL") => {
            Cause::Unavailable(format!("it answers {}: {told}", answer.status.as_u16()))
        }
        (401, _) => Cause::Refused(format!("{told}; the token is not taken: check the credentials")),
        (403, _) => Cause::Refused(format!(
            "{told}; check that the account has the roles of docs/kms.md on {key} and that the API is enabled"
        )),
        (404, _) => Cause::Refused(format!(
            "{told}; check project, location, key ring and key, or make it: gcloud kms keys create"
        )),
        (_, "FAILED_PRECONDITION") => Cause::Refused(format!(
            "{told}; check that the version is enabled: gcloud kms keys versions list"
        )),
        (400, _) if verb == ":decrypt" => Cause::Rejected(said(&message)),
        (status, _) => Cause::Refused(format!("it answers {status}: {told}")),
    }
}

#[async_trait]
impl Kms for GcpKms {
    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.encrypt(context, key).await.map_err(|cause| self.failed(cause))
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        let failed = |cause| KmsError { provider: PROVIDER, key: wrapped.kek_id.clone(), cause };
        let name = named_by(PROVIDER, &wrapped.kek_id);
        // The key finds the version by the ciphertext.
        let (key, _) = name.and_then(split).ok_or_else(|| failed(Cause::Foreign))?;
        self.decrypt(key, context, &wrapped.bytes).await.map_err(failed)
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.look().await.map_err(|cause| self.failed(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_specification() {
        // RFC 3720, B.4: 32 bytes of zeros.
        assert!(Int64::Text("2324772522".into()).is_checksum_of(&[0; 32]));
        assert!(Int64::Number(0x8a91_36aa).is_checksum_of(&[0; 32]));
        assert!(!Int64::Number(0x8a91_36aa).is_checksum_of(&[1; 32]));
    }

    #[test]
    fn a_key_is_named_whole_or_not_asked_for() {
        let key = "projects/example.com:p/locations/l/keyRings/r/cryptoKeys/k_1";
        assert_eq!(split(key), Some((key, None)));
        assert_eq!(split(&format!("{key}/cryptoKeyVersions/12")), Some((key, Some(12))));
        for name in [
            "",
            "projects/p",
            "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/x",
            "projects/p/locations/l/keyRings/r/cryptoKeys/..",
            "projects/p/locations/l/keyRings/r/cryptoKeys/k?a=b",
            "projects/p/locations/l/keyRings/r/cryptoKeys/k:destroy",
            "projects/p/locations/l/keyRings/r/cryptoKeys/k/more/parts",
            "x/p/locations/l/keyRings/r/cryptoKeys/k",
        ] {
            assert_eq!(split(name), None, "{name}");
        }
    }
}
