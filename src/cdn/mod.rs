//! The CDNs before the shield: what they are asked to do, and how each vendor is asked.
//!
//! [`Cdn`] is all that the engine knows of any of them. In *pull* mode a key comes through the CDN from the shield, so
//! there is nothing to store at the edge; in *push* mode it lies sealed in the edge's own store (`keys::SealedKey`) and
//! the code in `edge/` opens it. Either way the shield asks the edge itself what it answers ([`Edge`]). Deliberately
//! absent: when something is to be done and how often it is tried again (`engine`).

mod cloudflare;
#[cfg(feature = "cdn-cloudfront")]
mod cloudfront;
mod custom;
mod edge;
mod error;
mod fastly;
mod plain;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use url::Url;

pub use cloudflare::{Cloudflare, CloudflareSettings};
#[cfg(feature = "cdn-cloudfront")]
pub use cloudfront::{
    CloudFront, CloudFrontEdgeCode, CloudFrontSettings, KeyGroup, KeyGroupStatus, Patience, SignedCookie,
    Signer, SignerSettings, Step,
};
pub use custom::{CustomCdn, CustomSettings};
pub use edge::{Edge, EdgeSettings, KeySeen, ProbeHeaders};
pub use error::{CdnError, CdnFault};
pub use fastly::{Fastly, FastlyDeployed, FastlyEdgeCode, FastlySettings, PopAnswer, PopTally};
pub use plain::PlainCdn;

use crate::keys::{EdgeCipher, EdgeSecret, KeyId, SealedKey};

/// How keys come to players through a CDN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeliveryMode {
    /// The key URI goes through the CDN to the shield.
    #[default]
    Pull,
    /// Keys lie sealed in the edge's own store.
    Push,
}

impl DeliveryMode {
    pub const ALL: [DeliveryMode; 2] = [DeliveryMode::Pull, DeliveryMode::Push];

    /// Its name in the configuration and the API.
    pub fn name(self) -> &'static str {
        match self {
            DeliveryMode::Pull => "pull",
            DeliveryMode::Push => "push",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// So many calls in so much time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub calls: u32,
    pub per: Duration,
}

/// What a vendor documents that it takes. The engine stays within.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CdnLimits {
    /// Keys in one call of [`Cdn::put_keys`] or [`Cdn::delete_keys`].
    pub keys_per_call: usize,
    /// Cache tags in one call of [`Cdn::purge`]; 0: it purges by URL alone.
    pub tags_per_purge: usize,
    /// URLs in one call of [`Cdn::purge`].
    pub urls_per_purge: usize,
    /// Calls that change what is stored. One method call may cost several.
    pub writes: Rate,
    pub purges: Rate,
    /// After a change is accepted, how long some edge may still not know of it.
    pub settles_within: Duration,
}

/// What is to go from caches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Purge {
    /// Cache tags, as in `Surrogate-Key` and `Cache-Tag`.
    pub tags: Vec<String>,
    /// For CDNs that know no tags: paths with their leading slash, below the edge's URL.
    pub paths: Vec<String>,
    /// For CDNs that know neither tags nor every path: path prefixes with their leading slash.
    pub prefixes: Vec<String>,
}

/// A CDN of this shield, by the name that its operator gave it.
#[derive(Debug, Clone)]
pub struct NamedCdn {
    pub name: String,
    /// `cloudfront`, `cloudflare`, `fastly`, `custom`, `plain`.
    pub kind: &'static str,
    pub mode: DeliveryMode,
    /// Where players reach it: `https://cdn.example.com`.
    pub edge: String,
    /// Seals keys for its edge; there in push mode.
    pub secret: Option<EdgeSecret>,
    pub cdn: Arc<dyn Cdn>,
}

impl NamedCdn {
    /// Whether an address that a stream names, a URL or a host, is this CDN's.
    pub fn is_at(&self, endpoint: &str) -> bool {
        place_of(endpoint).is_some_and(|place| Some(place) == place_of(&self.edge))
    }
}

/// Host and port; a host alone is reached by https.
fn place_of(address: &str) -> Option<(String, Option<u16>)> {
    let parsed = match address.contains("://") {
        true => Url::parse(address),
        false => Url::parse(&format!("https://{address}")),
    };
    let url = parsed.ok()?;
    Some((url.host_str()?.to_owned(), url.port_or_known_default()))
}

/// One CDN, as far as the shield asks anything of it. Doing a thing twice is doing it once. Calls end by themselves,
/// in the time that their settings give them.
#[async_trait]
pub trait Cdn: fmt::Debug + Send + Sync {
    fn limits(&self) -> CdnLimits;

    /// How keys are to be sealed for this edge.
    fn cipher(&self) -> EdgeCipher {
        EdgeCipher::Ctr
    }

    /// Stores keys at the edge, at most [`CdnLimits::keys_per_call`]. In pull mode there is nothing to do.
    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError>;

    /// Takes keys out of the edge's store, at most [`CdnLimits::keys_per_call`], whether they are there or not. In pull
    /// mode there is nothing to do.
    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError>;

    /// Asks the edge, on the way that players take, what it has of a key: its check value, never the key.
    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError>;

    /// Whether an object that was cached under a key is still given out: asks the edge for a path, as a player would.
    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError>;

    /// Takes objects out of all caches. Returns when the vendor says that it is done, or at once where it does not say.
    async fn purge(&self, purge: &Purge) -> Result<(), CdnError>;

    /// Whether the API answers and lets this shield do its work. Changes nothing.
    async fn health(&self) -> Result<(), CdnError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_same_with_and_without_its_scheme() {
        let same = |a: &str, b: &str| place_of(a).is_some() && place_of(a) == place_of(b);
        assert!(same("cdn.example.com", "https://cdn.example.com/"));
        assert!(same("https://CDN.example.com:443/live", "cdn.example.com"));
        assert!(same("http://127.0.0.1:8090", "http://127.0.0.1:8090/"));
        assert!(!same("http://cdn.example.com", "https://cdn.example.com"));
        assert!(!same("cdn1.example.com", "cdn2.example.com") && !same("", ""));
    }
}
