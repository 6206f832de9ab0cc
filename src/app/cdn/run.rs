//! Carries the `cdn` commands out: those that work on a configuration, and those that ask a running shield.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

#[cfg(feature = "cdn-cloudfront")]
use anyhow::Context;
use anyhow::{anyhow, bail};
use indicatif::ProgressBar;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::args::{CdnCommand, CdnTarget};
use super::check::{Step, ThrowAway, Waiting, check};
use super::report::{self, Checked};
#[cfg(feature = "cdn-cloudfront")]
use super::signer;
use super::{connect, deploy, plain, secrets};
use crate::app::remote;
use crate::cdn::{DeliveryMode, NamedCdn};
use crate::clock::Clock;
use crate::config::{Config, Environment, endpoint_name};

const POLL: Duration = Duration::from_secs(1);
/// Where nobody watches, a line tells what is waited for this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What to print, which may hold secrets, and what was found wrong.
pub type Printed = (Zeroizing<String>, Option<anyhow::Error>);

/// Carries a `cdn` command out.
///
/// # Errors
/// A configuration that cannot be used, or a CDN that it does not name.
pub async fn run(command: &CdnCommand, environment: &Environment) -> anyhow::Result<Printed> {
    match command {
        CdnCommand::Status { remote } => Ok((Zeroizing::new(remote::cdns(remote).await?), None)),
        CdnCommand::Incidents { remote, incident } => {
            Ok((Zeroizing::new(remote::incidents(remote, incident.as_deref()).await?), None))
        }
        CdnCommand::Check { config, cdn, wait, json } => {
            let config = Config::load(config.as_deref(), environment, &[])?.config;
            let (all, wanted) =
                check_all(&config, cdn.as_deref(), Duration::from_secs((*wait).into()), &Told::new(*json))
                    .await?;
            let text = match json {
                true => format!("{}\n", serde_json::to_string_pretty(&report::json(&all))?),
                false => report::text(&all),
            };
            Ok((Zeroizing::new(text), wrong(&all, wanted)))
        }
        CdnCommand::Secrets(target) => {
            let text = secrets::secrets(target, environment)?;
            warn(&target.cdn);
            Ok((text, None))
        }
        CdnCommand::Token { target, scope, ttl } => {
            let at = (Clock::System.now(), Duration::from_secs((*ttl).into()));
            Ok((Zeroizing::new(secrets::token(target, scope, at, environment)?), None))
        }
        CdnCommand::Deploy { target, function, needs_token } => {
            let config = loaded(target, environment)?;
            let text = deploy::deploy(&config, &target.cdn, function, *needs_token).await?;
            Ok((Zeroizing::new(text), None))
        }
        #[cfg(feature = "cdn-cloudfront")]
        CdnCommand::Sign { target, what, ttl } => {
            let config = loaded(target, environment)?;
            let front = cloudfront_of(&config, &target.cdn)?;
            let ttl = Duration::from_secs((*ttl).into());
            let text = signer::sign(&front, what, ttl, &Clock::System);
            Ok((text.with_context(|| format!("CDN {}", target.cdn))?, None))
        }
        #[cfg(feature = "cdn-cloudfront")]
        CdnCommand::RotateSigner { target, wait, status } => {
            let config = loaded(target, environment)?;
            let front = cloudfront_of(&config, &target.cdn)?;
            let told = Told::new(false);
            let text = match status {
                true => signer::status(&front).await,
                false => signer::rotate(&front, *wait, &Clock::System, &|line| told.tell(line)).await,
            };
            told.end();
            Ok((Zeroizing::new(text.with_context(|| format!("CDN {}", target.cdn))?), None))
        }
        #[cfg(not(feature = "cdn-cloudfront"))]
        CdnCommand::Sign { .. } | CdnCommand::RotateSigner { .. } => {
            bail!("this build is without CloudFront: build with the feature cdn-cloudfront")
        }
    }
}

fn loaded(target: &CdnTarget, environment: &Environment) -> anyhow::Result<Config> {
    Ok(Config::load(target.config.as_deref(), environment, &[])?.config)
}

#[cfg(feature = "cdn-cloudfront")]
fn cloudfront_of(config: &Config, name: &str) -> anyhow::Result<crate::cdn::CloudFront> {
    super::cloudfront(config, super::find(config, name)?)
}

/// Not on standard output, which goes to wherever the secrets go.
fn warn(cdn: &str) {
    // Standard error may be closed; who asked knows what was asked for.
    let _ = writeln!(
        io::stderr(),
        "keyshield: these open every key at the edge of {cdn}: keep them out of logs, files and histories"
    );
}

/// One after the other, so that what is told can be followed; and how many there are, for whoever stops it sees fewer.
async fn check_all(
    config: &Config,
    only: Option<&str>,
    beyond: Duration,
    told: &Told,
) -> anyhow::Result<(Vec<Checked>, usize)> {
    let connected = connected(config, only)?;
    let wanted = connected.len();
    let (stop, stopped) = watch::channel(false);
    let tell = |line: &str| told.tell(line);
    let waiting = Waiting { poll: POLL, beyond, stopped, tell: &tell };
    let work = async {
        let mut all = Vec::with_capacity(wanted);
        for Connected { name, kind, mode, cdn } in connected {
            if *waiting.stopped.borrow() {
                break;
            }
            told.tell(&format!("{name}: asking"));
            let steps = match cdn {
                Ok(cdn) => check(&cdn, &ThrowAway::new(), &waiting).await,
                Err(error) => {
                    vec![Step::failed("configuration", format!("{error:#}"), "correct its entry in [[cdns]]")]
                }
            };
            all.push(Checked { name, kind, mode, steps });
        }
        all
    };
    let interrupt = async {
        // Who cannot hear of Ctrl-C is ended by it, as any program.
        if tokio::signal::ctrl_c().await.is_ok() {
            let _ = stop.send(true);
        }
        std::future::pending::<()>().await;
    };
    let all = tokio::select! {
        all = work => all,
        () = interrupt => Vec::new(),
    };
    told.end();
    Ok((all, wanted))
}

/// A CDN of the configuration, and its connector or why there is none: one bad file does not hide the others.
struct Connected {
    name: String,
    kind: &'static str,
    mode: DeliveryMode,
    cdn: anyhow::Result<NamedCdn>,
}

fn connected(config: &Config, only: Option<&str>) -> anyhow::Result<Vec<Connected>> {
    let is_wanted = |name: &str| only.is_none_or(|only| only == name);
    let of_vendors = config.cdns.iter().map(|cdn| Connected {
        name: cdn.name.clone(),
        kind: cdn.vendor.kind(),
        mode: cdn.mode,
        cdn: connect(config, cdn),
    });
    let plain = config.cdn.endpoints.iter().map(|url| Connected {
        name: endpoint_name(url),
        kind: "plain",
        mode: DeliveryMode::Pull,
        cdn: plain(config, url),
    });
    let found: Vec<_> = of_vendors.chain(plain).filter(|cdn| is_wanted(&cdn.name)).collect();
    match (found.is_empty(), only) {
        (true, Some(name)) => Err(super::unknown(config, name)),
        (true, None) => {
            bail!("no CDN is configured: add [[cdns]], or addresses to cdn.endpoints (docs/cdn.md)")
        }
        (false, _) => Ok(found),
    }
}

/// One line for whoever looks at the exit code alone.
fn wrong(all: &[Checked], wanted: usize) -> Option<anyhow::Error> {
    let of = |checked: &Checked| {
        let failed = checked.steps.iter().filter(|step| step.has_failed()).map(|step| step.name);
        format!("{}: {}", checked.name, failed.collect::<Vec<_>>().join(", "))
    };
    let wrong: Vec<_> = all.iter().filter(|checked| !checked.is_ok()).map(of).collect();
    let checked = all.len();
    match (wrong.len(), checked < wanted || all.iter().any(Checked::was_stopped)) {
        (0, false) => None,
        (0, true) => {
            Some(anyhow!("stopped before all {wanted} CDNs were tried; the throw-away key is deleted"))
        }
        (count, _) => Some(anyhow!("{count} of {checked} CDNs are not right: {}", wrong.join("; "))),
    }
}

/// What is waited for: on one line where somebody watches, on lines where somebody may read them later.
enum Told {
    Spinner(ProgressBar),
    Lines(Mutex<Option<Instant>>),
    Nothing,
}

impl Told {
    fn new(json: bool) -> Self {
        match (json, io::stderr().is_terminal()) {
            (true, _) => Told::Nothing,
            (false, true) => Told::Spinner(ProgressBar::new_spinner()),
            (false, false) => Told::Lines(Mutex::new(None)),
        }
    }

    fn tell(&self, line: &str) {
        match self {
            Told::Spinner(spinner) => {
                spinner.set_message(line.to_owned());
                spinner.tick();
            }
            Told::Lines(last) => {
                let mut last = last.lock();
                if last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                    *last = Some(Instant::now());
                    // Standard error may be closed; the result tells as much.
                    let _ = writeln!(io::stderr(), "{line}");
                }
            }
            Told::Nothing => {}
        }
    }

    fn end(&self) {
        if let Told::Spinner(spinner) = self {
            spinner.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Outcome;
    use super::*;
    use crate::config::RawConfig;

    fn config(text: &str) -> Config {
        let raw: RawConfig = toml::from_str(text).unwrap();
        Config::checked(&raw).unwrap()
    }

    #[test]
    fn what_is_wrong_is_one_line_and_names_the_steps() {
        let of = |name: &str, steps| Checked {
            name: name.into(),
            kind: "custom",
            mode: DeliveryMode::Pull,
            steps,
        };
        let right = || vec![Step { name: "health", outcome: Outcome::Ok(String::new()) }];
        assert!(wrong(&[of("a", right())], 1).is_none());
        let failed = vec![Step::failed("health", "w", "c"), Step::failed("route", "w", "c")];
        let error = wrong(&[of("a", right()), of("b", failed)], 2).unwrap().to_string();
        assert_eq!(error, "1 of 2 CDNs are not right: b: health, route");
        assert!(wrong(&[of("a", right())], 2).unwrap().to_string().contains("stopped"));
    }

    #[test]
    fn whoever_configured_no_cdn_or_names_another_is_told() {
        let error = |config: &Config, only| connected(config, only).err().map(|error| error.to_string());
        assert!(error(&config(""), None).unwrap().contains("no CDN is configured"));
        let one = config("[cdn]\nendpoints = [\"cdn.example\"]\n");
        assert_eq!(error(&one, Some("cdn.example")), None);
        assert!(error(&one, Some("b")).unwrap().contains("no CDN \"b\""));
    }

    #[test]
    fn one_bad_file_does_not_hide_the_others() {
        let text = "[cdn]\nendpoints = [\"cdn.example\"]\n[[cdns]]\nname = \"a\"\nkind = \"custom\"\nmode = \"push\"\n\
                    edge_url = \"https://cdn.example\"\nedge_secret_file = \"/nowhere/secret\"\n\
                    [cdns.custom]\napi_url = \"https://api.example\"\n";
        let connected = connected(&config(text), None).unwrap();
        let is_there: Vec<_> = connected.iter().map(|one| (one.name.as_str(), one.cdn.is_ok())).collect();
        assert_eq!(is_there, [("a", false), ("cdn.example", true)]);
    }
}
