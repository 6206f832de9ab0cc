//! Rotation: streams in memory, and the one who changes them.
//!
//! [`Engine`] is what the data plane holds: shared memory to read and a channel to ask through. [`Operator`] is
//! what the control plane holds: it changes streams as operators ask. [`Worker`] owns the store and the KMS, runs
//! in the control plane's runtime, sweeps, and keeps this node in step with the others. The pure rooms decide;
//! this one carries out.
//!
//! Deliberately absent: playlist text and HTTP.

mod compare;
mod declare;
mod deks;
mod delivery;
mod directory;
mod extend;
mod held;
mod live;
mod make;
mod merge;
mod operate;
mod operator;
mod renew;
mod revoke;
mod rewrap;
mod samples;
mod stream;
mod supply;
mod sweeps;
mod sync;
#[cfg(test)]
mod tests;
mod troubles;
mod unwrapped;
mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch};

pub use crate::cdn::DeliveryMode;
pub use crate::store::PurgeState;
pub use deks::DekRules;
pub use delivery::{
    CdnHealth, CdnKeys, CdnStatus, DeliveryRules, Incident, IncidentAtCdn, KeyAtCdn, SyncState,
};
use directory::Directory;
pub use held::{HeldStatus, KeyUse, KmsStatus};
pub use live::{BREAK_OFF_AFTER, ClearInitSigner, LiveKey, Revoked};
pub use operate::Operator;
pub use operator::{
    Erased, Initialized, KeyInfo, ManualRotation, OperatorError, PolicyChange, RenewedDek, Revocation,
    StreamChange, StreamInfo, StreamSpec, StreamState,
};
pub use rewrap::{Rewrap, RewrapFailure, RewrapState, Rewrapping};
use stream::NotYet;
pub use stream::{Published, PublishedKey, Shown, Stream};
use troubles::Troubles;
pub use worker::{Fleet, Parting, Worker, WorkerError};

use crate::alert::Alerts;
use crate::clock::Clock;
use crate::keys::{DekId, KeyId, Ordinal, StreamId, Timestamp};
use crate::telemetry::Metrics;

/// Questions that may wait for the worker; more are turned away rather than kept in memory.
const QUEUE_LEN: usize = 4_096;
/// Rotations that a slow listener may lag behind before it misses some.
const ROTATIONS_KEPT: usize = 256;
/// How long a playlist request waits for its boundaries to be stored.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request for a key that is not known here waits for news from the store.
const NEWS_TIMEOUT: Duration = Duration::from_secs(2);

/// A node that has not swept, nor heard from the store, for longer than this is taken for stuck.
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
    /// Due rotations are carried out: by this node, or by another that this one hears from.
    pub rotating: bool,
    /// The store answers.
    pub store_up: bool,
    /// The KMS answers, and lets this node use its key.
    pub kms_up: bool,
    /// Whether CDNs have what they should; `None` where there are none.
    pub cdn_sync: Option<bool>,
    /// Streams that are served.
    pub streams: usize,
    /// Streams whose newest key is older than its interval and the overdue threshold.
    pub overdue_rotations: usize,
}

/// A promotion, as it is told to those who listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    pub stream: StreamId,
    pub ordinal: Ordinal,
    pub key: KeyId,
    pub reason: String,
}

/// Asks the worker for the boundaries that a window calls for.
struct Extend {
    stream: Arc<Stream>,
    rendition: String,
    shown: Shown,
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
    directory: RwLock<Directory>,
    keys: RwLock<HashMap<KeyId, Arc<LiveKey>>>,
    clear_inits: RwLock<HashMap<DekId, Arc<ClearInitSigner>>>,
    status: RwLock<EngineStatus>,
    troubles: Troubles,
    alerts: Alerts,
    /// When this node last swept, or heard from the store that another may be sweeping.
    alive_at: RwLock<Timestamp>,
    rotations: broadcast::Sender<Rotation>,
    news: Newsstand,
    clock: Clock,
    metrics: Metrics,
}

/// Where requests for what is not known here wait for news from the store.
struct Newsstand {
    /// Rung by who wants news.
    wanted: tokio::sync::Notify,
    /// How often the store was asked for changes, and how many of these times the answer is in.
    begun: watch::Sender<u64>,
    done: watch::Sender<u64>,
    /// No other node can have anything to tell.
    is_alone: std::sync::atomic::AtomicBool,
}

impl Engine {
    /// An engine that knows nothing yet, and what its worker needs to load its streams.
    pub fn new(clock: Clock, metrics: Metrics) -> (Self, WorkerSeat) {
        let status = EngineStatus {
            ready: false,
            rotating: false,
            store_up: false,
            kms_up: false,
            cdn_sync: None,
            streams: 0,
            overdue_rotations: 0,
        };
        let shared = Arc::new(Shared {
            directory: RwLock::default(),
            keys: RwLock::default(),
            clear_inits: RwLock::default(),
            status: RwLock::new(status),
            troubles: Troubles::default(),
            alerts: Alerts::new(metrics.clone()),
            alive_at: RwLock::new(clock.now()),
            rotations: broadcast::channel(ROTATIONS_KEPT).0,
            news: Newsstand {
                wanted: tokio::sync::Notify::new(),
                begun: watch::Sender::new(0),
                done: watch::Sender::new(0),
                is_alone: std::sync::atomic::AtomicBool::new(false),
            },
            clock,
            metrics,
        });
        let (ask, asked) = mpsc::channel(QUEUE_LEN);
        (
            Self { shared: Arc::clone(&shared), ask, places: Arc::new(Semaphore::new(QUEUE_LEN)) },
            WorkerSeat { shared, asked },
        )
    }

    /// The stream that owns a path at an origin, running or stopped. `path` has its percent-encoding undone.
    pub fn stream_at(&self, origin: &str, path: &str) -> Option<Arc<Stream>> {
        self.shared.directory.read().owner(origin, path).cloned()
    }

    /// Whether a path at an origin belongs to a stream when letters are compared without their case, as some
    /// origins do. `path` has its percent-encoding undone.
    pub fn is_like_a_streams(&self, origin: &str, path: &str) -> bool {
        self.shared.directory.read().has_like(origin, path)
    }

    /// A content key that is not destroyed, of a stream that is served; revoked ones too. One that is not known
    /// here may have been made by another node a moment ago: the store is asked, once for all who wait.
    pub async fn key(&self, id: KeyId) -> Option<Arc<LiveKey>> {
        let find = || self.shared.keys.read().get(&id).cloned();
        self.find_or_hear(find).await.filter(|key| key.serving.load(std::sync::atomic::Ordering::Acquire))
    }

    /// Who signs the links of clear init sections under a DEK.
    pub async fn clear_init_signer(&self, id: DekId) -> Option<Arc<ClearInitSigner>> {
        let find = || self.shared.clear_inits.read().get(&id).cloned();
        let signer = self.find_or_hear(find).await?;
        signer.serving.load(std::sync::atomic::Ordering::Acquire).then_some(signer)
    }

    async fn find_or_hear<T>(&self, find: impl Fn() -> Option<T>) -> Option<T> {
        if let Some(found) = find() {
            return Some(found);
        }
        let news = &self.shared.news;
        if news.is_alone.load(std::sync::atomic::Ordering::Relaxed) {
            return None;
        }
        // News that were asked for before now may lack what is looked for.
        let mut done = news.done.subscribe();
        let wanted = *news.begun.borrow() + 1;
        news.wanted.notify_one();
        // Without news, what is known is all that can be said.
        let _ = tokio::time::timeout(NEWS_TIMEOUT, done.wait_for(|done| *done >= wanted)).await;
        find()
    }

    /// The keys that take a revoked key's place, one after the other; the last one is in force. Empty when it was
    /// not revoked.
    pub fn successors(&self, key: &LiveKey) -> Vec<Arc<LiveKey>> {
        let mut chain: Vec<Arc<LiveKey>> = Vec::new();
        let Some(stream) = self.shared.directory.read().get(&key.stream).cloned() else { return chain };
        let known = stream.known.read();
        let mut revoked = key.revoked().map(|revoked| (key.ordinal, revoked.successor));
        while let Some((ordinal, successor)) = revoked {
            let Some(next) = known.keys.get(&successor).filter(|next| next.live.ordinal > ordinal) else {
                break;
            };
            chain.push(Arc::clone(&next.live));
            revoked = next.live.revoked().map(|revoked| (next.live.ordinal, revoked.successor));
        }
        chain
    }

    /// The key of an ordinal among those that take a revoked key's place. A playlist of another node may name it
    /// before this one has heard of the revocation: then the store is asked.
    ///
    /// # Errors
    /// [`EngineError::NotReady`] when it is not known here and the store cannot be asked.
    pub async fn successor(
        &self,
        key: &LiveKey,
        ordinal: Ordinal,
    ) -> Result<Option<Arc<LiveKey>>, EngineError> {
        let find = || self.successors(key).into_iter().find(|next| next.ordinal == ordinal);
        let found = self.find_or_hear(find).await;
        let is_alone = self.shared.news.is_alone.load(std::sync::atomic::Ordering::Relaxed);
        if found.is_none() && !is_alone && !self.shared.status.read().store_up {
            return Err(EngineError::NotReady);
        }
        Ok(found)
    }

    pub fn status(&self) -> EngineStatus {
        let status = *self.shared.status.read();
        // A sweep that has not come round for so long does not come any more.
        let stuck = self.shared.clock.now().since(*self.shared.alive_at.read()) > SWEEP_OVERDUE;
        EngineStatus {
            rotating: status.rotating && !stuck,
            streams: self.shared.directory.read().len(),
            ..status
        }
    }

    /// What is wrong, each in a sentence for whoever runs the shield; empty when all is well.
    pub fn problems(&self) -> Vec<String> {
        self.shared.troubles.in_words(&self.status())
    }

    /// What an operator should be woken for.
    pub fn alerts(&self) -> Alerts {
        self.shared.alerts.clone()
    }

    /// Hears of every rotation from now on.
    pub fn rotations(&self) -> broadcast::Receiver<Rotation> {
        self.shared.rotations.subscribe()
    }

    /// The keys of a window's segments, after the boundaries that it calls for have been stored.
    ///
    /// Boundaries that lie ahead of the window are asked for without waiting: the next fetch has them.
    ///
    /// # Errors
    /// [`EngineError`] when keys are not loaded, or boundaries that the window needs could not be stored.
    pub async fn publish(
        &self,
        stream: &Arc<Stream>,
        rendition: &str,
        shown: Shown,
    ) -> Result<Published, EngineError> {
        if shown.window.is_empty() {
            return stream.publish_empty().map_err(|_| EngineError::NotReady);
        }
        for _ in 0..ATTEMPTS {
            let now = self.shared.clock.now();
            let call = stream.call(rendition, &shown.window, now).ok_or(EngineError::NotReady)?;
            if call.must_wait {
                let (reply, answer) = oneshot::channel();
                self.send(stream, rendition, shown, Some(reply))?;
                tokio::time::timeout(ANSWER_TIMEOUT, answer)
                    .await
                    .map_err(|_| EngineError::Busy)?
                    .map_err(|_| EngineError::NotReady)??;
            } else if !call.planned.is_empty() && !call.is_asked {
                // Best effort: whoever needs the boundary will wait for it.
                let _ = self.send(stream, rendition, shown, None);
            }
            match stream.publish(rendition, &shown, self.shared.clock.now()) {
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
        shown: Shown,
        reply: Option<oneshot::Sender<Result<(), EngineError>>>,
    ) -> Result<(), EngineError> {
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| EngineError::Busy)?;
        let extend = Extend {
            stream: Arc::clone(stream),
            rendition: rendition.to_owned(),
            shown,
            reply,
            _place: place,
        };
        self.ask.try_send(extend).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => EngineError::Busy,
            mpsc::error::TrySendError::Closed(_) => EngineError::NotReady,
        })
    }
}

#[cfg(test)]
impl Engine {
    /// Knows a running stream without keys.
    pub(crate) fn know(&self, id: &str, origin: &str, prefix: &str) {
        let row = crate::store::StreamRow::for_tests(id, origin, prefix);
        self.shared.directory.write().insert(Arc::new(Stream::new(row)));
    }
}

/// The other end of an [`Engine`]: what its [`Worker`] is made from.
pub struct WorkerSeat {
    shared: Arc<Shared>,
    asked: mpsc::Receiver<Extend>,
}
