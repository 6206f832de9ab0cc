//! The shield as it is meant to stand: two nodes on one PostgreSQL behind two CDNs of an operator's own, and viewers who
//! play through the CDNs while time rotates the keys, and while a key that leaked is taken back.
//!
//! One CDN is varnish, which tells objects apart by their query, the other nginx, which does not. Half of the viewers play
//! through either: hls.js in Chromium and ffmpeg, which has to decode every picture.
//!
//! Deliberately absent: who publishes what, which is the fleet's own test.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::caches::{Nginx, Varnish};
use super::witness::Witness;
use crate::control_api::{call, call_at, tokens};
use crate::fleet::{Fleet, Player, ROTATION_INTERVAL, Store};
use crate::fleet_origin::Media;
use crate::harness::{fetch_segments, free_port, get, pause, repository, secs_from, wait_at_most, wait_for};
use crate::postgres::Postgres;

/// Viewers by ffmpeg at either CDN; the stream with a limit of segments and one without are among theirs.
const FFMPEGS: usize = 3;
/// Pages of hls.js at either CDN.
const PAGES: usize = 2;
/// Of what a page should have shown. Browsers take their time to start.
const PLAYED_AT_LEAST: f64 = 0.75;

/// Who comes when all is over.
const NEWCOMER_PLAYS: Duration = Duration::from_secs(8);

/// Two nodes with a CDN before each other's.
pub struct Whole {
    // Before what stands behind them.
    pub varnish: Varnish,
    pub nginx: Nginx,
    pub fleet: Fleet,
    _postgres: Arc<Postgres>,
}

impl Whole {
    /// With an origin that lasts for `duration`. What the nodes' configuration says of the CDNs, in tables of its own, is
    /// made when they are there.
    pub fn start(streams: usize, duration: Duration, cdns: impl FnOnce(&Varnish, &Nginx) -> String) -> Self {
        let postgres = Postgres::shared();
        let store = Store::Postgres(postgres.database());
        // The CDNs are there first: nodes find them at their start.
        let ports = [free_port(), free_port()];
        let nodes = ports.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let (varnish, nginx) = (Varnish::start(&nodes), Nginx::start(&nodes));
        let fleet = Fleet::start_at(&ports, streams, &store, duration, &cdns(&varnish, &nginx));
        Self { varnish, nginx, fleet, _postgres: postgres }
    }

    fn edges(&self) -> [String; 2] {
        [self.varnish.edge_url(), self.nginx.edge_url()]
    }
}

/// Ten of them, playing.
pub struct Viewers {
    ffmpegs: Vec<Player>,
    pages: Vec<Pages>,
}

impl Viewers {
    /// For `duration`, at both CDNs.
    pub fn start(whole: &Whole, duration: Duration) -> Self {
        let edges = whole.edges();
        let url = |edge: &String, stream| format!("{edge}{}", Media::master_path(stream));
        let pages = edges.iter().map(|edge| Pages::start(&url(edge, 0), duration)).collect();
        let ffmpegs = edges
            .iter()
            .flat_map(|edge| (0..FFMPEGS).map(move |stream| Player::start(&url(edge, stream), duration)));
        Self { ffmpegs: ffmpegs.collect(), pages }
    }

    /// Nobody may have seen a fatal error, or have lost a picture that ffmpeg should have had.
    pub fn finish(self, duration: Duration) {
        for report in self.pages.into_iter().flat_map(Pages::finish) {
            println!("{report}");
            assert_eq!(
                (&report["fatalErrors"], &report["decryptErrors"]),
                (&0.into(), &0.into()),
                "{report}"
            );
            let least = duration.as_secs_f64() * PLAYED_AT_LEAST;
            assert!(report["played"].as_f64().unwrap() >= least, "the playhead moves: {report}");
        }
        self.ffmpegs.into_iter().for_each(Player::finish);
    }
}

/// Pages of one browser, all on one stream.
struct Pages(Child);

impl Pages {
    fn start(url: &str, duration: Duration) -> Self {
        let mut command = Command::new("node");
        command.arg(repository("tests/players/chromium.mjs"));
        command.args(["--url", url, "--seconds", &duration.as_secs().to_string()]);
        command.args(["--player", "hlsjs"].repeat(PAGES));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self(child.expect("node is installed"))
    }

    /// What each page saw. The runner ends by itself, in bounded time.
    fn finish(self) -> Vec<Value> {
        let output = self.0.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let reports: Vec<_> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(reports.len(), PAGES);
        reports
    }
}

/// A segment that viewers had comes from the cache.
fn check_it_is_cached(edge: &str) {
    let segments = fetch_segments(&format!("{edge}{}", Media::playlist_path(0, 0)));
    let answer = get(&segments[0].url);
    assert_eq!((answer.status, answer.header("x-cache")), (200, Some("HIT")), "{}", segments[0].url);
}

#[test]
fn ten_viewers_play_through_two_cdns_over_rotations() {
    let duration = secs_from("WHOLE_SECS", 40);
    let whole = Whole::start(FFMPEGS, duration + Duration::from_secs(20), |_, _| String::new());
    let before = whole.fleet.rotated();
    let viewers = Viewers::start(&whole, duration);
    pause(duration);
    for edge in whole.edges() {
        check_it_is_cached(&edge);
    }
    viewers.finish(duration);

    let rotated = whole.fleet.rotated() - before;
    let intervals = duration.as_secs() / ROTATION_INTERVAL.as_secs();
    println!("{rotated} rotations in {duration:?}");
    assert!(rotated >= (intervals * FFMPEGS as u64) as f64, "{rotated}");
}

/// Both, as CDNs of the shield's own configuration, and who may call it.
fn connected(varnish: &Varnish, nginx: &Nginx) -> String {
    let cdn = |name: &str, edge_url: String, api_url: String| {
        format!(
            "[[cdns]]\nname = \"{name}\"\nkind = \"custom\"\nedge_url = \"{edge_url}\"\n\
             [cdns.custom]\napi_url = \"{api_url}\"\n"
        )
    };
    let token = format!("[cdn]\ncustom_token = \"{}\"\n", varnish.token());
    let varnish = cdn("varnish", varnish.edge_url(), varnish.agent_url());
    token + &varnish + &cdn("nginx", nginx.edge_url(), nginx.agent_url()) + &tokens()
}

/// The answer to a revocation may take so long, and all that follows.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
const COMPLETE_WITHIN: Duration = Duration::from_secs(60);

/// Takes back every key of the first stream, by a call of a node that does not deliver, and gives their IDs when all CDNs
/// are said to have let go of them.
fn revoke(whole: &Whole) -> BTreeSet<String> {
    let called = &whole.fleet.nodes[1];
    let started = Instant::now();
    let answer = call(called, "POST", "/s00/emergency-revoke", json!({ "reason": "found on a forum" })).ok();
    let answered = started.elapsed();
    assert!(answered < ANSWERED_WITHIN, "{answered:?}");
    let ids = answer["revokedKeys"].as_array().unwrap().iter().map(|key| key["keyId"].as_str().unwrap());
    let revoked: BTreeSet<String> = ids.map(str::to_owned).collect();
    println!("answered in {} ms, {} keys", answered.as_millis(), revoked.len());

    let is_gone = |at: &str| revoked.iter().all(|key| get(&format!("{at}/api/hls/keys/{key}")).status == 410);
    assert!(is_gone(&called.url), "at the node that answered");
    for at in [&whole.fleet.nodes[0].url].into_iter().chain(&whole.edges()) {
        wait_for("410", || is_gone(at).then_some(()));
        println!("410 at {at} after {} ms", started.elapsed().as_millis());
    }
    let status_url = answer["statusUrl"].as_str().unwrap();
    let mut done = BTreeSet::new();
    wait_at_most(COMPLETE_WITHIN, "the end of the incident", || {
        let incident = call_at("admin", called, "GET", status_url, &Value::Null).ok();
        for cdn in incident["cdns"].as_array().unwrap().iter().filter(|cdn| cdn["status"] == "complete") {
            if done.insert(cdn["cdn"].to_string()) {
                println!("{} has let go after {:.1} s: {cdn}", cdn["cdn"], started.elapsed().as_secs_f64());
            }
        }
        (incident["status"] == "complete").then_some(())
    });
    println!("complete after {:.1} s", started.elapsed().as_secs_f64());
    revoked
}

#[test]
fn a_leaked_key_is_taken_back_at_two_cdns_while_ten_viewers_play() {
    let duration = secs_from("WHOLE_SECS", 50);
    let whole = Whole::start(FFMPEGS, duration + Duration::from_secs(30), connected);
    let witness = Witness::new(&whole.edges(), 0, &whole.fleet.origin.media);
    let viewers = Viewers::start(&whole, duration);
    let revoked = witness.during(|| {
        // Caches have what is played, and browsers have started.
        pause(duration / 2);
        whole.edges().iter().for_each(|edge| check_it_is_cached(edge));
        revoke(&whole)
    });
    witness.check_playlists(&revoked);
    for (edge, given) in whole.edges().iter().zip(witness.check_nothing_is_left(&revoked)) {
        println!("{edge}: {given:?}");
        assert!(given.hits >= given.answers / 4 && given.decrypted > 0, "{given:?}");
    }
    witness.check_playlists(&revoked);
    // Behind the witness, who asks for all there is: on few cores they would come too late for what they join at.
    let newcomers: Vec<_> = whole
        .edges()
        .iter()
        .map(|edge| Player::start(&format!("{edge}{}", Media::master_path(0)), NEWCOMER_PLAYS))
        .collect();
    newcomers.into_iter().for_each(Player::finish);
    viewers.finish(duration);
}
