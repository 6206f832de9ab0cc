//! How fast a CDN may be asked: within its documented rates, and after failures later and later.
//!
//! Time comes in as an argument. What is counted here is counted by this process: the lease sees to it that no other
//! one delivers meanwhile.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::cdn::{CdnError, CdnLimits, Rate};
use crate::keys::Timestamp;

/// The pause after a first failure; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// While revoked keys wait to be let go of, a CDN is tried more often.
const LONGEST_PURGE_PAUSE: Duration = Duration::from_secs(30);
/// A vendor that says when it takes calls again is believed up to this.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3_600);

/// The calls of one purpose within a rate's time, whenever that begins: vendors count so, or in periods of which nobody
/// knows the beginning.
#[derive(Debug)]
struct Window {
    rate: Rate,
    /// The oldest first.
    made: VecDeque<Instant>,
    /// When one was made that asked for no right.
    noted: Option<Instant>,
    /// Whether calls are to be had evenly: the first half as they are asked for, the others with pauses. Otherwise who has
    /// made them all waits for as long as the rate's time, which is an hour at some vendor.
    is_spread: bool,
}

impl Window {
    fn forget_old(&mut self, now: Instant) {
        while self.made.front().is_some_and(|first| now.saturating_duration_since(*first) >= self.rate.per) {
            self.made.pop_front();
        }
    }

    /// Takes the right to one call, if it is there.
    fn take(&mut self, now: Instant) -> bool {
        self.forget_old(now);
        let calls = usize::try_from(self.rate.calls).unwrap_or(usize::MAX);
        // What is spread leaves a tenth to what is not asked for: see `note`.
        let (usual, at_once) = if self.is_spread { (calls - calls / 10, calls / 2) } else { (calls, calls) };
        let made = self.made.len();
        if made >= usual {
            return false;
        }
        if made >= at_once
            && let Some(last) = self.made.back()
        {
            let others = u32::try_from(usual - at_once).unwrap_or(u32::MAX).max(1);
            if now.saturating_duration_since(*last) < self.rate.per / others {
                return false;
            }
        }
        self.made.push_back(now);
        true
    }

    /// Whether a call that asks for no right should nevertheless come later, with what there is to do by then: half of
    /// all are made, and another of its kind was the last a moment ago.
    fn is_scarce(&mut self, now: Instant) -> bool {
        self.forget_old(now);
        let half = (self.rate.calls / 2).max(1);
        let is_recent = |noted: Instant| now.saturating_duration_since(noted) < self.rate.per / half;
        self.made.len() >= usize::try_from(half).unwrap_or(usize::MAX) && self.noted.is_some_and(is_recent)
    }

    /// Notes a call that asked for no right: those that come later make room for it.
    fn note(&mut self, now: Instant) {
        self.noted = Some(now);
        self.forget_old(now);
        if self.made.len() >= usize::try_from(self.rate.calls).unwrap_or(usize::MAX) {
            self.made.pop_front();
        }
        self.made.push_back(now);
    }
}

/// What a call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Write,
    Purge,
}

/// Calls of one purpose: how many, and after failures when the next.
#[derive(Debug)]
struct Road {
    window: Window,
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
    purges: Road,
    /// Since when, and why.
    trouble: Option<(Timestamp, String)>,
}

impl Pace {
    pub(super) fn new(limits: CdnLimits) -> Self {
        let road = |rate, is_spread, longest_pause| Road {
            window: Window { rate, made: VecDeque::new(), noted: None, is_spread },
            failures: 0,
            paused_until: None,
            longest_pause,
        };
        Self {
            writes: road(limits.writes, true, LONGEST_PAUSE),
            // Few, and all of them wanted at once.
            purges: road(limits.purges, false, LONGEST_PURGE_PAUSE),
            trouble: None,
        }
    }

    fn road(&mut self, call: Call) -> &mut Road {
        match call {
            Call::Write => &mut self.writes,
            Call::Purge => &mut self.purges,
        }
    }

    /// Whether it is left alone after a failure.
    pub(super) fn is_paused(&mut self, call: Call, now: Instant) -> bool {
        self.road(call).is_paused(now)
    }

    /// Takes the right to one call.
    pub(super) fn take(&mut self, call: Call, now: Instant) -> bool {
        self.road(call).window.take(now)
    }

    /// Whether a call that waits for no rate of ours should wait for others to go with.
    pub(super) fn is_scarce(&mut self, call: Call, now: Instant) -> bool {
        self.road(call).window.is_scarce(now)
    }

    /// Notes a call that waits for no rate of ours, but counts at the vendor.
    pub(super) fn note(&mut self, call: Call, now: Instant) {
        self.road(call).window.note(now);
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
        self.writes.failures.max(self.purges.failures)
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
    fn no_more_calls_are_made_than_a_rate_allows_whenever_one_begins_to_count() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS);
        let mut made = Vec::new();
        for tenth in 0..600 {
            let now = start + Duration::from_millis(tenth * 100);
            while pace.take(Call::Write, now) {
                made.push(now);
            }
        }
        let is_within = |first: Instant, at: Instant| at >= first && at < first + LIMITS.writes.per;
        let within = |first: &Instant| made.iter().filter(|at| is_within(*first, **at)).count();
        let most = made.iter().map(within).max().unwrap();
        // A tenth is left, and the clock ticks past where pauses end.
        assert!((8..=9).contains(&most), "{most} within the rate's time");
        assert!((60..=108).contains(&made.len()), "{} in a minute", made.len());
        let longest = made.windows(2).map(|two| two[1] - two[0]).max();
        assert!(longest < Some(Duration::from_secs(2)), "nobody waits for long: {longest:?}");
    }

    #[test]
    fn purges_are_counted_by_themselves_and_all_to_be_had_at_once() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS);
        while pace.take(Call::Write, start) {}
        assert!(pace.take(Call::Purge, start) && pace.take(Call::Purge, start));
        assert!(!pace.take(Call::Purge, start + Duration::from_secs(59)));
        assert!(pace.take(Call::Purge, start + Duration::from_secs(60)));
    }

    #[test]
    fn what_waits_for_no_rate_is_made_room_for() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS);
        (0..20).for_each(|_| pace.note(Call::Write, start));
        assert!(!pace.take(Call::Write, start + Duration::from_millis(4_999)));
        assert!(pace.take(Call::Write, start + Duration::from_secs(5)));
    }

    #[test]
    fn who_waits_for_no_rate_shares_calls_when_they_are_scarce() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS);
        while pace.take(Call::Write, start) {}
        assert!(!pace.is_scarce(Call::Write, start), "the first goes at once, whatever was stored before");
        pace.note(Call::Write, start);
        assert!(pace.is_scarce(Call::Write, start + Duration::from_millis(999)));
        assert!(!pace.is_scarce(Call::Write, start + Duration::from_secs(1)));
    }

    #[test]
    fn pauses_grow_to_a_bound_and_end_with_a_success() {
        let start = Instant::now();
        let mut pace = Pace::new(LIMITS);
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
        let mut pace = Pace::new(LIMITS);
        pace.fail(Call::Write, &away(), (AT, now), 1.0);
        assert!(!pace.is_paused(Call::Purge, now));
        (0..12).fold(now, |now, _| now + pace.fail(Call::Purge, &away(), (AT, now), 1.0));
        assert_eq!(pace.fail(Call::Purge, &away(), (AT, now), 0.0), LONGEST_PURGE_PAUSE / 2);
        assert!(!pace.succeed(Call::Write), "purges still fail");
        assert!(pace.trouble().is_some() && pace.succeed(Call::Purge));
    }

    #[test]
    fn calls_that_fail_together_are_one_failure() {
        let now = Instant::now();
        let mut pace = Pace::new(LIMITS);
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
        let mut pace = Pace::new(LIMITS);
        assert_eq!(pace.fail(Call::Purge, &limited(90), (AT, now), 0.5), Duration::from_secs(90));
        assert_eq!(pace.fail(Call::Purge, &limited(999_999), (AT, now), 0.5), LONGEST_RETRY_AFTER);
    }
}
