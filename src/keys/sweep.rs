//! What a sweep over one stream should do: a pure function from facts to operations with reasons.
//!
//! The engine gathers the facts, calls [`sweep`] and applies the operations one by one, each in a transaction
//! of its own and idempotent. A sweep that broke off half-way loses nothing: the next one sees what is left
//! to do. Deliberately absent: boundaries, which follow from playlists and not from time (see `schedule`).

use std::time::Duration;

use super::ids::Ordinal;
use super::lifecycle::KeyState;
use super::policy::Policy;
use super::time::Timestamp;

/// How late the node that sweeps may hear what another one served: nodes tell every
/// [`REPORT_INTERVAL`], and a node that cannot suspends the destruction of keys (`engine`).
pub const REPORT_SLACK: Duration = Duration::from_secs(20);
/// How often a node tells what it served.
pub const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// A newest key this much older than its interval counts as overdue (the guide's threshold).
pub const OVERDUE_AFTER: Duration = Duration::from_secs(60 * 60);

/// What a sweep must know of a content key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyFacts {
    pub ordinal: Ordinal,
    pub state: KeyState,
    pub activated_at: Option<Timestamp>,
    /// Every rendition must go over to it.
    pub forced: bool,
    /// When it was deactivated, or revoked.
    pub retired_at: Option<Timestamp>,
    /// Of a compromised key: the one that takes its place in what was published under it.
    pub successor: Option<Ordinal>,
    /// When a playlist that names it was last served, as far as the nodes have told one another.
    pub last_named_at: Timestamp,
    /// Whether as many CDNs have it as the stream's policy waits for.
    pub is_delivered: bool,
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
    /// Those that are not destroyed, in the order of their ordinals.
    pub keys: Vec<KeyFacts>,
    /// One past the highest ordinal that was ever made.
    pub next: Ordinal,
    pub renditions: Vec<RenditionFacts>,
    /// The highest ordinal that a boundary names.
    pub scheduled: Option<Ordinal>,
    /// Whether keys can be made now. Without it the newest key stays the newest once those that wait are used up.
    pub can_make: bool,
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
    let is_to_be_had = |op: &KeyOp| match op {
        KeyOp::Promote { ordinal, .. } => stream.can_make || *ordinal < stream.next,
        _ => true,
    };
    let promoted = promotion(stream, head, policy, now).filter(is_to_be_had);
    // The newest key once the promotion is done, and whether every rendition goes over to it.
    let newest = match &promoted {
        Some(KeyOp::Promote { ordinal, forced, .. }) => Some((*ordinal, *forced)),
        _ => head.map(|head| (head.ordinal, head.forced)),
    };
    if stream.can_make {
        generate(stream, policy, newest.map(|(newest, _)| newest), &mut ops);
    }
    ops.extend(promoted);
    if let Some((newest, is_forced)) = newest {
        ops.extend(force(stream, newest, policy, now).filter(|_| !is_forced));
        retire(stream, newest, policy, now, &mut ops);
    }
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
        let waiting = stream.keys.iter().find(|key| key.state.may_encrypt());
        let first = waiting.map_or(stream.next, |key| key.ordinal);
        let ordinal = stream.scheduled.map_or(first, |scheduled| scheduled.max(first));
        return Some(KeyOp::Promote { ordinal, forced: false, reason: "the stream's first key" });
    };
    let is_vod = !stream.renditions.is_empty() && stream.renditions.iter().all(|r| r.ended);
    let scheduled = stream.scheduled.filter(|scheduled| *scheduled > head.ordinal);
    if let Some(ordinal) = scheduled {
        return Some(KeyOp::Promote { ordinal, forced: false, reason: "a boundary names it already" });
    }
    let age = now.since(head.activated_at?);
    let next = stream.after(head.ordinal);
    let reason = match policy.rotation_interval {
        _ if head.state > KeyState::Active => "the newest key is not in use any more",
        Some(interval) if age >= interval && !is_vod => {
            // One that is overdue goes on all the same: what an edge does not have, it asks the shield for.
            match stream.is_delivered(next) {
                true => "the rotation interval has passed",
                false if age >= interval + OVERDUE_AFTER => {
                    "it is overdue, and CDNs were waited for long enough"
                }
                false => return None,
            }
        }
        _ => return None,
    };
    Some(KeyOp::Promote { ordinal: next, forced: true, reason })
}

impl StreamFacts {
    /// Whether a key that is there may be promoted, as far as CDNs go. One that is still to be made waits for none.
    fn is_delivered(&self, ordinal: Ordinal) -> bool {
        self.keys.iter().find(|key| key.ordinal == ordinal).is_none_or(|key| key.is_delivered)
    }

    /// The next ordinal behind `ordinal` whose key can be used, or is still to be made.
    pub fn after(&self, ordinal: Ordinal) -> Ordinal {
        let usable = |key: &&KeyFacts| key.ordinal > ordinal && key.state.may_encrypt();
        self.keys.iter().find(usable).map_or(self.next.max(ordinal.next()), |key| key.ordinal)
    }
}

/// The newest key is young, because some rendition's count made it; another is still under an old one.
fn force(stream: &StreamFacts, newest: Ordinal, policy: &Policy, now: Timestamp) -> Option<KeyOp> {
    let interval = policy.rotation_interval?;
    let is_old = |ordinal: Ordinal| {
        let key = stream.keys.iter().find(|key| key.ordinal == ordinal);
        key.and_then(|key| key.activated_at).is_some_and(|at| now.since(at) >= interval)
    };
    let lags = |r: &RenditionFacts| !r.ended && r.current < newest && is_old(r.current);
    let due = stream.renditions.iter().any(lags);
    let reason = "a rendition's key is older than the rotation interval";
    due.then_some(KeyOp::Force { ordinal: newest, reason })
}

/// As many keys are to wait behind the newest as the policy says.
fn generate(stream: &StreamFacts, policy: &Policy, newest: Option<Ordinal>, ops: &mut Vec<KeyOp>) {
    let behind = |key: &&KeyFacts| newest.is_none_or(|newest| key.ordinal > newest);
    let waiting =
        stream.keys.iter().filter(|key| key.state == KeyState::PreActive).filter(behind).count() as u32;
    let first = newest.map_or(stream.next, |newest| stream.next.max(newest.next()));
    let end = first.0.saturating_add(policy.pre_generate_keys.saturating_sub(waiting));
    for ordinal in stream.next.0..end {
        ops.push(KeyOp::Generate {
            ordinal: Ordinal(ordinal),
            reason: "fewer keys wait than pre_generate_keys asks for",
        });
    }
}

fn retire(stream: &StreamFacts, newest: Ordinal, policy: &Policy, now: Timestamp, ops: &mut Vec<KeyOp>) {
    let longest = stream.renditions.iter().map(|r| r.longest_playlist).max().unwrap_or_default();
    let retention = policy.retention(longest);
    let is_over = |at: Timestamp| now.since(at) >= retention + REPORT_SLACK;
    let held = held(stream, policy, now);
    let past = stream.keys.iter().zip(held).filter(|(key, is_held)| key.ordinal < newest && !is_held);
    for (key, _) in past {
        match key.state {
            // One that waits before the newest is active once the promotion is done.
            KeyState::PreActive | KeyState::Active => {
                ops.push(KeyOp::Deactivate { ordinal: key.ordinal, reason: "no published playlist names it" })
            }
            KeyState::Deactivated | KeyState::Compromised
                if key.retired_at.is_some_and(is_over) && is_over(key.last_named_at) =>
            {
                ops.push(KeyOp::Destroy {
                    ordinal: key.ordinal,
                    reason: "no playlist that can still be held names it",
                });
            }
            _ => {}
        }
    }
}

/// For each key, whether a published playlist names it, or whoever asks next would get one that does.
fn held(stream: &StreamFacts, policy: &Policy, now: Timestamp) -> Vec<bool> {
    let is_named = |ordinal: Ordinal| stream.renditions.iter().any(|r| r.names(ordinal, policy, now));
    let mut held: Vec<_> = stream.keys.iter().map(|key| is_named(key.ordinal)).collect();
    // In place of a revoked key, playlists name its successor. Successors come behind, so one pass is enough.
    for at in 0..held.len() {
        let Some(successor) = stream.keys[at].successor.filter(|_| held[at]) else { continue };
        if let Ok(at) = stream.keys.binary_search_by_key(&successor, |key| key.ordinal) {
            held[at] = true;
        }
    }
    held
}

impl RenditionFacts {
    /// Whether nobody holds a playlist of it that slides: whoever asks next begins it anew.
    pub fn is_idle(&self, policy: &Policy, now: Timestamp) -> bool {
        let retention = policy.retention(self.longest_playlist);
        !self.keeps_all && now.since(self.last_served_at) >= retention + REPORT_SLACK
    }

    fn names(&self, ordinal: Ordinal, policy: &Policy, now: Timestamp) -> bool {
        let behind = self.keeps_all && ordinal > self.current;
        ordinal >= self.lowest_in_use && !behind && !self.is_idle(policy, now)
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
            retired_at: (state >= KeyState::Deactivated).then_some(at(0)),
            successor: None,
            last_named_at: START,
            is_delivered: true,
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
        let next = keys.last().map_or(Ordinal::FIRST, |key| key.ordinal.next());
        StreamFacts { keys, next, renditions, scheduled: None, can_make: true }
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
    fn a_stream_that_begins_anew_goes_on_behind_its_old_keys() {
        let stream = StreamFacts { next: Ordinal(7), ..facts(vec![], vec![]) };
        let made = [("generate", 7), ("generate", 8), ("generate", 9), ("generate", 10)];
        check(&stream, 0, &[&made[..], &[("promote", 7)]].concat());
    }

    #[test]
    fn a_sweep_that_broke_off_is_gone_on_with() {
        use KeyState::PreActive;
        let stream = facts(vec![key(0, PreActive, None), key(1, PreActive, None)], vec![]);
        check(&stream, 0, &[("generate", 2), ("generate", 3), ("promote", 0)]);
    }

    #[test]
    fn what_waits_is_used_up_where_no_key_can_be_made_and_the_last_one_stays() {
        let without = |stream| StreamFacts { can_make: false, ..stream };
        let stream = without(facts(steady(), vec![live(0, 1800)]));
        check(&stream, 1800, &[("promote", 1)]);
        let last = without(facts(vec![key(3, KeyState::Active, Some(0))], vec![]));
        check(&last, 9_000, &[]);
        check(
            &StreamFacts { can_make: true, ..last },
            9_000,
            &[
                ("generate", 4),
                ("generate", 5),
                ("generate", 6),
                ("generate", 7),
                ("promote", 4),
                ("deactivate", 3),
            ],
        );
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
    fn a_key_that_cdns_do_not_have_waits_until_it_is_overdue() {
        let mut keys = steady();
        keys[1].is_delivered = false;
        let stream = facts(keys, vec![live(0, 5_399)]);
        check(&stream, 5_399, &[]);
        check(&stream, 5_400, &[("generate", 4), ("promote", 1)]);
        // Not for a boundary that is published, nor where the newest key was taken back.
        let scheduled = StreamFacts { scheduled: Some(Ordinal(1)), ..stream.clone() };
        check(&scheduled, 10, &[("generate", 4), ("promote", 1)]);
        let mut revoked = stream;
        revoked.keys[0].state = KeyState::Compromised;
        revoked.keys[0].successor = Some(Ordinal(1));
        check(&revoked, 10, &[("generate", 4), ("promote", 1)]);
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
        let stream = facts(keys.clone(), vec![live(1, 420)]);
        // 40 s of playlist, 60 s of CDN, 300 s of grace, 20 s until all nodes have told.
        check(&stream, 419, &[]);
        check(&stream, 420, &[("destroy", 0)]);

        keys[0].last_named_at = at(100);
        let still_named = facts(keys, vec![live(1, 519)]);
        check(&still_named, 519, &[]);
        check(&still_named, 520, &[("destroy", 0)]);
    }

    #[test]
    fn a_rendition_nobody_fetches_does_not_hold_keys_for_ever() {
        use KeyState::Active;
        let mut keys = steady();
        keys[1] = key(1, Active, Some(10));
        keys.push(key(4, KeyState::PreActive, None));
        let stream = facts(keys, vec![live(0, 0), live(1, 420)]);
        check(&stream, 419, &[]);
        check(&stream, 420, &[("deactivate", 0)]);
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
    fn a_compromised_key_and_its_successor_live_as_long_as_what_was_published_under_it() {
        use KeyState::{Active, Compromised, PreActive};
        let mut keys = vec![key(0, Compromised, Some(0)), key(1, Active, Some(0)), key(2, Active, Some(0))];
        keys[0].successor = Some(Ordinal(1));
        keys.extend((3..6).map(|n| key(n, PreActive, None)));
        let vod = RenditionFacts { ended: true, keeps_all: true, current: Ordinal(0), ..live(0, 0) };
        // The VOD's own last key is 0; key 1 stands in its place, key 2 was never named by it.
        check(&facts(keys.clone(), vec![vod]), 9_000, &[]);
        keys.push(key(6, PreActive, None));
        keys[3] = key(3, Active, Some(9_000));
        check(&facts(keys.clone(), vec![vod]), 9_000, &[("deactivate", 2)]);
        let gone = live(3, 9_000);
        check(&facts(keys, vec![gone]), 9_000, &[("destroy", 0), ("deactivate", 1), ("deactivate", 2)]);
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
