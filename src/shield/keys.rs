//! The key endpoint: `GET /api/hls/keys/{keyId}`.
//!
//! Raw octets (RFC 8216 §5.1). `private, max-age` rather than `no-store`: with a KEY tag per segment,
//! Chromium's own player asks again for every tag when it may not keep the key.

use http::StatusCode;
use http::header::{CACHE_CONTROL, X_CONTENT_TYPE_OPTIONS};

use super::reply::{Refusal, Reply};
use super::settings::ShieldSettings;
use crate::engine::{Engine, EngineError};
use crate::keys::KeyId;

pub(super) async fn serve(id: &str, engine: &Engine, settings: &ShieldSettings) -> Result<Reply, Refusal> {
    let id: KeyId = id.parse().map_err(|_| Refusal::NoKey)?;
    if !engine.status().ready {
        return Err(EngineError::NotReady.into());
    }
    let key = engine.key(id).await.ok_or(Refusal::NoKey)?;
    if key.revoked().is_some() {
        return Err(Refusal::KeyRevoked);
    }
    let body = key.secrets.content.expose().to_vec();
    let max_age = settings.key_max_age.as_secs();
    Ok(Reply::new(StatusCode::OK, "application/octet-stream", body)
        .with(CACHE_CONTROL, format!("private, max-age={max_age}"))
        .with(X_CONTENT_TYPE_OPTIONS, "nosniff")
        .tagged(&key.stream, &[id]))
}
