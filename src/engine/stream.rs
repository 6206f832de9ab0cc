//! One stream in memory: its keys unwrapped, its schedules, what was served of it.
//!
//! Read by every request, written by the worker alone (but for when a key was last named). The lock is held
//! for look-ups and swaps, never across an await.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;

use crate::keys::{
    Boundary, ContentSecrets, DekId, Edge, IvMode, KeyFacts, KeyId, KeyMethod, KeyState, LinkKey, Marks,
    MediaSequenceNumber, Ordinal, PlaylistWindow, Policy, Reason, RenditionFacts, Schedule, Situation,
    StreamFacts, StreamId, Timestamp, plan,
};
use crate::store::{KeyRow, RenditionRow};

/// How many neighbours to each side are asked for a schedule to share.
const MAX_SIBLINGS: usize = 16;

/// More renditions than this in one stream are not taken in: an origin that answers every path with a playlist
/// must not fill the store.
pub(super) const MAX_RENDITIONS: usize = 100_000;

/// A stream as its operator describes it.
#[derive(Debug, Clone)]
pub struct StreamSettings {
    pub id: StreamId,
    /// The name of the origin that its playlists lie at.
    pub origin: String,
    /// What its paths at that origin begin with.
    pub prefix: String,
    pub policy: Policy,
}

/// A promotion, as it is told to those who listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    pub stream: StreamId,
    pub ordinal: Ordinal,
    pub key: KeyId,
    pub reason: &'static str,
}

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
    last_named_millis: AtomicI64,
}

impl LiveKey {
    pub(super) fn new(stream: &StreamId, row: &KeyRow, secrets: ContentSecrets, now: Timestamp) -> Self {
        Self {
            stream: stream.clone(),
            id: row.id,
            ordinal: row.ordinal,
            method: row.method,
            iv_mode: row.iv_mode,
            secrets,
            // A new process cannot know what the one before it served: it counts from now.
            last_named_millis: AtomicI64::new(now.as_unix_millis()),
        }
    }

    /// Notes that a playlist that names the key was served.
    pub fn named_at(&self, now: Timestamp) {
        self.last_named_millis.fetch_max(now.as_unix_millis(), Ordering::Relaxed);
    }

    fn last_named_at(&self) -> Timestamp {
        Timestamp::from_unix_millis(self.last_named_millis.load(Ordering::Relaxed))
    }
}

/// Signs the links of init sections that are served in clear; lives as long as its DEK.
#[derive(Debug)]
pub struct ClearInitSigner {
    pub stream: StreamId,
    pub dek: DekId,
    pub link: LinkKey,
}

/// A key's place in its life, beside its secrets.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyLife {
    pub(super) state: KeyState,
    pub(super) activated_at: Option<Timestamp>,
    pub(super) forced: bool,
    pub(super) deactivated_at: Option<Timestamp>,
}

#[derive(Debug, Clone)]
pub(super) struct Rendition {
    pub(super) schedule: Arc<Schedule>,
    pub(super) edge: Edge,
    pub(super) ended: bool,
    pub(super) keeps_all: bool,
    pub(super) last_served_at: Timestamp,
    pub(super) longest_playlist: Duration,
    /// As the store has it.
    pub(super) stored: Option<RenditionRow>,
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
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Every ordinal since the first, destroyed ones too: these have no live key.
    pub(super) lives: BTreeMap<Ordinal, KeyLife>,
    pub(super) live_keys: BTreeMap<Ordinal, Arc<LiveKey>>,
    pub(super) clear_init: Option<Arc<ClearInitSigner>>,
    pub(super) renditions: BTreeMap<String, Rendition>,
}

impl Known {
    fn call(&self, rendition: &str, window: &PlaylistWindow, policy: &Policy) -> Option<Call> {
        let empty = Schedule::default();
        let own = self.renditions.get(rendition);
        let schedule = own.map_or(&empty, |own| &own.schedule);
        let siblings = self.siblings(rendition);
        let is_destroyed =
            |ordinal: Ordinal| self.lives.get(&ordinal).is_some_and(|l| l.state == KeyState::Destroyed);
        let planned = plan(
            window,
            Situation {
                schedule,
                edge: own.map(|own| own.edge),
                policy,
                marks: self.marks()?,
                siblings: &siblings,
                is_destroyed: &is_destroyed,
            },
        );
        let pending = own.and_then(|own| own.pending);
        let must_wait = planned.iter().map(|(b, _)| b.first).chain(pending).any(|b| b < window.end);
        Some(Call { planned, have: schedule.boundaries().len(), must_wait, is_asked: pending.is_some() })
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

    pub(super) fn marks(&self) -> Option<Marks> {
        let promoted = |life: &KeyLife| life.activated_at.is_some();
        let head = *self.lives.iter().rev().find(|(_, life)| promoted(life))?.0;
        let forced = self.lives.iter().rev().find(|(_, life)| promoted(life) && life.forced);
        Some(Marks { head, forced: forced.map_or(Ordinal::FIRST, |(ordinal, _)| *ordinal) })
    }
}

/// What a playlist is rewritten with: the ordinal of each segment, and the keys of those ordinals.
#[derive(Debug, Clone)]
pub struct Published {
    schedule: Arc<Schedule>,
    keys: BTreeMap<Ordinal, Arc<LiveKey>>,
    pub clear_init: Arc<ClearInitSigner>,
}

impl Published {
    pub fn key_at(&self, msn: MediaSequenceNumber) -> Option<&Arc<LiveKey>> {
        self.keys.get(&self.schedule.ordinal_at(msn)?)
    }

    /// The keys that the playlist may name.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<LiveKey>> {
        self.keys.values()
    }
}

/// A stream: how it is set up, and what is known of it.
#[derive(Debug)]
pub struct Stream {
    pub settings: StreamSettings,
    pub(super) known: RwLock<Known>,
    /// Held by whoever changes the stream, from planning to the last write.
    pub(super) changing: tokio::sync::Mutex<()>,
}

impl Stream {
    pub(super) fn new(settings: StreamSettings) -> Self {
        Self { settings, known: RwLock::default(), changing: tokio::sync::Mutex::default() }
    }

    /// What a window calls for; `None` while no key is loaded.
    pub(super) fn call(&self, rendition: &str, window: &PlaylistWindow) -> Option<Call> {
        self.known.read().call(rendition, window, &self.settings.policy)
    }

    /// As [`Self::call`], and from now on no window is published beyond the first planned boundary.
    pub(super) fn propose(&self, rendition: &str, window: &PlaylistWindow) -> Option<Call> {
        let mut known = self.known.write();
        let call = known.call(rendition, window, &self.settings.policy)?;
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
        window: &PlaylistWindow,
        playlist_duration: Duration,
        now: Timestamp,
    ) -> Result<Published, NotYet> {
        let mut known = self.known.write();
        let own = known.renditions.get_mut(rendition).ok_or(NotYet::Loaded)?;
        if own.pending.is_some_and(|pending| pending < window.end) {
            return Err(NotYet::Stored);
        }
        own.see(window);
        own.last_served_at = now;
        own.longest_playlist = own.longest_playlist.max(playlist_duration);
        let schedule = Arc::clone(&own.schedule);
        let keys = match (schedule.ordinal_at(window.first), schedule.ordinal_at(window.end.minus(1))) {
            (Some(from), Some(to)) if from <= to => {
                known.live_keys.range(from..=to).map(|(ordinal, key)| (*ordinal, Arc::clone(key))).collect()
            }
            _ => BTreeMap::new(),
        };
        let clear_init = Arc::clone(known.clear_init.as_ref().ok_or(NotYet::Loaded)?);
        Ok(Published { schedule, keys, clear_init })
    }

    /// What a playlist without segments is rewritten with: it names no key, and calls for none.
    pub(super) fn publish_empty(&self) -> Result<Published, NotYet> {
        let clear_init = self.known.read().clear_init.clone().ok_or(NotYet::Loaded)?;
        Ok(Published { schedule: Arc::default(), keys: BTreeMap::new(), clear_init })
    }

    /// Renditions of which the store does not know enough for a restart.
    pub(super) fn unstored_renditions(&self) -> Vec<RenditionRow> {
        let known = self.known.read();
        known.renditions.iter().filter_map(|(name, rendition)| rendition.unstored(name)).collect()
    }

    pub(super) fn note_stored(&self, row: RenditionRow) {
        if let Some(own) = self.known.write().renditions.get_mut(&row.rendition) {
            own.stored = Some(row);
        }
    }

    /// The stream as a sweep sees it.
    pub(super) fn facts(&self) -> StreamFacts {
        let known = self.known.read();
        let keys = known
            .lives
            .iter()
            .map(|(ordinal, life)| KeyFacts {
                ordinal: *ordinal,
                state: life.state,
                activated_at: life.activated_at,
                forced: life.forced,
                deactivated_at: life.deactivated_at,
                last_named_at: known
                    .live_keys
                    .get(ordinal)
                    .map_or(Timestamp::from_unix_millis(0), |key| key.last_named_at()),
            })
            .collect();
        let renditions = known.renditions.values().map(Rendition::facts).collect();
        let scheduled = known.renditions.values().filter_map(|r| r.schedule.last()).map(|b| b.ordinal).max();
        StreamFacts { keys, renditions, scheduled }
    }
}

impl Rendition {
    /// Notes the newest window. A replica that lags must not take the edge back; a jump back must.
    pub(super) fn see(&mut self, window: &PlaylistWindow) {
        if window.end >= self.edge.end || self.edge.jumps_back_to(window) {
            self.edge = Edge { first: window.first, end: window.end };
            self.ended = window.ended;
            self.keeps_all = window.keeps_all;
        }
    }

    /// The row that the store should have, if it has not. A length that grows is worth a write when it has
    /// doubled: retention is then at most a playlist too short, which the grace period covers.
    fn unstored(&self, name: &str) -> Option<RenditionRow> {
        let enough = self.stored.as_ref().is_some_and(|stored| {
            stored.ended == self.ended
                && stored.keeps_all == self.keeps_all
                && self.longest_playlist <= stored.longest_playlist
        });
        let longest_playlist = match &self.stored {
            Some(stored) if self.longest_playlist <= stored.longest_playlist => stored.longest_playlist,
            _ => self.longest_playlist.saturating_mul(2),
        };
        (!enough).then(|| RenditionRow {
            rendition: name.to_owned(),
            ended: self.ended,
            keeps_all: self.keeps_all,
            longest_playlist,
        })
    }

    fn facts(&self) -> RenditionFacts {
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
