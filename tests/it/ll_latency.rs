//! How much later things are there through the shield than directly from the origin.
//!
//! Both are asked for the same thing before it exists, so that both answer when the origin has it; what lies between
//! the two answers is the shield's. It prints and judges nothing: what is a good figure depends on the machine.
//! `make low-latency` runs it for long enough to mean something.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{agent, secs_from, try_ask_by};
use crate::ll_media::Place;
use crate::ll_origin::{LlOrigin, Parts};
use crate::ll_playlist::Follower;

const VIDEO: usize = 0;
/// The first requests of all also open connections and make keys.
const WARM_UP: usize = 3;

/// When something was there whole.
type Arrivals = BTreeMap<Place, Instant>;

/// Fetches parts as their addresses come, over one connection. Those that were made already are not told.
fn fetch(origin: &LlOrigin, addresses: Receiver<(Place, String)>) -> Arrivals {
    let agent = agent();
    let mut arrivals = Arrivals::new();
    for (place, url) in addresses {
        let is_early = origin.last() < place;
        let answer = try_ask_by(&agent, "GET", &url, &[]).unwrap();
        let at = Instant::now();
        assert_eq!(answer.status, 200, "{url}");
        if is_early {
            arrivals.insert(place, at);
        }
    }
    arrivals
}

/// Follows playlists for so long, and says what is hinted at.
fn follow(url: &str, duration: Duration, mut hinted: impl FnMut(Place, &str)) -> Arrivals {
    let started = Instant::now();
    let mut player = Follower::start(url);
    let mut arrivals = Arrivals::new();
    while started.elapsed() < duration {
        let wanted = player.playlist.last().next();
        let playlist = player.next();
        // One that has more than was waited for was late by itself.
        if playlist.last() == wanted {
            arrivals.insert(wanted, Instant::now());
        }
        hinted(wanted.next(), playlist.hint.as_deref().expect("a hint"));
    }
    arrivals
}

/// Prints how much later the second of each pair was.
fn compare(what: &str, direct: &Arrivals, shielded: &Arrivals) {
    let pairs = shielded.iter().filter_map(|(place, late)| Some((*late, *direct.get(place)?)));
    let millis = |(late, early): (Instant, Instant)| {
        let (after, before) = (late.saturating_duration_since(early), early.saturating_duration_since(late));
        (after.as_secs_f64() - before.as_secs_f64()) * 1_000.0
    };
    let mut added: Vec<_> = pairs.skip(WARM_UP).map(millis).collect();
    assert!(!added.is_empty(), "no {what} that both were asked for in time");
    added.sort_by(f64::total_cmp);
    let at = |percent: usize| added[(added.len() * percent / 100).min(added.len() - 1)];
    println!("{what}: {} compared, added ms: median {:.2}, p95 {:.2}", added.len(), at(50), at(95));
}

#[test]
fn what_the_shield_adds_to_the_latency_of_parts_and_playlists() {
    let duration = secs_from("LL_SECS", 5);
    let origin = LlOrigin::start(duration, Parts::Files);
    let shield = crate::low_latency::shield(&origin);
    let path = LlOrigin::playlist_path(VIDEO);
    thread::scope(|scope| {
        let (ask_origin, from_origin) = channel();
        let (ask_shield, from_shield) = channel();
        let direct = scope.spawn(|| fetch(&origin, from_origin));
        let shielded = scope.spawn(|| fetch(&origin, from_shield));
        let playlists = scope.spawn(|| follow(&origin.at(&path), duration, |_, _| {}));
        let shielded_playlists = follow(&shield.at(&path), duration, |place, url| {
            ask_origin.send((place, origin.at(&LlOrigin::part_path(VIDEO, place)))).unwrap();
            ask_shield.send((place, url.to_owned())).unwrap();
        });
        drop((ask_origin, ask_shield));
        compare("parts", &direct.join().unwrap(), &shielded.join().unwrap());
        compare("playlists", &playlists.join().unwrap(), &shielded_playlists);
    });
}
