//! Arbitrary histories of a stream: playlists in any order, time, operators, crashes in the middle of a sweep.
//!
//! The model does what the engine does with a plan and with a sweep's operations, in the same order, and after
//! every step asks what must always hold.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const SEGMENT: Duration = Duration::from_secs(2);
const SHOWN: u64 = 6;

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
    Revoke,
}

fn step() -> impl Strategy<Value = Step> {
    let rendition = 0..3_usize;
    prop_oneof![
        8 => (rendition.clone(), 0..9_u64).prop_map(|(rendition, advance)| Step::Fetch { rendition, advance }),
        2 => (rendition.clone(), 1..3_u64).prop_map(|(rendition, behind)| Step::FetchLagging { rendition, behind }),
        1 => rendition.clone().prop_map(|rendition| Step::Reset { rendition }),
        1 => (rendition, 0..9_u64)
            .prop_map(|(rendition, advance)| Step::KilledBeforePromotion { rendition, advance }),
        4 => (1..120_u64).prop_map(|secs| Step::Wait { secs }),
        5 => Just(Step::Sweep),
        2 => (0..6_usize).prop_map(|done| Step::KilledInSweep { done }),
        1 => Just(Step::Rotate),
        1 => Just(Step::Revoke),
    ]
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Rendition {
    schedule: Schedule,
    edge: Option<Edge>,
    /// Where the origin's window begins.
    first: u64,
    keeps_all: bool,
    last_served_at: Option<Timestamp>,
    longest: Duration,
}

/// A playlist that somebody may hold.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    until: Timestamp,
    rendition: usize,
    epoch: u32,
    /// MSN, the ordinal that it is linked under, and the one that it named as its key.
    segments: Vec<(u64, Ordinal, Ordinal)>,
}

#[derive(Debug, Clone, PartialEq)]
struct Model {
    now: Timestamp,
    keys: BTreeMap<Ordinal, KeyFacts>,
    next: Ordinal,
    renditions: Vec<Rendition>,
    held: Vec<Held>,
}

impl Model {
    fn new() -> Self {
        let event = Rendition { keeps_all: true, ..Rendition::default() };
        Self {
            now: Timestamp::from_unix_millis(1_000_000_000),
            keys: BTreeMap::new(),
            next: Ordinal::FIRST,
            // Two that slide, and a recording from which nothing is removed.
            renditions: vec![Rendition::default(), Rendition { first: 40, ..Rendition::default() }, event],
            held: Vec::new(),
        }
    }

    fn facts(&self) -> StreamFacts {
        let rendition = |r: &Rendition| {
            Some(RenditionFacts {
                lowest_in_use: r.schedule.ordinal_at(r.edge?.first)?,
                current: r.schedule.last()?.ordinal,
                ended: false,
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
        sweep(&self.facts(), &policy(), self.now)
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
        let policy = policy();
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
            ended: false,
            keeps_all: own.keeps_all,
        };
        let siblings: Vec<_> = (0..3).filter(|n| *n != at).map(|n| &self.renditions[n].schedule).collect();
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
            },
        );
        let boundaries: Vec<_> = planned.iter().map(|(boundary, _)| *boundary).collect();
        if let Some(highest) = boundaries.last() {
            self.make_up_to(highest.ordinal);
        }
        let own = &mut self.renditions[at];
        own.schedule = own.schedule.extended(&boundaries);
        if own.edge.is_none_or(|edge| window.end >= edge.end || edge.jumps_back_to(&window)) {
            own.edge = Some(Edge { first: window.first, end: window.end });
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
        (0..3).filter(|n| self.renditions[*n].edge.is_some()).collect()
    }

    fn publish(&mut self, at: usize, begin: u64, end: u64) {
        let length = SEGMENT * u32::try_from(end - begin).unwrap();
        let now = self.now;
        let own = &mut self.renditions[at];
        own.last_served_at = Some(now);
        own.longest = own.longest.max(length);
        let (schedule, epoch) = (own.schedule.clone(), own.schedule.last().unwrap().epoch);
        let until = now.plus(policy().retention(length));
        let mut held = Held { until, rendition: at, epoch, segments: Vec::new() };
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

    fn revoke(&mut self) {
        let Some(marks) = self.marks() else { return };
        let successor = self.facts().after(marks.head);
        self.make_up_to(successor);
        let in_use: Vec<_> = self
            .keys
            .values()
            .filter(|key| matches!(key.state, KeyState::Active | KeyState::Deactivated))
            .map(|key| key.ordinal)
            .collect();
        for ordinal in in_use {
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
                self.renditions[rendition].first += advance;
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
                }
                let first = self.renditions[rendition].first;
                self.fetch(rendition, first, true);
            }
            Step::KilledBeforePromotion { rendition, advance } => {
                self.renditions[rendition].first += advance;
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
                self.make_up_to(next);
                self.promote(next, true);
            }
            Step::Revoke => self.revoke(),
        }
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
