//! One playlist from its origin to what is served: fetched whole, given its keys, rewritten.
//!
//! Deliberately absent: when that is done, and for how long the result is kept (`playlists`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use moka::sync::Cache;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::directives::Directives;
use super::playlist_body::{PlaylistBodyError, playlist_body};
use super::reply::Refusal;
use super::service::Shield;
use super::upstream::OriginError;
use crate::engine::{Published, PublishedKey, Shown, Stream};
use crate::hls::{
    CipherKey, Kind, MediaFacts, MediaRewrite, OriginPath, PeriodKey, Playlist, PlaylistError, Problem,
    SessionKey, Surroundings, VariableSources, Variables, rewrite_media, rewrite_multivariant,
};
use crate::keys::{MediaSequenceNumber, StreamId};

/// How long a Multivariant Playlist, or one that has ended, is fresh.
pub(super) const STEADY_TTL: Duration = Duration::from_secs(10);
/// No playlist is taken to be longer, whatever its EXTINFs say: its keys would never be let go.
const LONGEST: Duration = Duration::from_secs(31 * 86_400);
/// Bounds of a live playlist's freshness.
const LIVE_TTL: std::ops::RangeInclusive<Duration> = Duration::from_millis(250)..=Duration::from_secs(2);
/// The same with Partial Segments.
const LOW_LATENCY_TTL: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(100)..=Duration::from_secs(1);
/// Streams whose variables are kept.
const IMPORTS_KEPT: u64 = 10_000;

/// A playlist as it is served.
pub(super) struct Rewritten {
    pub(super) body: Bytes,
    pub(super) etag: String,
    /// The keys that it depends on: each serving says that they are still needed.
    pub(super) keys: Vec<PublishedKey>,
    /// Whose it is, as it was when the playlist was fetched.
    pub(super) stream: Arc<Stream>,
    pub(super) fetched: Instant,
    pub(super) ttl: Duration,
    pub(super) cache_control: String,
    /// Its origin heeds delivery directives.
    pub(super) takes_directives: bool,
    pub(super) target_duration: Duration,
    /// One past the last segment that is whole.
    pub(super) end: MediaSequenceNumber,
}

impl Rewritten {
    /// Whether its stream runs and none of the keys that it names was taken back, or destroyed, since.
    pub(super) fn may_be_served(&self) -> bool {
        let may_be_named = |key: &PublishedKey| key.cipher.may_be_named() && !key.signer.is_destroyed();
        self.stream.is_running() && self.keys.iter().all(may_be_named)
    }
}

/// The variables of streams' Multivariant Playlists, for Media Playlists that import some.
pub(super) type Imports = Cache<StreamId, Arc<Variables>>;

pub(super) fn imports() -> Imports {
    Cache::builder().max_capacity(IMPORTS_KEPT).time_to_live(STEADY_TTL).build()
}

/// Fetches a playlist and makes of it what is served. The origin may block for `patience` where a directive asks it to.
pub(super) async fn publish(
    shield: &Shield,
    stream: &Arc<Stream>,
    place: &OriginPath<'_>,
    directives: Directives,
    patience: Duration,
) -> Result<Rewritten, Refusal> {
    let first = attempt(shield, stream, place, directives, patience).await?;
    match first {
        Attempt::Done(rewritten) => Ok(rewritten),
        Attempt::NeedsWhole => {
            match attempt(shield, stream, place, directives.without_skip(), patience).await? {
                Attempt::Done(rewritten) => Ok(rewritten),
                // An origin that leaves segments out unasked.
                Attempt::NeedsWhole => Err(Refusal::NotYet),
            }
        }
    }
}

enum Attempt {
    Done(Rewritten),
    /// Segments are left out that are under another key now than when the player got them, or that had the EXT-X-KEY
    /// of the origin before them (D22 §6.2.5.1 lets a server answer with the whole playlist).
    NeedsWhole,
}

async fn attempt(
    shield: &Shield,
    stream: &Arc<Stream>,
    place: &OriginPath<'_>,
    directives: Directives,
    patience: Duration,
) -> Result<Attempt, Refusal> {
    let body = fetch(shield, place, directives, patience).await?;
    let playlist = Playlist::parse(&body)?;
    let is_protected = |to: &OriginPath<'_>| shield.owner(to).is_some();
    // A rendition is a path, and the parameters that choose what is behind it.
    let rendition = match &place.query {
        Some(query) => format!("{}?{query}", place.path),
        None => place.path.clone(),
    };
    let facts = match playlist.kind() {
        // It has no window, and nothing is appended to it.
        Kind::Multivariant => MediaFacts { ended: true, ..MediaFacts::default() },
        Kind::Media => playlist.media_facts()?,
    };
    let published = shield.engine.publish(stream, &rendition, shown(&facts)).await?;
    if facts.skipped > 0 && published.keys().any(|key| key.cipher.id != key.signer.id) {
        return Ok(Attempt::NeedsWhole);
    }
    let imported = match facts.imports_variables {
        true => Some(imported(shield, stream).await?),
        false => None,
    };
    let surroundings = Surroundings {
        mounts: &shield.settings.mounts,
        from: place,
        is_protected: &is_protected,
        on_encrypted: published.on_encrypted,
        variables: VariableSources { query: place.query.as_deref(), imported: imported.as_deref() },
        key_uri_base: &shield.settings.key_uri_base,
        clear: (published.clear_init.dek, &published.clear_init.link),
    };
    if playlist.kind() == Kind::Multivariant {
        let key = stream.session_key();
        let named = key.as_ref().map(|key| SessionKey { id: key.id, method: key.method });
        let text = rewrite_multivariant(&playlist, &surroundings, named)?;
        let keys = key.map(|key| PublishedKey { signer: Arc::clone(&key), cipher: key });
        return Ok(Attempt::Done(finish(text, stream, keys.into_iter().collect(), &facts, directives)));
    }
    let rewritten = rewrite_media(
        &playlist,
        &MediaRewrite {
            surroundings,
            rendition: &rendition,
            encrypt_init_sections: published.encrypt_init_sections,
            subtitles: published.subtitles,
            key_at: &|msn| period_key(&published, msn),
        },
    );
    let text = match rewritten {
        Err(PlaylistError { problem: Problem::UnknownEncryption, .. }) => return Ok(Attempt::NeedsWhole),
        rewritten => rewritten?,
    };
    let keys = published.keys().cloned().collect();
    Ok(Attempt::Done(finish(text, stream, keys, &facts, directives)))
}

async fn fetch(
    shield: &Shield,
    place: &OriginPath<'_>,
    directives: Directives,
    patience: Duration,
) -> Result<Bytes, Refusal> {
    let told = directives.to_query();
    let query: Vec<_> = place.query.iter().chain((!told.is_empty()).then_some(&told)).cloned().collect();
    let query = (!query.is_empty()).then(|| query.join("&"));
    let asked = OriginPath { query, ..place.clone() };
    let body = playlist_body(&shield.upstream, &asked, shield.settings.max_playlist_bytes, patience).await;
    body.map_err(|error| match error {
        // D22 §6.2.5.2: the server's answer to one who waited too long.
        PlaylistBodyError::Origin(OriginError::Status {
            status: StatusCode::SERVICE_UNAVAILABLE, ..
        }) if directives.msn.is_some() => Refusal::NotYet,
        error => error.into(),
    })
}

/// The variables of a stream's Multivariant Playlist (D22 §4.4.2.3).
async fn imported(shield: &Shield, stream: &Stream) -> Result<Arc<Variables>, Refusal> {
    if let Some(known) = shield.imports.get(&stream.id) {
        return Ok(known);
    }
    let path = stream.playlist_path();
    let (path, query) =
        path.split_once('?').map_or((path.as_str(), None), |(path, query)| (path, Some(query)));
    let place = shield.settings.mounts.locate(path).ok_or(Refusal::NoStream)?;
    let place = OriginPath { query: query.map(str::to_owned), ..place };
    let body = fetch(shield, &place, Directives::default(), Duration::ZERO).await?;
    let sources = VariableSources { query: place.query.as_deref(), imported: None };
    let variables = Playlist::parse(&body).and_then(|playlist| Variables::importable(&playlist, sources));
    let variables = Arc::new(variables.map_err(Refusal::Imports)?);
    shield.imports.insert(stream.id.clone(), Arc::clone(&variables));
    Ok(variables)
}

fn shown(facts: &MediaFacts) -> Shown {
    let duration = Duration::try_from_secs_f64(facts.duration_secs).unwrap_or(LONGEST).min(LONGEST);
    Shown { window: facts.window(), duration, target_duration: target_duration(facts) }
}

fn target_duration(facts: &MediaFacts) -> Duration {
    Duration::from_secs(facts.target_duration_secs).min(LONGEST)
}

fn period_key(published: &Published, msn: MediaSequenceNumber) -> Option<PeriodKey<'_>> {
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
}

/// How long a playlist is fresh here, and what caches are told (D22 appendix B.1).
fn freshness(facts: &MediaFacts, directives: Directives) -> (Duration, String) {
    let public = |age: Duration| format!("public, max-age={}", age.as_secs().max(1));
    if facts.ended {
        return (STEADY_TTL, public(STEADY_TTL));
    }
    let target = Duration::from_secs(facts.target_duration_secs.max(1));
    let live = (target / 4).clamp(*LIVE_TTL.start(), *LIVE_TTL.end());
    if !facts.is_low_latency {
        return (live, public(target / 2));
    }
    let half_a_part = Duration::try_from_secs_f64(facts.part_target_secs / 2.0).unwrap_or(live);
    let ttl = half_a_part.clamp(*LOW_LATENCY_TTL.start(), *LOW_LATENCY_TTL.end());
    match directives.msn.filter(|_| facts.takes_directives) {
        // Who asks for it has not seen it yet, however late: for shared caches. But video.js asks again for the part that
        // it has, and must not be answered by its browser. An origin that does not wait gives what it has at the moment.
        Some(_) => (ttl, format!("public, max-age=0, s-maxage={}", (target * 6).as_secs())),
        None => (ttl, public(Duration::from_secs(1))),
    }
}

fn finish(
    text: String,
    stream: &Arc<Stream>,
    keys: Vec<PublishedKey>,
    facts: &MediaFacts,
    directives: Directives,
) -> Rewritten {
    let (ttl, cache_control) = freshness(facts, directives);
    Rewritten {
        etag: format!("\"{}\"", hex::encode(&Sha256::digest(text.as_bytes())[..12])),
        body: text.into(),
        keys,
        stream: Arc::clone(stream),
        fetched: Instant::now(),
        ttl,
        cache_control,
        takes_directives: facts.takes_directives,
        target_duration: target_duration(facts),
        end: facts.media_sequence.plus(facts.skipped + facts.segments as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_keep_a_live_playlist_for_half_its_target_duration() {
        let mut facts = MediaFacts { segments: 3, target_duration_secs: 6, ..MediaFacts::default() };
        let check = |facts: &MediaFacts, millis, told: &str| {
            let expected = (Duration::from_millis(millis), told.to_owned());
            assert_eq!(freshness(facts, Directives::default()), expected);
        };
        check(&facts, 1_500, "public, max-age=3");
        facts.ended = true;
        check(&facts, 10_000, "public, max-age=10");
    }

    #[test]
    fn shared_caches_keep_what_players_waited_for_and_hardly_anything_else_with_parts() {
        let facts = MediaFacts {
            target_duration_secs: 4,
            is_low_latency: true,
            takes_directives: true,
            part_target_secs: 0.5,
            ..MediaFacts::default()
        };
        let ttl = Duration::from_millis(250);
        let blocking = Directives { msn: Some(7), ..Directives::default() };
        assert_eq!(freshness(&facts, blocking), (ttl, "public, max-age=0, s-maxage=24".to_owned()));
        assert_eq!(freshness(&facts, Directives::default()), (ttl, "public, max-age=1".to_owned()));
    }
}
