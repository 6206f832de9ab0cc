//! Which streams need which data encryption keys: found, unwrapped, made, renewed.
//!
//! Keys are unwrapped before their stream is taken in, and made before their stream is changed: nobody waits for the KMS
//! with a stream in hand. What could not be unwrapped is its stream's trouble alone. A new version takes over for the
//! content keys that are made from then on; those that are there keep theirs, and the sweep shreds a version that no key
//! needs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::deks::{AT_ONCE, FIRST_PAUSE, InHand, LOOK_INTERVAL};
use super::stream::Stream;
use super::worker::{Core, WorkerError};
use crate::fault;
use crate::keys::{DataEncryptionKey, DekVersion, StreamId};
use crate::store::{Applied, DekRow, StoredStream, StreamState, Write, WriteOp};

/// Keys that are made and not stored, each with what is to be stored of it.
pub(super) type Drafts = HashMap<StreamId, (DekRow, DataEncryptionKey)>;

/// The version of the newest key of a stream that is to get another one; 0 for one that has none.
pub(super) type Versions = HashMap<StreamId, u32>;

impl Core {
    /// Looks after the KMS, so that an outage shows before somebody needs it and tokens are renewed; unwraps what is
    /// wanted; and makes the keys that streams could not have when they began, or should have by now.
    pub(super) async fn keep_the_kms_in_sight(self: Arc<Self>) {
        let look_interval = LOOK_INTERVAL.min(self.fleet.sweep_interval * 5);
        let mut ticks = tokio::time::interval(self.fleet.sweep_interval.max(FIRST_PAUSE));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_at = Instant::now();
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.deks.wants.notified() => {}
            }
            if looked_at.elapsed() >= look_interval {
                self.deks.look().await;
                looked_at = Instant::now();
            }
            self.deks.let_go_of_what_is_over();
            if !self.shared.status.read().kms_up {
                continue;
            }
            self.unwrap_what_is_wanted().await;
            if !self.is_store_away() {
                self.begin_what_waits().await;
                self.renew_what_is_old().await;
            }
        }
    }

    /// Unwraps what sweeps want, as long as their streams have it.
    pub(super) async fn unwrap_what_is_wanted(&self) {
        let is_needed = |stream: &StreamId, dek| {
            let stream = self.shared.directory.read().get(stream).cloned();
            stream.is_some_and(|stream| stream.known.read().deks.values().any(|d| d.row.id == dek))
        };
        self.deks.unwrap_wanted(is_needed).await;
    }

    async fn begin_what_waits(&self) {
        let waiting: Vec<_> = {
            let directory = self.shared.directory.read();
            let waits = |stream: &&Arc<Stream>| {
                let known = stream.known.read();
                known.is_read() && stream.is_running() && known.deks.is_empty()
            };
            directory.iter().filter(waits).take(AT_ONCE).map(|stream| stream.id.clone()).collect()
        };
        if !waiting.is_empty()
            && let Err(error) = self.begin(&waiting).await
        {
            tracing::warn!(first = %waiting[0], streams = waiting.len(), %error, "streams could not begin yet");
        }
    }

    /// Renews keys whose time is over, on the node that sweeps.
    async fn renew_what_is_old(&self) {
        let Some(after) = self.deks.rules.rotate_after.filter(|_| self.holds_lease()) else { return };
        let now = self.now();
        let old: Vec<_> = {
            let directory = self.shared.directory.read();
            let is_old = |stream: &&Arc<Stream>| {
                let known = stream.known.read();
                let is_old = known.dek().is_some_and(|dek| now.since(dek.row.created_at) >= after);
                known.is_read() && stream.is_running() && is_old
            };
            directory.iter().filter(is_old).take(AT_ONCE).cloned().collect()
        };
        if !old.is_empty()
            && let Err(error) = self.renew_deks(&old).await
        {
            tracing::warn!(first = %old[0].id, streams = old.len(), %error, "data encryption keys could not be renewed yet");
        }
    }

    /// Gives streams a new data encryption key each, unless another node is doing the same. For whoever holds no lock;
    /// `streams` are in the order of their IDs.
    ///
    /// # Errors
    /// The first of what went wrong; the other streams have theirs.
    pub(super) async fn renew_deks(&self, streams: &[Arc<Stream>]) -> Result<(), WorkerError> {
        let newest = |stream: &Arc<Stream>| stream.known.read().dek().map_or(0, |dek| dek.row.version.0);
        let versions: Versions = streams.iter().map(|stream| (stream.id.clone(), newest(stream))).collect();
        let (drafts, failed) = self.draft_deks(&versions).await?;
        if !drafts.is_empty() {
            let changing = super::declare::all_changing(streams).await;
            let are_ours = self.store_deks(streams, drafts).await?;
            drop(changing);
            if !are_ours {
                let ids: Vec<_> = streams.iter().map(|stream| stream.id.clone()).collect();
                self.reload(&ids).await?;
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Takes the keys in hand that streams need to be taken in. For whoever holds no lock.
    pub(super) async fn unwrap_missing(&self, stored: &[StoredStream], hand: &mut InHand) {
        let missing = self.missing(stored, hand);
        if !missing.is_empty() {
            hand.extend(self.deks.unwrap_all(missing).await);
        }
    }

    /// Takes those keys in hand that are unwrapped already, and says which others are needed to take streams in: those of
    /// which this node knows nothing yet, and those that wrap content keys which it has not opened.
    pub(super) fn missing(&self, stored: &[StoredStream], hand: &mut InHand) -> Vec<(StreamId, DekRow)> {
        let mut missing = Vec::new();
        for stored in stored.iter().filter(|stored| stored.stream.state != StreamState::Deleted) {
            let known = self.shared.directory.read().get(&stored.stream.id).cloned();
            let known = known.as_ref().map(|stream| stream.known.read());
            for row in &stored.deks {
                let is_known = known.as_ref().is_some_and(|known| known.dek_of(row.id).is_some());
                let is_open = |ordinal| known.as_ref().is_some_and(|known| known.keys.contains_key(&ordinal));
                let mut keys = stored.keys.iter().filter(|key| key.dek == row.id);
                if hand.contains_key(&row.id) || (is_known && keys.all(|key| is_open(key.ordinal))) {
                    continue;
                }
                match self.deks.held(row.id) {
                    Some(key) => drop(hand.insert(row.id, Ok(key))),
                    None => missing.push((stored.stream.id.clone(), row.clone())),
                }
            }
        }
        missing
    }

    /// The stream's newest key, if it is unwrapped or soon is. For whoever holds no lock.
    pub(super) async fn newest_dek(&self, stream: &Stream) -> InHand {
        let Some(row) = stream.known.read().dek().map(|dek| dek.row.clone()) else { return InHand::new() };
        let key = self.deks.soon(&stream.id, &row).await;
        key.map(|key| (row.id, Ok(key))).into_iter().collect()
    }

    /// Makes a key for each stream, of the version behind the given one: the one call of the KMS in a stream's life to
    /// wrap, but for renewals. For whoever holds no lock. The second part is the first of what went wrong.
    pub(super) async fn draft_deks(
        &self,
        versions: &Versions,
    ) -> Result<(Drafts, Option<WorkerError>), WorkerError> {
        if versions.is_empty() {
            return Ok(Default::default());
        }
        let mut ids: Vec<_> = versions.keys().cloned().collect();
        ids.sort_unstable();
        // Shredded ones keep their versions.
        let highest = self.store.highest_deks(&ids).await?;
        let is_behind = |id: &StreamId| {
            let highest = highest.get(id).copied().unwrap_or_default();
            highest > versions.get(id).copied().unwrap_or_default()
        };
        let behind: Vec<_> = ids.iter().filter(|id| is_behind(id)).cloned().collect();
        let mut failed = None;
        // Asked for behind the versions: another node's is either found here, or has the version that we try.
        if !behind.is_empty() {
            let unread = if self.is_alone() { Vec::new() } else { self.reload_each(&behind).await? };
            let has_another = |id: &StreamId| {
                let stream = self.shared.directory.read().get(id).cloned();
                let newest = stream.and_then(|stream| stream.known.read().dek().map(|dek| dek.row.version.0));
                newest.unwrap_or_default() > versions.get(id).copied().unwrap_or_default()
            };
            // One that has a key must not get another because that does not unwrap.
            ids.retain(|id| !has_another(id) && unread.iter().all(|(unread, _)| unread != id));
            failed = unread.into_iter().next().map(|(_, error)| error);
        }
        let (mut calls, mut drafted) = (JoinSet::new(), Vec::with_capacity(ids.len()));
        for id in ids {
            if calls.len() >= AT_ONCE {
                drafted.extend(calls.join_next().await.and_then(Result::ok));
            }
            let version = DekVersion(highest.get(&id).map_or(1, |highest| highest + 1));
            let deks = Arc::clone(&self.deks);
            calls.spawn(async move {
                let draft = deks.draft(&id, version).await;
                (id, draft)
            });
        }
        drafted.extend(calls.join_all().await);
        let mut drafts = Drafts::new();
        for (id, draft) in drafted {
            match draft {
                Ok(draft) => drop(drafts.insert(id, draft)),
                Err(error) => {
                    failed.get_or_insert(WorkerError::Kms(error));
                }
            }
        }
        fault::point("DEK: wrapped, not stored");
        Ok((drafts, failed))
    }

    /// Stores drafts of streams that have no newer key meanwhile, and knows them. `false` where another node was first:
    /// then its key holds, and is to be read. Whoever calls it holds `changing` of the streams.
    pub(super) async fn store_deks(
        &self,
        streams: &[Arc<Stream>],
        mut drafts: Drafts,
    ) -> Result<bool, WorkerError> {
        let newest = |stream: &Stream| stream.known.read().dek().map(|dek| dek.row.version);
        let (new, writes): (Vec<_>, Vec<_>) = streams
            .iter()
            .filter_map(|stream| {
                let (row, key) = drafts.remove(&stream.id)?;
                let is_new = newest(stream).is_none_or(|newest| newest < row.version);
                let write = Write { stream: stream.id.clone(), op: WriteOp::PutDek(row.clone()) };
                is_new.then_some(((stream, row, key), write))
            })
            .unzip();
        if writes.is_empty() {
            return Ok(true);
        }
        let (applied, revs) = self.store.apply(&writes).await?;
        fault::point("DEK: stored, not known");
        let mut are_ours = true;
        for ((stream, row, key), applied) in new.into_iter().zip(&applied) {
            match applied {
                Applied::Dek(there) if there.id == row.id => {
                    tracing::info!(stream = %stream.id, dek = %row.id, version = row.version.0, "data encryption key made");
                    self.know_dek(stream, row, &key);
                    self.deks.hold(there.id, key);
                }
                _ => are_ours = false,
            }
        }
        // What is to be read must not look as if it had been.
        if are_ours {
            self.note_revs(&revs);
        }
        Ok(are_ours)
    }
}
