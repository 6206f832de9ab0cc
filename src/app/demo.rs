//! `keyshield demo`: a live stream to try the shield on, origin included.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use zeroize::Zeroizing;

use super::servers::{Extras, bind, run};
use crate::clock::Clock;
use crate::config::{Config, Environment, Layers, RawConfig, RawOrigin, RawStream, Setting};
use crate::control::{AccessSettings, AccessToken, Role, hash_token, new_token};
use crate::demo::router;
use crate::engine::{Engine, Rotation};
use crate::telemetry::init_logs;

/// Segments per key in the demo: at 2 seconds each, a new key every 10 seconds.
const SEGMENTS_PER_KEY: u32 = 5;
const STREAM: &str = "demo";

/// Where the demo listens for its origin and keeps its state, and what goes over its configuration.
#[derive(Clone)]
pub struct DemoOptions {
    pub origin_listen: SocketAddr,
    /// `None`: a folder that is removed at the end.
    pub data: Option<PathBuf>,
    /// Of the control API's admin. `None`: a fresh one.
    pub token: Option<Zeroizing<String>>,
    pub settings: Vec<Setting>,
}

/// Runs the demo until Ctrl-C.
pub fn demo(options: &DemoOptions, environment: &Environment) -> anyhow::Result<()> {
    let origin = bind("the sample origin", options.origin_listen)?;
    // Removed when it goes out of scope, at the end of this function.
    let temporary = match &options.data {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("keyshield-demo-").tempdir()?),
    };
    let data = match (&options.data, &temporary) {
        (Some(data), _) => data.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of the two is there"),
    };
    std::fs::create_dir_all(&data).with_context(|| format!("cannot make the folder {}", data.display()))?;

    let config = config(options, environment, &data)?;
    init_logs(config.log_format, &config.log_filter)?;
    let token = options.token.clone().unwrap_or_else(new_token);
    announce(&config, options.origin_listen, environment, &token)?;
    let clock = Clock::System;
    let now_millis = move || u64::try_from(clock.now().as_unix_millis()).unwrap_or(0);
    run(
        &config,
        Extras {
            access: admin_by(&token),
            origin: Some((origin, router(now_millis))),
            when_ready: Box::new(|engine: &Engine| {
                tokio::spawn(tell_rotations(engine.rotations()));
            }),
        },
    )?;
    let _ = writeln!(io::stdout(), "stopped");
    Ok(())
}

/// The demo's own defaults, then the environment, then the flags.
fn config(options: &DemoOptions, environment: &Environment, data: &Path) -> anyhow::Result<Config> {
    let origin_url = format!("http://{}", options.origin_listen);
    let in_data = |name: &str| {
        let path = data.join(name).into_os_string().into_string();
        path.map_err(|path| anyhow!("{} is not Unicode", path.display()))
    };
    let mut defaults = RawConfig {
        origins: vec![RawOrigin {
            name: "sample".into(),
            urls: vec![origin_url.clone()],
            ..RawOrigin::default()
        }],
        streams: vec![RawStream {
            id: STREAM.into(),
            playlist_url: format!("{origin_url}/demo/master.m3u8"),
            ..RawStream::default()
        }],
        ..RawConfig::default()
    };
    defaults.shield.listen = "127.0.0.1:8080".into();
    defaults.shield.shutdown_grace_secs = 0;
    defaults.log.filter = "warn,pingora_core::connectors=off".into();
    defaults.store.database = in_data("keyshield.db")?;
    defaults.kms.master_key_file = in_data("keyshield.master")?.into();
    defaults.policy.segments_per_key = Some(SEGMENTS_PER_KEY);

    let mut settings = options.settings.clone();
    if options.data.is_some() {
        for (key, name) in [("store.database", "keyshield.db"), ("kms.master_key_file", "keyshield.master")] {
            settings.push(Setting { flag: "--data", key: key.into(), value: in_data(name)? });
        }
    }
    let mut layers = Layers::over(&defaults);
    layers.environment(environment)?;
    layers.flags(&settings)?;
    Ok(layers.finish()?.config)
}

fn admin_by(token: &str) -> AccessSettings {
    let admin = AccessToken { name: STREAM.into(), role: Role::Admin, sha256: hash_token(token) };
    AccessSettings { tokens: vec![admin], ..AccessSettings::default() }
}

fn announce(
    config: &Config,
    origin_listen: SocketAddr,
    environment: &Environment,
    token: &str,
) -> io::Result<()> {
    let Config { listen, control_listen, kms, .. } = config;
    let mut out = io::stdout().lock();
    for name in environment.ignored(kms) {
        writeln!(out, "note: {name} is set, but not honoured by this version or with this KMS")?;
    }
    writeln!(out, "encrypted   http://{listen}/demo/master.m3u8")?;
    writeln!(out, "in clear    http://{origin_listen}/demo/master.m3u8")?;
    writeln!(out, "health      http://{control_listen}/api/hls/health")?;
    writeln!(out, "metrics     http://{control_listen}/metrics")?;
    writeln!(out, "token       {token}")?;
    writeln!(
        out,
        "new key     curl -X POST -H 'Authorization: Bearer {token}' \
         http://{control_listen}/api/hls/streams/{STREAM}/rotate"
    )?;
    writeln!(out, "Rotations follow as players ask for playlists. Ctrl-C ends the demo.")?;
    out.flush()
}

/// One line a rotation.
async fn tell_rotations(mut rotations: Receiver<Rotation>) {
    loop {
        match rotations.recv().await {
            Ok(Rotation { stream, ordinal, key, reason }) => {
                // Whoever closed our standard output does not want the lines.
                let _ =
                    writeln!(io::stdout(), "rotation    {stream} -> key {ordinal} ({key}), reason: {reason}");
            }
            Err(RecvError::Lagged(missed)) => {
                let _ = writeln!(io::stdout(), "rotation    {missed} were not shown");
            }
            Err(RecvError::Closed) => return,
        }
    }
}
