//! Data encryption keys that are unwrapped now: so many at most, and each for a time.
//!
//! The time is the engine's, so that a test's clock moves it. Of keys that come together each stays a little shorter or
//! longer, so that they do not go together. Deliberately absent: the KMS, which is asked anew for a key that is needed
//! and not here (`deks`). A key that goes clears its memory.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::keys::{DataEncryptionKey, DekId, Timestamp};

pub(super) struct Unwrapped {
    most: usize,
    time: Duration,
    keys: HashMap<DekId, (Timestamp, DataEncryptionKey)>,
    by_end: BTreeSet<(Timestamp, DekId)>,
}

impl Unwrapped {
    /// `most`: as many as there may be at once, one at least. `time`: the longest that one stays.
    pub(super) fn new(most: usize, time: Duration) -> Self {
        Self { most: most.max(1), time, keys: HashMap::new(), by_end: BTreeSet::new() }
    }

    pub(super) fn get(&self, id: DekId, now: Timestamp) -> Option<DataEncryptionKey> {
        self.keys.get(&id).filter(|(end, _)| now < *end).map(|(_, key)| key.clone())
    }

    /// Takes a key in; where there is no room, the one whose time is over first goes. `spread`: a random number, which
    /// takes up to a quarter off the key's time.
    pub(super) fn put(&mut self, id: DekId, key: DataEncryptionKey, now: Timestamp, spread: u8) {
        self.remove(id);
        self.drop_over(now);
        while self.keys.len() >= self.most
            && let Some((_, soonest)) = self.by_end.first().copied()
        {
            self.remove(soonest);
        }
        let end = now.plus(self.time - self.time * u32::from(spread) / 1_024);
        self.by_end.insert((end, id));
        self.keys.insert(id, (end, key));
    }

    pub(super) fn remove(&mut self, id: DekId) {
        if let Some((end, _)) = self.keys.remove(&id) {
            self.by_end.remove(&(end, id));
        }
    }

    /// Drops the keys whose time is over.
    pub(super) fn drop_over(&mut self, now: Timestamp) {
        while let Some((end, id)) = self.by_end.first().copied()
            && end <= now
        {
            self.remove(id);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::from_unix_millis(1_000_000);

    fn id(n: u8) -> DekId {
        DekId::from_bytes([n; 16])
    }

    fn put(unwrapped: &mut Unwrapped, n: u8, now: Timestamp, spread: u8) {
        unwrapped.put(id(n), DataEncryptionKey::from_bytes([n; 32]), now, spread);
    }

    #[test]
    fn a_key_stays_for_its_time_and_no_longer() {
        let mut unwrapped = Unwrapped::new(10, Duration::from_secs(1_000));
        put(&mut unwrapped, 1, START, 0);
        put(&mut unwrapped, 2, START, 255);
        let after = |secs| START.plus(Duration::from_secs(secs));
        let held = |unwrapped: &Unwrapped, secs| [1, 2].map(|n| unwrapped.get(id(n), after(secs)).is_some());
        assert_eq!(held(&unwrapped, 750), [true, true]);
        assert_eq!(held(&unwrapped, 760), [true, false]);
        assert_eq!(held(&unwrapped, 1_000), [false, false], "over, though nobody dropped it");
        unwrapped.drop_over(after(760));
        assert_eq!(unwrapped.len(), 1);
        put(&mut unwrapped, 1, after(900), 0);
        assert_eq!((held(&unwrapped, 1_800), unwrapped.len()), ([true, false], 1), "unwrapped anew");
    }

    #[test]
    fn there_are_never_more_than_there_may_be() {
        let mut unwrapped = Unwrapped::new(3, Duration::from_secs(1_000));
        for n in 0..10 {
            put(&mut unwrapped, n, START.plus(Duration::from_secs(n.into())), 0);
            assert!(unwrapped.len() <= 3 && unwrapped.by_end.len() == unwrapped.len());
        }
        let now = START.plus(Duration::from_secs(10));
        assert!((0..10).all(|n| unwrapped.get(id(n), now).is_some() == (n >= 7)), "the oldest went");
    }
}
