//! JSON as it goes over the wire: what may be asked and what is answered, with its bounds.
//!
//! Types of the engine are turned into these and these into types of the engine, so that neither side's names
//! bind the other. Times are RFC 3339 in UTC with milliseconds; numbers that are whole are written without a
//! fraction. Deliberately absent: keys' bytes, which no type here could hold.

mod answers;
mod cdns;
mod kms;
mod names;
mod requests;

use serde::Serializer;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

pub(super) use answers::{
    DataKey, Erasure, Health, HealthMetrics, HealthServices, Key, KeyList, Revocation, Rotation,
    RotationList, Stream, StreamList,
};
pub(super) use cdns::{CdnList, Incident, IncidentList};
pub(super) use kms::{KmsStatus, Rewrap, RewrapRequest, Rewrapping};
pub(super) use requests::{EraseRequest, InitializeRequest, RevokeRequest, StreamPath, UpdateRequest};

use crate::keys::Timestamp;

const RFC_3339_MILLIS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z");

fn date_time(at: Timestamp) -> String {
    let nanos = i128::from(at.as_unix_millis()) * 1_000_000;
    // Beyond the year 9999 there is no RFC 3339; no clock of ours gets there.
    let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(RFC_3339_MILLIS).unwrap_or_default()
}

/// 30 and not 30.0, but 0.5.
fn plain_number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    // Up to 2^53 every whole number is itself.
    if value.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(value) {
        serializer.serialize_u64(*value as u64)
    } else {
        serializer.serialize_f64(*value)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};
    use utoipa::PartialSchema;

    use super::*;
    use crate::engine::{self, KeyInfo, StreamInfo, StreamSpec, StreamState};
    use crate::keys::{IncidentId, KeyId, KeyMethod, KeyState, Ordinal, Policy};

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    fn key() -> KeyInfo {
        KeyInfo {
            id: KeyId::from_bytes([0x5f; 16]),
            ordinal: Ordinal(3),
            state: KeyState::Active,
            method: KeyMethod::Aes128,
            created_at: at(1_000),
            activated_at: Some(at(2_000)),
            activated_for: Some("manual".into()),
            activated_by: Some("alice".into()),
            deactivated_at: None,
            compromised_at: None,
            revoked_by: None,
            revoked_for: None,
            destroyed_at: None,
        }
    }

    /// The answer as JSON: with every property of its schema and no other.
    fn check_schema<T: serde::Serialize + PartialSchema>(answer: T) -> Value {
        let (value, schema) = (json!(answer), json!(T::schema()));
        let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let mut properties = names(&schema["properties"]);
        properties.sort_unstable();
        let mut given = names(&value);
        given.sort_unstable();
        assert_eq!(given, properties);
        // What is null is there all the same.
        assert_eq!(schema["required"].as_array().map(Vec::len), Some(given.len()), "{schema:#}");
        value
    }

    #[test]
    fn a_stream_and_its_key_are_answered_in_the_guides_names() {
        let mut info = StreamInfo {
            spec: StreamSpec {
                id: "ch1".parse().unwrap(),
                playlist_url: "https://cdn.example.com/stream/playlist.m3u8".into(),
                origin: "main".into(),
                prefix: "/stream/".into(),
                playlist_path: "/stream/playlist.m3u8".into(),
                cdn_endpoints: vec!["https://cdn1.example.com".into()],
                cdn_sync_enabled: true,
                policy: Policy::default(),
                request: None,
            },
            state: StreamState::Running,
            is_configured: false,
            created_at: at(1_000),
            updated_at: at(2_500),
            current_key: Some(key()),
        };
        let key_json = json!({
            "keyId": "5f".repeat(16), "ordinal": 3, "state": "active", "method": "AES-128",
            "createdAt": "1970-01-01T00:00:01.000Z", "activatedAt": "1970-01-01T00:00:02.000Z",
            "activatedFor": "manual", "activatedBy": "alice",
            "deactivatedAt": null, "compromisedAt": null, "revokedBy": null, "revokedFor": null,
            "destroyedAt": null,
        });
        let expected = json!({
            "streamId": "ch1",
            "state": "running",
            "playlistUrl": "https://cdn.example.com/stream/playlist.m3u8",
            "encryptedPlaylistPath": "/stream/playlist.m3u8",
            "pathPrefix": "/stream/",
            "origin": "main",
            "cdnEndpoints": ["https://cdn1.example.com"],
            "config": {
                "rotationInterval": 30, "keyMethod": "AES-128", "segmentsPerKey": 100, "cdnSyncEnabled": true,
                "preGenerateKeys": 3, "emergencyRotationEnabled": true, "gracePeriod": 300,
                "leadSegments": 2, "cdnTtl": 60, "ivMode": "segment", "encryptInitSections": false,
                "onEncrypted": "reject", "subtitles": "encrypt", "sessionKeys": false,
                "syncPolicy": "all", "revocationTransition": 2,
            },
            "configured": false,
            "currentKey": key_json,
            "createdAt": "1970-01-01T00:00:01.000Z",
            "updatedAt": "1970-01-01T00:00:02.500Z",
        });
        assert_eq!(check_schema(Stream::from(info.clone())), expected);
        check_schema(Key::from(key()));
        info.spec.policy.key_method = KeyMethod::Aes256Gcm;
        let config = &check_schema(Stream::from(info))["config"];
        assert_eq!((&config["keyMethod"], &config["ivMode"]), (&json!("AES-256-GCM"), &Value::Null));
    }

    #[test]
    fn rotation_revocation_and_erasure_say_what_was_done() {
        let id = "ch1".parse().unwrap();
        let rotation = check_schema(Rotation::of(
            &id,
            engine::ManualRotation { key: key(), previous: None },
            Vec::new(),
        ));
        assert_eq!(rotation["cdnSync"], json!({"status": "disabled", "endpoints": []}));
        assert_eq!(rotation["previousKey"], Value::Null);
        let revocation = check_schema(Revocation::of(
            &id,
            engine::Revocation {
                revoked: vec![KeyInfo {
                    state: KeyState::Compromised,
                    compromised_at: Some(at(3_000)),
                    revoked_by: Some("alice".into()),
                    revoked_for: Some("leaked".into()),
                    ..key()
                }],
                successor: key(),
                reason: "leaked".into(),
                revoked_by: "alice".into(),
                revoked_at: at(0),
                transition: Duration::from_secs(12),
                incident: incident(None),
            },
        ));
        assert_eq!(revocation["statusUrl"], format!("/api/hls/incidents/{}", "1d".repeat(16)));
        assert_eq!(revocation["cdnSync"]["status"], "purging");
        assert_eq!(revocation["cdnSync"]["endpoints"][0]["status"], "pending");
        assert_eq!((&revocation["transition"], &revocation["revokedBy"]), (&json!(12), &json!("alice")));
        let revoked = &revocation["revokedKeys"][0];
        assert_eq!((&revoked["revokedBy"], &revoked["revokedFor"]), (&json!("alice"), &json!("leaked")));
        let erased =
            engine::Erased { data_encryption_keys: 1, content_keys: 42, renditions: 3, erased_at: at(0) };
        assert_eq!(check_schema(Erasure::of(&id, erased))["contentKeys"], 42);
    }

    fn incident(completed_at: Option<Timestamp>) -> engine::Incident {
        engine::Incident {
            id: IncidentId::from_bytes([0x1d; 16]),
            stream: "ch1".parse().unwrap(),
            reason: "leaked".into(),
            revoked_by: "alice".into(),
            revoked_at: at(0),
            keys: vec![key().id],
            successor: key().id,
            completed_at,
            cdns: vec![engine::IncidentAtCdn {
                cdn: "edge-a".into(),
                state: completed_at.map_or(engine::PurgeState::Pending, |_| engine::PurgeState::Complete),
                purges: 2,
                purged_at: completed_at,
                completed_at,
                last_error: None,
            }],
        }
    }

    #[test]
    fn an_incident_says_who_why_and_how_far_each_cdn_is() {
        let open = check_schema(Incident::from(incident(None)));
        assert_eq!((&open["status"], &open["completedAt"]), (&json!("open"), &Value::Null));
        let complete = check_schema(Incident::from(incident(Some(at(4_500)))));
        assert_eq!((&complete["status"], &complete["cdns"][0]["purges"]), (&json!("complete"), &json!(2)));
        assert_eq!(complete["completedAt"], "1970-01-01T00:00:04.500Z");
    }

    #[test]
    fn what_cdns_have_of_a_key_comes_to_one_word() {
        let sync = |states: &[engine::SyncState]| {
            let at = |state: &engine::SyncState| engine::KeyAtCdn {
                endpoint: "a".into(),
                state: *state,
                last_error: None,
            };
            let rotation = engine::ManualRotation { key: key(), previous: None };
            let cdns = states.iter().map(at).collect();
            let answer = check_schema(Rotation::of(&"ch1".parse().unwrap(), rotation, cdns));
            answer["cdnSync"]["status"].as_str().unwrap().to_owned()
        };
        use engine::SyncState::{Degraded, InSync, Syncing, Unmanaged};
        assert_eq!(sync(&[InSync, InSync, Unmanaged]), "in-sync");
        assert_eq!(sync(&[InSync, Syncing]), "syncing");
        assert_eq!(sync(&[InSync, Degraded, Syncing]), "degraded");
        assert_eq!(sync(&[Unmanaged]), "disabled");
    }

    #[test]
    fn a_cdn_says_how_it_is() {
        let status = engine::CdnStatus {
            name: "edge-a".into(),
            kind: "custom",
            mode: engine::DeliveryMode::Push,
            edge: "https://cdn.example.com/".into(),
            state: engine::SyncState::Degraded,
            keys: engine::CdnKeys { verified: 3, stored: 1, sending: 0 },
            health: engine::CdnHealth {
                failing_since: Some(at(1_000)),
                failures: 3,
                last_error: Some("503".into()),
            },
        };
        let list = check_schema(CdnList::from(vec![status]));
        let cdn = &list["cdns"][0];
        assert_eq!(
            (&cdn["status"], &cdn["keysVerified"], &cdn["failures"]),
            (&json!("degraded"), &json!(3), &json!(3))
        );
    }

    #[test]
    fn a_re_wrap_says_how_far_it_is_and_what_it_left() {
        check_schema(KmsStatus::from(engine::KmsStatus { held: Vec::new(), keys: Vec::new() }));
        let failure = engine::RewrapFailure {
            stream: "ch1".parse().unwrap(),
            version: crate::keys::DekVersion(2),
            kek_id: "local:a".into(),
            why: "it does not open".into(),
        };
        let rewrap = engine::Rewrap {
            state: engine::RewrapState::BrokenOff("the store is away".into()),
            to: "vault",
            kek_id: "vault:transit/k".into(),
            version: Some(3),
            total: 10,
            rewrapped: 7,
            current: 1,
            gone: 1,
            failed: 1,
            failures: vec![failure],
            started_at: at(0),
            started_by: "alice".into(),
            ended_at: Some(at(1_000)),
        };
        let answer = check_schema(Rewrap::from(rewrap.clone()));
        let failures = json!([{
            "streamId": "ch1", "dekVersion": 2, "kekId": "local:a", "error": "it does not open",
        }]);
        assert_eq!((&answer["state"], &answer["failures"]), (&json!("broken-off"), &failures));
        assert_eq!((&answer["error"], &answer["version"]), (&json!("the store is away"), &json!(3)));
        let known = engine::Rewrapping { elsewhere: false, job: Some(rewrap) };
        assert_eq!(check_schema(Rewrapping::from(known))["rewrap"], answer);
    }

    #[test]
    fn times_are_rfc_3339_with_milliseconds() {
        let text = |millis| date_time(Timestamp::from_unix_millis(millis));
        assert_eq!(text(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(text(1_709_210_096_007), "2024-02-29T12:34:56.007Z");
        assert_eq!(text(-1), "1969-12-31T23:59:59.999Z");
        assert_eq!(text(i64::MAX), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn whole_numbers_have_no_fraction() {
        let text = |value: f64| {
            let mut out = Vec::new();
            plain_number(&value, &mut serde_json::Serializer::new(&mut out)).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!((text(30.0), text(0.5), text(0.0)), ("30".into(), "0.5".into(), "0".into()));
    }
}
