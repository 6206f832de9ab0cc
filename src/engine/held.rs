//! The providers that are held: whether each is there, and how many data encryption keys are under which key.
//!
//! Deliberately absent: the health of the node, which is the matter of the one that wraps (`deks`). One that is held
//! besides and away is told of and changes nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::Operator;
use super::deks::{LOOK_INTERVAL, outcome_of};
use super::operator::OperatorError;
use super::rewrap::wrapped;
use super::worker::Core;
use crate::kms::{KeyDescription, Kms, KmsError};
use crate::store::DekCursor;

/// Keys that are read by one query.
const PAGE: u32 = 1_000;
/// Keys of KMSs that are told of. There are as many as were ever used, which is a handful.
const KEYS_TOLD: usize = 1_000;

/// What wraps the data encryption keys, and what could.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KmsStatus {
    /// The one that wraps is the first.
    pub held: Vec<HeldStatus>,
    /// In the order of their IDs and versions.
    pub keys: Vec<KeyUse>,
}

/// A provider that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldStatus {
    pub provider: &'static str,
    /// New keys are wrapped by it.
    pub wraps: bool,
    /// The key by which it would wrap, or why it does not let it be used.
    pub key: Result<KeyDescription, KmsError>,
}

/// How much is wrapped under a key, or a version of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyUse {
    pub kek_id: String,
    pub version: Option<u64>,
    /// Its provider is held.
    pub held: bool,
    pub data_keys: u64,
}

impl Operator {
    /// # Errors
    /// A store that cannot be read.
    pub async fn kms_status(&self) -> Result<KmsStatus, OperatorError> {
        let keys = self.core.key_uses().await?;
        let held = self.core.describe_all().await;
        Ok(KmsStatus { held, keys })
    }
}

impl Core {
    async fn describe_all(self: &Arc<Self>) -> Vec<HeldStatus> {
        let mut calls = JoinSet::new();
        for (at, held) in self.keyring.held().cloned().enumerate() {
            let core = Arc::clone(self);
            calls.spawn(async move {
                let key = core.deks.count("describe", held.kms.describe().await);
                (at, HeldStatus { provider: held.provider, wraps: at == 0, key })
            });
        }
        let mut all = calls.join_all().await;
        all.sort_unstable_by_key(|(at, _)| *at);
        all.into_iter().map(|(_, status)| status).collect()
    }

    async fn key_uses(&self) -> Result<Vec<KeyUse>, OperatorError> {
        let (mut after, mut counts) = (DekCursor::default(), BTreeMap::new());
        loop {
            let page = self.store.deks_after(&after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.cursor();
            for dek in page {
                let version = self.keyring.version_of(&wrapped(&dek.row));
                *counts.entry((dek.row.kek_id, version)).or_insert(0_u64) += 1;
            }
        }
        let key_use = |((kek_id, version), data_keys): ((String, Option<u64>), u64)| {
            let held = self.keyring.holder_of(&kek_id).is_some();
            KeyUse { kek_id, version, held, data_keys }
        };
        Ok(counts.into_iter().take(KEYS_TOLD).map(key_use).collect())
    }

    /// Looks after those that are held besides, so that one that is away shows before what it wrapped is needed.
    pub(super) async fn keep_those_held_in_sight(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut were_up = vec![true; self.keyring.also().len()];
        loop {
            ticks.tick().await;
            for (held, was_up) in self.keyring.also().iter().zip(&mut were_up) {
                let outcome = self.deks.count("describe", held.kms.describe().await);
                let is_up = outcome_of(&outcome).1;
                self.shared.metrics.kms_held_up.with_label_values(&[held.provider]).set(i64::from(is_up));
                match outcome {
                    Err(error) if *was_up => {
                        tracing::warn!(%error, "a KMS that is held besides is away: what it wrapped is not unwrapped");
                    }
                    Ok(_) if !*was_up => tracing::info!(provider = held.provider, "the KMS answers"),
                    _ => {}
                }
                *was_up = is_up;
            }
        }
    }
}
