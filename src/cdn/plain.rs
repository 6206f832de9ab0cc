//! A CDN of which only its address is known: `CDN_ENDPOINTS`, and a stream's `cdnEndpoints`.
//!
//! Keys come through it from the shield, and there is no API to ask: nothing is stored, nothing can be purged. What it
//! has cached goes by its age alone, which is why [`CdnLimits::settles_within`] is a key's longest life in caches.

use std::time::Duration;

use async_trait::async_trait;

use super::{Cdn, CdnError, CdnLimits, Edge, KeySeen, Purge, Rate};
use crate::keys::{KeyId, SealedKey};

/// A CDN without an API.
#[derive(Debug)]
pub struct PlainCdn {
    edge: Edge,
    key_max_age: Duration,
}

impl PlainCdn {
    /// `key_max_age`: for how long caches may keep a key.
    pub fn new(edge: Edge, key_max_age: Duration) -> Self {
        Self { edge, key_max_age }
    }
}

#[async_trait]
impl Cdn for PlainCdn {
    fn limits(&self) -> CdnLimits {
        // There is no API to spare; what is counted is done by nobody.
        let rate = Rate { calls: 1_000, per: Duration::from_secs(1) };
        CdnLimits {
            keys_per_call: 1_000,
            tags_per_purge: 1_000,
            urls_per_purge: 1_000,
            writes: rate,
            purges: rate,
            settles_within: self.key_max_age,
        }
    }

    async fn put_keys(&self, _keys: &[SealedKey]) -> Result<(), CdnError> {
        Ok(())
    }

    async fn delete_keys(&self, _keys: &[KeyId]) -> Result<(), CdnError> {
        Ok(())
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.edge.verify(key).await
    }

    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        self.edge.has_cached(path, key).await
    }

    async fn purge(&self, _purge: &Purge) -> Result<(), CdnError> {
        Ok(())
    }

    async fn health(&self) -> Result<(), CdnError> {
        Ok(())
    }
}
