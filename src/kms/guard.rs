//! What stands around every KMS that is far away.
//!
//! So many calls at once and no more, because the quota is shared with others; a time for each; another try, after a
//! pause of random length, where one may help and never where it cannot; and after repeated failures none at all for a
//! while, so that whoever asks hears at once and the KMS can recover. Time is tokio's, which tests stop.

use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

use super::{Cause, KeyDescription, Kms, KmsError, WrappedKey};
use crate::entropy;
use crate::keys::{Context, DataEncryptionKey};

/// How often a call is made before it has failed.
const ATTEMPTS: u32 = 3;
/// The longest pause before the second attempt; it doubles for each that follows.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Calls that fail one after the other before the circuit opens.
const FAILURES_TO_OPEN: u32 = 3;
/// How long the circuit stays open before one call may try.
const OPEN_FOR: Duration = Duration::from_secs(5);

/// How much a KMS is asked for at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// For one attempt.
    pub timeout: Duration,
    pub max_concurrent: usize,
}

/// A KMS with its limits.
#[derive(Debug)]
pub struct Guard<K> {
    kms: K,
    provider: &'static str,
    key: String,
    timeout: Duration,
    places: Semaphore,
    circuit: Mutex<Circuit>,
}

#[derive(Debug, Default)]
struct Circuit {
    failures: u32,
    /// Why it is open, and until when nobody tries.
    open: Option<(KmsError, Instant)>,
}

impl<K: Kms> Guard<K> {
    /// `provider` and `key`: whose errors these are where the KMS itself says nothing.
    pub fn new(kms: K, provider: &'static str, key: String, limits: Limits) -> Self {
        let (places, circuit) = (Semaphore::new(limits.max_concurrent), Mutex::default());
        Self { kms, provider, key, timeout: limits.timeout, places, circuit }
    }

    async fn call<T, F>(&self, attempt: impl Fn() -> F + Send + Sync) -> Result<T, KmsError>
    where
        T: Send,
        F: Future<Output = Result<T, KmsError>> + Send,
    {
        // Nobody closes it.
        let _place = self.places.acquire().await;
        self.may_try()?;
        let mut pause = FIRST_PAUSE;
        let mut tries = 1;
        loop {
            let outcome = timeout(self.timeout, attempt()).await.unwrap_or_else(|_| Err(self.timed_out()));
            self.note(outcome.as_ref().err());
            match outcome {
                Err(error) if error.is_retryable() && tries < ATTEMPTS && !self.is_open() => {
                    sleep(jittered(pause)).await;
                    pause *= 2;
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Lets a call through, unless the circuit is open; once its time is over, one call at a time.
    fn may_try(&self) -> Result<(), KmsError> {
        let now = Instant::now();
        match &mut self.circuit.lock().open {
            Some((why, until)) if now < *until => Err(why.clone()),
            Some((_, until)) => {
                // The others wait for what becomes of this one.
                *until = now + OPEN_FOR.max(self.timeout);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn is_open(&self) -> bool {
        self.circuit.lock().open.is_some()
    }

    fn note(&self, error: Option<&KmsError>) {
        let mut circuit = self.circuit.lock();
        match error.filter(|error| error.is_retryable()) {
            // An answer, even if it is a refusal, comes from a KMS that is there.
            None => *circuit = Circuit::default(),
            Some(why) => {
                circuit.failures += 1;
                if circuit.failures >= FAILURES_TO_OPEN {
                    circuit.open = Some((why.clone(), Instant::now() + OPEN_FOR));
                }
            }
        }
    }

    fn timed_out(&self) -> KmsError {
        let why = format!("no answer within {:?}; is it reachable from here?", self.timeout);
        KmsError { provider: self.provider, key: self.key.clone(), cause: Cause::Unavailable(why) }
    }
}

/// Between half of a pause and all of it, so that those who failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let share = f64::from(u16::from_be_bytes(*entropy::random())) / f64::from(u16::MAX);
    pause.mul_f64(0.5 + share / 2.0)
}

#[async_trait]
impl<K: Kms> Kms for Guard<K> {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        self.call(|| self.kms.generate_data_key(context)).await
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.call(|| self.kms.wrap(context, key)).await
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        self.call(|| self.kms.unwrap(context, wrapped)).await
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.call(|| self.kms.describe()).await
    }

    fn version_of(&self, wrapped: &WrappedKey) -> Option<u64> {
        self.kms.version_of(wrapped)
    }

    fn is_current(&self, wrapped: &WrappedKey, now: &KeyDescription) -> bool {
        self.kms.is_current(wrapped, now)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// Describes its key as it is told: the first outcome, then the next; the last one for good.
    #[derive(Debug)]
    struct Scripted {
        outcomes: Vec<Outcome>,
        calls: Mutex<usize>,
        under_way: Mutex<(usize, usize)>,
    }

    #[derive(Debug, Clone, Copy)]
    enum Outcome {
        Well,
        Slow(Duration),
        Unavailable,
        Refused,
    }

    #[async_trait]
    impl Kms for Scripted {
        async fn generate_data_key(
            &self,
            _: &Context<'_>,
        ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
            unreachable!("only described here")
        }

        async fn wrap(&self, _: &Context<'_>, _: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
            unreachable!("only described here")
        }

        async fn unwrap(&self, _: &Context<'_>, _: &WrappedKey) -> Result<DataEncryptionKey, KmsError> {
            unreachable!("only described here")
        }

        async fn describe(&self) -> Result<KeyDescription, KmsError> {
            let outcome = {
                let mut calls = self.calls.lock();
                *calls += 1;
                self.outcomes[(*calls - 1).min(self.outcomes.len() - 1)]
            };
            let failed = |cause| KmsError { provider: "test", key: "k".into(), cause };
            match outcome {
                Outcome::Well => {}
                Outcome::Slow(time) => {
                    {
                        let (now, most) = &mut *self.under_way.lock();
                        *now += 1;
                        *most = (*most).max(*now);
                    }
                    sleep(time).await;
                    self.under_way.lock().0 -= 1;
                }
                Outcome::Unavailable => return Err(failed(Cause::Unavailable("sealed".into()))),
                Outcome::Refused => return Err(failed(Cause::Refused("permission denied".into()))),
            }
            Ok(KeyDescription { kek_id: "test:k".into(), version: None })
        }
    }

    fn guard(outcomes: &[Outcome]) -> Guard<Scripted> {
        let scripted =
            Scripted { outcomes: outcomes.to_vec(), calls: Mutex::new(0), under_way: Mutex::default() };
        let limits = Limits { timeout: Duration::from_secs(2), max_concurrent: 3 };
        Guard::new(scripted, "test", "k".into(), limits)
    }

    fn calls(guard: &Guard<Scripted>) -> usize {
        *guard.kms.calls.lock()
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_tried_again_and_what_cannot_is_not() {
        let flaky = guard(&[Outcome::Unavailable, Outcome::Well]);
        let started = Instant::now();
        assert!(flaky.describe().await.is_ok());
        let paused = started.elapsed();
        assert!(paused >= FIRST_PAUSE / 2 && paused <= FIRST_PAUSE * 2, "{paused:?}");
        assert_eq!(calls(&flaky), 2);

        let refusing = guard(&[Outcome::Refused]);
        assert!(!refusing.describe().await.unwrap_err().is_retryable());
        assert_eq!(calls(&refusing), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_has_its_time_and_says_so() {
        let slow = guard(&[Outcome::Slow(Duration::from_secs(60))]);
        let started = Instant::now();
        let error = slow.describe().await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("no answer within 2s"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
        assert_eq!(calls(&slow), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_calls_than_allowed_are_under_way_at_once() {
        let busy = Arc::new(guard(&[Outcome::Slow(Duration::from_millis(100))]));
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..12 {
            let busy = Arc::clone(&busy);
            callers.spawn(async move { busy.describe().await.is_ok() });
        }
        assert!(callers.join_all().await.into_iter().all(|is_well| is_well));
        assert_eq!(*busy.kms.under_way.lock(), (0, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn the_circuit_opens_after_failures_and_one_call_tries_whether_it_may_close() {
        use Outcome::{Unavailable, Well};
        let away = guard(&[Unavailable, Unavailable, Unavailable, Unavailable, Well]);
        assert!(away.describe().await.is_err());
        assert_eq!(calls(&away), 3);
        let started = Instant::now();
        let error = away.describe().await.unwrap_err();
        assert!(error.to_string().contains("sealed"), "it says why it is open: {error}");
        assert_eq!((calls(&away), started.elapsed()), (3, Duration::ZERO), "nobody was asked");

        sleep(OPEN_FOR).await;
        assert!(away.describe().await.is_err());
        assert_eq!(calls(&away), 4, "one try, and open again");
        assert!(away.describe().await.is_err());
        assert_eq!(calls(&away), 4);

        sleep(OPEN_FOR).await;
        assert!(away.describe().await.is_ok());
        assert!(away.describe().await.is_ok(), "closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_does_not_open_the_circuit() {
        let refusing = guard(&[Outcome::Refused]);
        for calls_so_far in 1..=10 {
            assert!(refusing.describe().await.is_err());
            assert_eq!(calls(&refusing), calls_so_far);
        }
    }
}
