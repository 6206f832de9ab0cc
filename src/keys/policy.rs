//! How a stream's keys are to be made, changed and kept.
//!
//! The defaults are the guide's: a new key every 30 minutes or 100 segments, AES-128, 3 keys made ahead,
//! 300 seconds of grace. A `Policy` has been checked: code that holds one need not doubt its numbers.

use std::time::Duration;

use thiserror::Error;

use super::derive::IvMode;

/// The METHOD of EXT-X-KEY (draft-pantos-hls-rfc8216bis-22 §4.4.4.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeyMethod {
    /// AES-128-CBC. Every player takes it.
    #[default]
    Aes128,
    /// AES-256-CBC, an extension that hls.js and Shaka Player take; not in the specification.
    Aes256,
    /// Authenticated: a segment is its IV, the ciphertext and the tag, 16 bytes more on each side (§5.1), so
    /// EXT-X-KEY must not have an IV (§4.4.4.4). Shaka Player 5 takes it.
    Aes256Gcm,
}

/// What is wrong with an [`IvMode`] that is given to a method without one, wherever it is given.
pub const NO_IV_MODE: &str = "must be left out with AES-256-GCM, whose segments carry their own IVs";

impl KeyMethod {
    pub const ALL: [KeyMethod; 3] = [KeyMethod::Aes128, KeyMethod::Aes256, KeyMethod::Aes256Gcm];

    /// In bytes.
    pub fn key_len(self) -> usize {
        match self {
            KeyMethod::Aes128 => 16,
            KeyMethod::Aes256 | KeyMethod::Aes256Gcm => 32,
        }
    }

    /// Whether playlists show IVs under it, so that there is a choice of how they come about.
    pub fn has_iv_mode(self) -> bool {
        match self {
            KeyMethod::Aes128 | KeyMethod::Aes256 => true,
            KeyMethod::Aes256Gcm => false,
        }
    }

    /// The name in EXT-X-KEY and in the API's `keyMethod`.
    pub fn name(self) -> &'static str {
        match self {
            KeyMethod::Aes128 => "AES-128",
            KeyMethod::Aes256 => "AES-256",
            KeyMethod::Aes256Gcm => "AES-256-GCM",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }
}

/// What becomes of a playlist whose segments the origin has encrypted already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnEncrypted {
    /// It is refused: whoever expects a clear origin learns that it is none.
    #[default]
    Reject,
    /// Its segments are served as they are, under the origin's keys.
    Pass,
    /// Its segments are decrypted by the origin's keys, and encrypted anew under the stream's.
    Rekey,
}

impl OnEncrypted {
    pub const ALL: [OnEncrypted; 3] = [OnEncrypted::Reject, OnEncrypted::Pass, OnEncrypted::Rekey];

    /// Its name in the configuration, the API and the store.
    pub fn name(self) -> &'static str {
        match self {
            OnEncrypted::Reject => "reject",
            OnEncrypted::Pass => "pass",
            OnEncrypted::Rekey => "rekey",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|treatment| treatment.name() == name)
    }
}

/// What becomes of renditions in WebVTT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Subtitles {
    /// They are encrypted as all others are.
    #[default]
    Encrypt,
    /// They are served as they are, for players that do not decrypt text.
    Clear,
}

impl Subtitles {
    pub const ALL: [Subtitles; 2] = [Subtitles::Encrypt, Subtitles::Clear];

    /// Its name in the configuration, the API and the store.
    pub fn name(self) -> &'static str {
        match self {
            Subtitles::Encrypt => "encrypt",
            Subtitles::Clear => "clear",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|treatment| treatment.name() == name)
    }
}

/// Which CDNs must have a stream's next key before it takes its turn. An overdue rotation waits for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncPolicy {
    /// Every one.
    #[default]
    All,
    /// More than half.
    Quorum,
    /// None: it takes its turn, and goes to each as soon as it can.
    BestEffort,
}

impl SyncPolicy {
    pub const ALL: [SyncPolicy; 3] = [SyncPolicy::All, SyncPolicy::Quorum, SyncPolicy::BestEffort];

    /// Its name in the configuration, the API and the store.
    pub fn name(self) -> &'static str {
        match self {
            SyncPolicy::All => "all",
            SyncPolicy::Quorum => "quorum",
            SyncPolicy::BestEffort => "best-effort",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// A stream's rules. Build one from [`Policy::default`] and check it with [`Policy::checked`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub key_method: KeyMethod,
    /// How long a key may be the newest before the next is promoted. `None`: no time trigger.
    pub rotation_interval: Option<Duration>,
    /// Media Segments of one rendition under one key.
    pub segments_per_key: u32,
    /// Keys that wait, made and stored, for their promotion.
    pub pre_generate_keys: u32,
    /// How long a key is kept after the last playlist that named it can have been in use.
    pub grace_period: Duration,
    /// Segments between the live edge and a boundary that time or an operator asked for.
    pub lead_segments: u32,
    /// How long caches in front of the shield may keep a playlist.
    pub cdn_ttl: Duration,
    /// The default under a method that has none ([`KeyMethod::has_iv_mode`]).
    pub iv_mode: IvMode,
    pub encrypt_init_sections: bool,
    pub on_encrypted: OnEncrypted,
    pub subtitles: Subtitles,
    /// Whether Multivariant Playlists name the stream's newest key in an EXT-X-SESSION-KEY, for players to load
    /// before they have a Media Playlist (draft-pantos-hls-rfc8216bis-22 §4.4.6.5).
    pub session_keys: bool,
    /// Which CDNs must have the next key before it takes its turn.
    pub sync_policy: SyncPolicy,
    /// Whether an operator may take keys back (the guide's `emergencyRotationEnabled`).
    pub emergency_rotation: bool,
    /// For how many Target Durations after a revocation segments are still served under the revoked key to
    /// players that hold an older playlist. 0: not at all.
    pub revocation_transition: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            key_method: KeyMethod::Aes128,
            rotation_interval: Some(Duration::from_secs(30 * 60)),
            segments_per_key: 100,
            pre_generate_keys: 3,
            grace_period: Duration::from_secs(300),
            lead_segments: 2,
            cdn_ttl: Duration::from_secs(60),
            iv_mode: IvMode::Segment,
            encrypt_init_sections: false,
            on_encrypted: OnEncrypted::Reject,
            subtitles: Subtitles::Encrypt,
            session_keys: false,
            sync_policy: SyncPolicy::All,
            emergency_rotation: true,
            revocation_transition: 2,
        }
    }
}

/// What is wrong with a policy: the field and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{field} {rule}")]
pub struct PolicyError {
    pub field: &'static str,
    pub rule: &'static str,
}

impl Policy {
    /// The policy itself, if its numbers make sense.
    ///
    /// # Errors
    /// The first field that does not, with the rule it breaks.
    pub fn checked(self) -> Result<Self, PolicyError> {
        let wrong = |field, rule| Err(PolicyError { field, rule });
        if self.rotation_interval.is_some_and(|interval| interval < Duration::from_secs(1)) {
            return wrong("rotation_interval", "must be at least 1 second, or 0 for no time trigger");
        }
        if !(1..=1_000_000).contains(&self.segments_per_key) {
            return wrong("segments_per_key", "must be between 1 and 1000000");
        }
        if !(1..=100).contains(&self.pre_generate_keys) {
            return wrong("pre_generate_keys", "must be between 1 and 100");
        }
        let year = Duration::from_secs(366 * 86_400);
        if self.grace_period > year {
            return wrong("grace_period", "must be at most a year");
        }
        if self.cdn_ttl > year {
            return wrong("cdn_ttl", "must be at most a year");
        }
        if self.revocation_transition > 100 {
            return wrong("revocation_transition", "must be at most 100 Target Durations");
        }
        if self.lead_segments > 100 {
            return wrong("lead_segments", "must be at most 100");
        }
        if !self.key_method.has_iv_mode() && self.iv_mode != IvMode::default() {
            return wrong("iv_mode", NO_IV_MODE);
        }
        Ok(self)
    }

    /// How long after the last playlist that named it a key must still be served: RFC 8216 §6.2.2 keeps a
    /// removed segment available for its duration and the longest playlist that held it, caches may hold
    /// that playlist longer, and the grace period comes on top.
    pub fn retention(&self, longest_playlist: Duration) -> Duration {
        longest_playlist.saturating_add(self.cdn_ttl).saturating_add(self.grace_period)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_the_guides() {
        let policy = Policy::default().checked().unwrap();
        assert_eq!(policy.key_method.name(), "AES-128");
        assert_eq!(policy.rotation_interval, Some(Duration::from_secs(1800)));
        assert_eq!(policy.segments_per_key, 100);
        assert_eq!(policy.pre_generate_keys, 3);
        assert_eq!(policy.grace_period, Duration::from_secs(300));
    }

    #[test]
    fn what_has_a_name_is_found_by_it() {
        for method in KeyMethod::ALL {
            assert_eq!(KeyMethod::from_name(method.name()), Some(method));
        }
        for treatment in OnEncrypted::ALL {
            assert_eq!(OnEncrypted::from_name(treatment.name()), Some(treatment));
        }
        for treatment in Subtitles::ALL {
            assert_eq!(Subtitles::from_name(treatment.name()), Some(treatment));
        }
        for policy in SyncPolicy::ALL {
            assert_eq!(SyncPolicy::from_name(policy.name()), Some(policy));
        }
        assert_eq!((KeyMethod::from_name("AES-256-gcm"), SyncPolicy::from_name("All")), (None, None));
        assert_eq!((OnEncrypted::from_name(""), Subtitles::from_name("")), (None, None));
    }

    #[test]
    fn gcm_has_a_long_key_and_no_iv_mode() {
        let method = KeyMethod::Aes256Gcm;
        assert_eq!((method.name(), method.key_len()), ("AES-256-GCM", 32));
        let policy = Policy { key_method: method, ..Policy::default() };
        assert!(policy.clone().checked().is_ok());
        for iv_mode in [IvMode::Period, IvMode::Sequence] {
            let refused = Policy { iv_mode, ..policy.clone() }.checked().unwrap_err();
            assert_eq!((refused.field, refused.rule), ("iv_mode", NO_IV_MODE));
        }
    }

    #[test]
    fn numbers_that_make_no_sense_name_their_field() {
        let no_segments = Policy { segments_per_key: 0, ..Policy::default() }.checked();
        assert_eq!(no_segments.unwrap_err().field, "segments_per_key");
        let no_keys = Policy { pre_generate_keys: 0, ..Policy::default() }.checked();
        assert_eq!(no_keys.unwrap_err().field, "pre_generate_keys");
    }
}
