//! A point in time, as the pure rooms see it.
//!
//! Milliseconds since the Unix epoch: what the store keeps and what logs show. Deliberately absent: any
//! way to ask what time it is.

use std::time::Duration;

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_unix_millis(millis: i64) -> Self {
        Self(millis)
    }

    pub const fn as_unix_millis(self) -> i64 {
        self.0
    }

    /// How long after `earlier` this is; zero when it is not after it (clocks do step back).
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    pub fn minus(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_sub(millis))
    }

    pub fn plus(self, duration: Duration) -> Self {
        let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        Self(self.0.saturating_add(millis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_steps_back_gives_no_elapsed_time() {
        let earlier = Timestamp::from_unix_millis(5_000);
        let later = earlier.plus(Duration::from_secs(2));
        assert_eq!(later.since(earlier), Duration::from_secs(2));
        assert_eq!(earlier.since(later), Duration::ZERO);
    }
}
