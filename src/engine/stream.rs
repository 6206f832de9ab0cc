//! One stream in memory: its keys, its schedules, what was served of it.
//!
//! Read by every request, changed by the worker alone (but for what was served). The lock is held for look-ups
//! and swaps, never across an await.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::RwLock;

use super::delivery::Delivery;
use super::live::{ClearInitSigner, LiveKey, Serving};
use crate::keys::{
    Boundary, DekId, DekVersion, Edge, KeyFacts, KeyState, Marks, MediaSequenceNumber, OnEncrypted, Ordinal,
    PlaylistWindow, REPORT_INTERVAL, Reason, RenditionFacts, Schedule, Situation, StreamFacts, StreamId,
    Subtitles, Timestamp, plan,
};
use crate::store::{DekRow, KeyLife, RenditionRow, StreamRow, StreamState};

/// How many neighbours to each side are asked for a schedule to share.
const MAX_SIBLINGS: usize = 16;

/// More renditions than this in one stream are not taken in: an origin that answers every path with a playlist
/// must not fill the store.
pub(super) const MAX_RENDITIONS: usize = 100_000;

/// The revision of a stream of which only its row is known.
pub(super) const UNREAD: i64 = -1;

/// A Media Playlist that is about to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shown {
    pub window: PlaylistWindow,
    /// The window's length in time.
    pub duration: Duration,
    pub target_duration: Duration,
}

/// A stream's DEK as it is stored, and what was derived from it; the key itself is unwrapped for a time only.
#[derive(Debug, Clone)]
pub(super) struct Dek {
    pub(super) row: DekRow,
    pub(super) signer: Arc<ClearInitSigner>,
}

/// A key and its way through its states.
#[derive(Debug, Clone)]
pub(super) struct KnownKey {
    pub(super) life: KeyLife,
    pub(super) dek: DekId,
    pub(super) live: Arc<LiveKey>,
}

#[derive(Debug, Clone)]
pub(super) struct Rendition {
    /// All boundaries, those too that the store does not have yet.
    pub(super) schedule: Arc<Schedule>,
    /// How many boundaries the store has. The others were decided while it was away.
    pub(super) stored: usize,
    pub(super) edge: Edge,
    pub(super) ended: bool,
    pub(super) keeps_all: bool,
    pub(super) target_duration: Duration,
    pub(super) longest_playlist: Duration,
    pub(super) last_served_at: Timestamp,
    /// When the store was last told of it, and when what it was told had been served.
    pub(super) told: Option<(Timestamp, Timestamp)>,
    /// When its numbers last jumped back, as far as this process knows.
    pub(super) reset_at: Option<Timestamp>,
    /// The first of the boundaries that are being stored: no window beyond it is published meanwhile.
    pub(super) pending: Option<MediaSequenceNumber>,
}

/// What a window calls for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) planned: Vec<(Boundary, Reason)>,
    /// How many boundaries the rendition has.
    pub(super) have: usize,
    /// The window shows segments beyond a boundary that is not stored yet.
    pub(super) must_wait: bool,
    /// Boundaries of the rendition are being stored already.
    pub(super) is_asked: bool,
}

/// Why a window cannot be published at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotYet {
    /// The stream or the rendition is not loaded.
    Loaded,
    /// A boundary within the window is being stored.
    Stored,
}

/// Everything that changes about a stream.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) row: StreamRow,
    /// Those that are not destroyed.
    pub(super) keys: BTreeMap<Ordinal, KnownKey>,
    /// Of these, those that could not be opened yet, and are not among `keys` so long.
    pub(super) unopened: BTreeSet<Ordinal>,
    /// One past the highest ordinal that was ever made.
    pub(super) next: Ordinal,
    /// The newest one wraps.
    pub(super) deks: BTreeMap<DekVersion, Dek>,
    pub(super) renditions: BTreeMap<String, Rendition>,
}

impl Known {
    /// `can_make`: keys that are not there can be made.
    fn call(&self, rendition: &str, window: &PlaylistWindow, now: Timestamp, can_make: bool) -> Option<Call> {
        let empty = Schedule::default();
        let own = self.renditions.get(rendition);
        let schedule = own.map_or(&empty, |own| &own.schedule);
        let siblings = self.siblings(rendition);
        let planned = plan(
            window,
            Situation {
                schedule,
                edge: own.map(|own| own.edge),
                policy: &self.row.policy,
                marks: self.marks()?,
                siblings: &siblings,
                state_of: &|ordinal| self.state_of(ordinal),
                is_idle: own.is_some_and(|own| own.facts().is_idle(&self.row.policy, now)),
                unmade: Some(self.next).filter(|_| !can_make),
            },
        );
        let pending = own.and_then(|own| own.pending);
        let must_wait = planned.iter().map(|(b, _)| b.first).chain(pending).any(|b| b < window.end);
        Some(Call { planned, have: schedule.len(), must_wait, is_asked: pending.is_some() })
    }

    /// `None` for a key that is still to be made, or opened.
    pub(super) fn state_of(&self, ordinal: Ordinal) -> Option<KeyState> {
        match self.keys.get(&ordinal) {
            Some(key) => Some(key.life.state),
            None if self.unopened.contains(&ordinal) => None,
            None => (ordinal < self.next).then_some(KeyState::Destroyed),
        }
    }

    /// Whether a key is there, opened or not.
    pub(super) fn is_there(&self, ordinal: Ordinal) -> bool {
        self.keys.contains_key(&ordinal) || self.unopened.contains(&ordinal)
    }

    /// The key that takes a revoked one's place, and is not revoked itself.
    pub(super) fn in_place_of(&self, key: &Arc<LiveKey>) -> Option<Arc<LiveKey>> {
        let mut key = Arc::clone(key);
        // Successors come behind, so this ends.
        while let Some(revoked) = key.revoked() {
            key = Arc::clone(
                &self.keys.get(&revoked.successor).filter(|next| next.live.ordinal > key.ordinal)?.live,
            );
        }
        Some(key)
    }

    /// The schedules of the renditions whose paths are next to this one's: those of the same presentation,
    /// where a stream holds many.
    fn siblings(&self, rendition: &str) -> Vec<&Schedule> {
        use std::ops::Bound::{Excluded, Unbounded};
        let before = self.renditions.range::<str, _>((Unbounded, Excluded(rendition)));
        let after = self.renditions.range::<str, _>((Excluded(rendition), Unbounded));
        let nearest = before.rev().take(MAX_SIBLINGS).chain(after.take(MAX_SIBLINGS));
        nearest.map(|(_, sibling)| &*sibling.schedule).collect()
    }

    /// Whether what the store has of it was taken in: until then it is neither published nor swept.
    pub(super) fn is_read(&self) -> bool {
        self.row.rev != UNREAD
    }

    /// Whether it could have its first keys now.
    pub(super) fn is_without_keys(&self) -> bool {
        self.is_read() && self.marks().is_none() && !self.deks.is_empty()
    }

    pub(super) fn marks(&self) -> Option<Marks> {
        if !self.is_read() {
            return None;
        }
        let mut promoted = self.keys.iter().rev().filter(|(_, key)| key.life.activated_at.is_some());
        let (head, newest) = promoted.next()?;
        let forced = std::iter::once((head, newest)).chain(promoted).find(|(_, key)| key.life.forced);
        Some(Marks { head: *head, forced: forced.map_or(Ordinal::FIRST, |(ordinal, _)| *ordinal) })
    }

    /// Why a boundary names a key that is not promoted yet: what made the boundary was interrupted before that. Where
    /// none does, it is the stream's first key.
    pub(super) fn reason_of_boundary(&self, ordinal: Ordinal) -> Reason {
        let schedules = self.renditions.values().map(|own| own.schedule.boundaries());
        // A key that is first named where numbers begin was not asked for by a count.
        let by_count = |boundaries: &[Boundary]| {
            boundaries.windows(2).any(|pair| pair[1].ordinal == ordinal && pair[0].epoch == pair[1].epoch)
        };
        if schedules.into_iter().any(by_count) { Reason::Count } else { Reason::Start }
    }

    /// The newest DEK.
    pub(super) fn dek(&self) -> Option<&Dek> {
        self.deks.values().next_back()
    }

    pub(super) fn dek_of(&self, id: DekId) -> Option<&Dek> {
        self.deks.values().find(|dek| dek.row.id == id)
    }

    /// DEKs that wrap no key any more, and will wrap none.
    pub(super) fn spent_deks(&self) -> impl Iterator<Item = &Dek> {
        let older = self.deks.len().saturating_sub(1);
        // With keys that are not opened, it is not known what is wrapped by which.
        let older = if self.unopened.is_empty() { older } else { 0 };
        let is_spent = |dek: &&Dek| self.keys.values().all(|key| key.dek != dek.row.id);
        self.deks.values().take(older).filter(is_spent)
    }

    /// Keys that wait for their promotion behind the newest.
    pub(super) fn waiting(&self) -> usize {
        let states = self.keys.values().rev().map(|key| key.life.state);
        states.take_while(|state| *state == KeyState::PreActive).count()
    }

    /// Who signs links of clear init sections in a playlist whose first segment is under an ordinal: so a link changes
    /// with the window alone, on every node alike, and holds for as long as the playlist's keys do.
    fn clear_init(&self, first: Option<Ordinal>) -> Option<Arc<ClearInitSigner>> {
        let of_first = first.and_then(|first| self.dek_of(self.keys.get(&first)?.dek));
        of_first.or_else(|| self.dek()).map(|dek| Arc::clone(&dek.signer))
    }

    /// The stream as a sweep sees it.
    pub(super) fn facts(&self, can_make: bool, delivery: &Delivery) -> StreamFacts {
        let (policy, cdns) = (self.row.policy.sync_policy, delivery.of_stream(&self.row.cdn));
        let keys = self.keys.iter().map(|(ordinal, key)| KeyFacts {
            ordinal: *ordinal,
            state: key.life.state,
            activated_at: key.life.activated_at,
            forced: key.life.forced,
            retired_at: key.life.compromised_at.or(key.life.deactivated_at),
            successor: key.life.successor,
            last_named_at: key.live.last_named_at(),
            is_delivered: policy.is_met(cdns, key.live.delivered()),
        });
        let renditions = self.renditions.values().map(Rendition::facts).collect();
        let scheduled = self.renditions.values().filter_map(|r| r.schedule.last()).map(|b| b.ordinal).max();
        StreamFacts { keys: keys.collect(), next: self.next, renditions, scheduled, can_make }
    }
}

/// What a playlist is rewritten with: the ordinal of each segment, and the keys of those ordinals.
#[derive(Debug, Clone)]
pub struct Published {
    schedule: Arc<Schedule>,
    keys: BTreeMap<Ordinal, PublishedKey>,
    pub clear_init: Arc<ClearInitSigner>,
    pub encrypt_init_sections: bool,
    pub on_encrypted: OnEncrypted,
    pub subtitles: Subtitles,
}

/// The key of a crypto period, as a playlist shows it.
#[derive(Debug, Clone)]
pub struct PublishedKey {
    /// Signs the period's links.
    pub signer: Arc<LiveKey>,
    /// Encrypts: the signer itself, or what takes its place since it was revoked.
    pub cipher: Arc<LiveKey>,
}

impl Published {
    pub fn key_at(&self, msn: MediaSequenceNumber) -> Option<&PublishedKey> {
        self.keys.get(&self.schedule.ordinal_at(msn)?)
    }

    /// The keys that the playlist may name, by their ordinals.
    pub fn keys(&self) -> impl Iterator<Item = &PublishedKey> {
        self.keys.values()
    }
}

/// A stream: what it owns, and what is known of it.
#[derive(Debug)]
pub struct Stream {
    pub id: StreamId,
    pub origin: String,
    pub prefix: String,
    pub(super) serving: Serving,
    pub(super) known: RwLock<Known>,
    /// Held by whoever changes the stream, from planning to the last write.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
}

impl Stream {
    pub(super) fn new(row: StreamRow) -> Self {
        Self {
            id: row.id.clone(),
            origin: row.origin.clone(),
            prefix: row.prefix.clone(),
            serving: Arc::new(AtomicBool::new(row.state == StreamState::Running)),
            known: RwLock::new(Known {
                row,
                keys: BTreeMap::new(),
                next: Ordinal::FIRST,
                unopened: BTreeSet::new(),
                deks: BTreeMap::new(),
                renditions: BTreeMap::new(),
            }),
            changing: Arc::default(),
        }
    }

    /// Takes the row in that a change has left in the store. The revision stays: what else came with it is still to
    /// be read.
    pub(super) fn know_row(&self, row: StreamRow) {
        let mut known = self.known.write();
        self.serving.store(row.state == StreamState::Running, Ordering::Release);
        known.row = StreamRow { rev: known.row.rev, ..row };
    }

    /// What the stream's paths begin with at the shield, as CDNs ask for them.
    pub(super) fn prefix_of_shield(&self) -> String {
        let playlist = self.playlist_path();
        let path = playlist.split('?').next().unwrap_or_default();
        // The origin may be mounted below a path of its own.
        match path.find(&self.prefix) {
            Some(at) => path[..at + self.prefix.len()].to_owned(),
            None => path[..path.rfind('/').map_or(0, |at| at + 1)].to_owned(),
        }
    }

    /// Whether it is served: not stopped, not deleted.
    pub fn is_running(&self) -> bool {
        self.serving.load(Ordering::Acquire)
    }

    /// The path of the shield at which its main playlist plays, with the query that chooses it where there is one.
    pub fn playlist_path(&self) -> String {
        self.known.read().row.playlist_path.clone()
    }

    /// What becomes of a playlist whose segments the origin has encrypted already.
    pub fn on_encrypted(&self) -> OnEncrypted {
        self.known.read().row.policy.on_encrypted
    }

    /// The key that its Multivariant Playlists may name for players to load early: the newest that was promoted, or
    /// what takes its place since it was revoked. `None` where the policy does not ask for it, and while there is
    /// none. Whoever serves a playlist that names it notes so ([`LiveKey::named_at`]).
    pub fn session_key(&self) -> Option<Arc<LiveKey>> {
        let known = self.known.read();
        if !known.row.policy.session_keys {
            return None;
        }
        let head = known.keys.get(&known.marks()?.head)?;
        known.in_place_of(&head.live).filter(|key| key.may_be_named())
    }

    /// What a window calls for; `None` while no key is loaded.
    pub(super) fn call(&self, rendition: &str, window: &PlaylistWindow, now: Timestamp) -> Option<Call> {
        self.known.read().call(rendition, window, now, true)
    }

    /// As [`Self::call`], and from now on no window is published beyond the first planned boundary.
    pub(super) fn propose(
        &self,
        rendition: &str,
        window: &PlaylistWindow,
        now: Timestamp,
        can_make: bool,
    ) -> Option<Call> {
        let mut known = self.known.write();
        let call = known.call(rendition, window, now, can_make)?;
        if let Some(own) = known.renditions.get_mut(rendition) {
            own.pending = call.planned.first().map(|(boundary, _)| boundary.first);
        }
        Some(call)
    }

    /// Ends what [`Self::propose`] began, however it went.
    pub(super) fn settle(&self, rendition: &str) {
        if let Some(own) = self.known.write().renditions.get_mut(rendition) {
            own.pending = None;
        }
    }

    /// What a playlist is rewritten with, noting that it is served.
    ///
    /// # Errors
    /// [`NotYet`] when keys, schedule or a boundary within the window are missing.
    pub(super) fn publish(
        &self,
        rendition: &str,
        shown: &Shown,
        now: Timestamp,
    ) -> Result<Published, NotYet> {
        let window = &shown.window;
        let mut known = self.known.write();
        let own = known.renditions.get_mut(rendition).ok_or(NotYet::Loaded)?;
        if own.pending.is_some_and(|pending| pending < window.end) {
            return Err(NotYet::Stored);
        }
        own.see(window);
        own.last_served_at = now;
        own.target_duration = shown.target_duration;
        own.longest_playlist = own.longest_playlist.max(shown.duration);
        let schedule = Arc::clone(&own.schedule);
        let keys = match (schedule.ordinal_at(window.first), schedule.ordinal_at(window.end.minus(1))) {
            (Some(from), Some(to)) if from <= to => known.published(from, to),
            _ => BTreeMap::new(),
        };
        known.publication(schedule, keys)
    }

    /// What a playlist without segments is rewritten with: it names no key, and calls for none.
    pub(super) fn publish_empty(&self) -> Result<Published, NotYet> {
        self.known.read().publication(Arc::default(), BTreeMap::new())
    }
}

impl Known {
    /// The keys from one ordinal to another. One that was revoked and has no successor here is left out, which
    /// refuses the playlist.
    fn published(&self, from: Ordinal, to: Ordinal) -> BTreeMap<Ordinal, PublishedKey> {
        let published = |(ordinal, key): (&Ordinal, &KnownKey)| {
            let cipher = self.in_place_of(&key.live)?;
            Some((*ordinal, PublishedKey { signer: Arc::clone(&key.live), cipher }))
        };
        self.keys.range(from..=to).filter_map(published).collect()
    }

    fn publication(
        &self,
        schedule: Arc<Schedule>,
        keys: BTreeMap<Ordinal, PublishedKey>,
    ) -> Result<Published, NotYet> {
        let policy = &self.row.policy;
        let first = keys.first_key_value().map(|(ordinal, _)| *ordinal);
        Ok(Published {
            schedule,
            keys,
            clear_init: self.clear_init(first).ok_or(NotYet::Loaded)?,
            encrypt_init_sections: policy.encrypt_init_sections,
            on_encrypted: policy.on_encrypted,
            subtitles: policy.subtitles,
        })
    }
}

impl Rendition {
    /// A rendition that is seen for the first time.
    pub(super) fn new(schedule: Schedule, stored: usize, edge: Edge, now: Timestamp) -> Self {
        Self {
            schedule: Arc::new(schedule),
            stored,
            edge,
            ended: false,
            keeps_all: false,
            target_duration: Duration::ZERO,
            longest_playlist: Duration::ZERO,
            last_served_at: now,
            told: None,
            reset_at: None,
            pending: None,
        }
    }

    /// Notes the newest window. A replica that lags must not take the edge back; a jump back must.
    pub(super) fn see(&mut self, window: &PlaylistWindow) {
        if window.end >= self.edge.end || self.edge.jumps_back_to(window) {
            self.edge = Edge { first: window.first, end: window.end };
            self.ended = window.ended;
            self.keeps_all = window.keeps_all;
        }
    }

    /// The boundaries that the store does not have.
    pub(super) fn unstored(&self) -> &[Boundary] {
        let boundaries = self.schedule.boundaries();
        &boundaries[boundaries.len().saturating_sub(self.schedule.len().saturating_sub(self.stored))..]
    }

    pub(super) fn epoch(&self) -> u32 {
        self.schedule.last().map_or(0, |last| last.epoch)
    }

    pub(super) fn row(&self, name: &str) -> RenditionRow {
        RenditionRow {
            rendition: name.to_owned(),
            ended: self.ended,
            keeps_all: self.keeps_all,
            target_duration: self.target_duration,
            longest_playlist: self.longest_playlist,
            epoch: self.epoch(),
            edge: self.edge,
            last_served_at: self.last_served_at,
        }
    }

    /// Whether it was served since the store was told, and the store was not told a moment ago. A window beyond a
    /// boundary that is still to be stored is told with it: whoever starts from the window alone would take its
    /// segments to be under the key before.
    pub(super) fn is_to_be_told(&self, now: Timestamp) -> bool {
        let is_stored = self.stored > 0 && self.unstored().is_empty();
        is_stored
            && self.told.is_none_or(|(told_at, served_at)| {
                // Half of it, or the next report, which comes a hair early, would leave it to the one after.
                self.last_served_at > served_at && now.since(told_at) >= REPORT_INTERVAL / 2
            })
    }

    /// Takes in what another node, or an earlier process, served.
    pub(super) fn hear(&mut self, row: &RenditionRow) {
        let is_newer = (row.epoch, row.edge.end) >= (self.epoch(), self.edge.end);
        if is_newer && row.epoch == self.epoch() {
            self.edge = row.edge;
            self.ended = row.ended;
            self.keeps_all = row.keeps_all;
        }
        self.longest_playlist = self.longest_playlist.max(row.longest_playlist);
        self.target_duration = self.target_duration.max(row.target_duration);
        self.last_served_at = self.last_served_at.max(row.last_served_at);
    }

    pub(super) fn facts(&self) -> RenditionFacts {
        let first = self.schedule.ordinal_at(self.edge.first);
        RenditionFacts {
            lowest_in_use: first.unwrap_or(Ordinal::FIRST),
            current: self.schedule.last().map_or(Ordinal::FIRST, |last| last.ordinal),
            ended: self.ended,
            keeps_all: self.keeps_all,
            last_served_at: self.last_served_at,
            longest_playlist: self.longest_playlist,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_all_the_time_is_told_with_every_report() {
        let at = |millis| Timestamp::from_unix_millis(millis);
        let edge = Edge { first: MediaSequenceNumber(0), end: MediaSequenceNumber(6) };
        let mut own = Rendition::new(Schedule::default(), 1, edge, at(0));
        assert!(own.is_to_be_told(at(0)));
        own.told = Some((at(40), at(0)));
        own.last_served_at = at(5_000);
        assert!(own.is_to_be_told(at(5_010)), "the report itself takes a moment");
        assert!(!own.is_to_be_told(at(1_000)), "but not again and again");
        own.told = Some((at(5_010), at(5_000)));
        assert!(!own.is_to_be_told(at(10_010)), "nothing new was served");
    }
}
