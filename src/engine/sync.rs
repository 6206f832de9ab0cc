//! Keeping in step: hearing what other nodes changed, telling them what was served here.
//!
//! The store tells of changes (NOTIFY) or is polled; both only say that there is something to read. What was
//! served goes into the store every few seconds, because the node that sweeps must not let a key go that a
//! playlist of another one still names.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use super::deks::Unwrapped;
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

/// What became of reading streams anew.
enum Reload {
    /// They are taken in, but for these.
    Done(Vec<(StreamId, WorkerError)>),
    /// Nothing was done: these have keys that are to be unwrapped.
    Wrapped(Vec<StoredStream>),
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
pub(super) struct Retries(HashMap<StreamId, Retry>);

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
        self.0.get(id).is_some_and(|retry| retry.rev == rev && now < retry.at)
    }

    /// Those whose time has come, with the revision of each.
    fn due(&self, now: Instant) -> Vec<(StreamId, i64)> {
        let due = self.0.iter().filter(|(_, retry)| retry.at <= now);
        due.map(|(id, retry)| (id.clone(), retry.rev)).collect()
    }

    /// Notes that one could not be taken in; `false` when there is no room for it.
    fn put_off(&mut self, id: &StreamId, rev: i64, now: Instant) -> bool {
        let before = self.0.get(id).filter(|before| before.rev == rev);
        let pause = before.map_or(RETRY_AFTER, |before| (before.pause * 2).min(RETRY_AFTER_AT_MOST));
        if !self.0.contains_key(id) && self.0.len() >= MAX_RETRIES {
            return false;
        }
        self.0.insert(id.clone(), Retry { rev, at: now + pause, pause });
        true
    }

    fn forget(&mut self, id: &StreamId) {
        self.0.remove(id);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
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
            let mut unwrapped = Unwrapped::new();
            self.unwrap_missing(&all, &mut unwrapped).await;
            for stored in all {
                match self.take_in(&stored, &unwrapped) {
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

    /// Takes in what changed since the last time.
    pub(super) async fn sync(&self) -> Result<(), WorkerError> {
        let since = self.cursors.lock().changes;
        let changes = self.store.changes(since).await?;
        let now = Instant::now();
        let is_new = |id: &StreamId, rev: i64| {
            let known = self.shared.directory.read().get(id).map(|stream| stream.known.read().row.rev);
            known.is_none_or(|known| known < rev)
        };
        let changed: BTreeMap<StreamId, i64> = {
            let retries = &self.cursors.lock().retries;
            let new = changes.streams.into_iter().filter(|(id, rev)| is_new(id, *rev));
            // A retry has the revision of its failure, a change the newest: it goes over that.
            let due = retries.due(now).into_iter().chain(new);
            due.filter(|(id, rev)| !retries.is_put_off(id, *rev, now)).collect()
        };
        let ids: Vec<_> = changed.keys().cloned().collect();
        let mut failed = None;
        for ids in ids.chunks(LOAD_AT_ONCE as usize) {
            let outcomes = match self.reload_each(ids).await {
                Ok(outcomes) => outcomes,
                Err(error) if error.is_away() || error.is_busy() => return Err(error.into()),
                // A row that this version cannot read; which, only reading each by itself says.
                Err(_) => {
                    let mut outcomes = Vec::new();
                    for id in ids {
                        match self.reload_each(std::slice::from_ref(id)).await {
                            Ok(outcome) => outcomes.extend(outcome),
                            Err(error) if error.is_away() || error.is_busy() => return Err(error.into()),
                            Err(error) => outcomes.push((id.clone(), error.into())),
                        }
                    }
                    outcomes
                }
            };
            let mut cursors = self.cursors.lock();
            let is_taken_in = |id: &&StreamId| outcomes.iter().all(|(failed, _)| failed != *id);
            ids.iter().filter(is_taken_in).for_each(|id| cursors.retries.forget(id));
            for (id, error) in outcomes {
                let rev = changed.get(&id).copied().unwrap_or_default();
                if !cursors.retries.put_off(&id, rev, now) {
                    tracing::error!(stream = %id, "too many streams could not be taken in: this one is not tried again");
                }
                failed.get_or_insert(error);
            }
        }
        let mut cursors = self.cursors.lock();
        self.shared.metrics.streams_put_off.set(i64::try_from(cursors.retries.len()).unwrap_or(i64::MAX));
        // Even if it is earlier than before: then the database's clock was set back, as by a failover, and what
        // changes now bears the earlier times. And whatever could not be taken in: that is tried again by itself.
        cursors.changes = changes.next;
        failed.map_or(Ok(()), Err)
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
        let mut unwrapped = Unwrapped::new();
        for _ in 0..READS {
            match self.reload_with(ids, &unwrapped).await? {
                Reload::Done(failed) => return Ok(failed),
                // Now, when nothing is held.
                Reload::Wrapped(stored) => self.unwrap_missing(&stored, &mut unwrapped).await,
            }
        }
        // Their keys change faster than they can be unwrapped.
        let failed = |id: &StreamId| (id.clone(), WorkerError::NotUnwrapped { stream: id.to_string() });
        Ok(ids.iter().map(failed).collect())
    }

    /// Takes streams in as the store has them now, or gives them back if keys of theirs are to be unwrapped first.
    async fn reload_with(&self, ids: &[StreamId], unwrapped: &Unwrapped) -> Result<Reload, StoreError> {
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
        if !self.missing(&all, unwrapped).is_empty() {
            return Ok(Reload::Wrapped(all));
        }
        let mut failed = Vec::new();
        for stored in all {
            if let Err(error) = self.take_in(&stored, unwrapped) {
                tracing::error!(stream = %stored.stream.id, %error, "the stream could not be taken in");
                failed.push((stored.stream.id.clone(), error));
            }
        }
        Ok(Reload::Done(failed))
    }

    /// Reads a stream anew. Whoever calls it holds `changing`, so that a key of the KMS that came meanwhile is left to
    /// the next sync.
    pub(super) async fn refresh(&self, stream: &Stream) -> Result<(), WorkerError> {
        for stored in self.store.load(std::slice::from_ref(&stream.id)).await? {
            self.take_in(&stored, &Unwrapped::new())?;
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
