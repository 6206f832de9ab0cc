//! What of a request makes sense, and that the schema says the same.

use serde_json::{Value, json};
use utoipa::PartialSchema;

use super::*;
use crate::control::problem::FieldError;
use crate::engine::StreamState;
use crate::hls::{BaseUrl, Mount};
use crate::keys::{IvMode, KeyMethod, OnEncrypted, Subtitles, SyncPolicy, Timestamp};

fn mounts() -> Mounts {
    let base = BaseUrl::parse("https://cdn.example.com").unwrap();
    let mut mount = Mount::new("main".into(), "/", vec![base], false).unwrap();
    mount.query_params = vec!["quality".into()];
    let other = BaseUrl::parse("http://other.example/vod").unwrap();
    let other = Mount::new("other".into(), "/other", vec![other], false).unwrap();
    Mounts::new(vec![mount, other]).unwrap()
}

fn initialize(body: Value) -> Result<StreamSpec, Vec<String>> {
    let request: InitializeRequest = serde_json::from_value(body).unwrap();
    let checked =
        request.checked("ch1".parse().unwrap(), &mounts(), &Policy::default()).map(|(spec, _)| spec);
    checked.map_err(|problem| problem.errors().iter().map(|e| format!("{}: {}", e.field, e.detail)).collect())
}

#[test]
fn the_guides_example_is_a_stream() {
    let spec = initialize(json!({
        "playlistUrl": "https://cdn.example.com/stream/playlist.m3u8",
        "cdnEndpoints": ["https://cdn1.example.com", "https://cdn2.example.com"],
        "config": {
            "rotationInterval": 30, "keyMethod": "AES-128", "segmentsPerKey": 100, "cdnSyncEnabled": true
        }
    }))
    .unwrap();
    assert_eq!(spec.origin, "main");
    assert_eq!(spec.prefix, "/stream/");
    assert_eq!(spec.playlist_path, "/stream/playlist.m3u8");
    assert_eq!(spec.cdn_endpoints.len(), 2);
    assert!(spec.cdn_sync_enabled);
    assert_eq!(spec.policy, Policy::default());
}

#[test]
fn every_rule_can_be_set() {
    let spec = initialize(json!({
        "playlistUrl": "http://other.example/vod/a/b.m3u8",
        "pathPrefix": "/a",
        "config": {
            "rotationInterval": 0.08, "keyMethod": "AES-256", "segmentsPerKey": 7, "cdnSyncEnabled": false,
            "preGenerateKeys": 5, "emergencyRotationEnabled": false, "gracePeriod": 10, "leadSegments": 0,
            "cdnTtl": 0, "ivMode": "sequence", "encryptInitSections": true, "onEncrypted": "rekey",
            "subtitles": "clear", "sessionKeys": true, "syncPolicy": "best-effort",
            "revocationTransition": 0
        }
    }))
    .unwrap();
    assert_eq!((spec.prefix.as_str(), spec.playlist_path.as_str()), ("/a", "/other/a/b.m3u8"));
    assert!(!spec.cdn_sync_enabled && spec.cdn_endpoints.is_empty());
    let expected = Policy {
        key_method: KeyMethod::Aes256,
        rotation_interval: Some(Duration::from_millis(4_800)),
        segments_per_key: 7,
        pre_generate_keys: 5,
        grace_period: Duration::from_secs(10),
        lead_segments: 0,
        cdn_ttl: Duration::ZERO,
        iv_mode: IvMode::Sequence,
        encrypt_init_sections: true,
        on_encrypted: OnEncrypted::Rekey,
        subtitles: Subtitles::Clear,
        session_keys: true,
        sync_policy: SyncPolicy::BestEffort,
        emergency_rotation: false,
        revocation_transition: 0,
    };
    assert_eq!(spec.policy, expected);
    assert!(spec.policy.checked().is_ok());
}

#[test]
fn a_call_is_kept_as_it_was_given_and_not_as_it_came_out() {
    let request = |body| initialize(body).unwrap().request.unwrap();
    let short =
        json!({"playlistUrl": "https://cdn.example.com/stream/a.m3u8", "config": {"rotationInterval": 30}});
    let long = json!({
        "config": {"cdnSyncEnabled": true, "rotationInterval": 30.0}, "cdnEndpoints": [],
        "pathPrefix": "/stream/", "playlistUrl": "https://cdn.example.com/stream/a.m3u8"
    });
    assert_eq!(request(short.clone()), request(long));
    let config = &request(short)["config"];
    assert_eq!(*config, json!({"rotationInterval": 30.0, "cdnSyncEnabled": true}), "nothing of [policy]");
    let named = json!({
        "playlistUrl": "https://cdn.example.com/stream/a.m3u8", "config": {"rotationInterval": 30, "ivMode": "segment"}
    });
    assert_eq!(request(named)["config"]["ivMode"], "segment", "though that is the default");
}

#[test]
fn a_playlist_url_leads_to_an_allowed_origin_or_says_why_not() {
    for (url, why) in [
        ("https://evil.example/a.m3u8", "https://evil.example/a.m3u8, which is not at an allowed origin"),
        ("http://cdn.example.com/a.m3u8", "not at an allowed origin"),
        ("https://cdn.example.com:444/a.m3u8", "not at an allowed origin"),
        ("http://other.example/live/a.m3u8", "not at an allowed origin"),
        ("ftp://cdn.example.com/a.m3u8", "http:// or https://"),
        ("/stream/playlist.m3u8", "http:// or https://"),
        ("https:cdn.example.com/a.m3u8", "http:// or https://"),
        (" https://cdn.example.com/a.m3u8", "http:// or https://"),
        ("https://cdn.example.com/a\n.m3u8", "http:// or https://"),
        ("https://", "http:// or https://"),
        ("https://user:pw@cdn.example.com/a.m3u8", "user name"),
        ("https://cdn.example.com/a.m3u8#x", "fragment"),
        ("https://cdn.example.com/a%2Fb.m3u8", "encoded slash"),
        ("https://cdn.example.com/a.m3u8?token=secret", "\"token\""),
    ] {
        let faults = initialize(json!({"playlistUrl": url})).unwrap_err();
        assert!(faults[0].starts_with("playlistUrl: ") && faults[0].contains(why), "{url}: {faults:?}");
        assert!(!faults[0].contains("secret") && !faults[0].contains("pw@"), "{faults:?}");
    }
    let long = format!("https://cdn.example.com/{}", "x".repeat(2_048));
    assert!(initialize(json!({"playlistUrl": long})).unwrap_err()[0].contains("2048"));
    let chosen = initialize(json!({"playlistUrl": "https://cdn.example.com/a.m3u8?quality=high"})).unwrap();
    assert_eq!(chosen.playlist_path, "/a.m3u8?quality=high");
}

#[test]
fn everything_that_is_wrong_is_named_at_once() {
    let faults = initialize(json!({
        "playlistUrl": "https://cdn.example.com/stream/playlist.m3u8",
        "pathPrefix": "/elsewhere/",
        "cdnEndpoints": ["https://cdn1.example.com", "cdn2.example.com"],
        "config": {"segmentsPerKey": 0, "gracePeriod": -1, "rotationInterval": 0.001}
    }))
    .unwrap_err();
    let fields: Vec<_> = faults.iter().map(|fault| fault.split(':').next().unwrap()).collect();
    let expected = [
        "pathPrefix",
        "cdnEndpoints[1]",
        "config.rotationInterval",
        "config.segmentsPerKey",
        "config.gracePeriod",
    ];
    assert_eq!(fields, expected, "{faults:?}");
    let many = vec!["https://cdn1.example.com"; 21];
    let faults = initialize(json!({"playlistUrl": "https://cdn.example.com/a.m3u8", "cdnEndpoints": many}));
    assert_eq!(faults.unwrap_err(), ["cdnEndpoints: must be at most 20"]);
}

#[test]
fn the_bounds_of_the_schema_are_those_that_are_checked() {
    let schema = serde_json::to_value(ConfigRequest::schema()).unwrap();
    let properties = schema["properties"].as_object().unwrap();
    let outcome = |name: &str, value: &Value| {
        initialize(json!({"playlistUrl": "https://cdn.example.com/a.m3u8", "config": {name: value}}))
    };
    let mut numbers = 0;
    for (name, property) in properties {
        let ranges = match property.get("oneOf") {
            Some(ranges) if name == "rotationInterval" => ranges.as_array().unwrap().clone(),
            _ => vec![property.clone()],
        };
        for range in ranges.iter().filter(|range| range.get("minimum").is_some()) {
            let (least, most) = (&range["minimum"], &range["maximum"]);
            for within in [least, most] {
                let spec = outcome(name, within).unwrap_or_else(|why| panic!("{name} {within}: {why:?}"));
                assert!(spec.policy.checked().is_ok(), "{name} {within}");
            }
            let (least, most) = (least.as_f64().unwrap(), most.as_f64().unwrap());
            let step = if name == "rotationInterval" { 0.001 } else { 1.0 };
            for beyond in [least - step, most + step] {
                let beyond = if step < 1.0 { json!(beyond) } else { json!(beyond as i64) };
                let faults = outcome(name, &beyond).unwrap_err();
                assert!(faults[0].starts_with(&format!("config.{name}: ")), "{beyond}: {faults:?}");
            }
            numbers += 1;
        }
    }
    assert_eq!(numbers, 8, "{schema:#}");
}

#[test]
fn an_iv_mode_and_a_method_without_one_are_refused_together() {
    let url = "https://cdn.example.com/stream/playlist.m3u8";
    for mode in ["segment", "period", "sequence"] {
        let config = json!({"keyMethod": "AES-256-GCM", "ivMode": mode});
        let faults = initialize(json!({"playlistUrl": url, "config": config})).unwrap_err();
        assert_eq!(faults, [format!("config.ivMode: {NO_IV_MODE}")]);
    }
    let gcm = initialize(json!({"playlistUrl": url, "config": {"keyMethod": "AES-256-GCM"}})).unwrap().policy;
    assert_eq!(gcm, Policy { key_method: KeyMethod::Aes256Gcm, ..Policy::default() });

    let change = |policy: &Policy, config: Value| {
        let changed = update(&running(policy.clone()), json!({ "config": config }));
        changed.map(|change| change.policy.map(|change| change.to))
    };
    let refused = |policy: &Policy, config: Value| {
        let fault = change(policy, config).unwrap_err();
        assert_eq!(fault.field, "config.ivMode");
        fault.detail
    };
    assert_eq!(refused(&gcm, json!({"ivMode": "segment"})), NO_IV_MODE);
    assert_eq!(change(&gcm, json!({"keyMethod": "AES-256-GCM"})).unwrap(), None, "it is so already");
    let cbc = change(&gcm, json!({"keyMethod": "AES-256", "ivMode": "period"})).unwrap().unwrap();
    assert_eq!((cbc.key_method, cbc.iv_mode), (KeyMethod::Aes256, IvMode::Period));

    let detail = refused(&cbc, json!({"keyMethod": "AES-256-GCM"}));
    assert!(
        detail.contains("is \"period\"") && detail.contains("change it to \"segment\" first"),
        "{detail}"
    );
    assert_eq!(refused(&cbc, json!({"keyMethod": "AES-256-GCM", "ivMode": "segment"})), NO_IV_MODE);
    let plain = change(&cbc, json!({"ivMode": "segment"})).unwrap().unwrap();
    let again = change(&plain, json!({"keyMethod": "AES-256-GCM"})).unwrap().unwrap();
    assert_eq!(again.checked(), Ok(gcm));
}

#[test]
fn an_iv_mode_of_the_configuration_is_not_for_a_stream_whose_method_has_none() {
    let defaults = Policy { iv_mode: IvMode::Period, ..Policy::default() };
    let begun = |config: Value| {
        let body = json!({"playlistUrl": "https://cdn.example.com/a.m3u8", "config": config});
        let request: InitializeRequest = serde_json::from_value(body).unwrap();
        let (spec, _) = request.checked("ch1".parse().unwrap(), &mounts(), &defaults).unwrap();
        (spec.policy.key_method, spec.policy.iv_mode)
    };
    assert_eq!(begun(json!({"keyMethod": "AES-256-GCM"})), (KeyMethod::Aes256Gcm, IvMode::Segment));
    assert_eq!(begun(json!({"keyMethod": "AES-256"})), (KeyMethod::Aes256, IvMode::Period));
}

fn running(policy: Policy) -> StreamInfo {
    let spec = initialize(json!({"playlistUrl": "https://cdn.example.com/stream/playlist.m3u8"})).unwrap();
    let at = Timestamp::from_unix_millis(0);
    StreamInfo {
        spec: StreamSpec { policy, ..spec },
        state: StreamState::Running,
        is_configured: false,
        created_at: at,
        updated_at: at,
        current_key: None,
    }
}

fn update(stream: &StreamInfo, body: Value) -> Result<StreamChange, FieldError> {
    let request: UpdateRequest = serde_json::from_value(body).unwrap();
    let checked = request.checked(stream, &mounts()).map(|(change, _)| change);
    checked.map_err(|problem| problem.errors()[0].clone())
}

#[test]
fn a_change_stays_within_the_stream_and_touches_nothing_else() {
    let stream = running(Policy { segments_per_key: 7, ..Policy::default() });
    let change = |body: Value| update(&stream, body);
    assert_eq!(change(json!({})).unwrap(), StreamChange::default());
    let moved = change(json!({"playlistUrl": "https://cdn.example.com/stream/b/x.m3u8"})).unwrap();
    let expected = ("https://cdn.example.com/stream/b/x.m3u8".to_owned(), "/stream/b/x.m3u8".to_owned());
    assert_eq!(moved, StreamChange { playlist: Some(expected), ..StreamChange::default() });
    for elsewhere in ["https://cdn.example.com/other/x.m3u8", "http://other.example/vod/stream/x.m3u8"] {
        let fault = change(json!({"playlistUrl": elsewhere})).unwrap_err();
        assert!(fault.field == "playlistUrl" && fault.detail.contains("/stream/"), "{fault:?}");
    }
    let fault = change(json!({"config": {"encryptInitSections": true}})).unwrap_err();
    assert_eq!(fault.field, "config.encryptInitSections");
    assert!(fault.detail.contains("delete the stream and initialize it again"), "{fault:?}");
    let same = change(json!({"config": {"encryptInitSections": false}})).unwrap();
    assert_eq!(same, StreamChange::default(), "saying what holds is no change");
    let policy = change(json!({"config": {"gracePeriod": 5}})).unwrap().policy.unwrap();
    assert_eq!((policy.to.segments_per_key, policy.to.grace_period), (7, Duration::from_secs(5)));
    let unsynced = change(json!({"config": {"cdnSyncEnabled": false}, "cdnEndpoints": []})).unwrap();
    assert_eq!((unsynced.cdn_sync_enabled, unsynced.cdn_endpoints), (Some(false), Some(vec![])));
}

#[test]
fn a_reason_is_one_line_that_shows() {
    let checked = |reason: &str, key_id: Option<&str>| {
        let request = RevokeRequest { reason: reason.into(), key_id: key_id.map(str::to_owned) };
        request.checked().map_err(|problem| problem.errors()[0].field.clone())
    };
    assert_eq!(checked("leaked, see INC-7", None), Ok(("leaked, see INC-7".into(), None)));
    assert!(checked(&"ä".repeat(1_000), Some(&"0a".repeat(16))).is_ok());
    for wrong in ["", " leaked", "two\nlines", "nul\0", &"x".repeat(1_001)] {
        assert_eq!(checked(wrong, None), Err("reason".into()), "{wrong:?}");
    }
    for wrong in ["", "0a", &"0A".repeat(16)] {
        assert_eq!(checked("leaked", Some(wrong)), Err("keyId".into()), "{wrong:?}");
    }
}
