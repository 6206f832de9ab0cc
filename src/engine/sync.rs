//! Keeping in step: hearing what other nodes changed, telling them what was served here.
//!
//! The store tells of changes (NOTIFY) or is polled; both only say that there is something to read. What was
//! served goes into the store every few seconds, because the node that sweeps must not let a key go that a
//! playlist of another one still names.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use super::deks::InHand;
use super::stream::Stream;
use super::worker::{Core, LOAD_AT_ONCE, WorkerError};
use crate::fault;
use crate::keys::{KeyId, KeyState, REPORT_INTERVAL, REPORT_SLACK, StreamId, Timestamp};
use crate::store::{Served, Store, StoreError, StoredStream};

/// Renditions, or keys, that are reported in one transaction.
const REPORTED_AT_ONCE: usize = 2_000;
/// A node that was not heard of for so long is taken for gone, with everything that it could have told.
const PRESUMED_DEAD: Duration = Duration::from_secs(15 * 60);
/// Requests for what is not known here cause no more syncs than one in this time.
const NEWS_PAUSE: Duration = Duration::from_millis(50);
/// Sliding renditions that nobody asked for in this time are forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(7 * 86_400);
/// How often that is looked after.
const HOUSEKEEPING: Duration = Duration::from_secs(600);
/// Streams that could not be taken in are tried again after this time, and then after twice as long each time.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_AT_MOST: Duration = Duration::from_secs(60);
/// How many are tried again. The others are taken in when they change, or at the next start.
const MAX_RETRIES: usize = 10_000;

/// How often streams are read until all their data encryption keys are at hand.
const READS: usize = 3;

/// How long a sync waits for keys to be unwrapped. What takes longer goes on by itself, so that other news need not wait
/// for a KMS that is away.
const SYNC_PATIENCE: Duration = Duration::from_millis(500);

/// What became of reading streams anew. All others are taken in.
#[derive(Default)]
struct Reload {
    /// Those that could not be taken in.
    failed: Vec<(StreamId, WorkerError)>,
    /// Those with which nothing was done: they have keys that are to be unwrapped.
    wrapped: Vec<StoredStream>,
}

/// How far the store was read.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    pub(super) changes: i64,
    pub(super) retries: Retries,
    reports: i64,
    /// When reports were last read, and whether some node owed one.
    reports_read: Option<(Instant, bool)>,
    told_keys: HashMap<KeyId, Timestamp>,
    housekept: Option<Instant>,
}

/// Streams that changed and could not be taken in, such as one whose data encryption key this node cannot unwrap. The
/// store is read on without them: one that is damaged must not have all that changed since read again and again.
#[derive(Debug, Default)]
pub(super) struct Retries {
    of: HashMap<StreamId, Retry>,
    /// Those that wait for their keys to be unwrapped, and whether they changed meanwhile.
    under_way: HashMap<StreamId, bool>,
}

#[derive(Debug, Clone, Copy)]
struct Retry {
    /// The revision that could not be taken in; another one is tried at once.
    rev: i64,
    at: Instant,
    pause: Duration,
}

impl Retries {
    /// Whether a revision is one that could not be taken in, and is to be left alone for now.
    fn is_put_off(&self, id: &StreamId, rev: i64, now: Instant) -> bool {
        self.of.get(id).is_some_and(|retry| retry.rev == rev && now < retry.at)
    }

    /// Those whose time has come, with the revision of each.
    fn due(&self, now: Instant) -> Vec<(StreamId, i64)> {
        let due = self.of.iter().filter(|(_, retry)| retry.at <= now);
        due.map(|(id, retry)| (id.clone(), retry.rev)).collect()
    }

    /// Notes that one could not be taken in; `false` when there is no room for it.
    fn put_off(&mut self, id: &StreamId, rev: i64, now: Instant) -> bool {
        let before = self.of.get(id).filter(|before| before.rev == rev);
        let pause = before.map_or(RETRY_AFTER, |before| (before.pause * 2).min(RETRY_AFTER_AT_MOST));
        if !self.of.contains_key(id) && self.of.len() >= MAX_RETRIES {
            return false;
        }
        self.of.insert(id.clone(), Retry { rev, at: now + pause, pause });
        true
    }

    /// Notes that one is being taken in by a task of its own.
    fn take_off(&mut self, id: &StreamId) {
        self.under_way.insert(id.clone(), false);
    }

    /// Whether one is being taken in; it is then looked at again.
    fn is_under_way(&mut self, id: &StreamId) -> bool {
        self.under_way.get_mut(id).map(|has_changed| *has_changed = true).is_some()
    }

    /// Notes how taking one in has ended. `false` when it is to be tried again, and there is no room for it.
    fn land(&mut self, id: &StreamId, rev: i64, is_taken_in: bool, now: Instant) -> bool {
        let has_changed = self.under_way.remove(id).unwrap_or_default();
        if is_taken_in {
            self.forget(id);
        }
        if has_changed {
            self.of.insert(id.clone(), Retry { rev, at: now, pause: Duration::ZERO });
        }
        is_taken_in || has_changed || self.put_off(id, rev, now)
    }

    fn forget(&mut self, id: &StreamId) {
        self.of.remove(id);
    }

    pub(super) fn len(&self) -> usize {
        self.of.len()
    }

    #[cfg(test)]
    pub(super) fn is_waiting_for_keys(&self) -> bool {
        !self.under_way.is_empty()
    }
}

impl Core {
    /// Loads every stream, at the start.
    pub(super) async fn load_all(&self) -> Result<(), WorkerError> {
        // From before the first row is read: what changes meanwhile is read again.
        self.cursors.lock().changes = self.store.changes(i64::MAX).await?.next;
        let (mut after, mut failed, mut loaded) = (String::new(), None, 0_usize);
        loop {
            let ids = self.store.stream_ids(&after, LOAD_AT_ONCE).await?;
            let Some(last) = ids.last() else { break };
            after = last.as_str().to_owned();
            let all = self.store.load(&ids).await?;
            let mut hand = InHand::new();
            self.unwrap_missing(&all, &mut hand).await;
            for stored in all {
                match self.take_in(&stored, &hand) {
                    Ok(()) => loaded += 1,
                    Err(error) => {
                        tracing::error!(stream = %stored.stream.id, %error, "the stream could not be loaded");
                        let retries = &mut self.cursors.lock().retries;
                        retries.put_off(&stored.stream.id, stored.stream.rev, Instant::now());
                        failed.get_or_insert(error);
                    }
                }
            }
        }
        // One that is damaged must not keep the others from being served; all of them are a wrong master key.
        match failed {
            Some(error) if loaded == 0 => return Err(error),
            _ => tracing::info!(streams = loaded, "streams loaded"),
        }
        self.hear_reports().await
    }

    /// Wakes [`Self::keep_in_step`] when the store tells of a change.
    pub(super) async fn keep_listening(self: Arc<Self>) {
        loop {
            match self.store.news().await {
                Ok(mut news) => {
                    // Before the first word too: something may have been missed.
                    self.shared.news.wanted.notify_one();
                    while news.next().await.is_ok() {
                        self.shared.news.wanted.notify_one();
                    }
                }
                Err(error) => tracing::debug!(%error, "the store does not tell of changes"),
            }
            tokio::time::sleep(self.fleet.poll_interval).await;
        }
    }

    /// Follows the store for as long as the process lives.
    pub(super) async fn keep_in_step(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.fleet.poll_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = self.shared.news.wanted.notified() => {}
            }
            let begun = *self.shared.news.begun.borrow() + 1;
            self.shared.news.begun.send_replace(begun);
            // A store whose answer this node cannot use, such as a stream that does not unwrap, is not away.
            let is_up = match self.sync().await {
                Ok(()) => true,
                Err(WorkerError::Store(error)) if error.is_away() => {
                    if !self.is_store_away() {
                        tracing::error!(%error, "the store is away: keys in memory go on being served");
                    }
                    false
                }
                Err(error) => {
                    tracing::error!(%error, "this node is not in step");
                    true
                }
            };
            self.note_store(is_up);
            if is_up {
                self.look_for_incidents().await;
            }
            self.shared.news.done.send_replace(begun);
            if is_up
                && self.decided_alone.swap(false, Ordering::AcqRel)
                && let Err(error) = self.store_what_waits().await
            {
                tracing::warn!(%error, "what was decided without the store could not be stored yet");
                self.decided_alone.store(true, Ordering::Release);
            }
            tokio::time::sleep(NEWS_PAUSE).await;
        }
    }

    /// Takes in what changed since the last time. Streams whose keys are to be unwrapped first are waited for a moment,
    /// and then come by themselves.
    ///
    /// # Errors
    /// The first of those that could not be taken in by then; the others are.
    pub(super) async fn sync(self: &Arc<Self>) -> Result<(), WorkerError> {
        let since = self.cursors.lock().changes;
        let changes = self.store.changes(since).await?;
        let now = Instant::now();
        let is_new = |id: &StreamId, rev: i64| {
            let known = self.shared.directory.read().get(id).map(|stream| stream.known.read().row.rev);
            known.is_none_or(|known| known < rev)
        };
        let changed: BTreeMap<StreamId, i64> = {
            let retries = &mut self.cursors.lock().retries;
            let new = changes.streams.into_iter().filter(|(id, rev)| is_new(id, *rev));
            // A retry has the revision of its failure, a change the newest: it goes over that.
            let due: Vec<_> = retries.due(now).into_iter().chain(new).collect();
            let may_be_read =
                |(id, rev): &(StreamId, i64)| !retries.is_put_off(id, *rev, now) && !retries.is_under_way(id);
            due.into_iter().filter(may_be_read).collect()
        };
        let ids: Vec<_> = changed.keys().cloned().collect();
        let (mut wrapped, mut failed) = (Vec::new(), None);
        for ids in ids.chunks(LOAD_AT_ONCE as usize) {
            let read = self.read_one_by_one_where_it_fails(ids).await?;
            wrapped.extend(read.wrapped.into_iter().map(|stored| stored.stream.id));
            let is_left = |id: &&StreamId| !wrapped.contains(*id);
            let done = ids.iter().filter(is_left).map(|id| (id, changed[id]));
            failed = failed.or(self.note_taken_in(done, read.failed));
        }
        // Even if it is earlier than before: then the database's clock was set back, as by a failover, and what
        // changes now bears the earlier times. And whatever could not be taken in: that is tried again by itself.
        self.cursors.lock().changes = changes.next;
        if !wrapped.is_empty() {
            wrapped.iter().for_each(|id| self.cursors.lock().retries.take_off(id));
            let wrapped = wrapped.into_iter().map(|id| (id.clone(), changed[&id])).collect();
            let unwrapping = tokio::spawn(Arc::clone(self).take_in_unwrapped(wrapped));
            if let Ok(Ok(unwrapped)) = tokio::time::timeout(SYNC_PATIENCE, unwrapping).await {
                failed = failed.or(unwrapped);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Reads streams anew as far as they need no key unwrapped, and each by itself where a row cannot be read.
    async fn read_one_by_one_where_it_fails(&self, ids: &[StreamId]) -> Result<Reload, StoreError> {
        let mut hand = InHand::new();
        match self.reload_with(ids, &mut hand).await {
            Err(error) if !error.is_away() && !error.is_busy() => {}
            read => return read,
        }
        // A row that this version cannot read; which, only reading each by itself says.
        let mut all = Reload::default();
        for id in ids {
            match self.reload_with(std::slice::from_ref(id), &mut hand).await {
                Ok(read) => {
                    all.failed.extend(read.failed);
                    all.wrapped.extend(read.wrapped);
                }
                Err(error) if error.is_away() || error.is_busy() => return Err(error),
                Err(error) => all.failed.push((id.clone(), error.into())),
            }
        }
        Ok(all)
    }

    /// Unwraps the keys of streams and takes these in. Gives the first error.
    async fn take_in_unwrapped(self: Arc<Self>, changed: Vec<(StreamId, i64)>) -> Option<WorkerError> {
        let mut first = None;
        for changed in changed.chunks(LOAD_AT_ONCE as usize) {
            let ids: Vec<_> = changed.iter().map(|(id, _)| id.clone()).collect();
            let failed = match self.reload_each(&ids).await {
                Ok(failed) => failed,
                Err(error) => {
                    let why = error.to_string();
                    let not_read =
                        |id: &StreamId| WorkerError::NotRead { stream: id.to_string(), why: why.clone() };
                    ids.iter().map(|id| (id.clone(), not_read(id))).collect()
                }
            };
            let done = changed.iter().map(|(id, rev)| (id, *rev));
            first = first.or(self.note_taken_in(done, failed));
        }
        first
    }

    /// Notes which streams were taken in, and which are to be tried again. Gives the first error.
    fn note_taken_in<'a>(
        &self,
        done: impl Iterator<Item = (&'a StreamId, i64)>,
        failed: Vec<(StreamId, WorkerError)>,
    ) -> Option<WorkerError> {
        let (mut cursors, now) = (self.cursors.lock(), Instant::now());
        for (id, rev) in done {
            let is_taken_in = failed.iter().all(|(failed, _)| failed != id);
            if !cursors.retries.land(id, rev, is_taken_in, now) {
                tracing::error!(stream = %id, "too many streams could not be taken in: this one is not tried again");
            }
        }
        self.shared.metrics.streams_put_off.set(i64::try_from(cursors.retries.len()).unwrap_or(i64::MAX));
        failed.into_iter().next().map(|(_, error)| error)
    }

    /// Reads streams anew, known or not. `ids` are in their order.
    ///
    /// # Errors
    /// The first of those that could not be taken in; the others were.
    pub(super) async fn reload(&self, ids: &[StreamId]) -> Result<(), WorkerError> {
        self.reload_each(ids).await?.into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// As [`Self::reload`], with each that could not be taken in and why.
    pub(super) async fn reload_each(
        &self,
        ids: &[StreamId],
    ) -> Result<Vec<(StreamId, WorkerError)>, StoreError> {
        let (mut hand, mut failed, mut left) = (InHand::new(), Vec::new(), ids.to_vec());
        for _ in 0..READS {
            let read = self.reload_with(&left, &mut hand).await?;
            failed.extend(read.failed);
            if read.wrapped.is_empty() {
                return Ok(failed);
            }
            // Now, when nothing is held.
            self.unwrap_missing(&read.wrapped, &mut hand).await;
            left = read.wrapped.into_iter().map(|stored| stored.stream.id).collect();
        }
        // Their keys change faster than they can be unwrapped.
        let not_unwrapped = |id: StreamId| {
            let error = WorkerError::NotUnwrapped { stream: id.to_string() };
            (id, error)
        };
        failed.extend(left.into_iter().map(not_unwrapped));
        Ok(failed)
    }

    /// Takes streams in as the store has them now, but for those that have keys to be unwrapped first.
    async fn reload_with(&self, ids: &[StreamId], hand: &mut InHand) -> Result<Reload, StoreError> {
        // One at a time: two must not take the same new stream in.
        let _loading = self.loading.lock().await;
        let known: Vec<_> = {
            let directory = self.shared.directory.read();
            ids.iter().filter_map(|id| directory.get(id).cloned()).collect()
        };
        // Nobody changes them between reading and knowing. All who hold several take them in this order.
        let mut changing = Vec::with_capacity(known.len());
        for stream in &known {
            changing.push(stream.changing.lock().await);
        }
        let all = self.store.load(ids).await?;
        let missing: HashSet<_> = self.missing(&all, hand).into_iter().map(|(id, _)| id).collect();
        let mut read = Reload::default();
        for stored in all {
            if missing.contains(&stored.stream.id) {
                read.wrapped.push(stored);
            } else if let Err(error) = self.take_in(&stored, hand) {
                tracing::error!(stream = %stored.stream.id, %error, "the stream could not be taken in");
                read.failed.push((stored.stream.id.clone(), error));
            }
        }
        Ok(read)
    }

    /// Reads a stream anew. Whoever calls it holds `changing`, so that what the KMS would be needed for is left to the
    /// next sync.
    pub(super) async fn refresh(&self, stream: &Stream) -> Result<(), WorkerError> {
        let all = self.store.load(std::slice::from_ref(&stream.id)).await?;
        let mut hand = InHand::new();
        let _ = self.missing(&all, &mut hand);
        for stored in &all {
            match self.take_in(stored, &hand) {
                Err(error) if !error.is_about_a_dek() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Tells what was served here, and hears what was served elsewhere.
    pub(super) async fn report(&self) -> Result<(), WorkerError> {
        self.tell(&self.store).await?;
        fault::point("report: told");
        // Only now: whoever was heard of has told what it served.
        self.store.beat(&self.fleet.node).await?;
        if self.holds_lease() {
            self.hear_reports().await?;
            fault::point("report: heard");
            self.keep_house().await?;
        }
        Ok(())
    }

    /// Tells what was served here.
    pub(super) async fn tell(&self, store: &Store) -> Result<(), StoreError> {
        let now = self.now();
        let (served, named) = self.served(now);
        for chunk in served.renditions.chunks(REPORTED_AT_ONCE) {
            let part = Served { renditions: chunk.to_vec(), keys: Vec::new() };
            store.report(&part).await?;
            fault::point("report: renditions stored, not known");
            self.note_told(&part, now);
        }
        for chunk in served.keys.chunks(REPORTED_AT_ONCE) {
            store.report(&Served { renditions: Vec::new(), keys: chunk.to_vec() }).await?;
        }
        let mut cursors = self.cursors.lock();
        cursors.told_keys.extend(named);
        cursors.told_keys.retain(|id, _| self.shared.keys.read().contains_key(id));
        Ok(())
    }

    /// What is to be told, and for each of its keys when it was named.
    fn served(&self, now: Timestamp) -> (Served, Vec<(KeyId, Timestamp)>) {
        let (mut served, mut named) = (Served::default(), Vec::new());
        let cursors = self.cursors.lock();
        for stream in self.shared.directory.read().iter() {
            let known = stream.known.read();
            let told = known.renditions.iter().filter(|(_, own)| own.is_to_be_told(now));
            served.renditions.extend(told.map(|(name, own)| (stream.id.clone(), own.row(name))));
            let retired = |state| matches!(state, KeyState::Deactivated | KeyState::Compromised);
            for (ordinal, key) in known.keys.iter().filter(|(_, key)| retired(key.life.state)) {
                let named_at = key.live.last_named_at();
                if cursors.told_keys.get(&key.live.id).is_none_or(|told| named_at > *told) {
                    served.keys.push((stream.id.clone(), *ordinal, named_at));
                    named.push((key.live.id, named_at));
                }
            }
        }
        (served, named)
    }

    fn note_told(&self, told: &Served, now: Timestamp) {
        for (id, row) in &told.renditions {
            let Some(stream) = self.shared.directory.read().get(id).cloned() else { continue };
            if let Some(own) = stream.known.write().renditions.get_mut(&row.rendition) {
                own.told = Some((now, row.last_served_at));
            }
        }
    }

    pub(super) async fn hear_reports(&self) -> Result<(), WorkerError> {
        let since = self.cursors.lock().reports;
        let is_missing = self.store.is_a_node_missing(REPORT_SLACK, PRESUMED_DEAD).await?;
        if is_missing {
            tracing::warn!("a node has not been heard of: no key is destroyed until it is back, or given up");
        }
        let (served, next) = self.store.reports_since(since).await?;
        for (id, row) in &served.renditions {
            let Some(stream) = self.shared.directory.read().get(id).cloned() else { continue };
            if let Some(own) = stream.known.write().renditions.get_mut(&row.rendition) {
                own.hear(row);
            }
        }
        for (id, ordinal, at) in &served.keys {
            let Some(stream) = self.shared.directory.read().get(id).cloned() else { continue };
            if let Some(key) = stream.known.read().keys.get(ordinal) {
                key.live.named_at(*at);
            }
        }
        let mut cursors = self.cursors.lock();
        cursors.reports = next;
        cursors.reports_read = Some((Instant::now(), is_missing));
        Ok(())
    }

    /// Whether this node knows well enough what all nodes served to let keys go.
    pub(super) fn may_destroy(&self) -> bool {
        let read = self.cursors.lock().reports_read;
        read.is_some_and(|(at, is_missing)| !is_missing && at.elapsed() < REPORT_INTERVAL * 2)
    }

    async fn keep_house(&self) -> Result<(), WorkerError> {
        let is_due = self.cursors.lock().housekept.is_none_or(|at| at.elapsed() >= HOUSEKEEPING);
        if !is_due {
            return Ok(());
        }
        let before = self.now().minus(FORGET_AFTER);
        let forgotten = self.store.forget_renditions(before).await?;
        if forgotten > 0 {
            tracing::info!(renditions = forgotten, "renditions that nobody asked for are forgotten");
        }
        for stream in self.shared.directory.read().iter() {
            stream.known.write().renditions.retain(|_, own| own.keeps_all || own.last_served_at >= before);
        }
        self.cursors.lock().housekept = Some(Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_taken_in_is_tried_again_later_and_later() {
        let (start, id) = (Instant::now(), "ch1".parse::<StreamId>().unwrap());
        let after = |secs| start + Duration::from_secs(secs);
        let mut retries = Retries::default();
        assert!(retries.put_off(&id, 7, start));
        assert!(retries.is_put_off(&id, 7, start) && retries.due(start).is_empty());
        assert!(!retries.is_put_off(&id, 8, start), "a newer revision may be another matter");
        assert_eq!(retries.due(after(1)), [(id.clone(), 7)]);
        assert!(retries.put_off(&id, 7, after(1)));
        assert!(retries.due(after(2)).is_empty());
        assert_eq!(retries.due(after(3)), [(id.clone(), 7)]);
        for _ in 0..20 {
            retries.put_off(&id, 7, after(3));
        }
        assert_eq!(retries.due(after(63)).len(), 1, "a minute at most");
        retries.put_off(&id, 8, after(63));
        assert_eq!(retries.due(after(64)), [(id.clone(), 8)], "a new failure begins anew");
        retries.forget(&id);
        assert_eq!(retries.len(), 0);
        for n in 0..=MAX_RETRIES {
            let id = format!("ch{n}").parse().unwrap();
            assert_eq!(retries.put_off(&id, 1, start), n < MAX_RETRIES);
        }
    }
}
