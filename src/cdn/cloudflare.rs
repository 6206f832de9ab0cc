//! Cloudflare: not connected yet.

use std::time::Duration;

use async_trait::async_trait;

use super::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, Edge, KeySeen, Purge, Rate};
use crate::keys::{KeyId, SealedKey};
use crate::rest::Credential;

/// What of Cloudflare belongs to the shield.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudflareSettings {
    /// `https://api.cloudflare.com/client/v4`
    pub api_url: String,
    pub account_id: String,
    /// The Workers KV namespace that the worker is bound to; empty in pull mode.
    pub namespace_id: String,
    pub zone_id: String,
    /// What the zone's plan allows.
    pub purges_per_minute: u32,
    pub token: Credential,
    /// The longest time of one call.
    pub timeout: Duration,
}

/// Cloudflare.
#[derive(Debug)]
pub struct Cloudflare {
    #[expect(dead_code, reason = "to come")]
    settings: CloudflareSettings,
    #[expect(dead_code, reason = "to come")]
    mode: DeliveryMode,
    edge: Edge,
}

impl Cloudflare {
    /// # Errors
    /// A setting that cannot be used.
    pub fn new(settings: CloudflareSettings, mode: DeliveryMode, edge: Edge) -> Result<Self, CdnError> {
        Ok(Self { settings, mode, edge })
    }
}

fn to_come() -> CdnError {
    CdnError::new(CdnFault::Invalid, "to come")
}

#[async_trait]
impl Cdn for Cloudflare {
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
