//! What makes an agent misbehave, and what it saw.
//!
//! All switches can be turned while it runs. They hold for every call of the API, health included, and for none of the
//! edge: players are served whatever the API does.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use http::StatusCode;
use parking_lot::Mutex;

use super::agent::{AgentHandle, Purge};

/// Calls that are remembered, the newest.
const MAX_CALLS: usize = 200_000;

/// What becomes of a call.
pub enum Verdict {
    Serve,
    Fail(StatusCode),
    /// Until there is room again.
    TooMany(Duration),
}

#[derive(Default)]
struct Set {
    refuses: bool,
    slow: Option<Duration>,
    /// Serves so many calls, fails so many, and so on.
    flaps: Option<(usize, usize)>,
    judged: usize,
    /// So many calls in so much time.
    limit: Option<(usize, Duration)>,
    window: VecDeque<Instant>,
    purges_take: Option<Duration>,
    loses_purges: bool,
}

/// How an agent misbehaves.
#[derive(Default)]
pub struct Switches(Mutex<Set>);

impl Switches {
    pub fn judge(&self) -> Verdict {
        let mut set = self.0.lock();
        if set.refuses {
            return Verdict::Fail(StatusCode::INTERNAL_SERVER_ERROR);
        }
        if let Some((serves, fails)) = set.flaps {
            set.judged += 1;
            if (set.judged - 1) % (serves + fails) >= serves {
                return Verdict::Fail(StatusCode::SERVICE_UNAVAILABLE);
            }
        }
        if let Some((calls, per)) = set.limit {
            let now = Instant::now();
            while set.window.front().is_some_and(|first| now - *first >= per) {
                set.window.pop_front();
            }
            if set.window.len() >= calls {
                return Verdict::TooMany(set.window.front().map_or(per, |first| per - (now - *first)));
            }
            set.window.push_back(now);
        }
        Verdict::Serve
    }

    pub fn slowness(&self) -> Option<Duration> {
        self.0.lock().slow
    }

    pub fn purges_take(&self) -> Option<Duration> {
        self.0.lock().purges_take
    }

    pub fn loses_purges(&self) -> bool {
        self.0.lock().loses_purges
    }
}

/// One call of the API.
#[derive(Debug, Clone)]
pub struct Call {
    /// `PUT /v1/keys/00…`
    pub what: String,
    pub status: u16,
    pub at: Instant,
}

/// The calls so far.
#[derive(Default)]
pub struct Calls(Mutex<VecDeque<Call>>);

impl Calls {
    pub fn note(&self, what: String, status: u16) {
        let mut calls = self.0.lock();
        if calls.len() == MAX_CALLS {
            calls.pop_front();
        }
        calls.push_back(Call { what, status, at: Instant::now() });
    }
}

impl AgentHandle {
    /// 500 to all.
    pub fn refuse(&self) {
        self.agent.switches.0.lock().refuses = true;
    }

    /// Every answer comes so much later.
    pub fn slow(&self, by: Duration) {
        self.agent.switches.0.lock().slow = Some(by);
    }

    /// Serves so many calls, answers 503 to so many, and begins again.
    pub fn flap(&self, serves: usize, fails: usize) {
        let mut set = self.agent.switches.0.lock();
        (set.flaps, set.judged) = (Some((serves, fails)), 0);
    }

    /// Beyond so many calls in any such time: 429 with Retry-After.
    pub fn rate_limit(&self, calls: usize, per: Duration) {
        let mut set = self.agent.switches.0.lock();
        (set.limit, set.window) = (Some((calls, per)), VecDeque::new());
    }

    /// Purges are done so much later, by their status. The objects are gone at once.
    pub fn purges_take(&self, time: Duration) {
        self.agent.switches.0.lock().purges_take = Some(time);
    }

    /// Purges are done, it says, and takes nothing out.
    pub fn lose_purges(&self) {
        self.agent.switches.0.lock().loses_purges = true;
    }

    /// It can do no more than this; see `CAPABILITIES`.
    pub fn can_only(&self, capabilities: &[&'static str]) {
        *self.agent.capabilities.lock() = capabilities.iter().copied().collect();
    }

    /// It does all again, as at the start. What it can do stays.
    pub fn heal(&self) {
        *self.agent.switches.0.lock() = Set::default();
    }

    /// Every call so far, whatever became of it.
    pub fn calls(&self) -> Vec<Call> {
        self.agent.calls.0.lock().iter().cloned().collect()
    }

    /// How many calls begin so: `"POST /v1/purge"`, `"PUT "`.
    pub fn count(&self, beginning: &str) -> usize {
        self.agent.calls.0.lock().iter().filter(|call| call.what.starts_with(beginning)).count()
    }

    /// The most calls within any such time, of those that begin so.
    pub fn most_within(&self, time: Duration, beginning: &str) -> usize {
        let calls = self.agent.calls.0.lock();
        let mut within: VecDeque<Instant> = VecDeque::new();
        let mut most = 0;
        for call in calls.iter().filter(|call| call.what.starts_with(beginning)) {
            within.push_back(call.at);
            while within.front().is_some_and(|first| call.at.duration_since(*first) >= time) {
                within.pop_front();
            }
            most = most.max(within.len());
        }
        most
    }

    /// The sealed keys that it holds, by their IDs.
    pub fn stored(&self) -> Vec<(String, String)> {
        self.agent.stored.lock().iter().map(|(key, text)| (key.clone(), text.clone())).collect()
    }

    /// The purges that were done.
    pub fn purged(&self) -> Vec<Purge> {
        self.agent.purged.lock().clone()
    }
}
