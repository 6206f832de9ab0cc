//! The process's servers: the data plane, the control plane and, for the demo, the sample origin.
//!
//! Listeners are bound before anything else starts, so that a taken port is one clear line and not a panic
//! in a thread. The control plane owns the engine's worker and with it the store: both live in its runtime.
//! It answers from the start, so that health can say that keys are being loaded; the data plane starts when they
//! are, and until then its connections wait in the backlog.

use std::fs::{File, TryLockError};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use async_trait::async_trait;
use axum::Router;
use parking_lot::Mutex;
use pingora::prelude::background_service;
use pingora::proxy::HttpProxy;
use pingora::server::configuration::ServerConf;
use pingora::server::{ListenFds, RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::background::BackgroundService;
use pingora::services::listening::Service;
use pingora::services::{ServiceReadyNotifier, ServiceWithDependents};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::access::access;
use super::cdn::{cdns, key_path};
use super::kms::kms;
use super::probe::UpstreamProbe;
use crate::alert::Webhook;
use crate::clock::Clock;
use crate::config::{Config, Database, KmsConfig};
use crate::control::{self, Access, AccessSettings, ControlParts, OperatorSlot};
use crate::engine::{DekRules, DeliveryRules, Engine, Fleet, Parting, StreamSpec, Worker, WorkerSeat};
use crate::entropy;
use crate::kms::{Held, Keyring};
use crate::shield::upstream::{Timeouts, Upstream};
use crate::shield::{self, Shield, ShieldSettings};
use crate::store::{Location, Store};
use crate::telemetry::Metrics;

/// How long a store that is away may hold up the end of the process.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a command adds to the servers: an origin of its own, who may call the control API, and something to do
/// when keys are loaded.
pub(super) struct Extras {
    pub(super) access: AccessSettings,
    pub(super) origin: Option<(TcpListener, Router)>,
    pub(super) when_ready: Box<dyn FnOnce(&Engine) + Send + Sync>,
}

impl Default for Extras {
    fn default() -> Self {
        Self { access: AccessSettings::default(), origin: None, when_ready: Box::new(|_| {}) }
    }
}

/// Binds a listener, or says which address is taken.
pub(super) fn bind(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .map_err(|error| anyhow!("cannot listen on {address} for {what}: {error}"))?;
    listener.set_nonblocking(true).with_context(|| format!("cannot listen on {address}"))?;
    Ok(listener)
}

/// Runs until SIGINT, SIGTERM, or a server that cannot go on.
pub(super) fn run(config: &Config, extras: Extras) -> anyhow::Result<()> {
    let data_listener = bind("players", config.listen)?;
    let control_listener = bind("operators", config.control_listen)?;
    // Until the last thread has ended.
    let _lock = match &config.database {
        Database::Sqlite(path) => Some(lock(path)?),
        Database::Postgres(_) => None,
    };
    let metrics = Metrics::new();
    let (engine, seat) = Engine::new(Clock::System, metrics.clone());
    let failure = Arc::new(Failure::default());

    let conf = ServerConf {
        threads: match config.threads {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            threads => threads,
        },
        ca_file: config.ca_file.clone(),
        grace_period_seconds: Some(config.shutdown_grace.as_secs()),
        graceful_shutdown_timeout_seconds: Some(1),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    let mut data_plane = shield::service(&server.configuration, data_plane(config, &engine, metrics.clone()));
    let address = data_listener.local_addr()?.to_string();
    data_plane.add_tcp(&address);
    let data_plane =
        server.add_service(Prebound { service: data_plane, address, listener: Some(data_listener) });

    let metrics_of_alerts = metrics.clone();
    let (operator, parting) = (OperatorSlot::default(), Arc::new(OnceLock::new()));
    let parts = ControlParts {
        engine: engine.clone(),
        operator: operator.clone(),
        metrics: metrics.clone(),
        mounts: config.mounts.clone(),
        default_policy: config.policy.clone(),
        access: Access::new(access(config, extras.access))?,
        probe: Arc::new(UpstreamProbe::new(upstream(config, metrics), config)),
    };
    let node = hex::encode(&entropy::random::<8>()[..]);
    let webhook = match &config.alert_webhook {
        Some(url) => Some(Webhook::new(url.clone(), node.clone(), metrics_of_alerts)?),
        None => None,
    };
    let start = ControlStart {
        config: config.clone(),
        node,
        webhook,
        listener: control_listener,
        router: control::router(parts),
        operator,
        engine,
        seat,
        when_ready: extras.when_ready,
        parting: Arc::clone(&parting),
    };
    let control_plane = ControlPlane { start: Mutex::new(Some(start)), failure: Arc::clone(&failure) };
    let control_plane = server.add_service(background_service("control plane", control_plane));
    data_plane.add_dependency(&control_plane);
    if let Some((listener, router)) = extras.origin {
        let origin =
            SampleOrigin { start: Mutex::new(Some((listener, router))), failure: Arc::clone(&failure) };
        server.add_service(background_service("sample origin", origin));
    }

    server.bootstrap();
    server.run(RunArgs { shutdown_signal: Box::new(Stop { failure: Arc::clone(&failure) }) });
    if let Some(parting) = parting.get()
        && let Err(error) = say_goodbye(config, parting)
    {
        tracing::warn!(%error, "this node could not say that it ends");
    }
    failure.error.lock().take().map_or(Ok(()), Err)
}

/// One process a file: so its lease is this process's at once, also after a kill, and no change comes from
/// elsewhere. The lock goes with the process, however that ends.
fn lock(database: &Path) -> anyhow::Result<File> {
    // By whatever name it is called, it is one database.
    let mut path = database.canonicalize().unwrap_or_else(|_| database.to_owned()).into_os_string();
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another keyshield uses the database {}", database.display()),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

fn streams(config: &Config) -> Vec<StreamSpec> {
    let spec = |stream: &crate::config::StreamConfig| StreamSpec {
        id: stream.id.clone(),
        playlist_url: stream.playlist_url.clone(),
        origin: stream.origin.clone(),
        prefix: stream.prefix.clone(),
        playlist_path: stream.playlist_path.clone(),
        cdn_endpoints: Vec::new(),
        // As where a call begins one and says nothing.
        cdn_sync_enabled: true,
        policy: stream.policy.clone(),
        request: None,
    };
    config.streams.iter().map(spec).collect()
}

fn data_plane(config: &Config, engine: &Engine, metrics: Metrics) -> Shield {
    let settings = ShieldSettings {
        mounts: config.mounts.clone(),
        key_uri_base: config.key_uri_base.clone(),
        key_max_age: config.key_max_age,
        segment_max_age: config.segment_max_age,
        cors_origins: config.cors_origins.clone(),
        max_playlist_bytes: config.max_playlist_bytes,
        playlist_cache_bytes: config.playlist_cache_bytes,
        stale_if_error: config.stale_if_error,
        playlist_timeout: config.playlist_timeout,
        segment_timeout: config.segment_timeout,
        max_segment_bytes: config.max_segment_bytes,
        flow_cache_bytes: config.segment_cache_bytes,
        max_filling_flows: config.max_filling_segments,
    };
    let upstream = upstream(config, metrics.clone());
    Shield::new(settings, engine.clone(), upstream, Clock::System, metrics)
}

/// One for each runtime: its connections belong to it.
fn upstream(config: &Config, metrics: Metrics) -> Upstream {
    let timeouts =
        Timeouts { connect: config.connect_timeout, read: config.read_timeout, idle: config.idle_timeout };
    Upstream::new(timeouts, config.pool_size, config.ca_file.clone(), metrics)
}

/// The first error that ends the process.
#[derive(Default)]
struct Failure {
    error: Mutex<Option<anyhow::Error>>,
    happened: Notify,
}

impl Failure {
    fn note(&self, outcome: anyhow::Result<()>) {
        if let Err(error) = outcome {
            self.error.lock().get_or_insert(error);
            self.happened.notify_one();
        }
    }
}

/// Ctrl-C ends at once, SIGTERM lets requests finish, a failure ends at once.
struct Stop {
    failure: Arc<Failure>,
}

#[async_trait]
impl ShutdownSignalWatch for Stop {
    async fn recv(&self) -> ShutdownSignal {
        let (Ok(mut interrupt), Ok(mut terminate)) =
            (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            self.failure.note(Err(anyhow!("cannot listen for signals")));
            return ShutdownSignal::FastShutdown;
        };
        tokio::select! {
            _ = interrupt.recv() => ShutdownSignal::FastShutdown,
            _ = terminate.recv() => ShutdownSignal::GracefulTerminate,
            () = self.failure.happened.notified() => ShutdownSignal::FastShutdown,
        }
    }
}

/// The data plane on a listener that was bound before.
struct Prebound {
    service: Service<HttpProxy<Shield>>,
    address: String,
    listener: Option<TcpListener>,
}

#[async_trait]
impl ServiceWithDependents for Prebound {
    async fn start_service(
        &mut self,
        fds: Option<ListenFds>,
        shutdown: ShutdownWatch,
        listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        if let (Some(fds), Some(listener)) = (&fds, self.listener.take()) {
            fds.lock().add(self.address.clone(), listener.into_raw_fd());
        }
        self.service.start_service(fds, shutdown, listeners_per_fd, ready).await;
    }

    fn name(&self) -> &str {
        "data plane"
    }

    fn listen_addresses(&self) -> Option<Vec<String>> {
        Some(vec![self.address.clone()])
    }
}

/// What the control plane starts from.
struct ControlStart {
    config: Config,
    /// This process among those that share a store.
    node: String,
    webhook: Option<Webhook>,
    listener: TcpListener,
    router: Router,
    operator: OperatorSlot,
    engine: Engine,
    seat: WorkerSeat,
    when_ready: Box<dyn FnOnce(&Engine) + Send + Sync>,
    parting: Arc<OnceLock<Parting>>,
}

struct ControlPlane {
    start: Mutex<Option<ControlStart>>,
    failure: Arc<Failure>,
}

#[async_trait]
impl BackgroundService for ControlPlane {
    async fn start_with_ready_notifier(&self, shutdown: ShutdownWatch, ready: ServiceReadyNotifier) {
        let Some(start) = self.start.lock().take() else { return };
        self.failure.note(start.run(shutdown, ready).await);
    }
}

impl ControlStart {
    async fn run(self, shutdown: ShutdownWatch, ready: ServiceReadyNotifier) -> anyhow::Result<()> {
        let Self { config, node, webhook, listener, router, operator, engine, seat, when_ready, parting } =
            self;
        let mut serving = pin!(serve_until(listener, router, shutdown));
        if let Some(webhook) = webhook {
            // Ends with the runtime. Before keys are loaded: that they cannot be is what to be alerted to.
            tokio::spawn(webhook.post_all(engine.alerts().listen()));
        }
        let worker = tokio::select! {
            served = &mut serving => return served,
            loaded = load(&config, node, seat) => loaded?,
        };
        operator.fill(worker.operator());
        // This runs once.
        let _ = parting.set(worker.parting());
        let mut work = tokio::spawn(worker.run());
        tracing::info!(
            players = %config.listen,
            operators = %config.control_listen,
            streams = config.streams.len(),
            "keyshield is ready"
        );
        when_ready(&engine);
        // From here on the engine lives in the data plane and the routes.
        drop(engine);
        ready.notify_ready();
        let served = tokio::select! {
            served = &mut serving => served,
            _ = &mut work => Err(anyhow!("the engine stopped working; this is a defect, see the log")),
        };
        served?;
        // Requests that are under way may still ask for boundaries; the runtime's end is the worker's.
        let _ = work.await;
        Ok(())
    }
}

/// Opens the store and the KMS, and loads every stream.
async fn load(config: &Config, node: String, seat: WorkerSeat) -> anyhow::Result<Worker> {
    let store = Store::open(&location(config), config.store_max_connections).await?;
    let keyring = Arc::new(keyring(config)?);
    let deks = DekRules {
        max_unwrapped: config.deks.max_unwrapped,
        unwrapped_ttl: config.deks.unwrapped_ttl,
        rotate_after: config.deks.rotate_after,
    };
    let fleet = Fleet {
        node,
        // The lock on the file says so.
        is_alone: matches!(config.database, Database::Sqlite(_)),
        poll_interval: config.store_poll_interval,
        sweep_interval: config.sweep_interval,
        lease: config.store_lease,
    };
    let delivery = DeliveryRules {
        sync_timeout: config.cdn.sync_timeout,
        retry_attempts: config.cdn.retry_attempts,
        key_path: key_path(&config.key_uri_base),
    };
    let delivery = (cdns(config)?, delivery);
    Ok(Worker::load(seat, store, keyring, deks, fleet, delivery, streams(config)).await?)
}

/// Those that are named, and no others: what is only configured is not opened.
fn keyring(config: &Config) -> anyhow::Result<Keyring> {
    let held = |config: &KmsConfig, wraps| -> anyhow::Result<Held> {
        Ok(Held { provider: config.provider(), kms: kms(config, wraps)? })
    };
    let wraps = held(&config.kms.wraps, true)?;
    let also = config.kms.also.iter().map(|config| held(config, false));
    Ok(Keyring::new(wraps, also.collect::<anyhow::Result<_>>()?))
}

fn location(config: &Config) -> Location {
    match &config.database {
        Database::Sqlite(path) => Location::Sqlite(path.clone()),
        Database::Postgres(url) => Location::Postgres(url.clone()),
    }
}

/// Tells the store what was served last, and that this node is gone. Over a connection of its own: the runtimes, and
/// with them the worker's connections, have ended, and nothing is served that could be told later.
fn say_goodbye(config: &Config, parting: &Parting) -> anyhow::Result<()> {
    let goodbye = async {
        let store = Store::open(&location(config), 1).await?;
        parting.say_goodbye(&store).await?;
        store.close().await;
        Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { tokio::time::timeout(GOODBYE_TIMEOUT, goodbye).await })?
}

struct SampleOrigin {
    start: Mutex<Option<(TcpListener, Router)>>,
    failure: Arc<Failure>,
}

#[async_trait]
impl BackgroundService for SampleOrigin {
    async fn start(&self, shutdown: ShutdownWatch) {
        let Some((listener, router)) = self.start.lock().take() else { return };
        self.failure.note(serve_until(listener, router, shutdown).await);
    }
}

async fn serve_until(
    listener: TcpListener,
    router: Router,
    mut shutdown: ShutdownWatch,
) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let stopped = async move {
        // An error means that the server is gone, which is a shutdown too.
        let _ = shutdown.wait_for(|stopping| *stopping).await;
    };
    Ok(axum::serve(listener, router).with_graceful_shutdown(stopped).await?)
}
