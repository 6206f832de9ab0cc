//! One shield and five CDNs in push mode, of which four are in trouble at once, each in its way: one refuses, one is slow,
//! one works and fails by turns, one takes few calls. What streams do meanwhile is as their policies say, and when all are
//! well again each has all it should.

use std::collections::BTreeSet;
use std::time::Duration;

use keyshield::keys::EdgeSecret;
use serde_json::{Value, json};

use super::caches::{AgentHandle, Varnish};
use crate::control_api::{call, call_at, tokens};
use crate::harness::{Running, free_port, get, segments, wait_at_most};
use crate::origin::{Answer, Origin, Seen};

const SYNC_TIMEOUT: Duration = Duration::from_secs(1);
const JUST_IN_TIME: Duration = Duration::from_millis(700);
const TOO_LATE: Duration = Duration::from_millis(1_500);
/// Pauses after failures grow to no more than this while the test lasts.
const PATIENCE: Duration = Duration::from_secs(60);
/// Each with a policy of its own, and the last without rotations.
const STREAMS: [(&str, &str); 4] =
    [("careful", "all"), ("usual", "quorum"), ("free", "best-effort"), ("steady", "best-effort")];

fn answer(request: &Seen) -> Answer {
    if !request.target.ends_with(".m3u8") {
        return Answer::ok(request.target.bytes().cycle().take(5_000).collect::<Vec<_>>());
    }
    let segments: String = (10..14).map(|n| format!("#EXTINF:2,\nseg_{n}.ts\n")).collect();
    Answer::ok(format!(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:10\n{segments}"
    ))
}

/// The shield, what stands before it, and what is behind it.
struct Site {
    shield: Running,
    healthy: Varnish,
    /// Edges without caches, that serve keys.
    refusing: AgentHandle,
    slow: AgentHandle,
    flapping: AgentHandle,
    limiting: AgentHandle,
    _origin: Origin,
}

impl Site {
    /// In trouble from the start.
    fn start() -> Self {
        let secret: EdgeSecret = "7a".repeat(32).parse().unwrap();
        let origin = Origin::start(answer);
        let port = free_port();
        let healthy = Varnish::start_push(&[([127, 0, 0, 1], port).into()], secret.clone());
        let agent = || AgentHandle::start(Some(secret.clone()), Box::new(|_| Ok(())));
        let (refusing, slow, flapping, limiting) = (agent(), agent(), agent(), agent());
        refusing.refuse();
        slow.slow(JUST_IN_TIME);
        flapping.flap(2, 2);
        limiting.rate_limit(1, Duration::from_secs(2));
        let dir = tempfile::tempdir().unwrap();
        let mut config = format!(
            "[store]\ndatabase = \"{0}/keyshield.db\"\n[kms]\nmaster_key_file = \"{0}/keyshield.master\"\n\
             [keys]\nsweep_interval_millis = 50\n\
             [policy]\ngrace_period_secs = 2\ncdn_ttl_secs = 1\nrevocation_transition_target_durations = 0\n\
             [cdn]\nsync_timeout_millis = {1}\ncustom_token = \"{2}\"\nedge_secret = \"{3}\"\n\
             [[origins]]\nname = \"main\"\nurls = [\"{4}\"]\n",
            dir.path().display(),
            SYNC_TIMEOUT.as_millis(),
            healthy.token(),
            "7a".repeat(32),
            origin.url(),
        );
        for (id, policy) in STREAMS {
            let minutes = if id == "steady" { 30.0 } else { 0.05 };
            config += &format!(
                "[[streams]]\nid = \"{id}\"\nplaylist_url = \"{}/{id}/a.m3u8\"\n\
                 [streams.policy]\nsync_policy = \"{policy}\"\nrotation_interval_minutes = {minutes}\n",
                origin.url()
            );
        }
        let agents =
            [("refusing", &refusing), ("slow", &slow), ("flapping", &flapping), ("limiting", &limiting)];
        let edges = agents.map(|(name, agent)| (name, agent.url(), agent.url()));
        for (name, edge, api) in
            edges.into_iter().chain([("healthy", healthy.edge_url(), healthy.agent_url())])
        {
            config += &format!(
                "[[cdns]]\nname = \"{name}\"\nkind = \"custom\"\nmode = \"push\"\nedge_url = \"{edge}\"\n\
                 [cdns.custom]\napi_url = \"{api}\"\n"
            );
        }
        let shield = Running::serve_at(port, dir, &(config + &tokens()));
        Self { shield, healthy, refusing, slow, flapping, limiting, _origin: origin }
    }

    fn agents(&self) -> [&AgentHandle; 5] {
        [&self.healthy.agent, &self.refusing, &self.slow, &self.flapping, &self.limiting]
    }

    fn get(&self, path: &str) -> Value {
        call_at("admin", &self.shield, "GET", path, &Value::Null).ok()
    }

    fn status_of(&self, cdn: &str) -> String {
        let cdns = self.get("/api/hls/cdns");
        let found = cdns["cdns"].as_array().unwrap().iter().find(|found| found["name"] == cdn);
        found.unwrap()["status"].as_str().unwrap().to_owned()
    }

    fn wait_until(&self, cdn: &str, status: &str) {
        wait_at_most(PATIENCE, &format!("{cdn}: {status}"), || (self.status_of(cdn) == status).then_some(()));
    }

    /// How many keys of a stream had their turn.
    fn turns(&self, stream: &str) -> usize {
        let rotations = self.get(&format!("/api/hls/streams/{stream}/rotations?limit=1000"));
        rotations["rotations"].as_array().unwrap().len()
    }

    fn wait_for_turns(&self, stream: &str, turns: usize) {
        let enough = self.turns(stream) + turns;
        let what = format!("{stream}: {turns} rotations");
        wait_at_most(PATIENCE, &what, || (self.turns(stream) >= enough).then_some(()));
    }

    /// The keys that edges should have.
    fn wanted(&self) -> BTreeSet<String> {
        let of = |(stream, _)| {
            let keys = self.get(&format!("/api/hls/streams/{stream}/keys?limit=1000"))["keys"].clone();
            let there = ["pre-active", "active", "deactivated"].map(Value::from);
            let keys = keys.as_array().unwrap().iter().filter(|key| there.contains(&key["state"]));
            keys.map(|key| key["keyId"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        STREAMS.into_iter().flat_map(of).collect()
    }

    fn revoke(&self, stream: &str) -> (String, BTreeSet<String>) {
        let path = format!("/{stream}/emergency-revoke");
        let answer = call(&self.shield, "POST", &path, json!({ "reason": "leaked" })).ok();
        let keys = answer["revokedKeys"].as_array().unwrap().iter();
        let keys = keys.map(|key| key["keyId"].as_str().unwrap().to_owned()).collect();
        (answer["statusUrl"].as_str().unwrap().to_owned(), keys)
    }
}

/// What an incident says of a CDN.
fn at<'i>(incident: &'i Value, cdn: &str) -> &'i Value {
    incident["cdns"].as_array().unwrap().iter().find(|at| at["cdn"] == cdn).unwrap()
}

fn ids(agent: &AgentHandle) -> BTreeSet<String> {
    agent.stored().into_iter().map(|(id, _)| id).collect()
}

#[test]
fn rotations_go_on_as_policies_say_and_each_cdn_has_all_when_it_is_well_again() {
    let site = Site::start();
    for cdn in ["healthy", "slow", "flapping", "limiting"] {
        site.wait_until(cdn, "in-sync");
    }
    site.wait_until("refusing", "degraded");
    site.slow.slow(TOO_LATE);
    site.wait_until("slow", "degraded");

    // Three of five have what comes.
    site.wait_for_turns("free", 3);
    site.wait_for_turns("usual", 3);
    assert_eq!(site.turns("careful"), 1, "it waits for all");
    check_retry_after(&site.limiting);

    let (incident, revoked) = site.revoke("free");
    wait_at_most(Duration::from_secs(15), "the end at the healthy one", || {
        (at(&site.get(&incident), "healthy")["status"] == "complete").then_some(())
    });
    let open = site.get(&incident);
    assert_eq!((&open["status"], &at(&open, "refusing")["status"]), (&json!("open"), &json!("pending")));
    assert!(at(&open, "refusing")["lastError"].as_str().unwrap().contains("500"), "{open}");
    assert!(ids(&site.healthy.agent).is_disjoint(&revoked));

    site.agents().into_iter().for_each(AgentHandle::heal);
    let complete = wait_at_most(PATIENCE, "the end of the incident", || {
        let incident = site.get(&incident);
        (incident["status"] == "complete").then_some(incident)
    });
    println!("{complete:#}");
    for cdn in ["healthy", "refusing", "slow", "flapping", "limiting"] {
        site.wait_until(cdn, "in-sync");
    }
    site.wait_for_turns("careful", 2);
    // Between two rotations.
    let same = wait_at_most(PATIENCE, "the same keys everywhere, and all of them", || {
        let (wanted, all) = (site.wanted(), site.agents().map(ids));
        all.iter().all(|ids| *ids == wanted).then_some(wanted)
    });
    assert!(same.is_disjoint(&revoked));
    for (stream, _) in STREAMS {
        println!("{stream}: {} turns", site.turns(stream));
    }
    for (agent, name) in site.agents().iter().zip(["healthy", "refusing", "slow", "flapping", "limiting"]) {
        let failed = agent.calls().iter().filter(|call| call.status >= 400).count();
        println!("{name}: {} calls, {failed} failed; {} keys", agent.calls().len(), ids(agent).len());
    }
}

/// Who was told to come later came later.
fn check_retry_after(limiting: &AgentHandle) {
    let calls = limiting.calls();
    let refused = calls.iter().filter(|call| call.status == 429).count();
    println!("limiting: {} calls, {refused} refused", calls.len());
    assert!(refused > 0);
    for two in calls.windows(2).filter(|two| two[0].status == 429) {
        let gap = two[1].at.duration_since(two[0].at);
        assert!(gap >= Duration::from_millis(900), "{gap:?} after {}", two[0].what);
    }
}

#[test]
fn a_purge_that_was_lost_is_found_out_and_repeated() {
    let site = Site::start();
    site.agents()[1..].iter().for_each(|agent| agent.heal());
    site.wait_until("healthy", "in-sync");
    let playlist_url = format!("{}/steady/a.m3u8", site.healthy.edge_url());
    let segment = segments(&playlist_url, &get(&playlist_url).text()).remove(0).url;
    wait_at_most(PATIENCE, "a hit", || (get(&segment).header("x-cache") == Some("HIT")).then_some(()));

    site.healthy.agent.lose_purges();
    let (incident, revoked) = site.revoke("steady");
    let is_under_it = || revoked.contains(get(&segment).header("keyshield-key").unwrap());
    let found = wait_at_most(PATIENCE, "that something is left", || {
        let of = at(&site.get(&incident), "healthy").clone();
        (of["lastError"].is_string() && of["purges"].as_u64() >= Some(3)).then_some(of)
    });
    println!("{found}");
    assert!(found["lastError"].as_str().unwrap().contains("a cache still has"), "{found}");
    assert_eq!(site.get(&incident)["status"], "open");
    assert!(is_under_it(), "it is still there");
    site.healthy.agent.heal();
    wait_at_most(PATIENCE, "the end of the incident", || {
        (site.get(&incident)["status"] == "complete").then_some(())
    });
    println!("{}", at(&site.get(&incident), "healthy"));
    assert!(!is_under_it());
}
