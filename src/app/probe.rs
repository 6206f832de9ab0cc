//! Whether there is HLS at an origin, by the data plane's own way of fetching.

use std::time::Duration;

use async_trait::async_trait;

use crate::config::Config;
use crate::control::OriginProbe;
use crate::hls::{Kind, OriginPath, Playlist};
use crate::shield::upstream::{OriginError, Upstream};
use crate::shield::{PlaylistBodyError, playlist_body};

/// Fetches a playlist and reads it, within the bounds of the configuration.
pub(super) struct UpstreamProbe {
    upstream: Upstream,
    max_bytes: usize,
    timeout: Duration,
}

impl UpstreamProbe {
    pub(super) fn new(upstream: Upstream, config: &Config) -> Self {
        Self { upstream, max_bytes: config.max_playlist_bytes, timeout: config.playlist_timeout }
    }
}

#[async_trait]
impl OriginProbe for UpstreamProbe {
    async fn probe(&self, place: &OriginPath<'_>) -> Result<(), String> {
        let fetched = tokio::time::timeout(
            self.timeout,
            playlist_body(&self.upstream, place, self.max_bytes, Duration::ZERO),
        );
        let body = fetched.await.map_err(|_| "timed out".to_owned())?.map_err(|error| reason(&error))?;
        let playlist = Playlist::parse(&body).map_err(|error| error.to_string())?;
        if playlist.kind() == Kind::Media {
            playlist.media_facts().map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// For operators, who know the origins: shorter than the log's words, and with the redirect explained.
fn reason(error: &PlaylistBodyError) -> String {
    match error {
        PlaylistBodyError::Origin(OriginError::Status { status, .. }) if status.is_redirection() => {
            format!("the origin answered {} (redirects are not followed)", status.as_u16())
        }
        PlaylistBodyError::Origin(OriginError::Status { status, .. }) => {
            format!("the origin answered {}", status.as_u16())
        }
        PlaylistBodyError::Origin(OriginError::TimedOut { .. }) => "timed out".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    #[test]
    fn reasons_are_short_and_say_what_to_look_at() {
        let status =
            |status| PlaylistBodyError::Origin(OriginError::Status { origin: "main".into(), status });
        assert_eq!(reason(&status(StatusCode::NOT_FOUND)), "the origin answered 404");
        assert!(reason(&status(StatusCode::FOUND)).contains("302 (redirects are not followed)"));
        let slow = OriginError::TimedOut { origin: "main".into(), address: "http://a".into() };
        assert_eq!(reason(&PlaylistBodyError::Origin(slow)), "timed out");
        let html = PlaylistBodyError::NotAPlaylist { head: "<html".into() };
        assert_eq!(reason(&html), "not a playlist: begins with <html");
    }
}
