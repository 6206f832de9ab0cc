//! CDNs over the control API: what a rotation and a revocation answer of them, how an incident goes on, and how a CDN
//! that does not do what it is asked shows.
//!
//! The CDN is an agent of its own, in push mode, that is its own edge; real caches are tested in `cdn`.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cdn::caches::{AgentHandle, TOKEN};
use crate::control_api::{Got, call, call_at, tokens};
use crate::harness::{Running, fetch_segments, get, wait_at_most, wait_for};
use crate::hook::Receiver;
use crate::origin::{Answer, Origin};

const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:10\n\
    #EXTINF:4,\nseg_10.ts\n#EXTINF:4,\nseg_11.ts\n#EXTINF:4,\nseg_12.ts\n";
const EDGE_SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
/// Pauses between tries grow; a purge is repeated seconds after the revocation.
const LONG: Duration = Duration::from_secs(30);

/// A shield with a stream, and a CDN before it.
struct Site {
    shield: Running,
    agent: AgentHandle,
    _origin: Origin,
}

impl Site {
    fn start() -> Self {
        Self::start_with("")
    }

    fn start_with(config: &str) -> Self {
        let origin = Origin::start(|request| match request.target.ends_with(".m3u8") {
            true => Answer::ok(PLAYLIST),
            false => Answer::ok(vec![0x47; 5_000]),
        });
        let agent = AgentHandle::start(Some(EDGE_SECRET.parse().unwrap()), Box::new(|_| Ok(())));
        let (url, edge) = (origin.url(), agent.url());
        let shield = Running::serve(&format!(
            "[policy]\npre_generate_keys = 2\n{}[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
             [[streams]]\nid = \"ch1\"\nplaylist_url = \"{url}/ch1/index.m3u8\"\n\
             [cdn]\nedge_secret = \"{EDGE_SECRET}\"\ncustom_token = \"{TOKEN}\"\n\
             [[cdns]]\nname = \"own\"\nkind = \"custom\"\nmode = \"push\"\nedge_url = \"{edge}\"\n\
             [cdns.custom]\napi_url = \"{edge}\"\n{config}",
            tokens()
        ));
        Self { shield, agent, _origin: origin }
    }

    fn ask(&self, role: &str, path: &str) -> Got {
        call_at(role, &self.shield, "GET", path, &Value::Null)
    }

    fn post(&self, path: &str, body: Value) -> Value {
        call(&self.shield, "POST", &format!("/ch1/{path}"), body).ok()
    }

    /// The CDN, as operators see it.
    fn cdn(&self) -> Value {
        let list = self.ask("viewer", "/api/hls/cdns").ok();
        assert_eq!(list["cdns"].as_array().unwrap().len(), 1, "{list}");
        list["cdns"][0].clone()
    }

    fn wait_until_in_sync(&self) -> Value {
        wait_at_most(LONG, "a CDN in step", || {
            Some(self.cdn()).filter(|cdn| cdn["status"] == "in-sync" && cdn["keysVerified"] != 0)
        })
    }

    fn health(&self) -> Value {
        serde_json::from_slice(&get(&format!("{}/api/hls/health", self.shield.control)).body).unwrap()
    }

    fn wait_for_sync_service(&self, state: &str) -> Value {
        wait_at_most(LONG, state, || {
            Some(self.health()).filter(|health| health["services"]["cdnSync"] == state)
        })
    }

    fn revoke(&self) -> Value {
        self.post("emergency-revoke", json!({"reason": "found on a forum"}))
    }

    fn wait_until_complete(&self, incident: &Value) -> Value {
        let url = incident["statusUrl"].as_str().expect("a URL");
        wait_at_most(LONG, "the end of the incident", || {
            Some(self.ask("security", url).ok()).filter(|incident| incident["status"] == "complete")
        })
    }
}

fn at_own(status: &str) -> Value {
    json!([{"endpoint": "own", "status": status, "error": null}])
}

#[test]
fn a_rotation_says_how_far_cdns_have_the_key() {
    let site = Site::start();
    let cdn = site.wait_until_in_sync();
    assert_eq!((&cdn["name"], &cdn["kind"], &cdn["mode"]), (&json!("own"), &json!("custom"), &json!("push")));
    assert_eq!((&cdn["keysStored"], &cdn["failures"]), (&json!(0), &json!(0)));
    assert_eq!((&cdn["failingSince"], &cdn["lastError"]), (&Value::Null, &Value::Null));
    assert_eq!(cdn["keysVerified"], site.agent.stored().len());

    let rotation = site.post("rotate", Value::Null);
    assert_eq!(rotation["cdnSync"], json!({"status": "in-sync", "endpoints": at_own("in-sync")}));
    let key = rotation["key"]["keyId"].as_str().unwrap();
    let at_edge = get(&format!("{}/api/hls/keys/{key}", site.agent.url()));
    assert_eq!((at_edge.status, at_edge.body.len()), (200, 16));
}

#[test]
fn a_revocation_answers_at_once_and_is_followed_to_its_end() {
    let site = Site::start();
    site.wait_until_in_sync();
    let path = "/ch1/index.m3u8";
    let leaked = fetch_segments(&site.shield.at(path))[0].key_url.clone();
    let leaked = leaked.rsplit('/').next().unwrap();
    let at_edge = || get(&format!("{}/api/hls/keys/{leaked}", site.agent.url())).status;
    assert_eq!(at_edge(), 200);
    // However long the CDN takes, the answer does not wait for it.
    site.agent.purges_take(Duration::from_secs(2));

    let started = Instant::now();
    let answer = site.revoke();
    println!("answered after {} ms", started.elapsed().as_millis());
    let id = answer["incidentId"].as_str().unwrap();
    assert_eq!(answer["statusUrl"], format!("/api/hls/incidents/{id}"));
    assert_eq!(answer["cdnSync"], json!({"status": "purging", "endpoints": at_own("pending")}));
    assert_eq!(get(&site.shield.at(&format!("/api/hls/keys/{leaked}"))).status, 410);

    let begun = site.ask("auditor", answer["statusUrl"].as_str().unwrap()).ok();
    assert_eq!((&begun["incidentId"], &begun["status"]), (&answer["incidentId"], &json!("open")));
    assert_eq!((&begun["streamId"], &begun["reason"]), (&json!("ch1"), &json!("found on a forum")));
    assert_eq!((&begun["revokedBy"], &begun["revokedAt"]), (&json!("the-admin"), &answer["revokedAt"]));
    assert_eq!(begun["revokedKeyIds"], json!([leaked]));
    assert_eq!(begun["successorKeyId"], answer["successorKey"]["keyId"]);
    assert_eq!((&begun["cdns"][0]["cdn"], &begun["completedAt"]), (&json!("own"), &Value::Null));

    wait_for("the edge without the key", || (at_edge() == 404).then_some(()));
    println!("out of the edge after {} ms", started.elapsed().as_millis());
    let complete = site.wait_until_complete(&answer);
    println!("complete after {} ms", started.elapsed().as_millis());
    let at_cdn = &complete["cdns"][0];
    assert_eq!((&at_cdn["status"], &at_cdn["lastError"]), (&json!("complete"), &Value::Null), "{complete}");
    assert!(at_cdn["purges"].as_u64() >= Some(1) && at_cdn["purgedAt"].is_string(), "{complete}");
    assert_eq!(at_cdn["completedAt"], complete["completedAt"]);
    let tag = format!("keyshield-key-{leaked}");
    assert!(site.agent.purged().iter().all(|purge| purge.tags.contains(&tag)));
    site.wait_until_in_sync();
    assert!(site.agent.stored().iter().all(|(key, _)| key != leaked));
}

#[test]
fn incidents_are_listed_by_their_age_and_found_by_their_ids() {
    let site = Site::start();
    site.wait_until_in_sync();
    assert_eq!(site.ask("auditor", "/api/hls/incidents").ok(), json!({"incidents": [], "next": null}));
    let all: Vec<_> = (0..3).map(|_| site.revoke()).collect();
    let ids = |page: &Value| -> Vec<Value> {
        page["incidents"].as_array().unwrap().iter().map(|incident| incident["incidentId"].clone()).collect()
    };
    let mut expected: Vec<_> = all.iter().map(|answer| answer["incidentId"].clone()).collect();
    expected.reverse();
    let first = site.ask("auditor", "/api/hls/incidents?limit=2").ok();
    assert_eq!(ids(&first), expected[..2]);
    let next = first["next"].as_str().expect("there is more");
    let second = site.ask("auditor", &format!("/api/hls/incidents?limit=2&before={next}")).ok();
    assert_eq!((ids(&second), &second["next"]), (expected[2..].to_vec(), &Value::Null));

    let missing = site.ask("auditor", &format!("/api/hls/incidents/{}", "0".repeat(32)));
    assert_eq!((missing.status, missing.problem()), (404, "no-such-incident"));
    for wrong in ["x", &"F".repeat(32), &"0".repeat(31), "%ff"] {
        let refused = site.ask("auditor", &format!("/api/hls/incidents/{wrong}"));
        assert_eq!((refused.status, refused.problem()), (422, "invalid"), "{wrong}");
        assert_eq!(refused.body["errors"][0]["field"], "incidentId", "{refused:?}");
    }
    for wrong in ["before=x", "limit=0", "limit=1001", "after=x"] {
        assert_eq!(site.ask("auditor", &format!("/api/hls/incidents?{wrong}")).status, 422, "{wrong}");
    }
    for path in ["/api/hls/cdns", "/api/hls/incidents", &format!("/api/hls/incidents/{}", "0".repeat(32))] {
        assert_eq!(site.ask("", path).status, 401, "{path}");
    }
    for path in ["/api/hls/incidents", &format!("/api/hls/incidents/{}", "0".repeat(32))] {
        assert_eq!(
            site.ask("viewer", path).status,
            403,
            "a viewer is not told who took keys back, and why: {path}"
        );
    }
}

#[test]
fn a_cdn_that_refuses_shows_until_it_does_what_it_is_asked() {
    let receiver = Receiver::start();
    let site = Site::start_with(&format!("[alerts]\nwebhook_url = \"{}\"\n", receiver.url));
    site.wait_until_in_sync();
    assert_eq!(site.wait_for_sync_service("operational")["status"], "healthy");

    site.agent.refuse();
    // New keys wait now, for who does not take them.
    site.post("rotate", Value::Null);
    let health = site.wait_for_sync_service("degraded");
    assert_eq!(health["status"], "degraded");
    assert!(health["problems"].to_string().contains("CDN own: "), "{health}");
    let cdn = wait_for("its state", || Some(site.cdn()).filter(|cdn| cdn["status"] == "degraded"));
    assert!(cdn["failures"].as_u64() >= Some(3) && cdn["failingSince"].is_string(), "{cdn}");
    assert!(cdn["lastError"].as_str().unwrap().contains("500"), "{cdn}");
    let notice = wait_at_most(LONG, "the alert", || receiver.has("cdn-degraded", "raised"));
    assert_eq!(notice["severity"], "warning");
    assert!(!site.shield.logged().contains(TOKEN) && !cdn.to_string().contains(TOKEN));

    // A revocation does not wait for it either.
    let started = Instant::now();
    let answer = site.revoke();
    println!("answered after {} ms, with a CDN that refuses", started.elapsed().as_millis());
    let open = wait_for("the error of a purge", || {
        let incident = site.ask("auditor", answer["statusUrl"].as_str().unwrap()).ok();
        incident["cdns"][0]["lastError"].is_string().then_some(incident)
    });
    assert_eq!((&open["status"], &open["cdns"][0]["status"]), (&json!("open"), &json!("pending")));

    site.agent.heal();
    let healed = site.wait_for_sync_service("operational");
    wait_at_most(LONG, "the end of the alert", || receiver.has("cdn-degraded", "resolved"));
    assert_eq!(healed["problems"], json!([]));
    site.wait_until_complete(&answer);
    let cdn = site.wait_until_in_sync();
    assert_eq!((&cdn["failures"], &cdn["lastError"]), (&json!(0), &Value::Null));
}
