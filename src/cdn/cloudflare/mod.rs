//! Cloudflare: Workers KV for keys at the edge, and the purge of its caches, by the REST API v4.
//!
//! In push mode a sealed key is one pair of Workers KV, `key:{key ID}`, which the worker of `edge/cloudflare` reads. KV
//! is eventually consistent: a place that has read a pair, or has found it missing, may say so for up to a minute
//! more, which is what [`CdnLimits::settles_within`] says. Purges go by cache tag, which every plan has. Deliberately
//! absent: the crate `cloudflare`, which knows no purge and brings a second HTTP client; and the expiry of pairs, because
//! the engine alone knows when a key ends.

mod api;
mod errors;

use std::time::Duration;

use async_trait::async_trait;
use serde::Serialize;

use self::api::{Api, Doing};
use super::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, Edge, KeySeen, Purge, Rate};
use crate::keys::{KeyId, SealedKey};
use crate::rest::Credential;

/// A call takes 10,000 pairs. It answers with the names of those that it did not store, and of a thousand they are
/// short enough to be read.
const KEYS_PER_CALL: usize = 1_000;
/// Tags, or URLs, in one purge.
const ITEMS_PER_PURGE: usize = 100;
/// Prefixes in one purge: the page on prefixes says so, where the others say 100.
const PREFIXES_PER_PURGE: usize = 30;
/// A user has 1,200 calls in five minutes, on whatever way they are made; who has none left is shut out for as long. A
/// sixth is left to people and to other programs.
const WRITES: Rate = Rate { calls: 1_000, per: Duration::from_secs(300) };
/// In KV, a change is seen everywhere after up to 60 seconds.
const KV_SETTLES_WITHIN: Duration = Duration::from_secs(60);

/// What of Cloudflare belongs to the shield.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudflareSettings {
    /// `https://api.cloudflare.com/client/v4`
    pub api_url: String,
    /// May be empty in pull mode, unless the token belongs to the account.
    pub account_id: String,
    /// The Workers KV namespace that the worker is bound to; empty in pull mode.
    pub namespace_id: String,
    pub zone_id: String,
    pub token: Credential,
    /// Calls that purge: the Free plan has 5 a minute, Pro 300, Business 600, Enterprise 3,000, for a whole account.
    pub purges_per_minute: u32,
    /// The longest time of one call.
    pub timeout: Duration,
}

/// Cloudflare.
#[derive(Debug)]
pub struct Cloudflare {
    api: Api,
    mode: DeliveryMode,
    edge: Edge,
    purges_per_minute: u32,
}

impl Cloudflare {
    /// # Errors
    /// A setting that cannot be used.
    pub fn new(settings: CloudflareSettings, mode: DeliveryMode, edge: Edge) -> Result<Self, CdnError> {
        let purges_per_minute = settings.purges_per_minute;
        if purges_per_minute == 0 {
            return Err(CdnError::new(CdnFault::Invalid, "purges_per_minute must be 1 or more"));
        }
        let api = Api::new(settings, mode == DeliveryMode::Push)?;
        Ok(Self { api, mode, edge, purges_per_minute })
    }

    /// A purge's prefix is host and path, without the scheme.
    fn prefix_of(&self, path: &str) -> String {
        let url = self.edge.url_of(path);
        url.split_once("://").map_or(url.clone(), |(_, rest)| rest.to_owned())
    }

    async fn purge_items(
        &self,
        kind: &'static str,
        items: &[String],
        at_once: usize,
    ) -> Result<(), CdnError> {
        for items in items.chunks(at_once) {
            let body = std::collections::BTreeMap::from([(kind, items)]);
            self.api.post(&self.api.zone("/purge_cache"), Doing::Purging, &body).await?;
        }
        Ok(())
    }
}

/// A pair as the bulk call takes it.
#[derive(Debug, Serialize)]
struct Pair<'a> {
    key: String,
    value: &'a str,
}

/// Under which name a key lies in the store; the worker builds the same.
fn name_of(key: KeyId) -> String {
    format!("key:{key}")
}

#[async_trait]
impl Cdn for Cloudflare {
    fn limits(&self) -> CdnLimits {
        CdnLimits {
            keys_per_call: KEYS_PER_CALL,
            tags_per_purge: ITEMS_PER_PURGE,
            urls_per_purge: ITEMS_PER_PURGE,
            writes: WRITES,
            purges: Rate { calls: self.purges_per_minute, per: Duration::from_secs(60) },
            settles_within: match self.mode {
                DeliveryMode::Pull => Duration::ZERO,
                DeliveryMode::Push => KV_SETTLES_WITHIN,
            },
        }
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        if self.mode == DeliveryMode::Pull {
            return Ok(());
        }
        if let [only] = keys {
            return self.api.put_value(&name_of(only.key), &only.text).await;
        }
        for keys in keys.chunks(KEYS_PER_CALL) {
            let pairs: Vec<_> =
                keys.iter().map(|key| Pair { key: name_of(key.key), value: &key.text }).collect();
            self.api.put_pairs(&pairs).await?;
        }
        Ok(())
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        if self.mode == DeliveryMode::Pull {
            return Ok(());
        }
        for keys in keys.chunks(KEYS_PER_CALL) {
            let names: Vec<_> = keys.iter().copied().map(name_of).collect();
            self.api.delete_pairs(&names).await?;
        }
        Ok(())
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.edge.verify(key).await
    }

    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        self.edge.has_cached(path, key).await
    }

    /// By tag where there are tags: everything that belongs to a key or a stream has them. Paths and prefixes name the
    /// same objects over again, and purges are dear here.
    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        if !purge.tags.is_empty() {
            return self.purge_items("tags", &purge.tags, ITEMS_PER_PURGE).await;
        }
        let urls: Vec<_> = purge.paths.iter().map(|path| self.edge.url_of(path)).collect();
        self.purge_items("files", &urls, ITEMS_PER_PURGE).await?;
        let prefixes: Vec<_> = purge.prefixes.iter().map(|path| self.prefix_of(path)).collect();
        self.purge_items("prefixes", &prefixes, PREFIXES_PER_PURGE).await
    }

    async fn health(&self) -> Result<(), CdnError> {
        self.api.check_token().await?;
        if self.mode == DeliveryMode::Push {
            self.api.get(&self.api.namespace(""), Doing::ReadingNamespace).await?;
        }
        self.api.get(&self.api.zone(""), Doing::ReadingZone).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdn::EdgeSettings;
    use crate::rest::Secret;

    fn settings() -> CloudflareSettings {
        CloudflareSettings {
            api_url: "https://api.example/client/v4/".into(),
            account_id: "a1".into(),
            namespace_id: "b2".into(),
            zone_id: "c3".into(),
            token: Credential::Text(Secret::new("the-token".into())),
            purges_per_minute: 5,
            timeout: Duration::from_secs(1),
        }
    }

    fn made(settings: CloudflareSettings, mode: DeliveryMode) -> Result<Cloudflare, CdnError> {
        let edge = Edge::new(EdgeSettings {
            url: "https://cdn.example/tv".parse().unwrap(),
            key_path: "/api/hls/keys/".into(),
            is_store: mode == DeliveryMode::Push,
            ca_file: None,
            timeout: Duration::from_secs(1),
        });
        Cloudflare::new(settings, mode, edge.unwrap())
    }

    #[test]
    fn a_setting_that_would_end_in_a_wrong_url_is_refused() {
        assert!(made(settings(), DeliveryMode::Push).is_ok());
        let without = CloudflareSettings { account_id: "".into(), namespace_id: "".into(), ..settings() };
        assert!(made(without.clone(), DeliveryMode::Pull).is_ok());
        assert!(made(without, DeliveryMode::Push).is_err());
        for bad in [
            CloudflareSettings { zone_id: "".into(), ..settings() },
            CloudflareSettings { zone_id: "cdn.example".into(), ..settings() },
            CloudflareSettings { namespace_id: "../b2".into(), ..settings() },
            CloudflareSettings { api_url: "not a URL".into(), ..settings() },
            CloudflareSettings { purges_per_minute: 0, ..settings() },
        ] {
            assert_eq!(made(bad, DeliveryMode::Push).unwrap_err().fault, CdnFault::Invalid);
        }
    }

    #[test]
    fn the_token_is_not_shown() {
        let shown = format!("{:?}", made(settings(), DeliveryMode::Push).unwrap());
        assert!(!shown.contains("the-token"), "{shown}");
    }

    #[test]
    fn a_prefix_has_no_scheme_and_keeps_what_stands_before_paths() {
        let prefix = made(settings(), DeliveryMode::Pull).unwrap().prefix_of("/live/ch1/");
        assert_eq!(prefix, "cdn.example/tv/live/ch1/");
    }

    #[test]
    fn what_was_changed_settles_at_once_only_where_nothing_is_stored() {
        let within = |mode| made(settings(), mode).unwrap().limits().settles_within;
        assert_eq!(within(DeliveryMode::Pull), Duration::ZERO);
        assert_eq!(within(DeliveryMode::Push), Duration::from_secs(60));
    }
}
