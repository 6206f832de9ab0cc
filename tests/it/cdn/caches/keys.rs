//! The least edge that serves keys in push mode: opens what the agent holds, and answers as the shield does.
//!
//! The check value is computed here by the words of `keys/edge.rs`, not by its code. A viewer's token is asked for where a
//! key's URI has one: that the other edges insist on it is tested with them.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::response::{IntoResponse, Response};
use hmac::{Hmac, KeyInit, Mac};
use http::StatusCode;
use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE};
use keyshield::keys::{
    EdgeSecret, KeyId, SealedKey, StreamId, Timestamp, TokenScope, open_at_edge, viewer_token,
};
use parking_lot::Mutex;
use sha2::Sha256;

/// As the shield's.
const KEY_MAX_AGE_SECS: u64 = 300;

type Stored = Mutex<BTreeMap<String, String>>;

/// What became of opening a key.
pub enum Opened {
    Key(Vec<u8>),
    Missing,
    /// It cannot be opened here.
    Sealed,
}

fn open_with_stream(
    stored: &Stored,
    secret: Option<&EdgeSecret>,
    key: KeyId,
) -> Result<(StreamId, Vec<u8>), Opened> {
    let text = stored.lock().get(&key.to_string()).cloned().ok_or(Opened::Missing)?;
    let opened = secret.and_then(|secret| open_at_edge(secret, &SealedKey { key, text }).ok());
    opened.map(|(stream, bytes)| (stream, bytes.to_vec())).ok_or(Opened::Sealed)
}

pub fn open(stored: &Stored, secret: Option<&EdgeSecret>, key: KeyId) -> Opened {
    open_with_stream(stored, secret, key).map_or_else(|why| why, |(_, key)| Opened::Key(key))
}

/// 64 bits of HMAC-SHA-256 under the key's hex text over "keyshield check {key ID}".
pub fn check_value(id: KeyId, key: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(hex::encode(key).as_bytes()).unwrap();
    mac.update(format!("keyshield check {id}").as_bytes());
    hex::encode(&mac.finalize().into_bytes()[..8])
}

/// What goes with every answer.
fn from_edge(answer: impl IntoResponse) -> Response {
    let headers = [("keyshield-served-by", "edge"), (ACCESS_CONTROL_ALLOW_ORIGIN.as_str(), "*")];
    (headers, answer).into_response()
}

fn refusal(why: Opened) -> Response {
    let status = match why {
        Opened::Missing => StatusCode::NOT_FOUND,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    from_edge((status, [(CACHE_CONTROL, "no-store")]))
}

/// `GET /api/hls/keys/{key}`
pub fn answer(stored: &Stored, secret: Option<&EdgeSecret>, key: &str, query: Option<&str>) -> Response {
    let Ok(id) = key.parse() else { return refusal(Opened::Missing) };
    let (stream, key) = match open_with_stream(stored, secret, id) {
        Ok(opened) => opened,
        Err(why) => return refusal(why),
    };
    let token =
        query.into_iter().flat_map(|query| query.split('&')).find_map(|part| part.strip_prefix("token="));
    if token.is_some_and(|token| !is_good(token, secret, &stream)) {
        return from_edge((StatusCode::FORBIDDEN, [(CACHE_CONTROL, "no-store")]));
    }
    let tags = format!("keyshield-stream-{stream} keyshield-key-{id}");
    let headers = [
        (CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (CACHE_CONTROL.as_str(), format!("private, max-age={KEY_MAX_AGE_SECS}")),
        ("keyshield-key", id.to_string()),
        ("surrogate-key", tags),
    ];
    from_edge((headers, key))
}

/// `GET /api/hls/keys/{key}/check`
pub fn answer_check(stored: &Stored, secret: Option<&EdgeSecret>, key: &str) -> Response {
    let Ok(id) = key.parse() else { return refusal(Opened::Missing) };
    match open(stored, secret, id) {
        Opened::Key(key) => from_edge(([(CACHE_CONTROL, "no-store")], check_value(id, &key))),
        why => refusal(why),
    }
}

fn is_good(token: &str, secret: Option<&EdgeSecret>, stream: &StreamId) -> bool {
    let mut parts = token.split('~');
    let expires = parts.next().and_then(|secs| secs.parse::<u64>().ok());
    let scope = match parts.next() {
        Some("*") => TokenScope::AllStreams,
        _ => TokenScope::Stream(stream.clone()),
    };
    let (Some(expires), Some(secret)) = (expires, secret) else { return false };
    let until = i64::try_from(expires).unwrap_or(i64::MAX / 1_000).saturating_mul(1_000);
    UNIX_EPOCH.checked_add(Duration::from_secs(expires)).is_some_and(|until| until > now())
        && viewer_token(secret, &scope, Timestamp::from_unix_millis(until)) == token
}

#[expect(clippy::disallowed_methods, reason = "an edge is not the product: its clock is the machine's")]
fn now() -> SystemTime {
    SystemTime::now()
}
