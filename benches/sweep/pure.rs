//! The pure part: what is due for streams for which nothing is.

use std::hint::black_box;
use std::time::Duration;

use keyshield::keys::{KeyFacts, KeyState, Ordinal, Policy, RenditionFacts, StreamFacts, Timestamp, sweep};

use crate::START;
use crate::measure::{Table, median, timed};

const SAMPLES: usize = 15;

pub fn run(streams: usize, table: &mut Table) {
    let all: Vec<_> = (0..streams).map(|_| idle()).collect();
    let (policy, now) = (Policy::default(), START.plus(Duration::from_secs(60)));
    let mut samples: Vec<_> = (0..SAMPLES)
        .map(|_| timed(|| all.iter().map(|stream| sweep(black_box(stream), &policy, now).len()).sum()))
        .map(|(due, cost): (usize, _)| {
            assert_eq!(due, 0, "nothing is due");
            cost
        })
        .collect();
    table.add("idle sweep", streams, median(&mut samples));
}

/// Three renditions; one key that is being left, the newest, and three that wait.
fn idle() -> StreamFacts {
    let key = |(ordinal, state): (u32, KeyState)| KeyFacts {
        ordinal: Ordinal(ordinal),
        state,
        activated_at: (state >= KeyState::Active).then_some(START),
        forced: state >= KeyState::Active,
        retired_at: (state >= KeyState::Deactivated).then_some(START),
        successor: None,
        last_named_at: START,
        is_delivered: true,
    };
    use KeyState::{Active, Deactivated, PreActive};
    let states = [Deactivated, Active, PreActive, PreActive, PreActive];
    let rendition = RenditionFacts {
        lowest_in_use: Ordinal(1),
        current: Ordinal(1),
        ended: false,
        keeps_all: false,
        last_served_at: Timestamp::from_unix_millis(START.as_unix_millis() + 59_000),
        longest_playlist: Duration::from_secs(40),
    };
    StreamFacts {
        keys: (0..).zip(states).map(key).collect(),
        next: Ordinal(5),
        renditions: vec![rendition; 3],
        scheduled: Some(Ordinal(1)),
        can_make: true,
    }
}
