//! A KMS whose calls are counted, and the time that they took.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use keyshield::keys::{Context, DataEncryptionKey};
use keyshield::kms::{KeyDescription, Kms, KmsError, WrappedKey};

/// So many calls, and the sum of their times: those that are under way together count each.
#[derive(Debug, Clone, Copy, Default)]
pub struct Calls {
    pub generate: u64,
    pub wrap: u64,
    pub unwrap: u64,
    pub time: Duration,
}

impl Calls {
    /// Without looking whether the KMS is there, which no stream causes.
    pub fn all(&self) -> u64 {
        self.generate + self.wrap + self.unwrap
    }
}

#[derive(Debug, Default)]
struct Counters {
    generate: AtomicU64,
    wrap: AtomicU64,
    unwrap: AtomicU64,
    nanos: AtomicU64,
}

#[derive(Debug, Clone)]
pub struct Counted {
    kms: Arc<dyn Kms>,
    counters: Arc<Counters>,
}

impl Counted {
    pub fn new(kms: Arc<dyn Kms>) -> Self {
        Self { kms, counters: Arc::default() }
    }

    /// Since this was last asked.
    pub fn take(&self) -> Calls {
        let Counters { generate, wrap, unwrap, nanos } = &*self.counters;
        let [generate, wrap, unwrap, nanos] =
            [generate, wrap, unwrap, nanos].map(|counter| counter.swap(0, Ordering::Relaxed));
        Calls { generate, wrap, unwrap, time: Duration::from_nanos(nanos) }
    }

    async fn timed<T>(&self, counter: &AtomicU64, call: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let done = call.await;
        let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.nanos.fetch_add(nanos, Ordering::Relaxed);
        counter.fetch_add(1, Ordering::Relaxed);
        done
    }
}

#[async_trait]
impl Kms for Counted {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        self.timed(&self.counters.generate, self.kms.generate_data_key(context)).await
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.timed(&self.counters.wrap, self.kms.wrap(context, key)).await
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        self.timed(&self.counters.unwrap, self.kms.unwrap(context, wrapped)).await
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.kms.describe().await
    }

    fn version_of(&self, wrapped: &WrappedKey) -> Option<u64> {
        self.kms.version_of(wrapped)
    }
}
