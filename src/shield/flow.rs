//! Flows: one segment's ciphertext, filled once, read by any number while it fills.
//!
//! A flow is filled by a task of its own, so that a reader who leaves does not stop it. It is known by what
//! its bytes depend on. A fill that breaks off ends every reader with an error, and the flow is forgotten;
//! one that completes is kept, weighed by its bytes. What an origin refused (4xx) is remembered for a second,
//! so that a crowd asking for a missing segment is one request.

use std::collections::HashMap;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use moka::sync::Cache;
use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::{Semaphore, watch};

use super::upstream::OriginError;
use crate::hls::OriginKey;
use crate::keys::{ByteRange, KeyId, Place};
use crate::telemetry::Metrics;

/// How long an origin's refusal stands for all who ask.
const REFUSAL_TTL: Duration = Duration::from_secs(1);
/// How many refusals are remembered.
const REFUSALS_KEPT: u64 = 10_000;
/// What a flow costs besides its bytes, about.
const FLOW_OVERHEAD: u64 = 1_024;

/// What a flow's bytes depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    pub(super) signer: [u8; KeyId::LEN],
    pub(super) place: Place,
    pub(super) range: Option<ByteRange>,
    pub(super) origin: String,
    pub(super) path: String,
    /// The origin's own: it may lead to other bytes, or to a refusal.
    pub(super) query: Option<String>,
    /// What the origin has encrypted it under.
    pub(super) origin_key: Option<OriginKey>,
}

/// Why a flow has no (more) bytes to give.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum FlowError {
    #[error(transparent)]
    Origin(#[from] OriginError),
    #[error("too many segments are being fetched")]
    Busy,
    #[error("the task that filled the segment ended early")]
    Abandoned,
}

/// What is known of a flow before its bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct FlowHead {
    pub(super) content_type: Option<String>,
    /// The ciphertext's length, when the origin says the plaintext's.
    pub(super) total: Option<u64>,
}

#[derive(Debug, Clone)]
struct Progress {
    head: Option<Arc<FlowHead>>,
    len: u64,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    Filling,
    Complete,
    Failed(FlowError),
}

/// One segment's ciphertext, filling or complete.
#[derive(Debug)]
pub(super) struct Flow {
    chunks: RwLock<Vec<Bytes>>,
    progress: watch::Sender<Progress>,
}

impl Flow {
    fn new() -> Self {
        let progress = Progress { head: None, len: 0, state: State::Filling };
        Self { chunks: RwLock::default(), progress: watch::Sender::new(progress) }
    }

    /// Waits for the head.
    pub(super) async fn head(&self) -> Result<Arc<FlowHead>, FlowError> {
        let mut progress = self.progress.subscribe();
        let known = |p: &Progress| p.head.is_some() || matches!(p.state, State::Failed(_));
        let progress = progress.wait_for(known).await.map_err(|_| FlowError::Abandoned)?;
        match (&progress.state, &progress.head) {
            (State::Failed(error), _) => Err(error.clone()),
            (_, Some(head)) => Ok(Arc::clone(head)),
            (_, None) => Err(FlowError::Abandoned),
        }
    }

    /// Waits for the end, and gives the length.
    pub(super) async fn complete_len(&self) -> Result<u64, FlowError> {
        let mut progress = self.progress.subscribe();
        let ended = |p: &Progress| !matches!(p.state, State::Filling);
        let progress = progress.wait_for(ended).await.map_err(|_| FlowError::Abandoned)?;
        match &progress.state {
            State::Failed(error) => Err(error.clone()),
            _ => Ok(progress.len),
        }
    }

    /// Reads the bytes in `range` as they come; `None` for the end reads to the end.
    pub(super) fn read(self: &Arc<Self>, range: Range<u64>) -> FlowReader {
        FlowReader {
            progress: self.progress.subscribe(),
            flow: Arc::clone(self),
            next_chunk: 0,
            at: 0,
            range,
        }
    }

    fn len(&self) -> u64 {
        self.progress.borrow().len
    }
}

/// Reads one flow for one request.
pub(super) struct FlowReader {
    flow: Arc<Flow>,
    progress: watch::Receiver<Progress>,
    next_chunk: usize,
    /// Where `next_chunk` begins.
    at: u64,
    range: Range<u64>,
}

impl FlowReader {
    /// The next bytes of the range; `None` at its end, or the flow's.
    ///
    /// # Errors
    /// Why the flow broke off: the answer must be aborted.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, FlowError> {
        while self.at < self.range.end {
            let chunk = self.flow.chunks.read().get(self.next_chunk).cloned();
            let Some(chunk) = chunk else {
                let at = self.at;
                let more = |p: &Progress| p.len > at || !matches!(p.state, State::Filling);
                let progress = self.progress.wait_for(more).await.map_err(|_| FlowError::Abandoned)?;
                match &progress.state {
                    State::Failed(error) => return Err(error.clone()),
                    State::Complete if progress.len <= at => return Ok(None),
                    _ => continue,
                }
            };
            let (begins, ends) = (self.at, self.at + chunk.len() as u64);
            self.next_chunk += 1;
            self.at = ends;
            let from = self.range.start.max(begins);
            let to = self.range.end.min(ends);
            if from < to {
                // Both lie within the chunk, whose length is a usize.
                return Ok(Some(chunk.slice((from - begins) as usize..(to - begins) as usize)));
            }
        }
        Ok(None)
    }
}

/// The end of a flow that its filling task holds. Dropped before [`Self::complete`], the flow has failed.
pub(super) struct FlowWriter {
    flow: Arc<Flow>,
    key: FlowKey,
    flows: Flows,
    ended: bool,
}

impl FlowWriter {
    pub(super) fn head(&self, head: FlowHead) {
        self.flow.progress.send_modify(|progress| progress.head = Some(Arc::new(head)));
    }

    pub(super) fn append(&self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        let len = chunk.len() as u64;
        self.flow.chunks.write().push(chunk);
        self.flow.progress.send_modify(|progress| progress.len += len);
    }

    fn end(mut self, outcome: Result<(), FlowError>) {
        self.ended = true;
        match outcome {
            Ok(()) => {
                self.flow.progress.send_modify(|progress| progress.state = State::Complete);
                self.flows.inner.complete.insert(self.key.clone(), Arc::clone(&self.flow));
                self.flows.measure();
            }
            Err(error) => self.fail(error),
        }
    }

    fn fail(&self, error: FlowError) {
        let refused = matches!(&error, FlowError::Origin(error) if error.client_error().is_some());
        self.flow.progress.send_modify(|progress| progress.state = State::Failed(error));
        if refused {
            self.flows.inner.refused.insert(self.key.clone(), Arc::clone(&self.flow));
        }
    }
}

impl Drop for FlowWriter {
    fn drop(&mut self) {
        if !self.ended {
            self.fail(FlowError::Abandoned);
        }
        self.flows.inner.filling.lock().remove(&self.key);
        self.flows.inner.metrics.flows_filling.dec();
    }
}

/// All flows. Clones share them.
#[derive(Clone)]
pub(super) struct Flows {
    inner: Arc<Inner>,
}

struct Inner {
    filling: Mutex<HashMap<FlowKey, Arc<Flow>>>,
    complete: Cache<FlowKey, Arc<Flow>>,
    refused: Cache<FlowKey, Arc<Flow>>,
    permits: Arc<Semaphore>,
    metrics: Metrics,
}

impl Flows {
    pub(super) fn new(cache_bytes: u64, max_filling: usize, metrics: Metrics) -> Self {
        let weigh =
            |_: &FlowKey, flow: &Arc<Flow>| u32::try_from(flow.len() + FLOW_OVERHEAD).unwrap_or(u32::MAX);
        let inner = Inner {
            filling: Mutex::default(),
            complete: Cache::builder().max_capacity(cache_bytes).weigher(weigh).build(),
            refused: Cache::builder().max_capacity(REFUSALS_KEPT).time_to_live(REFUSAL_TTL).build(),
            permits: Arc::new(Semaphore::new(max_filling)),
            metrics,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The flow for `key`: one that is there, or a new one that a task of its own fills by `fill`.
    pub(super) fn get_or_fill<F, Filling>(&self, key: FlowKey, fill: F) -> Result<Arc<Flow>, FlowError>
    where
        F: FnOnce(Arc<FlowWriter>) -> Filling,
        Filling: Future<Output = Result<(), FlowError>> + Send + 'static,
    {
        let source = |name: &str| self.inner.metrics.flows.with_label_values(&[name]).inc();
        let kept = || self.inner.complete.get(&key).or_else(|| self.inner.refused.get(&key));
        if let Some(flow) = kept() {
            source("hit");
            return Ok(flow);
        }
        let (flow, permit) = {
            let mut filling = self.inner.filling.lock();
            if let Some(flow) = filling.get(&key) {
                source("joined");
                return Ok(Arc::clone(flow));
            }
            // It may have been completed between the look and the lock.
            if let Some(flow) = kept() {
                source("hit");
                return Ok(flow);
            }
            let permit = Arc::clone(&self.inner.permits).try_acquire_owned();
            let permit = permit.map_err(|_| FlowError::Busy)?;
            let flow = Arc::new(Flow::new());
            filling.insert(key.clone(), Arc::clone(&flow));
            (flow, permit)
        };
        source("filled");
        self.inner.metrics.flows_filling.inc();
        let writer = FlowWriter { flow: Arc::clone(&flow), key, flows: self.clone(), ended: false };
        let writer = Arc::new(writer);
        let filling = fill(Arc::clone(&writer));
        tokio::spawn(async move {
            let outcome = filling.await;
            // `fill` has ended, and with it its share of the writer.
            if let Ok(writer) = Arc::try_unwrap(writer) {
                writer.end(outcome);
            }
            drop(permit);
        });
        Ok(flow)
    }

    /// Brings the gauge of kept bytes up to date: only a flow that was added changes them.
    fn measure(&self) {
        self.inner.complete.run_pending_tasks();
        let bytes = i64::try_from(self.inner.complete.weighted_size()).unwrap_or(i64::MAX);
        self.inner.metrics.flow_cache_bytes.set(bytes);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::keys::MediaSequenceNumber;

    fn flows() -> Flows {
        Flows::new(1 << 20, 2, Metrics::new())
    }

    fn key(msn: u64) -> FlowKey {
        FlowKey {
            signer: [1; KeyId::LEN],
            place: Place::Segment(MediaSequenceNumber(msn)),
            range: None,
            origin: "main".into(),
            path: format!("/{msn}.ts"),
            query: None,
            origin_key: None,
        }
    }

    fn head(total: Option<u64>) -> FlowHead {
        FlowHead { content_type: None, total }
    }

    async fn collect(mut reader: FlowReader) -> Result<Vec<u8>, FlowError> {
        let mut all = Vec::new();
        while let Some(chunk) = reader.next().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all)
    }

    fn broke_off() -> FlowError {
        OriginError::BrokeOff { origin: "main".into(), why: "test".into() }.into()
    }

    #[tokio::test]
    async fn readers_get_the_first_bytes_before_the_last_have_come() {
        let flows = flows();
        let (go_on, wait) = oneshot::channel();
        let flow = flows
            .get_or_fill(key(1), |writer| async move {
                writer.head(head(Some(6)));
                writer.append(Bytes::from_static(b"abc"));
                wait.await.unwrap();
                writer.append(Bytes::from_static(b"def"));
                Ok(())
            })
            .unwrap();
        let mut reader = flow.read(0..u64::MAX);
        assert_eq!(flow.head().await.unwrap().total, Some(6));
        assert_eq!(reader.next().await.unwrap().unwrap(), "abc");
        go_on.send(()).unwrap();
        assert_eq!(reader.next().await.unwrap().unwrap(), "def");
        assert_eq!(reader.next().await.unwrap(), None);
    }

    #[tokio::test]
    async fn equal_requests_are_one_fill_and_the_result_is_kept() {
        let flows = flows();
        let (go_on, wait) = oneshot::channel();
        let first = flows
            .get_or_fill(key(1), |writer| async move {
                wait.await.unwrap();
                writer.append(Bytes::from_static(b"abc"));
                Ok(())
            })
            .unwrap();
        let never = |_| async { panic!("a second fill") };
        let joined = flows.get_or_fill(key(1), never).unwrap();
        assert!(Arc::ptr_eq(&first, &joined));
        go_on.send(()).unwrap();
        assert_eq!(joined.complete_len().await, Ok(3));
        // Completion becomes visible before the flow is moved to those that are kept.
        tokio::task::yield_now().await;
        let kept = flows.get_or_fill(key(1), |_| async { panic!("a second fill") }).unwrap();
        assert!(Arc::ptr_eq(&first, &kept));
    }

    #[tokio::test]
    async fn a_reader_who_leaves_does_not_stop_the_fill() {
        let flows = flows();
        let (go_on, wait) = oneshot::channel();
        let flow = flows
            .get_or_fill(key(1), |writer| async move {
                writer.append(Bytes::from_static(b"abc"));
                wait.await.unwrap();
                writer.append(Bytes::from_static(b"def"));
                Ok(())
            })
            .unwrap();
        let mut leaves = flow.read(0..u64::MAX);
        leaves.next().await.unwrap();
        drop(leaves);
        go_on.send(()).unwrap();
        assert_eq!(collect(flow.read(0..u64::MAX)).await.unwrap(), b"abcdef");
    }

    #[tokio::test]
    async fn a_fill_that_breaks_off_ends_every_reader_and_is_forgotten() {
        let flows = flows();
        let flow = flows
            .get_or_fill(key(1), |writer| async move {
                writer.append(Bytes::from_static(b"abc"));
                Err(broke_off())
            })
            .unwrap();
        assert_eq!(collect(flow.read(0..u64::MAX)).await, Err(broke_off()));
        assert_eq!(flow.complete_len().await, Err(broke_off()));
        tokio::task::yield_now().await;
        let again = flows.get_or_fill(key(1), |_| async { Ok(()) }).unwrap();
        assert!(!Arc::ptr_eq(&flow, &again));
    }

    #[tokio::test]
    async fn a_fill_that_panics_is_a_failure_too() {
        let flows = flows();
        let flow = flows.get_or_fill(key(1), |_writer| async { panic!("on purpose") }).unwrap();
        assert_eq!(flow.head().await, Err(FlowError::Abandoned));
    }

    #[tokio::test]
    async fn an_origins_refusal_is_remembered_for_a_moment() {
        let flows = flows();
        let missing = OriginError::Status { origin: "main".into(), status: http::StatusCode::NOT_FOUND };
        let error = missing.clone();
        let flow = flows.get_or_fill(key(1), |_| async { Err(error.into()) }).unwrap();
        assert_eq!(flow.head().await, Err(FlowError::Origin(missing)));
        tokio::task::yield_now().await;
        let again = flows.get_or_fill(key(1), |_| async { panic!("a second fill") }).unwrap();
        assert!(Arc::ptr_eq(&flow, &again));
    }

    #[tokio::test]
    async fn no_more_than_so_many_fill_at_once() {
        let flows = flows();
        let _one = flows.get_or_fill(key(1), |_| std::future::pending()).unwrap();
        let _two = flows.get_or_fill(key(2), |_| std::future::pending()).unwrap();
        assert_eq!(flows.get_or_fill(key(3), |_| std::future::pending()).err(), Some(FlowError::Busy));
    }

    #[tokio::test]
    async fn a_range_is_cut_out_of_the_chunks() {
        let flows = flows();
        let flow = flows
            .get_or_fill(key(1), |writer| async move {
                for chunk in ["abc", "def", "ghi"] {
                    writer.append(Bytes::from_static(chunk.as_bytes()));
                    tokio::task::yield_now().await;
                }
                Ok(())
            })
            .unwrap();
        for (range, expected) in
            [(0..9, "abcdefghi"), (2..4, "cd"), (3..6, "def"), (8..9, "i"), (4..99, "efghi")]
        {
            assert_eq!(collect(flow.read(range)).await.unwrap(), expected.as_bytes());
        }
    }
}
