//! What is unwrapped: keys and signers, as the data plane holds them.
//!
//! A key tells those who are in the middle of an answer under it that it was taken back, and remembers what a few of
//! those answers were (`samples`).

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::samples::Samples;
use crate::keys::{
    CdnSet, ContentSecrets, DekId, IvMode, KeyId, KeyMethod, LinkKey, Ordinal, StreamId, Timestamp,
};
use crate::store::KeyRow;

/// Whether a stream is served; shared by the stream, its keys and its signers.
pub(super) type Serving = Arc<AtomicBool>;

/// How long an answer under a key may go on after this node has heard that the key was taken back. Its header says that
/// caches may keep it, and was sent before; one that ends after a CDN was purged would be kept there nevertheless. So
/// the last purge comes later than this, with room for what is on its way. Not at once: nearly all answers end by
/// themselves in this time, and a player need not fetch again what it has the key for.
pub const BREAK_OFF_AFTER: Duration = Duration::from_secs(3);

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
    /// And since when this node knows.
    revoked: OnceLock<(Revoked, Instant)>,
    /// Rung once, when it is taken back.
    taken_back: Notify,
    destroyed: AtomicBool,
    last_named_millis: AtomicI64,
    /// The CDNs that have shown it, as far as this node delivers; the bits of a [`CdnSet`].
    delivered: AtomicU32,
    samples: Samples,
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
            taken_back: Notify::new(),
            destroyed: AtomicBool::new(false),
            last_named_millis: AtomicI64::new(last_named_at.as_unix_millis()),
            delivered: AtomicU32::new(0),
            samples: Samples::default(),
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
        // Mostly said again.
        if self.delivered().has(place) == is_shown {
            return;
        }
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
        self.revoked.get().map(|(revoked, _)| *revoked)
    }

    pub(super) fn revoke(&self, revoked: Revoked) {
        // A key is revoked once; who says so again says the same.
        if self.revoked.set((revoked, Instant::now())).is_ok() {
            self.taken_back.notify_waiters();
        }
    }

    /// Whether answers under it that began before it was taken back are to be broken off. Costs a load until then.
    pub fn breaks_off(&self) -> bool {
        self.revoked.get().is_some_and(|(_, known)| known.elapsed() >= BREAK_OFF_AFTER)
    }

    /// Ends when [`Self::breaks_off`] becomes true.
    pub async fn broken_off(&self) {
        // Made before the look, so that no ring between the two is missed.
        let taken_back = self.taken_back.notified();
        if self.revoked.get().is_none() {
            taken_back.await;
        }
        if let Some((_, known)) = self.revoked.get() {
            tokio::time::sleep_until(*known + BREAK_OFF_AFTER).await;
        }
    }

    /// Notes a request whose answer, under this key, caches may keep, by its path as it was asked for.
    pub fn served(&self, path: &str, now: Timestamp) {
        self.samples.note(path, now);
    }

    /// The last few paths, with their leading slash and without a query, that were answered under this key and may be
    /// in caches; the oldest first.
    pub fn sample_paths(&self) -> Vec<String> {
        self.samples.paths()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::CONTENT_SECRET_LEN;
    use crate::store::KeyLife;

    fn key() -> Arc<LiveKey> {
        let now = Timestamp::from_unix_millis(0);
        let row = KeyRow {
            id: KeyId::from_bytes([1; KeyId::LEN]),
            ordinal: Ordinal::FIRST,
            method: KeyMethod::Aes128,
            iv_mode: IvMode::Segment,
            dek: DekId::from_bytes([2; DekId::LEN]),
            wrapped: Vec::new(),
            life: KeyLife::pre_active(now),
        };
        let secrets = ContentSecrets::from_random(row.method, &[3; CONTENT_SECRET_LEN]);
        let stream = "ch1".parse().unwrap();
        Arc::new(LiveKey::new(&stream, &row, secrets, Serving::default(), now))
    }

    fn revoke(key: &LiveKey) {
        let transition_until = Timestamp::from_unix_millis(1);
        key.revoke(Revoked { successor: Ordinal::FIRST, transition_until });
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_broken_off_a_while_after_its_key_was_taken_back() {
        let key = key();
        let answers: Vec<_> = (0..3)
            .map(|_| {
                let key = Arc::clone(&key);
                tokio::spawn(async move {
                    key.broken_off().await;
                    Instant::now()
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(!key.breaks_off() && answers.iter().all(|answer| !answer.is_finished()));
        let at = Instant::now();
        revoke(&key);
        // Saying so again puts nothing off.
        tokio::time::sleep(Duration::from_secs(1)).await;
        revoke(&key);
        assert!(!key.breaks_off());
        for answer in answers {
            assert_eq!((answer.await.unwrap() - at).as_secs(), BREAK_OFF_AFTER.as_secs());
        }
        assert!(key.breaks_off());
        // Who comes now does not wait.
        tokio::time::timeout(Duration::from_millis(1), key.broken_off()).await.unwrap();
    }
}
