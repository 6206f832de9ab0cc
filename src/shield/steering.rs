//! Steering manifests (D22 §7): small, and fetched anew for whoever asks.
//!
//! A steering server decides by what players tell it in `_HLS_pathway` and `_HLS_throughput`, so these go on to the
//! origin, and nothing is kept.

use http::StatusCode;
use http::header::CACHE_CONTROL;

use super::reply::{Refusal, Reply};
use super::segments::{Signer, check};
use super::service::Shield;
use super::upstream::OriginRequest;
use crate::engine::EngineError;
use crate::hls::{LinkedPath, OriginPath, Surroundings, VariableSources, rewrite_steering};
use crate::keys::OnEncrypted;

const MAX_BYTES: usize = 65_536;

/// Answers a request for a steering manifest.
///
/// # Errors
/// [`Refusal`] for a link that the shield did not write, and what is no steering manifest.
pub(super) async fn serve(shield: &Shield, linked: &LinkedPath, query: &str) -> Result<Reply, Refusal> {
    let checked = check(shield, linked, query).await?;
    let Signer::Clear(signer) = &checked.signer else { return Err(Refusal::ForgedLink) };
    let told = query.split('&').filter(|part| part.starts_with("_HLS_"));
    let query: Vec<&str> = checked.origin_query.iter().map(String::as_str).chain(told).collect();
    let query = query.join("&");
    let request = OriginRequest {
        query: (!query.is_empty()).then_some(query.as_str()),
        ..OriginRequest::to(checked.mount, &checked.path)
    };
    let asked = async { shield.upstream.fetch(request).await?.ok()?.framed()?.body(MAX_BYTES).await };
    let body = tokio::time::timeout(shield.settings.playlist_timeout, asked).await;
    let body = body.map_err(|_| Refusal::Engine(EngineError::Busy))??;
    let manifest = rewrite_steering(
        &body,
        &Surroundings {
            mounts: &shield.settings.mounts,
            from: &OriginPath { mount: checked.mount, path: checked.path.clone(), query: None },
            is_protected: &|to| shield.owner(to).is_some(),
            on_encrypted: OnEncrypted::Reject,
            variables: VariableSources::default(),
            key_uri_base: &shield.settings.key_uri_base,
            clear: (signer.dek, &signer.link),
        },
    )?;
    Ok(Reply::new(StatusCode::OK, "application/json", manifest)
        .with(CACHE_CONTROL, "no-store")
        .tagged(&signer.stream, &[]))
}
