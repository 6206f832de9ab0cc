//! How long a revocation takes: `make bench-revoke`.
//!
//! So many streams with their keys at four CDNs (in memory, which answer at once), on SQLite and on PostgreSQL, each on a
//! disk. Measured are the answers to single revocations, how long a CDN then takes to be done, and the revocation of
//! every stream at once. What the CDNs themselves take comes on top: `tests/it/cdn/whole.rs` prints it for real caches.

mod memory_cdn;

// The tests' PostgreSQL. They need more of these files than this does.
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
use keyshield::engine::{DeliveryRules, Engine, Fleet, Operator, StreamSpec, SyncState, Worker};
use keyshield::keys::{IncidentId, Policy, StreamId};
use keyshield::kms::{Keyring, LocalKms};
use keyshield::store::{Location, Store};
use keyshield::telemetry::Metrics;
use tokio::task::JoinSet;

use memory_cdn::MemoryCdn;
use postgres::Postgres;

const CDNS: usize = 4;
/// A pool as the configuration's default makes it.
const CONNECTIONS: u32 = 8;
/// Operators' calls under way at once, when every stream is revoked.
const CALLERS: usize = 8;

#[derive(Parser)]
struct Arguments {
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000])]
    streams: Vec<usize>,
    /// Single ones, each of another stream.
    #[arg(long, default_value_t = 200)]
    revocations: usize,
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
    println!(
        "| store | streams | answer, median ms | answer, 99th ms | until {CDNS} CDNs are done, s | all streams at once: answers, s | … done, s | … purges a CDN |"
    );
    println!("|---|--:|--:|--:|--:|--:|--:|--:|");
    for streams in &arguments.streams {
        let dir = tempfile::tempdir()?;
        let sqlite = Location::Sqlite(dir.path().join("keyshield.db"));
        runtime.block_on(run("SQLite", sqlite, dir.path(), *streams, arguments.revocations))?;
        let (dir, postgres) = (tempfile::tempdir()?, Postgres::shared());
        let location = Location::Postgres(postgres.database());
        runtime.block_on(run("PostgreSQL", location, dir.path(), *streams, arguments.revocations))?;
    }
    Ok(())
}

async fn run(
    name: &str,
    location: Location,
    dir: &Path,
    streams: usize,
    revocations: usize,
) -> anyhow::Result<()> {
    let cdns: Vec<_> = (0..CDNS).map(|at| Arc::new(MemoryCdn::new(at))).collect();
    let operator = start(location, dir, streams, &cdns).await?;
    until("every key is delivered", || async {
        Ok(operator.cdns().await?.iter().all(|cdn| cdn.state == SyncState::InSync))
    })
    .await?;

    let mut answers = Vec::with_capacity(revocations);
    let mut last = None;
    for at in 0..revocations.min(streams / 2) {
        let started = Instant::now();
        let done = operator.revoke(&id(at)?, None, "bench", "bench").await?;
        answers.push(started.elapsed());
        last = Some((started, done.incident.id));
    }
    let (started, incident) = last.context("there is a revocation")?;
    done(&operator, incident).await?;
    let single = started.elapsed();
    answers.sort_unstable();

    let before: Vec<_> = cdns.iter().map(|cdn| cdn.purges()).collect();
    let started = Instant::now();
    let last = revoke_all(&operator, revocations.min(streams / 2)..streams).await?;
    let answered = started.elapsed();
    done(&operator, last).await?;
    let all_done = started.elapsed();
    let purges = cdns.iter().zip(before).map(|(cdn, before)| cdn.purges() - before).max().unwrap_or_default();

    let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
    println!(
        "| {name} | {streams} | {:.1} | {:.1} | {:.2} | {:.1} | {:.1} | {purges} |",
        millis(answers[answers.len() / 2]),
        millis(answers[answers.len() * 99 / 100]),
        single.as_secs_f64(),
        answered.as_secs_f64(),
        all_done.as_secs_f64(),
    );
    Ok(())
}

/// Revokes the keys of many streams, by several callers; the incident of the last.
async fn revoke_all(operator: &Operator, which: std::ops::Range<usize>) -> anyhow::Result<IncidentId> {
    let mut calls = JoinSet::new();
    let mut newest = None;
    for at in which {
        while calls.len() >= CALLERS {
            newest = newest.max(calls.join_next().await.transpose()?.transpose()?);
        }
        let operator = operator.clone();
        calls.spawn(async move {
            let done = operator.revoke(&id(at)?, None, "bench", "bench").await?;
            anyhow::Ok(done.incident.id)
        });
    }
    while let Some(call) = calls.join_next().await {
        newest = newest.max(Some(call??));
    }
    newest.context("there is a stream left")
}

async fn done(operator: &Operator, incident: IncidentId) -> anyhow::Result<()> {
    until("the CDNs are done", || async { Ok(operator.incident(incident).await?.completed_at.is_some()) })
        .await
}

/// Waits for what comes by itself.
async fn until<F>(what: &str, holds: impl Fn() -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<bool>>,
{
    let started = Instant::now();
    while !holds().await? {
        ensure!(started.elapsed() < Duration::from_secs(600), "not within ten minutes: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn start(
    location: Location,
    dir: &Path,
    streams: usize,
    cdns: &[Arc<MemoryCdn>],
) -> anyhow::Result<Operator> {
    let (engine, seat) = Engine::new(Clock::System, Metrics::new());
    let store = Store::open(&location, CONNECTIONS).await?;
    let kms = Arc::new(LocalKms::open(&dir.join("master.key"))?);
    let fleet = Fleet {
        node: "bench".into(),
        is_alone: true,
        poll_interval: Duration::from_secs(1),
        sweep_interval: Duration::from_secs(1),
        lease: Duration::from_secs(10),
    };
    let delivery = (cdns.iter().map(|cdn| cdn.named()).collect(), DeliveryRules::default());
    let keyring = Arc::new(Keyring::of("local", kms));
    let worker =
        Worker::load(seat, store, keyring, Default::default(), fleet, delivery, specs(streams)?).await?;
    let operator = worker.operator();
    tokio::spawn(async move {
        // The worker ends with the last engine.
        let _engine = engine;
        worker.run().await;
    });
    Ok(operator)
}

fn id(at: usize) -> anyhow::Result<StreamId> {
    format!("stream-{at:06}").parse().context("the ID is legal")
}

fn specs(streams: usize) -> anyhow::Result<Vec<StreamSpec>> {
    let spec = |at: usize| {
        let prefix = format!("/live/{at:06}/");
        Ok(StreamSpec {
            id: id(at)?,
            playlist_url: format!("https://origin.example{prefix}master.m3u8"),
            origin: "main".into(),
            playlist_path: format!("{prefix}master.m3u8"),
            prefix,
            cdn_endpoints: Vec::new(),
            cdn_sync_enabled: true,
            policy: Policy::default(),
            request: None,
        })
    };
    (0..streams).map(spec).collect()
}
