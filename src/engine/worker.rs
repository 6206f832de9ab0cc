//! The one who changes streams: loads them, extends schedules, sweeps, and carries out what was decided.
//!
//! The order of writes is what makes a crash harmless: a key is stored before a boundary names it, the
//! boundary before a playlist shows it; a promotion that was lost in between is the next sweep's to repeat.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::mpsc;

use super::stream::{
    Call, ClearInitSigner, KeyLife, Known, LiveKey, MAX_RENDITIONS, Rendition, Rotation, Stream,
};
use super::{ATTEMPTS, EngineError, EngineStatus, Extend, RESET_INTERVAL, Shared, WorkerSeat};
use crate::entropy;
use crate::keys::{
    Boundary, CONTENT_SECRET_LEN, ContentSecrets, Context, DataEncryptionKey, DekId, DekVersion, Edge,
    EnvelopeError, KeyId, KeyOp, KeyState, NONCE_LEN, Ordinal, PlaylistWindow, Reason, Schedule, SecretError,
    Timestamp, open, seal, sweep,
};
use crate::kms::{LocalKms, MasterKeyError};
use crate::store::{BoundaryRow, DekRow, KeyRow, Store, StoreError, StoredStream};

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
struct Dek {
    id: DekId,
    version: DekVersion,
    key: DataEncryptionKey,
}

/// Owns the store and the KMS. Everything that changes a stream goes through it.
pub struct Worker {
    core: Arc<Core>,
    asked: mpsc::Receiver<Extend>,
}

struct Core {
    shared: Arc<Shared>,
    store: Store,
    /// The newest DEK of each stream, by the stream's ID.
    deks: HashMap<String, Dek>,
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
        // A task of its own: a long sweep must not keep playlists waiting.
        let mut sweeps = tokio::spawn(async move {
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
                ended = &mut sweeps => {
                    tracing::error!(?ended, "the sweeps ended");
                    return;
                }
            }
        }
        sweeps.abort();
    }
}

impl Core {
    fn now(&self) -> Timestamp {
        self.shared.clock.now()
    }

    async fn load_stream(&mut self, stream: &Stream, kms: &LocalKms) -> Result<(), WorkerError> {
        let id = &stream.settings.id;
        let now = self.now();
        self.store.ensure_stream(id, now).await?;
        let mut stored = self.store.load(id).await?;
        if stored.deks.is_empty() {
            stored.deks.push(self.make_dek(stream, kms).await?);
        }
        let mut deks = Vec::with_capacity(stored.deks.len());
        for row in &stored.deks {
            let context = Context::Dek { stream: id, dek: row.id, version: row.version };
            let key = kms.unwrap(&row.kek_id, &context, &row.wrapped)?;
            deks.push(Dek { id: row.id, version: row.version, key });
        }
        let known = self.unwrap_all(stream, &stored, &deks, now)?;
        *stream.known.write() = known;
        // `stored.deks` is never empty here.
        if let Some(newest) = deks.pop() {
            self.deks.insert(id.to_string(), newest);
        }
        tracing::info!(stream = %id, keys = stored.keys.len(), boundaries = stored.boundaries.len(), "stream loaded");
        Ok(())
    }

    async fn make_dek(&self, stream: &Stream, kms: &LocalKms) -> Result<DekRow, WorkerError> {
        let id = &stream.settings.id;
        let (dek, version) = (DekId::from_bytes(*entropy::random()), DekVersion(1));
        let key = DataEncryptionKey::from_bytes(*entropy::random());
        let row = DekRow {
            id: dek,
            version,
            kek_id: kms.kek_id(),
            wrapped: kms.wrap(&Context::Dek { stream: id, dek, version }, &key),
            created_at: self.now(),
        };
        Ok(self.store.put_dek(id, &row).await?)
    }

    fn unwrap_all(
        &self,
        stream: &Stream,
        stored: &StoredStream,
        deks: &[Dek],
        now: Timestamp,
    ) -> Result<Known, WorkerError> {
        let settings = &stream.settings;
        let mut known = Known::default();
        for row in &stored.keys {
            known.lives.insert(row.ordinal, life(row));
            if row.state == KeyState::Destroyed {
                continue;
            }
            let no_dek = || WorkerError::NoDek { stream: settings.id.to_string() };
            let dek = deks.iter().find(|dek| dek.id == row.dek).ok_or_else(no_dek)?;
            let live = Arc::new(unwrap_key(stream, row, dek, now)?);
            self.shared.keys.write().insert(row.id, Arc::clone(&live));
            known.live_keys.insert(row.ordinal, live);
        }
        for dek in deks {
            let link = dek.key.clear_init_link_key();
            let signer = Arc::new(ClearInitSigner { stream: settings.id.clone(), dek: dek.id, link });
            self.shared.clear_inits.write().insert(dek.id, Arc::clone(&signer));
            known.clear_init = Some(signer);
        }
        known.renditions = renditions(&stored.boundaries, now);
        for row in &stored.renditions {
            if let Some(own) = known.renditions.get_mut(&row.rendition) {
                own.ended = row.ended;
                own.keeps_all = row.keeps_all;
                own.longest_playlist = row.longest_playlist;
                own.stored = Some(row.clone());
            }
        }
        Ok(known)
    }

    async fn answer(&self, extend: Extend) {
        let Extend { stream, rendition, window, reply } = extend;
        let extended = self.extend(&stream, &rendition, &window).await;
        if let Err(error) = &extended {
            tracing::error!(stream = %stream.settings.id, rendition, %error, "schedule not extended");
        }
        if let Some(reply) = reply {
            // Who asked may have gone away.
            let _ = reply.send(extended.map_err(|error| EngineError::Failed(error.to_string())));
        }
    }

    /// Stores the boundaries that a window calls for, and the keys that they name before them.
    async fn extend(
        &self,
        stream: &Arc<Stream>,
        rendition: &str,
        window: &PlaylistWindow,
    ) -> Result<(), WorkerError> {
        let _changing = stream.changing.lock().await;
        let extended = self.store_boundaries(stream, rendition, window).await;
        stream.settle(rendition);
        extended
    }

    async fn store_boundaries(
        &self,
        stream: &Stream,
        rendition: &str,
        window: &PlaylistWindow,
    ) -> Result<(), WorkerError> {
        let id = &stream.settings.id;
        let edge = Edge { first: window.first, end: window.end };
        for _ in 0..ATTEMPTS {
            let Some(Call { planned, have, .. }) = stream.propose(rendition, window) else { return Ok(()) };
            let Some(&(highest, reason)) = planned.last() else { return Ok(()) };
            if have == 0 && stream.known.read().renditions.len() >= MAX_RENDITIONS {
                return Err(WorkerError::TooManyRenditions { stream: id.to_string() });
            }
            let resets = planned.iter().any(|(_, reason)| *reason == Reason::Reset);
            if resets && self.resets_too_often(stream, rendition) {
                return Err(WorkerError::Flapping {
                    stream: id.to_string(),
                    rendition: rendition.to_owned(),
                });
            }
            self.make_keys_up_to(stream, highest.ordinal).await?;
            let row = |boundary| BoundaryRow { rendition: rendition.to_owned(), boundary, edge };
            let rows: Vec<_> = planned.iter().map(|&(boundary, reason)| (row(boundary), reason)).collect();
            if self.store.add_boundaries(id, have, &rows, self.now()).await? {
                let boundaries: Vec<_> = planned.iter().map(|(boundary, _)| *boundary).collect();
                self.know_boundaries(stream, rendition, window, &boundaries);
                return self.promote(stream, highest.ordinal, false, reason.name()).await;
            }
            // Another node was first: what it stored is the schedule.
            let stored = self.store.load(id).await?;
            self.take_schedules(stream, &stored.boundaries);
        }
        Err(WorkerError::Contended { stream: id.to_string(), rendition: rendition.to_owned() })
    }

    /// Whether a rendition's numbers jumped back a moment ago; notes that they do now.
    fn resets_too_often(&self, stream: &Stream, rendition: &str) -> bool {
        let now = self.now();
        let mut known = stream.known.write();
        let Some(own) = known.renditions.get_mut(rendition) else { return false };
        let too_often = own.reset_at.is_some_and(|at| now.since(at) < RESET_INTERVAL);
        if !too_often {
            own.reset_at = Some(now);
        }
        too_often
    }

    fn know_boundaries(&self, stream: &Stream, rendition: &str, window: &PlaylistWindow, more: &[Boundary]) {
        let mut known = stream.known.write();
        let edge = Edge { first: window.first, end: window.end };
        let own = known.renditions.entry(rendition.to_owned()).or_insert_with(|| Rendition {
            schedule: Arc::default(),
            edge,
            ended: window.ended,
            keeps_all: window.keeps_all,
            last_served_at: self.now(),
            longest_playlist: Duration::ZERO,
            stored: None,
            reset_at: None,
            pending: None,
        });
        own.schedule = Arc::new(own.schedule.extended(more));
        // Or the next request would take the same jump back for another one.
        own.see(window);
    }

    fn take_schedules(&self, stream: &Stream, rows: &[BoundaryRow]) {
        let mut known = stream.known.write();
        for (name, theirs) in renditions(rows, self.now()) {
            match known.renditions.get_mut(&name) {
                Some(own) => own.schedule = theirs.schedule,
                None => {
                    known.renditions.insert(name, theirs);
                }
            }
        }
    }

    /// Makes the keys that are missing up to `highest`. Needs no KMS: the DEK is in memory.
    async fn make_keys_up_to(&self, stream: &Stream, highest: Ordinal) -> Result<(), WorkerError> {
        let next = stream.known.read().lives.keys().next_back().map_or(0, |last| last.0 + 1);
        if next > highest.0 {
            return Ok(());
        }
        let settings = &stream.settings;
        let dek = self.deks.get(settings.id.as_str());
        let dek = dek.ok_or_else(|| WorkerError::NoDek { stream: settings.id.to_string() })?;
        let drafts: Vec<_> = (next..=highest.0).map(|o| self.draft_key(stream, dek, Ordinal(o))).collect();
        let stored = self.store.put_keys(&settings.id, &drafts).await?;
        for row in stored {
            // Where another node was first, the key is its, and not our draft.
            let live = Arc::new(unwrap_key(stream, &row, dek, self.now())?);
            self.shared.keys.write().insert(live.id, Arc::clone(&live));
            let mut known = stream.known.write();
            known.lives.insert(row.ordinal, life(&row));
            known.live_keys.insert(row.ordinal, live);
        }
        Ok(())
    }

    fn draft_key(&self, stream: &Stream, dek: &Dek, ordinal: Ordinal) -> KeyRow {
        let settings = &stream.settings;
        let method = settings.policy.key_method;
        let id = KeyId::from_bytes(*entropy::random());
        let secrets = ContentSecrets::from_random(method, &entropy::random::<CONTENT_SECRET_LEN>());
        let context = Context::Content { stream: &settings.id, key: id, ordinal, version: dek.version };
        let nonce = *entropy::random::<NONCE_LEN>();
        KeyRow {
            id,
            ordinal,
            dek: dek.id,
            method,
            iv_mode: settings.policy.iv_mode,
            wrapped: seal(dek.key.expose(), nonce, &context, &secrets.to_plaintext()),
            state: KeyState::PreActive,
            created_at: self.now(),
            activated_at: None,
            forced: false,
            deactivated_at: None,
        }
    }

    /// Promotes the waiting keys up to `ordinal`, in the store and then in memory.
    async fn promote(
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
        for row in stream.unstored_renditions() {
            self.store.put_rendition(&stream.settings.id, &row).await?;
            stream.note_stored(row);
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

fn life(row: &KeyRow) -> KeyLife {
    KeyLife {
        state: row.state,
        activated_at: row.activated_at,
        forced: row.forced,
        deactivated_at: row.deactivated_at,
    }
}

fn unwrap_key(stream: &Stream, row: &KeyRow, dek: &Dek, now: Timestamp) -> Result<LiveKey, WorkerError> {
    let settings = &stream.settings;
    let name = || settings.id.to_string();
    let context =
        Context::Content { stream: &settings.id, key: row.id, ordinal: row.ordinal, version: dek.version };
    let plaintext = open(dek.key.expose(), &context, &row.wrapped).map_err(|source| WorkerError::Unwrap {
        stream: name(),
        key: row.id,
        source,
    })?;
    let secrets = ContentSecrets::from_plaintext(row.method, &plaintext)
        .map_err(|source| WorkerError::Secret { stream: name(), key: row.id, source })?;
    Ok(LiveKey::new(&settings.id, row, secrets, now))
}

/// Schedules out of rows, which come by rendition and in order.
fn renditions(rows: &[BoundaryRow], now: Timestamp) -> BTreeMap<String, Rendition> {
    let mut renditions = BTreeMap::new();
    for rows in rows.chunk_by(|a, b| a.rendition == b.rendition) {
        // `chunk_by` gives no empty chunks.
        let Some(last) = rows.last() else { continue };
        let boundaries = rows.iter().map(|row| row.boundary).collect();
        let rendition = Rendition {
            schedule: Arc::new(Schedule::from_rows(boundaries)),
            edge: last.edge,
            ended: false,
            keeps_all: false,
            last_served_at: now,
            longest_playlist: Duration::ZERO,
            stored: None,
            reset_at: None,
            pending: None,
        };
        renditions.insert(last.rendition.clone(), rendition);
    }
    renditions
}
