//! What streams ask of the KMS: `make bench-kms`.
//!
//! So many streams are begun and rotated many times by the engine over SQLite, on a manual clock, with a master key file
//! and with OpenBao's real server; then the engine is started again, and at last every key is re-wrapped. Calls are
//! counted around the provider. Until the last rotation they are one a stream, and one for each time that its data
//! encryption key was needed behind its time: more fails the bench.

mod counted;

// The tests' OpenBao. They need more of these files than this does.
#[allow(dead_code)]
#[path = "../../tests/it/kms/bao.rs"]
mod bao;
#[allow(dead_code)]
#[path = "../../tests/it/daemon.rs"]
mod daemon;
#[allow(dead_code)]
#[path = "../../tests/it/harness.rs"]
mod harness;
#[allow(dead_code)]
#[path = "../../tests/it/machine.rs"]
mod machine;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use keyshield::clock::Clock;
use keyshield::engine::{DekRules, Engine, Fleet, RewrapState, StreamSpec, Worker};
use keyshield::keys::{Policy, Timestamp};
use keyshield::kms::{Guard, Keyring, Kms, Limits, LocalKms};
use keyshield::store::{Location, Store};
use keyshield::telemetry::Metrics;

use bao::Bao;
use counted::{Calls, Counted};

const START: Timestamp = Timestamp::from_unix_millis(1_700_000_000_000);
/// A pool as the configuration's default makes it.
const CONNECTIONS: u32 = 8;
/// As the configuration's defaults are.
const LIMITS: Limits = Limits { timeout: Duration::from_secs(5), max_concurrent: 16 };
/// Longer than the interval of [`Policy::default`].
const INTERVAL: Duration = Duration::from_secs(30 * 60);
const KEY: &str = "keyshield";

#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 10_000)]
    streams: usize,
    /// Of each stream.
    #[arg(long, default_value_t = 48)]
    rotations: usize,
    /// local, vault
    #[arg(long, value_delimiter = ',', default_values_t = ["local".to_owned(), "vault".to_owned()])]
    providers: Vec<String>,
    /// How long a data encryption key stays unwrapped, in seconds: a week, and the configuration's default.
    #[arg(long, value_delimiter = ',', default_values_t = [604_800, 3_600])]
    unwrapped_ttl_secs: Vec<u64>,
    /// What cargo gives to a bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    // `cargo test --all-targets` runs benches too, without this.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    println!("| provider | {} streams | KMS calls | a stream | seconds | ms a call |", arguments.streams);
    println!("|---|---|--:|--:|--:|--:|");
    let ways = |provider| {
        arguments.unwrapped_ttl_secs.iter().map(move |secs| (provider, Duration::from_secs(*secs)))
    };
    for (provider, ttl) in arguments.providers.iter().flat_map(ways) {
        let dir = tempfile::tempdir()?;
        match provider.as_str() {
            "local" => {
                let kms = Arc::new(LocalKms::open(&dir.path().join("master.key"))?);
                runtime.block_on(run(&arguments, "local", ttl, kms, dir.path(), || roll_file(dir.path())))?;
            }
            "vault" => {
                let bao = Bao::start();
                bao.make_key(KEY);
                let kms = Arc::new(Guard::new(bao.kms(KEY), "vault", KEY.to_owned(), LIMITS));
                let roll = || {
                    bao.ok("POST", &format!("transit/keys/{KEY}/rotate"), serde_json::json!({}));
                    let kms: Arc<dyn Kms> = kms.clone();
                    Ok(kms)
                };
                runtime.block_on(run(&arguments, "vault", ttl, kms.clone(), dir.path(), roll))?;
            }
            other => bail!("{other:?} is neither local nor vault"),
        }
    }
    Ok(())
}

/// Puts a new master key before the old one.
fn roll_file(dir: &Path) -> anyhow::Result<Arc<dyn Kms>> {
    let path = dir.join("master.key");
    let old = std::fs::read_to_string(&path)?;
    std::fs::write(&path, format!("rolled:{}\n{old}", "5a".repeat(32)))?;
    Ok(Arc::new(LocalKms::open(&path)?))
}

/// Every case with one provider. `roll` gives its key a new version.
async fn run(
    arguments: &Arguments,
    provider: &'static str,
    ttl: Duration,
    kms: Arc<dyn Kms>,
    dir: &Path,
    roll: impl FnOnce() -> anyhow::Result<Arc<dyn Kms>>,
) -> anyhow::Result<()> {
    let (streams, rotations) = (arguments.streams, arguments.rotations);
    let kms = Counted::new(kms);
    let row = |case: &str, calls: Calls, took: Duration| {
        let all = calls.all();
        let each = if all == 0 { 0.0 } else { calls.time.as_secs_f64() * 1e3 / all as f64 };
        let (a_stream, secs) = (all as f64 / streams as f64, took.as_secs_f64());
        println!(
            "| {provider}, {} h | {case} | {all} | {a_stream:.2} | {secs:.1} | {each:.2} |",
            ttl.as_secs() / 3_600
        );
    };

    let started = Instant::now();
    let node = Node::load(provider, ttl, &kms, dir, START, specs(streams)?).await?;
    let begun = kms.take();
    row("begun", begun, started.elapsed());

    let started = Instant::now();
    for round in 1..=rotations {
        node.clock.advance(INTERVAL);
        node.worker.sweep_once().await?;
        let rotated = node.metrics.promotions.with_label_values(&["promotion"]).get();
        ensure!(
            rotated == (round * streams) as u64,
            "{rotated} rotations after {round} of {streams} streams"
        );
    }
    let rotated = kms.take();
    row(&format!("rotated {rotations} times each"), rotated, started.elapsed());
    // A quarter of the time is taken off at random.
    let again = (INTERVAL * rotations as u32).as_secs_f64() / (ttl.as_secs_f64() * 0.75);
    let (calls, most) = (begun.all() + rotated.all(), streams as u64 * (1 + again as u64));
    ensure!(
        calls <= most,
        "{calls} calls of the KMS, more than {most}, for {streams} streams that were rotated"
    );
    let now = node.clock.now();
    node.store.close().await;
    drop(node);

    let started = Instant::now();
    let node = Node::load(provider, ttl, &kms, dir, now, Vec::new()).await?;
    row("started again", kms.take(), started.elapsed());
    node.store.close().await;
    drop(node);

    let kms = Counted::new(roll()?);
    let node = Node::load(provider, ttl, &kms, dir, now, Vec::new()).await?;
    kms.take();
    let started = Instant::now();
    let operator = node.worker.operator();
    operator.rewrap(provider, "bench").await?;
    let job = loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let job = operator.rewrapping().await?.job.context("it was begun")?;
        if job.state != RewrapState::Running {
            break job;
        }
    };
    row("re-wrapped", kms.take(), started.elapsed());
    ensure!(job.rewrapped == streams as u64, "{job:?}");
    node.store.close().await;
    Ok(())
}

/// An engine whose sweeps are made by hand.
struct Node {
    worker: Worker,
    store: Store,
    clock: Clock,
    metrics: Metrics,
    _engine: Engine,
}

impl Node {
    async fn load(
        provider: &'static str,
        ttl: Duration,
        kms: &Counted,
        dir: &Path,
        now: Timestamp,
        declared: Vec<StreamSpec>,
    ) -> anyhow::Result<Self> {
        let (clock, metrics) = (Clock::manual(now), Metrics::new());
        let (engine, seat) = Engine::new(clock.clone(), metrics.clone());
        let store = Store::open(&Location::Sqlite(dir.join("keyshield.db")), CONNECTIONS).await?;
        let keyring = Arc::new(Keyring::of(provider, Arc::new(kms.clone())));
        let deks = DekRules { unwrapped_ttl: ttl, ..DekRules::default() };
        let fleet = Fleet {
            node: "bench".into(),
            is_alone: true,
            poll_interval: Duration::from_secs(1),
            sweep_interval: Duration::from_secs(1),
            lease: Duration::from_secs(10),
        };
        let worker =
            Worker::load(seat, store.clone(), keyring, deks, fleet, Default::default(), declared).await?;
        Ok(Self { worker, store, clock, metrics, _engine: engine })
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
