//! How far a low-latency encoder is: the one thing about its origin that changes.
//!
//! It goes with real time, and so what is published at a moment follows from that moment alone. A test may stop it,
//! at once or when it will be halfway through a part, look around for as long as it likes, and let it go on from
//! where it was: then nothing depends on how busy the machine is.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::ll_media::{PART, Place};

/// An encoder that had made some parts when it started.
pub struct Encoder {
    made_before: usize,
    /// It makes no more than so many.
    last: usize,
    time: Mutex<Time>,
    moved: Condvar,
}

struct Time {
    /// When its time was zero, if it was never stopped.
    started: Instant,
    stops_at: Option<Duration>,
}

impl Time {
    fn now(&self) -> Duration {
        let now = self.started.elapsed();
        self.stops_at.map_or(now, |stop| now.min(stop))
    }
}

impl Encoder {
    pub fn start(made_before: usize, last: usize) -> Self {
        let time = Mutex::new(Time { started: Instant::now(), stops_at: None });
        Self { made_before, last, time, moved: Condvar::new() }
    }

    /// How many parts there are.
    pub fn made(&self) -> usize {
        let parts = self.time.lock().now().as_nanos() / PART.as_nanos();
        (self.made_before + usize::try_from(parts).unwrap()).min(self.last)
    }

    /// Waits until a part is there; false if that takes longer than `limit`.
    pub fn wait_for(&self, place: Place, limit: Duration) -> bool {
        self.wait_until(self.done_at(place), limit)
    }

    /// As [`Self::wait_for`], until half of it is there.
    pub fn wait_for_half(&self, place: Place, limit: Duration) -> bool {
        self.wait_until(self.half_at(place), limit)
    }

    pub fn stop(&self) {
        let mut time = self.time.lock();
        time.stops_at = Some(time.now());
    }

    /// Goes on, if it stood, and stops when it is halfway through a part that is still to come.
    pub fn stop_halfway(&self, place: Place) {
        let at = self.half_at(place);
        let mut time = self.time.lock();
        assert!(time.now() < at, "{place:?} is made already");
        time.started = Instant::now() - time.now();
        time.stops_at = Some(at);
        self.moved.notify_all();
    }

    /// Goes on from where it was.
    pub fn go_on(&self) {
        let mut time = self.time.lock();
        time.started = Instant::now() - time.now();
        time.stops_at = None;
        self.moved.notify_all();
    }

    /// The last one is never done: what was not encoded cannot be.
    fn done_at(&self, place: Place) -> Duration {
        let index = place.index();
        if index >= self.last {
            return Duration::MAX;
        }
        PART * u32::try_from((index + 1).saturating_sub(self.made_before)).unwrap()
    }

    fn half_at(&self, place: Place) -> Duration {
        self.done_at(place).saturating_sub(PART / 2)
    }

    fn wait_until(&self, moment: Duration, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut time = self.time.lock();
        loop {
            let now = time.now();
            if now >= moment {
                return true;
            }
            // While it stands still, only a word from outside or the limit ends this.
            let goes_on = time.stops_at.is_none_or(|stop| stop >= moment);
            let due = Instant::now().checked_add(moment - now).filter(|_| goes_on);
            let wake = due.map_or(deadline, |due| due.min(deadline));
            if self.moved.wait_until(&mut time, wake).timed_out() && Instant::now() >= deadline {
                return time.now() >= moment;
            }
        }
    }
}
