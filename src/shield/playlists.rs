//! Playlists of streams: fetched whole, rewritten, kept for a moment.
//!
//! Equal requests become one fetch; a result is fresh for a quarter of its target duration (the CDN is told
//! half). When the origin fails, the last good one is served for `stale_if_error`. What a playlist is follows
//! from its content: a path of a stream that turns out not to be a playlist is refused after its first bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use http::StatusCode;
use http::header::{AGE, CACHE_CONTROL, ETAG};
use moka::sync::Cache;
use parking_lot::RwLock;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::directives::Directives;
use super::flow::FlowError;
use super::publish::{Rewritten, STEADY_TTL, publish};
use super::reply::{Refusal, Reply};
use super::service::Shield;
use super::upstream::OriginError;
use crate::engine::{EngineError, PublishedKey, Stream};
use crate::hls::OriginPath;
use crate::keys::KeyId;

const CONTENT_TYPE_M3U8: &str = "application/vnd.apple.mpegurl";
/// How long a request that could have a stale playlist waits for a fresh one.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a failure stands for all who ask.
const FAILURE_TTL: Duration = Duration::from_millis(500);

/// The last results for one path and query.
#[derive(Default)]
struct Results {
    good: Option<Arc<Rewritten>>,
    /// When, why, and whether a stale playlist took its place.
    failed: Option<(Instant, Refusal, bool)>,
}

#[derive(Default)]
struct Slot {
    results: RwLock<Results>,
    /// Whoever holds it fetches; the others wait for the result.
    fetching: Mutex<()>,
    /// Of the last good playlist: what the slot weighs, besides a little for itself.
    bytes: AtomicU32,
}

/// Origin, path, query and delivery directives.
type SlotKey = (String, String, String, String);
type Slots = Cache<SlotKey, Arc<Slot>>;

/// What a slot costs besides its playlist, about.
const SLOT_OVERHEAD: u32 = 1_024;

/// The playlists that were served of late.
pub(super) struct Playlists {
    slots: Slots,
}

impl Playlists {
    pub(super) fn new(cache_bytes: u64, stale_if_error: Duration) -> Self {
        let weigh = |(origin, path, query, told): &SlotKey, slot: &Arc<Slot>| {
            let key = origin.len() + path.len() + query.len() + told.len();
            let key = u32::try_from(key).unwrap_or(u32::MAX);
            slot.bytes.load(Ordering::Relaxed).saturating_add(key).saturating_add(SLOT_OVERHEAD)
        };
        let slots = Cache::builder()
            .max_capacity(cache_bytes)
            .weigher(weigh)
            .time_to_idle(stale_if_error.max(STEADY_TTL) * 2)
            .build();
        Self { slots }
    }

    /// What a request comes to, as far as the playlist is known without its directives.
    ///
    /// # Errors
    /// [`Refusal::BadDirective`] for a segment that cannot be there soon.
    fn wanted(&self, place: &OriginPath<'_>, directives: Directives) -> Result<(SlotKey, Wanted), Refusal> {
        let query = place.query.clone().unwrap_or_default();
        let key = |told| (place.mount.origin.clone(), place.path.clone(), query.clone(), told);
        let mut wanted = Wanted {
            origin: place.mount.origin.clone(),
            path: place.path.clone(),
            query: place.query.clone(),
            directives,
            patience: Duration::ZERO,
        };
        if directives != Directives::default()
            && let Some(plain) = self.slots.get(&key(String::new()))
            && let Some(plain) = &plain.results.read().good
        {
            wanted.directives = heeded(plain, directives)?;
            // D22 §6.2.5.2: as long as an origin may block.
            wanted.patience = plain.target_duration * 3;
        }
        Ok((key(wanted.directives.to_query()), wanted))
    }
}

/// What of the directives matters, given the playlist as it was without any. Those that do not would only multiply it:
/// where its origin heeds none, and where what is waited for is there already.
fn heeded(plain: &Rewritten, directives: Directives) -> Result<Directives, Refusal> {
    if !plain.takes_directives {
        return Ok(Directives::default());
    }
    let Some(msn) = directives.msn else { return Ok(directives) };
    if msn < plain.end.0 {
        return Ok(Directives { msn: None, part: None, ..directives });
    }
    // D22 §6.2.5.2 calls two segments ahead too far. The playlist has grown since, at most by one in half a Target
    // Duration.
    let since = plain.fetched.elapsed().as_secs_f64() / plain.target_duration.as_secs_f64().max(1.0);
    if msn > plain.end.plus(3 + 2 * since.ceil() as u64).0 {
        return Err(Refusal::BadDirective("_HLS_msn is too far ahead of the playlist"));
    }
    Ok(directives)
}

/// What is asked of an origin for a slot.
#[derive(Clone)]
struct Wanted {
    origin: String,
    path: String,
    query: Option<String>,
    directives: Directives,
    /// How much longer than usual the origin may take.
    patience: Duration,
}

/// Answers a request for a playlist.
///
/// # Errors
/// [`Refusal`] when the origin has none to give, or the shield cannot rewrite it rightly.
pub(super) async fn serve(
    shield: &Shield,
    stream: &Arc<Stream>,
    place: &OriginPath<'_>,
    directives: Directives,
) -> Result<Reply, Refusal> {
    let (key, wanted) = shield.playlists.wanted(place, directives)?;
    let slot = shield.playlists.slots.get_with(key.clone(), Arc::default);
    let mut rewritten = current(shield, stream, &wanted, &slot).await?;
    if !rewritten.may_be_served() {
        // Its stream was stopped, or a key taken back, while it was made or waited for.
        rewritten = current(shield, stream, &wanted, &slot).await?;
        if !rewritten.may_be_served() {
            return Err(EngineError::NotReady.into());
        }
    }
    let bytes = u32::try_from(rewritten.body.len()).unwrap_or(u32::MAX);
    if slot.bytes.swap(bytes, Ordering::Relaxed) != bytes {
        // Weighed anew.
        shield.playlists.slots.insert(key, slot);
    }

    if rewritten.fetched.elapsed() > rewritten.ttl {
        shield.metrics.stale_playlists.inc();
    }
    let now = shield.clock.now();
    let mut named: Vec<KeyId> = Vec::with_capacity(rewritten.keys.len());
    for PublishedKey { signer, cipher } in &rewritten.keys {
        signer.named_at(now);
        cipher.named_at(now);
        named.push(cipher.id);
    }
    named.dedup();
    let age = rewritten.fetched.elapsed().as_secs();
    Ok(Reply::new(StatusCode::OK, CONTENT_TYPE_M3U8, rewritten.body.clone())
        .with(CACHE_CONTROL, rewritten.cache_control.clone())
        .with(AGE, age.to_string())
        .with(ETAG, rewritten.etag.clone())
        .tagged(&stream.id, &named))
}

/// The playlist that is fresh, or fetched now, or stale because neither can be had soon.
async fn current(
    shield: &Shield,
    stream: &Arc<Stream>,
    wanted: &Wanted,
    slot: &Arc<Slot>,
) -> Result<Arc<Rewritten>, Refusal> {
    if let Some(result) = slot.results.read().fresh() {
        return result;
    }
    let stale = slot.results.read().stale(shield.settings.stale_if_error);
    // A task of its own: who does not wait for it must not end it either.
    let refreshing = refresh(shield.clone(), Arc::clone(stream), wanted.clone(), Arc::clone(slot));
    let refreshing = tokio::spawn(refreshing);
    let refreshed = match stale {
        None => refreshing.await,
        Some(good) => match tokio::time::timeout(PATIENCE, refreshing).await {
            Ok(refreshed) => refreshed,
            Err(_) => return Ok(good),
        },
    };
    refreshed.unwrap_or(Err(Refusal::Flow(FlowError::Abandoned)))
}

/// Fetches a playlist into its slot, unless another has done so meanwhile.
async fn refresh(
    shield: Shield,
    stream: Arc<Stream>,
    wanted: Wanted,
    slot: Arc<Slot>,
) -> Result<Arc<Rewritten>, Refusal> {
    let _fetching = slot.fetching.lock().await;
    if let Some(result) = slot.results.read().fresh() {
        return result;
    }
    let Wanted { origin, path, query, directives, patience } = wanted;
    let mount = shield.settings.mounts.by_origin(&origin).ok_or(Refusal::NoStream)?;
    let place = OriginPath { mount, path, query };
    let publishing = publish(&shield, &stream, &place, directives, patience);
    let fetched = tokio::time::timeout(shield.settings.playlist_timeout + patience, publishing).await;
    match fetched.unwrap_or_else(|_| Err(OriginError::out_of_time(mount).into())) {
        Ok(rewritten) => {
            let rewritten = Arc::new(rewritten);
            *slot.results.write() = Results { good: Some(Arc::clone(&rewritten)), failed: None };
            Ok(rewritten)
        }
        Err(refusal) => {
            tracing::warn!(stream = %stream.id, path = place.path, %refusal, "playlist not served");
            let mut results = slot.results.write();
            let stale = results.stale(shield.settings.stale_if_error).filter(|_| may_pass(&refusal));
            results.failed = Some((Instant::now(), refusal.clone(), stale.is_some()));
            stale.ok_or(refusal)
        }
    }
}

/// Whether a failure may be over in a moment. An origin that says 404 has taken the playlist away; one that gives
/// something else for a moment, such as a playlist that is just being written, has not.
fn may_pass(refusal: &Refusal) -> bool {
    let taken_away = match refusal {
        Refusal::Origin(error) => error.client_error(),
        _ => None,
    };
    let passing = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
    taken_away.is_none_or(|status| passing.contains(&status))
}

impl Results {
    /// What can be answered without asking the origin.
    fn fresh(&self) -> Option<Result<Arc<Rewritten>, Refusal>> {
        let good = self.good.as_ref().filter(|good| good.may_be_served());
        if let Some(good) = good.filter(|good| good.fetched.elapsed() < good.ttl) {
            return Some(Ok(Arc::clone(good)));
        }
        let (at, refusal, served_stale) = self.failed.as_ref()?;
        if at.elapsed() >= FAILURE_TTL {
            return None;
        }
        match good {
            Some(good) if *served_stale => Some(Ok(Arc::clone(good))),
            _ => Some(Err(refusal.clone())),
        }
    }

    fn stale(&self, limit: Duration) -> Option<Arc<Rewritten>> {
        let good = self.good.as_ref().filter(|good| good.may_be_served());
        good.filter(|good| good.fetched.elapsed() < limit).map(Arc::clone)
    }
}
