//! The one who changes streams: sweeps, and carries out what was decided.
//!
//! The order of writes is what makes a crash harmless: a key is stored before a boundary names it, the
//! boundary before a playlist shows it; a promotion that was lost in between is the next sweep's to repeat.
//! How streams are loaded stands in `load.rs`, how schedules grow in `extend.rs`; both are parts of [`Core`].

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::stream::{KeyLife, MAX_RENDITIONS, Rotation, Stream};
use super::{EngineStatus, Extend, Shared, WorkerSeat};
use crate::keys::{
    DataEncryptionKey, DekId, DekVersion, EnvelopeError, KeyId, KeyOp, KeyState, Ordinal, Reason,
    SecretError, Timestamp, sweep,
};
use crate::kms::{LocalKms, MasterKeyError};
use crate::store::{Store, StoreError};

/// A newest key this much older than its interval counts as overdue (the guide's threshold).
const OVERDUE_AFTER: Duration = Duration::from_secs(60 * 60);

/// Why the worker could not do its work.
#[derive(Debug, Error)]
pub enum WorkerError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Kms(#[from] MasterKeyError),
    #[error("stream {stream}, key {key}: {source}")]
    Unwrap { stream: String, key: KeyId, source: EnvelopeError },
    #[error("stream {stream}, key {key}: {source}")]
    Secret { stream: String, key: KeyId, source: SecretError },
    #[error("stream {stream}: a data encryption key that its keys need is not stored")]
    NoDek { stream: String },
    #[error("stream {stream} has {MAX_RENDITIONS} renditions already: is every path of it a playlist?")]
    TooManyRenditions { stream: String },
    #[error(
        "stream {stream}: the Media Sequence Numbers of {rendition} jump back again and again; do its origin's \
         addresses agree?"
    )]
    Flapping { stream: String, rendition: String },
    #[error("stream {stream}: other nodes keep changing the schedule of {rendition}")]
    Contended { stream: String, rendition: String },
}

/// A stream's unwrapped DEK, by which new keys are wrapped.
pub(super) struct Dek {
    pub(super) id: DekId,
    pub(super) version: DekVersion,
    pub(super) key: DataEncryptionKey,
}

/// Owns the store and the KMS. Everything that changes a stream goes through it.
pub struct Worker {
    core: Arc<Core>,
    asked: mpsc::Receiver<Extend>,
}

pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Store,
    /// The newest DEK of each stream, by the stream's ID.
    pub(super) deks: HashMap<String, Dek>,
}

impl Worker {
    /// Loads every stream, unwraps its keys and sweeps once: when this returns, the engine is ready.
    ///
    /// # Errors
    /// A store that cannot be read, or a key that does not unwrap.
    pub async fn load(seat: WorkerSeat, store: Store, kms: &LocalKms) -> Result<Self, WorkerError> {
        let WorkerSeat { shared, asked } = seat;
        let mut core = Core { shared, store, deks: HashMap::new() };
        let streams = core.shared.streams.clone();
        for stream in &streams {
            core.load_stream(stream, kms).await?;
        }
        for stream in &streams {
            core.sweep_stream(stream).await?;
        }
        core.shared.status.write().ready = true;
        core.note_health(true);
        Ok(Self { core: Arc::new(core), asked })
    }

    /// Answers questions and sweeps every `interval`. Returns when every [`super::Engine`] is dropped, and
    /// when one of the two tasks has ended early, which is a defect.
    pub async fn run(mut self, interval: Duration) {
        let core = Arc::clone(&self.core);
        // A task of its own, because a long sweep must not keep playlists waiting; in a set, so that it ends
        // with this one.
        let mut sweeps = JoinSet::new();
        sweeps.spawn(async move {
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                core.sweep_all().await;
            }
        });
        loop {
            tokio::select! {
                extend = self.asked.recv() => {
                    let Some(extend) = extend else { break };
                    let core = Arc::clone(&self.core);
                    tokio::spawn(async move { core.answer(extend).await });
                }
                ended = sweeps.join_next() => {
                    tracing::error!(?ended, "the sweeps ended");
                    return;
                }
            }
        }
    }
}

impl Core {
    pub(super) fn now(&self) -> Timestamp {
        self.shared.clock.now()
    }

    /// Promotes the waiting keys up to `ordinal`, in the store and then in memory.
    pub(super) async fn promote(
        &self,
        stream: &Stream,
        ordinal: Ordinal,
        forced: bool,
        reason: &'static str,
    ) -> Result<(), WorkerError> {
        let waits = |life: &KeyLife| life.state == KeyState::PreActive;
        if !stream.known.read().lives.range(..=ordinal).any(|(_, life)| waits(life)) {
            return Ok(());
        }
        let now = self.now();
        self.store.promote(&stream.settings.id, ordinal, now, forced).await?;
        let mut promoted = Vec::new();
        {
            let mut known = stream.known.write();
            for (ordinal, life) in known.lives.range_mut(..=ordinal).filter(|(_, life)| waits(life)) {
                *life = KeyLife { state: KeyState::Active, activated_at: Some(now), forced, ..*life };
                promoted.push(*ordinal);
            }
        }
        for ordinal in promoted {
            let Some(key) = stream.known.read().live_keys.get(&ordinal).map(|key| key.id) else { continue };
            tracing::info!(stream = %stream.settings.id, %ordinal, %key, reason, "key promoted");
            self.shared.metrics.promotions.with_label_values(&[reason]).inc();
            // Nobody may be listening.
            let _ = self.shared.rotations.send(Rotation {
                stream: stream.settings.id.clone(),
                ordinal,
                key,
                reason,
            });
        }
        Ok(())
    }

    async fn sweep_all(&self) {
        let started = Instant::now();
        let mut all_well = true;
        for stream in &self.shared.streams {
            if let Err(error) = self.sweep_stream(stream).await {
                all_well = false;
                self.shared.metrics.sweep_errors.inc();
                tracing::error!(stream = %stream.settings.id, %error, "sweep broke off; the next goes on");
            }
        }
        self.shared.metrics.sweep_seconds.observe(started.elapsed().as_secs_f64());
        self.note_health(all_well);
    }

    async fn sweep_stream(&self, stream: &Arc<Stream>) -> Result<(), WorkerError> {
        let _changing = stream.changing.lock().await;
        let unstored = stream.unstored_renditions();
        if !unstored.is_empty() {
            self.store.put_renditions(&stream.settings.id, &unstored).await?;
            unstored.into_iter().for_each(|row| stream.note_stored(row));
        }
        for op in sweep(&stream.facts(), &stream.settings.policy, self.now()) {
            self.apply(stream, &op).await?;
        }
        Ok(())
    }

    /// Carries one operation out. Doing it twice is doing it once.
    async fn apply(&self, stream: &Stream, op: &KeyOp) -> Result<(), WorkerError> {
        let now = self.now();
        let id = &stream.settings.id;
        match *op {
            KeyOp::Generate { ordinal, .. } => self.make_keys_up_to(stream, ordinal).await?,
            KeyOp::Promote { ordinal, forced, .. } => {
                let reason = if forced { Reason::Promotion } else { Reason::Start };
                self.promote(stream, ordinal, forced, reason.name()).await?;
            }
            KeyOp::Force { ordinal, reason } => {
                self.store.force(id, ordinal).await?;
                if let Some(life) = stream.known.write().lives.get_mut(&ordinal) {
                    life.forced = true;
                }
                tracing::info!(stream = %id, %ordinal, reason, "every rendition goes over");
            }
            KeyOp::Deactivate { ordinal, reason } => {
                self.store.deactivate(id, ordinal, now).await?;
                if let Some(life) = stream.known.write().lives.get_mut(&ordinal) {
                    *life = KeyLife { state: KeyState::Deactivated, deactivated_at: Some(now), ..*life };
                }
                tracing::info!(stream = %id, %ordinal, reason, "key deactivated");
            }
            KeyOp::Destroy { ordinal, reason } => {
                let key = stream.known.read().live_keys.get(&ordinal).map(|key| key.id);
                if let Some(key) = key {
                    self.store.destroy(key, now).await?;
                    self.shared.keys.write().remove(&key);
                }
                let mut known = stream.known.write();
                known.live_keys.remove(&ordinal);
                if let Some(life) = known.lives.get_mut(&ordinal) {
                    life.state = KeyState::Destroyed;
                }
                tracing::info!(stream = %id, %ordinal, reason, "key destroyed");
            }
        }
        Ok(())
    }

    fn note_health(&self, rotating: bool) {
        let now = self.now();
        let mut overdue = 0;
        let mut by_state = BTreeMap::from([("pre-active", 0), ("active", 0), ("deactivated", 0)]);
        for stream in &self.shared.streams {
            let known = stream.known.read();
            for life in known.lives.values() {
                if let Some(count) = by_state.get_mut(life.state.name()) {
                    *count += 1;
                }
            }
            let is_vod = !known.renditions.is_empty() && known.renditions.values().all(|r| r.ended);
            let newest = known.lives.values().filter_map(|life| life.activated_at).max();
            if let (Some(interval), Some(newest), false) =
                (stream.settings.policy.rotation_interval, newest, is_vod)
            {
                overdue += usize::from(now.since(newest) >= interval + OVERDUE_AFTER);
            }
        }
        for (state, count) in by_state {
            self.shared.metrics.keys.with_label_values(&[state]).set(count);
        }
        self.shared.metrics.overdue_rotations.set(i64::try_from(overdue).unwrap_or(i64::MAX));
        *self.shared.swept_at.write() = now;
        let mut status = self.shared.status.write();
        *status = EngineStatus { rotating, overdue_rotations: overdue, ..*status };
    }
}
