//! Sweeps: what `keys::sweep` decides is stored, a few hundred streams in one transaction, and then known.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::Rotation;
use super::deks::InHand;
use super::live::Revoked;
use super::stream::{Known, Stream};
use super::troubles::Supply;
use super::worker::{Core, WorkerError};
use crate::fault;
use crate::keys::{
    KeyOp, KeyState, OVERDUE_AFTER, Ordinal, REPORT_SLACK, Reason, RenditionFacts, StreamId, sweep,
};
use crate::store::{Applied, Write, WriteOp};

/// Writes that go into one transaction: enough to make its cost small, few enough to be done in a moment.
const WRITES_AT_ONCE: usize = 1_000;
/// Streams that are looked at before other tasks get their turn.
const LOOKED_AT_AT_ONCE: usize = 1_000;

/// Writes of one stream, each with its reason.
type StreamWrites = (Arc<Stream>, Vec<(Write, &'static str)>);

/// What a sweep wants of one stream.
struct Due {
    work: StreamWrites,
    changing: tokio::sync::OwnedMutexGuard<()>,
}

impl Core {
    /// Sweeps every stream once.
    pub(super) async fn sweep_all(&self) {
        let started = Instant::now();
        let streams: Vec<_> = self.shared.directory.read().iter().cloned().collect();
        let may_destroy = self.may_destroy();
        let mut all_well = true;
        let (mut batch, mut writes) = (Vec::new(), 0);
        for some in streams.chunks(LOOKED_AT_AT_ONCE) {
            tokio::task::yield_now().await;
            for stream in some {
                match self.due(stream, may_destroy).await {
                    Ok(Some(due)) => {
                        writes += due.work.1.len();
                        batch.push(due);
                    }
                    Ok(None) => continue,
                    Err(error) => {
                        all_well = false;
                        self.shared.metrics.sweep_errors.inc();
                        tracing::error!(stream = %stream.id, %error, "the stream could not be swept");
                    }
                }
                if writes >= WRITES_AT_ONCE {
                    all_well &= self.carry_out(std::mem::take(&mut batch)).await;
                    writes = 0;
                }
            }
        }
        all_well &= self.carry_out(batch).await;
        self.shared.metrics.sweep_seconds.observe(started.elapsed().as_secs_f64());
        self.note_health(all_well);
    }

    /// Sweeps streams that nobody else changes meanwhile, so that they have their keys at once.
    pub(super) async fn sweep_now(&self, streams: &[Arc<Stream>]) -> Result<(), WorkerError> {
        fault::point("begin: DEK there, no keys");
        let work = |stream: &Arc<Stream>| Ok((Arc::clone(stream), self.writes(&stream.known.read(), false)?));
        let work = streams.iter().map(work).collect::<Result<_, WorkerError>>()?;
        self.store_writes(work).await
    }

    /// What is due for a stream; mostly nothing, and that is found out without waiting for it.
    async fn due(&self, stream: &Arc<Stream>, may_destroy: bool) -> Result<Option<Due>, WorkerError> {
        let is_due = |known: &Known| {
            // One without a DEK begins by itself: a KMS that is away must not keep the others waiting.
            known.is_read()
                && !known.deks.is_empty()
                && (!self.wanted_ops(known).is_empty() || known.spent_deks().next().is_some())
        };
        if !is_due(&stream.known.read()) {
            return Ok(None);
        }
        let changing = Arc::clone(&stream.changing).lock_owned().await;
        let writes = self.writes(&stream.known.read(), may_destroy)?;
        fault::point("sweep: due, nothing stored");
        let due = Due { work: (Arc::clone(stream), writes), changing };
        Ok(Some(due).filter(|due| !due.work.1.is_empty()))
    }

    /// What a sweep of a stream comes to. Where it makes keys and the DEK is not unwrapped, that is asked for, and the
    /// sweep does without: the next one has it, or the KMS is away.
    fn wanted_ops(&self, known: &Known) -> Vec<KeyOp> {
        let ops = sweep(&known.facts(true, &self.delivery), &known.row.policy, self.now());
        let Some(dek) = known.dek() else { return ops };
        let makes_keys = ops.iter().any(|op| matches!(op, KeyOp::Generate { .. }));
        if !makes_keys || self.deks.held(dek.row.id).is_some() {
            return ops;
        }
        self.deks.want(&known.row.id, &dek.row);
        sweep(&known.facts(false, &self.delivery), &known.row.policy, self.now())
    }

    /// The writes that a sweep of a stream comes to, with their reasons.
    fn writes(&self, known: &Known, may_destroy: bool) -> Result<Vec<(Write, &'static str)>, WorkerError> {
        let now = self.now();
        let ops = self.wanted_ops(known);
        let mut writes = Vec::with_capacity(ops.len());
        let mut highest: Option<(Ordinal, &'static str)> = None;
        for op in ops {
            let (op, reason) = match op {
                KeyOp::Generate { ordinal, reason } => {
                    highest = highest.max(Some((ordinal, reason)));
                    continue;
                }
                KeyOp::Promote { ordinal, forced, reason } => {
                    let why = if forced { Reason::Promotion } else { known.reason_of_boundary(ordinal) };
                    (WriteOp::Promote { upto: ordinal, reason: why, actor: None, at: now }, reason)
                }
                KeyOp::Force { ordinal, reason } => (WriteOp::Force { ordinal }, reason),
                KeyOp::Deactivate { ordinal, reason } => (WriteOp::Deactivate { ordinal, at: now }, reason),
                KeyOp::Destroy { ordinal, reason } => {
                    if !may_destroy {
                        continue;
                    }
                    let longest =
                        known.renditions.values().map(|r| r.longest_playlist).max().unwrap_or_default();
                    let unless_named_after = now.minus(known.row.policy.retention(longest) + REPORT_SLACK);
                    (WriteOp::Destroy { ordinal, at: now, unless_named_after }, reason)
                }
            };
            writes.push((Write { stream: known.row.id.clone(), op }, reason));
        }
        // A key is made before it is promoted.
        if let Some((highest, reason)) = highest {
            let op = WriteOp::PutKeys(self.draft_keys(known, highest, &InHand::new())?);
            writes.insert(0, (Write { stream: known.row.id.clone(), op }, reason));
        }
        for dek in known.spent_deks() {
            let op = WriteOp::ShredDek { dek: dek.row.id };
            writes.push((Write { stream: known.row.id.clone(), op }, "it wraps no key any more"));
        }
        Ok(writes)
    }

    async fn carry_out(&self, batch: Vec<Due>) -> bool {
        let streams = batch.len();
        // Nobody else changes these streams until what was stored is known.
        let (work, _changing): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|due| (due.work, due.changing)).unzip();
        let stored = self.store_writes(work).await;
        if let Err(error) = &stored {
            self.shared.metrics.sweep_errors.inc();
            tracing::error!(streams, %error, "a sweep broke off; the next goes on");
            if let WorkerError::Store(error) = error
                && error.is_away()
            {
                self.note_store(false);
            }
        }
        stored.is_ok()
    }

    /// Stores writes of several streams in one transaction, and then knows them.
    async fn store_writes(&self, batch: Vec<StreamWrites>) -> Result<(), WorkerError> {
        let (writes, about): (Vec<_>, Vec<_>) = batch
            .into_iter()
            .flat_map(|(stream, writes)| {
                writes.into_iter().map(move |(write, reason)| (write, (Arc::clone(&stream), reason)))
            })
            .unzip();
        if writes.is_empty() {
            return Ok(());
        }
        let (applied, revs) = self.store.apply(&writes).await?;
        fault::point("sweep: stored, not known");
        let mut unread = HashSet::new();
        for ((write, (stream, reason)), applied) in writes.iter().zip(about).zip(applied) {
            match applied {
                // Only `store_deks` stores these.
                Applied::Dek(_) | Applied::Changed(0) => {}
                Applied::Keys(rows) => {
                    let take = |row| self.take_key(&stream, row, &InHand::new());
                    if let Err(error) = rows.iter().try_for_each(take) {
                        // Another node's, under a DEK that is still to be had: the next sync reads the stream anew.
                        tracing::debug!(stream = %stream.id, %error, "keys are stored, and not opened yet");
                        unread.insert(stream.id.clone());
                    }
                }
                Applied::Changed(_) => self.note_write(&stream, &write.op, reason),
            }
        }
        let read: Vec<_> = revs.into_iter().filter(|(id, _)| !unread.contains(id)).collect();
        self.note_revs(&read);
        Ok(())
    }

    /// Knows what was stored.
    pub(super) fn note_write(&self, stream: &Stream, op: &WriteOp, reason: &str) {
        let id = &stream.id;
        let mut known = stream.known.write();
        match op {
            WriteOp::PutDek(_) | WriteOp::PutKeys(_) | WriteOp::PutIncident(_) => {}
            WriteOp::Promote { upto, reason, actor, at } => {
                let mut promoted = Vec::new();
                let waiting =
                    known.keys.range_mut(..=*upto).filter(|(_, k)| k.life.state == KeyState::PreActive);
                for (ordinal, key) in waiting {
                    key.life.state = KeyState::Active;
                    key.life.activated_at = Some(*at);
                    key.life.activated_for = Some(reason.name().to_owned());
                    key.life.activated_by.clone_from(actor);
                    key.life.forced = Reason::is_forced(reason.name());
                    promoted.push((*ordinal, key.live.id));
                }
                drop(known);
                for (ordinal, key) in promoted {
                    tracing::info!(stream = %id, %ordinal, %key, reason = reason.name(), "key promoted");
                    self.shared.metrics.promotions.with_label_values(&[reason.name()]).inc();
                    let reason = reason.name().to_owned();
                    // Nobody may be listening.
                    let _ = self.shared.rotations.send(Rotation { stream: id.clone(), ordinal, key, reason });
                }
            }
            WriteOp::Force { ordinal } => {
                if let Some(key) = known.keys.get_mut(ordinal) {
                    key.life.forced = true;
                }
                tracing::info!(stream = %id, %ordinal, reason, "every rendition goes over");
            }
            WriteOp::Deactivate { ordinal, at } => {
                if let Some(key) = known.keys.get_mut(ordinal) {
                    key.life.state = KeyState::Deactivated;
                    key.life.deactivated_at = Some(*at);
                }
                tracing::info!(stream = %id, %ordinal, reason, "key deactivated");
            }
            WriteOp::Revoke { ordinals, successor, reason, actor, at, transition_until } => {
                let (successor, transition_until) = (*successor, *transition_until);
                for ordinal in ordinals {
                    let Some(key) = known.keys.get_mut(ordinal) else { continue };
                    key.life.state = KeyState::Compromised;
                    key.life.compromised_at = Some(*at);
                    key.life.revoked_by = Some(actor.clone());
                    key.life.revoked_for = Some(reason.clone());
                    key.life.successor = Some(successor);
                    key.life.transition_until = Some(transition_until);
                    key.live.revoke(Revoked { successor, transition_until });
                    tracing::warn!(stream = %id, %ordinal, key = %key.live.id, actor, reason, "key revoked");
                }
            }
            WriteOp::ShredDek { dek } => {
                self.drop_dek(&mut known, *dek);
                tracing::info!(stream = %id, %dek, reason, "data encryption key shredded");
            }
            WriteOp::Destroy { ordinal, .. } => {
                self.drop_key(&mut known, *ordinal);
                tracing::info!(stream = %id, %ordinal, reason, "key destroyed");
            }
        }
    }

    /// Notes the new revisions of streams, where nothing came between: otherwise the next sync reads them anew.
    pub(super) fn note_revs(&self, revs: &[(StreamId, i64)]) {
        for (id, rev) in revs {
            let Some(stream) = self.shared.directory.read().get(id).cloned() else { continue };
            let mut known = stream.known.write();
            if known.row.rev + 1 == *rev {
                known.row.rev = *rev;
            }
        }
    }

    /// Looks how the streams are doing, for health and metrics.
    pub(super) fn note_health(&self, rotating: bool) {
        let now = self.now();
        let (mut overdue, mut supply) = (0, Supply::default());
        supply.put_off = self.cursors.lock().retries.len();
        let mut by_state = KeyState::ALL.map(|state| (state, 0));
        for stream in self.shared.directory.read().iter().filter(|stream| stream.is_running()) {
            let known = stream.known.read();
            for key in known.keys.values() {
                by_state[key.life.state as usize].1 += 1;
            }
            if known.is_read() {
                let waiting = known.waiting();
                supply.least = Some(supply.least.map_or(waiting, |least| least.min(waiting)));
                let is_out_of_reach = || known.dek().is_some_and(|dek| self.deks.is_out_of_reach(dek.row.id));
                supply.used_up += usize::from(waiting == 0 && is_out_of_reach());
            }
            let ended = |r: &RenditionFacts| r.ended;
            let is_vod = !known.renditions.is_empty() && known.renditions.values().all(|r| ended(&r.facts()));
            let newest = known.keys.values().rev().find_map(|key| key.life.activated_at);
            if let (Some(interval), Some(newest), false) =
                (known.row.policy.rotation_interval, newest, is_vod)
            {
                overdue += usize::from(now.since(newest) >= interval + OVERDUE_AFTER);
            }
        }
        for (state, count) in by_state.into_iter().filter(|(state, _)| *state != KeyState::Destroyed) {
            self.shared.metrics.keys.with_label_values(&[state.name()]).set(count);
        }
        self.shared.metrics.overdue_rotations.set(i64::try_from(overdue).unwrap_or(i64::MAX));
        self.shared.troubles.note_supply(supply);
        self.shared.troubles.note_cdns(self.delivery.degraded());
        *self.shared.alive_at.write() = now;
        let mut status = self.shared.status.write();
        let cdn_sync = self.delivery.sync();
        *status = super::EngineStatus { rotating, overdue_rotations: overdue, cdn_sync, ..*status };
        drop(status);
        self.shared.judge();
    }
}
