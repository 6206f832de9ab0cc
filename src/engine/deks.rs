//! Data encryption keys: where the engine meets the KMS.
//!
//! A KMS may be slow or away, so nobody who asks it holds a lock of the engine's. One key is unwrapped once, however
//! many ask for it meanwhile, and stays unwrapped for a while. Which streams need which keys stands in `supply`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, OnceCell};
use tokio::task::JoinSet;

use super::Shared;
use super::unwrapped::Unwrapped;
use crate::entropy;
use crate::keys::{Context, DataEncryptionKey, DekId, DekVersion, StreamId};
use crate::kms::{KeyDescription, Kms, KmsError, WrappedKey};
use crate::store::DekRow;

/// Keys that are made or unwrapped at once by one who asks for many.
pub(super) const AT_ONCE: usize = 32;
/// How often it is looked whether the KMS is there, and how long a start pauses at most before it looks again.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(5);
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// How long somebody who has to go on waits for a key to be unwrapped.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a key that could not be had is left alone.
const WANTED_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Keys that may be wanted at once. Who wants another one asks again.
const MAX_WANTED: usize = 10_000;

/// How data encryption keys are kept and renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DekRules {
    /// So many are unwrapped in memory at most.
    pub max_unwrapped: usize,
    /// The longest time that one stays unwrapped.
    pub unwrapped_ttl: Duration,
    /// A stream gets a new one after this time; `None`: only when somebody asks.
    pub rotate_after: Option<Duration>,
}

impl Default for DekRules {
    fn default() -> Self {
        Self {
            max_unwrapped: 20_000,
            unwrapped_ttl: Duration::from_secs(3_600),
            rotate_after: Some(Duration::from_secs(90 * 86_400)),
        }
    }
}

/// Keys that somebody holds for as long as the work takes that needs them, or why one could not be had.
pub(super) type InHand = HashMap<DekId, Result<DataEncryptionKey, KmsError>>;

type Flight = OnceCell<Result<DataEncryptionKey, KmsError>>;

/// A key that is needed for making content keys, and is not unwrapped.
struct Wanted {
    stream: StreamId,
    row: DekRow,
    /// When it is tried again, if it could not be had.
    again_at: Option<Instant>,
}

/// The KMS, what is asked of it now, and what it has unwrapped.
pub(super) struct Deks {
    pub(super) kms: Arc<dyn Kms>,
    pub(super) rules: DekRules,
    flights: Mutex<HashMap<DekId, Arc<Flight>>>,
    unwrapped: Mutex<Unwrapped>,
    wanted: Mutex<HashMap<DekId, Wanted>>,
    pub(super) wants: Notify,
    /// The key that wraps now, once the KMS has said so.
    kek_id: Mutex<Option<String>>,
    shared: Arc<Shared>,
}

impl Deks {
    pub(super) fn new(kms: Arc<dyn Kms>, rules: DekRules, shared: Arc<Shared>) -> Self {
        Self {
            kms,
            rules,
            flights: Mutex::default(),
            unwrapped: Mutex::new(Unwrapped::new(rules.max_unwrapped, rules.unwrapped_ttl)),
            wanted: Mutex::default(),
            wants: Notify::new(),
            kek_id: Mutex::default(),
            shared,
        }
    }

    /// A key that is unwrapped now.
    pub(super) fn held(&self, id: DekId) -> Option<DataEncryptionKey> {
        self.unwrapped.lock().get(id, self.shared.clock.now())
    }

    /// Keeps a key for its time.
    pub(super) fn hold(&self, id: DekId, key: DataEncryptionKey) {
        let [spread] = *entropy::random::<1>();
        let mut unwrapped = self.unwrapped.lock();
        unwrapped.put(id, key, self.shared.clock.now(), spread);
        self.note_held(&unwrapped);
    }

    /// Drops a key that is needed no more.
    pub(super) fn let_go(&self, id: DekId) {
        let mut unwrapped = self.unwrapped.lock();
        unwrapped.remove(id);
        self.note_held(&unwrapped);
    }

    /// Drops the keys whose time is over.
    pub(super) fn let_go_of_what_is_over(&self) {
        let mut unwrapped = self.unwrapped.lock();
        unwrapped.drop_over(self.shared.clock.now());
        self.note_held(&unwrapped);
    }

    fn note_held(&self, unwrapped: &Unwrapped) {
        self.shared.metrics.deks_unwrapped.set(i64::try_from(unwrapped.len()).unwrap_or(i64::MAX));
    }

    /// Has a key unwrapped soon, for somebody who goes on without it.
    pub(super) fn want(&self, stream: &StreamId, row: &DekRow) {
        let mut wanted = self.wanted.lock();
        if wanted.len() < MAX_WANTED.min(self.rules.max_unwrapped) && !wanted.contains_key(&row.id) {
            wanted.insert(row.id, Wanted { stream: stream.clone(), row: row.clone(), again_at: None });
            self.wants.notify_one();
        } else if let Some(wanted) =
            wanted.get_mut(&row.id).filter(|wanted| wanted.row.wrapped != row.wrapped)
        {
            // Re-wrapped meanwhile: what failed before says nothing about this one.
            (wanted.row, wanted.again_at) = (row.clone(), None);
            self.wants.notify_one();
        }
    }

    /// Whether a key is not unwrapped and cannot be now: its KMS is away, or did not unwrap it when it was wanted.
    pub(super) fn is_out_of_reach(&self, id: DekId) -> bool {
        let has_failed = || self.wanted.lock().get(&id).is_some_and(|wanted| wanted.again_at.is_some());
        self.held(id).is_none() && (!self.shared.status.read().kms_up || has_failed())
    }

    /// Unwraps what is wanted, but for what `is_needed` says is not needed any more.
    pub(super) async fn unwrap_wanted(self: &Arc<Self>, is_needed: impl Fn(&StreamId, DekId) -> bool) {
        let now = Instant::now();
        let due: Vec<_> = {
            let mut wanted = self.wanted.lock();
            wanted.retain(|id, wanted| is_needed(&wanted.stream, *id));
            let due = wanted.values().filter(|wanted| wanted.again_at.is_none_or(|at| at <= now));
            due.map(|wanted| (wanted.stream.clone(), wanted.row.clone())).collect()
        };
        for (id, key) in self.unwrap_all(due).await {
            let mut wanted = self.wanted.lock();
            match key {
                Ok(_) => drop(wanted.remove(&id)),
                Err(_) => {
                    if let Some(wanted) = wanted.get_mut(&id) {
                        wanted.again_at = Some(Instant::now() + WANTED_AGAIN_AFTER);
                    }
                }
            }
        }
    }

    /// Unwraps keys, some at a time.
    pub(super) async fn unwrap_all(self: &Arc<Self>, wrapped: Vec<(StreamId, DekRow)>) -> InHand {
        let (mut calls, mut all) = (JoinSet::new(), InHand::with_capacity(wrapped.len()));
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

    /// A key that is unwrapped, or is so within a moment; otherwise it is wanted. A KMS that is known to be away is not
    /// waited for.
    pub(super) async fn soon(self: &Arc<Self>, stream: &StreamId, row: &DekRow) -> Option<DataEncryptionKey> {
        if let Some(key) = self.held(row.id) {
            return Some(key);
        }
        if self.shared.status.read().kms_up {
            let (deks, stream, row) = (Arc::clone(self), stream.clone(), row.clone());
            // A task: the call goes on for others who wait for it.
            let call = tokio::spawn(async move { deks.unwrap(&stream, &row).await });
            if let Ok(Ok(Ok(key))) = tokio::time::timeout(PATIENCE, call).await {
                return Some(key);
            }
        }
        self.want(stream, row);
        None
    }

    async fn unwrap(&self, stream: &StreamId, row: &DekRow) -> Result<DataEncryptionKey, KmsError> {
        if let Some(key) = self.held(row.id) {
            return Ok(key);
        }
        let flight = Arc::clone(self.flights.lock().entry(row.id).or_default());
        let call = async {
            let context = Context::Dek { stream, dek: row.id, version: row.version };
            let wrapped = WrappedKey { kek_id: row.kek_id.clone(), bytes: row.wrapped.clone() };
            // That an older key is not to be had says nothing about the one that wraps now.
            let is_older = self.kek_id.lock().as_ref().is_some_and(|kek_id| *kek_id != row.kek_id);
            let outcome = self.kms.unwrap(&context, &wrapped).await;
            let key = match is_older {
                true => self.count("unwrap", outcome),
                false => self.note("unwrap", outcome),
            };
            if let Ok(key) = &key {
                self.hold(row.id, key.clone());
            }
            key
        };
        let key = flight.get_or_init(|| call).await.clone();
        let mut flights = self.flights.lock();
        // Whoever is late must not take another's flight away.
        if flights.get(&row.id).is_some_and(|other| Arc::ptr_eq(other, &flight)) {
            flights.remove(&row.id);
        }
        key
    }

    /// Makes a key that is not stored yet, with what is to be stored of it.
    pub(super) async fn draft(
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

    /// Looks whether the KMS is there; what comes of it is noted.
    pub(super) async fn look(&self) {
        // Noted, which is all that is wanted.
        let _ = self.describe().await;
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        let described = self.note("describe", self.kms.describe().await);
        if let Ok(key) = &described {
            *self.kek_id.lock() = Some(key.kek_id.clone());
        }
        described
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
        self.shared.troubles.note_kms(self.shared.clock.now(), outcome.as_ref().err().filter(|_| !is_up));
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
            match self.describe().await {
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
            self.shared.judge();
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

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::clock::Clock;
    use crate::engine::Engine;
    use crate::keys::Timestamp;
    use crate::kms::Cause;
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
                "gone" => Err(KmsError {
                    provider: "test",
                    key: wrapped.kek_id.clone(),
                    cause: Cause::Refused("no longer permitted".into()),
                }),
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
        (
            Arc::clone(&kms),
            metrics,
            Arc::new(Deks::new(kms, DekRules { max_unwrapped: 300, ..DekRules::default() }, seat.shared)),
        )
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
        assert_eq!(unwrapped(&metrics), 1, "it stays unwrapped");
        assert!(deks.flights.lock().is_empty(), "nothing is kept behind the call");
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

    #[tokio::test(start_paused = true)]
    async fn a_key_whose_time_is_over_is_unwrapped_anew_when_it_is_needed() {
        let (_, metrics, deks) = deks();
        let (stream, row) = wrapped(1, "good");
        deks.unwrap(&stream, &row).await.unwrap();
        deks.shared.clock.advance(deks.rules.unwrapped_ttl / 2);
        deks.unwrap(&stream, &row).await.unwrap();
        assert_eq!(unwrapped(&metrics), 1);
        deks.shared.clock.advance(deks.rules.unwrapped_ttl);
        deks.let_go_of_what_is_over();
        assert_eq!((unwrapped(&metrics), metrics.deks_unwrapped.get()), (1, 0), "nobody needs it");
        deks.unwrap(&stream, &row).await.unwrap();
        assert_eq!((unwrapped(&metrics), metrics.deks_unwrapped.get()), (2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_and_cannot_be_had_is_known_and_tried_again() {
        let (_, metrics, deks) = deks();
        for (n, kek) in [(1, "good"), (2, "bad"), (3, "good")] {
            let (stream, row) = wrapped(n, kek);
            deks.want(&stream, &row);
            deks.want(&stream, &row);
        }
        let id = |n| DekId::from_bytes([n; 16]);
        // The third one's stream is gone.
        let is_needed = |_: &StreamId, dek| dek != id(3);
        deks.unwrap_wanted(is_needed).await;
        assert_eq!([1, 2, 3].map(|n| deks.held(id(n)).is_some()), [true, false, false]);
        assert_eq!([1, 2].map(|n| deks.is_out_of_reach(id(n))), [false, true]);
        let rejected = || metrics.kms_calls.with_label_values(&["unwrap", "rejected"]).get();
        deks.unwrap_wanted(is_needed).await;
        assert_eq!(rejected(), 1, "not at once");
        deks.wanted.lock().values_mut().for_each(|wanted| wanted.again_at = Some(Instant::now()));
        deks.unwrap_wanted(is_needed).await;
        assert_eq!(rejected(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_kek_that_is_not_to_be_had_does_not_make_the_kms_look_away() {
        let (_, metrics, deks) = deks();
        let (stream, row) = wrapped(1, "gone");
        assert!(deks.unwrap(&stream, &row).await.is_err());
        assert!(!deks.shared.status.read().kms_up, "it may be the one that wraps");
        deks.note("describe", Ok(())).unwrap();
        *deks.kek_id.lock() = Some("good".into());
        assert!(deks.unwrap(&stream, &row).await.is_err());
        assert!(deks.shared.status.read().kms_up && deks.shared.troubles.kms().is_none());
        assert_eq!(
            metrics.kms_calls.with_label_values(&["unwrap", "refused"]).get(),
            2,
            "counted all the same"
        );
    }
}
