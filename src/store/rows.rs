//! Rows as the engine sees them, and the reading of each.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::any::AnyRow;

use super::StoreError;
use crate::keys::{
    Boundary, DekId, DekVersion, Edge, IvMode, KeyId, KeyMethod, KeyState, MediaSequenceNumber, OnEncrypted,
    Ordinal, Policy, StreamId, Subtitles, SyncPolicy, Timestamp,
};

/// Whether a stream is served, or what is left of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamState {
    Running,
    Stopped,
    /// Its keys are destroyed and its schedule is gone; the history of its keys may be there.
    Deleted,
}

impl StreamState {
    pub(super) fn name(self) -> &'static str {
        match self {
            StreamState::Running => "running",
            StreamState::Stopped => "stopped",
            StreamState::Deleted => "deleted",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [StreamState::Running, StreamState::Stopped, StreamState::Deleted]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

/// A stream as its operator described it.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamRow {
    pub id: StreamId,
    pub playlist_url: String,
    /// As players ask the shield for it.
    pub playlist_path: String,
    pub origin: String,
    pub prefix: String,
    pub cdn: CdnRow,
    pub policy: Policy,
    /// The call that began it, by its own names; none where the configuration did.
    pub request: Option<serde_json::Value>,
    pub state: StreamState,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub rev: i64,
    pub incarnation: i64,
}

#[cfg(test)]
impl StreamRow {
    /// A running stream of which only its place matters.
    pub(crate) fn for_tests(id: &str, origin: &str, prefix: &str) -> Self {
        let at = Timestamp::from_unix_millis(0);
        Self {
            id: id.parse().unwrap(),
            playlist_url: String::new(),
            playlist_path: String::new(),
            origin: origin.into(),
            prefix: prefix.into(),
            cdn: CdnRow::default(),
            policy: Policy::default(),
            request: None,
            state: StreamState::Running,
            created_at: at,
            updated_at: at,
            rev: 0,
            incarnation: 0,
        }
    }
}

/// What a stream says about CDNs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CdnRow {
    pub endpoints: Vec<String>,
    pub sync_enabled: bool,
}

/// A wrapped data encryption key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DekRow {
    pub id: DekId,
    pub version: DekVersion,
    /// Which key of the KMS wraps it.
    pub kek_id: String,
    pub wrapped: Vec<u8>,
    pub created_at: Timestamp,
}

/// A wrapped content key with its link key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRow {
    pub id: KeyId,
    pub ordinal: Ordinal,
    pub dek: DekId,
    pub method: KeyMethod,
    pub iv_mode: IvMode,
    /// Empty once the key is destroyed.
    pub wrapped: Vec<u8>,
    pub life: KeyLife,
}

/// A key's way through its states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyLife {
    pub state: KeyState,
    pub created_at: Timestamp,
    pub activated_at: Option<Timestamp>,
    /// Why it was promoted, by [`crate::keys::Reason::name`].
    pub activated_for: Option<String>,
    pub activated_by: Option<String>,
    /// Whether every rendition must go over to it.
    pub forced: bool,
    pub deactivated_at: Option<Timestamp>,
    pub compromised_at: Option<Timestamp>,
    /// Who revoked it, and the reason that was given.
    pub revoked_by: Option<String>,
    pub revoked_for: Option<String>,
    pub successor: Option<Ordinal>,
    pub transition_until: Option<Timestamp>,
    pub destroyed_at: Option<Timestamp>,
    pub last_named_at: Option<Timestamp>,
}

impl KeyLife {
    pub fn pre_active(created_at: Timestamp) -> Self {
        Self {
            state: KeyState::PreActive,
            created_at,
            activated_at: None,
            activated_for: None,
            activated_by: None,
            forced: false,
            deactivated_at: None,
            compromised_at: None,
            revoked_by: None,
            revoked_for: None,
            successor: None,
            transition_until: None,
            destroyed_at: None,
            last_named_at: None,
        }
    }
}

/// A boundary with its place in its rendition's list and the window that it was planned from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundaryRow {
    pub rendition: String,
    pub seq: usize,
    pub boundary: Boundary,
    pub edge: Edge,
}

/// What nodes tell one another, and a restart, of a rendition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenditionRow {
    pub rendition: String,
    pub ended: bool,
    pub keeps_all: bool,
    pub target_duration: Duration,
    pub longest_playlist: Duration,
    /// The newest window that was served.
    pub epoch: u32,
    pub edge: Edge,
    pub last_served_at: Timestamp,
}

/// All that a node must know of one stream.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredStream {
    pub stream: StreamRow,
    /// In the order of their versions.
    pub deks: Vec<DekRow>,
    /// Those that are not destroyed, in the order of their ordinals.
    pub keys: Vec<KeyRow>,
    /// One past the highest ordinal that was ever made.
    pub next_ordinal: Ordinal,
    /// By rendition, then in order.
    pub boundaries: Vec<BoundaryRow>,
    pub renditions: Vec<RenditionRow>,
}

pub(super) fn unreadable(what: &'static str, value: impl ToString) -> StoreError {
    StoreError::Unreadable { what, value: value.to_string() }
}

pub(super) fn unsigned<T: TryFrom<i64>>(row: &AnyRow, column: &'static str) -> Result<T, StoreError> {
    let value: i64 = row.try_get(column)?;
    T::try_from(value).map_err(|_| unreadable(column, value))
}

fn flag(row: &AnyRow, column: &'static str) -> Result<bool, StoreError> {
    Ok(row.try_get::<i64, _>(column)? != 0)
}

pub(super) fn time(row: &AnyRow, column: &'static str) -> Result<Timestamp, StoreError> {
    Ok(Timestamp::from_unix_millis(row.try_get(column)?))
}

pub(super) fn optional_time(row: &AnyRow, column: &'static str) -> Result<Option<Timestamp>, StoreError> {
    Ok(row.try_get::<Option<i64>, _>(column)?.map(Timestamp::from_unix_millis))
}

fn millis(row: &AnyRow, column: &'static str) -> Result<Duration, StoreError> {
    unsigned(row, column).map(Duration::from_millis)
}

fn msn(row: &AnyRow, column: &'static str) -> Result<MediaSequenceNumber, StoreError> {
    unsigned(row, column).map(MediaSequenceNumber)
}

pub(super) fn parsed<T: std::str::FromStr>(row: &AnyRow, column: &'static str) -> Result<T, StoreError> {
    let text: String = row.try_get(column)?;
    text.parse().map_err(|_| unreadable(column, text))
}

pub(super) fn named<T>(
    row: &AnyRow,
    column: &'static str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<T, StoreError> {
    let text: String = row.try_get(column)?;
    read(&text).ok_or_else(|| unreadable(column, text))
}

/// A policy as the store keeps it: every field by its name and unit, so that a later version reads it.
#[derive(Serialize, Deserialize)]
struct StoredPolicy {
    key_method: String,
    rotation_interval_millis: u64,
    segments_per_key: u32,
    pre_generate_keys: u32,
    grace_period_millis: u64,
    lead_segments: u32,
    cdn_ttl_millis: u64,
    iv_mode: String,
    encrypt_init_sections: bool,
    emergency_rotation: bool,
    revocation_transition: u32,
    // Rows of before have none of these. What such a stream did it goes on doing, whatever the defaults become.
    #[serde(default = "reject")]
    on_encrypted: String,
    #[serde(default = "encrypt")]
    subtitles: String,
    #[serde(default)]
    session_keys: bool,
    #[serde(default = "all")]
    sync_policy: String,
}

fn reject() -> String {
    OnEncrypted::Reject.name().into()
}

fn encrypt() -> String {
    Subtitles::Encrypt.name().into()
}

fn all() -> String {
    SyncPolicy::All.name().into()
}

pub(super) fn policy_to_json(policy: &Policy) -> String {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let stored = StoredPolicy {
        key_method: policy.key_method.name().into(),
        rotation_interval_millis: policy.rotation_interval.map_or(0, millis),
        segments_per_key: policy.segments_per_key,
        pre_generate_keys: policy.pre_generate_keys,
        grace_period_millis: millis(policy.grace_period),
        lead_segments: policy.lead_segments,
        cdn_ttl_millis: millis(policy.cdn_ttl),
        iv_mode: policy.iv_mode.name().into(),
        encrypt_init_sections: policy.encrypt_init_sections,
        emergency_rotation: policy.emergency_rotation,
        revocation_transition: policy.revocation_transition,
        on_encrypted: policy.on_encrypted.name().into(),
        subtitles: policy.subtitles.name().into(),
        session_keys: policy.session_keys,
        sync_policy: policy.sync_policy.name().into(),
    };
    json(&stored)
}

/// For values of ours, which have nothing that JSON could not hold.
pub(super) fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("rows have string keys and finite numbers")
}

fn policy_from_json(text: &str) -> Option<Policy> {
    let stored: StoredPolicy = serde_json::from_str(text).ok()?;
    let interval = Duration::from_millis(stored.rotation_interval_millis);
    let policy = Policy {
        key_method: KeyMethod::from_name(&stored.key_method)?,
        rotation_interval: Some(interval).filter(|interval| !interval.is_zero()),
        segments_per_key: stored.segments_per_key,
        pre_generate_keys: stored.pre_generate_keys,
        grace_period: Duration::from_millis(stored.grace_period_millis),
        lead_segments: stored.lead_segments,
        cdn_ttl: Duration::from_millis(stored.cdn_ttl_millis),
        iv_mode: IvMode::from_name(&stored.iv_mode)?,
        encrypt_init_sections: stored.encrypt_init_sections,
        on_encrypted: OnEncrypted::from_name(&stored.on_encrypted)?,
        subtitles: Subtitles::from_name(&stored.subtitles)?,
        session_keys: stored.session_keys,
        sync_policy: SyncPolicy::from_name(&stored.sync_policy)?,
        emergency_rotation: stored.emergency_rotation,
        revocation_transition: stored.revocation_transition,
    };
    policy.checked().ok()
}

impl StreamRow {
    pub(super) fn read(row: &AnyRow) -> Result<Self, StoreError> {
        let from_json = |text: &str| serde_json::from_str(text).ok();
        let request = row.try_get::<Option<String>, _>("request")?;
        let request =
            request.map(|text| serde_json::from_str(&text).map_err(|_| unreadable("request", text)));
        Ok(Self {
            id: parsed(row, "id")?,
            playlist_url: row.try_get("playlist_url")?,
            playlist_path: row.try_get("playlist_path")?,
            origin: row.try_get("origin")?,
            prefix: row.try_get("prefix")?,
            cdn: named(row, "cdn", from_json)?,
            policy: named(row, "policy", policy_from_json)?,
            request: request.transpose()?,
            state: named(row, "state", StreamState::from_name)?,
            created_at: time(row, "created_at")?,
            updated_at: time(row, "updated_at")?,
            rev: row.try_get("rev")?,
            incarnation: row.try_get("incarnation")?,
        })
    }
}

impl DekRow {
    pub(super) fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            id: parsed(row, "id")?,
            version: DekVersion(unsigned(row, "version")?),
            kek_id: row.try_get("kek_id")?,
            wrapped: row.try_get("wrapped")?,
            created_at: time(row, "created_at")?,
        })
    }
}

impl KeyRow {
    pub(super) fn read(row: &AnyRow) -> Result<Self, StoreError> {
        let successor: Option<i64> = row.try_get("successor")?;
        Ok(Self {
            id: parsed(row, "id")?,
            ordinal: Ordinal(unsigned(row, "ordinal")?),
            dek: parsed(row, "dek_id")?,
            method: named(row, "method", KeyMethod::from_name)?,
            iv_mode: named(row, "iv_mode", IvMode::from_name)?,
            wrapped: row.try_get("wrapped")?,
            life: KeyLife {
                state: named(row, "state", KeyState::from_name)?,
                created_at: time(row, "created_at")?,
                activated_at: optional_time(row, "activated_at")?,
                activated_for: row.try_get("activated_for")?,
                activated_by: row.try_get("activated_by")?,
                forced: flag(row, "forced")?,
                deactivated_at: optional_time(row, "deactivated_at")?,
                compromised_at: optional_time(row, "compromised_at")?,
                revoked_by: row.try_get("revoked_by")?,
                revoked_for: row.try_get("revoked_for")?,
                successor: successor.and_then(|ordinal| u32::try_from(ordinal).ok()).map(Ordinal),
                transition_until: optional_time(row, "transition_until")?,
                destroyed_at: optional_time(row, "destroyed_at")?,
                last_named_at: optional_time(row, "last_named_at")?,
            },
        })
    }
}

impl BoundaryRow {
    pub(super) fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            rendition: row.try_get("rendition")?,
            seq: unsigned(row, "seq")?,
            boundary: Boundary {
                epoch: unsigned(row, "epoch")?,
                ordinal: Ordinal(unsigned(row, "ordinal")?),
                first: msn(row, "first_msn")?,
                segments: unsigned(row, "segments")?,
            },
            edge: Edge { first: msn(row, "edge_first")?, end: msn(row, "edge_end")? },
        })
    }
}

impl RenditionRow {
    pub(super) fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            rendition: row.try_get("rendition")?,
            ended: flag(row, "ended")?,
            keeps_all: flag(row, "keeps_all")?,
            target_duration: millis(row, "target_millis")?,
            longest_playlist: millis(row, "longest_millis")?,
            epoch: unsigned(row, "epoch")?,
            edge: Edge { first: msn(row, "edge_first")?, end: msn(row, "edge_end")? },
            last_served_at: time(row, "last_served_at")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_as_it_was_written() {
        let policy = Policy {
            key_method: KeyMethod::Aes256Gcm,
            rotation_interval: None,
            encrypt_init_sections: true,
            on_encrypted: OnEncrypted::Rekey,
            subtitles: Subtitles::Clear,
            session_keys: true,
            sync_policy: SyncPolicy::Quorum,
            ..Policy::default()
        };
        assert_eq!(policy_from_json(&policy_to_json(&policy)), Some(policy));
        let default = Policy::default();
        assert_eq!(policy_from_json(&policy_to_json(&default)), Some(default));
    }

    #[test]
    fn a_policy_of_before_there_were_these_rules_is_read() {
        let stored = r#"{"key_method":"AES-256","rotation_interval_millis":0,"segments_per_key":7,
            "pre_generate_keys":3,"grace_period_millis":300000,"lead_segments":2,"cdn_ttl_millis":60000,
            "iv_mode":"period","encrypt_init_sections":true,"emergency_rotation":true,"revocation_transition":2}"#;
        let expected = Policy {
            key_method: KeyMethod::Aes256,
            rotation_interval: None,
            segments_per_key: 7,
            iv_mode: IvMode::Period,
            encrypt_init_sections: true,
            on_encrypted: OnEncrypted::Reject,
            subtitles: Subtitles::Encrypt,
            session_keys: false,
            sync_policy: SyncPolicy::All,
            ..Policy::default()
        };
        assert_eq!(policy_from_json(stored), Some(expected));
    }

    #[test]
    fn a_policy_that_cannot_be_is_unreadable() {
        let default = policy_to_json(&Policy::default());
        for (from, to) in [
            ("\"AES-128\"", "\"DES\""),
            ("\"reject\"", "\"ignore\""),
            ("\"encrypt\"", "\"\""),
            ("\"all\"", "\"most\""),
            ("\"session_keys\":false", "\"session_keys\":0"),
            ("\"segments_per_key\":100", "\"segments_per_key\":0"),
        ] {
            let damaged = default.replace(from, to);
            assert_ne!(damaged, default, "{from}");
            assert_eq!(policy_from_json(&damaged), None, "{to}");
        }
    }
}
