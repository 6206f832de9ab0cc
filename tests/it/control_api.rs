//! The control API against the real process: what operators ask, and what players get of it.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Running, SOON, fetch_segments, get, segments};
use crate::origin::{Answer, Origin};

const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:10\n\
    #EXTINF:4,\nseg_10.ts\n#EXTINF:4,\nseg_11.ts\n#EXTINF:4,\nseg_12.ts\n";

/// One token for each role: `ks_admin` and so on, held by "the admin".
pub(crate) fn tokens() -> String {
    let entry = |role: &str| {
        let sha256 = hex::encode(Sha256::digest(format!("ks_{role}")));
        format!("[[control.tokens]]\nname = \"the-{role}\"\nrole = \"{role}\"\nsha256 = \"{sha256}\"\n")
    };
    ["admin", "operator", "security", "auditor", "viewer"].map(entry).concat()
}

/// An origin with playlists under any folder, and a shield that may fetch from it.
fn start() -> (Origin, Running) {
    let origin = Origin::start(answer);
    let shield = Running::serve(&config(&origin));
    (origin, shield)
}

fn answer(request: &crate::origin::Seen) -> Answer {
    let target = request.target.as_str();
    if target.ends_with("gone.m3u8") {
        Answer::status(404)
    } else if target.ends_with("page.m3u8") {
        Answer::ok("<html><body>not here</body></html>")
    } else if target.ends_with("moved.m3u8") {
        Answer::status(302).header("Location", "http://127.0.0.1:1/")
    } else if target.ends_with("zipped.m3u8") {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(PLAYLIST.as_bytes()).unwrap();
        Answer::ok(encoder.finish().unwrap()).header("Content-Encoding", "gzip")
    } else if target.ends_with(".m3u8") {
        Answer::ok(PLAYLIST)
    } else {
        Answer::ok(vec![0x47; 5_000])
    }
}

fn config(origin: &Origin) -> String {
    format!("[[origins]]\nname = \"main\"\nurls = [\"{}\"]\n{}", origin.url(), tokens())
}

#[derive(Debug)]
pub(crate) struct Got {
    pub(crate) status: u16,
    location: Option<String>,
    pub(crate) body: Value,
}

impl Got {
    /// The name at the end of the problem's type.
    pub(crate) fn problem(&self) -> &str {
        assert_eq!(self.body["status"], self.status, "{self:?}");
        self.body["type"].as_str().unwrap().rsplit(':').next().unwrap()
    }

    pub(crate) fn ok(self) -> Value {
        assert!((200..300).contains(&self.status), "{self:?}");
        self.body
    }
}

fn call_as(role: &str, shield: &Running, method: &str, path: &str, body: &Value) -> Got {
    call_at(role, shield, method, &format!("/api/hls/streams{path}"), body)
}

/// Calls whatever is at a path of the control plane.
pub(crate) fn call_at(role: &str, shield: &Running, method: &str, path: &str, body: &Value) -> Got {
    let agent: ureq::Agent =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(SOON)).build().into();
    let mut request = ureq::http::Request::builder().method(method).uri(format!("{}{path}", shield.control));
    if !role.is_empty() {
        request = request.header("authorization", format!("Bearer ks_{role}"));
    }
    let mut response = if body.is_null() {
        agent.run(request.body(()).unwrap()).unwrap()
    } else {
        let request = request.header("content-type", "application/json");
        agent.run(request.body(body.to_string()).unwrap()).unwrap()
    };
    let status = response.status().as_u16();
    let location = response.headers().get("location").map(|value| value.to_str().unwrap().to_owned());
    let text = response.body_mut().read_to_string().unwrap();
    let body = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
    Got { status, location, body }
}

pub(crate) fn call(shield: &Running, method: &str, path: &str, body: Value) -> Got {
    call_as("admin", shield, method, path, &body)
}

/// A stream under a folder of its own.
fn begin(origin: &Origin, shield: &Running, id: &str) -> Value {
    call(shield, "POST", &format!("/{id}/initialize"), body(origin, id)).ok()
}

fn body(origin: &Origin, id: &str) -> Value {
    json!({
        "playlistUrl": format!("{}/{id}/index.m3u8", origin.url()),
        "cdnEndpoints": ["https://cdn1.example.com"],
        "config": {"rotationInterval": 30, "keyMethod": "AES-128", "segmentsPerKey": 100, "cdnSyncEnabled": true}
    })
}

/// The keys that a stream's playlist names, each once.
fn key_urls(shield: &Running, id: &str) -> Vec<String> {
    let mut urls: Vec<_> =
        fetch_segments(&shield.at(&format!("/{id}/index.m3u8"))).into_iter().map(|s| s.key_url).collect();
    urls.dedup();
    urls
}

fn key_id(key_url: &str) -> &str {
    key_url.rsplit('/').next().unwrap()
}

#[test]
fn a_stream_that_is_begun_plays_encrypted_at_once_and_is_begun_once() {
    let (origin, shield) = start();
    assert_eq!(shield.get("/ch1/index.m3u8").status, 404, "nothing is passed through");
    let got = call(&shield, "POST", "/ch1/initialize", body(&origin, "ch1"));
    assert_eq!((got.status, got.location.as_deref()), (201, Some("/api/hls/streams/ch1")));
    let stream = got.ok();
    assert_eq!(stream["streamId"], "ch1");
    assert_eq!(stream["state"], "running");
    assert_eq!(stream["encryptedPlaylistPath"], "/ch1/index.m3u8");
    assert_eq!((&stream["pathPrefix"], &stream["origin"]), (&json!("/ch1/"), &json!("main")));
    assert_eq!(stream["configured"], false);
    assert_eq!(stream["config"]["preGenerateKeys"], 3, "what was left out is the configuration's");

    let keys = key_urls(&shield, "ch1");
    assert_eq!(keys.len(), 1);
    assert_eq!(get(&keys[0]).body.len(), 16);
    let current = call(&shield, "GET", "/ch1", Value::Null).ok();
    assert_eq!(current["currentKey"]["keyId"], key_id(&keys[0]));

    let again = call(&shield, "POST", "/ch1/initialize", body(&origin, "ch1"));
    assert_eq!((again.status, &again.body["createdAt"]), (200, &stream["createdAt"]));
    let mut other = body(&origin, "ch1");
    other["config"]["segmentsPerKey"] = json!(50);
    assert_eq!(call(&shield, "POST", "/ch1/initialize", other).problem(), "stream-differs");
    let taken = call(&shield, "POST", "/ch2/initialize", body(&origin, "ch1"));
    assert_eq!((taken.status, taken.problem()), (409, "prefix-taken"));
}

#[test]
fn what_is_there_is_found_again_while_the_origin_is_away() {
    let (origin, shield) = start();
    begin(&origin, &shield, "ch1");
    let same = body(&origin, "ch1");
    drop(origin);
    assert_eq!(call(&shield, "POST", "/ch1/initialize", same).status, 200);
}

#[test]
fn a_playlist_that_is_none_is_refused_with_the_reason() {
    let (origin, shield) = start();
    let at = |path: &str| json!({"playlistUrl": format!("{}{path}", origin.url())});
    for (body, why) in [
        (at("/ch1/gone.m3u8"), "the origin answered 404"),
        (at("/ch1/page.m3u8"), "begins with <html"),
        (at("/ch1/moved.m3u8"), "redirects are not followed"),
        (json!({"playlistUrl": "http://127.0.0.1:1/ch1/index.m3u8"}), "not at an allowed origin"),
    ] {
        let got = call(&shield, "POST", "/ch1/initialize", body);
        assert_eq!((got.status, got.problem()), (422, "invalid"));
        assert_eq!(got.body["errors"][0]["field"], "playlistUrl");
        assert!(got.body["detail"].as_str().unwrap().contains(why), "{got:?}");
    }
    assert_eq!(call(&shield, "GET", "/ch1", Value::Null).problem(), "no-such-stream");
    assert_eq!(call(&shield, "POST", "/ch1/initialize", at("/ch1/zipped.m3u8")).status, 201);
}

#[test]
fn roles_are_kept() {
    let (origin, shield) = start();
    let initialize = |role: &str| call_as(role, &shield, "POST", "/ch1/initialize", &body(&origin, "ch1"));
    assert_eq!(initialize("").problem(), "unauthenticated");
    assert_eq!(initialize("stranger").status, 401);
    for role in ["viewer", "auditor", "security"] {
        assert_eq!(initialize(role).problem(), "forbidden", "{role}");
    }
    assert_eq!(initialize("operator").status, 201);
    assert_eq!(call_as("viewer", &shield, "GET", "/ch1", &Value::Null).status, 200);
    assert_eq!(call_as("viewer", &shield, "GET", "/ch1/keys", &Value::Null).status, 403);
    assert_eq!(call_as("operator", &shield, "DELETE", "/ch1", &Value::Null).status, 403);
    let reason = json!({"reason": "leaked"});
    assert_eq!(call_as("operator", &shield, "POST", "/ch1/emergency-revoke", &reason).status, 403);
    let revoked = call_as("security", &shield, "POST", "/ch1/emergency-revoke", &reason).ok();
    assert_eq!(revoked["revokedBy"], "the-security");
}

#[test]
fn streams_are_listed_page_by_page() {
    let (origin, shield) = start();
    for id in ["b", "c", "a"] {
        begin(&origin, &shield, id);
    }
    let page = |query: &str| {
        let page = call(&shield, "GET", query, Value::Null).ok();
        let streams = page["streams"].as_array().unwrap().iter();
        let ids: Vec<_> = streams.map(|stream| stream["streamId"].as_str().unwrap().to_owned()).collect();
        (ids.concat(), page["next"].clone())
    };
    assert_eq!(page(""), ("abc".into(), Value::Null));
    assert_eq!(page("?limit=2"), ("ab".into(), json!("b")));
    assert_eq!(page("?limit=2&after=b"), ("c".into(), Value::Null));
    assert_eq!(page("?after=c"), (String::new(), Value::Null));
}

#[test]
fn a_change_leaves_what_it_does_not_name() {
    let (origin, shield) = start();
    let before = begin(&origin, &shield, "ch1");
    let change = json!({"config": {"segmentsPerKey": 7, "rotationInterval": 0}});
    let changed = call(&shield, "PATCH", "/ch1", change).ok();
    let mut expected = before["config"].clone();
    expected["segmentsPerKey"] = json!(7);
    expected["rotationInterval"] = json!(0);
    assert_eq!(changed["config"], expected);
    assert_eq!(changed["cdnEndpoints"], before["cdnEndpoints"]);
    assert_eq!(call(&shield, "GET", "/ch1", Value::Null).ok(), changed);

    let moved = json!({"playlistUrl": format!("{}/ch1/b/main.m3u8", origin.url())});
    assert_eq!(call(&shield, "PATCH", "/ch1", moved).ok()["encryptedPlaylistPath"], "/ch1/b/main.m3u8");
    let elsewhere = json!({"playlistUrl": format!("{}/ch2/main.m3u8", origin.url())});
    assert_eq!(call(&shield, "PATCH", "/ch1", elsewhere).problem(), "invalid");
    assert_eq!(call(&shield, "PATCH", "/ch2", json!({})).problem(), "no-such-stream");
}

#[test]
fn a_method_without_an_iv_mode_is_given_none() {
    let (origin, shield) = start();
    let rules = |id: &str, config: Value| {
        let mut body = body(&origin, id);
        body["config"] = config;
        call(&shield, "POST", &format!("/{id}/initialize"), body)
    };
    let refused = rules("ch1", json!({"keyMethod": "AES-256-GCM", "ivMode": "segment"}));
    assert_eq!((refused.status, refused.problem()), (422, "invalid"));
    assert_eq!(refused.body["errors"][0]["field"], "config.ivMode");
    let gcm = rules("ch1", json!({"keyMethod": "AES-256-GCM", "sessionKeys": true})).ok()["config"].clone();
    assert_eq!((&gcm["keyMethod"], &gcm["ivMode"]), (&json!("AES-256-GCM"), &Value::Null));
    assert_eq!((&gcm["sessionKeys"], &gcm["onEncrypted"]), (&json!(true), &json!("reject")));
    let refused = call(&shield, "PATCH", "/ch1", json!({"config": {"ivMode": "period"}}));
    assert_eq!((refused.status, &refused.body["errors"][0]["field"]), (422, &json!("config.ivMode")));

    rules("ch2", json!({"ivMode": "period", "onEncrypted": "pass", "subtitles": "clear"})).ok();
    let to_gcm = json!({"config": {"keyMethod": "AES-256-GCM"}});
    let refused = call(&shield, "PATCH", "/ch2", to_gcm.clone());
    assert_eq!((refused.status, &refused.body["errors"][0]["field"]), (422, &json!("config.ivMode")));
    call(&shield, "PATCH", "/ch2", json!({"config": {"ivMode": "segment"}})).ok();
    let gcm = call(&shield, "PATCH", "/ch2", to_gcm).ok()["config"].clone();
    assert_eq!((&gcm["ivMode"], &gcm["onEncrypted"]), (&Value::Null, &json!("pass")));
    assert_eq!((&gcm["subtitles"], &gcm["sessionKeys"]), (&json!("clear"), &json!(false)));
}

#[test]
fn a_stopped_stream_serves_nothing_until_it_is_begun_again() {
    let (origin, shield) = start();
    begin(&origin, &shield, "ch1");
    let segment = fetch_segments(&shield.at("/ch1/index.m3u8")).remove(0);
    assert_eq!(call(&shield, "POST", "/ch1/stop", Value::Null).ok()["state"], "stopped");
    for url in [&shield.at("/ch1/index.m3u8"), &segment.url, &segment.key_url] {
        assert_ne!(get(url).status, 200, "{url}");
    }
    assert_eq!(call(&shield, "POST", "/ch1/rotate", Value::Null).problem(), "stream-stopped");
    let again = call(&shield, "POST", "/ch1/initialize", body(&origin, "ch1"));
    assert_eq!((again.status, &again.body["state"]), (200, &json!("running")));
    assert!(fetch_segments(&shield.at("/ch1/index.m3u8")).contains(&segment), "paths and keys are as before");
}

#[test]
fn a_deleted_stream_is_gone_its_history_stays_and_its_prefix_is_free() {
    let (origin, shield) = start();
    begin(&origin, &shield, "ch1");
    let key = key_urls(&shield, "ch1").remove(0);
    let deleted = call(&shield, "DELETE", "/ch1", Value::Null);
    assert_eq!((deleted.status, deleted.body), (204, Value::Null));
    assert_eq!(call(&shield, "GET", "/ch1", Value::Null).problem(), "no-such-stream");
    assert_eq!(call(&shield, "DELETE", "/ch1", Value::Null).problem(), "no-such-stream");
    assert_ne!(get(&key).status, 200);
    assert_ne!(shield.get("/ch1/index.m3u8").status, 200);
    let keys = call(&shield, "GET", "/ch1/keys", Value::Null).ok();
    for key in keys["keys"].as_array().unwrap() {
        assert_eq!(key["state"], "destroyed", "{key}");
    }
    assert!(keys["keys"].to_string().contains(key_id(&key)));
    assert_eq!(call(&shield, "POST", "/ch2/initialize", body(&origin, "ch1")).status, 201);
}

#[test]
fn an_erased_stream_leaves_no_row() {
    let (origin, shield) = start();
    begin(&origin, &shield, "ch1");
    key_urls(&shield, "ch1");
    let refused = call(&shield, "POST", "/ch1/erase", json!({"confirm": "ch2"}));
    assert_eq!((refused.status, &refused.body["errors"][0]["field"]), (422, &json!("confirm")));
    let erased = call(&shield, "POST", "/ch1/erase", json!({"confirm": "ch1"})).ok();
    assert!(erased["dataEncryptionKeys"].as_u64().unwrap() >= 1, "{erased}");
    assert!(erased["contentKeys"].as_u64().unwrap() >= 4 && erased["renditions"] == 1, "{erased}");
    for path in ["/ch1", "/ch1/keys", "/ch1/rotations"] {
        assert_eq!(call(&shield, "GET", path, Value::Null).problem(), "no-such-stream", "{path}");
    }
    assert_ne!(shield.get("/ch1/index.m3u8").status, 200);
}

#[test]
fn a_rotation_promotes_the_next_key_and_is_in_the_history() {
    let (origin, shield) = start();
    let first = begin(&origin, &shield, "ch1")["currentKey"].clone();
    let rotation = call_as("operator", &shield, "POST", "/ch1/rotate", &Value::Null).ok();
    assert_eq!(rotation["streamId"], "ch1");
    assert_eq!(rotation["previousKey"]["keyId"], first["keyId"]);
    // The stream names it, and this shield is not connected to it.
    let unmanaged = json!([{"endpoint": "https://cdn1.example.com", "status": "unmanaged", "error": null}]);
    assert_eq!(rotation["cdnSync"], json!({"status": "disabled", "endpoints": unmanaged}));
    let key = &rotation["key"];
    assert_eq!((&key["ordinal"], &key["state"]), (&json!(1), &json!("active")));
    assert_eq!((&key["activatedFor"], &key["activatedBy"]), (&json!("manual"), &json!("the-operator")));
    let time = key["activatedAt"].as_str().unwrap();
    assert!(time.len() == 24 && time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");

    call(&shield, "POST", "/ch1/rotate", Value::Null).ok();
    let page = call_as("auditor", &shield, "GET", "/ch1/rotations?limit=2", &Value::Null).ok();
    let ordinals = |page: &Value, of: &str| -> Vec<u64> {
        page[of].as_array().unwrap().iter().map(|key| key["ordinal"].as_u64().unwrap()).collect()
    };
    assert_eq!((ordinals(&page, "rotations"), &page["next"]), (vec![2, 1], &json!(1)));
    let last = call(&shield, "GET", "/ch1/rotations?limit=2&before=1", Value::Null).ok();
    assert_eq!((ordinals(&last, "rotations"), &last["next"]), (vec![0], &Value::Null));

    let keys = call(&shield, "GET", "/ch1/keys?limit=1000", Value::Null).ok();
    let all = ordinals(&keys, "keys");
    assert!(all.len() >= 6 && all.is_sorted_by(|a, b| a > b), "three promoted, three made ahead: {all:?}");
    let names: Vec<_> = keys["keys"][0].as_object().unwrap().keys().cloned().collect();
    assert!(!names.iter().any(|name| name.contains("bytes") || name.contains("wrapped")), "{names:?}");
}

#[test]
fn a_revoked_key_is_refused_and_its_successor_takes_over() {
    let (origin, shield) = start();
    begin(&origin, &shield, "ch1");
    let revoked = key_urls(&shield, "ch1").remove(0);
    let reason = "Security incident - immediate key revocation required";
    let done = call(&shield, "POST", "/ch1/emergency-revoke", json!({"reason": reason})).ok();
    assert_eq!(done["revokedKeys"][0]["keyId"], key_id(&revoked));
    assert_eq!(done["revokedKeys"][0]["state"], "compromised");
    assert_eq!((&done["reason"], &done["revokedBy"]), (&json!(reason), &json!("the-admin")));
    assert_ne!(get(&revoked).status, 200);

    let successor = done["successorKey"]["keyId"].as_str().unwrap();
    let playlist = shield.get("/ch1/index.m3u8");
    let now = segments(&shield.at("/ch1/index.m3u8"), &playlist.text());
    assert_eq!(now.len(), 3);
    assert!(now.iter().all(|segment| key_id(&segment.key_url) == successor), "{now:?}");
    assert_eq!(get(&now[0].key_url).status, 200);

    let one = |id: &str| call(&shield, "POST", "/ch1/emergency-revoke", json!({"reason": "x", "keyId": id}));
    assert_eq!(one(&"0".repeat(32)).problem(), "no-such-key");
    assert_eq!(one(key_id(&revoked)).problem(), "key-not-revocable");
    call(&shield, "PATCH", "/ch1", json!({"config": {"emergencyRotationEnabled": false}})).ok();
    assert_eq!(one(successor).problem(), "revocation-disabled");
}

#[test]
fn a_stream_of_the_configuration_is_rotated_but_not_changed_by_calls() {
    let origin = Origin::start(answer);
    let declared = format!("[[streams]]\nid = \"ch1\"\nplaylist_url = \"{}/ch1/index.m3u8\"\n", origin.url());
    let shield = Running::serve(&(config(&origin) + &declared));
    assert_eq!(call(&shield, "GET", "/ch1", Value::Null).ok()["configured"], true);
    let change = json!({"config": {"segmentsPerKey": 7}});
    for (method, path, body) in [
        ("PATCH", "/ch1", change),
        ("DELETE", "/ch1", Value::Null),
        ("POST", "/ch1/erase", json!({"confirm": "ch1"})),
    ] {
        let got = call(&shield, method, path, body);
        assert_eq!((got.status, got.problem()), (409, "stream-configured"), "{method} {path}");
    }
    assert_eq!(call(&shield, "POST", "/ch1/rotate", Value::Null).status, 200);
    // For an incident: nobody has to edit a file first.
    assert_eq!(call(&shield, "POST", "/ch1/stop", Value::Null).ok()["state"], "stopped");
    let same = json!({"playlistUrl": format!("{}/ch1/index.m3u8", origin.url())});
    assert_eq!(call(&shield, "POST", "/ch1/initialize", same).ok()["state"], "running");
}

#[test]
fn what_was_asked_for_outlives_a_kill() {
    let (origin, shield) = start();
    let begun = begin(&origin, &shield, "ch1");
    begin(&origin, &shield, "ch2");
    call(&shield, "POST", "/ch2/stop", Value::Null).ok();
    let before = fetch_segments(&shield.at("/ch1/index.m3u8"));
    let shield = Running::serve_in(shield.kill(), &config(&origin));
    let after = call(&shield, "GET", "/ch1", Value::Null).ok();
    assert_eq!((&after["config"], &after["createdAt"]), (&begun["config"], &begun["createdAt"]));
    assert_eq!(call(&shield, "GET", "/ch2", Value::Null).ok()["state"], "stopped");
    let keys = |of: &[crate::harness::Segment]| -> Vec<String> {
        of.iter().map(|segment| key_id(&segment.key_url).to_owned()).collect()
    };
    assert_eq!(keys(&fetch_segments(&shield.at("/ch1/index.m3u8"))), keys(&before));
}
