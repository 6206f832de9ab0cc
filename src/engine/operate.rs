//! Operators' calls: streams begun, changed and ended, keys rotated.
//!
//! Each call is decided against what the store holds now, stored, and then known to this node; other nodes hear
//! of it by the store. Who asked (`actor`) is kept with what was done. Deliberately absent: keys taken back (`revoke`), who may ask
//! (`control`), and whether a playlist's URL leads to HLS (`app`, which can fetch).

use std::sync::Arc;

use super::compare::{differing_field, differing_request};
use super::deks::InHand;
use super::operator::{
    Erased, Initialized, KeyInfo, ManualRotation, OperatorError, PolicyChange, StreamChange, StreamInfo,
    StreamSpec, StreamState,
};
use super::stream::{Known, Stream};
use super::worker::{Core, WorkerError};
use crate::fault;
use crate::keys::{Ordinal, Reason, StreamId};
use crate::store::{
    Applied, CdnRow, KeyRow, Registered, StoreError, StreamRow, StreamState as StoredState, Write, WriteOp,
};

/// How often a promotion that another node was faster at is tried again.
pub(super) const ATTEMPTS: usize = 4;

/// A handle for operators. Belongs to the runtime of the [`super::Worker`]; clones share everything.
#[derive(Clone)]
pub struct Operator {
    pub(super) core: Arc<Core>,
}

impl From<WorkerError> for OperatorError {
    fn from(error: WorkerError) -> Self {
        OperatorError::Failed(error.to_string())
    }
}

impl From<StoreError> for OperatorError {
    fn from(error: StoreError) -> Self {
        OperatorError::Failed(error.to_string())
    }
}

impl OperatorError {
    /// Of a change that failed: it may be stored all the same.
    pub(super) fn of_change(error: impl Into<WorkerError>) -> Self {
        match error.into() {
            WorkerError::Store(error) | WorkerError::Unanswered(error) if error.may_be_stored() => {
                OperatorError::Unknown(error.to_string())
            }
            error => error.into(),
        }
    }

    /// Of what comes behind a change that is stored.
    fn behind_a_change(error: impl std::fmt::Display) -> Self {
        OperatorError::Unknown(format!("it is stored, but not known here yet: {error}"))
    }
}

impl Operator {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Begins a stream, or finds that it is there already; a stopped one goes on.
    ///
    /// # Errors
    /// [`OperatorError::Differs`] when a stream of this ID exists otherwise, [`OperatorError::PrefixTaken`].
    pub async fn initialize(&self, spec: StreamSpec, actor: &str) -> Result<Initialized, OperatorError> {
        let core = &self.core;
        let row = core.row(&spec);
        let registered = core.store.register(&row).await.map_err(OperatorError::of_change)?;
        let (row, created, is_changed) = match registered {
            Registered::Created(row) => (row, true, true),
            Registered::Exists(there) => {
                let differing = match (&spec.request, &there.request) {
                    (Some(asked), Some(before)) => differing_request(asked, before),
                    // What the configuration declares is compared by what it comes to.
                    _ => differing_field(&spec, &there).map(str::to_owned),
                };
                if let Some(field) = differing {
                    return Err(OperatorError::Differs { id: spec.id, field });
                }
                let is_stopped = there.state != StoredState::Running;
                if is_stopped {
                    let resume = |there| Some(StreamRow { state: StoredState::Running, ..there });
                    let resumed = core.store.update_stream(&spec.id, core.now(), resume).await;
                    resumed.map_err(OperatorError::of_change)?;
                }
                (there, false, is_stopped)
            }
            Registered::PrefixTaken(owner) => {
                return Err(OperatorError::PrefixTaken { prefix: spec.prefix, origin: spec.origin, owner });
            }
        };
        fault::point("initialize: registered, not begun");
        let begun = core.begin(std::slice::from_ref(&row.id)).await;
        begun.map_err(|error| match is_changed {
            true => OperatorError::behind_a_change(error),
            false => error.into(),
        })?;
        fault::point("initialize: begun");
        let stream = core.known_stream(&row.id).await?;
        tracing::info!(stream = %row.id, actor, created, "stream initialized");
        Ok(Initialized { stream: core.info(&stream), created })
    }

    /// Streams in the order of their IDs, at most `limit` behind `after`.
    pub async fn streams(
        &self,
        after: Option<&StreamId>,
        limit: usize,
    ) -> Result<Vec<StreamInfo>, OperatorError> {
        let streams: Vec<_> = self.core.shared.directory.read().after(after).take(limit).cloned().collect();
        Ok(streams.iter().map(|stream| self.core.info(stream)).collect())
    }

    /// # Errors
    /// [`OperatorError::NoStream`].
    pub async fn stream(&self, id: &StreamId) -> Result<StreamInfo, OperatorError> {
        let stream = self.core.known_stream(id).await?;
        Ok(self.core.info(&stream))
    }

    /// # Errors
    /// [`OperatorError::NoStream`], [`OperatorError::Configured`], [`OperatorError::Overtaken`].
    pub async fn update(
        &self,
        id: &StreamId,
        change: StreamChange,
        actor: &str,
    ) -> Result<StreamInfo, OperatorError> {
        let core = &self.core;
        let stream = core.changeable(id).await?;
        let _changing = stream.changing.lock().await;
        let changed = core.change_row(&stream, |mut row| {
            if let Some((url, path)) = change.playlist {
                (row.playlist_url, row.playlist_path) = (url, path);
            }
            row.cdn.endpoints = change.cdn_endpoints.unwrap_or(row.cdn.endpoints);
            row.cdn.sync_enabled = change.cdn_sync_enabled.unwrap_or(row.cdn.sync_enabled);
            if let Some(PolicyChange { from, to }) = change.policy {
                if row.policy != from {
                    return None;
                }
                row.policy = to;
            }
            Some(row)
        });
        if !changed.await? {
            return Err(OperatorError::Overtaken(id.clone()));
        }
        core.warn_of_no_lead(&stream.known.read().row);
        tracing::info!(stream = %id, actor, "stream updated");
        Ok(core.info(&stream))
    }

    /// Serves nothing of a stream any more, from this moment. Its keys are kept.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`].
    pub async fn stop(&self, id: &StreamId, actor: &str) -> Result<StreamInfo, OperatorError> {
        let core = &self.core;
        let stream = core.known_stream(id).await?;
        let _changing = stream.changing.lock().await;
        core.change_row(&stream, |row| Some(StreamRow { state: StoredState::Stopped, ..row })).await?;
        tracing::warn!(stream = %id, actor, "stream stopped");
        Ok(core.info(&stream))
    }

    /// Ends a stream: its keys are destroyed, its schedule is removed, its prefix is free. The history of its
    /// keys stays.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`], [`OperatorError::Configured`].
    pub async fn delete(&self, id: &StreamId, actor: &str) -> Result<(), OperatorError> {
        let core = &self.core;
        let stream = core.changeable(id).await?;
        let _changing = stream.changing.lock().await;
        let deleted = core.store.delete_stream(id, core.now()).await.map_err(OperatorError::of_change)?;
        core.forget(id);
        if !deleted {
            return Err(OperatorError::NoStream(id.clone()));
        }
        tracing::warn!(stream = %id, actor, "stream deleted");
        Ok(())
    }

    /// Shreds a stream's data encryption keys and removes every row about it, deleted or not.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`], [`OperatorError::Configured`].
    pub async fn erase(&self, id: &StreamId, actor: &str) -> Result<Erased, OperatorError> {
        let core = &self.core;
        if core.declared.contains(id) {
            return Err(OperatorError::Configured(id.clone()));
        }
        let known = core.shared.directory.read().get(id).cloned();
        let _changing = match &known {
            Some(stream) => Some(stream.changing.lock().await),
            None => None,
        };
        let erased_at = core.now();
        let removed = core.store.erase_stream(id, erased_at).await.map_err(OperatorError::of_change)?;
        core.forget(id);
        let removed = removed.ok_or_else(|| OperatorError::NoStream(id.clone()))?;
        tracing::warn!(stream = %id, actor, "stream erased");
        Ok(Erased {
            data_encryption_keys: removed.deks,
            content_keys: removed.keys,
            renditions: removed.renditions,
            erased_at,
        })
    }

    /// A stream's keys, the newest first, at most `limit` with ordinals below `before`; of a deleted stream too.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`].
    pub async fn keys(
        &self,
        id: &StreamId,
        before: Option<Ordinal>,
        limit: usize,
    ) -> Result<Vec<KeyInfo>, OperatorError> {
        self.history(id, false, before, limit).await
    }

    /// The keys that were promoted, the newest first: the history of rotations.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`].
    pub async fn rotations(
        &self,
        id: &StreamId,
        before: Option<Ordinal>,
        limit: usize,
    ) -> Result<Vec<KeyInfo>, OperatorError> {
        self.history(id, true, before, limit).await
    }

    async fn history(
        &self,
        id: &StreamId,
        promoted: bool,
        before: Option<Ordinal>,
        limit: usize,
    ) -> Result<Vec<KeyInfo>, OperatorError> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let rows = self.core.store.key_history(id, promoted, before, limit).await?;
        if rows.is_empty() && before.is_none() {
            self.core.known_stream(id).await?;
        }
        Ok(rows.iter().map(key_info).collect())
    }

    /// Promotes the next key; every rendition goes over to it a lead past its live edge.
    ///
    /// # Errors
    /// [`OperatorError::NoStream`], [`OperatorError::Stopped`].
    pub async fn rotate(&self, id: &StreamId, actor: &str) -> Result<ManualRotation, OperatorError> {
        let core = &self.core;
        let stream = core.running(id).await?;
        let hand = core.newest_dek(&stream).await;
        let _changing = stream.changing.lock().await;
        for _ in 0..ATTEMPTS {
            core.refresh(&stream).await?;
            let (previous, next) = {
                let known = stream.known.read();
                let head = known.marks().ok_or(OperatorError::NotReady)?.head;
                (known.info_of(head), known.facts(true, &core.delivery).after(head))
            };
            let promote = WriteOp::Promote {
                upto: next,
                reason: Reason::Manual,
                actor: Some(actor.to_owned()),
                at: core.now(),
            };
            if core.write(&stream, next, vec![promote], &hand).await?.first().is_some_and(|count| *count > 0)
            {
                let key = stream.known.read().info_of(next).ok_or_else(not_known)?;
                return Ok(ManualRotation { key, previous });
            }
        }
        Err(OperatorError::Failed(format!("other nodes keep rotating stream {id}")))
    }
}

impl Core {
    pub(super) fn row(&self, spec: &StreamSpec) -> StreamRow {
        StreamRow {
            id: spec.id.clone(),
            playlist_url: spec.playlist_url.clone(),
            playlist_path: spec.playlist_path.clone(),
            origin: spec.origin.clone(),
            prefix: spec.prefix.clone(),
            cdn: CdnRow { endpoints: spec.cdn_endpoints.clone(), sync_enabled: spec.cdn_sync_enabled },
            policy: spec.policy.clone(),
            request: spec.request.clone(),
            state: StoredState::Running,
            created_at: self.now(),
            updated_at: self.now(),
            rev: 0,
            incarnation: 0,
        }
    }

    /// A stream by its ID; one that another node began a moment ago is looked for in the store.
    pub(super) async fn known_stream(&self, id: &StreamId) -> Result<Arc<Stream>, OperatorError> {
        let find = || self.shared.directory.read().get(id).cloned();
        if let Some(stream) = find() {
            return Ok(stream);
        }
        self.reload(std::slice::from_ref(id)).await?;
        find().ok_or_else(|| OperatorError::NoStream(id.clone()))
    }

    async fn changeable(&self, id: &StreamId) -> Result<Arc<Stream>, OperatorError> {
        let stream = self.known_stream(id).await?;
        if self.declared.contains(id) {
            return Err(OperatorError::Configured(id.clone()));
        }
        Ok(stream)
    }

    pub(super) async fn running(&self, id: &StreamId) -> Result<Arc<Stream>, OperatorError> {
        let stream = self.known_stream(id).await?;
        if !stream.is_running() {
            return Err(OperatorError::Stopped(id.clone()));
        }
        Ok(stream)
    }

    /// Stores what `change` makes of a stream's row as the store has it; `false` when it makes nothing of it.
    async fn change_row(
        &self,
        stream: &Stream,
        change: impl FnOnce(StreamRow) -> Option<StreamRow>,
    ) -> Result<bool, OperatorError> {
        let changed = match self.store.update_stream(&stream.id, self.now(), change).await {
            Ok(changed) => changed,
            Err(StoreError::NoStream) => return Err(OperatorError::NoStream(stream.id.clone())),
            Err(error) => return Err(OperatorError::of_change(error)),
        };
        fault::point("update: stored, not known");
        let Some(row) = changed else {
            self.refresh(stream).await?;
            return Ok(false);
        };
        // It holds from here on, whatever becomes of reading the rest anew.
        stream.know_row(row);
        if let Err(error) = self.refresh(stream).await {
            tracing::warn!(stream = %stream.id, %error, "a stream that was changed could not be read anew yet");
        }
        Ok(true)
    }

    /// Stores writes with the keys that they need and, where keys can be made, as many as are to wait, in one
    /// transaction. Returns how many keys each write changed.
    pub(super) async fn write(
        &self,
        stream: &Arc<Stream>,
        highest: Ordinal,
        ops: Vec<WriteOp>,
        hand: &InHand,
    ) -> Result<Vec<u64>, OperatorError> {
        let drafts = {
            let known = stream.known.read();
            let wanted = match self.making_dek(&known, hand) {
                Some(_) => Ordinal(highest.0.saturating_add(known.row.policy.pre_generate_keys)),
                None => highest,
            };
            self.draft_keys(&known, wanted, hand)?
        };
        let make =
            Some(WriteOp::PutKeys(drafts)).filter(|op| !matches!(op, WriteOp::PutKeys(d) if d.is_empty()));
        let ops = make.into_iter().chain(ops);
        let writes: Vec<_> = ops.map(|op| Write { stream: stream.id.clone(), op }).collect();
        fault::point("operate: decided, not stored");
        let (applied, revs) = self.store.apply(&writes).await.map_err(OperatorError::of_change)?;
        fault::point("operate: stored, not known");
        let mut changed = Vec::new();
        for (write, applied) in writes.iter().zip(applied) {
            match applied {
                // Only `store_deks` stores these.
                Applied::Dek(_) => {}
                Applied::Keys(rows) => {
                    let taken = rows.iter().try_for_each(|row| self.take_key(stream, row, hand));
                    taken.map_err(OperatorError::behind_a_change)?;
                }
                Applied::Changed(count) => {
                    changed.push(count);
                    if count > 0 {
                        self.note_write(stream, &write.op, "an operator asked");
                    }
                }
            }
        }
        self.note_revs(&revs);
        fault::point("operate: known, not answered");
        Ok(changed)
    }

    fn info(&self, stream: &Stream) -> StreamInfo {
        let known = stream.known.read();
        let row = &known.row;
        StreamInfo {
            spec: StreamSpec {
                id: row.id.clone(),
                playlist_url: row.playlist_url.clone(),
                origin: row.origin.clone(),
                prefix: row.prefix.clone(),
                playlist_path: row.playlist_path.clone(),
                cdn_endpoints: row.cdn.endpoints.clone(),
                cdn_sync_enabled: row.cdn.sync_enabled,
                policy: row.policy.clone(),
                request: row.request.clone(),
            },
            state: match row.state {
                StoredState::Running => StreamState::Running,
                StoredState::Stopped | StoredState::Deleted => StreamState::Stopped,
            },
            is_configured: self.declared.contains(&row.id),
            created_at: row.created_at,
            updated_at: row.updated_at,
            current_key: known.marks().and_then(|marks| known.info_of(marks.head)),
        }
    }
}

impl Known {
    pub(super) fn info_of(&self, ordinal: Ordinal) -> Option<KeyInfo> {
        let key = self.keys.get(&ordinal)?;
        Some(KeyInfo {
            id: key.live.id,
            ordinal,
            state: key.life.state,
            method: key.live.method,
            created_at: key.life.created_at,
            activated_at: key.life.activated_at,
            activated_for: key.life.activated_for.clone(),
            activated_by: key.life.activated_by.clone(),
            deactivated_at: key.life.deactivated_at,
            compromised_at: key.life.compromised_at,
            revoked_by: key.life.revoked_by.clone(),
            revoked_for: key.life.revoked_for.clone(),
            destroyed_at: key.life.destroyed_at,
        })
    }
}

/// What was stored a moment ago is not there any more: another node went on meanwhile.
pub(super) fn not_known() -> OperatorError {
    OperatorError::behind_a_change("another node has changed it since")
}

fn key_info(row: &KeyRow) -> KeyInfo {
    KeyInfo {
        id: row.id,
        ordinal: row.ordinal,
        state: row.life.state,
        method: row.method,
        created_at: row.life.created_at,
        activated_at: row.life.activated_at,
        activated_for: row.life.activated_for.clone(),
        activated_by: row.life.activated_by.clone(),
        deactivated_at: row.life.deactivated_at,
        compromised_at: row.life.compromised_at,
        revoked_by: row.life.revoked_by.clone(),
        revoked_for: row.life.revoked_for.clone(),
        destroyed_at: row.life.destroyed_at,
    }
}
