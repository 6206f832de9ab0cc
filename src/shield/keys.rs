//! The key endpoint, `GET /api/hls/keys/{keyId}`, and `…/check` behind it.
//!
//! Raw octets (RFC 8216 §5.1). `private, max-age` rather than `no-store`: with a KEY tag per segment,
//! Chromium's own player asks again for every tag when it may not keep the key. The check value shows whoever brings
//! keys to CDNs that a key is answered for, those too that wait for their promotion, and no cache may answer instead.

use std::sync::Arc;

use http::StatusCode;
use http::header::{CACHE_CONTROL, X_CONTENT_TYPE_OPTIONS};

use super::reply::{KEY, Refusal, Reply, SERVED_BY};
use super::settings::ShieldSettings;
use crate::engine::{Engine, EngineError, LiveKey};
use crate::keys::{CheckValue, KeyId, SERVED_BY_SHIELD};

pub(super) async fn serve(id: &str, engine: &Engine, settings: &ShieldSettings) -> Result<Reply, Refusal> {
    let key = find(id, engine).await?;
    let body = key.secrets.content.expose().to_vec();
    let max_age = settings.key_max_age.as_secs();
    Ok(Reply::new(StatusCode::OK, "application/octet-stream", body)
        .with(CACHE_CONTROL, format!("private, max-age={max_age}"))
        .with(X_CONTENT_TYPE_OPTIONS, "nosniff")
        .with(KEY, key.id.to_string())
        .with(SERVED_BY, SERVED_BY_SHIELD)
        .tagged(&key.stream, &[key.id]))
}

/// Answers with a key's check value, or why the key is not given out. Not even a refusal is kept: it may be asked about
/// again as soon as it holds no more.
pub(super) async fn check(id: &str, engine: &Engine) -> Reply {
    let reply = match find(id, engine).await {
        Ok(key) => {
            let value = CheckValue::of(key.id, &key.secrets.content);
            Reply::new(StatusCode::OK, "text/plain", value.to_string())
                .with(X_CONTENT_TYPE_OPTIONS, "nosniff")
                .with(SERVED_BY, SERVED_BY_SHIELD)
        }
        Err(refusal) => {
            tracing::debug!(status = %refusal.status(), key = id, %refusal, "no check value");
            Reply::from(&refusal)
        }
    };
    reply.never_kept()
}

async fn find(id: &str, engine: &Engine) -> Result<Arc<LiveKey>, Refusal> {
    let id: KeyId = id.parse().map_err(|_| Refusal::NoKey)?;
    if !engine.status().ready {
        return Err(EngineError::NotReady.into());
    }
    let key = engine.key(id).await.ok_or(Refusal::NoKey)?;
    if key.revoked().is_some() {
        return Err(Refusal::KeyRevoked);
    }
    Ok(key)
}
