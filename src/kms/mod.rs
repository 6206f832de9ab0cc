//! Who wraps the data encryption keys: a master key file on this machine, or a KMS elsewhere.
//!
//! [`Kms`] is all that the engine knows of either. Every call names what the key is for, and a provider binds that to
//! the wrapped key: moved to another stream or another version, it does not open. What is far away stands behind a
//! [`Guard`], and a [`Keyring`] holds several. A provider but the master key file is a feature of Cargo. Deliberately
//! absent: the content keys, which are wrapped under a DEK without any call (`keys::seal`).

#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(feature = "kms-azure")]
mod azure;
#[cfg(feature = "kms-gcp")]
mod gcp;
mod guard;
mod keyring;
mod local;
#[cfg(feature = "kms-vault")]
mod vault;

use std::fmt;

use async_trait::async_trait;
use thiserror::Error;

#[cfg(any(feature = "kms-azure", feature = "kms-vault"))]
pub use crate::rest::Secret;
#[cfg(feature = "kms-aws")]
pub use aws::{AwsKms, AwsSettings, KeyArn};
#[cfg(feature = "kms-aws")]
pub(crate) use aws::{is_alias, is_key_id, is_label};
#[cfg(feature = "kms-azure")]
pub use azure::{AzureIdentity, AzureKms, AzureSettings};
#[cfg(feature = "kms-gcp")]
pub use gcp::{GcpKms, GcpSettings};
pub use guard::{Guard, Limits};
pub use keyring::{Held, Keyring};
pub use local::{LocalKms, MasterKeyError};
#[cfg(feature = "kms-vault")]
pub use vault::{Login, VaultKms, VaultSettings};

use crate::entropy;
use crate::keys::{Context, DataEncryptionKey, EnvelopeError};

/// A data encryption key as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    /// Which key of which provider wraps it: `local:1f2e3d4c`, `vault:transit/keyshield`.
    pub kek_id: String,
    pub bytes: Vec<u8>,
}

/// The key that wraps, as its provider describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyDescription {
    pub kek_id: String,
    /// Of those that the key has, the version that wraps now; `None` where keys have no versions.
    pub version: Option<u64>,
}

/// Wraps and unwraps data encryption keys. The context of every call is that of a DEK: its stream, its purpose and its
/// version (`keys::Context::Dek`).
#[async_trait]
pub trait Kms: fmt::Debug + Send + Sync {
    /// A new key, with what is to be stored of it: made here and wrapped, unless the KMS makes keys itself.
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        let key = DataEncryptionKey::from_bytes(*entropy::random());
        let wrapped = self.wrap(context, &key).await?;
        Ok((key, wrapped))
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError>;

    /// Unwraps under the key that wrapped it, which need not be the one that wraps now.
    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError>;

    /// Whether the key that wraps is there and may be used. Changes nothing.
    async fn describe(&self) -> Result<KeyDescription, KmsError>;

    /// Of its key's versions, the one that wrapped this, where that can be told without a call.
    fn version_of(&self, _wrapped: &WrappedKey) -> Option<u64> {
        None
    }

    /// Whether this is wrapped under the key, and its version, that wraps now, as [`Kms::describe`] says.
    fn is_current(&self, wrapped: &WrappedKey, now: &KeyDescription) -> bool {
        let is_version = || match (self.version_of(wrapped), now.version) {
            (Some(version), Some(now)) => version == now,
            _ => true,
        };
        wrapped.kek_id == now.kek_id && is_version()
    }
}

/// What a provider called its key, of an ID that begins with the provider's own name; `None` for another's.
fn named_by<'k>(provider: &str, kek_id: &'k str) -> Option<&'k str> {
    kek_id.strip_prefix(provider)?.strip_prefix(':')
}

/// Why a call of a KMS failed: whose, about which key, and what to look at.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("KMS {provider}, key {key}: {cause}")]
pub struct KmsError {
    pub provider: &'static str,
    /// The key that was to wrap or unwrap.
    pub key: String,
    pub cause: Cause,
}

impl KmsError {
    /// Whether the same call may succeed a moment later.
    pub fn is_retryable(&self) -> bool {
        matches!(self.cause, Cause::Unavailable(_))
    }

    /// Whether the KMS answers, and the matter is the wrapped key that it was given.
    pub fn is_about_what_was_wrapped(&self) -> bool {
        matches!(self.cause, Cause::Foreign | Cause::NotHeld(_) | Cause::Rejected(_) | Cause::Envelope(_))
    }
}

/// What is behind a [`KmsError`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Cause {
    /// Nobody answers, or only that it cannot now.
    #[error("{0}")]
    Unavailable(String),
    /// It answers, and does not let this shield use the key.
    #[error("{0}")]
    Refused(String),
    /// It answers, and does not open what it was given.
    #[error("{0}")]
    Rejected(String),
    #[error("wrapped a data encryption key, but is not held here; was kms.provider or its key changed?")]
    Foreign,
    #[error(
        "wrapped a data encryption key, but its provider is not held here: name {0:?} in kms.also, and configure it"
    )]
    NotHeld(String),
    #[error("{0}")]
    Envelope(#[from] EnvelopeError),
}

#[cfg(any(feature = "kms-azure", feature = "kms-gcp"))]
impl From<crate::rest::RestError> for Cause {
    fn from(error: crate::rest::RestError) -> Self {
        match error {
            crate::rest::RestError::Unreachable(why) => Cause::Unavailable(why),
            crate::rest::RestError::TooLong(why) => Cause::Refused(why),
        }
    }
}

/// What is at the bottom of an error: "connection refused", not "error sending request".
#[cfg(any(feature = "kms-aws", feature = "kms-azure", feature = "kms-gcp", feature = "kms-vault"))]
fn deepest<'e>(error: &'e (dyn std::error::Error + 'static)) -> &'e (dyn std::error::Error + 'static) {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest
}
