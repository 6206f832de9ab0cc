//! Data encryption keys: where the engine meets the KMS.
//!
//! A KMS may be slow or away, so nobody who asks it holds a lock of the engine's: keys are unwrapped before their
//! stream is taken in, and made before their stream is changed. What could not be unwrapped is its stream's trouble
//! alone. One key is unwrapped once, however many ask for it meanwhile.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

use super::Shared;
use super::stream::{Dek, Stream};
use super::worker::{Core, WorkerError};
use crate::entropy;
use crate::fault;
use crate::keys::{Context, DataEncryptionKey, DekId, DekVersion, StreamId};
use crate::kms::{Kms, KmsError, WrappedKey};
use crate::store::{Applied, DekRow, StoredStream, Write, WriteOp};

/// Keys that are made or unwrapped at once by one who asks for many.
const AT_ONCE: usize = 32;
/// How often it is looked whether the KMS is there, and how long a start pauses at most before it looks again.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// What the KMS made of wrapped keys.
pub(super) type Unwrapped = HashMap<DekId, Result<DataEncryptionKey, KmsError>>;
/// Keys that are made and not stored, each with what is to be stored of it.
pub(super) type Drafts = HashMap<StreamId, (DekRow, DataEncryptionKey)>;

type Flight = OnceCell<Result<DataEncryptionKey, KmsError>>;

/// The KMS, and what is asked of it now.
pub(super) struct Deks {
    kms: Arc<dyn Kms>,
    flights: Mutex<HashMap<DekId, Arc<Flight>>>,
    shared: Arc<Shared>,
}

impl Deks {
    pub(super) fn new(kms: Arc<dyn Kms>, shared: Arc<Shared>) -> Self {
        Self { kms, flights: Mutex::default(), shared }
    }

    /// Unwraps keys, some at a time.
    async fn unwrap_all(self: &Arc<Self>, wrapped: Vec<(StreamId, DekRow)>) -> Unwrapped {
        let (mut calls, mut all) = (JoinSet::new(), Unwrapped::with_capacity(wrapped.len()));
        for (stream, row) in wrapped {
            if calls.len() >= AT_ONCE {
                all.extend(calls.join_next().await.and_then(Result::ok));
            }
            let deks = Arc::clone(self);
            calls.spawn(async move { (row.id, deks.unwrap(&stream, &row).await) });
        }
        all.extend(calls.join_all().await);
        all
    }

    async fn unwrap(&self, stream: &StreamId, row: &DekRow) -> Result<DataEncryptionKey, KmsError> {
        let flight = Arc::clone(self.flights.lock().entry(row.id).or_default());
        let call = async {
            let context = Context::Dek { stream, dek: row.id, version: row.version };
            let wrapped = WrappedKey { kek_id: row.kek_id.clone(), bytes: row.wrapped.clone() };
            let outcome = self.kms.unwrap(&context, &wrapped).await;
            // Of one that is only held besides it says nothing about the KMS.
            match self.kms.is_of_who_wraps(&row.kek_id) {
                true => self.note("unwrap", outcome),
                false => self.count("unwrap", outcome),
            }
        };
        let key = flight.get_or_init(|| call).await.clone();
        self.flights.lock().remove(&row.id);
        key
    }

    async fn draft(
        &self,
        stream: &StreamId,
        version: DekVersion,
    ) -> Result<(DekRow, DataEncryptionKey), KmsError> {
        let id = DekId::from_bytes(*entropy::random());
        let context = Context::Dek { stream, dek: id, version };
        let (key, wrapped) = self.note("generate", self.kms.generate_data_key(&context).await)?;
        let WrappedKey { kek_id, bytes } = wrapped;
        let created_at = self.shared.clock.now();
        Ok((DekRow { id, version, kek_id, wrapped: bytes, created_at }, key))
    }

    /// Counts a call.
    pub(super) fn count<T>(&self, operation: &str, outcome: Result<T, KmsError>) -> Result<T, KmsError> {
        let name = outcome_of(&outcome).0;
        self.shared.metrics.kms_calls.with_label_values(&[operation, name]).inc();
        outcome
    }

    /// Counts a call, and notes what it says about the KMS.
    fn note<T>(&self, operation: &str, outcome: Result<T, KmsError>) -> Result<T, KmsError> {
        let outcome = self.count(operation, outcome);
        let is_up = outcome_of(&outcome).1;
        self.shared.metrics.kms_up.set(i64::from(is_up));
        let was_up = std::mem::replace(&mut self.shared.status.write().kms_up, is_up);
        match &outcome {
            Ok(_) if !was_up => tracing::info!("the KMS answers"),
            Err(error) if was_up && !is_up => {
                tracing::error!(%error, "the KMS is away: streams go on with keys that are unwrapped and made ahead");
            }
            _ => {}
        }
        outcome
    }

    /// Waits until the key that wraps is there and may be used. Whoever mends it need not start this node again.
    pub(super) async fn wait_for_kms(&self) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.note("describe", self.kms.describe().await) {
                Ok(key) => {
                    tracing::info!(
                        key = key.kek_id,
                        version = key.version,
                        "data encryption keys are wrapped by it"
                    );
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "keys cannot be loaded without the KMS: this node waits for it");
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_INTERVAL);
        }
    }
}

/// What a call came to, and whether the KMS answers and lets its key be used.
pub(super) fn outcome_of<T>(outcome: &Result<T, KmsError>) -> (&'static str, bool) {
    match outcome {
        Ok(_) => ("ok", true),
        Err(error) if error.is_about_what_was_wrapped() => ("rejected", true),
        Err(error) if error.is_retryable() => ("unavailable", false),
        Err(_) => ("refused", false),
    }
}

impl Core {
    /// Looks after the KMS, so that an outage shows before somebody needs it and tokens are renewed; and makes the keys
    /// that streams could not have when they began.
    pub(super) async fn keep_the_kms_in_sight(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(self.fleet.sweep_interval.max(FIRST_PAUSE));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_at = tokio::time::Instant::now();
        loop {
            ticks.tick().await;
            if looked_at.elapsed() >= LOOK_INTERVAL {
                // Noted, which is all that is wanted.
                let _ = self.deks.note("describe", self.deks.kms.describe().await);
                looked_at = tokio::time::Instant::now();
            }
            let waiting: Vec<_> = {
                let directory = self.shared.directory.read();
                let waits = |stream: &&Arc<Stream>| {
                    let known = stream.known.read();
                    known.is_read() && stream.is_running() && known.deks.is_empty()
                };
                directory.iter().filter(waits).take(AT_ONCE).map(|stream| stream.id.clone()).collect()
            };
            if !waiting.is_empty()
                && !self.is_store_away()
                && let Err(error) = self.begin(&waiting).await
            {
                tracing::warn!(first = %waiting[0], streams = waiting.len(), %error, "streams could not begin yet");
            }
        }
    }

    /// Unwraps the keys of streams that are not known yet. For whoever holds no lock.
    pub(super) async fn unwrap_missing(&self, stored: &[StoredStream], unwrapped: &mut Unwrapped) {
        let missing = self.missing(stored, unwrapped);
        if !missing.is_empty() {
            unwrapped.extend(self.deks.unwrap_all(missing).await);
        }
    }

    /// The keys of streams that are neither known nor were tried to unwrap.
    pub(super) fn missing(&self, stored: &[StoredStream], unwrapped: &Unwrapped) -> Vec<(StreamId, DekRow)> {
        let mut missing = Vec::new();
        for stored in stored.iter().filter(|stored| stored.stream.state != crate::store::StreamState::Deleted)
        {
            let known = self.shared.directory.read().get(&stored.stream.id).cloned();
            let is_known = |row: &&DekRow| {
                let of = known.as_ref().map(|stream| stream.known.read());
                of.is_some_and(|known| known.deks.get(&row.version).is_some_and(|dek| dek.id == row.id))
            };
            let rows = stored.deks.iter().filter(|row| !unwrapped.contains_key(&row.id) && !is_known(row));
            missing.extend(rows.map(|row| (stored.stream.id.clone(), row.clone())));
        }
        missing
    }

    /// Makes the data encryption keys of streams that have none: the one call of the KMS in a stream's life to wrap. For
    /// whoever holds no lock. The second part is the first of what went wrong.
    pub(super) async fn draft_deks(
        &self,
        streams: &[Arc<Stream>],
    ) -> Result<(Drafts, Option<WorkerError>), WorkerError> {
        let without = || -> Vec<StreamId> {
            // One that could not be read may have a key that does not unwrap, and must not get another for that.
            let is_without = |stream: &&Arc<Stream>| {
                let known = stream.known.read();
                known.is_read() && known.deks.is_empty()
            };
            let without = streams.iter().filter(is_without);
            without.map(|stream| stream.id.clone()).collect()
        };
        let (mut ids, mut failed) = (without(), None);
        if ids.is_empty() {
            return Ok(Default::default());
        }
        // Shredded ones keep their versions.
        let highest = self.store.highest_deks(&ids).await?;
        // Asked for behind the versions: another node's is either found here, or has the version that we try.
        if !self.is_alone() && !highest.is_empty() {
            let had: Vec<_> = ids.into_iter().filter(|id| highest.contains_key(id)).collect();
            let unread = self.reload_each(&had).await?;
            ids = without();
            // One that has a key must not get another because that does not unwrap.
            ids.retain(|id| unread.iter().all(|(unread, _)| unread != id));
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

    /// Stores drafts of streams that have no key still, and knows them. `false` where another node was first: then its
    /// key holds, and is to be read. Whoever calls it holds `changing` of the streams.
    pub(super) async fn store_deks(
        &self,
        streams: &[Arc<Stream>],
        mut drafts: Drafts,
    ) -> Result<bool, WorkerError> {
        let without = streams.iter().filter(|stream| stream.known.read().deks.is_empty());
        let (new, writes): (Vec<_>, Vec<_>) = without
            .filter_map(|stream| {
                let (row, key) = drafts.remove(&stream.id)?;
                let dek = Dek { id: row.id, version: row.version, key };
                Some(((stream, dek), Write { stream: stream.id.clone(), op: WriteOp::PutDek(row) }))
            })
            .unzip();
        if writes.is_empty() {
            return Ok(true);
        }
        let (applied, revs) = self.store.apply(&writes).await?;
        fault::point("DEK: stored, not known");
        let mut are_ours = true;
        for ((stream, dek), applied) in new.into_iter().zip(&applied) {
            match applied {
                Applied::Dek(there) if there.id == dek.id => self.know_dek(stream, dek),
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

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::clock::Clock;
    use crate::engine::Engine;
    use crate::keys::Timestamp;
    use crate::kms::{Cause, KeyDescription};
    use crate::telemetry::Metrics;

    /// Unwraps everything but what was wrapped by `bad`, each after a second.
    #[derive(Debug, Default)]
    struct Slow {
        under_way: Mutex<(usize, usize)>,
    }

    #[async_trait]
    impl Kms for Slow {
        async fn generate_data_key(
            &self,
            _: &Context<'_>,
        ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
            unreachable!("only unwraps here")
        }

        async fn wrap(&self, _: &Context<'_>, _: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
            unreachable!("only unwraps here")
        }

        async fn unwrap(&self, _: &Context<'_>, wrapped: &WrappedKey) -> Result<DataEncryptionKey, KmsError> {
            {
                let (now, most) = &mut *self.under_way.lock();
                *now += 1;
                *most = (*most).max(*now);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            self.under_way.lock().0 -= 1;
            match wrapped.kek_id.as_str() {
                "bad" => {
                    Err(KmsError { provider: "test", key: wrapped.kek_id.clone(), cause: Cause::Foreign })
                }
                _ => Ok(DataEncryptionKey::from_bytes([1; 32])),
            }
        }

        async fn describe(&self) -> Result<KeyDescription, KmsError> {
            unreachable!("only unwraps here")
        }
    }

    fn wrapped(id: u8, kek_id: &str) -> (StreamId, DekRow) {
        let row = DekRow {
            id: DekId::from_bytes([id; 16]),
            version: DekVersion(1),
            kek_id: kek_id.into(),
            wrapped: Vec::new(),
            created_at: Timestamp::from_unix_millis(0),
        };
        (format!("ch{id}").parse().unwrap(), row)
    }

    fn deks() -> (Arc<Slow>, Metrics, Arc<Deks>) {
        let (kms, metrics) = (Arc::new(Slow::default()), Metrics::new());
        let (_, seat) = Engine::new(Clock::manual(Timestamp::from_unix_millis(0)), metrics.clone());
        (Arc::clone(&kms), metrics, Arc::new(Deks::new(kms, seat.shared)))
    }

    fn unwrapped(metrics: &Metrics) -> u64 {
        metrics.kms_calls.with_label_values(&["unwrap", "ok"]).get()
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_one_key_meanwhile_waits_for_the_same_call() {
        let (_, metrics, deks) = deks();
        let mut askers = JoinSet::new();
        for _ in 0..20 {
            let deks = Arc::clone(&deks);
            askers.spawn(async move { deks.unwrap_all(vec![wrapped(1, "good")]).await });
        }
        assert!(askers.join_all().await.iter().all(|all| all.values().all(Result::is_ok)));
        assert_eq!(unwrapped(&metrics), 1);
        deks.unwrap_all(vec![wrapped(1, "good")]).await;
        assert_eq!(unwrapped(&metrics), 2, "nothing is kept behind the call");
    }

    #[tokio::test(start_paused = true)]
    async fn many_keys_are_unwrapped_some_at_a_time_and_one_that_is_not_keeps_no_other() {
        let (kms, metrics, deks) = deks();
        let all = (0..200).map(|id| wrapped(id, if id == 7 { "bad" } else { "good" })).collect();
        let all = deks.unwrap_all(all).await;
        assert_eq!((all.len(), all.values().filter(|key| key.is_err()).count()), (200, 1));
        assert_eq!(unwrapped(&metrics), 199);
        assert_eq!(*kms.under_way.lock(), (0, AT_ONCE));
        assert_eq!(metrics.kms_up.get(), 1, "it answers, whatever it makes of one key");
    }
}
