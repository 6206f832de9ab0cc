//! `keyshield streams …`, `keyshield keys …`, `keyshield kms …` and `keyshield cdn status`: the control API from the command line.
//!
//! Each command is one call (lists follow their pages). What comes back is shown as a table, or as the API's own
//! JSON with `--json`. Deliberately absent: any knowledge of the engine; a shield elsewhere is as good as one here.

mod args;
mod cdns;
mod client;
mod kms;
mod tables;

pub use args::{KeysCommand, KmsCommand, RemoteArgs, StreamsCommand};
pub use cdns::{cdns, incidents};
pub use kms::kms;

use anyhow::Context;
use serde_json::{Map, Value, json};

use args::{StreamFields, Target};
use client::{Client, Method};

/// Carries a `streams` command out; returns what to print.
///
/// # Errors
/// A control plane that cannot be reached, or that refuses: with its reason.
pub async fn streams(args: &RemoteArgs, command: &StreamsCommand) -> anyhow::Result<String> {
    let client = Client::new(args)?;
    let (answer, show): (Value, fn(&Value) -> String) = match command {
        StreamsCommand::List => {
            (client.pages("/api/hls/streams", "streams", "after").await?, tables::streams)
        }
        StreamsCommand::Show(Target { stream }) => {
            (client.call(Method::GET, &path(stream, ""), None).await?, tables::stream)
        }
        StreamsCommand::Initialize { target, playlist_url, path_prefix, fields } => {
            let mut body = fields.to_body()?;
            body.insert("playlistUrl".into(), json!(playlist_url));
            if let Some(prefix) = path_prefix {
                body.insert("pathPrefix".into(), json!(prefix));
            }
            let path = path(&target.stream, "/initialize");
            (client.call(Method::POST, &path, Some(body.into())).await?, tables::stream)
        }
        StreamsCommand::Update { target, playlist_url, fields } => {
            let mut body = fields.to_body()?;
            if let Some(url) = playlist_url {
                body.insert("playlistUrl".into(), json!(url));
            }
            let path = path(&target.stream, "");
            (client.call(Method::PATCH, &path, Some(body.into())).await?, tables::stream)
        }
        StreamsCommand::Stop(Target { stream }) => {
            (client.call(Method::POST, &path(stream, "/stop"), None).await?, tables::stream)
        }
        StreamsCommand::Delete(Target { stream }) => {
            client.call(Method::DELETE, &path(stream, ""), None).await?;
            (json!({ "streamId": stream, "deleted": true }), tables::fields)
        }
        StreamsCommand::Erase { target: Target { stream }, yes } => {
            anyhow::ensure!(yes, "this removes stream {stream} and its history for good; say so with --yes");
            let body = json!({ "confirm": stream });
            (client.call(Method::POST, &path(stream, "/erase"), Some(body)).await?, tables::fields)
        }
    };
    show_or_json(args, &answer, show)
}

/// Carries a `keys` command out; returns what to print.
///
/// # Errors
/// As [`streams`].
pub async fn keys(args: &RemoteArgs, command: &KeysCommand) -> anyhow::Result<String> {
    let client = Client::new(args)?;
    let (answer, show): (Value, fn(&Value) -> String) = match command {
        KeysCommand::List(Target { stream }) => {
            (client.pages(&path(stream, "/keys"), "keys", "before").await?, tables::keys)
        }
        KeysCommand::Rotations(Target { stream }) => {
            (client.pages(&path(stream, "/rotations"), "rotations", "before").await?, tables::rotations)
        }
        KeysCommand::Rotate(Target { stream }) => {
            (client.call(Method::POST, &path(stream, "/rotate"), None).await?, tables::rotation_done)
        }
        KeysCommand::Revoke { target, reason, key, wait } => {
            let mut body = Map::from_iter([("reason".to_owned(), json!(reason))]);
            if let Some(key) = key {
                body.insert("keyId".into(), json!(key));
            }
            let path = path(&target.stream, "/emergency-revoke");
            let mut done = client.call(Method::POST, &path, Some(body.into())).await?;
            if *wait {
                done["incident"] = cdns::follow(&client, &done).await?;
            }
            (done, tables::revocation_done)
        }
    };
    show_or_json(args, &answer, show)
}

fn show_or_json(args: &RemoteArgs, answer: &Value, show: fn(&Value) -> String) -> anyhow::Result<String> {
    if args.json {
        return serde_json::to_string_pretty(answer).context("JSON is text");
    }
    Ok(show(answer))
}

fn path(stream: &str, call: &str) -> String {
    let stream = percent_encoding::utf8_percent_encode(stream, percent_encoding::NON_ALPHANUMERIC);
    format!("/api/hls/streams/{stream}{call}")
}

impl StreamFields {
    /// The part of a body that `initialize` and `update` share.
    fn to_body(&self) -> anyhow::Result<Map<String, Value>> {
        let mut body = Map::new();
        if !self.cdn.is_empty() {
            body.insert("cdnEndpoints".into(), json!(self.cdn));
        }
        let mut config = Map::new();
        for setting in &self.settings {
            let (name, value) = setting.split_once('=').with_context(|| {
                format!("--set {setting:?}: expected NAME=VALUE, such as segmentsPerKey=50")
            })?;
            // Numbers and truth values as such, the rest as text: `keyMethod=AES-256` needs no quotes.
            let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
            config.insert(name.to_owned(), value);
        }
        if !config.is_empty() {
            body.insert("config".into(), config.into());
        }
        Ok(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_numbers_truth_values_and_text() {
        let fields = StreamFields {
            cdn: vec!["https://cdn1.example.com".into()],
            settings: ["rotationInterval=15", "keyMethod=AES-256", "cdnSyncEnabled=true"]
                .map(String::from)
                .into(),
        };
        let expected = json!({
            "cdnEndpoints": ["https://cdn1.example.com"],
            "config": { "rotationInterval": 15, "keyMethod": "AES-256", "cdnSyncEnabled": true },
        });
        assert_eq!(Value::from(fields.to_body().unwrap()), expected);
        let wrong = StreamFields { cdn: vec![], settings: vec!["segmentsPerKey".into()] };
        assert!(wrong.to_body().unwrap_err().to_string().contains("NAME=VALUE"));
    }

    #[test]
    fn an_id_cannot_change_the_call() {
        assert_eq!(path("a/../b?x", "/stop"), "/api/hls/streams/a%2F%2E%2E%2Fb%3Fx/stop");
    }
}
