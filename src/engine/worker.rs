//! The one who changes streams, and the tasks that it is made of.
//!
//! The order of writes is what makes a crash harmless: a key is stored before a boundary names it, the
//! boundary before a playlist shows it; a promotion that was lost in between is the next sweep's to repeat.
//! What each task does stands in a file of its own: `extend` (schedules grow), `sweeps` (keys live and die),
//! `sync` (nodes hear of one another), `declare` (streams of the configuration), `supply` and `deks` (what the KMS is
//! asked for, and how), `held` and `rewrap` (from one KMS to another), `merge` and `make` (keys in and out of their
//! envelopes), `operate` (what operators ask).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::deks::{DekRules, Deks};
use super::delivery::{Delivery, DeliveryRules};
use super::rewrap::Rewraps;
use super::stream::{MAX_RENDITIONS, Stream};
use super::sync::Cursors;
use super::{Extend, Operator, Shared, StreamSpec, WorkerSeat};
use crate::cdn::NamedCdn;
use crate::fault;
use crate::keys::{EnvelopeError, KeyId, Ordinal, REPORT_INTERVAL, Reason, SecretError, StreamId, Timestamp};
use crate::kms::{Keyring, Kms, KmsError};
use crate::store::{Applied, Lease, Store, StoreError, Write, WriteOp};

/// Streams that are loaded by one set of queries.
pub(super) const LOAD_AT_ONCE: u32 = 200;

/// Before everything is loaded again because nothing could be unwrapped.
const LOAD_PAUSE: Duration = Duration::from_secs(1);
/// A lease is asked for this long after it should have run out: the store counts in milliseconds.
const LEASE_MARGIN: Duration = Duration::from_millis(5);

/// Why the worker could not do its work.
#[derive(Debug, Error)]
pub enum WorkerError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Kms(#[from] KmsError),
    #[error("stream {stream}, key {key}: {source}")]
    Unwrap { stream: String, key: KeyId, source: EnvelopeError },
    #[error("stream {stream}, key {key}: {source}")]
    Secret { stream: String, key: KeyId, source: SecretError },
    #[error("stream {stream}: a data encryption key came while the stream was read; it is read again")]
    NotUnwrapped { stream: String },
    #[error("stream {stream}: a data encryption key that its keys need is not stored")]
    NoDek { stream: String },
    #[error("stream {stream} could not be read: {why}")]
    NotRead { stream: String, why: String },
    #[error("stream {stream}: no key waits, and none can be made: {why}")]
    NoKeyToBeHad { stream: String, why: String },
    #[error("stream {stream} has {MAX_RENDITIONS} renditions already: is every path of it a playlist?")]
    TooManyRenditions { stream: String },
    #[error(
        "stream {stream}: the Media Sequence Numbers of {rendition} jump back again and again; do its origin's \
         addresses agree?"
    )]
    Flapping { stream: String, rendition: String },
    #[error("stream {stream}: other nodes keep changing the schedule of {rendition}")]
    Contended { stream: String, rendition: String },
    /// Boundaries that the store may have or not.
    #[error(transparent)]
    Unanswered(StoreError),
    #[error("stream {stream}: the store is away, and {rendition} cannot begin without it")]
    Away { stream: String, rendition: String },
    #[error("stream {stream} cannot have the prefix {prefix:?}: stream {owner} has it")]
    PrefixTaken { stream: StreamId, prefix: String, owner: StreamId },
}

impl WorkerError {
    /// Whether all that is wrong is that a data encryption key is not unwrapped here now.
    pub(super) fn is_about_a_dek(&self) -> bool {
        matches!(self, WorkerError::NotUnwrapped { .. } | WorkerError::NoDek { .. } | WorkerError::Kms(_))
    }
}

/// How this node lives with others.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// Unique among the nodes that share the store, and new at every start.
    pub node: String,
    /// Whether no other process can have the store open.
    pub is_alone: bool,
    /// How often the store is asked for changes, where it does not tell of them.
    pub poll_interval: Duration,
    pub sweep_interval: Duration,
    /// How long the lease on sweeping lasts without being renewed.
    pub lease: Duration,
}

/// Owns the store and the KMS. Everything that changes a stream goes through it.
pub struct Worker {
    core: Arc<Core>,
    asked: mpsc::Receiver<Extend>,
}

pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Store,
    pub(super) deks: Arc<Deks>,
    pub(super) keyring: Arc<Keyring>,
    pub(super) rewraps: Rewraps,
    pub(super) delivery: Delivery,
    pub(super) fleet: Fleet,
    /// Streams of this node's configuration.
    pub(super) declared: HashSet<StreamId>,
    store_away: AtomicBool,
    /// Something was decided without the store that it does not have yet.
    pub(super) decided_alone: AtomicBool,
    /// A turn for each schedule that is being extended: thousands that are to be at once wait for it in memory, in
    /// their order and at most [`super::QUEUE_LEN`], and not for a connection, which they would give up.
    pub(super) turns: Semaphore,
    /// Held while streams are read from the store.
    pub(super) loading: tokio::sync::Mutex<()>,
    /// Until when this node may sweep.
    lease_until: Mutex<Option<Instant>>,
    pub(super) cursors: Mutex<Cursors>,
}

impl Worker {
    /// Loads every stream, unwraps its keys, and begins those of the configuration: when this returns, the engine
    /// is ready. Waits for a KMS that is away. Keys that another provider wrapped, which is only held and away, are
    /// tried again later.
    ///
    /// # Errors
    /// A store that cannot be read, or keys of which none unwraps.
    pub async fn load(
        seat: WorkerSeat,
        store: Store,
        keyring: Arc<Keyring>,
        dek_rules: DekRules,
        fleet: Fleet,
        (cdns, delivery_rules): (Vec<NamedCdn>, DeliveryRules),
        declared: Vec<StreamSpec>,
    ) -> Result<Self, WorkerError> {
        let WorkerSeat { shared, asked } = seat;
        shared.news.is_alone.store(fleet.is_alone, Ordering::Relaxed);
        if fleet.is_alone {
            // Whoever held the lease is gone: this process has the store for itself.
            store.forget_nodes().await?;
        }
        let core = Core {
            deks: Arc::new(Deks::new(Arc::clone(&keyring) as Arc<dyn Kms>, dek_rules, Arc::clone(&shared))),
            keyring,
            rewraps: Rewraps::default(),
            delivery: Delivery::new(cdns, delivery_rules),
            shared,
            turns: Semaphore::new(store.writers()),
            store,
            fleet,
            declared: declared.iter().map(|spec| spec.id.clone()).collect(),
            store_away: AtomicBool::new(false),
            decided_alone: AtomicBool::new(false),
            loading: tokio::sync::Mutex::default(),
            lease_until: Mutex::new(None),
            cursors: Mutex::default(),
        };
        loop {
            core.deks.wait_for_kms().await;
            match core.load_all().await {
                // It went away in between, or another that wrapped all there is.
                Err(WorkerError::Kms(error)) if !error.is_about_what_was_wrapped() => {
                    tokio::time::sleep(LOAD_PAUSE).await;
                }
                loaded => break loaded?,
            }
        }
        fault::point("start: loaded");
        core.declare(declared).await?;
        fault::point("start: declared");
        core.store.beat(&core.fleet.node).await?;
        core.note_store(true);
        core.shared.status.write().ready = true;
        core.note_health(true);
        Ok(Self { core: Arc::new(core), asked })
    }

    /// What this node says goodbye through.
    pub fn parting(&self) -> Parting {
        Parting { core: Arc::clone(&self.core) }
    }

    /// What operators change streams through.
    pub fn operator(&self) -> Operator {
        Operator::new(Arc::clone(&self.core))
    }

    /// One sweep of every stream, whoever holds the lease, and then what it wants of the KMS for the next one. A worker
    /// that runs does both by itself.
    ///
    /// # Errors
    /// What nodes served cannot be read: then it is not known which keys may go.
    pub async fn sweep_once(&self) -> Result<(), WorkerError> {
        if !self.core.may_destroy() {
            self.core.store.beat(&self.core.fleet.node).await?;
            self.core.hear_reports().await?;
        }
        self.core.sweep_all().await;
        self.core.unwrap_what_is_wanted().await;
        Ok(())
    }

    /// Answers questions, sweeps, and keeps in step with other nodes. Returns when every [`super::Engine`] is
    /// dropped, and when one of its tasks has ended early, which is a defect.
    pub async fn run(mut self) {
        let core = Arc::clone(&self.core);
        // Tasks of their own, because a long sweep must not keep playlists waiting; in a set, so that they end
        // with this one.
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&core).keep_the_lease());
        tasks.spawn(Arc::clone(&core).keep_listening());
        tasks.spawn(Arc::clone(&core).keep_in_step());
        tasks.spawn(Arc::clone(&core).keep_reporting());
        tasks.spawn(Arc::clone(&core).keep_the_kms_in_sight());
        tasks.spawn(Arc::clone(&core).keep_those_held_in_sight());
        tasks.spawn(Arc::clone(&core).keep_sweeping());
        for place in &core.delivery.places {
            tasks.spawn(Arc::clone(&core).keep_delivering(Arc::clone(place)));
            tasks.spawn(Arc::clone(&core).keep_purging(Arc::clone(place)));
        }
        loop {
            tokio::select! {
                extend = self.asked.recv() => {
                    let Some(extend) = extend else { break };
                    let core = Arc::clone(&self.core);
                    tokio::spawn(async move { core.answer(extend).await });
                }
                ended = tasks.join_next() => {
                    tracing::error!(?ended, "a task of the engine ended");
                    return;
                }
            }
        }
        tasks.shutdown().await;
    }
}

/// The end of a node that serves no more.
pub struct Parting {
    core: Arc<Core>,
}

impl Parting {
    /// Leaves the fleet: another node may take the lease at once, and nobody waits for this one's reports.
    /// `store`: the same one, opened anew where the runtime of the [`Worker`] is gone.
    ///
    /// # Errors
    /// A store that is away: the others then wait until they take this node for dead.
    pub async fn say_goodbye(&self, store: &Store) -> Result<(), StoreError> {
        self.core.tell(store).await?;
        fault::point("goodbye: told");
        store.leave(&self.core.fleet.node).await
    }
}

impl Core {
    pub(super) fn now(&self) -> Timestamp {
        self.shared.clock.now()
    }

    pub(super) fn monotonic(&self) -> Instant {
        self.shared.clock.monotonic()
    }

    pub(super) fn is_alone(&self) -> bool {
        self.fleet.is_alone
    }

    pub(super) fn is_store_away(&self) -> bool {
        self.store_away.load(Ordering::Relaxed)
    }

    /// Notes whether the store answers.
    pub(super) fn note_store(&self, is_up: bool) {
        let was_away = self.store_away.swap(!is_up, Ordering::Relaxed);
        if was_away && is_up {
            tracing::info!("the store is back");
        }
        self.shared.metrics.store_up.set(i64::from(is_up));
        self.shared.status.write().store_up = is_up;
    }

    /// Notes that the store is away, if that is what an error says.
    pub(super) fn note_if_away(&self, error: &StoreError) {
        if error.is_away() {
            self.note_store(false);
        }
    }

    pub(super) fn holds_lease(&self) -> bool {
        self.lease_until.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Holds the lease on sweeping, or waits for it.
    async fn keep_the_lease(self: Arc<Self>) {
        let interval = self.fleet.lease / 4;
        loop {
            let mut again_in = interval;
            // Counted from before the question: the store's own count cannot have begun earlier.
            let until = Instant::now() + self.fleet.lease;
            let held = self.store.hold_lease("sweep", &self.fleet.node, self.fleet.lease).await;
            let held_before = self.holds_lease();
            match held {
                Ok(Lease::Held) => *self.lease_until.lock() = Some(until),
                Ok(Lease::Taken { expires_in }) => {
                    *self.lease_until.lock() = None;
                    // In the moment in which it runs out, unless it is renewed or given up before.
                    again_in = interval.min(expires_in + LEASE_MARGIN);
                }
                // What is held lasts until it runs out.
                Err(error) => tracing::debug!(%error, "the lease could not be renewed"),
            }
            let holds = self.holds_lease();
            if holds != held_before {
                tracing::info!(node = self.fleet.node, holds, "the lease on sweeping has moved");
            }
            self.shared.metrics.lease_held.set(i64::from(holds));
            tokio::time::sleep(again_in).await;
        }
    }

    async fn keep_sweeping(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.fleet.sweep_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.holds_lease() && !self.is_store_away() {
                self.sweep_all().await;
            } else {
                self.note_health(!self.is_store_away());
            }
        }
    }

    async fn keep_reporting(self: Arc<Self>) {
        let interval = REPORT_INTERVAL.min(self.fleet.sweep_interval * 5);
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.report().await {
                tracing::warn!(%error, "what was served could not be told to the store");
            }
        }
    }

    /// Promotes the waiting keys up to `ordinal`, in the store and then in memory.
    pub(super) async fn promote(
        &self,
        stream: &Stream,
        ordinal: Ordinal,
        reason: Reason,
    ) -> Result<(), WorkerError> {
        let is_waiting = {
            let known = stream.known.read();
            known.keys.range(..=ordinal).any(|(_, key)| key.life.state == crate::keys::KeyState::PreActive)
        };
        if !is_waiting {
            return Ok(());
        }
        let op = WriteOp::Promote { upto: ordinal, reason, actor: None, at: self.now() };
        let write = Write { stream: stream.id.clone(), op };
        let (applied, revs) = self.store.apply(std::slice::from_ref(&write)).await?;
        fault::point("promote: stored, not known");
        if applied == [Applied::Changed(0)] {
            // Another node was first: what it noted with the keys is what holds.
            return self.refresh(stream).await;
        }
        self.note_write(stream, &write.op, reason.name());
        self.note_revs(&revs);
        Ok(())
    }
}
