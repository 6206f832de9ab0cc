//! The process's servers: the data plane, the control plane and, for the demo, the sample origin.
//!
//! Listeners are bound before anything else starts, so that a taken port is one clear line and not a panic
//! in a thread. The control plane owns the engine's worker and with it the store: both live in its runtime.
//! The data plane starts when keys are loaded; until then its connections wait in the backlog.

use std::fs::{File, TryLockError};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::IntoRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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

use crate::clock::Clock;
use crate::config::Config;
use crate::control;
use crate::engine::{Engine, StreamSettings, Worker, WorkerSeat};
use crate::kms::LocalKms;
use crate::shield::upstream::{Timeouts, Upstream};
use crate::shield::{self, Shield, ShieldSettings};
use crate::store::Store;
use crate::telemetry::Metrics;

/// What a command adds to the servers: an origin of its own, and something to do when keys are loaded.
pub(super) struct Extras {
    pub(super) origin: Option<(TcpListener, Router)>,
    pub(super) when_ready: Box<dyn FnOnce(&Engine) + Send + Sync>,
}

impl Default for Extras {
    fn default() -> Self {
        Self { origin: None, when_ready: Box::new(|_| {}) }
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
    let _lock = lock(&config.database)?;
    let metrics = Metrics::new();
    let (engine, seat) = Engine::new(streams(config), Clock::System, metrics.clone());
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

    let start = ControlStart {
        config: config.clone(),
        listener: control_listener,
        router: control::router(engine.clone(), metrics),
        engine,
        seat,
        when_ready: extras.when_ready,
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
    failure.error.lock().take().map_or(Ok(()), Err)
}

/// One process a database: another one would rotate and destroy keys behind this one's back. The lock goes with
/// the process, however that ends.
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

fn streams(config: &Config) -> Vec<StreamSettings> {
    let settings = |stream: &crate::config::StreamConfig| StreamSettings {
        id: stream.id.clone(),
        origin: stream.origin.clone(),
        prefix: stream.prefix.clone(),
        policy: stream.policy.clone(),
    };
    config.streams.iter().map(settings).collect()
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
    let timeouts =
        Timeouts { connect: config.connect_timeout, read: config.read_timeout, idle: config.idle_timeout };
    let upstream = Upstream::new(timeouts, config.pool_size, config.ca_file.clone(), metrics.clone());
    Shield::new(settings, engine.clone(), upstream, Clock::System, metrics)
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
    listener: TcpListener,
    router: Router,
    engine: Engine,
    seat: WorkerSeat,
    when_ready: Box<dyn FnOnce(&Engine) + Send + Sync>,
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
        let store = Store::open(&self.config.database).await?;
        let kms = LocalKms::open(&self.config.master_key_file)?;
        let worker = Worker::load(self.seat, store, &kms).await?;
        let mut work = tokio::spawn(worker.run(self.config.sweep_interval));
        tracing::info!(
            players = %self.config.listen,
            operators = %self.config.control_listen,
            streams = self.config.streams.len(),
            "keyshield is ready"
        );
        (self.when_ready)(&self.engine);
        // From here on the engine lives in the data plane and the routes.
        drop(self.engine);
        ready.notify_ready();
        let served = tokio::select! {
            served = serve_until(self.listener, self.router, shutdown) => served,
            _ = &mut work => Err(anyhow!("the engine stopped working; this is a defect, see the log")),
        };
        served?;
        // Requests that are under way may still ask for boundaries; the runtime's end is the worker's.
        let _ = work.await;
        Ok(())
    }
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
