//! `keyshield kms …`: who wraps the data encryption keys, and the way to another.
//!
//! A re-wrap is the shield's own work: whoever asked for it follows it here, and may leave it.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::{KmsCommand, RemoteArgs};
use super::client::{Client, Method};
use super::{path, show_or_json, tables};

const STATUS: &str = "/api/hls/kms";
const REWRAP: &str = "/api/hls/kms/rewrap";
const POLL: Duration = Duration::from_millis(250);
/// Where nobody watches, a line tells how far it is this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Carries a `kms` command out; returns what to print, and what was left undone.
///
/// # Errors
/// As [`super::streams`]; and whoever leaves a re-wrap, by Ctrl-C.
pub async fn kms(args: &RemoteArgs, command: &KmsCommand) -> anyhow::Result<(String, Option<anyhow::Error>)> {
    let client = Client::new(args)?;
    match command {
        KmsCommand::Status => {
            let status = client.call(Method::GET, STATUS, None).await?;
            Ok((show_or_json(args, &status, tables::kms)?, None))
        }
        KmsCommand::Rewrap { to } => {
            let begun = client.call(Method::POST, REWRAP, Some(json!({ "to": to }))).await?;
            let ended = follow(&client, begun, Shown::new(args.json)).await?;
            let text = show_or_json(args, &ended, tables::rewrap)?;
            Ok((text, left(&ended)))
        }
        KmsCommand::RotateDek { stream, .. } => rotate_deks(args, &client, stream.as_deref()).await,
    }
}

/// Gives a stream, or each that is running, a new data encryption key. What failed does not keep the others from theirs.
async fn rotate_deks(
    args: &RemoteArgs,
    client: &Client,
    stream: Option<&str>,
) -> anyhow::Result<(String, Option<anyhow::Error>)> {
    let ids = match stream {
        Some(stream) => vec![stream.to_owned()],
        None => {
            let all = client.pages("/api/hls/streams", "streams", "after").await?;
            let running = all["streams"].as_array().into_iter().flatten().filter(|s| s["state"] == "running");
            running.filter_map(|stream| Some(stream["streamId"].as_str()?.to_owned())).collect()
        }
    };
    let (mut renewed, mut failed) = (Vec::new(), Vec::new());
    for id in &ids {
        match client.call(Method::POST, &path(id, "/rotate-dek"), None).await {
            Ok(dek) => renewed.push(dek),
            Err(error) => failed.push(format!("{id}: {error}")),
        }
    }
    let (done, all) = (renewed.len(), ids.len());
    let text = show_or_json(args, &json!({ "dataKeys": renewed }), tables::data_keys)?;
    let left = (!failed.is_empty())
        .then(|| anyhow!("{done} of {all} streams have a new key; {}", failed.join("; ")));
    Ok((text, left))
}

/// Follows a re-wrap to its end.
async fn follow(client: &Client, mut job: Value, mut shown: Shown) -> anyhow::Result<Value> {
    let started = job["startedAt"].clone();
    loop {
        shown.show(&job);
        if job["state"] != "running" {
            shown.end();
            return Ok(job);
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            pressed = tokio::signal::ctrl_c() => {
                shown.end();
                pressed.context("cannot listen for Ctrl-C")?;
                bail!("the re-wrap goes on without this command; run it again to follow it");
            }
        }
        let mut answer = client.call(Method::GET, REWRAP, None).await?;
        job = answer["rewrap"].take();
        if job["startedAt"] != started {
            shown.end();
            bail!("the node was started anew and the re-wrap broke off; run it again for what is left");
        }
    }
}

/// What was left as it was.
fn left(job: &Value) -> Option<anyhow::Error> {
    let count = |name: &str| job[name].as_u64().unwrap_or_default();
    let done = count("rewrapped") + count("current") + count("gone");
    match (&job["error"], count("failed")) {
        (Value::String(why), _) => {
            let (done, total) = (done, count("total"));
            Some(anyhow!(
                "the re-wrap broke off after {done} of {total} keys: {why}; run it again for the others"
            ))
        }
        (_, 0) => None,
        (_, failed) => Some(anyhow!("{failed} data encryption keys are left as they were; run it again")),
    }
}

/// How far it is: a bar where somebody watches, lines where somebody may read them later, nothing beside JSON.
enum Shown {
    Bar(ProgressBar),
    Lines(Option<Instant>),
    Nothing,
}

impl Shown {
    fn new(json: bool) -> Self {
        if json {
            return Shown::Nothing;
        }
        if !io::stderr().is_terminal() {
            return Shown::Lines(None);
        }
        let style =
            ProgressStyle::with_template("{bar:40} {pos}/{len} data encryption keys, {msg}{eta} left");
        // It is a constant.
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Shown::Bar(bar)
    }

    fn show(&mut self, job: &Value) {
        let count = |name: &str| job[name].as_u64().unwrap_or_default();
        let failed = count("failed");
        let (looked_at, total) =
            (count("rewrapped") + count("current") + count("gone") + failed, count("total"));
        match self {
            Shown::Bar(bar) => {
                bar.set_length(total.max(looked_at));
                bar.set_position(looked_at);
                bar.set_message(if failed > 0 { format!("{failed} failed, ") } else { String::new() });
            }
            Shown::Lines(last) if last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) => {
                *last = Some(Instant::now());
                // Standard error may be closed; the result tells as much.
                let _ = writeln!(
                    io::stderr(),
                    "{looked_at} of {total} data encryption keys looked at, {failed} failed"
                );
            }
            Shown::Lines(_) | Shown::Nothing => {}
        }
    }

    fn end(&self) {
        if let Shown::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_an_error_and_says_what_to_do() {
        let job = |failed: u64, error: Value| {
            json!({ "state": "done", "total": 10, "rewrapped": 5, "current": 2, "gone": 1, "failed": failed,
                    "error": error })
        };
        assert!(left(&job(0, Value::Null)).is_none());
        let failed = left(&job(2, Value::Null)).unwrap().to_string();
        assert!(failed.contains("2 data encryption keys are left") && failed.contains("again"), "{failed}");
        let broken = left(&job(0, json!("the store is away"))).unwrap().to_string();
        assert!(broken.contains("8 of 10") && broken.contains("the store is away"), "{broken}");
    }
}
