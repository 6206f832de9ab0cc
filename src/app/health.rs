//! `keyshield health`: asks a running shield how it is. What a container's health check calls.

use anyhow::{Context, bail};

use super::inspect::fetch_url;

/// The health endpoint's JSON.
///
/// # Errors
/// A control plane that cannot be reached, or that says it is unhealthy.
pub async fn health(control_url: &str) -> anyhow::Result<String> {
    let url = format!("{}/api/hls/health", control_url.trim_end_matches('/'));
    let (status, body) = fetch_url(&url, 64 << 10).await.context("the control plane does not answer")?;
    let text = String::from_utf8_lossy(&body).into_owned();
    if !status.is_success() {
        bail!("{text}");
    }
    Ok(text)
}
