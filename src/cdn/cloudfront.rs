//! CloudFront, by the AWS SDK: KeyValueStore, invalidations, signed URLs and the function at its edge.
//!
//! In push mode keys lie in a KeyValueStore that `edge/cloudfront/function.js` reads. Its language has HMAC and no AES,
//! which is why keys are sealed by [`EdgeCipher::Hmac`]. The API is global and signed for one region; the SDK's own
//! attempts are off, because the engine knows when to try again. Deliberately absent: making distributions and policies,
//! which are an operator's (`docs/cdn-cloudfront.md`).

mod clients;
mod errors;
mod function;
mod health;
mod invalidation;
mod key_files;
mod key_group;
mod key_value_store;
mod signer;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use tokio::sync::{Mutex, OnceCell};

use self::clients::Clients;
pub use self::function::CloudFrontEdgeCode;
pub use self::invalidation::Patience;
pub use self::key_group::{KeyGroup, KeyGroupStatus, Step};
pub use self::signer::{SignedCookie, Signer};
use super::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, Edge, KeySeen, Purge, Rate};
use crate::clock::Clock;
use crate::keys::{EdgeCipher, KeyId, SealedKey};

/// Keys in one UpdateKeys (Quotas on key value stores).
const KEYS_PER_CALL: usize = 50;
/// Paths or tags that an account may invalidate in a second (Quotas on invalidations).
const ITEMS_PER_PURGE: usize = 150;
/// Until what is written to a KeyValueStore is at every edge: "within a few seconds", and some more.
const STORE_SETTLES_WITHIN: Duration = Duration::from_secs(10);

/// What of CloudFront belongs to the shield. Credentials are those that the AWS SDK finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudFrontSettings {
    pub distribution_id: String,
    /// The KeyValueStore that the function reads; empty in pull mode.
    pub key_value_store_arn: String,
    /// Whether the distribution has cache tags (`CacheTagConfig`); otherwise paths are invalidated.
    pub has_cache_tags: bool,
    /// Instead of AWS's own, for tests and private endpoints: of the control plane, and of KeyValueStore.
    pub endpoint: Option<String>,
    pub key_value_store_endpoint: Option<String>,
    /// The key group of signed URLs and cookies, if viewers need them.
    pub signer: Option<SignerSettings>,
    /// The longest time of one call.
    pub timeout: Duration,
}

/// What signs URLs and cookies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignerSettings {
    pub key_group_id: String,
    /// Holds the private keys, PEM, one file `{public key ID}.pem` each, and which of them signs.
    pub directory: PathBuf,
    /// The longest life of a signed URL or cookie: as long an old key stays in the group.
    pub longest_life: Duration,
}

/// CloudFront.
pub struct CloudFront {
    settings: CloudFrontSettings,
    mode: DeliveryMode,
    edge: Edge,
    patience: Patience,
    signer: Option<Arc<Signer>>,
    credentials: Option<SharedCredentialsProvider>,
    /// Made at the first call.
    clients: OnceCell<Clients>,
    /// The store's version as this node knows it. Held while it writes: the version is the whole store's, so writers
    /// take turns.
    version: Mutex<Option<String>>,
}

impl fmt::Debug for CloudFront {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudFront")
            .field("settings", &self.settings)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl CloudFront {
    /// Where viewers need signed cookies, the edge is asked with such.
    ///
    /// # Errors
    /// A setting that cannot be used.
    pub fn new(settings: CloudFrontSettings, mode: DeliveryMode, edge: Edge) -> Result<Self, CdnError> {
        let id = &settings.distribution_id;
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit()) {
            let what = format!("distribution_id {id:?} is none: they look like E2QWRUHAPOMQZL");
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        if mode == DeliveryMode::Push {
            key_value_store::check_arn(&settings.key_value_store_arn)?;
        }
        let signer = settings.signer.clone().map(|own| Arc::new(Signer::new(own, Clock::System)));
        let edge = match &signer {
            Some(signer) => edge.with_headers(Arc::clone(signer) as Arc<_>),
            None => edge,
        };
        let (clients, version, patience) = (OnceCell::new(), Mutex::new(None), Patience::default());
        Ok(Self { settings, mode, edge, patience, signer, credentials: None, clients, version })
    }

    /// Credentials instead of those that the SDK finds: environment, profile, web identity, container, instance.
    #[must_use]
    pub fn with_credentials(self, credentials: impl ProvideCredentials + 'static) -> Self {
        Self { credentials: Some(SharedCredentialsProvider::new(credentials)), ..self }
    }

    /// How long an invalidation is waited for, instead of [`Patience::default`].
    #[must_use]
    pub fn with_patience(self, patience: Patience) -> Self {
        Self { patience, ..self }
    }

    /// What signs URLs and cookies, if viewers need such.
    pub fn signer(&self) -> Option<&Signer> {
        self.signer.as_deref()
    }

    /// The keys that signatures are checked with, if viewers need such.
    pub fn key_group(&self) -> Option<KeyGroup<'_>> {
        self.settings.signer.as_ref().map(|signer| KeyGroup::new(self, signer))
    }

    async fn clients(&self) -> &Clients {
        let made = || Clients::settle(&self.settings, self.credentials.clone());
        self.clients.get_or_init(made).await
    }
}

#[async_trait]
impl Cdn for CloudFront {
    fn limits(&self) -> CdnLimits {
        let settles_within = match self.mode {
            DeliveryMode::Pull => Duration::ZERO,
            DeliveryMode::Push => STORE_SETTLES_WITHIN,
        };
        CdnLimits {
            keys_per_call: KEYS_PER_CALL,
            tags_per_purge: if self.settings.has_cache_tags { ITEMS_PER_PURGE } else { 0 },
            urls_per_purge: ITEMS_PER_PURGE,
            // Not documented; a write is often two calls, and several nodes may write.
            writes: Rate { calls: 5, per: Duration::from_secs(1) },
            purges: Rate { calls: 1, per: Duration::from_secs(1) },
            settles_within,
        }
    }

    fn cipher(&self) -> EdgeCipher {
        EdgeCipher::Hmac
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        match self.mode {
            DeliveryMode::Pull => Ok(()),
            DeliveryMode::Push => self.update_store(keys, &[]).await,
        }
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        match self.mode {
            DeliveryMode::Pull => Ok(()),
            DeliveryMode::Push => self.update_store(&[], keys).await,
        }
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.edge.verify(key).await
    }

    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        self.edge.has_cached(path, key).await
    }

    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        self.invalidate(purge).await
    }

    async fn health(&self) -> Result<(), CdnError> {
        self.check_health().await
    }
}
