//! What a sweep costs at 100, 1,000, 10,000 and 100,000 streams: `make bench-sweep`.
//!
//! The pure part over facts, and the engine over SQLite and PostgreSQL as they are in production (what is committed
//! is on disk). A manual clock makes every stream due at once. What is measured is also checked: every stream
//! rotates, and no rotation calls the KMS; otherwise the bench fails. Figures of a machine: docs/performance.md.

mod measure;
mod place;
mod pure;

// The tests' cluster. They need more of these files than this does.
#[allow(dead_code)]
#[path = "../../tests/it/daemon.rs"]
mod daemon;
#[allow(dead_code)]
#[path = "../../tests/it/machine.rs"]
mod machine;
#[allow(dead_code)]
#[path = "../../tests/it/postgres.rs"]
mod postgres;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use keyshield::clock::Clock;
use keyshield::engine::{DekRules, Engine, Fleet, StreamSpec, Worker};
use keyshield::keys::{Policy, Timestamp};
use keyshield::kms::{Keyring, LocalKms};
use keyshield::store::{Location, Store};
use keyshield::telemetry::Metrics;

use measure::{Table, measured, median};
use place::{Place, Places};

const START: Timestamp = Timestamp::from_unix_millis(1_700_000_000_000);
/// A pool as the configuration's default makes it.
const CONNECTIONS: u32 = 8;
const IDLE_SWEEPS: usize = 9;
const ROTATIONS: usize = 3;
/// Longer than the interval of [`Policy::default`], and than what its keys outlive their last playlist by.
const INTERVAL: Duration = Duration::from_secs(30 * 60);
const RETENTION: Duration = Duration::from_secs(10 * 60);

#[derive(Parser)]
struct Arguments {
    /// Numbers of streams.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1_000, 10_000, 100_000])]
    sizes: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values_t = [Place::Pure, Place::Sqlite, Place::Postgres])]
    places: Vec<Place>,
    /// A size that would take longer at a place, going by the size before it, is left out.
    #[arg(long, default_value_t = 900)]
    limit_secs: u64,
    /// What cargo gives to a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    // `cargo test --all-targets` runs benches too, without this.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let Arguments { sizes, places, limit_secs, .. } = Arguments::parse();
    let databases = Places::default();
    let runtime = tokio::runtime::Runtime::new()?;
    for place in places {
        let mut table = Table::default();
        let mut pace = None;
        for &streams in &sizes {
            let expected =
                pace.map(|(before, took): (usize, Duration)| took * (streams / before.max(1)) as u32);
            if expected.is_some_and(|expected| expected > Duration::from_secs(limit_secs)) {
                eprintln!("{place}: {streams} streams would take {expected:.0?}, and are left out");
                continue;
            }
            let started = Instant::now();
            match place {
                Place::Pure => pure::run(streams, &mut table),
                Place::Sqlite | Place::Postgres => {
                    runtime.block_on(run(streams, &databases, place, &mut table))?;
                }
            }
            eprintln!("{place}: {streams} streams took {:.0?}", started.elapsed());
            pace = Some((streams, started.elapsed()));
        }
        println!("\n{place}\n\n{table}");
    }
    Ok(())
}

/// Every case of an engine with so many streams.
async fn run(streams: usize, databases: &Places, place: Place, table: &mut Table) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let location = databases.make(place, dir.path());
    let (new, cost) = measured(Node::load(&location, dir.path(), START, specs(streams)?)).await;
    new?.close().await;
    table.add("begin: streams of the configuration that are new", streams, cost);

    place::serve_renditions(&location, START).await?;
    let (node, cost) = measured(Node::load(&location, dir.path(), START, Vec::new())).await;
    let node = node?;
    ensure!(node.engine.status().streams == streams, "every stream is loaded");
    table.add("load: a start with all streams there", streams, cost);

    let mut idle = Vec::new();
    for _ in 0..IDLE_SWEEPS {
        idle.push(node.sweep().await?);
    }
    ensure!(node.rotated() == 0, "nothing is due yet");
    table.add("idle sweep", streams, median(&mut idle));

    let (mut rotations, mut retirements) = (Vec::new(), Vec::new());
    let kms_calls = node.kms_calls();
    for round in 1..=ROTATIONS {
        node.clock.advance(INTERVAL);
        rotations.push(node.sweep().await?);
        ensure!(node.rotated() == (round * streams) as u64, "every stream rotates");
        node.clock.advance(RETENTION);
        retirements.push(node.sweep().await?);
        ensure!(node.retired() == 0, "every old key is destroyed");
    }
    let kms_calls = node.kms_calls() - kms_calls;
    ensure!(kms_calls == 0, "{kms_calls} calls of the KMS while {streams} streams rotated");
    table.add("rotation of all at once", streams, median(&mut rotations));
    table.add("destruction of all old keys at once", streams, median(&mut retirements));
    node.close().await;
    Ok(())
}

/// An engine whose sweeps are made by hand.
struct Node {
    engine: Engine,
    worker: Worker,
    store: Store,
    clock: Clock,
    metrics: Metrics,
}

impl Node {
    async fn load(
        location: &Location,
        dir: &Path,
        now: Timestamp,
        declared: Vec<StreamSpec>,
    ) -> anyhow::Result<Self> {
        let (clock, metrics) = (Clock::manual(now), Metrics::new());
        let (engine, seat) = Engine::new(clock.clone(), metrics.clone());
        let store = Store::open(location, CONNECTIONS).await?;
        let kms = Arc::new(Keyring::of("local", Arc::new(LocalKms::open(&dir.join("master.key"))?)));
        // What a sweep costs is measured, and not the KMS.
        let deks = DekRules {
            max_unwrapped: 1_000_000,
            unwrapped_ttl: Duration::from_secs(10 * 366 * 86_400),
            rotate_after: None,
        };
        let fleet = Fleet {
            node: "bench".into(),
            is_alone: matches!(location, Location::Sqlite(_)),
            poll_interval: Duration::from_secs(1),
            sweep_interval: Duration::from_secs(1),
            lease: Duration::from_secs(10),
        };
        let worker =
            Worker::load(seat, store.clone(), kms, deks, fleet, Default::default(), declared).await?;
        Ok(Self { engine, worker, store, clock, metrics })
    }

    async fn sweep(&self) -> anyhow::Result<measure::Cost> {
        let (swept, cost) = measured(self.worker.sweep_once()).await;
        swept?;
        ensure!(self.engine.status().rotating, "the sweep goes through");
        Ok(cost)
    }

    fn rotated(&self) -> u64 {
        self.metrics.promotions.with_label_values(&["promotion"]).get()
    }

    fn retired(&self) -> i64 {
        self.metrics.keys.with_label_values(&["deactivated"]).get()
    }

    fn kms_calls(&self) -> u64 {
        let of = |operation| self.metrics.kms_calls.with_label_values(&[operation, "ok"]).get();
        of("generate") + of("unwrap")
    }

    async fn close(self) {
        self.store.close().await;
    }
}

fn specs(streams: usize) -> anyhow::Result<Vec<StreamSpec>> {
    let spec = |at: usize| {
        let prefix = format!("/live/{at:06}/");
        Ok(StreamSpec {
            id: format!("stream-{at:06}").parse().context("the ID is legal")?,
            playlist_url: format!("https://origin.example{prefix}master.m3u8"),
            origin: "main".into(),
            playlist_path: format!("{prefix}master.m3u8"),
            prefix,
            cdn_endpoints: Vec::new(),
            cdn_sync_enabled: false,
            policy: Policy::default(),
            request: None,
        })
    };
    (0..streams).map(spec).collect()
}
