//! Fastly: keys in an edge dictionary, purges by surrogate key, code as VCL snippets.
//!
//! A dictionary's items are of no version of the service, so storing and deleting keys deploys nothing. Of a thousand
//! writes an hour that Fastly takes from one user a batch of a thousand keys is one. Deliberately absent: soft purges,
//! which leave what they purge to be served as stale.

mod api;
mod code;
mod deploy;
mod dictionary;
mod pops;

use std::time::Duration;

use async_trait::async_trait;
use http::{HeaderName, Method};
use serde::Deserialize;
use url::Url;

pub use code::FastlyEdgeCode;
pub use deploy::FastlyDeployed;
pub use pops::{PopAnswer, PopTally};

use super::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, Edge, KeySeen, Purge, Rate};
use crate::keys::{KeyId, SealedKey};
use crate::rest::Credential;
use api::Api;

const SURROGATE_KEY: HeaderName = HeaderName::from_static("surrogate-key");
/// The most surrogate keys of one purge, by Fastly's documentation.
const TAGS_PER_PURGE: usize = 256;
/// Fastly's own advice for surrogate keys and URLs.
const BETWEEN_PURGES: Duration = Duration::from_secs(2);
const HOUR: Duration = Duration::from_secs(3_600);

/// What of Fastly belongs to the shield.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FastlySettings {
    /// `https://api.fastly.com`
    pub api_url: String,
    pub service_id: String,
    /// The edge dictionary that the VCL reads; empty in pull mode.
    pub dictionary_id: String,
    pub token: Credential,
    /// The longest time of one call.
    pub timeout: Duration,
}

/// Fastly.
#[derive(Debug)]
pub struct Fastly {
    api: Api,
    mode: DeliveryMode,
    edge: Edge,
    between_purges: Duration,
}

/// What Fastly says about the token itself.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Token {
    /// Separated by spaces.
    scope: String,
    /// None: all.
    services: Vec<String>,
}

impl Fastly {
    /// # Errors
    /// A setting that cannot be used.
    pub fn new(settings: FastlySettings, mode: DeliveryMode, edge: Edge) -> Result<Self, CdnError> {
        Ok(Self { api: Api::new(settings)?, mode, edge, between_purges: BETWEEN_PURGES })
    }

    /// With another pause between the two times that everything is purged.
    #[must_use]
    pub fn with_pause_between_purges(mut self, pause: Duration) -> Self {
        self.between_purges = pause;
        self
    }

    /// Brings the code of the edge into the service, with what it is given; `None`, for pull mode: the rule alone that
    /// keeps `no-store` out of caches. When all of it is there already, no version is made; the secrets are written
    /// each time, because nobody can read them to compare.
    ///
    /// # Errors
    /// What Fastly does not take. The active version is then what it was.
    pub async fn deploy(&self, code: Option<&FastlyEdgeCode>) -> Result<FastlyDeployed, CdnError> {
        self.api.deploy(code).await
    }

    fn stored(&self, keys: usize) -> Result<bool, CdnError> {
        if self.mode == DeliveryMode::Pull || keys == 0 {
            return Ok(false);
        }
        if self.api.settings().dictionary_id.is_empty() {
            let what =
                "keys are to be pushed to Fastly and no dictionary_id is set; deploying the code says it";
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        if keys > dictionary::ITEMS_PER_BATCH {
            let what = format!("{keys} keys are more than one batch of {}", dictionary::ITEMS_PER_BATCH);
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        Ok(true)
    }

    /// By tags where there are any: paths and prefixes are for CDNs that know none.
    async fn purge_once(&self, purge: &Purge) -> Result<(), CdnError> {
        if !purge.tags.is_empty() {
            return self.purge_tags(&purge.tags).await;
        }
        for path in &purge.paths {
            self.purge_path(path).await?;
        }
        Ok(())
    }

    async fn purge_tags(&self, tags: &[String]) -> Result<(), CdnError> {
        if tags.len() > TAGS_PER_PURGE {
            let what = format!("{} tags are more than the {TAGS_PER_PURGE} of one purge", tags.len());
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        let request = self.api.of_service(Method::POST, "purge").header(SURROGATE_KEY, tags.join(" "));
        self.api.call("purging by surrogate key", request).await.map(|_| ())
    }

    /// A path, with its query, is purged as players ask for it.
    async fn purge_path(&self, path: &str) -> Result<(), CdnError> {
        let url = self.edge.url_of(path);
        let bad = |_| CdnError::new(CdnFault::Invalid, format!("{url} cannot be purged: it is no URL"));
        let parsed = Url::parse(&url).map_err(bad)?;
        let at = &parsed[url::Position::BeforeHost..url::Position::AfterQuery];
        let request = self.api.request(Method::POST, &format!("purge/{at}"));
        self.api.call(&format!("purging {url}"), request).await.map(|_| ())
    }
}

#[async_trait]
impl Cdn for Fastly {
    fn limits(&self) -> CdnLimits {
        CdnLimits {
            keys_per_call: dictionary::ITEMS_PER_BATCH,
            tags_per_purge: TAGS_PER_PURGE,
            urls_per_purge: 1,
            writes: Rate { calls: 1_000, per: HOUR },
            // Purges by surrogate key and by URL are not among the thousand writes.
            purges: Rate { calls: 100_000, per: HOUR },
            settles_within: match self.mode {
                DeliveryMode::Push => Duration::from_secs(30),
                // What is left is a purge, which all POPs know of in a fraction of this.
                DeliveryMode::Pull => Duration::from_secs(1),
            },
        }
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        if self.stored(keys.len())? { self.api.upsert_keys(keys).await } else { Ok(()) }
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        if self.stored(keys.len())? { self.api.delete_keys(keys).await } else { Ok(()) }
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.edge.verify(key).await
    }

    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        self.edge.has_cached(path, key).await
    }

    /// Twice: POPs are purged in no order, and with shielding one that was purged can get the old answer back from one
    /// that was not yet.
    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        if purge.tags.is_empty() && purge.paths.is_empty() {
            let what = "Fastly purges by surrogate key and by URL, not by prefix: give the tags";
            let nothing = purge.prefixes.is_empty();
            return if nothing { Ok(()) } else { Err(CdnError::new(CdnFault::Invalid, what)) };
        }
        self.purge_once(purge).await?;
        tokio::time::sleep(self.between_purges).await;
        self.purge_once(purge).await
    }

    async fn health(&self) -> Result<(), CdnError> {
        let doing = "asking Fastly what the token may do";
        let answer = self.api.call(doing, self.api.request(Method::GET, "tokens/self")).await?;
        let token: Token = answer.json().ok_or_else(|| dictionary::unreadable(doing))?;
        let service = &self.api.settings().service_id;
        let refused = |what: String| Err(CdnError::new(CdnFault::Refused, what));
        if !token.services.is_empty() && !token.services.contains(service) {
            return refused(format!("the token for Fastly is not for the service {service}"));
        }
        let may = |scope: &str| token.scope.split_whitespace().any(|one| one == scope);
        match self.mode {
            DeliveryMode::Push if !may("global") => refused(format!(
                "the token for Fastly has the scope `{}`; to store keys it needs `global`",
                token.scope
            )),
            DeliveryMode::Pull if !may("global") && !may("purge_select") => refused(format!(
                "the token for Fastly has the scope `{}`; to purge it needs `purge_select`",
                token.scope
            )),
            DeliveryMode::Push => {
                self.stored(1)?;
                self.api.find_dictionary().await
            }
            DeliveryMode::Pull => Ok(()),
        }
    }
}
