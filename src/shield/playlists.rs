//! Playlists of streams: fetched whole, rewritten, kept for a moment.
//!
//! Equal requests become one fetch; a result is fresh for a quarter of its target duration (the CDN is told
//! half). When the origin fails, the last good one is served for `stale_if_error`. What a playlist is follows
//! from its content: a path of a stream that turns out not to be a playlist is refused after its first bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{AGE, CACHE_CONTROL, ETAG};
use moka::sync::Cache;
use parking_lot::RwLock;
use sha2::{Digest, Sha256};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::flow::FlowError;
use super::playlist_body::playlist_body;
use super::reply::{Refusal, Reply};
use super::service::Shield;
use super::upstream::OriginError;
use crate::engine::{EngineError, PublishedKey, Shown, Stream};
use crate::hls::{
    CipherKey, Kind, MediaFacts, MediaRewrite, OriginPath, PeriodKey, Playlist, rewrite_media,
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
    /// The keys that it depends on: each serving says that they are still needed.
    keys: Vec<PublishedKey>,
    /// Whose it is, as it was when the playlist was fetched.
    stream: Arc<Stream>,
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
    let mut rewritten = current(shield, stream, place, &slot).await?;
    if !rewritten.may_be_served() {
        // Its stream was stopped, or a key taken back, while it was made or waited for.
        rewritten = current(shield, stream, place, &slot).await?;
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
    let max_age = rewritten.max_age.as_secs().max(1);
    Ok(Reply::new(StatusCode::OK, CONTENT_TYPE_M3U8, rewritten.body.clone())
        .with(CACHE_CONTROL, format!("public, max-age={max_age}"))
        .with(AGE, age.to_string())
        .with(ETAG, rewritten.etag.clone())
        .tagged(&stream.id, &named))
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

impl Rewritten {
    /// Whether its stream runs and none of the keys that it names was taken back, or destroyed, since.
    fn may_be_served(&self) -> bool {
        let may_be_named = |key: &PublishedKey| key.cipher.may_be_named() && !key.signer.is_destroyed();
        self.stream.is_running() && self.keys.iter().all(may_be_named)
    }
}

async fn fetch(shield: &Shield, stream: &Arc<Stream>, place: &OriginPath<'_>) -> Result<Rewritten, Refusal> {
    let limit = shield.settings.max_playlist_bytes;
    let body = playlist_body(&shield.upstream, place, limit).await?;
    let playlist = Playlist::parse(&body)?;
    let is_protected = |to: &OriginPath<'_>| shield.owner(to).is_some();
    if playlist.kind() == Kind::Multivariant {
        let text = rewrite_multivariant(&playlist, &shield.settings.mounts, place, &is_protected)?;
        return Ok(finish(text, stream, Vec::new(), STEADY_TTL, STEADY_TTL));
    }
    // A rendition is a path, and the parameters that choose what is behind it.
    let rendition = match &place.query {
        Some(query) => format!("{}?{query}", place.path),
        None => place.path.clone(),
    };
    let facts = playlist.media_facts()?;
    let duration = Duration::try_from_secs_f64(facts.duration_secs).unwrap_or(LONGEST).min(LONGEST);
    let shown = Shown {
        window: facts.window(),
        duration,
        target_duration: Duration::from_secs(facts.target_duration_secs).min(LONGEST),
    };
    let published = shield.engine.publish(stream, &rendition, shown).await?;
    let key_at = |msn: MediaSequenceNumber| {
        let PublishedKey { signer, cipher } = published.key_at(msn)?;
        Some(PeriodKey {
            signer: (signer.id, &signer.secrets.link),
            cipher: CipherKey {
                id: cipher.id,
                method: cipher.method,
                iv_mode: cipher.iv_mode,
                link: &cipher.secrets.link,
            },
            successor: (cipher.id != signer.id).then_some(cipher.ordinal),
        })
    };
    let text = rewrite_media(
        &playlist,
        &MediaRewrite {
            mounts: &shield.settings.mounts,
            from: place,
            is_protected: &is_protected,
            encrypt_init_sections: published.encrypt_init_sections,
            key_uri_base: &shield.settings.key_uri_base,
            clear_init: (published.clear_init.dek, &published.clear_init.link),
            key_at: &key_at,
        },
    )?;
    let (ttl, max_age) = freshness(&facts);
    Ok(finish(text, stream, published.keys().cloned().collect(), ttl, max_age))
}

/// How long a Media Playlist is fresh here, and how long caches are told to keep it.
fn freshness(facts: &MediaFacts) -> (Duration, Duration) {
    if facts.ended {
        return (STEADY_TTL, STEADY_TTL);
    }
    let target = Duration::from_secs(facts.target_duration_secs.max(1));
    ((target / 4).clamp(*LIVE_TTL.start(), *LIVE_TTL.end()), target / 2)
}

fn finish(
    text: String,
    stream: &Arc<Stream>,
    keys: Vec<PublishedKey>,
    ttl: Duration,
    max_age: Duration,
) -> Rewritten {
    let stream = Arc::clone(stream);
    let etag = format!("\"{}\"", hex::encode(&Sha256::digest(text.as_bytes())[..12]));
    Rewritten { body: text.into(), etag, keys, stream, fetched: Instant::now(), ttl, max_age }
}

#[cfg(test)]
mod tests {
    use super::*;

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
