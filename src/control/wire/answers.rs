//! What is answered.

use serde::Serialize;
use utoipa::ToSchema;

use super::cdns::{CdnSync, incident_path};
use super::names::{IvModeName, Method, OnEncryptedName, SubtitlesName, SyncPolicyName};
use super::{date_time, plain_number};
use crate::engine::{self, KeyAtCdn, KeyInfo, ManualRotation, StreamInfo, StreamState};
use crate::keys::{Policy, StreamId};

/// A stream and how it stands.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Stream {
    #[schema(examples("ch1"))]
    stream_id: String,
    /// `stopped`: nothing of it is served.
    state: State,
    /// Where its playlist lies at the origin.
    #[schema(examples("https://cdn.example.com/stream/playlist.m3u8"))]
    playlist_url: String,
    /// The path of the shield at which it plays encrypted.
    #[schema(examples("/stream/playlist.m3u8"))]
    encrypted_playlist_path: String,
    /// Everything at the origin whose path begins like this belongs to the stream.
    #[schema(examples("/stream/"))]
    path_prefix: String,
    /// The origin's name in the configuration.
    #[schema(examples("main"))]
    origin: String,
    cdn_endpoints: Vec<String>,
    config: StreamConfig,
    /// Declared in the configuration of this node: it is changed there and not by calls.
    configured: bool,
    /// The newest key that was promoted.
    #[schema(required = true)]
    current_key: Option<Key>,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
}

#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::control) enum State {
    Running,
    Stopped,
}

/// The rules of a stream.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct StreamConfig {
    /// Minutes after which a new key is promoted; 0: never by time.
    #[serde(serialize_with = "plain_number")]
    #[schema(minimum = 0, maximum = 525_600, examples(30))]
    rotation_interval: f64,
    key_method: Method,
    /// Media Segments of a rendition under one key.
    #[schema(minimum = 1, maximum = 1_000_000, examples(100))]
    segments_per_key: u32,
    cdn_sync_enabled: bool,
    /// Keys made ahead.
    #[schema(minimum = 1, maximum = 100, examples(3))]
    pre_generate_keys: u32,
    /// Whether keys may be revoked.
    emergency_rotation_enabled: bool,
    /// Seconds for which a key is kept after the last playlist that named it can have been in use.
    #[serde(serialize_with = "plain_number")]
    #[schema(minimum = 0, examples(300))]
    grace_period: f64,
    /// Segments between the live edge and a key change that time or an operator asked for.
    #[schema(minimum = 0, maximum = 100, examples(2))]
    lead_segments: u32,
    /// Seconds for which caches in front of the shield may keep a playlist.
    #[serde(serialize_with = "plain_number")]
    #[schema(minimum = 0, examples(60))]
    cdn_ttl: f64,
    /// Null under AES-256-GCM, which has none.
    #[schema(required = true)]
    iv_mode: Option<IvModeName>,
    encrypt_init_sections: bool,
    on_encrypted: OnEncryptedName,
    subtitles: SubtitlesName,
    /// Whether Multivariant Playlists name the newest key in an EXT-X-SESSION-KEY.
    session_keys: bool,
    sync_policy: SyncPolicyName,
    /// Target Durations for which segments are still served under a revoked key; 0: not at all.
    #[schema(minimum = 0, maximum = 100, examples(2))]
    revocation_transition: u32,
}

impl StreamConfig {
    fn of(policy: &Policy, cdn_sync_enabled: bool) -> Self {
        Self {
            rotation_interval: policy.rotation_interval.unwrap_or_default().as_secs_f64() / 60.0,
            key_method: policy.key_method.into(),
            segments_per_key: policy.segments_per_key,
            cdn_sync_enabled,
            pre_generate_keys: policy.pre_generate_keys,
            emergency_rotation_enabled: policy.emergency_rotation,
            grace_period: policy.grace_period.as_secs_f64(),
            lead_segments: policy.lead_segments,
            cdn_ttl: policy.cdn_ttl.as_secs_f64(),
            iv_mode: policy.key_method.has_iv_mode().then(|| policy.iv_mode.into()),
            encrypt_init_sections: policy.encrypt_init_sections,
            on_encrypted: policy.on_encrypted.into(),
            subtitles: policy.subtitles.into(),
            session_keys: policy.session_keys,
            sync_policy: policy.sync_policy.into(),
            revocation_transition: policy.revocation_transition,
        }
    }
}

impl Stream {
    pub(in crate::control) fn path(&self) -> String {
        format!("/api/hls/streams/{}", self.stream_id)
    }
}

impl From<StreamInfo> for Stream {
    fn from(info: StreamInfo) -> Self {
        let StreamInfo { spec, state, is_configured, created_at, updated_at, current_key } = info;
        Self {
            stream_id: spec.id.to_string(),
            state: match state {
                StreamState::Running => State::Running,
                StreamState::Stopped => State::Stopped,
            },
            playlist_url: spec.playlist_url,
            encrypted_playlist_path: spec.playlist_path,
            path_prefix: spec.prefix,
            origin: spec.origin,
            config: StreamConfig::of(&spec.policy, spec.cdn_sync_enabled),
            cdn_endpoints: spec.cdn_endpoints,
            configured: is_configured,
            current_key: current_key.map(Key::from),
            created_at: date_time(created_at),
            updated_at: date_time(updated_at),
        }
    }
}

/// A page of streams, in the order of their IDs.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct StreamList {
    pub(in crate::control) streams: Vec<Stream>,
    /// The `after` of the next page; null on the last.
    #[schema(required = true)]
    pub(in crate::control) next: Option<String>,
}

/// A content key and its life; never its bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Key {
    #[schema(pattern = "^[0-9a-f]{32}$", examples("5f1d3c7e9a0b4d26813e5c7f9b1d3a58"))]
    key_id: String,
    /// Its place among its stream's keys: 0, 1, 2 …
    #[schema(value_type = u64, minimum = 0, maximum = 4_294_967_295_u64)]
    ordinal: u32,
    /// After NIST SP 800-57: `pre-active`, `active`, `deactivated`, `compromised` or `destroyed`.
    #[schema(value_type = String, examples("active"))]
    state: &'static str,
    method: Method,
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime, required = true)]
    activated_at: Option<String>,
    /// Why it was promoted: start, count, promotion (by time), reset, manual, revocation.
    #[schema(required = true, examples("count"))]
    activated_for: Option<String>,
    /// Who asked for its promotion, where somebody did.
    #[schema(required = true)]
    activated_by: Option<String>,
    #[schema(format = DateTime, required = true)]
    deactivated_at: Option<String>,
    #[schema(format = DateTime, required = true)]
    compromised_at: Option<String>,
    /// Who revoked it, where it was revoked.
    #[schema(required = true)]
    revoked_by: Option<String>,
    /// The reason that was given for its revocation.
    #[schema(required = true)]
    revoked_for: Option<String>,
    #[schema(format = DateTime, required = true)]
    destroyed_at: Option<String>,
}

impl From<KeyInfo> for Key {
    fn from(info: KeyInfo) -> Self {
        Self {
            key_id: info.id.to_string(),
            ordinal: info.ordinal.0,
            state: info.state.name(),
            method: info.method.into(),
            created_at: date_time(info.created_at),
            activated_at: info.activated_at.map(date_time),
            activated_for: info.activated_for,
            activated_by: info.activated_by,
            deactivated_at: info.deactivated_at.map(date_time),
            compromised_at: info.compromised_at.map(date_time),
            revoked_by: info.revoked_by,
            revoked_for: info.revoked_for,
            destroyed_at: info.destroyed_at.map(date_time),
        }
    }
}

/// A page of keys, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct KeyList {
    pub(in crate::control) keys: Vec<Key>,
    /// The `before` of the next page; null on the last.
    #[schema(required = true, value_type = Option<u64>)]
    pub(in crate::control) next: Option<u32>,
}

/// A page of the keys that were promoted, the newest first: the history of rotations.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct RotationList {
    pub(in crate::control) rotations: Vec<Key>,
    /// The `before` of the next page; null on the last.
    #[schema(required = true, value_type = Option<u64>)]
    pub(in crate::control) next: Option<u32>,
}

/// A rotation that was asked for.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Rotation {
    stream_id: String,
    /// The key that was promoted; each rendition goes over to it a lead past its live edge.
    key: Key,
    #[schema(required = true)]
    previous_key: Option<Key>,
    cdn_sync: CdnSync,
}

impl Rotation {
    pub(in crate::control) fn of(stream: &StreamId, rotation: ManualRotation, cdns: Vec<KeyAtCdn>) -> Self {
        Self {
            stream_id: stream.to_string(),
            key: rotation.key.into(),
            previous_key: rotation.previous.map(Key::from),
            cdn_sync: CdnSync::of_key(cdns),
        }
    }
}

/// A stream's data encryption key; never its bytes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct DataKey {
    stream_id: String,
    #[schema(pattern = "^[0-9a-f]{32}$")]
    dek_id: String,
    /// 1, 2, 3 … in its stream.
    #[schema(value_type = u64, minimum = 1, maximum = 4_294_967_295_u64)]
    version: u32,
    /// Which key of the KMS wraps it.
    #[schema(examples("vault:transit/keyshield"))]
    kek_id: String,
    #[schema(format = DateTime)]
    created_at: String,
}

impl DataKey {
    pub(in crate::control) fn of(stream: &StreamId, dek: engine::RenewedDek) -> Self {
        Self {
            stream_id: stream.to_string(),
            dek_id: dek.id.to_string(),
            version: dek.version.0,
            kek_id: dek.kek_id,
            created_at: date_time(dek.created_at),
        }
    }
}

/// What a revocation did.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Revocation {
    stream_id: String,
    /// The keys that are compromised now, and refused to players.
    revoked_keys: Vec<Key>,
    /// The key that takes their place, in segments that were published too.
    successor_key: Key,
    reason: String,
    revoked_by: String,
    #[schema(format = DateTime)]
    revoked_at: String,
    /// Seconds for which segments are still served under the revoked keys, to players that hold an older
    /// playlist and the key.
    #[serde(serialize_with = "plain_number")]
    #[schema(minimum = 0)]
    transition: f64,
    /// Names what is being done at the CDNs.
    #[schema(pattern = "^[0-9a-f]{32}$")]
    incident_id: String,
    /// Where to look how far the CDNs are, until all are done.
    #[schema(examples("/api/hls/incidents/0199b2c3d4e5f60718293a4b5c6d7e8f"))]
    status_url: String,
    /// As the revocation begins.
    cdn_sync: CdnSync,
}

impl Revocation {
    pub(in crate::control) fn of(stream: &StreamId, done: engine::Revocation) -> Self {
        Self {
            stream_id: stream.to_string(),
            revoked_keys: done.revoked.into_iter().map(Key::from).collect(),
            successor_key: done.successor.into(),
            reason: done.reason,
            revoked_by: done.revoked_by,
            revoked_at: date_time(done.revoked_at),
            transition: done.transition.as_secs_f64(),
            status_url: incident_path(done.incident.id),
            cdn_sync: CdnSync::of_incident(&done.incident),
            incident_id: done.incident.id.to_string(),
        }
    }
}

/// What an erasure removed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Erasure {
    stream_id: String,
    /// Removed, and with them the way to open what was wrapped under them; backups that were made before have both.
    #[schema(minimum = 0)]
    data_encryption_keys: u64,
    #[schema(minimum = 0)]
    content_keys: u64,
    #[schema(minimum = 0)]
    renditions: u64,
    #[schema(format = DateTime)]
    erased_at: String,
}

impl Erasure {
    pub(in crate::control) fn of(stream: &StreamId, erased: engine::Erased) -> Self {
        Self {
            stream_id: stream.to_string(),
            data_encryption_keys: erased.data_encryption_keys,
            content_keys: erased.content_keys,
            renditions: erased.renditions,
            erased_at: date_time(erased.erased_at),
        }
    }
}

/// How the shield is.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub(in crate::control) struct Health {
    /// `healthy`, `degraded` (what plays goes on playing, but look) or `unhealthy`.
    #[schema(value_type = String, examples("healthy"))]
    pub(in crate::control) status: &'static str,
    pub(in crate::control) services: HealthServices,
    pub(in crate::control) metrics: HealthMetrics,
    /// What is wrong, each in a sentence; empty when all is well.
    #[schema(examples(json!(["KMS vault, key transit/keyshield: sealed: streams go on, each with 3 keys made ahead at least"])))]
    pub(in crate::control) problems: Vec<String>,
}

#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct HealthServices {
    #[schema(value_type = String, examples("operational"))]
    pub(in crate::control) hls_encryption: &'static str,
    #[schema(value_type = String, examples("operational"))]
    pub(in crate::control) key_rotation: &'static str,
    #[schema(value_type = String, examples("disabled"))]
    pub(in crate::control) cdn_sync: &'static str,
}

#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct HealthMetrics {
    #[schema(minimum = 0, examples(25))]
    pub(in crate::control) active_streams: usize,
    #[schema(minimum = 0, examples(0))]
    pub(in crate::control) overdue_rotations: usize,
    #[schema(value_type = String, examples("good"))]
    pub(in crate::control) health_status: &'static str,
}
