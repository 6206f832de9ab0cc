//! Rotation: streams in memory, and the one who changes them.
//!
//! [`Engine`] is what the data plane and the control plane hold: shared memory to read and a channel to ask
//! through. [`Worker`] owns the store and the KMS, runs in the control plane's runtime, and is the only one
//! that changes anything, a stream at a time. The pure rooms decide; this one carries out.
//!
//! Deliberately absent: playlist text and HTTP.

mod extend;
mod load;
mod stream;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot};

use stream::NotYet;
pub use stream::{ClearInitSigner, LiveKey, Published, Rotation, Stream, StreamSettings};
pub use worker::{Worker, WorkerError};

use crate::clock::Clock;
use crate::keys::{DekId, KeyId, PlaylistWindow, Timestamp};
use crate::telemetry::Metrics;

/// Questions that may wait for the worker; more are turned away rather than kept in memory.
const QUEUE_LEN: usize = 4_096;
/// Rotations that a slow listener may lag behind before it misses some.
const ROTATIONS_KEPT: usize = 256;
/// How long a playlist request waits for its boundaries to be stored.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A sweep that takes longer than this is taken for stuck.
const SWEEP_OVERDUE: Duration = Duration::from_secs(60);
/// A rendition whose numbers jump back more often than this is fed by two origins that disagree.
const RESET_INTERVAL: Duration = Duration::from_secs(30);
/// How often a race for a boundary is run again before a request is given up.
const ATTEMPTS: usize = 8;

/// Why a playlist cannot be published now.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EngineError {
    #[error("the keys are not loaded yet")]
    NotReady,
    #[error("too many playlists wait for their schedule")]
    Busy,
    #[error("the schedule could not be stored: {0}")]
    Failed(String),
}

/// How the streams are doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStatus {
    /// Keys are loaded and can be served.
    pub ready: bool,
    /// The last sweep did all that it should.
    pub rotating: bool,
    pub streams: usize,
    /// Streams whose newest key is older than its interval and the overdue threshold.
    pub overdue_rotations: usize,
}

/// Asks the worker for the boundaries that a window calls for.
struct Extend {
    stream: Arc<Stream>,
    rendition: String,
    window: PlaylistWindow,
    /// Nobody waits where the boundaries lie ahead of the window.
    reply: Option<oneshot::Sender<Result<(), EngineError>>>,
    /// Held until the question is answered.
    _place: OwnedSemaphorePermit,
}

/// The streams' keys and schedules, for those who read them. Clones share everything.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    ask: mpsc::Sender<Extend>,
    places: Arc<Semaphore>,
}

struct Shared {
    /// By the length of their prefixes, longest first.
    streams: Vec<Arc<Stream>>,
    keys: RwLock<HashMap<KeyId, Arc<LiveKey>>>,
    clear_inits: RwLock<HashMap<DekId, Arc<ClearInitSigner>>>,
    status: RwLock<EngineStatus>,
    swept_at: RwLock<Timestamp>,
    rotations: broadcast::Sender<Rotation>,
    clock: Clock,
    metrics: Metrics,
}

impl Engine {
    /// An engine that knows its streams but no keys, and what its worker needs to load them.
    pub fn new(streams: Vec<StreamSettings>, clock: Clock, metrics: Metrics) -> (Self, WorkerSeat) {
        let mut streams: Vec<_> = streams.into_iter().map(|s| Arc::new(Stream::new(s))).collect();
        streams.sort_by_key(|stream| std::cmp::Reverse(stream.settings.prefix.len()));
        metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
        let status =
            EngineStatus { ready: false, rotating: false, streams: streams.len(), overdue_rotations: 0 };
        let shared = Arc::new(Shared {
            streams,
            keys: RwLock::default(),
            clear_inits: RwLock::default(),
            status: RwLock::new(status),
            swept_at: RwLock::new(clock.now()),
            rotations: broadcast::channel(ROTATIONS_KEPT).0,
            clock,
            metrics,
        });
        let (ask, asked) = mpsc::channel(QUEUE_LEN);
        (
            Self { shared: Arc::clone(&shared), ask, places: Arc::new(Semaphore::new(QUEUE_LEN)) },
            WorkerSeat { shared, asked },
        )
    }

    /// The stream that owns a path at an origin. `path` has its percent-encoding undone.
    pub fn stream_at(&self, origin: &str, path: &str) -> Option<&Arc<Stream>> {
        self.shared
            .streams
            .iter()
            .find(|s| s.settings.origin == origin && path.starts_with(&s.settings.prefix))
    }

    /// A content key that is not destroyed.
    pub fn key(&self, id: KeyId) -> Option<Arc<LiveKey>> {
        self.shared.keys.read().get(&id).cloned()
    }

    /// Who signs the links of clear init sections under a DEK.
    pub fn clear_init_signer(&self, id: DekId) -> Option<Arc<ClearInitSigner>> {
        self.shared.clear_inits.read().get(&id).cloned()
    }

    pub fn status(&self) -> EngineStatus {
        let status = *self.shared.status.read();
        // A sweep that has not come round for so long does not come any more.
        let stuck = self.shared.clock.now().since(*self.shared.swept_at.read()) > SWEEP_OVERDUE;
        EngineStatus { rotating: status.rotating && !stuck, ..status }
    }

    /// Whether a path at an origin belongs to a stream when letters are compared without their case, as some
    /// origins do. `path` has its percent-encoding undone.
    pub fn is_like_a_streams(&self, origin: &str, path: &str) -> bool {
        let path = path.to_lowercase();
        let owns = |s: &Arc<Stream>| {
            s.settings.origin == origin && path.starts_with(&s.settings.prefix.to_lowercase())
        };
        self.shared.streams.iter().any(owns)
    }

    /// Hears of every rotation from now on.
    pub fn rotations(&self) -> broadcast::Receiver<Rotation> {
        self.shared.rotations.subscribe()
    }

    /// The keys of a window's segments, after the boundaries that it calls for have been stored.
    ///
    /// `playlist_duration` is the window's length in time. Boundaries that lie ahead of the window are asked
    /// for without waiting: the next fetch has them.
    ///
    /// # Errors
    /// [`EngineError`] when keys are not loaded, or boundaries that the window needs could not be stored.
    pub async fn publish(
        &self,
        stream: &Arc<Stream>,
        rendition: &str,
        window: PlaylistWindow,
        playlist_duration: Duration,
    ) -> Result<Published, EngineError> {
        if window.is_empty() {
            return stream.publish_empty().map_err(|_| EngineError::NotReady);
        }
        for _ in 0..ATTEMPTS {
            let call = stream.call(rendition, &window).ok_or(EngineError::NotReady)?;
            if call.must_wait {
                let (reply, answer) = oneshot::channel();
                self.send(stream, rendition, window, Some(reply))?;
                tokio::time::timeout(ANSWER_TIMEOUT, answer)
                    .await
                    .map_err(|_| EngineError::Busy)?
                    .map_err(|_| EngineError::NotReady)??;
            } else if !call.planned.is_empty() && !call.is_asked {
                // Best effort: whoever needs the boundary will wait for it.
                let _ = self.send(stream, rendition, window, None);
            }
            let now = self.shared.clock.now();
            match stream.publish(rendition, &window, playlist_duration, now) {
                Ok(published) => return Ok(published),
                Err(NotYet::Loaded) => return Err(EngineError::NotReady),
                Err(NotYet::Stored) => {}
            }
        }
        Err(EngineError::Busy)
    }

    fn send(
        &self,
        stream: &Arc<Stream>,
        rendition: &str,
        window: PlaylistWindow,
        reply: Option<oneshot::Sender<Result<(), EngineError>>>,
    ) -> Result<(), EngineError> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| EngineError::Busy)?;
        let extend = Extend {
            stream: Arc::clone(stream),
            rendition: rendition.to_owned(),
            window,
            reply,
            _place: place,
        };
        self.ask.try_send(extend).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Busy,
            mpsc::error::TrySendError::Closed(_) => EngineError::NotReady,
        })
    }
}

/// The other end of an [`Engine`]: what its [`Worker`] is made from.
pub struct WorkerSeat {
    shared: Arc<Shared>,
    asked: mpsc::Receiver<Extend>,
}
