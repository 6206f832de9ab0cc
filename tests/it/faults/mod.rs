//! The shield, killed at every point between two writes, and started again.
//!
//! `src/fault.rs` has the points. Each scenario is run once to learn which points it passes and how often; then
//! once for each of them, and there the process ends in that moment. Whatever was published or answered before must
//! hold for the process that comes after (`checks`).

mod cdn;
mod checks;
mod media;
mod scenarios;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use parking_lot::Mutex;

use crate::harness::repository;
use crate::postgres::Postgres;
use scenarios::Scenario;
use session::Memory;

/// How many shields live at once.
const THREADS: usize = 4;
/// How often a place is tried that a run did not come to: no two runs are alike.
const ATTEMPTS: usize = 3;

/// What is passed more often than this is passed all the time.
const OFTEN: usize = 8;

/// A point in a scenario, and how often it was passed before.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    scenario: usize,
    point: String,
    passed: u32,
}

type Scenarios = [(Scenario, Memory)];

#[test]
fn killed_at_any_point_it_goes_on_where_it_was() {
    let started = Instant::now();
    let make = [
        scenarios::begun,
        scenarios::ended,
        scenarios::redeclared,
        scenarios::destroyed,
        scenarios::rewrapped,
        scenarios::delivered,
        || scenarios::store_away(Postgres::shared()),
    ];
    let scenarios = thread::scope(|scope| make.map(|make| scope.spawn(make)).map(|it| it.join().unwrap()));
    let passed = passed(&scenarios);
    // The first two scenarios are one after the other.
    let both = passed[..2].concat();
    let mut places = chosen(&both);
    // A key is noted more than once on its way to an edge.
    let is_wanted = |place: &Place| place.passed == 0 || place.point.starts_with("deliver");
    places.extend(passed[2..].iter().flat_map(|passed| chosen(passed).into_iter().filter(is_wanted)));
    let killed = kill_at_each(&scenarios, &places);
    let points: BTreeSet<_> = killed.iter().map(|place| place.point.clone()).collect();
    println!(
        "killed at {} points ({} times, of {} planned, in {:?}): {}",
        points.len(),
        killed.len(),
        places.len(),
        started.elapsed(),
        points.iter().map(String::as_str).collect::<Vec<_>>().join("; ")
    );
    let all = points_of_the_source();
    let missed: Vec<_> = all.difference(&points).collect();
    assert!(missed.is_empty(), "never killed at {missed:?}");
    assert!(points.len() >= 40, "{}", points.len());
}

#[test]
fn killed_at_any_commit_to_a_fleets_store_it_goes_on_where_it_was() {
    let started = Instant::now();
    let scenarios = [scenarios::on_postgres(Postgres::shared())];
    let mut places = chosen(&passed(&scenarios)[0]);
    places.retain(|place| place.passed == 0 && place.point.contains("commit"));
    let killed = kill_at_each(&scenarios, &places);
    println!(
        "on PostgreSQL, killed {} times, of {} planned, in {:?}",
        killed.len(),
        places.len(),
        started.elapsed()
    );
    assert_eq!(killed.len(), places.len());
}

/// Runs each scenario to its end, and gives the places that it passed, in order.
fn passed(scenarios: &Scenarios) -> Vec<Vec<Place>> {
    let passed = Mutex::new(BTreeMap::new());
    on_threads(scenarios.len(), |at| {
        let (scenario, memory) = &scenarios[at];
        let log = tempfile::NamedTempFile::new().unwrap();
        let environment = [("KEYSHIELD_FAULT_LOG", log.path().to_str().unwrap())];
        let mut session = scenario.start(memory, &environment);
        let _context = Context(format!("scenario {}, not killed", scenario.name));
        scenario.drive(&mut session).expect("nothing kills it");
        session.check_after_all();
        let text = std::fs::read_to_string(log.path()).unwrap();
        let place = |line: &str| {
            let (point, passed) = line.rsplit_once('#').unwrap();
            Place { scenario: at, point: point.to_owned(), passed: passed.parse().unwrap() }
        };
        let is_wanted =
            |place: &Place| scenario.points.iter().any(|beginning| place.point.starts_with(beginning));
        let places = text.lines().map(place).filter(is_wanted);
        passed.lock().insert(at, places.collect());
    });
    passed.into_inner().into_values().collect()
}

/// Of the times that each point was passed the first, the second and a late one. The last may not come in another
/// run, and what is passed all the time is passed the second time as it was the first time.
fn chosen(passed: &[Place]) -> BTreeSet<Place> {
    let mut times: BTreeMap<&str, Vec<&Place>> = BTreeMap::new();
    for place in passed {
        times.entry(&place.point).or_default().push(place);
    }
    let of = |times: &Vec<&Place>| {
        let second = usize::from(times.len() <= OFTEN);
        [0, second, times.len() * 3 / 4].map(|at| times[at.min(times.len() - 1)].clone())
    };
    times.values().flat_map(of).collect()
}

/// Runs a scenario once for each place, and gives those at which it was killed.
fn kill_at_each(scenarios: &Scenarios, places: &BTreeSet<Place>) -> Vec<Place> {
    let (places, killed) = (Vec::from_iter(places), Mutex::new(Vec::new()));
    on_threads(places.len(), |at| {
        let place = places[at];
        let (scenario, memory) = &scenarios[place.scenario];
        let fault = format!("{}#{}", place.point, place.passed);
        let _context = Context(format!("scenario {}, killed at {fault}", scenario.name));
        // The first time must be reached; how often points are passed is a matter of time.
        let attempts = if place.passed == 0 { ATTEMPTS } else { 1 };
        for _ in 0..attempts {
            let mut session = scenario.start(memory, &[("KEYSHIELD_FAULT", &fault)]);
            if scenario.drive(&mut session).is_err() {
                session.restart();
                session.check_after_all();
                killed.lock().push(place.clone());
                break;
            }
        }
    });
    killed.into_inner()
}

/// Does so many things on a few threads.
fn on_threads(count: usize, act: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..THREADS.min(count) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count {
                        return;
                    }
                    act(at);
                }
            });
        }
    });
}

/// Says where, when a check fails.
struct Context(String);

impl Drop for Context {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("failed: {}", self.0);
        }
    }
}

/// The names of all points in `src/`: of `fault::point(…)`, and those that `commit` is given.
fn points_of_the_source() -> BTreeSet<String> {
    let mut points = BTreeSet::new();
    let mut folders = vec![repository("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                points.extend(points_of(&path));
            }
        }
    }
    points
}

fn points_of(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let calls = ["fault::point(", "commit(tx"].map(|call| text.split(call).skip(1).collect::<Vec<_>>());
    let arguments = calls.iter().flatten().map(|rest| &rest[..rest.find(')').unwrap_or(0)]);
    arguments.flat_map(|text| text.split('"').skip(1).step_by(2).map(str::to_owned)).collect()
}
