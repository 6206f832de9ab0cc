//! Arbitrary histories of a stream: playlists in any order, live, ended and recorded, time, operators, changes of its
//! rules, crashes in the middle of a sweep.
//!
//! The model does what the engine does with a plan and with a sweep's operations, in the same order, and after
//! every step asks what must always hold.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const SEGMENT: Duration = Duration::from_secs(2);
const SHOWN: u64 = 6;
/// Two that slide, a recording from which nothing is removed, and a VOD.
const RENDITIONS: usize = 4;

fn policy() -> Policy {
    Policy {
        rotation_interval: Some(Duration::from_secs(60)),
        segments_per_key: 5,
        pre_generate_keys: 2,
        grace_period: Duration::from_secs(20),
        cdn_ttl: Duration::from_secs(10),
        ..Policy::default()
    }
}

/// One thing that happens to a stream.
#[derive(Debug, Clone)]
enum Step {
    /// A rendition's playlist is asked for, so many segments further on.
    Fetch {
        rendition: usize,
        advance: u64,
    },
    /// As above from a replica that lags by a few segments.
    FetchLagging {
        rendition: usize,
        behind: u64,
    },
    /// The origin numbers its segments anew.
    Reset {
        rendition: usize,
    },
    /// Boundaries are stored, and the process is killed before it promotes their keys.
    KilledBeforePromotion {
        rendition: usize,
        advance: u64,
    },
    Wait {
        secs: u64,
    },
    Sweep,
    /// The process is killed after so many operations of a sweep.
    KilledInSweep {
        done: usize,
    },
    Rotate,
    /// All keys in use.
    Revoke,
    /// One key, in use or waiting.
    RevokeOne {
        nth: usize,
    },
    /// A rendition's origin appends nothing any more.
    End {
        rendition: usize,
    },
    /// The stream is deleted, and begins anew with the next sweep.
    Delete,
    /// An operator changes the rules.
    Change(Policy),
    /// Keys cannot be made any more, or again.
    Kms {
        is_up: bool,
    },
}

fn changed_policy() -> impl Strategy<Value = Policy> {
    let interval = prop_oneof![Just(None), (5..120_u64).prop_map(|secs| Some(Duration::from_secs(secs)))];
    (interval, 1..9_u32, 1..5_u32, 0..4_u32, 0..60_u64).prop_map(
        |(rotation_interval, segments_per_key, pre_generate_keys, lead_segments, grace_secs)| Policy {
            rotation_interval,
            segments_per_key,
            pre_generate_keys,
            lead_segments,
            grace_period: Duration::from_secs(grace_secs),
            ..policy()
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let rendition = 0..RENDITIONS;
    prop_oneof![
        8 => (rendition.clone(), 0..9_u64).prop_map(|(rendition, advance)| Step::Fetch { rendition, advance }),
        2 => (rendition.clone(), 1..3_u64).prop_map(|(rendition, behind)| Step::FetchLagging { rendition, behind }),
        1 => rendition.clone().prop_map(|rendition| Step::Reset { rendition }),
        1 => (rendition.clone(), 0..9_u64)
            .prop_map(|(rendition, advance)| Step::KilledBeforePromotion { rendition, advance }),
        4 => (1..120_u64).prop_map(|secs| Step::Wait { secs }),
        5 => Just(Step::Sweep),
        2 => (0..6_usize).prop_map(|done| Step::KilledInSweep { done }),
        1 => Just(Step::Rotate),
        1 => Just(Step::Revoke),
        1 => (0..8_usize).prop_map(|nth| Step::RevokeOne { nth }),
        1 => rendition.prop_map(|rendition| Step::End { rendition }),
        1 => Just(Step::Delete),
        1 => changed_policy().prop_map(Step::Change),
        1 => any::<bool>().prop_map(|is_up| Step::Kms { is_up }),
    ]
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Rendition {
    schedule: Schedule,
    edge: Option<Edge>,
    /// Where the origin's window begins.
    first: u64,
    keeps_all: bool,
    /// Whether the origin has ended it, and whether the newest window that was seen said so.
    ended: bool,
    seen_ended: bool,
    last_served_at: Option<Timestamp>,
    longest: Duration,
}

/// A playlist that somebody may hold.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    served_at: Timestamp,
    length: Duration,
    until: Timestamp,
    rendition: usize,
    epoch: u32,
    /// MSN, the ordinal that it is linked under, and the one that it named as its key.
    segments: Vec<(u64, Ordinal, Ordinal)>,
}

#[derive(Debug, Clone, PartialEq)]
struct Model {
    now: Timestamp,
    policy: Policy,
    keys: BTreeMap<Ordinal, KeyFacts>,
    next: Ordinal,
    renditions: Vec<Rendition>,
    held: Vec<Held>,
    can_make: bool,
}

impl Model {
    fn new() -> Self {
        let event = Rendition { keeps_all: true, ..Rendition::default() };
        let vod = Rendition { first: 17, ended: true, ..event.clone() };
        let channel = Rendition::default();
        Self {
            now: Timestamp::from_unix_millis(1_000_000_000),
            policy: policy(),
            keys: BTreeMap::new(),
            next: Ordinal::FIRST,
            renditions: vec![channel.clone(), Rendition { first: 40, ..channel }, event, vod],
            held: Vec::new(),
            can_make: true,
        }
    }

    fn facts(&self) -> StreamFacts {
        let rendition = |r: &Rendition| {
            Some(RenditionFacts {
                lowest_in_use: r.schedule.ordinal_at(r.edge?.first)?,
                current: r.schedule.last()?.ordinal,
                ended: r.seen_ended,
                keeps_all: r.keeps_all,
                last_served_at: r.last_served_at?,
                longest_playlist: r.longest,
            })
        };
        StreamFacts {
            keys: self.keys.values().copied().collect(),
            next: self.next,
            renditions: self.renditions.iter().filter_map(rendition).collect(),
            scheduled: self.renditions.iter().filter_map(|r| r.schedule.last()).map(|b| b.ordinal).max(),
            can_make: self.can_make,
        }
    }

    fn state_of(&self, ordinal: Ordinal) -> Option<KeyState> {
        match self.keys.get(&ordinal) {
            Some(key) => Some(key.state),
            None => (ordinal < self.next).then_some(KeyState::Destroyed),
        }
    }

    fn make_up_to(&mut self, highest: Ordinal) {
        while self.next <= highest {
            let key = KeyFacts {
                ordinal: self.next,
                state: KeyState::PreActive,
                activated_at: None,
                forced: false,
                retired_at: None,
                successor: None,
                last_named_at: self.now,
                is_delivered: true,
            };
            self.keys.insert(self.next, key);
            self.next = self.next.next();
        }
    }

    /// Takes a key to a state, if it is not past it. Every way must be a legal one.
    fn transit(&mut self, ordinal: Ordinal, to: KeyState) -> bool {
        let Some(key) = self.keys.get_mut(&ordinal).filter(|key| key.state < to) else { return false };
        assert!(key.state.transition_to(to).is_some(), "{ordinal}: {:?} to {to:?}", key.state);
        key.state = to;
        true
    }

    fn promote(&mut self, upto: Ordinal, forced: bool) {
        let waiting: Vec<_> = self.keys.range(..=upto).map(|(ordinal, _)| *ordinal).collect();
        for ordinal in waiting {
            let now = self.now;
            if self.state_of(ordinal) == Some(KeyState::PreActive) && self.transit(ordinal, KeyState::Active)
            {
                let key = self.keys.get_mut(&ordinal).unwrap();
                (key.activated_at, key.forced) = (Some(now), forced);
            }
        }
    }

    fn apply(&mut self, op: &KeyOp) {
        let now = self.now;
        match *op {
            KeyOp::Generate { ordinal, .. } => self.make_up_to(ordinal),
            KeyOp::Promote { ordinal, forced, .. } => self.promote(ordinal, forced),
            KeyOp::Force { ordinal, .. } => self.keys.get_mut(&ordinal).unwrap().forced = true,
            KeyOp::Deactivate { ordinal, .. } => {
                if self.transit(ordinal, KeyState::Deactivated) {
                    self.keys.get_mut(&ordinal).unwrap().retired_at = Some(now);
                }
            }
            KeyOp::Destroy { ordinal, .. } => {
                if self.transit(ordinal, KeyState::Destroyed) {
                    self.keys.remove(&ordinal);
                }
            }
        }
    }

    fn sweep(&self) -> Vec<KeyOp> {
        sweep(&self.facts(), &self.policy, self.now)
    }

    fn swept(&self, ops: &[KeyOp]) -> Self {
        let mut after = self.clone();
        ops.iter().for_each(|op| after.apply(op));
        after
    }

    fn in_place_of(&self, mut ordinal: Ordinal) -> Ordinal {
        while let Some(successor) = self.keys.get(&ordinal).and_then(|key| key.successor) {
            assert!(successor > ordinal);
            ordinal = successor;
        }
        ordinal
    }

    fn fetch(&mut self, at: usize, first: u64, promotes: bool) {
        let policy = self.policy.clone();
        if self.marks().is_none() {
            // The stream has no keys yet: the shield answers that it is not ready.
            return;
        }
        let own = &self.renditions[at];
        let begin = if own.keeps_all { 0 } else { first };
        let end = first + SHOWN;
        let window = PlaylistWindow {
            first: MediaSequenceNumber(begin),
            end: MediaSequenceNumber(end),
            // A replica that lags does not know yet.
            ended: own.ended && first == own.first,
            keeps_all: own.keeps_all,
        };
        let siblings: Vec<_> =
            (0..RENDITIONS).filter(|n| *n != at).map(|n| &self.renditions[n].schedule).collect();
        let is_idle = self
            .facts()
            .renditions
            .iter()
            .zip(self.seen())
            .any(|(facts, n)| n == at && facts.is_idle(&policy, self.now));
        let planned = plan(
            &window,
            Situation {
                schedule: &own.schedule,
                edge: own.edge,
                policy: &policy,
                marks: self.marks().unwrap(),
                siblings: &siblings,
                state_of: &|ordinal| self.state_of(ordinal),
                is_idle,
                unmade: Some(self.next).filter(|_| !self.can_make),
            },
        );
        if !self.can_make && planned.iter().any(|(boundary, _)| boundary.ordinal >= self.next) {
            // It is refused until the KMS is back.
            return;
        }
        let boundaries: Vec<_> = planned.iter().map(|(boundary, _)| *boundary).collect();
        if let Some(highest) = boundaries.last() {
            self.make_up_to(highest.ordinal);
        }
        let own = &mut self.renditions[at];
        own.schedule = own.schedule.extended(&boundaries);
        if own.edge.is_none_or(|edge| window.end >= edge.end || edge.jumps_back_to(&window)) {
            own.edge = Some(Edge { first: window.first, end: window.end });
            own.seen_ended = window.ended;
        }
        own.last_served_at.get_or_insert(self.now);
        if !promotes {
            return;
        }
        if let Some(highest) = boundaries.last() {
            self.promote(highest.ordinal, false);
        }
        self.publish(at, begin, end);
    }

    /// Which renditions `facts` has, in its order.
    fn seen(&self) -> Vec<usize> {
        (0..RENDITIONS).filter(|n| self.renditions[*n].edge.is_some()).collect()
    }

    fn publish(&mut self, at: usize, begin: u64, end: u64) {
        let length = SEGMENT * u32::try_from(end - begin).unwrap();
        let now = self.now;
        let own = &mut self.renditions[at];
        own.last_served_at = Some(now);
        own.longest = own.longest.max(length);
        let (schedule, epoch) = (own.schedule.clone(), own.schedule.last().unwrap().epoch);
        let until = now.plus(self.policy.retention(length));
        let mut held = Held { served_at: now, length, until, rendition: at, epoch, segments: Vec::new() };
        for msn in begin..end {
            let ordinal = schedule.ordinal_at(MediaSequenceNumber(msn)).expect("exactly one current ordinal");
            let cipher = self.in_place_of(ordinal);
            for named in [ordinal, cipher] {
                let key =
                    self.keys.get_mut(&named).unwrap_or_else(|| panic!("{msn}: key {named} is destroyed"));
                key.last_named_at = now;
            }
            assert_ne!(self.keys[&cipher].state, KeyState::Compromised, "{msn} names a revoked key");
            held.segments.push((msn, ordinal, cipher));
        }
        // What somebody holds, and what is published now, must agree about every path.
        for other in self.held.iter().filter(|h| h.until > now && h.rendition == at && h.epoch == epoch) {
            for (msn, ordinal, _) in &other.segments {
                let here = held.segments.iter().find(|(m, ..)| m == msn);
                assert!(
                    here.is_none_or(|(_, o, _)| o == ordinal),
                    "segment {msn} was published under {ordinal}"
                );
            }
        }
        self.held.push(held);
    }

    fn marks(&self) -> Option<Marks> {
        let promoted = || self.keys.values().rev().filter(|key| key.activated_at.is_some());
        let head = promoted().next()?.ordinal;
        Some(Marks {
            head,
            forced: promoted().find(|key| key.forced).map_or(Ordinal::FIRST, |key| key.ordinal),
        })
    }

    fn revoke(&mut self, ordinals: &[Ordinal]) {
        let (Some(marks), false) = (self.marks(), ordinals.is_empty()) else { return };
        let highest = ordinals.iter().copied().fold(marks.head, Ordinal::max);
        let successor = self.facts().after(highest);
        if !self.can_make && successor >= self.next {
            return;
        }
        self.make_up_to(successor);
        for &ordinal in ordinals {
            assert!(self.transit(ordinal, KeyState::Compromised));
            let now = self.now;
            let key = self.keys.get_mut(&ordinal).unwrap();
            (key.retired_at, key.successor) = (Some(now), Some(successor));
        }
        self.promote(successor, true);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Fetch { rendition, advance } => {
                self.advance(rendition, advance);
                let first = self.renditions[rendition].first;
                self.fetch(rendition, first, true);
            }
            Step::FetchLagging { rendition, behind } => {
                let first = self.renditions[rendition].first.saturating_sub(behind);
                self.fetch(rendition, first, true);
            }
            Step::Reset { rendition } => {
                if !self.renditions[rendition].keeps_all {
                    self.renditions[rendition].first = 0;
                    self.renditions[rendition].ended = false;
                }
                let first = self.renditions[rendition].first;
                self.fetch(rendition, first, true);
            }
            Step::KilledBeforePromotion { rendition, advance } => {
                self.advance(rendition, advance);
                let first = self.renditions[rendition].first;
                self.fetch(rendition, first, false);
            }
            Step::Wait { secs } => {
                self.now = self.now.plus(Duration::from_secs(secs));
                let now = self.now;
                self.held.retain(|held| held.until > now);
            }
            Step::Sweep => self.check_sweep(None),
            Step::KilledInSweep { done } => self.check_sweep(Some(done)),
            Step::Rotate => {
                let Some(marks) = self.marks() else { return };
                let next = self.facts().after(marks.head);
                if !self.can_make && next >= self.next {
                    return;
                }
                self.make_up_to(next);
                self.promote(next, true);
            }
            Step::Revoke => {
                let in_use = |key: &&KeyFacts| matches!(key.state, KeyState::Active | KeyState::Deactivated);
                let in_use: Vec<_> = self.keys.values().filter(in_use).map(|key| key.ordinal).collect();
                self.revoke(&in_use);
            }
            Step::RevokeOne { nth } => {
                let may_be = |key: &&KeyFacts| key.state.transition_to(KeyState::Compromised).is_some();
                let one = self.keys.values().filter(may_be).map(|key| key.ordinal).nth(nth);
                self.revoke(one.as_slice());
            }
            Step::End { rendition } => {
                self.renditions[rendition].ended = true;
                let first = self.renditions[rendition].first;
                self.fetch(rendition, first, true);
            }
            Step::Delete => self.delete(),
            Step::Change(ref policy) => self.change(policy),
            Step::Kms { is_up } => self.can_make = is_up,
        }
    }

    fn advance(&mut self, at: usize, advance: u64) {
        let own = &mut self.renditions[at];
        own.first += if own.ended { 0 } else { advance };
    }

    fn delete(&mut self) {
        for ordinal in self.keys.keys().copied().collect::<Vec<_>>() {
            assert!(self.transit(ordinal, KeyState::Destroyed));
        }
        self.keys.clear();
        self.held.clear();
        for own in &mut self.renditions {
            let Rendition { first, keeps_all, ended, .. } = *own;
            *own = Rendition { first, keeps_all, ended, ..Rendition::default() };
        }
    }

    /// What is kept for how long follows the rules of now, for playlists too that were served before.
    fn change(&mut self, policy: &Policy) {
        self.policy = policy.clone();
        let now = self.now;
        self.held.iter_mut().for_each(|held| held.until = held.served_at.plus(policy.retention(held.length)));
        self.held.retain(|held| held.until > now);
    }

    /// Sweeps, or is killed in between; either way the same must come out in the end.
    fn check_sweep(&mut self, killed_after: Option<usize>) {
        let ops = self.sweep();
        let whole = self.swept(&ops);
        assert_eq!(whole.sweep(), [], "a sweep leaves nothing to the next one");
        for done in 0..=ops.len() {
            let part = self.swept(&ops[..done]);
            let ops = part.sweep();
            assert_eq!(part.swept(&ops), whole, "after {done} operations");
        }
        let twice: Vec<_> = ops.iter().flat_map(|op| [op.clone(), op.clone()]).collect();
        assert_eq!(self.swept(&twice), whole, "doing it twice is doing it once");
        *self = match killed_after {
            Some(done) => self.swept(&ops[..done.min(ops.len())]),
            None => whole,
        };
    }

    fn check(&self) {
        for held in self.held.iter().filter(|held| held.until > self.now) {
            for (msn, ordinal, cipher) in &held.segments {
                for named in [ordinal, cipher] {
                    assert!(self.keys.contains_key(named), "{msn}: key {named} is held, and destroyed");
                }
            }
        }
        for rendition in &self.renditions {
            let boundaries = rendition.schedule.boundaries();
            assert!(boundaries.windows(2).all(|b| b[0].ordinal <= b[1].ordinal && b[0].epoch <= b[1].epoch));
            let rises = |b: &[Boundary]| b[0].epoch < b[1].epoch || b[0].first < b[1].first;
            assert!(boundaries.windows(2).all(rises), "{boundaries:?}");
        }
        let waiting = self.keys.values().filter(|key| key.state == KeyState::PreActive);
        assert!(waiting.count() < 60, "keys that wait are bounded");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_a_stream(steps in prop::collection::vec(step(), 1..80)) {
        let mut model = Model::new();
        model.check_sweep(None);
        for step in &steps {
            model.step(step);
            model.check();
        }
    }
}
