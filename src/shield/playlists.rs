//! Playlists of streams: fetched whole, rewritten, kept for a moment.
//!
//! Equal requests become one fetch; a result is fresh for a quarter of its target duration (the CDN is told
//! half). When the origin fails, the last good one is served for `stale_if_error`. What a playlist is follows
//! from its content: a path of a stream that turns out not to be a playlist is refused after its first bytes.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use flate2::read::GzDecoder;
use http::StatusCode;
use http::header::{AGE, CACHE_CONTROL, ETAG};
use moka::sync::Cache;
use parking_lot::RwLock;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::flow::FlowError;
use super::reply::{Refusal, Reply};
use super::service::Shield;
use super::upstream::{OriginError, OriginRequest};
use crate::engine::{LiveKey, Stream};
use crate::hls::{
    Kind, MediaFacts, MediaRewrite, OriginPath, PeriodKey, Playlist, looks_like_a_playlist, rewrite_media,
    rewrite_multivariant,
};
use crate::keys::{KeyId, MediaSequenceNumber};

const CONTENT_TYPE_M3U8: &str = "application/vnd.apple.mpegurl";
/// How long a Multivariant Playlist, or one that has ended, is fresh.
const STEADY_TTL: Duration = Duration::from_secs(10);
/// No playlist is taken to be longer, whatever its EXTINFs say: its keys would never be let go.
const LONGEST: Duration = Duration::from_secs(31 * 86_400);
/// How long a request that could have a stale playlist waits for a fresh one.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long a failure stands for all who ask.
const FAILURE_TTL: Duration = Duration::from_millis(500);
/// Bounds of a live playlist's freshness.
const LIVE_TTL: std::ops::RangeInclusive<Duration> = Duration::from_millis(250)..=Duration::from_secs(2);

/// A playlist as it is served.
struct Rewritten {
    body: Bytes,
    etag: String,
    /// The keys that it names: each serving says that they are still needed.
    keys: Vec<Arc<LiveKey>>,
    fetched: Instant,
    ttl: Duration,
    max_age: Duration,
}

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

/// Origin, path and query.
type SlotKey = (String, String, String);
type Slots = Cache<SlotKey, Arc<Slot>>;

/// What a slot costs besides its playlist, about.
const SLOT_OVERHEAD: u32 = 1_024;

/// The playlists that were served of late.
pub(super) struct Playlists {
    slots: Slots,
}

impl Playlists {
    pub(super) fn new(cache_bytes: u64, stale_if_error: Duration) -> Self {
        let weigh = |(origin, path, query): &SlotKey, slot: &Arc<Slot>| {
            let key = u32::try_from(origin.len() + path.len() + query.len()).unwrap_or(u32::MAX);
            slot.bytes.load(Ordering::Relaxed).saturating_add(key).saturating_add(SLOT_OVERHEAD)
        };
        let slots = Cache::builder()
            .max_capacity(cache_bytes)
            .weigher(weigh)
            .time_to_idle(stale_if_error.max(STEADY_TTL) * 2)
            .build();
        Self { slots }
    }
}

/// Answers a request for a playlist.
///
/// # Errors
/// [`Refusal`] when the origin has none to give, or the shield cannot rewrite it rightly.
pub(super) async fn serve(
    shield: &Shield,
    stream: &Arc<Stream>,
    place: &OriginPath<'_>,
) -> Result<Reply, Refusal> {
    let query = place.query.clone().unwrap_or_default();
    let key = (place.mount.origin.clone(), place.path.clone(), query);
    let slot = shield.playlists.slots.get_with(key.clone(), Arc::default);
    let rewritten = current(shield, stream, place, &slot).await?;
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
    for key in &rewritten.keys {
        key.named_at(now);
        named.push(key.id);
    }
    let age = rewritten.fetched.elapsed().as_secs();
    let max_age = rewritten.max_age.as_secs().max(1);
    Ok(Reply::new(StatusCode::OK, CONTENT_TYPE_M3U8, rewritten.body.clone())
        .with(CACHE_CONTROL, format!("public, max-age={max_age}"))
        .with(AGE, age.to_string())
        .with(ETAG, rewritten.etag.clone())
        .tagged(&stream.settings.id, &named))
}

/// The playlist that is fresh, or fetched now, or stale because neither can be had soon.
async fn current(
    shield: &Shield,
    stream: &Arc<Stream>,
    place: &OriginPath<'_>,
    slot: &Arc<Slot>,
) -> Result<Arc<Rewritten>, Refusal> {
    if let Some(result) = slot.results.read().fresh() {
        return result;
    }
    let stale = slot.results.read().stale(shield.settings.stale_if_error);
    // A task of its own: who does not wait for it must not end it either.
    let wanted = (place.mount.origin.clone(), place.path.clone(), place.query.clone());
    let refreshing = tokio::spawn(refresh(shield.clone(), Arc::clone(stream), wanted, Arc::clone(slot)));
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
    (origin, path, query): (String, String, Option<String>),
    slot: Arc<Slot>,
) -> Result<Arc<Rewritten>, Refusal> {
    let _fetching = slot.fetching.lock().await;
    if let Some(result) = slot.results.read().fresh() {
        return result;
    }
    let mount = shield.settings.mounts.by_origin(&origin).ok_or(Refusal::NoStream)?;
    let place = OriginPath { mount, path, query };
    let fetched =
        tokio::time::timeout(shield.settings.playlist_timeout, fetch(&shield, &stream, &place)).await;
    match fetched.unwrap_or_else(|_| Err(OriginError::out_of_time(mount).into())) {
        Ok(rewritten) => {
            let rewritten = Arc::new(rewritten);
            *slot.results.write() = Results { good: Some(Arc::clone(&rewritten)), failed: None };
            Ok(rewritten)
        }
        Err(refusal) => {
            tracing::warn!(stream = %stream.settings.id, path = place.path, %refusal, "playlist not served");
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
        if let Some(good) = self.good.as_ref().filter(|good| good.fetched.elapsed() < good.ttl) {
            return Some(Ok(Arc::clone(good)));
        }
        let (at, refusal, served_stale) = self.failed.as_ref()?;
        if at.elapsed() >= FAILURE_TTL {
            return None;
        }
        match &self.good {
            Some(good) if *served_stale => Some(Ok(Arc::clone(good))),
            _ => Some(Err(refusal.clone())),
        }
    }

    fn stale(&self, limit: Duration) -> Option<Arc<Rewritten>> {
        self.good.as_ref().filter(|good| good.fetched.elapsed() < limit).map(Arc::clone)
    }
}

async fn fetch(shield: &Shield, stream: &Arc<Stream>, place: &OriginPath<'_>) -> Result<Rewritten, Refusal> {
    let body = fetch_body(shield, place).await?;
    let playlist = Playlist::parse(&body)?;
    let is_protected = |to: &OriginPath<'_>| shield.owner(to).is_some();
    if playlist.kind() == Kind::Multivariant {
        let text = rewrite_multivariant(&playlist, &shield.settings.mounts, place, &is_protected)?;
        return Ok(finish(text, Vec::new(), STEADY_TTL, STEADY_TTL));
    }
    // A rendition is a path, and the parameters that choose what is behind it.
    let rendition = match &place.query {
        Some(query) => format!("{}?{query}", place.path),
        None => place.path.clone(),
    };
    let facts = playlist.media_facts()?;
    let duration = Duration::try_from_secs_f64(facts.duration_secs).unwrap_or(LONGEST).min(LONGEST);
    let published = shield.engine.publish(stream, &rendition, facts.window(), duration).await?;
    let key_at = |msn: MediaSequenceNumber| {
        let key = published.key_at(msn)?;
        Some(PeriodKey { id: key.id, method: key.method, iv_mode: key.iv_mode, link: &key.secrets.link })
    };
    let text = rewrite_media(
        &playlist,
        &MediaRewrite {
            mounts: &shield.settings.mounts,
            from: place,
            is_protected: &is_protected,
            encrypt_init_sections: stream.settings.policy.encrypt_init_sections,
            key_uri_base: &shield.settings.key_uri_base,
            clear_init: (published.clear_init.dek, &published.clear_init.link),
            key_at: &key_at,
        },
    )?;
    let (ttl, max_age) = freshness(&facts);
    Ok(finish(text, published.keys().cloned().collect(), ttl, max_age))
}

/// How long a Media Playlist is fresh here, and how long caches are told to keep it.
fn freshness(facts: &MediaFacts) -> (Duration, Duration) {
    if facts.ended {
        return (STEADY_TTL, STEADY_TTL);
    }
    let target = Duration::from_secs(facts.target_duration_secs.max(1));
    ((target / 4).clamp(*LIVE_TTL.start(), *LIVE_TTL.end()), target / 2)
}

fn finish(text: String, keys: Vec<Arc<LiveKey>>, ttl: Duration, max_age: Duration) -> Rewritten {
    let etag = format!("\"{}\"", hex::encode(&Sha256::digest(text.as_bytes())[..12]));
    Rewritten { body: text.into(), etag, keys, fetched: Instant::now(), ttl, max_age }
}

/// The origin's playlist, whole and without its Content-Encoding.
async fn fetch_body(shield: &Shield, place: &OriginPath<'_>) -> Result<Bytes, Refusal> {
    let request = OriginRequest {
        mount: place.mount,
        path: &place.path,
        query: place.query.as_deref(),
        accept_gzip: true,
    };
    let limit = shield.settings.max_playlist_bytes;
    let mut response = shield.upstream.fetch(request).await?.ok()?.framed()?;
    let gzip = match response.encoding() {
        None => false,
        Some(encoding) if encoding.eq_ignore_ascii_case("gzip") => true,
        Some(encoding) => {
            let (origin, encoding) = (response.origin().to_owned(), encoding.to_owned());
            return Err(OriginError::Encoded { origin, encoding }.into());
        }
    };
    let first = response.chunk().await?.unwrap_or_default();
    // A long media file is told from its first bytes, and no more of it is fetched. A playlist's first
    // chunk can be shorter than its header, when the origin dribbles: then the rest decides.
    if !gzip && first.len() >= 16 && !looks_like_a_playlist(&first) {
        return Err(Refusal::NotLinked);
    }
    if first.is_empty() {
        return Err(Refusal::Empty);
    }
    let rest = response.body(limit.saturating_sub(first.len())).await?;
    let body = if rest.is_empty() { first } else { Bytes::from([first, rest].concat()) };
    let body = if gzip { gunzip(&body, limit, response.origin())? } else { body };
    if looks_like_a_playlist(&body) { Ok(body) } else { Err(Refusal::NotLinked) }
}

/// # Errors
/// Damaged gzip, and what would unpack to more than `limit` bytes.
fn gunzip(body: &[u8], limit: usize, origin: &str) -> Result<Bytes, OriginError> {
    let mut plain = Vec::new();
    let read = GzDecoder::new(body).take(limit as u64 + 1).read_to_end(&mut plain);
    read.map_err(|_| OriginError::BadGzip { origin: origin.to_owned() })?;
    if plain.len() > limit {
        return Err(OriginError::TooLong { origin: origin.to_owned(), limit: limit as u64 });
    }
    Ok(plain.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn gzip_is_undone_up_to_the_limit() {
        assert_eq!(gunzip(&gzip(b"#EXTM3U\n"), 100, "main").unwrap(), "#EXTM3U\n");
        let bomb = gzip(&vec![b'x'; 10_000_000]);
        assert!(bomb.len() < 20_000);
        assert!(matches!(gunzip(&bomb, 1_000_000, "main"), Err(OriginError::TooLong { .. })));
        assert!(matches!(gunzip(b"not gzip", 100, "main"), Err(OriginError::BadGzip { .. })));
    }

    #[test]
    fn caches_keep_a_live_playlist_for_half_its_target_duration() {
        let mut facts = MediaFacts {
            media_sequence: MediaSequenceNumber(0),
            segments: 3,
            target_duration_secs: 6,
            duration_secs: 18.0,
            ended: false,
            playlist_type: None,
        };
        assert_eq!(freshness(&facts), (Duration::from_millis(1500), Duration::from_secs(3)));
        facts.ended = true;
        assert_eq!(freshness(&facts), (STEADY_TTL, STEADY_TTL));
    }
}
