//! Whether there is HLS at an origin: asked by the control API, answered by whoever can fetch.

use async_trait::async_trait;

use crate::hls::OriginPath;

/// Looks at a playlist before its stream begins, so that a mistyped URL is an error of the call that brought it
/// and not of the first player.
#[async_trait]
pub trait OriginProbe: Send + Sync {
    /// # Errors
    /// Why it is not: for the operator to read.
    async fn probe(&self, place: &OriginPath<'_>) -> Result<(), String>;
}
