//! JSON of the control API as tables for people.

use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde_json::Value;

pub(super) fn streams(answer: &Value) -> String {
    table(
        &["STREAM", "STATE", "KEY", "SINCE", "METHOD", "ROTATION", "PLAYLIST"],
        rows(answer, "streams").map(|stream| {
            let (key, config) = (&stream["currentKey"], &stream["config"]);
            vec![
                text(&stream["streamId"]),
                text(&stream["state"]),
                text(&key["ordinal"]),
                text(&key["activatedAt"]),
                text(&config["keyMethod"]),
                rotation(config),
                text(&stream["encryptedPlaylistPath"]),
            ]
        }),
    )
}

fn rotation(config: &Value) -> String {
    let segments = text(&config["segmentsPerKey"]);
    match config["rotationInterval"].as_f64() {
        Some(minutes) if minutes > 0.0 => format!("{minutes} min or {segments} segments"),
        _ => format!("{segments} segments"),
    }
}

pub(super) fn keys(answer: &Value) -> String {
    table(
        &[
            "ORDINAL",
            "KEY",
            "STATE",
            "CREATED",
            "ACTIVATED",
            "FOR",
            "BY",
            "RETIRED",
            "DESTROYED",
            "REVOKED BY",
            "REVOKED FOR",
        ],
        rows(answer, "keys").map(|key| {
            let retired = if key["compromisedAt"].is_null() { "deactivatedAt" } else { "compromisedAt" };
            let columns =
                ["ordinal", "keyId", "state", "createdAt", "activatedAt", "activatedFor", "activatedBy"];
            // The reason is a sentence: it comes last, where it pushes nothing aside.
            let ends = [retired, "destroyedAt", "revokedBy", "revokedFor"];
            columns.into_iter().chain(ends).map(|name| text(&key[name])).collect()
        }),
    )
}

pub(super) fn rotations(answer: &Value) -> String {
    let columns = ["activatedAt", "ordinal", "keyId", "activatedFor", "activatedBy", "state"];
    table(
        &["AT", "ORDINAL", "KEY", "FOR", "BY", "STATE NOW"],
        rows(answer, "rotations").map(|key| columns.map(|name| text(&key[name])).into()),
    )
}

pub(super) fn data_keys(answer: &Value) -> String {
    let columns = ["streamId", "version", "dekId", "kekId", "createdAt"];
    table(
        &["STREAM", "VERSION", "DATA KEY", "WRAPPED BY", "CREATED"],
        rows(answer, "dataKeys").map(|dek| columns.map(|name| text(&dek[name])).into()),
    )
}

/// A stream: what one looks for first comes first, then its rules by their names.
pub(super) fn stream(answer: &Value) -> String {
    let first = ["streamId", "state", "encryptedPlaylistPath", "playlistUrl", "origin", "pathPrefix"];
    let mut lines: Vec<_> =
        first.into_iter().map(|name| vec![name.to_owned(), text(&answer[name])]).collect();
    lines.push(vec!["currentKey".into(), key_line(&answer["currentKey"])]);
    for name in ["configured", "cdnEndpoints", "createdAt", "updatedAt"] {
        lines.push(vec![name.into(), text(&answer[name])]);
    }
    let config = answer["config"].as_object().into_iter().flatten();
    lines.extend(config.map(|(name, value)| vec![format!("config.{name}"), text(value)]));
    table(&[], lines.into_iter())
}

pub(super) fn rotation_done(answer: &Value) -> String {
    let mut lines = vec![
        ("stream", text(&answer["streamId"])),
        ("key", key_line(&answer["key"])),
        ("in place of", key_line(&answer["previousKey"])),
        ("CDNs", text(&answer["cdnSync"]["status"])),
    ];
    lines.extend(rows(&answer["cdnSync"], "endpoints").map(|cdn| {
        let error = cdn["error"].as_str().map(|error| format!(": {error}")).unwrap_or_default();
        ("", format!("{} {}{error}", text(&cdn["endpoint"]), text(&cdn["status"])))
    }));
    table(&[], lines.into_iter().map(|(name, value)| vec![name.into(), value]))
}

pub(super) fn revocation_done(answer: &Value) -> String {
    let mut lines = vec![
        ("stream", text(&answer["streamId"])),
        ("reason", text(&answer["reason"])),
        ("by", format!("{} at {}", text(&answer["revokedBy"]), text(&answer["revokedAt"]))),
    ];
    lines.extend(rows(answer, "revokedKeys").map(|key| ("revoked", key_line(key))));
    lines.push(("successor", key_line(&answer["successorKey"])));
    lines.push((
        "transition",
        format!("{} s for players that hold an older playlist", text(&answer["transition"])),
    ));
    match &answer["incident"] {
        Value::Null => lines.push(("CDNs", text(&answer["cdnSync"]["status"]))),
        incident => lines.push(("CDNs", format!("complete at {}", text(&incident["completedAt"])))),
    }
    lines.push(("incident", text(&answer["incidentId"])));
    table(&[], lines.into_iter().map(|(name, value)| vec![name.into(), value]))
}

/// Providers, then what the data encryption keys are under.
pub(super) fn kms(answer: &Value) -> String {
    let providers = table(
        &["PROVIDER", "WRAPS", "KEY", "VERSION", "ERROR"],
        rows(answer, "providers").map(|held| {
            let wraps = if held["wraps"] == true { "new keys" } else { "-" };
            let [provider, key, version, error] =
                ["provider", "kekId", "version", "error"].map(|name| text(&held[name]));
            vec![provider, wraps.into(), key, version, error]
        }),
    );
    let keys = table(
        &["UNDER", "VERSION", "DATA KEYS", "HELD"],
        rows(answer, "keys").map(|key| {
            let held = if key["held"] == true { "yes" } else { "no: name its provider in kms.also" };
            let [id, version, count] = ["kekId", "version", "dataKeys"].map(|name| text(&key[name]));
            vec![id, version, count, held.into()]
        }),
    );
    format!("{providers}\n{keys}")
}

pub(super) fn rewrap(answer: &Value) -> String {
    let names =
        ["state", "to", "kekId", "version", "total", "rewrapped", "current", "gone", "failed", "error"];
    let lines = names.into_iter().filter(|name| *name != "error" || !answer[*name].is_null());
    let mut shown = table(&[], lines.map(|name| vec![name.into(), text(&answer[name])]));
    if rows(answer, "failures").next().is_some() {
        let columns = ["streamId", "dekVersion", "kekId", "error"];
        let failures = rows(answer, "failures").map(|key| columns.map(|name| text(&key[name])).into());
        shown.push('\n');
        shown.push_str(&table(&["STREAM", "DEK", "UNDER", "ERROR"], failures));
    }
    shown
}

fn key_line(key: &Value) -> String {
    if key.is_null() {
        return "-".into();
    }
    let [ordinal, id, state, since] =
        ["ordinal", "keyId", "state", "activatedAt"].map(|name| text(&key[name]));
    format!("{ordinal} ({id}), {state}, promoted {since}")
}

/// Everything that an object says, a line each.
pub(super) fn fields(answer: &Value) -> String {
    let fields = answer.as_object().into_iter().flatten();
    table(&[], fields.map(|(name, value)| vec![name.clone(), text(value)]))
}

pub(super) fn rows<'a>(answer: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    answer[name].as_array().into_iter().flatten()
}

pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Array(list) if list.is_empty() => "-".into(),
        Value::Array(list) => list.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Columns without lines between them: what `awk` and people both read.
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !header.is_empty() {
        table.set_header(header.iter().copied());
    }
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn streams_are_a_table() {
        let answer = json!({ "streams": [{
            "streamId": "ch1", "state": "running", "encryptedPlaylistPath": "/live/ch1/master.m3u8",
            "config": { "rotationInterval": 30, "segmentsPerKey": 100, "keyMethod": "AES-128" },
            "currentKey": { "ordinal": 4, "activatedAt": "2026-01-01T00:00:00.000Z" },
        }, {
            "streamId": "vod", "state": "stopped", "encryptedPlaylistPath": "/vod/a.m3u8",
            "config": { "rotationInterval": 0, "segmentsPerKey": 10, "keyMethod": "AES-256" },
            "currentKey": null,
        }]});
        let expected = "\
STREAM  STATE    KEY  SINCE                     METHOD   ROTATION                PLAYLIST
ch1     running  4    2026-01-01T00:00:00.000Z  AES-128  30 min or 100 segments  /live/ch1/master.m3u8
vod     stopped  -    -                         AES-256  10 segments             /vod/a.m3u8
";
        assert_eq!(streams(&answer), expected);
    }

    #[test]
    fn a_data_key_names_who_wraps_it() {
        let key = json!({ "streamId": "ch1", "version": 2, "dekId": "ab", "kekId": "vault:transit/k", "createdAt": "T" });
        let expected = "\
STREAM  VERSION  DATA KEY  WRAPPED BY       CREATED
ch1     2        ab        vault:transit/k  T
";
        assert_eq!(data_keys(&json!({ "dataKeys": [key] })), expected);
    }

    #[test]
    fn a_revoked_key_says_who_and_why() {
        let answer = json!({ "keys": [{
            "ordinal": 3, "keyId": "ab", "state": "compromised", "createdAt": "T0", "activatedAt": "T1",
            "activatedFor": "count", "activatedBy": null, "deactivatedAt": null, "compromisedAt": "T2",
            "revokedBy": "sec", "revokedFor": "found on a forum", "destroyedAt": null,
        }]});
        let expected = "\
ORDINAL  KEY  STATE        CREATED  ACTIVATED  FOR    BY  RETIRED  DESTROYED  REVOKED BY  REVOKED FOR
3        ab   compromised  T0       T1         count  -   T2       -          sec         found on a forum
";
        assert_eq!(keys(&answer), expected);
    }

    #[test]
    fn what_is_under_which_key_is_a_table_below_the_providers() {
        let answer = json!({
            "providers": [
                { "provider": "local", "wraps": true, "kekId": "local:a", "version": null, "error": null },
                { "provider": "vault", "wraps": false, "kekId": null, "version": null, "error": "it is sealed" },
            ],
            "keys": [
                { "kekId": "local:a", "version": null, "held": true, "dataKeys": 12 },
                { "kekId": "aws:b", "version": null, "held": false, "dataKeys": 1 },
            ],
        });
        let expected = "\
PROVIDER  WRAPS     KEY      VERSION  ERROR
local     new keys  local:a  -        -
vault     -         -        -        it is sealed

UNDER    VERSION  DATA KEYS  HELD
local:a  -        12         yes
aws:b    -        1          no: name its provider in kms.also
";
        assert_eq!(kms(&answer), expected);
    }

    #[test]
    fn an_object_is_a_line_a_field() {
        let answer = json!({ "contentKeys": 4, "erasedAt": null, "urls": ["a", "b"] });
        assert_eq!(fields(&answer), "contentKeys  4\nerasedAt     -\nurls         a, b\n");
    }

    #[test]
    fn a_revocation_names_what_is_gone_and_what_took_its_place() {
        let key = |ordinal: u32, state: &str| json!({ "ordinal": ordinal, "keyId": "ab".repeat(16), "state": state, "activatedAt": "T" });
        let answer = json!({
            "streamId": "ch1", "reason": "leaked", "revokedBy": "sec", "revokedAt": "T", "transition": 12,
            "revokedKeys": [key(3, "compromised"), key(4, "compromised")], "successorKey": key(5, "active"),
            "cdnSync": { "status": "disabled" }, "incidentId": "1d",
        });
        let shown = revocation_done(&answer);
        assert_eq!(shown.lines().filter(|line| line.starts_with("revoked ")).count(), 2, "{shown}");
        let successor = format!("successor   5 ({}), active, promoted T", "ab".repeat(16));
        assert!(shown.contains(&successor), "{shown}");
        assert!(shown.contains("CDNs        disabled\nincident    1d\n"), "{shown}");
    }
}
