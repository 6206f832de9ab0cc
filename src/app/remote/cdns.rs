//! `keyshield cdn status` and `keyshield cdn incidents`, and following a revocation until every CDN is done with it.

use std::io::{self, Write};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use super::args::RemoteArgs;
use super::client::{Client, Method};
use super::show_or_json;
use super::tables::{rows, table, text};

const CDNS: &str = "/api/hls/cdns";
const INCIDENTS: &str = "/api/hls/incidents";
const POLL: Duration = Duration::from_millis(250);

/// The CDNs of a running shield.
///
/// # Errors
/// As [`super::streams`].
pub async fn cdns(args: &RemoteArgs) -> anyhow::Result<String> {
    let answer = Client::new(args)?.call(Method::GET, CDNS, None).await?;
    show_or_json(args, &answer, cdn_table)
}

/// Revocations of a running shield, or one of them with its CDNs.
///
/// # Errors
/// As [`super::streams`].
pub async fn incidents(args: &RemoteArgs, incident: Option<&str>) -> anyhow::Result<String> {
    let client = Client::new(args)?;
    match incident {
        None => {
            let all = client.pages(INCIDENTS, "incidents", "before").await?;
            show_or_json(args, &all, incident_table)
        }
        Some(id) => {
            let id = percent_encoding::utf8_percent_encode(id, percent_encoding::NON_ALPHANUMERIC);
            let one = client.call(Method::GET, &format!("{INCIDENTS}/{id}"), None).await?;
            show_or_json(args, &one, incident_shown)
        }
    }
}

/// Waits until every CDN is done with a revocation; what it then says of each.
pub(super) async fn follow(client: &Client, revocation: &Value) -> anyhow::Result<Value> {
    let url = revocation["statusUrl"].as_str().context("the shield says nothing of CDNs")?;
    let mut told = String::new();
    loop {
        let incident = client.call(Method::GET, url, None).await?;
        if incident["status"] == "complete" {
            return Ok(incident);
        }
        let now = progress(&incident);
        if now != told {
            // Whoever closed standard error does not want to know.
            let _ = writeln!(io::stderr(), "keyshield: {now}");
            told = now;
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            pressed = tokio::signal::ctrl_c() => {
                pressed.context("cannot listen for Ctrl-C")?;
                bail!("the keys are revoked; CDNs go on letting go of them: {url} says how far they are");
            }
        }
    }
}

fn progress(incident: &Value) -> String {
    let of = |cdn: &Value| {
        let error = cdn["lastError"].as_str().map(|error| format!(" ({error})")).unwrap_or_default();
        format!("{}: {}{error}", text(&cdn["cdn"]), text(&cdn["status"]))
    };
    rows(incident, "cdns").map(of).collect::<Vec<_>>().join(", ")
}

fn cdn_table(answer: &Value) -> String {
    let names = [
        "name",
        "kind",
        "mode",
        "status",
        "keysVerified",
        "keysStored",
        "failures",
        "failingSince",
        "lastError",
    ];
    let header = ["CDN", "KIND", "MODE", "STATUS", "VERIFIED", "STORED", "FAILURES", "SINCE", "ERROR"];
    table(&header, rows(answer, "cdns").map(|cdn| names.map(|name| text(&cdn[name])).into()))
}

fn incident_table(answer: &Value) -> String {
    let header = ["INCIDENT", "STREAM", "REVOKED", "BY", "STATUS", "COMPLETE", "KEYS", "REASON"];
    let row = |incident: &Value| {
        let names = ["incidentId", "streamId", "revokedAt", "revokedBy", "status", "completedAt"];
        let keys = rows(incident, "revokedKeyIds").count().to_string();
        let mut row = names.map(|name| text(&incident[name])).to_vec();
        row.extend([keys, text(&incident["reason"])]);
        row
    };
    table(&header, rows(answer, "incidents").map(row))
}

fn incident_shown(incident: &Value) -> String {
    let names = [
        "streamId",
        "reason",
        "revokedBy",
        "revokedAt",
        "revokedKeyIds",
        "successorKeyId",
        "status",
        "completedAt",
    ];
    let shown = table(&[], names.map(|name| vec![name.into(), text(&incident[name])]).into_iter());
    let header = ["CDN", "STATUS", "PURGES", "PURGED", "COMPLETE", "ERROR"];
    let names = ["cdn", "status", "purges", "purgedAt", "completedAt", "lastError"];
    let cdns = rows(incident, "cdns").map(|cdn| names.map(|name| text(&cdn[name])).into());
    format!("{shown}\n{}", table(&header, cdns))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn incident() -> Value {
        json!({
            "incidentId": "1d", "streamId": "ch1", "reason": "leaked", "revokedBy": "sam", "revokedAt": "T0",
            "revokedKeyIds": ["ab", "cd"], "successorKeyId": "ef", "status": "open", "completedAt": null,
            "cdns": [
                { "cdn": "a", "status": "complete", "purges": 2, "purgedAt": "T4", "completedAt": "T5", "lastError": null },
                { "cdn": "b", "status": "pending", "purges": 0, "purgedAt": null, "completedAt": null, "lastError": "503" },
            ],
        })
    }

    #[test]
    fn cdns_are_a_table() {
        let answer = json!({ "cdns": [{
            "name": "a", "kind": "fastly", "mode": "push", "edgeUrl": "https://a/", "status": "degraded",
            "keysVerified": 12, "keysStored": 1, "failingSince": "T0", "failures": 4, "lastError": "put: 503",
        }]});
        let expected = "\
CDN  KIND    MODE  STATUS    VERIFIED  STORED  FAILURES  SINCE  ERROR
a    fastly  push  degraded  12        1       4         T0     put: 503
";
        assert_eq!(cdn_table(&answer), expected);
    }

    #[test]
    fn an_incident_is_a_line_in_the_list_and_a_page_by_itself() {
        let expected = "\
INCIDENT  STREAM  REVOKED  BY   STATUS  COMPLETE  KEYS  REASON
1d        ch1     T0       sam  open    -         2     leaked
";
        assert_eq!(incident_table(&json!({ "incidents": [incident()] })), expected);
        let shown = incident_shown(&incident());
        assert!(shown.contains("revokedKeyIds   ab, cd\n") && shown.contains("b    pending   0"), "{shown}");
    }

    #[test]
    fn progress_names_every_cdn_and_what_is_wrong_there() {
        assert_eq!(progress(&incident()), "a: complete, b: pending (503)");
    }
}
