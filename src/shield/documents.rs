//! What Multivariant Playlists name and is neither a playlist nor media: session data and steering manifests.
//!
//! Small, and not kept here: session data may change at any time, and a steering server decides by what a player tells
//! it in `_HLS_pathway` and `_HLS_throughput` (D22 §7), which go on to the origin for that.

use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};

use super::publish::STEADY_TTL;
use super::reply::{Refusal, Reply};
use super::segments::{Signer, check};
use super::service::Shield;
use super::upstream::{OriginError, OriginRequest};
use crate::hls::{LinkedPath, OriginPath, Surroundings, VariableSources, rewrite_steering};
use crate::keys::{OnEncrypted, Place};

const MAX_BYTES: usize = 1 << 20;

/// Answers a request for session data or a steering manifest.
///
/// # Errors
/// [`Refusal`] for a link that the shield did not write, and what is no steering manifest where one is asked for.
pub(super) async fn serve(shield: &Shield, linked: &LinkedPath, query: &str) -> Result<Reply, Refusal> {
    let checked = check(shield, linked, query).await?;
    let Signer::Clear(signer) = &checked.signer else { return Err(Refusal::ForgedLink) };
    let is_steering = linked.link.place == Place::Steering;
    let told = query.split('&').filter(|part| is_steering && part.starts_with("_HLS_"));
    let query: Vec<&str> = checked.origin_query.iter().map(String::as_str).chain(told).collect();
    let query = query.join("&");
    let request = OriginRequest {
        query: (!query.is_empty()).then_some(query.as_str()),
        ..OriginRequest::to(checked.mount, &checked.path)
    };
    let asked = async {
        let mut response = shield.upstream.fetch(request).await?.ok()?.framed()?;
        let content_type = response.header_text(CONTENT_TYPE).unwrap_or("application/json").to_owned();
        Ok::<_, OriginError>((content_type, response.body(MAX_BYTES).await?))
    };
    let asked = tokio::time::timeout(shield.settings.playlist_timeout, asked).await;
    let (content_type, body) = asked.unwrap_or_else(|_| Err(OriginError::out_of_time(checked.mount)))?;
    let reply = if is_steering {
        let around = Surroundings {
            mounts: &shield.settings.mounts,
            from: &OriginPath { mount: checked.mount, path: checked.path.clone(), query: None },
            is_protected: &|to| shield.owner(to).is_some(),
            on_encrypted: OnEncrypted::Reject,
            variables: VariableSources::default(),
            key_uri_base: &shield.settings.key_uri_base,
            clear: (signer.dek, &signer.link),
        };
        let manifest = rewrite_steering(&body, &around)?;
        Reply::new(StatusCode::OK, "application/json", manifest).with(CACHE_CONTROL, "no-store")
    } else {
        let max_age = STEADY_TTL.as_secs();
        Reply::new(StatusCode::OK, &content_type, body)
            .with(CACHE_CONTROL, format!("public, max-age={max_age}"))
    };
    Ok(reply.tagged(&signer.stream, &[]))
}
