//! Which keys belong at the edges of CDNs, and when enough CDNs have one.

use super::lifecycle::KeyState;
use super::policy::SyncPolicy;

/// Some of the CDNs that this shield delivers to, by their places in its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CdnSet(u32);

impl CdnSet {
    /// Places are 0 to 31.
    pub const MAX_LEN: usize = 32;

    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub fn bits(self) -> u32 {
        self.0
    }

    /// With the CDN at a place; one beyond [`Self::MAX_LEN`] is not taken in.
    #[must_use]
    pub fn with(self, place: usize) -> Self {
        Self(self.0 | Self::bit(place))
    }

    pub fn has(self, place: usize) -> bool {
        self.0 & Self::bit(place) != 0
    }

    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    fn bit(place: usize) -> u32 {
        u32::try_from(place).ok().and_then(|place| 1_u32.checked_shl(place)).unwrap_or_default()
    }
}

impl SyncPolicy {
    /// Whether a key may be promoted, of which `have` have shown that they have it and `wanted` should.
    pub fn is_met(self, wanted: CdnSet, have: CdnSet) -> bool {
        let have = CdnSet(have.0 & wanted.0);
        match self {
            SyncPolicy::All => have == wanted,
            SyncPolicy::Quorum => wanted.is_empty() || have.len() > wanted.len() / 2,
            SyncPolicy::BestEffort => true,
        }
    }
}

/// Whether edges should have a key in a state: from before its promotion until no playlist names it.
pub fn belongs_at_edges(state: KeyState) -> bool {
    matches!(state, KeyState::PreActive | KeyState::Active | KeyState::Deactivated)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(places: &[usize]) -> CdnSet {
        places.iter().fold(CdnSet::default(), |set, place| set.with(*place))
    }

    #[test]
    fn each_policy_waits_for_as_many_as_it_says() {
        let three = set(&[0, 1, 2]);
        for (have, all, quorum) in [
            (set(&[]), false, false),
            (set(&[0]), false, false),
            (set(&[0, 2]), false, true),
            (set(&[0, 1, 2]), true, true),
            (set(&[0, 5, 6, 7]), false, false),
        ] {
            assert_eq!(SyncPolicy::All.is_met(three, have), all, "{have:?}");
            assert_eq!(SyncPolicy::Quorum.is_met(three, have), quorum, "{have:?}");
            assert!(SyncPolicy::BestEffort.is_met(three, have));
        }
        let two = set(&[0, 1]);
        assert!(!SyncPolicy::Quorum.is_met(two, set(&[0])), "half is not more than half");
        for policy in SyncPolicy::ALL {
            assert!(policy.is_met(set(&[]), set(&[])), "without a CDN nothing waits");
        }
    }

    #[test]
    fn a_place_beyond_the_last_is_in_no_set() {
        assert!(set(&[31]).has(31) && !set(&[32]).has(32) && set(&[32]).is_empty());
    }

    #[test]
    fn keys_are_at_edges_until_no_playlist_names_them() {
        let there = KeyState::ALL.map(belongs_at_edges);
        assert_eq!(there, [true, true, true, false, false]);
    }
}
