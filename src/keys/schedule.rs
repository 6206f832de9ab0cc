//! Which content key a segment gets: decided once, the same for every node.
//!
//! A rendition's schedule is a list of boundaries that only grows at its end. [`plan`] says which boundaries
//! a playlist calls for; the store accepts them insert-if-absent, and whoever loses reads the winner's. The
//! count trigger is arithmetic (the last boundary plus `segments_per_key`); what time or an operator asks
//! for is placed `lead_segments` past the live edge, so that every node has learnt of it before it matters.
//! Renditions whose numbering agrees share their boundaries, so a packager's whole output changes its key at
//! one Media Sequence Number.
//!
//! Deliberately absent: keys themselves. A boundary names an ordinal; that such a key exists is the sweep's
//! and the engine's business.

use super::ids::{MediaSequenceNumber, Ordinal};
use super::policy::Policy;

/// From `first` on, in `epoch`, a rendition's segments are encrypted under `ordinal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boundary {
    /// Goes up by one when the origin's Media Sequence Numbers jump back.
    pub epoch: u32,
    pub ordinal: Ordinal,
    pub first: MediaSequenceNumber,
}

/// Why a boundary, or a promotion, came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A rendition (or a stream) was seen for the first time.
    Start,
    /// `segments_per_key` segments are under the key.
    Count,
    /// `rotation_interval` has passed, or an operator asked.
    Promotion,
    /// The Media Sequence Numbers jumped back.
    Reset,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::Start => "start",
            Reason::Count => "count",
            Reason::Promotion => "promotion",
            Reason::Reset => "reset",
        }
    }
}

/// The segments that one fetch of a Media Playlist shows: `first ..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaylistWindow {
    pub first: MediaSequenceNumber,
    /// One past the last.
    pub end: MediaSequenceNumber,
    /// EXT-X-ENDLIST stands in it, or EXT-X-PLAYLIST-TYPE is VOD: nothing will be appended.
    pub ended: bool,
    /// Nothing will be removed from its front: EXT-X-PLAYLIST-TYPE is VOD or EVENT, or it has ended.
    pub keeps_all: bool,
}

impl PlaylistWindow {
    fn len(&self) -> u64 {
        self.end.0.saturating_sub(self.first.0)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The last window of a rendition that was seen, by which a jump back is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    pub first: MediaSequenceNumber,
    pub end: MediaSequenceNumber,
}

impl Edge {
    /// Whether `window` begins a new run of numbers. A replica that lags by less than a window, or by three
    /// segments, is not a new run.
    pub fn jumps_back_to(&self, window: &PlaylistWindow) -> bool {
        window.end.plus(window.len().max(3)) < self.end
    }
}

/// How far a stream's promotions have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// The highest ordinal that was ever promoted.
    pub head: Ordinal,
    /// The highest ordinal that time or an operator promoted: every rendition must go over to it.
    pub forced: Ordinal,
}

/// A rendition's boundaries, in order. Ordinals and epochs never go down; within an epoch, `first` goes up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schedule {
    boundaries: Vec<Boundary>,
}

impl Schedule {
    /// From rows, which the store keeps in order.
    pub fn from_rows(boundaries: Vec<Boundary>) -> Self {
        Self { boundaries }
    }

    pub fn extended(&self, more: &[Boundary]) -> Self {
        Self { boundaries: [&self.boundaries, more].concat() }
    }

    pub fn boundaries(&self) -> &[Boundary] {
        &self.boundaries
    }

    pub fn last(&self) -> Option<&Boundary> {
        self.boundaries.last()
    }

    /// The boundaries of the running epoch.
    fn epoch(&self) -> &[Boundary] {
        let Some(last) = self.last() else { return &[] };
        let start = self.boundaries.partition_point(|b| b.epoch < last.epoch);
        &self.boundaries[start..]
    }

    /// The ordinal that covers `msn` in the running epoch; `None` without boundaries. The first period reaches
    /// back without end: a replica that lags may show numbers that the first window did not.
    pub fn ordinal_at(&self, msn: MediaSequenceNumber) -> Option<Ordinal> {
        let epoch = self.epoch();
        let after = epoch.partition_point(|b| b.first <= msn);
        Some(epoch.get(after.saturating_sub(1))?.ordinal)
    }

    /// The ordinals that a window's segments are under.
    fn ordinals_of(&self, window: &PlaylistWindow) -> impl Iterator<Item = Ordinal> {
        let epoch = self.epoch();
        let from = epoch.partition_point(|b| b.first <= window.first).saturating_sub(1);
        let to = epoch.partition_point(|b| b.first < window.end).max(from);
        epoch[from..to].iter().map(|b| b.ordinal)
    }

    /// Whether the numbers of `window` go on where this schedule is: it starts within a period this one has.
    fn agrees_with(&self, window: &PlaylistWindow, policy: &Policy) -> bool {
        let (Some(first), Some(last)) = (self.epoch().first(), self.last()) else { return false };
        first.first <= window.first && window.first < next_by_count(last, policy)
    }
}

fn next_by_count(last: &Boundary, policy: &Policy) -> MediaSequenceNumber {
    last.first.plus(u64::from(policy.segments_per_key))
}

/// What a plan depends on besides the window.
#[derive(Clone, Copy)]
pub struct Situation<'a> {
    pub schedule: &'a Schedule,
    /// The rendition's last seen window.
    pub edge: Option<Edge>,
    pub policy: &'a Policy,
    pub marks: Marks,
    /// The schedules of the stream's other renditions, in a fixed order.
    pub siblings: &'a [&'a Schedule],
    /// Whether an ordinal's key is destroyed. Ordinals that have no key yet are not.
    pub is_destroyed: &'a dyn Fn(Ordinal) -> bool,
}

/// The boundaries that a playlist calls for, beyond those its rendition has; empty when it has them all.
///
/// Boundaries that time or the count asks for soon are returned up to `lead_segments` before they are needed.
/// For a window of n segments at most about n / segments_per_key + 2 come back, and none for an empty one.
pub fn plan(window: &PlaylistWindow, situation: Situation<'_>) -> Vec<(Boundary, Reason)> {
    let Situation { schedule, edge, policy, is_destroyed, .. } = situation;
    if window.is_empty() {
        return Vec::new();
    }
    let Some(last) = schedule.last() else {
        return start(0, None, Reason::Start, window, situation);
    };
    if edge.is_some_and(|edge| edge.jumps_back_to(window)) {
        return start(last.epoch + 1, Some(last.ordinal), Reason::Reset, window, situation);
    }
    // Nobody asked for so long that keys were destroyed: nobody holds a playlist with the old ones.
    if schedule.ordinals_of(window).any(is_destroyed) {
        return start(last.epoch + 1, Some(last.ordinal), Reason::Start, window, situation);
    }
    // Nobody asked for more than a period: the numbers went on without us.
    if window.first >= next_by_count(last, policy).plus(window.len()) {
        let late = PlaylistWindow { first: window.first.minus(window.len()), ..*window };
        return start(last.epoch, Some(last.ordinal), Reason::Start, &late, situation);
    }
    // What was shown further on must not change, even if this window is an older one.
    let end = edge.map_or(window.end, |edge| window.end.max(edge.end));
    let mut planned = Vec::new();
    go_on(*last, &mut planned, &PlaylistWindow { end, ..*window }, situation);
    planned
}

/// The first boundaries of a rendition or an epoch, and those that its window calls for beyond.
fn start(
    epoch: u32,
    after: Option<Ordinal>,
    reason: Reason,
    window: &PlaylistWindow,
    situation: Situation<'_>,
) -> Vec<(Boundary, Reason)> {
    let Situation { policy, marks, siblings, is_destroyed, .. } = situation;
    let shared = siblings
        .iter()
        .filter(|_| reason != Reason::Reset)
        .filter(|sibling| sibling.agrees_with(window, policy))
        .map(|sibling| {
            let at = sibling.epoch().partition_point(|b| b.first <= window.first);
            let first = Boundary { first: window.first, ..sibling.epoch()[at - 1] };
            [&[first], &sibling.epoch()[at..]].concat()
        })
        .find(|shared| {
            let first = shared[0].ordinal;
            after.is_none_or(|after| first > after) && !shared.iter().any(|b| is_destroyed(b.ordinal))
        });
    let mut planned: Vec<_> = match shared {
        Some(shared) => shared.into_iter().map(|b| (Boundary { epoch, ..b }, reason)).collect(),
        None => {
            // A playlist that has ended is cut from the first key on; a live one joins the newest.
            let newest = if window.ended { marks.forced } else { marks.head };
            let ordinal = after.map_or(newest, |after| newest.max(after.next()));
            let ordinal = not_destroyed(ordinal, is_destroyed);
            vec![(Boundary { epoch, ordinal, first: window.first }, reason)]
        }
    };
    if let Some((last, _)) = planned.last().copied() {
        go_on(last, &mut planned, window, situation);
    }
    planned
}

/// `ordinal`, or the next one behind it whose key is not destroyed.
fn not_destroyed(mut ordinal: Ordinal, is_destroyed: &dyn Fn(Ordinal) -> bool) -> Ordinal {
    while is_destroyed(ordinal) {
        ordinal = ordinal.next();
    }
    ordinal
}

/// Adds the boundaries after `last` that the window, the count and a promotion call for.
fn go_on(
    mut last: Boundary,
    planned: &mut Vec<(Boundary, Reason)>,
    window: &PlaylistWindow,
    situation: Situation<'_>,
) {
    let Situation { policy, marks, siblings, is_destroyed, .. } = situation;
    let lead = if window.ended { 0 } else { u64::from(policy.lead_segments) };
    let forced_to = not_destroyed(marks.forced, is_destroyed);
    let horizon = window.end.plus(lead);
    loop {
        let by_count = next_by_count(&last, policy);
        let forced = !window.ended && marks.forced > last.ordinal;
        // Where a sibling has the same promotion still ahead of this window, it is one place for both.
        let by_promotion = siblings
            .iter()
            .filter_map(|s| s.epoch().iter().find(|b| b.ordinal == forced_to))
            .map(|b| b.first)
            .find(|first| *first >= window.end && *first > last.first && *first <= by_count)
            .unwrap_or(horizon.max(last.first.plus(1)));
        let next = if forced && by_promotion < by_count {
            (Boundary { epoch: last.epoch, ordinal: forced_to, first: by_promotion }, Reason::Promotion)
        } else if by_count < horizon || (by_count == horizon && lead > 0) {
            let next = not_destroyed(last.ordinal.next(), is_destroyed);
            let ordinal = if forced { forced_to } else { next };
            (Boundary { epoch: last.epoch, ordinal, first: by_count }, Reason::Count)
        } else {
            return;
        };
        // At the end of the numbers nothing goes on.
        if next.0.first <= last.first {
            return;
        }
        last = next.0;
        planned.push(next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING_PROMOTED: Marks = Marks { head: Ordinal(0), forced: Ordinal(0) };

    fn policy(segments_per_key: u32) -> Policy {
        Policy { segments_per_key, ..Policy::default() }
    }

    /// [`plan`] with every key alive.
    fn plan(
        schedule: &Schedule,
        edge: Option<Edge>,
        window: &PlaylistWindow,
        policy: &Policy,
        marks: Marks,
        siblings: &[&Schedule],
    ) -> Vec<(Boundary, Reason)> {
        let is_destroyed = &|_| false;
        super::plan(window, Situation { schedule, edge, policy, marks, siblings, is_destroyed })
    }

    fn live(first: u64, end: u64) -> PlaylistWindow {
        PlaylistWindow {
            first: MediaSequenceNumber(first),
            end: MediaSequenceNumber(end),
            ended: false,
            keeps_all: false,
        }
    }

    fn schedule(boundaries: &[(u32, u32, u64)]) -> Schedule {
        Schedule::from_rows(
            boundaries
                .iter()
                .map(|&(epoch, ordinal, first)| Boundary {
                    epoch,
                    ordinal: Ordinal(ordinal),
                    first: MediaSequenceNumber(first),
                })
                .collect(),
        )
    }

    /// `expected` is (epoch, ordinal, first) a boundary.
    fn check(planned: Vec<(Boundary, Reason)>, expected: &[(u32, u32, u64, Reason)]) {
        let planned: Vec<_> =
            planned.iter().map(|(b, why)| (b.epoch, b.ordinal.0, b.first.0, *why)).collect();
        assert_eq!(planned, expected);
    }

    #[test]
    fn a_new_live_rendition_starts_at_its_first_segment_under_the_newest_key() {
        let marks = Marks { head: Ordinal(4), forced: Ordinal(2) };
        let planned = plan(&Schedule::default(), None, &live(100, 108), &policy(100), marks, &[]);
        check(planned, &[(0, 4, 100, Reason::Start)]);
    }

    #[test]
    fn a_vod_is_cut_every_segments_per_key() {
        let vod = PlaylistWindow { ended: true, ..live(0, 25) };
        let planned = plan(&Schedule::default(), None, &vod, &policy(10), NOTHING_PROMOTED, &[]);
        check(planned, &[(0, 0, 0, Reason::Start), (0, 1, 10, Reason::Count), (0, 2, 20, Reason::Count)]);
    }

    #[test]
    fn a_vod_that_ends_on_a_cut_gets_no_key_beyond() {
        let vod = PlaylistWindow { ended: true, ..live(0, 20) };
        let planned = plan(&Schedule::default(), None, &vod, &policy(10), NOTHING_PROMOTED, &[]);
        check(planned, &[(0, 0, 0, Reason::Start), (0, 1, 10, Reason::Count)]);
    }

    #[test]
    fn the_count_boundary_is_known_a_lead_ahead() {
        let has = schedule(&[(0, 0, 0)]);
        let at = |end| plan(&has, None, &live(end - 6, end), &policy(100), NOTHING_PROMOTED, &[]);
        check(at(97), &[]);
        check(at(98), &[(0, 1, 100, Reason::Count)]);
        check(at(103), &[(0, 1, 100, Reason::Count)]);
    }

    #[test]
    fn a_promotion_is_placed_a_lead_past_the_live_edge() {
        let has = schedule(&[(0, 0, 0)]);
        let marks = Marks { head: Ordinal(1), forced: Ordinal(1) };
        check(plan(&has, None, &live(10, 16), &policy(100), marks, &[]), &[(0, 1, 18, Reason::Promotion)]);
    }

    #[test]
    fn a_promotion_is_placed_past_what_any_earlier_window_showed() {
        let has = schedule(&[(0, 0, 0)]);
        let marks = Marks { head: Ordinal(1), forced: Ordinal(1) };
        let edge = Some(Edge { first: MediaSequenceNumber(12), end: MediaSequenceNumber(20) });
        let planned = plan(&has, edge, &live(10, 16), &policy(100), marks, &[]);
        check(planned, &[(0, 1, 22, Reason::Promotion)]);
    }

    #[test]
    fn a_promotion_close_to_a_count_boundary_is_that_boundary() {
        let has = schedule(&[(0, 0, 0)]);
        let marks = Marks { head: Ordinal(3), forced: Ordinal(3) };
        check(plan(&has, None, &live(92, 98), &policy(100), marks, &[]), &[(0, 3, 100, Reason::Count)]);
    }

    #[test]
    fn a_promotion_does_not_touch_a_playlist_that_has_ended() {
        let has = schedule(&[(0, 0, 0)]);
        let marks = Marks { head: Ordinal(1), forced: Ordinal(1) };
        let vod = PlaylistWindow { ended: true, ..live(0, 50) };
        check(plan(&has, None, &vod, &policy(100), marks, &[]), &[]);
    }

    #[test]
    fn a_second_rendition_shares_the_boundaries_of_the_first() {
        let sibling = schedule(&[(0, 0, 90), (0, 1, 100), (0, 2, 110)]);
        let marks = Marks { head: Ordinal(2), forced: Ordinal(0) };
        let planned = plan(&Schedule::default(), None, &live(95, 103), &policy(10), marks, &[&sibling]);
        check(planned, &[(0, 0, 95, Reason::Start), (0, 1, 100, Reason::Start), (0, 2, 110, Reason::Start)]);
    }

    #[test]
    fn a_lagging_rendition_takes_a_siblings_promotion_that_is_still_ahead() {
        let sibling = schedule(&[(0, 0, 0), (0, 1, 20)]);
        let has = schedule(&[(0, 0, 0)]);
        let marks = Marks { head: Ordinal(1), forced: Ordinal(1) };
        let planned = plan(&has, None, &live(9, 17), &policy(100), marks, &[&sibling]);
        check(planned, &[(0, 1, 20, Reason::Promotion)]);
    }

    #[test]
    fn a_rendition_nobody_watched_for_long_starts_anew_at_its_window() {
        let has = schedule(&[(0, 0, 0)]);
        let marks = Marks { head: Ordinal(7), forced: Ordinal(7) };
        let planned = plan(&has, None, &live(90_000, 90_006), &policy(100), marks, &[]);
        check(planned, &[(0, 7, 89_994, Reason::Start)]);
    }

    #[test]
    fn a_jump_back_starts_an_epoch_under_a_key_of_its_own() {
        let has = schedule(&[(0, 0, 49_900)]);
        let edge = Some(Edge { first: MediaSequenceNumber(49_992), end: MediaSequenceNumber(50_000) });
        let planned = plan(&has, edge, &live(0, 6), &policy(100), NOTHING_PROMOTED, &[]);
        check(planned, &[(1, 1, 0, Reason::Reset)]);
    }

    #[test]
    fn a_lagging_replica_is_no_jump_back() {
        let has = schedule(&[(0, 0, 49_950)]);
        let edge = Some(Edge { first: MediaSequenceNumber(49_992), end: MediaSequenceNumber(50_000) });
        check(plan(&has, edge, &live(49_989, 49_997), &policy(100), NOTHING_PROMOTED, &[]), &[]);
    }

    #[test]
    fn the_ordinal_of_a_segment_is_that_of_the_last_boundary_before_it() {
        let has = schedule(&[(0, 0, 500), (1, 1, 10), (1, 2, 20)]);
        let at = |msn| has.ordinal_at(MediaSequenceNumber(msn)).map(|o| o.0);
        assert_eq!(at(9), Some(1), "the first period reaches back");
        assert_eq!(at(10), Some(1));
        assert_eq!(at(19), Some(1));
        assert_eq!(at(20), Some(2));
        assert_eq!(at(500), Some(2));
    }

    #[test]
    fn an_empty_window_calls_for_nothing() {
        check(plan(&Schedule::default(), None, &live(0, 0), &policy(10), NOTHING_PROMOTED, &[]), &[]);
        let edge = Some(Edge { first: MediaSequenceNumber(0), end: MediaSequenceNumber(6) });
        check(plan(&schedule(&[(0, 0, 0)]), edge, &live(0, 0), &policy(10), NOTHING_PROMOTED, &[]), &[]);
    }

    #[test]
    fn an_event_that_begins_anew_is_a_jump_back() {
        let has = schedule(&[(0, 0, 0)]);
        let edge = Some(Edge { first: MediaSequenceNumber(0), end: MediaSequenceNumber(50) });
        let event = PlaylistWindow { keeps_all: true, ..live(0, 5) };
        check(plan(&has, edge, &event, &policy(100), NOTHING_PROMOTED, &[]), &[(1, 1, 0, Reason::Reset)]);
    }

    #[test]
    fn a_rendition_whose_key_is_destroyed_begins_anew_under_living_ones() {
        let has = schedule(&[(0, 0, 0)]);
        let is_destroyed = |ordinal: Ordinal| ordinal < Ordinal(6) && ordinal != Ordinal(3);
        let edge = Some(Edge { first: MediaSequenceNumber(90), end: MediaSequenceNumber(96) });
        let marks = Marks { head: Ordinal(6), forced: Ordinal(6) };
        let policy = policy(1000);
        let schedule = &has;
        let situation =
            Situation { schedule, edge, policy: &policy, marks, siblings: &[], is_destroyed: &is_destroyed };
        check(super::plan(&live(100, 106), situation), &[(1, 6, 100, Reason::Start)]);
    }

    #[test]
    fn the_count_skips_keys_that_are_destroyed() {
        let has = schedule(&[(0, 0, 0)]);
        let is_destroyed = |ordinal: Ordinal| [Ordinal(1), Ordinal(2)].contains(&ordinal);
        let marks = Marks { head: Ordinal(4), forced: Ordinal(0) };
        let policy = policy(10);
        let situation = Situation {
            schedule: &has,
            edge: None,
            policy: &policy,
            marks,
            siblings: &[],
            is_destroyed: &is_destroyed,
        };
        check(super::plan(&live(3, 9), situation), &[(0, 3, 10, Reason::Count)]);
    }

    #[test]
    fn a_promotion_to_a_key_that_is_destroyed_goes_to_the_next_living_one() {
        let has = schedule(&[(0, 2, 0)]);
        let policy = policy(100);
        let situation = Situation {
            schedule: &has,
            edge: None,
            policy: &policy,
            marks: Marks { head: Ordinal(5), forced: Ordinal(3) },
            siblings: &[],
            is_destroyed: &|ordinal| ordinal == Ordinal(3),
        };
        check(super::plan(&live(0, 20), situation), &[(0, 4, 22, Reason::Promotion)]);
    }

    #[test]
    fn the_end_of_the_numbers_is_an_end() {
        let window = live(u64::MAX - 3, u64::MAX);
        let planned = plan(&Schedule::default(), None, &window, &policy(2), NOTHING_PROMOTED, &[]);
        assert!(planned.len() <= 4, "{planned:?}");
    }
}
