//! Names that stand in requests and in answers alike.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::keys::{IvMode, KeyMethod, OnEncrypted, Subtitles, SyncPolicy};

/// AES-128: every player. AES-256 (CBC, not in the specification): hls.js and Shaka Player. AES-256-GCM: Shaka
/// Player 5.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = KeyMethod)]
pub(in crate::control) enum Method {
    #[serde(rename = "AES-128")]
    Aes128,
    #[serde(rename = "AES-256")]
    Aes256,
    #[serde(rename = "AES-256-GCM")]
    Aes256Gcm,
}

impl From<KeyMethod> for Method {
    fn from(method: KeyMethod) -> Self {
        match method {
            KeyMethod::Aes128 => Method::Aes128,
            KeyMethod::Aes256 => Method::Aes256,
            KeyMethod::Aes256Gcm => Method::Aes256Gcm,
        }
    }
}

impl From<Method> for KeyMethod {
    fn from(method: Method) -> Self {
        match method {
            Method::Aes128 => KeyMethod::Aes128,
            Method::Aes256 => KeyMethod::Aes256,
            Method::Aes256Gcm => KeyMethod::Aes256Gcm,
        }
    }
}

/// An IV of its own for each segment, one for each key, or the Media Sequence Number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = IvMode)]
pub(in crate::control) enum IvModeName {
    Segment,
    Period,
    Sequence,
}

impl From<IvMode> for IvModeName {
    fn from(mode: IvMode) -> Self {
        match mode {
            IvMode::Segment => IvModeName::Segment,
            IvMode::Period => IvModeName::Period,
            IvMode::Sequence => IvModeName::Sequence,
        }
    }
}

impl From<IvModeName> for IvMode {
    fn from(mode: IvModeName) -> Self {
        match mode {
            IvModeName::Segment => IvMode::Segment,
            IvModeName::Period => IvMode::Period,
            IvModeName::Sequence => IvMode::Sequence,
        }
    }
}

/// What the origin has encrypted already is refused, served as it is under the origin's keys, or decrypted by the
/// origin's keys and encrypted anew.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = OnEncrypted)]
pub(in crate::control) enum OnEncryptedName {
    Reject,
    Pass,
    Rekey,
}

impl From<OnEncrypted> for OnEncryptedName {
    fn from(treatment: OnEncrypted) -> Self {
        match treatment {
            OnEncrypted::Reject => OnEncryptedName::Reject,
            OnEncrypted::Pass => OnEncryptedName::Pass,
            OnEncrypted::Rekey => OnEncryptedName::Rekey,
        }
    }
}

impl From<OnEncryptedName> for OnEncrypted {
    fn from(treatment: OnEncryptedName) -> Self {
        match treatment {
            OnEncryptedName::Reject => OnEncrypted::Reject,
            OnEncryptedName::Pass => OnEncrypted::Pass,
            OnEncryptedName::Rekey => OnEncrypted::Rekey,
        }
    }
}

/// Renditions in WebVTT are encrypted as all others, or served in clear for players that do not decrypt text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = Subtitles)]
pub(in crate::control) enum SubtitlesName {
    Encrypt,
    Clear,
}

impl From<Subtitles> for SubtitlesName {
    fn from(treatment: Subtitles) -> Self {
        match treatment {
            Subtitles::Encrypt => SubtitlesName::Encrypt,
            Subtitles::Clear => SubtitlesName::Clear,
        }
    }
}

impl From<SubtitlesName> for Subtitles {
    fn from(treatment: SubtitlesName) -> Self {
        match treatment {
            SubtitlesName::Encrypt => Subtitles::Encrypt,
            SubtitlesName::Clear => Subtitles::Clear,
        }
    }
}

/// Which CDNs must have a stream's next key before it takes its turn: every one, more than half, or none.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[schema(as = SyncPolicy)]
pub(in crate::control) enum SyncPolicyName {
    All,
    Quorum,
    BestEffort,
}

impl From<SyncPolicy> for SyncPolicyName {
    fn from(policy: SyncPolicy) -> Self {
        match policy {
            SyncPolicy::All => SyncPolicyName::All,
            SyncPolicy::Quorum => SyncPolicyName::Quorum,
            SyncPolicy::BestEffort => SyncPolicyName::BestEffort,
        }
    }
}

impl From<SyncPolicyName> for SyncPolicy {
    fn from(policy: SyncPolicyName) -> Self {
        match policy {
            SyncPolicyName::All => SyncPolicy::All,
            SyncPolicyName::Quorum => SyncPolicy::Quorum,
            SyncPolicyName::BestEffort => SyncPolicy::BestEffort,
        }
    }
}
