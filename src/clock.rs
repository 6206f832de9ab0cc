//! The one place that asks what time it is.
//!
//! Rooms that need the present time hold a [`Clock`]; tests give them one that stands still.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::keys::Timestamp;

/// Tells the time: the machine's, or one that a test moves by hand.
#[derive(Debug, Clone)]
pub enum Clock {
    System,
    Manual(Arc<AtomicI64>),
}

impl Clock {
    /// A clock that stands at `start` until it is moved.
    pub fn manual(start: Timestamp) -> Self {
        Clock::Manual(Arc::new(AtomicI64::new(start.as_unix_millis())))
    }

    #[expect(clippy::disallowed_methods, reason = "this is the place that asks")]
    pub fn now(&self) -> Timestamp {
        match self {
            Clock::System => {
                // A clock before 1970 is a broken machine; the epoch itself is then as good as any time.
                let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Timestamp::from_unix_millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
            }
            Clock::Manual(millis) => Timestamp::from_unix_millis(millis.load(Ordering::SeqCst)),
        }
    }

    /// What pauses and rates are measured by: it never goes back. A manual clock's goes on by itself too, so that whatever
    /// waits ends, and is moved on with the clock.
    pub fn monotonic(&self) -> Instant {
        match self {
            Clock::System => Instant::now(),
            Clock::Manual(millis) => {
                let moved = u64::try_from(millis.load(Ordering::SeqCst)).unwrap_or_default();
                Instant::now() + Duration::from_millis(moved)
            }
        }
    }

    /// Moves a manual clock on; the system's cannot be moved.
    pub fn advance(&self, by: Duration) {
        if let Clock::Manual(millis) = self {
            let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
            millis.fetch_add(by, Ordering::SeqCst);
        }
    }
}
