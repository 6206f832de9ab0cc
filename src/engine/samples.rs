//! A few paths that were answered under a key, by which caches can be asked whether they have let go of it.
//!
//! A sample and no list: who purges by tags needs no paths, and whoever checks the purge needs only some that are
//! likely to be in caches, which are the last. Segments are served far more often than this is read, so that noting
//! one must cost next to nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::keys::Timestamp;

/// How many paths are remembered: more than any cache is asked for.
const KEPT: usize = 8;
/// Longer paths are not remembered.
const MAX_LEN: usize = 2_048;
/// No more than one path is looked at in this time: nobody else comes near the lock.
const INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Samples {
    /// The oldest first.
    paths: Mutex<VecDeque<String>>,
    last_millis: AtomicI64,
}

impl Default for Samples {
    fn default() -> Self {
        Self { paths: Mutex::default(), last_millis: AtomicI64::new(i64::MIN) }
    }
}

impl Samples {
    pub(super) fn note(&self, path: &str, now: Timestamp) {
        let (now, last) = (now.as_unix_millis(), self.last_millis.load(Ordering::Relaxed));
        // Further apart in either direction: a clock that was set back must not stop it.
        let is_due = u128::from(now.abs_diff(last)) >= INTERVAL.as_millis();
        if !is_due || path.len() > MAX_LEN || !path.starts_with('/') {
            return;
        }
        let took = self.last_millis.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed);
        // Who comes second in either race leaves it to the other.
        let (Ok(_), Some(mut paths)) = (took, self.paths.try_lock()) else { return };
        if paths.iter().any(|known| known == path) {
            return;
        }
        if paths.len() == KEPT {
            paths.pop_front();
        }
        paths.push_back(path.to_owned());
    }

    pub(super) fn paths(&self) -> Vec<String> {
        self.paths.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    #[test]
    fn the_last_distinct_paths_are_remembered() {
        let samples = Samples::default();
        for (second, n) in (0..20).chain([19, 19, 13]).enumerate() {
            samples.note(&format!("/{n}.ts"), at(second as i64 * 1_000));
        }
        let expected: Vec<_> = (12..20).map(|n| format!("/{n}.ts")).collect();
        assert_eq!(samples.paths(), expected);
    }

    #[test]
    fn a_crowd_leaves_one_path_in_a_while() {
        let samples = Samples::default();
        for millis in 0..=100 {
            samples.note(&format!("/{millis}.ts"), at(millis));
        }
        assert_eq!(samples.paths(), ["/0.ts", "/100.ts"]);
        samples.note("/back.ts", at(-5_000));
        assert_eq!(samples.paths().last().unwrap(), "/back.ts");
    }

    #[test]
    fn what_is_too_long_or_no_path_is_not_remembered() {
        let samples = Samples::default();
        let long = |len: usize| format!("/{}", "x".repeat(len - 1));
        samples.note(&long(MAX_LEN + 1), at(0));
        samples.note("*", at(0));
        assert!(samples.paths().is_empty());
        // Neither has taken the time of one that is.
        samples.note(&long(MAX_LEN), at(0));
        assert_eq!(samples.paths(), [long(MAX_LEN)]);
    }
}
