//! A CDN in memory that does at once what it is asked.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use keyshield::cdn::{Cdn, CdnError, CdnLimits, DeliveryMode, KeySeen, NamedCdn, Purge, Rate};
use keyshield::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentSecrets, EdgeSecret, KeyId, KeyMethod, SealedKey, open_at_edge,
};
use parking_lot::Mutex;

const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

#[derive(Debug)]
pub struct MemoryCdn {
    at: usize,
    secret: EdgeSecret,
    keys: Mutex<HashMap<KeyId, SealedKey>>,
    purges: AtomicUsize,
}

impl MemoryCdn {
    pub fn new(at: usize) -> Self {
        let secret = SECRET.parse().expect("it is 64 hex digits");
        Self { at, secret, keys: Mutex::default(), purges: AtomicUsize::new(0) }
    }

    pub fn named(self: &Arc<Self>) -> NamedCdn {
        NamedCdn {
            name: format!("cdn{}", self.at),
            kind: "custom",
            mode: DeliveryMode::Push,
            edge: format!("https://cdn{}.example.com/", self.at),
            secret: Some(self.secret.clone()),
            cdn: Arc::clone(self) as Arc<dyn Cdn>,
        }
    }

    /// Calls.
    pub fn purges(&self) -> usize {
        self.purges.load(Ordering::Relaxed)
    }
}

#[async_trait]
impl Cdn for MemoryCdn {
    fn limits(&self) -> CdnLimits {
        let rate = Rate { calls: 1_000, per: Duration::from_secs(1) };
        CdnLimits {
            keys_per_call: 1_000,
            tags_per_purge: 100,
            urls_per_purge: 100,
            writes: rate,
            purges: rate,
            settles_within: Duration::ZERO,
        }
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        self.keys.lock().extend(keys.iter().map(|key| (key.key, key.clone())));
        Ok(())
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        let mut held = self.keys.lock();
        for key in keys {
            held.remove(key);
        }
        Ok(())
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        let sealed = self.keys.lock().get(&key).cloned();
        let Some(sealed) = sealed else { return Ok(KeySeen::Missing) };
        let Ok((_, bytes)) = open_at_edge(&self.secret, &sealed) else { return Ok(KeySeen::Missing) };
        let mut random = [0; CONTENT_SECRET_LEN];
        random[..bytes.len()].copy_from_slice(&bytes);
        let content = ContentSecrets::from_random(KeyMethod::Aes128, &random).content;
        Ok(KeySeen::Has(CheckValue::of(key, &content)))
    }

    async fn has_cached(&self, _path: &str, _key: KeyId) -> Result<bool, CdnError> {
        Ok(false)
    }

    async fn purge(&self, _purge: &Purge) -> Result<(), CdnError> {
        self.purges.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn health(&self) -> Result<(), CdnError> {
        Ok(())
    }
}
