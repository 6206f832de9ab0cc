//! Which boundaries a playlist calls for, beyond those its rendition has.
//!
//! The store accepts what is planned insert-if-absent, and whoever loses reads the winner's. The count trigger is
//! arithmetic (the last boundary plus its `segments`); what time or an operator asks for is placed
//! `lead_segments` past the live edge, so that every node has learnt of it before it matters. Renditions whose
//! numbering agrees share their boundaries, so a packager's whole output changes its key at one Media Sequence
//! Number.
//!
//! Where the next key can neither be had nor made, because the KMS is away, the last one goes on: in periods of their
//! own, a tenth as long, so that every node agrees on how far, and the next key is not long in coming once it can be made
//! (docs/design/015).

use super::ids::{MediaSequenceNumber, Ordinal};
use super::lifecycle::KeyState;
use super::policy::Policy;
use super::schedule::{Boundary, Edge, Marks, PlaylistWindow, Reason, Schedule};

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
    /// The state of an ordinal's key; `None` while it is still to be made.
    pub state_of: &'a dyn Fn(Ordinal) -> Option<KeyState>,
    /// Nobody can hold a playlist of the rendition ([`super::RenditionFacts::is_idle`]).
    pub is_idle: bool,
    /// From this ordinal on, keys are not there and cannot be made now.
    pub unmade: Option<Ordinal>,
}

impl Situation<'_> {
    fn is_destroyed(&self, ordinal: Ordinal) -> bool {
        (self.state_of)(ordinal) == Some(KeyState::Destroyed)
    }

    fn may_encrypt(&self, ordinal: Ordinal) -> bool {
        (self.state_of)(ordinal).is_none_or(KeyState::may_encrypt)
    }

    fn is_to_be_had(&self, ordinal: Ordinal) -> bool {
        self.unmade.is_none_or(|unmade| ordinal < unmade)
    }

    /// `ordinal`, or the next one behind it whose key can be used.
    fn usable(&self, mut ordinal: Ordinal) -> Ordinal {
        while !self.may_encrypt(ordinal) {
            ordinal = ordinal.next();
        }
        ordinal
    }
}

/// The boundaries that a playlist calls for, beyond those its rendition has; empty when it has them all.
///
/// Boundaries that time or the count asks for soon are returned up to `lead_segments` before they are needed. One
/// whose ordinal is not to be had ([`Situation::unmade`]) comes back only where no other key will do: the rendition cannot
/// go on without it.
/// For a window of n segments at most about n / segments_per_key + 2 come back, and none for an empty one.
pub fn plan(window: &PlaylistWindow, situation: Situation<'_>) -> Vec<(Boundary, Reason)> {
    let Situation { schedule, edge, is_idle, .. } = situation;
    if window.is_empty() {
        return Vec::new();
    }
    let Some(last) = schedule.last() else {
        return start(0, None, Reason::Start, window, situation);
    };
    if edge.is_some_and(|edge| edge.jumps_back_to(window)) {
        return start(last.epoch + 1, Some(last.ordinal), Reason::Reset, window, situation);
    }
    // Nobody asked for so long that keys were let go: nobody holds a playlist with the old ones.
    let is_gone = |ordinal| situation.is_destroyed(ordinal) || (is_idle && !situation.may_encrypt(ordinal));
    if schedule.ordinals_of(window).any(is_gone) {
        return start(last.epoch + 1, Some(last.ordinal), Reason::Start, window, situation);
    }
    // Nobody asked for more than a period: the numbers went on without us.
    let is_unseen = edge.is_none_or(|edge| edge.end <= window.first);
    if is_unseen && window.first >= last.next_by_count().plus(window.len()) {
        let late = PlaylistWindow { first: window.first.minus(window.len()), ..*window };
        return start(last.epoch, Some(last.ordinal), Reason::Start, &late, situation);
    }
    // What was shown further on must not change, even if this window is an older one.
    let end = edge.map_or(window.end, |edge| window.end.max(edge.end));
    let mut planned = Vec::new();
    go_on(*last, &mut planned, &PlaylistWindow { end, ..*window }, edge.map(|edge| edge.end), situation);
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
    let Situation { policy, marks, siblings, .. } = situation;
    let shared = siblings
        .iter()
        .filter(|_| reason != Reason::Reset)
        .filter(|sibling| sibling.agrees_with(window))
        .map(|sibling| {
            let at = sibling.epoch().partition_point(|b| b.first <= window.first);
            let first = Boundary { first: window.first, ..sibling.epoch()[at - 1] };
            [&[first], &sibling.epoch()[at..]].concat()
        })
        .find(|shared| {
            let first = shared[0].ordinal;
            // A deactivated key is one that the sibling's window has just left: it is held for such as this.
            let is_held = |b: &Boundary| {
                situation.may_encrypt(b.ordinal)
                    || (situation.state_of)(b.ordinal) == Some(KeyState::Deactivated)
            };
            after.is_none_or(|after| first > after) && shared.iter().all(is_held)
        });
    let mut planned: Vec<_> = match shared {
        Some(shared) => shared.into_iter().map(|b| (Boundary { epoch, ..b }, reason)).collect(),
        None => {
            // A playlist that has ended is cut from the first key on; a live one joins the newest.
            let newest = if window.ended { marks.forced } else { marks.head };
            let ordinal = after.map_or(newest, |after| newest.max(after.next()));
            let mut ordinal = situation.usable(ordinal);
            // Numbers that come again must not come under a key that they were under before.
            if !situation.is_to_be_had(ordinal) && reason != Reason::Reset {
                ordinal = situation.usable(after.map_or(newest, |after| newest.max(after)));
            }
            let segments = policy.segments_per_key;
            vec![(Boundary { epoch, ordinal, first: window.first, segments }, reason)]
        }
    };
    if let Some((last, _)) = planned.last().copied() {
        go_on(last, &mut planned, window, None, situation);
    }
    planned
}

/// Adds the boundaries after `last` that the window, the count and a promotion call for. `shown`: one past the
/// last segment that was published under `last`.
fn go_on(
    mut last: Boundary,
    planned: &mut Vec<(Boundary, Reason)>,
    window: &PlaylistWindow,
    shown: Option<MediaSequenceNumber>,
    situation: Situation<'_>,
) {
    let Situation { policy, marks, siblings, .. } = situation;
    let lead = if window.ended { 0 } else { u64::from(policy.lead_segments) };
    let forced_to = situation.usable(marks.forced);
    let horizon = window.end.plus(lead);
    loop {
        // What was shown under the last key, because the next one could not be had in time, stays under it.
        let by_count = match shown {
            Some(shown) if last.next_by_count() < shown => horizon,
            _ => last.next_by_count(),
        };
        let forced = !window.ended && marks.forced > last.ordinal && situation.is_to_be_had(forced_to);
        // Where a sibling has the same promotion still ahead of this window, it is one place for both.
        let by_promotion = siblings
            .iter()
            .filter_map(|s| s.epoch().iter().find(|b| b.ordinal == forced_to))
            .map(|b| b.first)
            .find(|first| *first >= window.end && *first > last.first && *first <= by_count)
            .unwrap_or(horizon.max(last.first.plus(1)));
        let segments = policy.segments_per_key;
        let next = if forced && by_promotion < by_count {
            let first = by_promotion;
            (Boundary { epoch: last.epoch, ordinal: forced_to, first, segments }, Reason::Promotion)
        } else if by_count < horizon || (by_count == horizon && lead > 0) {
            let next = situation.usable(last.ordinal.next());
            let ordinal = if forced { forced_to } else { next };
            match situation.is_to_be_had(ordinal) {
                true => (Boundary { epoch: last.epoch, ordinal, first: by_count, segments }, Reason::Count),
                false if by_count < window.end => (prolonged(last, by_count, window, policy), Reason::Count),
                // It may be had by then.
                false => return,
            }
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

/// The last key again, from `first` on.
fn prolonged(
    last: Boundary,
    first: MediaSequenceNumber,
    window: &PlaylistWindow,
    policy: &Policy,
) -> Boundary {
    // What has ended is not looked at again, so that one boundary is enough.
    let rest = u32::try_from(window.end.0.saturating_sub(first.0)).unwrap_or(u32::MAX);
    let soon = (policy.segments_per_key / 10).max(policy.lead_segments.saturating_add(1));
    Boundary { first, segments: if window.ended { rest } else { soon }, ..last }
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
        let state_of = &|_| None;
        let is_idle = false;
        let unmade = None;
        super::plan(window, Situation { schedule, edge, policy, marks, siblings, state_of, is_idle, unmade })
    }

    fn live(first: u64, end: u64) -> PlaylistWindow {
        PlaylistWindow {
            first: MediaSequenceNumber(first),
            end: MediaSequenceNumber(end),
            ended: false,
            keeps_all: false,
        }
    }

    /// Boundaries of 100 segments each.
    fn schedule(boundaries: &[(u32, u32, u64)]) -> Schedule {
        periods(100, boundaries)
    }

    fn periods(segments: u32, boundaries: &[(u32, u32, u64)]) -> Schedule {
        Schedule::from_rows(
            0,
            boundaries
                .iter()
                .map(|&(epoch, ordinal, first)| Boundary {
                    epoch,
                    ordinal: Ordinal(ordinal),
                    first: MediaSequenceNumber(first),
                    segments,
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
        let sibling = periods(10, &[(0, 0, 90), (0, 1, 100), (0, 2, 110)]);
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
        let state_of =
            |ordinal: Ordinal| (ordinal < Ordinal(6) && ordinal != Ordinal(3)).then_some(KeyState::Destroyed);
        let edge = Some(Edge { first: MediaSequenceNumber(90), end: MediaSequenceNumber(96) });
        let marks = Marks { head: Ordinal(6), forced: Ordinal(6) };
        let policy = policy(1000);
        let schedule = &has;
        let situation = Situation {
            schedule,
            edge,
            policy: &policy,
            marks,
            siblings: &[],
            state_of: &state_of,
            is_idle: false,
            unmade: None,
        };
        check(super::plan(&live(100, 106), situation), &[(1, 6, 100, Reason::Start)]);
    }

    #[test]
    fn the_count_skips_keys_that_are_destroyed() {
        let has = periods(10, &[(0, 0, 0)]);
        let state_of =
            |ordinal: Ordinal| [Ordinal(1), Ordinal(2)].contains(&ordinal).then_some(KeyState::Destroyed);
        let marks = Marks { head: Ordinal(4), forced: Ordinal(0) };
        let policy = policy(10);
        let situation = Situation {
            schedule: &has,
            edge: None,
            policy: &policy,
            marks,
            siblings: &[],
            state_of: &state_of,
            is_idle: false,
            unmade: None,
        };
        check(super::plan(&live(3, 9), situation), &[(0, 3, 10, Reason::Count)]);
    }

    #[test]
    fn a_promotion_to_a_key_that_is_revoked_goes_to_the_next_living_one() {
        let has = schedule(&[(0, 2, 0)]);
        let policy = policy(100);
        let situation = Situation {
            schedule: &has,
            edge: None,
            policy: &policy,
            marks: Marks { head: Ordinal(5), forced: Ordinal(3) },
            siblings: &[],
            state_of: &|ordinal| (ordinal == Ordinal(3)).then_some(KeyState::Compromised),
            is_idle: false,
            unmade: None,
        };
        check(super::plan(&live(0, 20), situation), &[(0, 4, 22, Reason::Promotion)]);
    }

    #[test]
    fn a_change_of_policy_moves_no_boundary_that_is_due() {
        let has = periods(100, &[(0, 0, 0)]);
        let edge = Some(Edge { first: MediaSequenceNumber(70), end: MediaSequenceNumber(78) });
        check(plan(&has, edge, &live(71, 79), &policy(50), NOTHING_PROMOTED, &[]), &[]);
        let planned = plan(&has, edge, &live(92, 100), &policy(50), NOTHING_PROMOTED, &[]);
        check(planned.clone(), &[(0, 1, 100, Reason::Count)]);
        assert_eq!(planned[0].0.segments, 50, "the next period has the new length");
    }

    #[test]
    fn what_was_shown_beyond_a_period_because_no_key_was_to_be_had_stays_as_it_is() {
        let has = periods(10, &[(0, 0, 0)]);
        let edge = Some(Edge { first: MediaSequenceNumber(25), end: MediaSequenceNumber(33) });
        let planned = plan(&has, edge, &live(26, 34), &policy(10), NOTHING_PROMOTED, &[]);
        check(planned, &[(0, 1, 36, Reason::Count)]);
    }

    #[test]
    fn an_idle_rendition_begins_anew_instead_of_under_a_key_that_was_let_go() {
        let has = schedule(&[(0, 0, 0)]);
        let policy = policy(1000);
        let situation = |state, is_idle| Situation {
            schedule: &has,
            edge: None,
            policy: &policy,
            marks: Marks { head: Ordinal(6), forced: Ordinal(0) },
            siblings: &[],
            state_of: match state {
                KeyState::Deactivated => &|o| (o < Ordinal(6)).then_some(KeyState::Deactivated),
                _ => &|o| (o < Ordinal(6)).then_some(KeyState::Compromised),
            },
            is_idle,
            unmade: None,
        };
        for state in [KeyState::Deactivated, KeyState::Compromised] {
            let window = live(80, 86);
            check(super::plan(&window, situation(state, true)), &[(1, 6, 80, Reason::Start)]);
            // One that is watched goes on: what was published stays where it is.
            check(super::plan(&window, situation(state, false)), &[]);
        }
    }

    /// [`plan`] where keys from an ordinal on can neither be had nor made.
    fn plan_without(
        unmade: u32,
        schedule: &Schedule,
        edge: Option<Edge>,
        window: &PlaylistWindow,
        marks: Marks,
    ) -> Vec<(Boundary, Reason)> {
        let policy = &policy(100);
        let (siblings, state_of, is_idle, unmade) = (&[][..], &|_| None, false, Some(Ordinal(unmade)));
        super::plan(window, Situation { schedule, edge, policy, marks, siblings, state_of, is_idle, unmade })
    }

    #[test]
    fn the_last_key_goes_on_where_the_next_cannot_be_made_and_no_longer_than_that() {
        let has = schedule(&[(0, 3, 0)]);
        let at = |unmade, end| plan_without(unmade, &has, None, &live(end - 25, end), NOTHING_PROMOTED);
        check(at(5, 101), &[(0, 4, 100, Reason::Count)]);
        check(at(4, 100), &[]);
        let prolonged = at(4, 115);
        check(prolonged.clone(), &[(0, 3, 100, Reason::Count), (0, 3, 110, Reason::Count)]);
        assert_eq!(prolonged[1].0.segments, 10);
        let has = has.extended(&[prolonged[0].0, prolonged[1].0]);
        let planned = plan_without(9, &has, None, &live(113, 119), NOTHING_PROMOTED);
        check(planned, &[(0, 4, 120, Reason::Count)]);

        let vod = PlaylistWindow { ended: true, ..live(0, 1_000) };
        check(plan_without(4, &has, None, &vod, NOTHING_PROMOTED), &[(0, 3, 120, Reason::Count)]);
    }

    #[test]
    fn nothing_begins_anew_under_a_key_that_cannot_be_made_where_another_will_do() {
        let has = schedule(&[(0, 3, 0)]);
        let marks = Marks { head: Ordinal(3), forced: Ordinal(3) };
        let unseen = plan_without(4, &has, None, &live(90_000, 90_006), marks);
        check(unseen[..1].to_vec(), &[(0, 3, 89_994, Reason::Start)]);
        let begun = plan_without(4, &Schedule::default(), None, &live(0, 6), marks);
        check(begun, &[(0, 3, 0, Reason::Start)]);
        // The same numbers again: never under the same key.
        let edge = Some(Edge { first: MediaSequenceNumber(94), end: MediaSequenceNumber(100) });
        check(plan_without(4, &has, edge, &live(0, 6), marks), &[(1, 4, 0, Reason::Reset)]);
    }

    #[test]
    fn the_end_of_the_numbers_is_an_end() {
        let window = live(u64::MAX - 3, u64::MAX);
        let planned = plan(&Schedule::default(), None, &window, &policy(2), NOTHING_PROMOTED, &[]);
        assert!(planned.len() <= 4, "{planned:?}");
    }
}
