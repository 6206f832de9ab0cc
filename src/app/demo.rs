//! `keyshield demo`: a live stream to try the shield on, origin included.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;

use super::servers::{Extras, bind, run};
use crate::clock::Clock;
use crate::config::{Config, Environment, RawConfig, RawOrigin, RawStream};
use crate::demo::router;
use crate::engine::{Engine, Rotation};
use crate::telemetry::{LogFormat, init_logs};

/// Segments per key in the demo: at 2 seconds each, a new key every 10 seconds.
const SEGMENTS_PER_KEY: u32 = 5;
const STREAM: &str = "demo";

/// Where the demo listens and keeps its state.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    pub listen: SocketAddr,
    pub control_listen: SocketAddr,
    pub origin_listen: SocketAddr,
    /// `None`: a folder that is removed at the end.
    pub data: Option<PathBuf>,
    pub log_format: LogFormat,
    pub log_filter: String,
}

/// Runs the demo until Ctrl-C.
pub fn demo(options: &DemoOptions, environment: &Environment) -> anyhow::Result<()> {
    init_logs(options.log_format, &options.log_filter)?;
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

    let config = config(options, environment, data)?;
    announce(options, environment)?;
    let clock = Clock::System;
    let now_millis = move || u64::try_from(clock.now().as_unix_millis()).unwrap_or(0);
    run(
        &config,
        Extras {
            origin: Some((origin, router(now_millis))),
            when_ready: Box::new(|engine: &Engine| {
                tokio::spawn(tell_rotations(engine.rotations()));
            }),
        },
    )?;
    let _ = writeln!(io::stdout(), "stopped");
    Ok(())
}

fn config(options: &DemoOptions, environment: &Environment, data: PathBuf) -> anyhow::Result<Config> {
    let origin_url = format!("http://{}", options.origin_listen);
    let mut raw = RawConfig {
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
    raw.shield.listen = options.listen.to_string();
    raw.control.listen = options.control_listen.to_string();
    raw.store.database = data.join("keyshield.db");
    raw.kms.master_key_file = data.join("keyshield.master");
    raw.shield.shutdown_grace_secs = 0;
    raw.policy.segments_per_key = Some(SEGMENTS_PER_KEY);
    environment.apply(&mut raw)?;
    Ok(Config::checked(&raw)?)
}

fn announce(options: &DemoOptions, environment: &Environment) -> io::Result<()> {
    let DemoOptions { listen, control_listen, origin_listen, .. } = options;
    let mut out = io::stdout().lock();
    for name in environment.ignored() {
        writeln!(out, "note: {name} is set, but this version does not honour it")?;
    }
    writeln!(out, "encrypted   http://{listen}/demo/master.m3u8")?;
    writeln!(out, "in clear    http://{origin_listen}/demo/master.m3u8")?;
    writeln!(out, "health      http://{control_listen}/api/hls/health")?;
    writeln!(out, "metrics     http://{control_listen}/metrics")?;
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
