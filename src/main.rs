//! Arguments → command → exit code: 0 done, 1 failed, 2 wrong arguments or configuration.

use std::io::{self, IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use keyshield::app::cdn::{self, CdnCommand};
use keyshield::app::remote::{self, KeysCommand, KmsCommand, RemoteArgs, StreamsCommand};
use keyshield::app::{self, DemoOptions, RewriteOptions};
use keyshield::config::{Config, ConfigError, Effective, Environment, Setting};
use keyshield::control::Role;
use keyshield::keys::{IvMode, KeyMethod, NO_IV_MODE, OnEncrypted, Policy, PolicyError, Subtitles};
use zeroize::Zeroizing;

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
    #[command(
        after_help = "Examples:\n  keyshield serve --config /etc/keyshield/keyshield.toml\n  keyshield serve --config keyshield.toml --listen 127.0.0.1:9000 --set policy.segments_per_key=50\n\nFlags go over the environment (KEYSHIELD_SHIELD_LISTEN for shield.listen, and so on), that over the file."
    )]
    Serve(ConfigArgs),
    /// Run the shield on a sample live stream, origin included
    #[command(
        after_help = "Examples:\n  keyshield demo\n  MAX_SEGMENTS_PER_KEY=3 keyshield demo --listen 127.0.0.1:9000\n\nWithout flags and variables it listens on 127.0.0.1:8080 for players and on 127.0.0.1:8081 for operators."
    )]
    Demo(DemoArgs),
    /// Check a configuration and show what it comes to
    #[command(
        after_help = "Examples:\n  keyshield check --config keyshield.toml\n  KEYSHIELD_LOG_FORMAT=json keyshield check --config keyshield.toml --json"
    )]
    Check(CheckArgs),
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
    /// Streams of a running shield, by its control API
    #[command(
        after_help = "Examples:\n  keyshield streams list\n  keyshield streams show ch1 --json\n\nThe token comes from KEYSHIELD_TOKEN, the address from --control or KEYSHIELD_CONTROL."
    )]
    Streams {
        #[command(flatten)]
        remote: RemoteArgs,
        #[command(subcommand)]
        command: StreamsCommand,
    },
    /// Keys of a running shield's streams, by its control API
    #[command(
        after_help = "Examples:\n  keyshield keys list ch1\n  keyshield keys rotate ch1\n  keyshield keys revoke ch1 --reason \"key found on a forum\""
    )]
    Keys {
        #[command(flatten)]
        remote: RemoteArgs,
        #[command(subcommand)]
        command: KeysCommand,
    },
    /// The KMSs and data encryption keys of a running shield, by its control API
    #[command(
        after_help = "Examples:\n  keyshield kms status\n  keyshield kms rewrap --to vault\n  keyshield kms rotate-dek ch1\n  keyshield kms rotate-dek --all\n\nBefore a provider leaves the configuration, status must show no data keys under its keys. See docs/kms.md."
    )]
    Kms {
        #[command(flatten)]
        remote: RemoteArgs,
        #[command(subcommand)]
        command: KmsCommand,
    },
    /// CDNs: try those of a configuration, see how those of a running shield are
    #[command(
        after_help = "Examples:\n  keyshield cdn check --config keyshield.toml\n  keyshield cdn secrets --config keyshield.toml --cdn edge-a\n  keyshield cdn status\n\nSee docs/cdn.md."
    )]
    Cdn {
        #[command(subcommand)]
        command: CdnCommand,
    },
    /// Make a token for the control API, and the entry of the configuration that lets it in
    #[command(after_help = "Example:\n  keyshield token --name ci --role operator")]
    Token {
        /// Whose it is: named in logs and in the history of keys
        #[arg(long, value_name = "NAME", value_parser = token_name)]
        name: String,
        /// admin, operator, security, auditor or viewer
        #[arg(long, value_name = "ROLE")]
        role: Role,
    },
}

#[derive(Args)]
struct ConfigArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A value for any key (repeat for more); lists as in TOML or JSON
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", value_parser = setting)]
    settings: Vec<Setting>,
    #[command(flatten)]
    listeners: ListenArgs,
    /// An SQLite file, or a postgres:// URL (one with a password is better put into KEYSHIELD_STORE_DATABASE)
    #[arg(long, value_name = "FILE|URL")]
    database: Option<String>,
}

#[derive(Args)]
struct ListenArgs {
    /// Where players connect
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<SocketAddr>,
    /// Where operators connect: health and metrics
    #[arg(long, value_name = "IP:PORT")]
    control_listen: Option<SocketAddr>,
}

#[derive(Args)]
struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct DemoArgs {
    #[command(flatten)]
    listeners: ListenArgs,
    /// Where the sample origin serves the stream in clear
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8082")]
    origin_listen: SocketAddr,
    /// Keep keys and schedule in this folder, so that a restart goes on with them
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// How log lines look: human or json
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Which log lines are shown: a level or target=level,…
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// The control API's admin token; a fresh one is made otherwise
    #[arg(long, value_name = "TOKEN", env = "KEYSHIELD_DEMO_TOKEN", hide_env_values = true, value_parser = demo_token)]
    token: Option<Zeroizing<String>>,
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
    /// AES-128 (every player), AES-256 (hls.js, Shaka Player) or AES-256-GCM (Shaka Player 5)
    #[arg(long, value_name = "METHOD", default_value = "AES-128", value_parser = key_method)]
    key_method: KeyMethod,
    /// segment, period or sequence: segment if it is not given; not with AES-256-GCM, which has none
    #[arg(long, value_name = "MODE", value_parser = iv_mode)]
    iv_mode: Option<IvMode>,
    /// Encrypt EXT-X-MAP sections too
    #[arg(long)]
    encrypt_init_sections: bool,
    /// What becomes of segments that the origin has encrypted already: reject, pass or rekey
    #[arg(long, value_name = "TREATMENT", default_value = "reject", value_parser = on_encrypted)]
    on_encrypted: OnEncrypted,
    /// What becomes of WebVTT: encrypt or clear
    #[arg(long, value_name = "TREATMENT", default_value = "encrypt", value_parser = subtitles)]
    subtitles: Subtitles,
}

impl ConfigArgs {
    fn load(self, environment: &Environment) -> Result<Effective, ConfigError> {
        let mut settings = self.settings;
        settings.extend(self.listeners.settings());
        settings.extend(given("--database", "store.database", self.database));
        Config::load(self.config.as_deref(), environment, &settings)
    }
}

impl ListenArgs {
    fn settings(&self) -> impl Iterator<Item = Setting> + use<> {
        let listen = given("--listen", "shield.listen", self.listen);
        listen.into_iter().chain(given("--control-listen", "control.listen", self.control_listen))
    }
}

impl DemoArgs {
    fn options(self) -> DemoOptions {
        let mut settings: Vec<_> = self.listeners.settings().collect();
        settings.extend(given("--log-format", "log.format", self.log_format));
        settings.extend(given("--log", "log.filter", self.log));
        DemoOptions { origin_listen: self.origin_listen, data: self.data, token: self.token, settings }
    }
}

impl RewriteArgs {
    fn policy(&self) -> Result<Policy, PolicyError> {
        if self.iv_mode.is_some() && !self.key_method.has_iv_mode() {
            return Err(PolicyError { field: "--iv-mode", rule: NO_IV_MODE });
        }
        let policy = Policy {
            segments_per_key: self.segments_per_key,
            key_method: self.key_method,
            iv_mode: self.iv_mode.unwrap_or_default(),
            encrypt_init_sections: self.encrypt_init_sections,
            on_encrypted: self.on_encrypted,
            subtitles: self.subtitles,
            ..Policy::default()
        };
        policy.checked()
    }
}

/// What a flag says about a key, if it is given.
fn given(flag: &'static str, key: &str, value: Option<impl ToString>) -> Option<Setting> {
    value.map(|value| Setting { flag, key: key.to_owned(), value: value.to_string() })
}

fn setting(text: &str) -> Result<Setting, &'static str> {
    let (key, value) = text.split_once('=').ok_or("must be SECTION.KEY=VALUE")?;
    Ok(Setting { flag: "--set", key: key.trim().to_owned(), value: value.to_owned() })
}

/// What can stand in the configuration and in logs as it is.
fn token_name(text: &str) -> Result<String, &'static str> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._@-".contains(c);
    let is_name = (1..=64).contains(&text.len()) && text.chars().all(legal);
    if is_name { Ok(text.to_owned()) } else { Err("must be 1 to 64 of the characters A-Z a-z 0-9 . _ @ -") }
}

/// What a header takes.
fn demo_token(text: &str) -> Result<Zeroizing<String>, &'static str> {
    let legal = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
    if legal { Ok(Zeroizing::new(text.to_owned())) } else { Err("must be printable ASCII without spaces") }
}

fn key_method(text: &str) -> Result<KeyMethod, &'static str> {
    KeyMethod::from_name(text).ok_or("must be AES-128, AES-256 or AES-256-GCM")
}

fn iv_mode(text: &str) -> Result<IvMode, &'static str> {
    IvMode::from_name(text).ok_or("must be segment, period or sequence")
}

fn on_encrypted(text: &str) -> Result<OnEncrypted, &'static str> {
    OnEncrypted::from_name(text).ok_or("must be reject, pass or rekey")
}

fn subtitles(text: &str) -> Result<Subtitles, &'static str> {
    Subtitles::from_name(text).ok_or("must be encrypt or clear")
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
        Command::Serve(args) => app::serve(&args.load(&environment)?.config, &environment),
        Command::Check(CheckArgs { config, json }) => {
            let effective = config.load(&environment)?;
            print(&if json { app::check_json(&effective)? } else { app::check(&effective, &environment) })
        }
        Command::Demo(args) => app::demo(&args.options(), &environment),
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
            let policy = args.policy()?;
            let options = RewriteOptions {
                url: args.url,
                allowed: args.origins,
                query_params: args.query_params,
                seed: args.seed,
                policy,
            };
            print(&app::rewrite(&input, &options)?)
        }
        Command::Streams { remote, command } => print(&block_on(remote::streams(&remote, &command))??),
        Command::Keys { remote, command } => print(&block_on(remote::keys(&remote, &command))??),
        Command::Kms { remote, command } => {
            let (text, left) = block_on(remote::kms(&remote, &command))??;
            print(&text)?;
            left.map_or(Ok(()), Err)
        }
        Command::Cdn { command } => {
            let (text, wrong) = block_on(cdn::run(&command, &environment))??;
            print(&text)?;
            wrong.map_or(Ok(()), Err)
        }
        Command::Token { name, role } => print(&app::token(&name, role)),
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
