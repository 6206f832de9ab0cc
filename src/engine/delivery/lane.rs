//! The lane of one CDN: keys that it should have are stored and verified, those that it should not are taken out.
//!
//! What should be there follows from the streams in memory, what is there from the rows in the store; the lane works
//! off the difference, in batches, and notes each step when it is done. A step that a crash has swallowed is done again,
//! which does no harm; that a key is on its way is noted before, so that it is taken out of the edge again whatever becomes
//! of its stream meanwhile. Keys that were taken back are left to `purges`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::Place;
use super::look::Due;
use super::pace::Call;
use crate::cdn::{CdnError, CdnFault, DeliveryMode, KeySeen};
use crate::engine::live::LiveKey;
use crate::engine::worker::Core;
use crate::entropy;
use crate::fault;
use crate::keys::{CheckValue, EdgeSecret, KeyId, SealedKey, seal_for_edge};
use crate::store::{DeliveryRow, DeliveryState, StoreError};

/// How often the difference is looked for.
const TICK: Duration = Duration::from_secs(1);
/// Rows that are read from the store at once.
const PAGE: u32 = 5_000;
/// Edges that are asked at once.
const VERIFIED_AT_ONCE: usize = 16;
/// A key that its edge does not show yet is looked for again after this, and then after twice as long each time.
const FIRST_LOOK_AGAIN: Duration = Duration::from_millis(250);
const LAST_LOOK_AGAIN: Duration = Duration::from_secs(30);
/// When an edge does not show a key this long after the CDN should have settled, it is stored anew.
const STORE_ANEW_AFTER: Duration = Duration::from_secs(30);

/// What is known of a CDN's keys while this node delivers.
#[derive(Default)]
pub(super) struct Lane {
    /// `None` until they are read from the store.
    pub(super) rows: Option<HashMap<KeyId, DeliveryRow>>,
    /// The sync that has to be over before a stream that is not known here is taken for gone: whoever delivered before
    /// may have known it.
    pub(super) heard_with: u64,
    /// Of keys that are stored and not shown: when to look again, and how long that pause was.
    pub(super) looks: HashMap<KeyId, (Instant, Duration)>,
    /// How the streams were when nothing was to be done, and when that was.
    pub(super) settled: Option<(u64, Instant)>,
    /// Whether keys are taken out before others are stored: when calls are few, each has its turn.
    pub(super) deletes_first: bool,
}

/// What became of calls.
#[derive(Default)]
struct Outcome {
    is_any_well: bool,
    failed: Option<CdnError>,
}

impl Outcome {
    /// Whether other calls of the API would fail as well.
    fn is_over(&self) -> bool {
        let is_over = |error: &CdnError| matches!(error.fault, CdnFault::Away | CdnFault::RateLimited);
        self.failed.as_ref().is_some_and(is_over)
    }

    fn note(&mut self, done: Result<(), CdnError>) -> bool {
        match done {
            Ok(()) => self.is_any_well = true,
            Err(error) => self.failed = Some(error),
        }
        self.failed.is_none()
    }

    fn and(self, other: Outcome) -> Self {
        Self { is_any_well: self.is_any_well || other.is_any_well, failed: self.failed.or(other.failed) }
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
            if let Err(error) = self.step(&place, &mut lane).await {
                self.note_if_away(&error);
                tracing::debug!(%error, cdn = place.cdn.name, "a delivery could not be noted; it is done again");
                lane = Lane::default();
            }
        }
    }

    async fn step(&self, place: &Arc<Place>, lane: &mut Lane) -> Result<(), StoreError> {
        let mut rows = match lane.rows.take() {
            Some(rows) => rows,
            None => {
                self.adopt_state(place).await?;
                lane.heard_with = *self.shared.news.begun.borrow() + 1;
                self.read_rows(place).await?
            }
        };
        if let Some(due) = self.look(place, &rows, lane) {
            self.note_counts(place, &rows, &due);
            self.work(place, &mut rows, lane, due).await?;
        }
        lane.rows = Some(rows);
        Ok(())
    }

    /// Puts and deletions are one road, what the edge is asked another: one that shows nothing keeps no key from being
    /// stored.
    async fn work(
        &self,
        place: &Arc<Place>,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
        due: Due,
    ) -> Result<(), StoreError> {
        if due.is_empty() {
            return self.see_whether_it_is_back(place).await;
        }
        let is_paused = |call| place.pace.lock().is_paused(call, self.monotonic());
        if !is_paused(Call::Write) {
            let mut outcome = Outcome::default();
            let mut deletes = Some(due.delete);
            if lane.deletes_first
                && let Some(keys) = deletes.take()
            {
                outcome = self.delete(place, rows, lane, keys).await?;
            }
            if !outcome.is_over() {
                outcome = outcome.and(self.put(place, rows, lane, due.put).await?);
            }
            // A store that is full takes keys again when others are out of it.
            if !outcome.is_over()
                && let Some(keys) = deletes
            {
                outcome = outcome.and(self.delete(place, rows, lane, keys).await?);
            }
            self.judge(place, Call::Write, outcome).await;
        }
        if !is_paused(Call::Verify) {
            let outcome = self.verify(place, rows, lane, due.verify).await?;
            self.judge(place, Call::Verify, outcome).await;
        }
        Ok(())
    }

    async fn judge(&self, place: &Place, call: Call, outcome: Outcome) {
        match outcome.failed {
            Some(error) => self.note_cdn_failure(place, call, &error).await,
            None if outcome.is_any_well => self.note_cdn_up(place, call).await,
            None => {}
        }
    }

    /// Where nothing is to be done, nothing would say that a CDN is well again that was not.
    async fn see_whether_it_is_back(&self, place: &Place) -> Result<(), StoreError> {
        let is_failing = {
            let mut pace = place.pace.lock();
            (pace.fails(Call::Write) || pace.fails(Call::Verify))
                && !pace.is_paused(Call::Write, self.monotonic())
        };
        if is_failing {
            match self.ask(place, "health", place.cdn.cdn.health()).await {
                Ok(()) => self.note_nothing_to_do(place, &[Call::Write, Call::Verify]).await,
                Err(error) => self.note_cdn_failure(place, Call::Write, &error).await,
            }
        }
        Ok(())
    }

    /// Takes over what was found of the CDN before this node delivered.
    async fn adopt_state(&self, place: &Place) -> Result<(), StoreError> {
        let states = self.store.cdn_states().await?;
        if let Some(row) = states.into_iter().find(|row| row.name == place.cdn.name)
            && let Some(since) = row.failing_since
        {
            place.pace.lock().adopt(since, row.failures.max(1), row.last_error.unwrap_or_default());
        }
        Ok(())
    }

    /// Every row of the CDN.
    async fn read_rows(&self, place: &Place) -> Result<HashMap<KeyId, DeliveryRow>, StoreError> {
        // What lies at the edge under another secret does not open there, and what came from the shield is not there:
        // all of it is delivered anew.
        let secret = place.cdn.secret.as_ref().filter(|_| place.cdn.mode == DeliveryMode::Push);
        let sealed_under = secret.map_or_else(|| "none".to_owned(), EdgeSecret::fingerprint);
        self.store.seal_under(&place.cdn.name, &sealed_under, self.now()).await?;
        let mut rows = HashMap::new();
        let mut after = None;
        loop {
            let page = self.store.deliveries(&place.cdn.name, after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key);
            rows.extend(page.into_iter().map(|row| (row.key, row)));
        }
        Ok(rows)
    }

    /// Stores keys at the CDN, sealed; in pull mode there is nothing to store, and they are to be verified at once.
    async fn put(
        &self,
        place: &Arc<Place>,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
        keys: Vec<Arc<LiveKey>>,
    ) -> Result<Outcome, StoreError> {
        let mut outcome = Outcome::default();
        // Another node may have the lease before all is done, and take out what this one would store again.
        for keys in keys.chunks(place.cdn.cdn.limits().keys_per_call.max(1)) {
            if !self.holds_lease() {
                break;
            }
            // Taken back, or gone, since they were looked for: the calls before this one may have taken their time.
            let is_there = |key: &&Arc<LiveKey>| {
                key.revoked().is_none() && self.shared.keys.read().contains_key(&key.id)
            };
            let keys: Vec<_> = keys.iter().filter(is_there).cloned().collect();
            if place.cdn.mode == DeliveryMode::Push && !keys.is_empty() {
                if !place.pace.lock().take(Call::Write, self.monotonic()) {
                    break;
                }
                lane.deletes_first = true;
                self.note_delivery(place, rows, &keys, DeliveryState::Sending).await?;
                fault::point("deliver: before a key is stored at a CDN");
                let sealed: Vec<_> = keys.iter().filter_map(|key| self.sealed(place, key)).collect();
                let stored = self.ask(place, "put", place.cdn.cdn.put_keys(&sealed)).await;
                if !outcome.note(stored) {
                    break;
                }
                fault::point("deliver: stored at a CDN, not noted");
            }
            self.note_delivery(place, rows, &keys, DeliveryState::Stored).await?;
            for key in &keys {
                lane.looks.remove(&key.id);
            }
        }
        Ok(outcome)
    }

    /// Notes how far keys are, those of which it is not known yet.
    async fn note_delivery(
        &self,
        place: &Place,
        rows: &mut HashMap<KeyId, DeliveryRow>,
        keys: &[Arc<LiveKey>],
        state: DeliveryState,
    ) -> Result<(), StoreError> {
        let now = self.now();
        let is_news = |key: &&Arc<LiveKey>| rows.get(&key.id).is_none_or(|row| row.state != state);
        let row = |key: &Arc<LiveKey>| DeliveryRow {
            cdn: place.cdn.name.clone(),
            key: key.id,
            stream: key.stream.clone(),
            ordinal: key.ordinal,
            state,
            last_error: None,
            updated_at: now,
        };
        let news: Vec<_> = keys.iter().filter(is_news).map(row).collect();
        self.store.put_deliveries(&news).await?;
        rows.extend(news.into_iter().map(|row| (row.key, row)));
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
    ) -> Result<Outcome, StoreError> {
        let mut outcome = Outcome::default();
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
                        row.state = DeliveryState::Sending;
                        row.updated_at = self.now();
                        noted.push(row.clone());
                    }
                    continue;
                }
                row.updated_at = self.now();
                noted.push(row.clone());
            }
            let is_well = if failed.is_some() { "error" } else { "ok" };
            self.shared.metrics.cdn_calls.with_label_values(&[&place.cdn.name, "verify", is_well]).inc();
            outcome.is_any_well |= noted.iter().any(|row| row.state == DeliveryState::Verified);
            self.store.put_deliveries(&noted).await?;
            fault::point("deliver: verified");
            if failed.is_some() {
                outcome.failed = failed;
                break;
            }
        }
        Ok(outcome)
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
    ) -> Result<Outcome, StoreError> {
        let mut outcome = Outcome::default();
        for keys in keys.chunks(place.cdn.cdn.limits().keys_per_call.max(1)) {
            if !self.holds_lease() {
                break;
            }
            if place.cdn.mode == DeliveryMode::Push {
                if !place.pace.lock().take(Call::Write, self.monotonic()) {
                    break;
                }
                lane.deletes_first = false;
                fault::point("deliver: before a key is taken out of a CDN");
                let deleted = self.ask(place, "delete", place.cdn.cdn.delete_keys(keys)).await;
                if !outcome.note(deleted) {
                    break;
                }
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
        Ok(outcome)
    }
}

fn in_words(seen: &KeySeen, key: KeyId) -> String {
    match seen {
        KeySeen::Has(_) => format!("the edge shows another check value for key {key}"),
        KeySeen::Gone => format!("the edge says that key {key} was taken back (410)"),
        KeySeen::Missing => format!("the edge does not have key {key} (404)"),
    }
}
