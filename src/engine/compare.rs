//! What is asked for, against the stream that is there: where the two differ.
//!
//! A call is compared with the call that began the stream, as both were given: what the configuration fills in may be
//! another on each node and at each start. Streams of the configuration are compared by what they come to.

use serde_json::Value;

use super::StreamSpec;
use crate::store::StreamRow;

/// The first field in which a stream that is there differs from what is asked for.
pub(super) fn differing_field(spec: &StreamSpec, there: &StreamRow) -> Option<&'static str> {
    let differences = [
        ("playlistUrl", spec.playlist_url != there.playlist_url || spec.origin != there.origin),
        ("pathPrefix", spec.prefix != there.prefix),
        ("cdnEndpoints", spec.cdn_endpoints != there.cdn.endpoints),
        ("config.cdnSyncEnabled", spec.cdn_sync_enabled != there.cdn.sync_enabled),
        ("config", spec.policy != there.policy),
    ];
    differences.into_iter().find(|(_, differs)| *differs).map(|(field, _)| field)
}

/// The first field in which a call differs from the one that began the stream: `config.segmentsPerKey`.
pub(super) fn differing_request(asked: &Value, before: &Value) -> Option<String> {
    let (Value::Object(asked), Value::Object(before)) = (asked, before) else { return Some("body".into()) };
    let mut names: Vec<_> = asked.keys().chain(before.keys()).collect();
    names.sort_unstable();
    let differs = |name: &&String| asked.get(*name) != before.get(*name);
    let name = names.into_iter().find(differs)?;
    match (asked.get(name), before.get(name)) {
        (Some(asked @ Value::Object(_)), Some(before @ Value::Object(_))) => {
            differing_request(asked, before).map(|inner| format!("{name}.{inner}"))
        }
        _ => Some(name.clone()),
    }
}
