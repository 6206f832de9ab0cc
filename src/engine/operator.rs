//! What operators ask of the engine, and what they are answered. How it is done stands in `operate`.

use std::time::Duration;

use thiserror::Error;

use super::delivery::Incident;
use crate::keys::{
    DekId, DekVersion, IncidentId, KeyId, KeyMethod, KeyState, Ordinal, Policy, StreamId, Timestamp,
};

/// A stream as its operator describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamSpec {
    pub id: StreamId,
    /// As it was given: an absolute URL at an allowed origin.
    pub playlist_url: String,
    /// The name of the origin that it lies at.
    pub origin: String,
    /// What the stream's paths at that origin begin with.
    pub prefix: String,
    /// The path of the shield at which the playlist plays.
    pub playlist_path: String,
    pub cdn_endpoints: Vec<String>,
    pub cdn_sync_enabled: bool,
    pub policy: Policy,
    /// The call that asks for it, in the caller's names and with what it left out left out: the same call again is
    /// the same stream, whatever was filled in meanwhile. None for one of the configuration.
    pub request: Option<serde_json::Value>,
}

/// Whether a stream is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamState {
    Running,
    /// Nothing of it is served: no playlist, no segment, no key.
    Stopped,
}

/// A stream and how it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamInfo {
    pub spec: StreamSpec,
    pub state: StreamState,
    /// Declared in this node's configuration: it is changed there and not by calls.
    pub is_configured: bool,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// The newest key that was promoted.
    pub current_key: Option<KeyInfo>,
}

/// A content key and its life; never its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyInfo {
    pub id: KeyId,
    pub ordinal: Ordinal,
    pub state: KeyState,
    pub method: KeyMethod,
    pub created_at: Timestamp,
    pub activated_at: Option<Timestamp>,
    /// Why it was promoted: start, count, promotion (by time), reset, manual, revocation.
    pub activated_for: Option<String>,
    /// Who asked for its promotion, where somebody did.
    pub activated_by: Option<String>,
    pub deactivated_at: Option<Timestamp>,
    pub compromised_at: Option<Timestamp>,
    /// Who revoked it, and the reason that was given.
    pub revoked_by: Option<String>,
    pub revoked_for: Option<String>,
    pub destroyed_at: Option<Timestamp>,
}

/// What `initialize` came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Initialized {
    pub stream: StreamInfo,
    /// `false`: the same stream was there already.
    pub created: bool,
}

/// What may be changed of a stream that runs; `None` leaves a field as it is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StreamChange {
    /// With its path below the stream's prefix at the same origin.
    pub playlist: Option<(String, String)>,
    pub cdn_endpoints: Option<Vec<String>>,
    pub cdn_sync_enabled: Option<bool>,
    pub policy: Option<PolicyChange>,
}

/// A policy in place of another: refused when a third one is there, so that nobody's change undoes another's.
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyChange {
    pub from: Policy,
    pub to: Policy,
}

/// A rotation that an operator asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct ManualRotation {
    pub key: KeyInfo,
    pub previous: Option<KeyInfo>,
}

/// The data encryption key under which a stream's new content keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenewedDek {
    pub id: DekId,
    /// 1, 2, 3 … in its stream.
    pub version: DekVersion,
    /// Which key of the KMS wraps it.
    pub kek_id: String,
    pub created_at: Timestamp,
}

/// What a revocation did.
#[derive(Debug, Clone, PartialEq)]
pub struct Revocation {
    /// The keys that are compromised now.
    pub revoked: Vec<KeyInfo>,
    /// The key that takes their place, in published segments too.
    pub successor: KeyInfo,
    pub reason: String,
    pub revoked_by: String,
    pub revoked_at: Timestamp,
    /// How long segments are still served under the revoked keys to players that hold an older playlist.
    pub transition: Duration,
    /// What becomes of it at the CDNs; as it begins.
    pub incident: Incident,
}

/// What an erasure removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erased {
    pub data_encryption_keys: u64,
    pub content_keys: u64,
    pub renditions: u64,
    pub erased_at: Timestamp,
}

/// Why an operator's call is not carried out.
#[derive(Debug, Error)]
pub enum OperatorError {
    #[error("keys are not loaded yet")]
    NotReady,
    #[error("there is no stream {0}")]
    NoStream(StreamId),
    #[error("stream {id} exists with another {field}; update it, or delete it first")]
    Differs { id: StreamId, field: String },
    #[error("the path prefix {prefix:?} at origin {origin:?} belongs to stream {owner}")]
    PrefixTaken { prefix: String, origin: String, owner: StreamId },
    #[error("stream {0} is declared in the configuration of this node: change it there")]
    Configured(StreamId),
    #[error("stream {0} is stopped; initialize it again to go on")]
    Stopped(StreamId),
    #[error("the rules of stream {0} were changed meanwhile; read it, and ask again")]
    Overtaken(StreamId),
    #[error("stream {0} has emergencyRotationEnabled = false")]
    RevocationDisabled(StreamId),
    #[error("there is no incident {0}")]
    NoIncident(IncidentId),
    #[error("stream {stream} has no key {key}")]
    NoKey { stream: StreamId, key: KeyId },
    #[error("key {key} is {state}: only a key that is in use can be revoked")]
    NotRevocable { key: KeyId, state: &'static str },
    #[error("provider {provider:?} is not held: name it in kms.also; held are {held}")]
    NotHeld { provider: String, held: String },
    /// Data encryption keys are being re-wrapped, and not as was asked.
    #[error("{0}")]
    RewrapRuns(String),
    /// What a KMS said when it was asked for the caller's sake. There is no secret in it.
    #[error("{0}")]
    Kms(String),
    /// The store or the KMS failed: for the log; the caller is told that it was not done.
    #[error("{0}")]
    Failed(String),
    /// The store failed in the moment of storing, or behind it: for the log; the caller is told to look.
    #[error("{0}")]
    Unknown(String),
}
