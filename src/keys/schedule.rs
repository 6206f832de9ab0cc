//! Which content key a segment gets: decided once, the same for every node.
//!
//! A rendition's schedule is a list of boundaries that only grows at its end; how it grows stands in `plan`.
//!
//! Deliberately absent: keys themselves. A boundary names an ordinal; that such a key exists is the sweep's
//! and the engine's business.

use super::ids::{MediaSequenceNumber, Ordinal};

/// From `first` on, in `epoch`, a rendition's segments are encrypted under `ordinal`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boundary {
    /// Goes up by one when the origin's Media Sequence Numbers jump back.
    pub epoch: u32,
    pub ordinal: Ordinal,
    pub first: MediaSequenceNumber,
    /// After so many segments the count asks for the next boundary: the policy's `segments_per_key` when this
    /// one was planned, so that a change of policy moves nothing that a node may have shown.
    pub segments: u32,
}

impl Boundary {
    pub(super) fn next_by_count(&self) -> MediaSequenceNumber {
        self.first.plus(u64::from(self.segments.max(1)))
    }
}

/// Why a boundary, or a promotion, came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A rendition (or a stream) was seen for the first time.
    Start,
    /// `segments_per_key` segments are under the key.
    Count,
    /// `rotation_interval` has passed.
    Promotion,
    /// The Media Sequence Numbers jumped back.
    Reset,
    /// An operator asked.
    Manual,
    /// The key before it was revoked.
    Revocation,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::Start => "start",
            Reason::Count => "count",
            Reason::Promotion => "promotion",
            Reason::Reset => "reset",
            Reason::Manual => "manual",
            Reason::Revocation => "revocation",
        }
    }

    /// Whether every rendition must go over to a key that was promoted for it.
    pub fn is_forced(name: &str) -> bool {
        [Reason::Promotion, Reason::Manual, Reason::Revocation].iter().any(|reason| reason.name() == name)
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
    pub(super) fn len(&self) -> u64 {
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
    /// How many came before these and were forgotten with the keys that they named.
    forgotten: usize,
    boundaries: Vec<Boundary>,
}

impl Schedule {
    /// From rows, which the store keeps in order, behind `forgotten` others.
    pub fn from_rows(forgotten: usize, boundaries: Vec<Boundary>) -> Self {
        Self { forgotten, boundaries }
    }

    pub fn extended(&self, more: &[Boundary]) -> Self {
        Self { forgotten: self.forgotten, boundaries: [&self.boundaries, more].concat() }
    }

    /// Without the boundaries at its front whose keys are gone; the last one stays, because numbers are counted
    /// from it.
    pub fn without(&self, is_gone: impl Fn(Ordinal) -> bool) -> Self {
        let Some((last, before)) = self.boundaries.split_last() else { return self.clone() };
        let gone = before.iter().take_while(|b| is_gone(b.ordinal)).count();
        let boundaries = [&before[gone..], std::slice::from_ref(last)].concat();
        Self { forgotten: self.forgotten + gone, boundaries }
    }

    /// How many boundaries the rendition ever had: the number of the next one.
    pub fn len(&self) -> usize {
        self.forgotten + self.boundaries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.boundaries.is_empty()
    }

    pub fn boundaries(&self) -> &[Boundary] {
        &self.boundaries
    }

    pub fn last(&self) -> Option<&Boundary> {
        self.boundaries.last()
    }

    /// The boundaries of the running epoch.
    pub(super) fn epoch(&self) -> &[Boundary] {
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
    pub(super) fn ordinals_of(&self, window: &PlaylistWindow) -> impl Iterator<Item = Ordinal> {
        let epoch = self.epoch();
        let from = epoch.partition_point(|b| b.first <= window.first).saturating_sub(1);
        // The first period reaches back without end.
        let to = epoch.partition_point(|b| b.first < window.end).max(from + 1).min(epoch.len());
        epoch[from..to].iter().map(|b| b.ordinal)
    }

    /// Whether the numbers of `window` go on where this schedule is: it starts within a period this one has.
    pub(super) fn agrees_with(&self, window: &PlaylistWindow) -> bool {
        let (Some(first), Some(last)) = (self.epoch().first(), self.last()) else { return false };
        first.first <= window.first && window.first < last.next_by_count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(boundaries: &[(u32, u32, u64)]) -> Schedule {
        let boundary = |&(epoch, ordinal, first): &(u32, u32, u64)| Boundary {
            epoch,
            ordinal: Ordinal(ordinal),
            first: MediaSequenceNumber(first),
            segments: 100,
        };
        Schedule::from_rows(0, boundaries.iter().map(boundary).collect())
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
    fn numbers_before_the_first_boundary_belong_to_its_period() {
        let has = schedule(&[(0, 3, 6), (0, 4, 11)]);
        let window = |first, end| PlaylistWindow {
            first: MediaSequenceNumber(first),
            end: MediaSequenceNumber(end),
            ended: false,
            keeps_all: false,
        };
        let of = |first, end| has.ordinals_of(&window(first, end)).map(|o| o.0).collect::<Vec<_>>();
        assert_eq!(of(0, 6), [3]);
        assert_eq!(of(0, 12), [3, 4]);
        assert_eq!(of(20, 26), [4]);
    }

    #[test]
    fn boundaries_are_forgotten_with_their_keys_but_for_the_last() {
        let has = schedule(&[(0, 0, 0), (0, 1, 100), (0, 2, 200)]);
        let less = has.without(|ordinal| ordinal == Ordinal(0));
        assert_eq!((less.boundaries().len(), less.len()), (2, 3));
        assert_eq!(has.without(|ordinal| ordinal == Ordinal(1)), has, "only from the front");
        assert_eq!(has.without(|_| true).boundaries(), &has.boundaries()[2..]);
    }
}
