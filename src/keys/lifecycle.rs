//! The states of a content key, and the ways between them.
//!
//! After NIST SP 800-57 part 1 §7. A key only ever goes down [`TRANSITIONS`]: every way leads to a state of
//! higher rank, so that two nodes that have heard different halves of a key's life agree once they have heard
//! both. `docs/keys.md` shows the same table.

/// A content key's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyState {
    /// Made and stored, not in use.
    PreActive,
    /// Segments are, or may be, encrypted under it.
    Active,
    /// No playlist that is published now names it; held for those who still hold an older one.
    Deactivated,
    /// Revoked: never served again. Its companion still opens the links of what was published under it.
    Compromised,
    /// Its bytes are gone.
    Destroyed,
}

/// A way from one state to another, and what takes a key there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    pub from: KeyState,
    pub to: KeyState,
    pub reason: &'static str,
}

const fn way(from: KeyState, to: KeyState, reason: &'static str) -> Transition {
    Transition { from, to, reason }
}

/// Every legal transition.
pub const TRANSITIONS: [Transition; 9] = {
    use KeyState::{Active, Compromised, Deactivated, Destroyed, PreActive};
    [
        way(PreActive, Active, "it is promoted: a start, the count, the time, an operator or a revocation"),
        way(PreActive, Compromised, "an operator revokes it before its use"),
        way(PreActive, Destroyed, "its stream is deleted before its use"),
        way(Active, Deactivated, "no published playlist names it any more"),
        way(Active, Compromised, "an operator revokes it"),
        way(Active, Destroyed, "its stream is deleted"),
        way(Deactivated, Compromised, "an operator revokes it while players may still hold it"),
        way(Deactivated, Destroyed, "no playlist that can still be held names it"),
        way(
            Compromised,
            Destroyed,
            "no playlist that can still be held links to what was published under it",
        ),
    ]
};

impl KeyState {
    pub const ALL: [KeyState; 5] = [
        KeyState::PreActive,
        KeyState::Active,
        KeyState::Deactivated,
        KeyState::Compromised,
        KeyState::Destroyed,
    ];

    /// Its name in the API and the store.
    pub fn name(self) -> &'static str {
        match self {
            KeyState::PreActive => "pre-active",
            KeyState::Active => "active",
            KeyState::Deactivated => "deactivated",
            KeyState::Compromised => "compromised",
            KeyState::Destroyed => "destroyed",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.name() == name)
    }

    /// The transition to `to`, if it is legal.
    pub fn transition_to(self, to: Self) -> Option<&'static Transition> {
        TRANSITIONS.iter().find(|way| way.from == self && way.to == to)
    }

    /// The states from which a key may come to this one.
    pub fn reached_from(self) -> impl Iterator<Item = Self> {
        TRANSITIONS.iter().filter(move |way| way.to == self).map(|way| way.from)
    }

    /// Whether a boundary that is planned now may name a key in this state.
    pub fn may_encrypt(self) -> bool {
        matches!(self, KeyState::PreActive | KeyState::Active)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_leads_up_in_rank_and_none_leads_out_of_destruction() {
        for way in &TRANSITIONS {
            assert!(way.from < way.to, "{way:?}");
            assert!(!way.reason.is_empty());
        }
        assert!(KeyState::ALL.iter().all(|to| KeyState::Destroyed.transition_to(*to).is_none()));
        let compromisable = KeyState::Compromised.reached_from().count();
        assert_eq!(compromisable, 3, "compromised from any state in which there is something to compromise");
    }

    #[test]
    fn the_documentation_has_the_same_table() {
        let page = include_str!("../../docs/keys.md");
        let rows: Vec<_> = page.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
        let expected: Vec<_> = TRANSITIONS
            .iter()
            .map(|way| format!("| {} | {} | {} |", way.from.name(), way.to.name(), way.reason))
            .collect();
        assert_eq!(rows, expected);
    }

    #[test]
    fn names_read_back() {
        for state in KeyState::ALL {
            assert_eq!(KeyState::from_name(state.name()), Some(state));
        }
        assert_eq!(KeyState::from_name("expired"), None);
    }
}
