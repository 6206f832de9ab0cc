//! Putting data encryption keys under another key of a KMS, or another KMS, while streams run.
//!
//! One key after the other is unwrapped, wrapped anew, unwrapped again to see that it opens, and stored in place of
//! exactly what was read. So there is no moment in which a key is not stored under something that opens it: whoever is
//! killed in between has lost nothing, and the next one goes on with what is left. The keys themselves stay, and with
//! them everything in memory. One node does it at a time, by a lease. Deliberately absent: a memory of how far it came;
//! the rows say that.

use std::sync::Arc;

use parking_lot::Mutex;
use thiserror::Error;
use tokio::task::{JoinError, JoinSet};

use super::Operator;
use super::operator::OperatorError;
use super::worker::Core;
use crate::fault;
use crate::keys::{Context, DekVersion, StreamId, Timestamp};
use crate::kms::{Held, KeyDescription, Kms, KmsError, WrappedKey};
use crate::store::{DekCursor, DekRow, Lease, Replaced, StoreError, StoredDek};

/// Keys that are read by one query.
const PAGE: u32 = 500;
/// Keys under way at once; the KMS has a bound of its own.
const AT_ONCE: usize = 16;
/// Failures that are told one by one. Beyond them the count tells.
const FAILURES_KEPT: usize = 100;

pub(super) const LEASE: &str = "re-wrap";

/// How a re-wrap stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrap {
    pub state: RewrapState,
    /// The provider, and its key, that all keys are to be under.
    pub to: &'static str,
    pub kek_id: String,
    pub version: Option<u64>,
    /// Data encryption keys when it began.
    pub total: u64,
    /// Put under the key.
    pub rewrapped: u64,
    /// Under it already.
    pub current: u64,
    /// Gone meanwhile, with their streams.
    pub gone: u64,
    /// Left as they were; run it again.
    pub failed: u64,
    /// The first of those.
    pub failures: Vec<RewrapFailure>,
    pub started_at: Timestamp,
    pub started_by: String,
    pub ended_at: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RewrapState {
    Running,
    /// Every key was looked at.
    Done,
    /// It could not go on, and why.
    BrokenOff(String),
}

/// A key that was left as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RewrapFailure {
    pub stream: StreamId,
    pub version: DekVersion,
    /// What wraps it.
    pub kek_id: String,
    pub why: String,
}

/// What is known of re-wrapping, on the node that is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rewrapping {
    /// Another node does it now.
    pub elsewhere: bool,
    /// The last one of this node.
    pub job: Option<Rewrap>,
}

/// The last re-wrap of this node.
#[derive(Debug, Default)]
pub(super) struct Rewraps {
    job: Mutex<Option<Rewrap>>,
    /// Held by who begins one.
    beginning: tokio::sync::Mutex<()>,
}

impl Rewraps {
    fn job(&self) -> Option<Rewrap> {
        self.job.lock().clone()
    }

    fn running(&self) -> Option<Rewrap> {
        self.job().filter(|job| job.state == RewrapState::Running)
    }

    fn change(&self, change: impl FnOnce(&mut Rewrap)) {
        if let Some(job) = self.job.lock().as_mut() {
            change(job);
        }
    }
}

/// Why one key was left as it was.
#[derive(Debug, Error)]
enum Trouble {
    #[error(transparent)]
    Kms(#[from] KmsError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("what {0} wrapped opens as another key than it was given; nothing was stored")]
    Differs(String),
    #[error("it was wrapped otherwise meanwhile; run it again")]
    Changed,
    #[error("{0}")]
    Ended(#[from] JoinError),
}

/// A key, and what became of it.
type Tried = (StoredDek, Result<Replaced, Trouble>);

impl Operator {
    /// Begins to put all data encryption keys under the current key of a provider that is held, or joins the one that
    /// does. It goes on when this has returned.
    ///
    /// # Errors
    /// [`OperatorError::NotHeld`]; [`OperatorError::RewrapRuns`] when this node has another provider for its target, or
    /// another node is at it; [`OperatorError::Kms`] when the provider does not let its key be used.
    pub async fn rewrap(&self, to: &str, actor: &str) -> Result<Rewrap, OperatorError> {
        let core = &self.core;
        let Some(held) = core.keyring.by_name(to).cloned() else {
            let held: Vec<_> = core.keyring.held().map(|held| held.provider).collect();
            return Err(OperatorError::NotHeld { provider: to.to_owned(), held: held.join(", ") });
        };
        let _beginning = core.rewraps.beginning.lock().await;
        if let Some(running) = core.rewraps.running() {
            let runs = || OperatorError::RewrapRuns(format!("this node re-wraps to {} now", running.to));
            return if running.to == to { Ok(running) } else { Err(runs()) };
        }
        let key = core
            .deks
            .count("describe", held.kms.describe().await)
            .map_err(|error| OperatorError::Kms(error.to_string()))?;
        let total = core.store.count_deks().await?;
        let lease = core.store.hold_lease(LEASE, &core.fleet.node, core.fleet.lease).await?;
        if let Lease::Taken { expires_in } = lease {
            let why = format!(
                "another node re-wraps, or was killed while it did: its lease ends in {expires_in:?} \
                               unless it renews it"
            );
            return Err(OperatorError::RewrapRuns(why));
        }
        let job = Rewrap {
            state: RewrapState::Running,
            to: held.provider,
            kek_id: key.kek_id.clone(),
            version: key.version,
            total,
            rewrapped: 0,
            current: 0,
            gone: 0,
            failed: 0,
            failures: Vec::new(),
            started_at: core.now(),
            started_by: actor.to_owned(),
            ended_at: None,
        };
        *core.rewraps.job.lock() = Some(job.clone());
        tracing::info!(
            to,
            key = key.kek_id,
            version = key.version,
            keys = total,
            actor,
            "re-wrapping begins"
        );
        tokio::spawn(Arc::clone(core).rewrap(held, key));
        Ok(job)
    }

    /// How the last re-wrap stands.
    ///
    /// # Errors
    /// A store that cannot be asked what other nodes do.
    pub async fn rewrapping(&self) -> Result<Rewrapping, OperatorError> {
        let (core, before) = (&self.core, self.core.rewraps.job());
        let is_running = before.as_ref().is_some_and(|job| job.state == RewrapState::Running);
        let elsewhere = match is_running || core.is_alone() {
            true => false,
            false => {
                let holder = core.store.lease_holder(LEASE).await?;
                holder.is_some_and(|holder| holder != core.fleet.node)
            }
        };
        Ok(Rewrapping { elsewhere, job: before })
    }
}

impl Core {
    async fn rewrap(self: Arc<Self>, to: Held, key: KeyDescription) {
        let (core, target) = (Arc::clone(&self), to.clone());
        // A task: whatever becomes of it, it must not look as if it ran.
        let mut work = tokio::spawn(async move { core.rewrap_all(&target, &key).await });
        let outcome = tokio::select! {
            ended = &mut work => match ended {
                Ok(outcome) => outcome.map_err(|error| error.to_string()),
                Err(error) => Err(format!("this is a defect, see the log: {error}")),
            },
            why = self.keep_the_lease_on_rewrapping() => {
                work.abort();
                Err(why)
            }
        };
        fault::point("re-wrap: through, lease held");
        // What was replaced may be why it was replaced: it must not live on in the log.
        self.store.empty_the_log().await;
        if let Err(error) = self.store.give_up_lease(LEASE, &self.fleet.node).await {
            tracing::warn!(%error, "the lease on re-wrapping could not be given up; it runs out");
        }
        let ended_at = self.now();
        self.rewraps.change(|job| {
            job.ended_at = Some(ended_at);
            job.state = match outcome {
                Ok(()) => RewrapState::Done,
                Err(why) => RewrapState::BrokenOff(why),
            };
        });
        let Some(Rewrap { state, rewrapped, current, failed, .. }) = self.rewraps.job() else { return };
        match state {
            RewrapState::BrokenOff(why) => {
                tracing::error!(to = to.provider, rewrapped, failed, why, "re-wrapping broke off");
            }
            _ if failed > 0 => {
                tracing::error!(
                    to = to.provider,
                    rewrapped,
                    current,
                    failed,
                    "re-wrapping left keys as they were"
                );
            }
            _ => tracing::info!(to = to.provider, rewrapped, current, "all keys are re-wrapped"),
        }
    }

    /// Renews it. Returns when it is another's.
    async fn keep_the_lease_on_rewrapping(&self) -> String {
        loop {
            tokio::time::sleep(self.fleet.lease / 4).await;
            match self.store.hold_lease(LEASE, &self.fleet.node, self.fleet.lease).await {
                Ok(Lease::Held) => {}
                Ok(Lease::Taken { .. }) => return "another node took over".to_owned(),
                // It lasts until it runs out; and no harm is done by two at once.
                Err(error) => tracing::debug!(%error, "the lease on re-wrapping could not be renewed"),
            }
        }
    }

    /// # Errors
    /// A store that is away. Whatever else befalls a key is that key's trouble.
    async fn rewrap_all(self: &Arc<Self>, to: &Held, key: &KeyDescription) -> Result<(), StoreError> {
        let (mut after, mut under_way) = (DekCursor::default(), JoinSet::new());
        loop {
            let page = self.store.deks_after(&after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.cursor();
            for dek in page {
                if to.kms.is_current(&wrapped(&dek.row), key) {
                    self.rewraps.change(|job| job.current += 1);
                    continue;
                }
                if under_way.len() >= AT_ONCE {
                    self.note_rewrapped(under_way.join_next().await)?;
                }
                let (core, to) = (Arc::clone(self), to.clone());
                under_way.spawn(async move {
                    let outcome = core.rewrap_one(&to, &dek).await;
                    (dek, outcome)
                });
            }
        }
        while let Some(ended) = under_way.join_next().await {
            self.note_rewrapped(Some(ended))?;
        }
        Ok(())
    }

    async fn rewrap_one(&self, to: &Held, dek: &StoredDek) -> Result<Replaced, Trouble> {
        let row = &dek.row;
        let context = Context::Dek { stream: &dek.stream, dek: row.id, version: row.version };
        let key = self.deks.count("unwrap", self.keyring.unwrap(&context, &wrapped(row)).await)?;
        let new = self.deks.count("wrap", to.kms.wrap(&context, &key).await)?;
        let opened = self.deks.count("unwrap", to.kms.unwrap(&context, &new).await)?;
        if opened.expose() != key.expose() {
            return Err(Trouble::Differs(new.kek_id));
        }
        fault::point("re-wrap: wrapped, not stored");
        // As those who extend schedules: what waits for the one writer of a database waits here, and in its order.
        let _turn = self.turns.acquire().await;
        let replaced = self.store.replace_dek(dek, &new.kek_id, &new.bytes).await?;
        fault::point("re-wrap: stored, not counted");
        Ok(replaced)
    }

    /// Counts what became of a key.
    fn note_rewrapped(&self, ended: Option<Result<Tried, JoinError>>) -> Result<(), StoreError> {
        let Some(ended) = ended else { return Ok(()) };
        let (dek, outcome) = match ended {
            Ok((dek, outcome)) => (Some(dek), outcome),
            Err(error) => (None, Err(Trouble::Ended(error))),
        };
        let trouble = match outcome {
            Ok(Replaced::Done) => {
                self.rewraps.change(|job| job.rewrapped += 1);
                return Ok(());
            }
            Ok(Replaced::Gone) => {
                self.rewraps.change(|job| job.gone += 1);
                return Ok(());
            }
            Err(Trouble::Store(error)) if error.is_away() => return Err(error),
            Ok(Replaced::Changed) => Trouble::Changed,
            Err(trouble) => trouble,
        };
        let stream = dek.as_ref().map(|dek| dek.stream.as_str());
        tracing::warn!(stream, error = %trouble, "a data encryption key was not re-wrapped");
        self.rewraps.change(|job| {
            job.failed += 1;
            if let Some(StoredDek { stream, row }) = dek.filter(|_| job.failures.len() < FAILURES_KEPT) {
                let why = trouble.to_string();
                job.failures.push(RewrapFailure { stream, version: row.version, kek_id: row.kek_id, why });
            }
        });
        Ok(())
    }
}

pub(super) fn wrapped(row: &DekRow) -> WrappedKey {
    WrappedKey { kek_id: row.kek_id.clone(), bytes: row.wrapped.clone() }
}
