//! Answers that are whole in memory, and the one table from refusal to status.
//!
//! Errors are `application/problem+json` (RFC 9457) with a reason that a streaming engineer can act on, and
//! nothing that a stranger should not know. CORS headers go on every answer here, whatever the request's
//! Origin, so that a cache cannot keep one without them.

use bytes::Bytes;
use http::header::{
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ALLOW, CACHE_CONTROL, CONTENT_LENGTH,
    CONTENT_TYPE, ORIGIN, VARY,
};
use http::{HeaderName, HeaderValue, StatusCode};
use pingora::http::ResponseHeader;
use pingora::proxy::Session;
use thiserror::Error;

use super::flow::FlowError;
use super::playlist_body::PlaylistBodyError;
use super::upstream::OriginError;
use crate::engine::EngineError;
use crate::hls::{LinkError, PlaylistError, SteeringError};
use crate::keys::{KEY_HEADER, KeyId, SERVED_BY_HEADER, SERVED_BY_SHIELD, StreamId};

/// Headers that scripts of other origins may read.
const EXPOSED: &str = "Accept-Ranges, Age, Content-Length, Content-Range, ETag";

pub(super) const ALLOWED_METHODS: &str = "GET, HEAD, OPTIONS";

/// Cache tags, for Fastly and Varnish.
const SURROGATE_KEY: HeaderName = HeaderName::from_static("surrogate-key");
/// Cache tags, for Cloudflare, Akamai and CloudFront.
const CACHE_TAG: HeaderName = HeaderName::from_static("cache-tag");
/// Which key an answer is, or was encrypted under: a cached object then tells for itself.
pub(super) const KEY: HeaderName = HeaderName::from_static(KEY_HEADER);
/// On everything that is said of a key: who asks through a CDN must know who answered.
pub(super) const SERVED_BY: HeaderName = HeaderName::from_static(SERVED_BY_HEADER);

/// Why a request is not answered with what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error("only GET, HEAD and OPTIONS are answered here")]
    Method,
    #[error("{0}")]
    BadPath(String),
    #[error("nothing is served at this path: it belongs to no stream, and its origin is not passed through")]
    NoStream,
    #[error(
        "this path lies under an encrypted stream and is not a playlist; media is served through the links of \
         the stream's playlists only"
    )]
    NotLinked,
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("this segment link was not written by this shield, or for another path")]
    ForgedLink,
    #[error("the key of this segment link is not known here, or destroyed")]
    LinkKeyGone,
    #[error("no key has this ID")]
    NoKey,
    #[error("this key was revoked; the playlist names another one")]
    KeyRevoked,
    #[error("{0}")]
    BadDirective(&'static str),
    #[error("the origin did not get in time what this playlist request waits for")]
    NotYet,
    #[error("{0}")]
    Steering(#[from] SteeringError),
    #[error("this stream is stopped")]
    Stopped,
    #[error("the origin's answer is empty")]
    Empty,
    #[error("{0}")]
    Playlist(#[from] PlaylistError),
    #[error("the stream's main playlist, from which this one imports variables: {0}")]
    Imports(PlaylistError),
    #[error("{0}")]
    Engine(#[from] EngineError),
    #[error("{0}")]
    Flow(FlowError),
    #[error("{0}")]
    Origin(#[from] OriginError),
}

impl Refusal {
    pub(super) fn status(&self) -> StatusCode {
        let of_origin = |error: &OriginError| match error.client_error() {
            Some(status) => status,
            None if error.is_timeout() => StatusCode::GATEWAY_TIMEOUT,
            None => StatusCode::BAD_GATEWAY,
        };
        match self {
            Refusal::Method => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::BadPath(_) | Refusal::BadDirective(_) => StatusCode::BAD_REQUEST,
            Refusal::NoStream | Refusal::NoKey | Refusal::Stopped => StatusCode::NOT_FOUND,
            Refusal::NotLinked | Refusal::Link(_) | Refusal::ForgedLink => StatusCode::FORBIDDEN,
            Refusal::LinkKeyGone | Refusal::KeyRevoked => StatusCode::GONE,
            Refusal::Playlist(_) | Refusal::Imports(_) | Refusal::Empty | Refusal::Steering(_) => {
                StatusCode::BAD_GATEWAY
            }
            Refusal::Engine(_) | Refusal::NotYet | Refusal::Flow(FlowError::Busy) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Refusal::Flow(FlowError::Abandoned) => StatusCode::BAD_GATEWAY,
            Refusal::Flow(FlowError::Origin(error)) | Refusal::Origin(error) => of_origin(error),
        }
    }

    /// What caches may do with it: a missing segment may be asked for again in a second.
    fn cache_control(&self) -> &'static str {
        match self.status() {
            StatusCode::NOT_FOUND | StatusCode::GONE => "max-age=1",
            _ => "no-store",
        }
    }

    /// The problem's details: what went wrong and where, without what only the log should have.
    fn detail(&self) -> String {
        match self {
            Refusal::Origin(error) | Refusal::Flow(FlowError::Origin(error)) => error.public(),
            Refusal::Engine(EngineError::Failed(_)) => "the schedule could not be stored".into(),
            other => other.to_string(),
        }
    }
}

impl From<FlowError> for Refusal {
    fn from(error: FlowError) -> Self {
        Refusal::Flow(error)
    }
}

impl From<PlaylistBodyError> for Refusal {
    fn from(error: PlaylistBodyError) -> Self {
        match error {
            PlaylistBodyError::Origin(error) => Refusal::Origin(error),
            PlaylistBodyError::Empty => Refusal::Empty,
            // What a path of a stream holds is nobody's business when it is no playlist.
            PlaylistBodyError::NotAPlaylist { .. } => Refusal::NotLinked,
        }
    }
}

/// An answer that is whole in memory.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: Vec<(HeaderName, String)>,
    pub(super) body: Bytes,
}

impl Reply {
    pub(super) fn new(status: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Self {
        let headers = vec![(CONTENT_TYPE, content_type.to_owned())];
        Self { status, headers, body: body.into() }
    }

    pub(super) fn empty(status: StatusCode) -> Self {
        Self { status, headers: Vec::new(), body: Bytes::new() }
    }

    pub(super) fn with(mut self, name: HeaderName, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Whatever caches might do with it otherwise.
    pub(super) fn never_kept(mut self) -> Self {
        self.headers.retain(|(name, _)| name != CACHE_CONTROL);
        self.with(CACHE_CONTROL, "no-store")
    }

    /// Cache tags by which everything of a stream, or under a key, can be purged.
    pub(super) fn tagged(mut self, stream: &StreamId, keys: &[KeyId]) -> Self {
        self.headers.extend(tags(stream, keys));
        self
    }
}

impl From<&Refusal> for Reply {
    fn from(refusal: &Refusal) -> Self {
        let status = refusal.status();
        let body = serde_json::json!({
            "type": "about:blank",
            "title": status.canonical_reason().unwrap_or("Error"),
            "status": status.as_u16(),
            "detail": refusal.detail(),
        });
        let reply = Reply::new(status, "application/problem+json", body.to_string())
            .with(CACHE_CONTROL, refusal.cache_control());
        match refusal {
            // RFC 9110 §15.5.6.
            Refusal::Method => reply.with(ALLOW, ALLOWED_METHODS),
            Refusal::NoKey | Refusal::KeyRevoked => reply.with(SERVED_BY, SERVED_BY_SHIELD),
            _ => reply,
        }
    }
}

/// Whether an If-None-Match names `etag`. Compared weakly (RFC 9110 §13.1.2): caches weaken tags.
pub(super) fn names_etag(if_none_match: &str, etag: &str) -> bool {
    let names = |tag: &str| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag;
    if_none_match.split(',').any(|tag| names(tag.trim()))
}

/// More keys than this are not named in tags: CloudFront reads 50 tags, the stream's among them, and headers have their limits.
/// A playlist of so many keys is purged by its stream's tag.
const MAX_KEY_TAGS: usize = 49;

/// The tag headers of an answer that belongs to a stream and to keys.
pub(super) fn tags(stream: &StreamId, keys: &[KeyId]) -> [(HeaderName, String); 2] {
    let keys = if keys.len() > MAX_KEY_TAGS { &[] } else { keys };
    let tags: Vec<_> = std::iter::once(format!("keyshield-stream-{stream}"))
        .chain(keys.iter().map(|key| format!("keyshield-key-{key}")))
        .collect();
    [(SURROGATE_KEY, tags.join(" ")), (CACHE_TAG, tags.join(","))]
}

/// Adds the CORS headers that every answer has.
pub(super) fn add_cors(
    header: &mut ResponseHeader,
    request_origin: Option<&HeaderValue>,
    allowed: &[String],
) -> pingora::Result<()> {
    if allowed.iter().any(|origin| origin == "*") {
        header.insert_header(ACCESS_CONTROL_ALLOW_ORIGIN, "*")?;
    } else {
        header.append_header(VARY, ORIGIN.as_str())?;
        let listed = request_origin.filter(|asked| allowed.iter().any(|o| o.as_bytes() == asked.as_bytes()));
        let Some(origin) = listed else { return Ok(()) };
        header.insert_header(ACCESS_CONTROL_ALLOW_ORIGIN, origin)?;
    }
    header.insert_header(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED)
}

/// Sends a whole answer.
pub(super) async fn send(session: &mut Session, reply: Reply, cors: &[String]) -> pingora::Result<()> {
    let is_head = session.req_header().method == http::Method::HEAD;
    let mut header = ResponseHeader::build(reply.status, Some(reply.headers.len() + 4))?;
    for (name, value) in reply.headers {
        header.append_header(name, value)?;
    }
    // RFC 9110 §8.6: no Content-Length in a 204, and a 304 describes another body.
    if !matches!(reply.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
        header.insert_header(CONTENT_LENGTH, reply.body.len().to_string())?;
    }
    let origin = session.req_header().headers.get(ORIGIN).cloned();
    add_cors(&mut header, origin.as_ref(), cors)?;
    let no_body = is_head || reply.body.is_empty();
    session.write_response_header(Box::new(header), no_body).await?;
    if !no_body {
        session.write_response_body(Some(reply.body), true).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_have_the_status_their_reader_expects() {
        let origin = |status| OriginError::Status { origin: "main".into(), status };
        let timed_out = OriginError::TimedOut { origin: "main".into(), address: "http://a".into() };
        for (refusal, status) in [
            (Refusal::NotLinked, 403),
            (Refusal::ForgedLink, 403),
            (Refusal::LinkKeyGone, 410),
            (Refusal::NoKey, 404),
            (Refusal::Stopped, 404),
            (Refusal::KeyRevoked, 410),
            (Refusal::Engine(EngineError::NotReady), 503),
            (Refusal::Flow(FlowError::Busy), 503),
            (Refusal::Origin(origin(StatusCode::NOT_FOUND)), 404),
            (Refusal::Origin(origin(StatusCode::FOUND)), 502),
            (Refusal::Origin(origin(StatusCode::INTERNAL_SERVER_ERROR)), 502),
            (Refusal::Origin(timed_out), 504),
        ] {
            assert_eq!(refusal.status().as_u16(), status, "{refusal}");
        }
    }

    #[test]
    fn a_problem_is_rfc_9457_json() {
        let reply = Reply::from(&Refusal::NotLinked);
        let body: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        assert_eq!(body["status"], 403);
        assert_eq!(body["title"], "Forbidden");
        assert!(body["detail"].as_str().unwrap().contains("playlists"));
        assert!(reply.headers.contains(&(CACHE_CONTROL, "no-store".into())));
    }

    #[test]
    fn tags_stay_within_what_headers_can_hold() {
        let stream = "x".repeat(128).parse().unwrap();
        let keys: Vec<_> = (0..MAX_KEY_TAGS as u8).map(|n| KeyId::from_bytes([n; 16])).collect();
        let [(_, surrogate), (_, cache)] = tags(&stream, &keys);
        assert_eq!(surrogate.split(' ').count(), MAX_KEY_TAGS + 1);
        assert!(surrogate.len() < 4_096 && cache.len() == surrogate.len());
        let too_many = [&keys[..], &keys[..]].concat();
        assert_eq!(tags(&stream, &too_many)[0].1.split(' ').count(), 1);
    }

    #[test]
    fn cors_is_the_same_for_everyone_or_varies() {
        let cors = |asked: Option<&str>, allowed: &[&str]| {
            let mut header = ResponseHeader::build(200, None).unwrap();
            let allowed: Vec<_> = allowed.iter().map(|&o| o.to_owned()).collect();
            let asked = asked.map(|asked| HeaderValue::from_str(asked).unwrap());
            add_cors(&mut header, asked.as_ref(), &allowed).unwrap();
            let text = |name| header.headers.get(name).map(|v| v.to_str().unwrap().to_owned());
            (text(ACCESS_CONTROL_ALLOW_ORIGIN), text(VARY))
        };
        assert_eq!(cors(None, &["*"]), (Some("*".into()), None));
        assert_eq!(cors(Some("https://a"), &["*"]), (Some("*".into()), None));
        let vary = Some("origin".to_owned());
        assert_eq!(cors(Some("https://a"), &["https://a"]), (Some("https://a".into()), vary.clone()));
        assert_eq!(cors(Some("https://b"), &["https://a"]), (None, vary.clone()));
        assert_eq!(cors(None, &["https://a"]), (None, vary));
    }
}
