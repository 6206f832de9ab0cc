//! The data plane's numbers, each with its bound.

use std::time::Duration;

use crate::hls::Mounts;

/// How the data plane behaves. `config` fills it in and documents every field.
#[derive(Debug, Clone)]
pub struct ShieldSettings {
    pub mounts: Mounts,
    /// What stands before the key ID in key URIs: `/api/hls/keys/`, or an absolute URL.
    pub key_uri_base: String,
    pub key_max_age: Duration,
    pub segment_max_age: Duration,
    /// `*`, or the web origins that may read answers.
    pub cors_origins: Vec<String>,
    pub max_playlist_bytes: usize,
    /// Memory for rewritten playlists.
    pub playlist_cache_bytes: u64,
    pub stale_if_error: Duration,
    /// For a playlist, from the request to the origin to its last byte.
    pub playlist_timeout: Duration,
    /// The same for a segment.
    pub segment_timeout: Duration,
    pub max_segment_bytes: u64,
    pub flow_cache_bytes: u64,
    pub max_filling_flows: usize,
}

#[cfg(test)]
impl ShieldSettings {
    pub(super) fn for_tests(mounts: Mounts) -> Self {
        let second = Duration::from_secs(1);
        Self {
            mounts,
            key_uri_base: "/api/hls/keys/".into(),
            key_max_age: second,
            segment_max_age: second,
            cors_origins: Vec::new(),
            max_playlist_bytes: 1 << 20,
            playlist_cache_bytes: 1 << 20,
            stale_if_error: second,
            playlist_timeout: second,
            segment_timeout: second,
            max_segment_bytes: 1 << 20,
            flow_cache_bytes: 1 << 20,
            max_filling_flows: 1,
        }
    }
}
