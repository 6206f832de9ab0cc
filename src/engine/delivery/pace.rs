//! How fast a CDN may be asked: within its documented rates, and after failures later and later.
//!
//! Time comes in as an argument. What is counted here is counted by this process: the lease sees to it that no other
//! one delivers meanwhile.

use std::time::{Duration, Instant};

use crate::cdn::{CdnError, CdnLimits, Rate};
use crate::keys::Timestamp;

/// The pause after a first failure; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// While revoked keys wait to be let go of, a CDN is tried more often, and its edge asked more often.
const LONGEST_PURGE_PAUSE: Duration = Duration::from_secs(30);
/// A vendor that says when it takes calls again is believed up to this.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3_600);

/// Calls that may be made, which come back with time.
#[derive(Debug, Clone)]
struct Bucket {
    rate: Rate,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self { rate, left: f64::from(rate.calls), at: now }
    }

    fn refill(&mut self, now: Instant) {
        let share = now.saturating_duration_since(self.at).as_secs_f64() / self.rate.per.as_secs_f64();
        self.left = (self.left + share * f64::from(self.rate.calls)).min(f64::from(self.rate.calls));
        self.at = now;
    }

    fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }
}

/// What a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Keys are stored or taken out.
    Write,
    /// The edge is asked whether it has a key that it should.
    Verify,
    Purge,
    /// The edge is asked whether it still has what it should not.
    Probe,
}

/// Calls of one purpose: how many, and after failures when the next.
#[derive(Debug)]
struct Road {
    bucket: Bucket,
    /// In a row.
    failures: u32,
    /// Until when the CDN is left alone.
    paused_until: Option<Instant>,
    longest_pause: Duration,
}

impl Road {
    fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }
}

/// How fast one CDN may be asked. What one purpose fails at does not hold up the other.
#[derive(Debug)]
pub(in crate::engine) struct Pace {
    writes: Road,
    verifications: Road,
    purges: Road,
    probes: Road,
    /// Since when, and why.
    trouble: Option<(Timestamp, String)>,
}

impl Pace {
    pub(super) fn new(limits: CdnLimits, now: Instant) -> Self {
        let road = |rate, longest_pause| Road {
            bucket: Bucket::full(rate, now),
            failures: 0,
            paused_until: None,
            longest_pause,
        };
        // An edge is asked as players ask it: no rate of the vendor's API counts that.
        Self {
            writes: road(limits.writes, LONGEST_PAUSE),
            verifications: road(limits.writes, LONGEST_PAUSE),
            purges: road(limits.purges, LONGEST_PURGE_PAUSE),
            probes: road(limits.purges, LONGEST_PURGE_PAUSE),
            trouble: None,
        }
    }

    fn road(&mut self, call: Call) -> &mut Road {
        match call {
            Call::Write => &mut self.writes,
            Call::Verify => &mut self.verifications,
            Call::Purge => &mut self.purges,
            Call::Probe => &mut self.probes,
        }
    }

    /// Whether it is left alone after a failure.
    pub(super) fn is_paused(&mut self, call: Call, now: Instant) -> bool {
        self.road(call).is_paused(now)
    }

    /// Takes the right to one call.
    pub(super) fn take(&mut self, call: Call, now: Instant) -> bool {
        self.road(call).bucket.take(now)
    }

    /// Notes a success; whether there was trouble before, and is none any more.
    pub(super) fn succeed(&mut self, call: Call) -> bool {
        let road = self.road(call);
        road.failures = 0;
        road.paused_until = None;
        self.failures() == 0 && self.trouble.take().is_some()
    }

    /// Notes a failure, and gives the pause that follows. Several that fail together are one. `jitter`: 0 to 1, so
    /// that nodes and CDNs do not fall into step.
    pub(super) fn fail(
        &mut self,
        call: Call,
        error: &CdnError,
        (at, now): (Timestamp, Instant),
        jitter: f64,
    ) -> Duration {
        let since = self.failing_since().unwrap_or(at);
        self.trouble = Some((since, error.to_string()));
        let road = self.road(call);
        if !road.is_paused(now) {
            road.failures = road.failures.saturating_add(1);
        }
        let doublings = road.failures.saturating_sub(1).min(16);
        let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(road.longest_pause);
        // Between half of it and all of it.
        let pause = pause.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0));
        let pause = pause.max(error.retry_after.unwrap_or_default().min(LONGEST_RETRY_AFTER));
        road.paused_until = Some(now + pause);
        pause
    }

    /// In a row, of whichever purpose has more.
    pub(super) fn failures(&self) -> u32 {
        let roads = [&self.writes, &self.verifications, &self.purges, &self.probes];
        roads.map(|road| road.failures).into_iter().max().unwrap_or_default()
    }

    /// Whether calls of one purpose fail.
    pub(super) fn fails(&mut self, call: Call) -> bool {
        self.road(call).failures > 0
    }

    /// Takes over what another node, or an earlier process, has found, until a call says otherwise.
    pub(super) fn adopt(&mut self, since: Timestamp, failures: u32, why: String) {
        if self.trouble.is_none() {
            self.trouble = Some((since, why));
            self.writes.failures = failures;
        }
    }

    pub(super) fn failing_since(&self) -> Option<Timestamp> {
        self.trouble.as_ref().map(|(since, _)| *since)
    }

    /// Why it does not do what it is asked.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_ref().map(|(_, why)| why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cdn::CdnFault;

    const LIMITS: CdnLimits = CdnLimits {
        keys_per_call: 1,
        tags_per_purge: 1,
        urls_per_purge: 1,
        writes: Rate { calls: 10, per: Duration::from_secs(5) },
        purges: Rate { calls: 2, per: Duration::from_secs(60) },
        settles_within: Duration::ZERO,
    };
    const AT: Timestamp = Timestamp::from_unix_millis(7_000);

    fn away() -> CdnError {
        CdnError::new(CdnFault::Away, "away")
    }

    #[test]
    fn no_more_calls_are_made_than_a_rate_allows() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS, start);
        let mut made = 0;
        for tenth in 0..600 {
            let now = start + Duration::from_millis(tenth * 100);
            while pace.take(Call::Write, now) {
                made += 1;
            }
        }
        // 60 s at two a second, and the ten that could be saved up.
        assert!((128..=130).contains(&made), "{made}");
        assert!(pace.take(Call::Purge, start) && pace.take(Call::Purge, start));
        assert!(!pace.take(Call::Purge, start + Duration::from_secs(29)), "purges are counted by themselves");
        assert!(pace.take(Call::Purge, start + Duration::from_secs(31)));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_end_with_a_success() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS, start);
        let mut now = start;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            let pause = pace.fail(Call::Write, &away(), (AT, now), 1.0);
            assert!(pace.is_paused(Call::Write, now) && !pace.is_paused(Call::Write, now + pause));
            now += pause;
            pauses.push(pause);
        }
        assert_eq!(pauses[..3], [500, 1_000, 2_000].map(Duration::from_millis));
        assert_eq!(pauses[11], LONGEST_PAUSE);
        assert_eq!((pace.failures(), pace.failing_since()), (12, Some(AT)));
        assert!(pace.succeed(Call::Write) && !pace.succeed(Call::Write));
        assert_eq!((pace.failures(), pace.trouble()), (0, None));
    }

    #[test]
    fn keys_that_fail_hold_up_no_purge() {
        let now = Instant::now();
        let mut pace = Pace::new(LIMITS, now);
        pace.fail(Call::Write, &away(), (AT, now), 1.0);
        assert!(!pace.is_paused(Call::Purge, now));
        pace.fail(Call::Probe, &away(), (AT, now), 1.0);
        assert!(!pace.is_paused(Call::Purge, now), "nor does an edge that cannot be asked");
        assert!(!pace.succeed(Call::Probe));
        (0..12).fold(now, |now, _| now + pace.fail(Call::Purge, &away(), (AT, now), 1.0));
        assert_eq!(pace.fail(Call::Purge, &away(), (AT, now), 0.0), LONGEST_PURGE_PAUSE / 2);
        assert!(!pace.succeed(Call::Write), "purges still fail");
        assert!(pace.trouble().is_some() && pace.succeed(Call::Purge));
    }

    #[test]
    fn calls_that_fail_together_are_one_failure() {
        let now = Instant::now();
        let mut pace = Pace::new(LIMITS, now);
        for _ in 0..20 {
            pace.fail(Call::Write, &away(), (AT, now), 1.0);
        }
        assert_eq!(pace.failures(), 1);
    }

    #[test]
    fn a_vendor_that_says_when_is_believed_to_a_bound() {
        let now = Instant::now();
        let limited = |secs| CdnError {
            retry_after: Some(Duration::from_secs(secs)),
            ..CdnError::new(CdnFault::RateLimited, "slow down")
        };
        let mut pace = Pace::new(LIMITS, now);
        assert_eq!(pace.fail(Call::Purge, &limited(90), (AT, now), 0.5), Duration::from_secs(90));
        assert_eq!(pace.fail(Call::Purge, &limited(999_999), (AT, now), 0.5), LONGEST_RETRY_AFTER);
    }
}
