//! A CDN of the operator's own, by the HTTP API of `docs/custom-cdn.openapi.yaml`.
//!
//! Whoever runs caches writes a small agent that answers this API; `docs/cdn-custom.md` says how. Not every agent can do
//! everything, so the API's health says what this one can ([`Capabilities`]), and what it cannot is left out: keys go one
//! by one where there are no batches, and purges name paths where no tags are known. A purge of which nothing would be
//! left is an error, for something that should be gone would stay.
//!
//! Deliberately absent: limits of one's own in the configuration. An agent that wants fewer calls answers 429 with
//! Retry-After, which is heeded.

mod api;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::RwLock;

use self::api::{Api, Batch, Batched, Capabilities};
use super::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, Edge, KeySeen, Purge, Rate};
use crate::keys::{KeyId, SealedKey};
use crate::rest::Credential;

/// So many items a list of a request holds at most, as documented.
const ITEMS_PER_CALL: usize = 100;
/// As documented: what an agent must expect of one shield.
const WRITES: Rate = Rate { calls: 10, per: Duration::from_secs(1) };
const PURGES: Rate = Rate { calls: 10, per: Duration::from_secs(1) };

/// Where the HTTP API of `docs/custom-cdn.openapi.yaml` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomSettings {
    /// What stands before `/v1/…` and `/healthz`.
    pub api_url: String,
    /// A bearer token.
    pub token: Option<Credential>,
    /// Of certificate authorities, those that alone are trusted; `None` for the system's.
    pub ca_file: Option<PathBuf>,
    /// The longest time of one call.
    pub timeout: Duration,
}

/// A CDN with an agent.
#[derive(Debug)]
pub struct CustomCdn {
    api: Api,
    mode: DeliveryMode,
    edge: Edge,
    /// `None` until its health was asked.
    can: RwLock<Option<Capabilities>>,
}

impl CustomCdn {
    /// # Errors
    /// A setting that cannot be used.
    pub fn new(settings: CustomSettings, mode: DeliveryMode, edge: Edge) -> Result<Self, CdnError> {
        Ok(Self { api: Api::new(settings)?, mode, edge, can: RwLock::new(None) })
    }

    /// Asks once; [`Cdn::health`] asks anew.
    async fn capabilities(&self) -> Result<Capabilities, CdnError> {
        let known = *self.can.read();
        match known {
            Some(known) => Ok(known),
            None => self.ask_capabilities().await,
        }
    }

    async fn ask_capabilities(&self) -> Result<Capabilities, CdnError> {
        let can = self.api.health().await?;
        *self.can.write() = Some(can);
        Ok(can)
    }

    /// In one call, or one by one.
    async fn change(&self, put: &[SealedKey], delete: &[KeyId]) -> Result<(), CdnError> {
        if self.mode == DeliveryMode::Pull || (put.is_empty() && delete.is_empty()) {
            return Ok(());
        }
        let can = self.capabilities().await?;
        if !can.store {
            return Err(self.lacks("holds no keys, so it cannot have mode = \"push\""));
        }
        if can.batch {
            match self.api.batch(&Batch::of(put, delete)).await? {
                Batched::Done => return Ok(()),
                // What was promised is not kept; health asks anew.
                Batched::Unknown => *self.can.write() = Some(Capabilities { batch: false, ..can }),
            }
        }
        let timeout = self.api.timeout();
        let one_by_one = tokio::time::timeout(timeout, self.change_one_by_one(put, delete)).await;
        one_by_one.unwrap_or_else(|_| {
            let keys = put.len() + delete.len();
            let what = format!("{}: {keys} keys, one by one, took longer than {timeout:?}", self.api.url());
            Err(CdnError::new(CdnFault::Away, what))
        })
    }

    async fn change_one_by_one(&self, put: &[SealedKey], delete: &[KeyId]) -> Result<(), CdnError> {
        for key in put {
            self.api.put(key).await?;
        }
        for key in delete {
            self.api.delete(*key).await?;
        }
        Ok(())
    }

    fn lacks(&self, what: &str) -> CdnError {
        let what = format!("{} {what}; its capabilities say so", self.api.url());
        CdnError::new(CdnFault::Invalid, what)
    }
}

/// What of a purge an agent understands. Nothing that it should take away is silently left. By tags it finds all that is
/// meant and nothing else: where it knows them, paths and prefixes, which stand in for them, are left out.
fn understood(purge: &Purge, can: Capabilities) -> Option<Purge> {
    if can.tags && !purge.tags.is_empty() {
        return Some(Purge { tags: purge.tags.clone(), ..Purge::default() });
    }
    let taken = |can: bool, what: &[String]| if can { what.to_vec() } else { Vec::new() };
    let (paths, prefixes) = (taken(can.paths, &purge.paths), taken(can.prefixes, &purge.prefixes));
    let tags_are_covered = purge.tags.is_empty() || has_any(&paths, &prefixes);
    // And each for the other.
    let is_covered =
        |left: &[String], of: &[String], other: &[String]| left.len() == of.len() || !other.is_empty();
    let paths_are_covered = is_covered(&paths, &purge.paths, &prefixes);
    let prefixes_are_covered = is_covered(&prefixes, &purge.prefixes, &paths);
    let is_covered = tags_are_covered && paths_are_covered && prefixes_are_covered;
    is_covered.then_some(Purge { tags: Vec::new(), paths, prefixes })
}

/// In as many calls as its lists ask for.
fn in_calls(purge: &Purge) -> impl Iterator<Item = Purge> {
    let part = |of: &[String], at: usize| of.chunks(ITEMS_PER_CALL).nth(at).unwrap_or_default().to_vec();
    let longest = purge.tags.len().max(purge.paths.len()).max(purge.prefixes.len());
    (0..longest.div_ceil(ITEMS_PER_CALL)).map(move |at| Purge {
        tags: part(&purge.tags, at),
        paths: part(&purge.paths, at),
        prefixes: part(&purge.prefixes, at),
    })
}

fn has_any(some: &[String], others: &[String]) -> bool {
    !some.is_empty() || !others.is_empty()
}

#[async_trait]
impl Cdn for CustomCdn {
    fn limits(&self) -> CdnLimits {
        let can = self.can.read().unwrap_or(Capabilities::ALL);
        let items = |can: bool| if can { ITEMS_PER_CALL } else { 0 };
        CdnLimits {
            keys_per_call: if can.batch { ITEMS_PER_CALL } else { 1 },
            tags_per_purge: items(can.tags),
            urls_per_purge: items(can.paths || can.prefixes),
            writes: WRITES,
            purges: PURGES,
            // An agent answers when it is done.
            settles_within: Duration::ZERO,
        }
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        self.change(keys, &[]).await
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        self.change(&[], keys).await
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.edge.verify(key).await
    }

    async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        self.edge.has_cached(path, key).await
    }

    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        if *purge == Purge::default() {
            return Ok(());
        }
        let can = self.capabilities().await?;
        let Some(understood) = understood(purge, can) else {
            return Err(self.lacks("cannot purge by what is to be purged"));
        };
        for call in in_calls(&understood) {
            self.api.purge(&call).await?;
        }
        Ok(())
    }

    async fn health(&self) -> Result<(), CdnError> {
        let can = self.ask_capabilities().await?;
        if self.mode == DeliveryMode::Push && !can.store {
            return Err(self.lacks("holds no keys, so it cannot have mode = \"push\""));
        }
        if !(can.tags || can.paths || can.prefixes) {
            return Err(self.lacks("purges neither by tags nor by paths"));
        }
        Ok(())
    }
}
