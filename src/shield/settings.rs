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
