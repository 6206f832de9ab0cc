//! CloudFront: not connected yet.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;

use super::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, Edge, KeySeen, Purge, Rate};
use crate::keys::{KeyId, SealedKey};

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
#[derive(Debug)]
pub struct CloudFront {
    #[expect(dead_code, reason = "to come")]
    settings: CloudFrontSettings,
    #[expect(dead_code, reason = "to come")]
    mode: DeliveryMode,
    edge: Edge,
}

impl CloudFront {
    /// # Errors
    /// A setting that cannot be used.
    pub fn new(settings: CloudFrontSettings, mode: DeliveryMode, edge: Edge) -> Result<Self, CdnError> {
        Ok(Self { settings, mode, edge })
    }
}

fn to_come() -> CdnError {
    CdnError::new(CdnFault::Invalid, "to come")
}

#[async_trait]
impl Cdn for CloudFront {
    fn limits(&self) -> CdnLimits {
        let rate = Rate { calls: 1, per: Duration::from_secs(1) };
        CdnLimits {
            keys_per_call: 1,
            tags_per_purge: 1,
            urls_per_purge: 1,
            writes: rate,
            purges: rate,
            settles_within: Duration::ZERO,
        }
    }

    async fn put_keys(&self, _keys: &[SealedKey]) -> Result<(), CdnError> {
        Err(to_come())
    }

    async fn delete_keys(&self, _keys: &[KeyId]) -> Result<(), CdnError> {
        Err(to_come())
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.edge.verify(key).await
    }

    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        self.edge.has_cached(path, key).await
    }

    async fn purge(&self, _purge: &Purge) -> Result<(), CdnError> {
        Err(to_come())
    }

    async fn health(&self) -> Result<(), CdnError> {
        Err(to_come())
    }
}
