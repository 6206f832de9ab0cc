//! What a sweep over one stream should do: a pure function from facts to operations with reasons.
//!
//! The engine gathers the facts, calls [`sweep`] and applies the operations one by one, each in a transaction
//! of its own and idempotent. A sweep that broke off half-way loses nothing: the next one sees what is left
//! to do. Deliberately absent: boundaries, which follow from playlists and not from time (see `schedule`).

use std::time::Duration;

use super::ids::Ordinal;
use super::policy::Policy;
use super::time::Timestamp;

/// A content key's state, after NIST SP 800-57 part 1 §7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// Made and stored, not in use.
    PreActive,
    /// Segments are, or may be, encrypted under it.
    Active,
    /// No playlist that is published now names it; held for those who still hold an older one.
    Deactivated,
    /// Its bytes are gone.
    Destroyed,
}

impl KeyState {
    const ALL: [KeyState; 4] =
        [KeyState::PreActive, KeyState::Active, KeyState::Deactivated, KeyState::Destroyed];

    pub fn name(self) -> &'static str {
        match self {
            KeyState::PreActive => "pre-active",
            KeyState::Active => "active",
            KeyState::Deactivated => "deactivated",
            KeyState::Destroyed => "destroyed",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// What a sweep must know of a content key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyFacts {
    pub ordinal: Ordinal,
    pub state: KeyState,
    pub activated_at: Option<Timestamp>,
    /// Every rendition must go over to it.
    pub forced: bool,
    pub deactivated_at: Option<Timestamp>,
    /// When a playlist that names it was last served, as far as this process can know.
    pub last_named_at: Timestamp,
}

/// What a sweep must know of a rendition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenditionFacts {
    /// The lowest ordinal that its latest playlist names.
    pub lowest_in_use: Ordinal,
    /// The ordinal of its last boundary.
    pub current: Ordinal,
    /// Nothing will be appended to it.
    pub ended: bool,
    /// Nothing will be removed from it: whoever asks next gets all its segments, however long that takes.
    pub keeps_all: bool,
    pub last_served_at: Timestamp,
    /// The longest playlist that was served of it.
    pub longest_playlist: Duration,
}

/// A stream as a sweep sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamFacts {
    /// In the order of their ordinals, without gaps.
    pub keys: Vec<KeyFacts>,
    pub renditions: Vec<RenditionFacts>,
    /// The highest ordinal that a boundary names.
    pub scheduled: Option<Ordinal>,
}

/// One thing to do to a stream's keys, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyOp {
    /// Make and store a pre-active key.
    Generate { ordinal: Ordinal, reason: &'static str },
    /// Make a pre-active key the stream's newest. `forced`: every rendition must go over to it; otherwise
    /// each comes to it by its own count.
    Promote { ordinal: Ordinal, forced: bool, reason: &'static str },
    /// Every rendition must go over to this active key, which some came to by their count.
    Force { ordinal: Ordinal, reason: &'static str },
    /// No published playlist names it any more.
    Deactivate { ordinal: Ordinal, reason: &'static str },
    /// No playlist that can still be held names it: wipe its bytes.
    Destroy { ordinal: Ordinal, reason: &'static str },
}

/// The operations that bring a stream to where its policy wants it at `now`, in the order to apply them.
pub fn sweep(stream: &StreamFacts, policy: &Policy, now: Timestamp) -> Vec<KeyOp> {
    let mut ops = Vec::new();
    let head = stream.keys.iter().rev().find(|key| key.activated_at.is_some());
    let promoted = promotion(stream, head, policy, now);
    generate(stream, policy, promoted.is_some(), &mut ops);
    ops.extend(promoted.or_else(|| force(stream, head?, policy, now)));
    retire(stream, head, policy, now, &mut ops);
    ops
}

/// The promotion that is due. Its key need not exist yet: `generate` puts its making before it.
fn promotion(
    stream: &StreamFacts,
    head: Option<&KeyFacts>,
    policy: &Policy,
    now: Timestamp,
) -> Option<KeyOp> {
    let Some(head) = head else {
        let ordinal = stream.scheduled.unwrap_or(Ordinal::FIRST);
        return Some(KeyOp::Promote { ordinal, forced: false, reason: "the stream's first key" });
    };
    let is_vod = !stream.renditions.is_empty() && stream.renditions.iter().all(|r| r.ended);
    let scheduled = stream.scheduled.filter(|scheduled| *scheduled > head.ordinal);
    if let Some(ordinal) = scheduled {
        return Some(KeyOp::Promote { ordinal, forced: false, reason: "a boundary names it already" });
    }
    let age = now.since(head.activated_at?);
    (policy.rotation_interval.is_some_and(|interval| age >= interval) && !is_vod).then(|| {
        let ordinal = head.ordinal.next();
        KeyOp::Promote { ordinal, forced: true, reason: "the rotation interval has passed" }
    })
}

/// The newest key is young, because some rendition's count made it; another is still under an old one.
fn force(stream: &StreamFacts, head: &KeyFacts, policy: &Policy, now: Timestamp) -> Option<KeyOp> {
    let interval = policy.rotation_interval?;
    let is_old = |ordinal: Ordinal| {
        let key = stream.keys.iter().find(|key| key.ordinal == ordinal);
        key.and_then(|key| key.activated_at).is_some_and(|at| now.since(at) >= interval)
    };
    let lags = |r: &RenditionFacts| !r.ended && r.current < head.ordinal && is_old(r.current);
    let due = !head.forced && stream.renditions.iter().any(lags);
    let reason = "a rendition's key is older than the rotation interval";
    due.then_some(KeyOp::Force { ordinal: head.ordinal, reason })
}

fn generate(stream: &StreamFacts, policy: &Policy, promoting: bool, ops: &mut Vec<KeyOp>) {
    let waiting = stream.keys.iter().filter(|key| key.state == KeyState::PreActive).count() as u32;
    let wanted = policy.pre_generate_keys + u32::from(promoting);
    let next = stream.keys.last().map_or(0, |key| key.ordinal.0 + 1);
    for ordinal in next..next + wanted.saturating_sub(waiting) {
        ops.push(KeyOp::Generate {
            ordinal: Ordinal(ordinal),
            reason: "fewer keys wait than pre_generate_keys asks for",
        });
    }
}

fn retire(
    stream: &StreamFacts,
    head: Option<&KeyFacts>,
    policy: &Policy,
    now: Timestamp,
    ops: &mut Vec<KeyOp>,
) {
    let Some(head) = head else { return };
    let longest = stream.renditions.iter().map(|r| r.longest_playlist).max().unwrap_or_default();
    let retention = policy.retention(longest);
    let is_held = |ordinal: Ordinal| {
        stream.renditions.iter().any(|r| {
            // A sliding rendition that nobody has fetched for the whole retention holds nothing back; if it
            // is asked for again, it begins anew.
            let behind = r.keeps_all && ordinal > r.current;
            let idle = !r.keeps_all && now.since(r.last_served_at) >= retention;
            ordinal >= r.lowest_in_use && !behind && !idle
        })
    };
    for key in stream.keys.iter().filter(|key| key.ordinal < head.ordinal && !is_held(key.ordinal)) {
        match key.state {
            KeyState::Active => {
                ops.push(KeyOp::Deactivate { ordinal: key.ordinal, reason: "no published playlist names it" })
            }
            KeyState::Deactivated
                if key.deactivated_at.is_some_and(|at| now.since(at) >= retention)
                    && now.since(key.last_named_at) >= retention =>
            {
                ops.push(KeyOp::Destroy {
                    ordinal: key.ordinal,
                    reason: "no playlist that can still be held names it",
                });
            }
            KeyState::PreActive | KeyState::Deactivated | KeyState::Destroyed => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::from_unix_millis(1_000_000_000);

    fn at(secs: u64) -> Timestamp {
        START.plus(Duration::from_secs(secs))
    }

    fn key(ordinal: u32, state: KeyState, activated_secs: Option<u64>) -> KeyFacts {
        KeyFacts {
            ordinal: Ordinal(ordinal),
            state,
            activated_at: activated_secs.map(at),
            forced: false,
            deactivated_at: (state == KeyState::Deactivated).then_some(at(0)),
            last_named_at: START,
        }
    }

    fn live(lowest: u32, served_secs: u64) -> RenditionFacts {
        RenditionFacts {
            lowest_in_use: Ordinal(lowest),
            current: Ordinal(lowest),
            ended: false,
            keeps_all: false,
            last_served_at: at(served_secs),
            longest_playlist: Duration::from_secs(40),
        }
    }

    fn check(stream: &StreamFacts, now_secs: u64, expected: &[(&str, u32)]) {
        let ops: Vec<_> = sweep(stream, &Policy::default(), at(now_secs))
            .iter()
            .map(|op| match op {
                KeyOp::Generate { ordinal, .. } => ("generate", ordinal.0),
                KeyOp::Promote { ordinal, .. } => ("promote", ordinal.0),
                KeyOp::Force { ordinal, .. } => ("force", ordinal.0),
                KeyOp::Deactivate { ordinal, .. } => ("deactivate", ordinal.0),
                KeyOp::Destroy { ordinal, .. } => ("destroy", ordinal.0),
            })
            .collect();
        assert_eq!(ops, expected);
    }

    fn facts(keys: Vec<KeyFacts>, renditions: Vec<RenditionFacts>) -> StreamFacts {
        StreamFacts { keys, renditions, scheduled: None }
    }

    fn steady() -> Vec<KeyFacts> {
        use KeyState::{Active, PreActive};
        vec![
            key(0, Active, Some(0)),
            key(1, PreActive, None),
            key(2, PreActive, None),
            key(3, PreActive, None),
        ]
    }

    #[test]
    fn a_new_stream_gets_its_keys_and_its_first_promotion() {
        let stream = facts(vec![], vec![]);
        check(
            &stream,
            0,
            &[("generate", 0), ("generate", 1), ("generate", 2), ("generate", 3), ("promote", 0)],
        );
    }

    #[test]
    fn a_sweep_that_broke_off_is_gone_on_with() {
        use KeyState::PreActive;
        let stream = facts(vec![key(0, PreActive, None), key(1, PreActive, None)], vec![]);
        check(&stream, 0, &[("generate", 2), ("generate", 3), ("promote", 0)]);
    }

    #[test]
    fn nothing_is_due_before_the_interval() {
        check(&facts(steady(), vec![live(0, 1799)]), 1799, &[]);
    }

    #[test]
    fn the_interval_promotes_the_next_key_and_makes_another() {
        let stream = facts(steady(), vec![live(0, 1800)]);
        check(&stream, 1800, &[("generate", 4), ("promote", 1)]);
    }

    #[test]
    fn a_key_that_a_boundary_names_is_promoted_after_a_crash_in_between() {
        let crashed = StreamFacts { scheduled: Some(Ordinal(1)), ..facts(steady(), vec![live(0, 0)]) };
        check(&crashed, 10, &[("generate", 4), ("promote", 1)]);
    }

    #[test]
    fn a_stream_that_is_all_vod_is_not_rotated_by_time() {
        let vod = RenditionFacts { ended: true, keeps_all: true, ..live(0, 0) };
        check(&facts(steady(), vec![vod]), 999_999, &[]);
    }

    #[test]
    fn a_key_is_deactivated_when_every_window_has_left_it() {
        use KeyState::Active;
        let mut keys = steady();
        keys[1] = key(1, Active, Some(10));
        keys.push(key(4, KeyState::PreActive, None));
        let lagging = facts(keys.clone(), vec![live(1, 20), live(0, 20)]);
        check(&lagging, 20, &[]);
        let left = facts(keys, vec![live(1, 20), live(1, 20)]);
        check(&left, 20, &[("deactivate", 0)]);
    }

    #[test]
    fn a_deactivated_key_outlives_every_playlist_that_may_be_held() {
        use KeyState::{Active, Deactivated};
        let mut keys = steady();
        keys[0] = key(0, Deactivated, Some(0));
        keys[1] = key(1, Active, Some(10));
        keys.push(key(4, KeyState::PreActive, None));
        let stream = facts(keys.clone(), vec![live(1, 400)]);
        // 40 s of playlist, 60 s of CDN, 300 s of grace.
        check(&stream, 399, &[]);
        check(&stream, 400, &[("destroy", 0)]);

        keys[0].last_named_at = at(100);
        let still_named = facts(keys, vec![live(1, 499)]);
        check(&still_named, 499, &[]);
        check(&still_named, 500, &[("destroy", 0)]);
    }

    #[test]
    fn a_rendition_nobody_fetches_does_not_hold_keys_for_ever() {
        use KeyState::Active;
        let mut keys = steady();
        keys[1] = key(1, Active, Some(10));
        keys.push(key(4, KeyState::PreActive, None));
        let stream = facts(keys, vec![live(0, 0), live(1, 400)]);
        check(&stream, 399, &[]);
        check(&stream, 400, &[("deactivate", 0)]);
    }

    #[test]
    fn the_keys_of_a_vod_are_kept_however_long_nobody_watches() {
        use KeyState::Active;
        let keys = vec![
            key(0, Active, Some(0)),
            key(1, Active, Some(0)),
            key(2, KeyState::PreActive, None),
            key(3, KeyState::PreActive, None),
            key(4, KeyState::PreActive, None),
        ];
        let vod = RenditionFacts { ended: true, keeps_all: true, current: Ordinal(1), ..live(0, 0) };
        check(&facts(keys, vec![vod]), 99_999_999, &[]);
    }

    #[test]
    fn a_recording_keeps_its_own_keys_and_no_later_ones() {
        use KeyState::Active;
        let keys: Vec<_> = (0..4).map(|n| key(n, Active, Some(u64::from(n)))).collect();
        let waiting = (4..7).map(|n| key(n, KeyState::PreActive, None));
        let keys = keys.into_iter().chain(waiting).collect();
        let event = RenditionFacts { keeps_all: true, current: Ordinal(1), ..live(0, 0) };
        let channel = live(3, 1_000);
        check(&facts(keys, vec![event, channel]), 1_000, &[("deactivate", 2)]);
    }

    #[test]
    fn a_slow_rendition_is_forced_over_when_its_own_key_is_old() {
        use KeyState::Active;
        let mut keys = steady();
        keys[1] = key(1, Active, Some(1_700));
        keys.push(key(4, KeyState::PreActive, None));
        let stream = facts(keys.clone(), vec![live(1, 1_800), live(0, 1_800)]);
        check(&stream, 1_799, &[]);
        check(&stream, 1_800, &[("force", 1)]);
        keys[1].forced = true;
        check(&facts(keys, vec![live(1, 1_800), live(0, 1_800)]), 1_800, &[]);
    }
}
