//! What is unwrapped: keys and signers, as the data plane holds them.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use crate::keys::{
    CdnSet, ContentSecrets, DekId, IvMode, KeyId, KeyMethod, LinkKey, Ordinal, StreamId, Timestamp,
};
use crate::store::KeyRow;

/// Whether a stream is served; shared by the stream, its keys and its signers.
pub(super) type Serving = Arc<AtomicBool>;

/// A content key that is not destroyed, unwrapped.
#[derive(Debug)]
pub struct LiveKey {
    pub stream: StreamId,
    pub id: KeyId,
    pub ordinal: Ordinal,
    /// As it was made: the policy of its stream may have changed since.
    pub method: KeyMethod,
    pub iv_mode: IvMode,
    pub secrets: ContentSecrets,
    pub(super) serving: Serving,
    revoked: OnceLock<Revoked>,
    destroyed: AtomicBool,
    last_named_millis: AtomicI64,
    /// The CDNs that have shown it, as far as this node delivers; the bits of a [`CdnSet`].
    delivered: AtomicU32,
}

/// What holds for a key that was taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revoked {
    /// The ordinal of the key that takes its place.
    pub successor: Ordinal,
    /// Until then, segments are still encrypted under it for players that hold an older playlist.
    pub transition_until: Timestamp,
}

impl LiveKey {
    pub(super) fn new(
        stream: &StreamId,
        row: &KeyRow,
        secrets: ContentSecrets,
        serving: Serving,
        last_named_at: Timestamp,
    ) -> Self {
        Self {
            stream: stream.clone(),
            id: row.id,
            ordinal: row.ordinal,
            method: row.method,
            iv_mode: row.iv_mode,
            secrets,
            serving,
            revoked: OnceLock::new(),
            destroyed: AtomicBool::new(false),
            last_named_millis: AtomicI64::new(last_named_at.as_unix_millis()),
            delivered: AtomicU32::new(0),
        }
    }

    /// Notes that a playlist that names the key was served.
    pub fn named_at(&self, now: Timestamp) {
        self.last_named_millis.fetch_max(now.as_unix_millis(), Ordering::Relaxed);
    }

    pub(super) fn last_named_at(&self) -> Timestamp {
        Timestamp::from_unix_millis(self.last_named_millis.load(Ordering::Relaxed))
    }

    /// Notes whether a CDN has shown the key.
    pub(super) fn note_delivered(&self, place: usize, is_shown: bool) {
        let of_place = CdnSet::default().with(place).bits();
        match is_shown {
            true => self.delivered.fetch_or(of_place, Ordering::Relaxed),
            false => self.delivered.fetch_and(!of_place, Ordering::Relaxed),
        };
    }

    /// The CDNs that have shown the key. Known where keys are delivered from.
    pub(super) fn delivered(&self) -> CdnSet {
        CdnSet::from_bits(self.delivered.load(Ordering::Relaxed))
    }

    /// `Some` once the key was taken back: it is never handed out again.
    pub fn revoked(&self) -> Option<Revoked> {
        self.revoked.get().copied()
    }

    pub(super) fn revoke(&self, revoked: Revoked) {
        // A key is revoked once; who says so again says the same.
        let _ = self.revoked.set(revoked);
    }

    pub fn sample_paths(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether it is gone from the store, and here too but for what still holds it.
    pub fn is_destroyed(&self) -> bool {
        self.destroyed.load(Ordering::Acquire)
    }

    pub(super) fn destroy(&self) {
        self.destroyed.store(true, Ordering::Release);
    }

    /// Whether playlists may name it: its stream is served, and it was neither taken back nor destroyed.
    pub fn may_be_named(&self) -> bool {
        self.serving.load(Ordering::Acquire) && self.revoked.get().is_none() && !self.is_destroyed()
    }
}

/// Signs the links of init sections that are served in clear; lives as long as its DEK.
#[derive(Debug)]
pub struct ClearInitSigner {
    pub stream: StreamId,
    pub dek: DekId,
    pub link: LinkKey,
    pub(super) serving: Serving,
}
