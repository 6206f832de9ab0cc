//! The lane of one CDN: keys that it should have are stored and verified, those that it should not are taken out.
//!
//! What should be there follows from the streams in memory, what is there from the rows in the store; the lane works
//! off the difference, in batches, and notes each step when it is done. A step that a crash has swallowed is done again,
//! which does no harm. Keys that were taken back are left to `purges`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::Place;
use super::pace::Call;
use crate::cdn::{CdnError, CdnFault, DeliveryMode, KeySeen};
use crate::engine::live::LiveKey;
use crate::engine::worker::Core;
use crate::entropy;
use crate::fault;
use crate::keys::{CheckValue, KeyId, KeyState, SealedKey, belongs_at_edges, seal_for_edge};
use crate::store::{DeliveryRow, DeliveryState, StoreError};

/// How often the difference is looked for.
const TICK: Duration = Duration::from_secs(1);
/// Rows that are read from the store at once.
const PAGE: u32 = 5_000;
/// Edges that are asked at once.
const VERIFIED_AT_ONCE: usize = 16;
/// Keys that are worked on in one step, so that a lane with much to do looks up now and then.
const WORKED_ON_AT_ONCE: usize = 10_000;
/// A key that its edge does not show yet is looked for again after this, and then after twice as long each time.
const FIRST_LOOK_AGAIN: Duration = Duration::from_millis(250);
const LAST_LOOK_AGAIN: Duration = Duration::from_secs(30);
/// When an edge does not show a key this long after the CDN should have settled, it is stored anew.
const STORE_ANEW_AFTER: Duration = Duration::from_secs(30);

/// What is known of a CDN's keys while this node delivers.
#[derive(Default)]
struct Lane {
    /// `None` until they are read from the store.
    rows: Option<HashMap<KeyId, DeliveryRow>>,
    /// Of keys that are stored and not shown: when to look again, and how long that pause was.
    looks: HashMap<KeyId, (Instant, Duration)>,
    /// Whether keys are taken out before others are stored: when calls are few, each has its turn.
    deletes_first: bool,
}

/// What is to be done.
#[derive(Default)]
struct Due {
    put: Vec<Arc<LiveKey>>,
    verify: Vec<Arc<LiveKey>>,
    delete: Vec<KeyId>,
}

/// Why a step ended early.
enum Stopped {
    Store(StoreError),
    /// The failure is noted.
    Cdn,
}

impl From<StoreError> for Stopped {
    fn from(error: StoreError) -> Self {
        Stopped::Store(error)
    }
}

impl Core {
    /// Keeps one CDN's keys in step for as long as the process lives.
    pub(in crate::engine) async fn keep_delivering(self: Arc<Self>, place: Arc<Place>) {
        let mut lane = Lane::default();
        let mut ticks = tokio::time::interval(TICK.min(self.fleet.sweep_interval));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.holds_lease() || self.is_store_away() {
                // Another node may deliver meanwhile.
                lane = Lane::default();
                continue;
            }
            match self.step(&place, &mut lane).await {
                Ok(()) | Err(Stopped::Cdn) => {}
                Err(Stopped::Store(error)) => {
                    self.note_if_away(&error);
                    tracing::debug!(%error, cdn = place.cdn.name, "a delivery could not be noted; it is done again");
                    lane = Lane::default();
                }
            }
        }
    }

    async fn step(&self, place: &Arc<Place>, lane: &mut Lane) -> Result<(), Stopped> {
        let mut rows = match lane.rows.take() {
            Some(rows) => rows,
            None => self.read_rows(place).await?,
        };
        let due = self.look(place, &rows, lane);
        self.note_counts(place, &rows, &due);
        let done = if place.pace.lock().is_paused(Call::Write, self.monotonic()) {
            Ok(())
        } else {
            self.work(place, &mut rows, lane, due).await
        };
        lane.rows = Some(rows);
        done
    }

    async fn work(
        &self,
        place: &Arc<Place>,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
        due: Due,
    ) -> Result<(), Stopped> {
        if lane.deletes_first {
            self.delete(place, rows, lane, due.delete).await?;
            self.put(place, rows, lane, due.put).await?;
            return self.verify(place, rows, lane, due.verify).await;
        }
        self.put(place, rows, lane, due.put).await?;
        self.verify(place, rows, lane, due.verify).await?;
        self.delete(place, rows, lane, due.delete).await
    }

    /// Every row of the CDN, and on each key whether this CDN has shown it.
    async fn read_rows(&self, place: &Place) -> Result<HashMap<KeyId, DeliveryRow>, StoreError> {
        let mut rows = HashMap::new();
        let mut after = None;
        loop {
            let page = self.store.deliveries(&place.cdn.name, after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key);
            rows.extend(page.into_iter().map(|row| (row.key, row)));
        }
        for key in self.shared.keys.read().values() {
            let is_shown = rows.get(&key.id).is_some_and(|row| row.state == DeliveryState::Verified);
            key.note_delivered(place.at, is_shown);
        }
        Ok(rows)
    }

    fn look(&self, place: &Place, rows: &HashMap<KeyId, DeliveryRow>, lane: &mut Lane) -> Due {
        let now = self.monotonic();
        let mut due = Due::default();
        let mut wanted = 0_usize;
        let directory = self.shared.directory.read();
        for stream in directory.iter() {
            let known = stream.known.read();
            if !self.delivery.of_stream(&known.row.cdn).has(place.at) {
                continue;
            }
            for key in known.keys.values().filter(|key| belongs_at_edges(key.life.state)) {
                wanted += 1;
                match rows.get(&key.live.id).map(|row| row.state) {
                    None => due.put.push(Arc::clone(&key.live)),
                    Some(DeliveryState::Stored) => {
                        if lane.looks.get(&key.live.id).is_none_or(|(at, _)| *at <= now) {
                            due.verify.push(Arc::clone(&key.live));
                        }
                    }
                    Some(DeliveryState::Verified) => {}
                }
            }
        }
        if rows.len() > wanted.saturating_sub(due.put.len()) {
            due.delete.extend(
                rows.values()
                    .filter(|row| {
                        let Some(stream) = directory.get(&row.stream) else { return true };
                        let known = stream.known.read();
                        // What could not be read, or opened, may still be wanted.
                        if !known.is_read() || known.unopened.contains(&row.ordinal) {
                            return false;
                        }
                        let is_wanted = |state: KeyState| {
                            belongs_at_edges(state) && self.delivery.of_stream(&known.row.cdn).has(place.at)
                        };
                        let of_row = known.keys.get(&row.ordinal).filter(|key| key.live.id == row.key);
                        !of_row.is_some_and(|key| is_wanted(key.life.state))
                    })
                    .map(|row| row.key),
            );
        }
        drop(directory);
        // Those that are used next are delivered first.
        due.put.sort_by_key(|key| key.ordinal);
        due.put.truncate(WORKED_ON_AT_ONCE);
        due.verify.truncate(WORKED_ON_AT_ONCE);
        due.delete.truncate(WORKED_ON_AT_ONCE);
        due
    }

    /// Stores keys at the CDN, sealed; in pull mode there is nothing to store, and they are to be verified at once.
    async fn put(
        &self,
        place: &Arc<Place>,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
        keys: Vec<Arc<LiveKey>>,
    ) -> Result<(), Stopped> {
        for keys in keys.chunks(place.cdn.cdn.limits().keys_per_call.max(1)) {
            if place.cdn.mode == DeliveryMode::Push {
                if !place.pace.lock().take(Call::Write, self.monotonic()) {
                    return Ok(());
                }
                lane.deletes_first = true;
                fault::point("deliver: before a key is stored at a CDN");
                let sealed: Vec<_> = keys.iter().filter_map(|key| self.sealed(place, key)).collect();
                let stored = self.ask(place, "put", place.cdn.cdn.put_keys(&sealed)).await;
                self.judge_call(place, stored).await?;
                fault::point("deliver: stored at a CDN, not noted");
            }
            let now = self.now();
            let stored: Vec<_> = keys
                .iter()
                .map(|key| DeliveryRow {
                    cdn: place.cdn.name.clone(),
                    key: key.id,
                    stream: key.stream.clone(),
                    ordinal: key.ordinal,
                    state: DeliveryState::Stored,
                    last_error: None,
                    updated_at: now,
                })
                .collect();
            self.store.put_deliveries(&stored).await?;
            for row in stored {
                lane.looks.remove(&row.key);
                rows.insert(row.key, row);
            }
        }
        Ok(())
    }

    fn sealed(&self, place: &Place, key: &LiveKey) -> Option<SealedKey> {
        let secret = place.cdn.secret.as_ref()?;
        let (cipher, nonce) = (place.cdn.cdn.cipher(), entropy::random());
        Some(seal_for_edge(secret, cipher, (&key.stream, key.id), &key.secrets.content, &nonce))
    }

    /// Reads keys back through the edge.
    async fn verify(
        &self,
        place: &Arc<Place>,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
        keys: Vec<Arc<LiveKey>>,
    ) -> Result<(), Stopped> {
        for keys in keys.chunks(VERIFIED_AT_ONCE) {
            let mut asked = JoinSet::new();
            for key in keys {
                let (cdn, key) = (Arc::clone(&place.cdn.cdn), Arc::clone(key));
                let patience = self.delivery.rules.sync_timeout;
                asked.spawn(async move {
                    let seen = tokio::time::timeout(patience, cdn.verify(key.id)).await;
                    let late = || Err(CdnError::new(CdnFault::Away, "the edge did not answer in time"));
                    (key, seen.unwrap_or_else(|_| late()))
                });
            }
            let (mut noted, mut failed) = (Vec::new(), None);
            while let Some(joined) = asked.join_next().await {
                let Ok((key, seen)) = joined else { continue };
                let Some(row) = rows.get_mut(&key.id) else { continue };
                let error = match seen {
                    Ok(KeySeen::Has(value)) if value == CheckValue::of(key.id, &key.secrets.content) => {
                        row.state = DeliveryState::Verified;
                        row.last_error = None;
                        lane.looks.remove(&key.id);
                        key.note_delivered(place.at, true);
                        None
                    }
                    Ok(seen) => Some(CdnError::new(CdnFault::Mismatch, in_words(&seen, key.id))),
                    Err(error) => Some(error),
                };
                if let Some(error) = error {
                    row.last_error = Some(error.to_string());
                    self.look_again(place, lane, row);
                    // That an edge is not there yet is nobody's fault, until it should be.
                    let is_late = self.now().since(row.updated_at)
                        > place.cdn.cdn.limits().settles_within + STORE_ANEW_AFTER;
                    if error.fault != CdnFault::Mismatch || is_late {
                        failed = Some(error);
                    }
                    if is_late {
                        row.updated_at = self.now();
                        noted.push(row.clone());
                        lane.looks.remove(&key.id);
                        rows.remove(&key.id);
                    }
                    continue;
                }
                row.updated_at = self.now();
                noted.push(row.clone());
            }
            let outcome = if failed.is_some() { "error" } else { "ok" };
            self.shared.metrics.cdn_calls.with_label_values(&[&place.cdn.name, "verify", outcome]).inc();
            let is_any_shown = noted.iter().any(|row| row.state == DeliveryState::Verified);
            self.store.put_deliveries(&noted).await?;
            fault::point("deliver: verified");
            match failed {
                Some(error) => {
                    self.note_cdn_failure(place, Call::Write, &error).await;
                    return Err(Stopped::Cdn);
                }
                None if is_any_shown => self.note_cdn_up(place, Call::Write).await,
                None => {}
            }
        }
        Ok(())
    }

    fn look_again(&self, place: &Place, lane: &mut Lane, row: &DeliveryRow) {
        let before = lane.looks.get(&row.key).map_or(FIRST_LOOK_AGAIN / 2, |(_, pause)| *pause);
        let pause = (before * 2).min(LAST_LOOK_AGAIN);
        tracing::debug!(cdn = place.cdn.name, key = %row.key, ?pause, "the edge does not show the key yet");
        lane.looks.insert(row.key, (self.monotonic() + pause, pause));
    }

    /// Takes keys out of the CDN's store.
    async fn delete(
        &self,
        place: &Arc<Place>,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
        keys: Vec<KeyId>,
    ) -> Result<(), Stopped> {
        for keys in keys.chunks(place.cdn.cdn.limits().keys_per_call.max(1)) {
            if place.cdn.mode == DeliveryMode::Push {
                if !place.pace.lock().take(Call::Write, self.monotonic()) {
                    return Ok(());
                }
                lane.deletes_first = false;
                fault::point("deliver: before a key is taken out of a CDN");
                let deleted = self.ask(place, "delete", place.cdn.cdn.delete_keys(keys)).await;
                self.judge_call(place, deleted).await?;
                fault::point("deliver: taken out of a CDN, not noted");
            }
            self.store.drop_deliveries(&place.cdn.name, keys).await?;
            for key in keys {
                rows.remove(key);
                lane.looks.remove(key);
                if let Some(key) = self.shared.keys.read().get(key) {
                    key.note_delivered(place.at, false);
                }
            }
        }
        Ok(())
    }

    async fn judge_call(&self, place: &Place, done: Result<(), CdnError>) -> Result<(), Stopped> {
        match done {
            Ok(()) => {
                self.note_cdn_up(place, Call::Write).await;
                Ok(())
            }
            Err(error) => {
                self.note_cdn_failure(place, Call::Write, &error).await;
                Err(Stopped::Cdn)
            }
        }
    }

    fn note_counts(&self, place: &Place, rows: &HashMap<KeyId, DeliveryRow>, due: &Due) {
        let verified = rows.values().filter(|row| row.state == DeliveryState::Verified).count();
        let counts = [("verified", verified), ("stored", rows.len() - verified), ("waiting", due.put.len())];
        for (state, count) in counts {
            let gauge = self.shared.metrics.cdn_keys.with_label_values(&[&place.cdn.name, state]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}

fn in_words(seen: &KeySeen, key: KeyId) -> String {
    match seen {
        KeySeen::Has(_) => format!("the edge shows another check value for key {key}"),
        KeySeen::Gone => format!("the edge says that key {key} was taken back (410)"),
        KeySeen::Missing => format!("the edge does not have key {key} (404)"),
    }
}
