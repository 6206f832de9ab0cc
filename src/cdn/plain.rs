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

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;

    use super::*;
    use crate::cdn::{CdnFault, EdgeSettings};

    /// A CDN before a shield that has the key ab… and has cached a segment under it.
    async fn cdn() -> (PlainCdn, KeyId) {
        let key = KeyId::from_bytes([0xab; 16]);
        let check = format!("/api/hls/keys/{key}/check");
        let segment = move || async move { [("keyshield-key", key.to_string())] };
        let nothing = || async { (StatusCode::NOT_FOUND, [("keyshield-served-by", "shield")]) };
        let app = Router::new()
            .route(&check, get(|| async { "0123456789abcdef" }))
            .route("/live/seg.ts", get(segment))
            .fallback(nothing);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await });
        let key_path = "/api/hls/keys/".to_owned();
        let timeout = Duration::from_secs(5);
        let settings = EdgeSettings { url, key_path, is_store: false, ca_file: None, timeout };
        (PlainCdn::new(Edge::new(settings).unwrap(), Duration::from_secs(300)), key)
    }

    #[tokio::test]
    async fn it_is_verified_through_its_edge() {
        let (cdn, key) = cdn().await;
        assert_eq!(cdn.verify(key).await, Ok(KeySeen::Has("0123456789abcdef".parse().unwrap())));
        assert_eq!(cdn.verify(KeyId::from_bytes([1; 16])).await, Ok(KeySeen::Missing));
        assert_eq!(cdn.has_cached("/live/seg.ts", key).await, Ok(true));
        assert_eq!(cdn.has_cached("/live/other.ts", key).await, Ok(false));
    }

    #[tokio::test]
    async fn what_it_has_cached_stays_until_it_is_old() {
        let (cdn, key) = cdn().await;
        let purge = Purge { paths: vec!["/live/seg.ts".into()], ..Purge::default() };
        assert_eq!(cdn.purge(&purge).await, Ok(()));
        assert_eq!(cdn.has_cached("/live/seg.ts", key).await, Ok(true));
        assert_eq!(cdn.limits().settles_within, Duration::from_secs(300));
    }

    #[tokio::test]
    async fn one_that_is_away_is_said_to_be_when_its_edge_is_asked() {
        let timeout = Duration::from_secs(5);
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let url = format!("http://{free}").parse().unwrap();
        let key_path = "/api/hls/keys/".to_owned();
        let settings = EdgeSettings { url, key_path, is_store: false, ca_file: None, timeout };
        let cdn = PlainCdn::new(Edge::new(settings).unwrap(), timeout);
        let error = cdn.verify(KeyId::from_bytes([1; 16])).await.unwrap_err();
        assert_eq!(error.fault, CdnFault::Away, "{error}");
    }
}
