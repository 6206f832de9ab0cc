//! The shield as it is meant to stand: two nodes on one PostgreSQL behind two CDNs of an operator's own, and viewers who
//! play through the CDNs while time rotates the keys.
//!
//! One CDN is varnish, which tells objects apart by their query, the other nginx, which does not. Half of the viewers play
//! through either: hls.js in Chromium and ffmpeg, which has to decode every picture.
//!
//! Deliberately absent: who publishes what, which is the fleet's own test.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::caches::{Nginx, Varnish};
use crate::fleet::{Fleet, Player, ROTATION_INTERVAL, Store};
use crate::fleet_origin::Media;
use crate::harness::{fetch_segments, free_port, get, pause, repository, secs_from};
use crate::postgres::Postgres;

/// Viewers by ffmpeg at either CDN; the stream with a limit of segments and one without are among theirs.
const FFMPEGS: usize = 3;
/// Pages of hls.js at either CDN.
const PAGES: usize = 2;
/// Of what a page should have shown. Browsers take their time to start.
const PLAYED_AT_LEAST: f64 = 0.75;

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
