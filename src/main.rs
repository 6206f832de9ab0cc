//! Arguments → command → exit code: 0 done, 1 failed, 2 wrong arguments or configuration.

use std::io::{self, IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use keyshield::app::{self, DemoOptions, RewriteOptions};
use keyshield::config::{Config, ConfigError, Environment};
use keyshield::keys::{IvMode, KeyMethod, Policy, PolicyError};
use keyshield::telemetry::LogFormat;

const EXAMPLES: &str = "Examples:
  keyshield demo
  keyshield check --config keyshield.toml
  keyshield serve --config keyshield.toml
  keyshield inspect http://127.0.0.1:8080/demo/master.m3u8
  curl -s https://origin.example/live/720p.m3u8 | keyshield rewrite -";

#[derive(Parser)]
#[command(
    name = "keyshield",
    version,
    about = "An HLS origin shield: encrypts a clear HLS origin inline, rotates and serves the keys.",
    after_help = EXAMPLES
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the shield
    #[command(after_help = "Example:\n  keyshield serve --config /etc/keyshield/keyshield.toml")]
    Serve(ConfigArgs),
    /// Run the shield on a sample live stream, origin included
    #[command(
        after_help = "Examples:\n  keyshield demo\n  MAX_SEGMENTS_PER_KEY=3 keyshield demo --listen 127.0.0.1:9000"
    )]
    Demo(DemoArgs),
    /// Check a configuration and show what it comes to
    #[command(after_help = "Example:\n  keyshield check --config keyshield.toml")]
    Check(ConfigArgs),
    /// Say what a playlist is: its renditions, keys and problems
    #[command(after_help = "Example:\n  keyshield inspect --json http://127.0.0.1:8080/demo/master.m3u8")]
    Inspect(InspectArgs),
    /// Show a playlist as the shield would serve it, under throw-away keys
    #[command(
        after_help = "Examples:\n  keyshield rewrite 720p.m3u8\n  keyshield rewrite --seed 1 --segments-per-key 10 -"
    )]
    Rewrite(RewriteArgs),
    /// Ask a running shield how it is
    #[command(after_help = "Example:\n  keyshield health --control http://127.0.0.1:8081")]
    Health {
        /// Where its control plane listens
        #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8081")]
        control: String,
    },
}

#[derive(Args)]
struct ConfigArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Args)]
struct DemoArgs {
    /// Where players connect
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where health and metrics are
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8081")]
    control_listen: SocketAddr,
    /// Where the sample origin serves the stream in clear
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8082")]
    origin_listen: SocketAddr,
    /// Keep keys and schedule in this folder, so that a restart goes on with them
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// How log lines look: human or json
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    log_format: LogFormat,
    /// Which log lines are shown: a level or target=level,…
    #[arg(long, value_name = "FILTER", default_value = "warn,pingora_core::connectors=off")]
    log: String,
}

#[derive(Args)]
struct InspectArgs {
    /// The playlist's URL
    url: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct RewriteArgs {
    /// The playlist, or - for standard input
    file: PathBuf,
    /// Where the playlist would lie
    #[arg(long, value_name = "URL", default_value = "https://origin.example/stream/playlist.m3u8")]
    url: String,
    /// Another origin that its URIs may name (repeat for more)
    #[arg(long = "origin", value_name = "URL")]
    origins: Vec<String>,
    /// A query parameter that chooses what a playlist is (repeat for more)
    #[arg(long = "query-param", value_name = "NAME")]
    query_params: Vec<String>,
    /// Fixed sample keys: the same input gives the same output
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// A new key after so many segments
    #[arg(long, value_name = "NUMBER", default_value_t = 100)]
    segments_per_key: u32,
    /// AES-128 or AES-256
    #[arg(long, value_name = "METHOD", default_value = "AES-128", value_parser = key_method)]
    key_method: KeyMethod,
    /// segment, period or sequence
    #[arg(long, value_name = "MODE", default_value = "segment", value_parser = iv_mode)]
    iv_mode: IvMode,
    /// Encrypt EXT-X-MAP sections too
    #[arg(long)]
    encrypt_init_sections: bool,
}

fn key_method(text: &str) -> Result<KeyMethod, &'static str> {
    KeyMethod::from_name(text).ok_or("must be AES-128 or AES-256")
}

fn iv_mode(text: &str) -> Result<IvMode, &'static str> {
    IvMode::from_name(text).ok_or("must be segment, period or sequence")
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let colour = if io::stderr().is_terminal() { ("\u{1b}[31m", "\u{1b}[0m") } else { ("", "") };
            // Standard error may be closed; there is nobody left to tell then.
            let _ = writeln!(io::stderr(), "{}keyshield: {error:#}{}", colour.0, colour.1);
            let wrong_input = error.is::<ConfigError>() || error.is::<PolicyError>();
            ExitCode::from(if wrong_input { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    let environment = Environment::of_process();
    match command {
        Command::Serve(args) => app::serve(&Config::load(&args.config, &environment)?, &environment),
        Command::Check(args) => print(&app::check(&Config::load(&args.config, &environment)?)),
        Command::Demo(args) => {
            let options = DemoOptions {
                listen: args.listen,
                control_listen: args.control_listen,
                origin_listen: args.origin_listen,
                data: args.data,
                log_format: args.log_format,
                log_filter: args.log,
            };
            app::demo(&options, &environment)
        }
        Command::Inspect(args) => {
            let inspection = block_on(app::inspect(&args.url))??;
            if args.json {
                print(&format!("{}\n", serde_json::to_string_pretty(&inspection)?))
            } else {
                print(&inspection.to_text())
            }
        }
        Command::Rewrite(args) => {
            let input = read(&args.file)?;
            let policy = Policy {
                segments_per_key: args.segments_per_key,
                key_method: args.key_method,
                iv_mode: args.iv_mode,
                encrypt_init_sections: args.encrypt_init_sections,
                ..Policy::default()
            };
            let options = RewriteOptions {
                url: args.url,
                allowed: args.origins,
                query_params: args.query_params,
                seed: args.seed,
                policy: policy.checked()?,
            };
            print(&app::rewrite(&input, &options)?)
        }
        Command::Health { control } => print(&format!("{}\n", block_on(app::health(&control))??)),
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future))
}

fn read(file: &Path) -> anyhow::Result<Vec<u8>> {
    if file == Path::new("-") {
        let mut input = Vec::new();
        io::stdin().read_to_end(&mut input).context("cannot read standard input")?;
        return Ok(input);
    }
    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// Prints, and takes a closed pipe (`| head`) for an end and not an error.
fn print(text: &str) -> anyhow::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}
