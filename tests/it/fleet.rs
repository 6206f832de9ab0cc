//! Several nodes on one store behind a load balancer that keeps nobody with one of them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::fleet_origin::{FRAMES_PER_SEC, FleetOrigin, Media, RENDITIONS};
use crate::harness::{Running, SOON, free_port, get, pause, secs_from};
use crate::nginx::Nginx;
use crate::postgres::Postgres;
use crate::watch::{Totals, Watch};

/// How long a lease holds its holder, in fleets of tests.
pub const LEASE: Duration = Duration::from_secs(3);
/// Time triggers a rotation this often, in all streams.
pub const ROTATION_INTERVAL: Duration = Duration::from_secs(12);
/// In every other stream a key is for so many segments at most.
const SEGMENTS_PER_KEY: usize = 10;

/// Where the nodes of a fleet have their state.
pub enum Store {
    /// A file: for one node.
    Sqlite,
    /// A database's URL.
    Postgres(String),
}

/// Nodes, what they stand before and what stands before them.
pub struct Fleet {
    pub nginx: Nginx,
    pub nodes: Vec<Running>,
    pub origin: FleetOrigin,
    streams: usize,
    /// The master key, and with SQLite the database.
    _shared: TempDir,
}

impl Fleet {
    /// So many nodes for so many streams, whose origin lasts for `duration`.
    pub fn start(nodes: usize, streams: usize, store: &Store, duration: Duration) -> Self {
        let ports: Vec<u16> = (0..nodes).map(|_| free_port()).collect();
        Self::start_at(&ports, streams, store, duration, "")
    }

    /// As [`Self::start`], on ports that were known before, and with more in the configuration, in tables of its own.
    pub fn start_at(ports: &[u16], streams: usize, store: &Store, duration: Duration, more: &str) -> Self {
        let shared = tempfile::tempdir().unwrap();
        let origin = FleetOrigin::start(streams, duration);
        let config = configuration(&shared, store, &origin, streams) + more;
        // One after the other: the first one makes the master key.
        let node = |port: &u16| Running::serve_at(*port, tempfile::tempdir().unwrap(), &config);
        let nodes: Vec<_> = ports.iter().map(node).collect();
        let nginx = Nginx::before(&nodes.iter().map(|node| node.url.as_str()).collect::<Vec<_>>());
        Self { nginx, nodes, origin, streams, _shared: shared }
    }

    /// Looks at all nodes, and takes keys through the load balancer. One that is alone must publish the same when
    /// it is asked directly and through the load balancer.
    pub fn watch(&self) -> Watch {
        let mut nodes: Vec<_> = self.nodes.iter().map(|node| node.url.clone()).collect();
        if nodes.len() == 1 {
            nodes.push(self.nginx.url.clone());
        }
        Watch::new(nodes, self.nginx.url.clone(), &self.origin.media, self.streams)
    }

    /// Looks at one of the nodes, and at nothing else.
    pub fn watch_one(&self, node: &Running) -> Watch {
        Watch::new(vec![node.url.clone()], node.url.clone(), &self.origin.media, self.streams)
    }

    /// How many keys the nodes promoted.
    pub fn rotated(&self) -> f64 {
        self.rotations().values().sum()
    }

    /// As [`Self::rotated`], by reason.
    pub fn rotations(&self) -> BTreeMap<String, f64> {
        let mut rotations = BTreeMap::new();
        for node in &self.nodes {
            let text = get(&format!("{}/metrics", node.control)).text();
            for line in text.lines() {
                let Some(rest) = line.strip_prefix("keyshield_key_promotions_total{") else { continue };
                let (labels, count) = rest.rsplit_once(' ').unwrap();
                let reason = labels.split('"').nth(1).unwrap();
                *rotations.entry(reason.to_owned()).or_default() += count.parse::<f64>().unwrap();
            }
        }
        rotations
    }

    /// Starts a player of a stream, through the load balancer.
    pub fn play(&self, stream: usize, duration: Duration) -> Player {
        Player::start(&self.nginx.at(&Media::master_path(stream)), duration)
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                let logged = node.logged();
                let lines: Vec<_> = logged.lines().collect();
                eprintln!(
                    "{} logged last:\n{}",
                    node.url,
                    lines[lines.len().saturating_sub(20)..].join("\n")
                );
            }
        }
    }
}

fn configuration(shared: &TempDir, store: &Store, origin: &FleetOrigin, streams: usize) -> String {
    let (shared, url) = (shared.path().display(), origin.url());
    let store = match store {
        Store::Sqlite => format!("database = \"{shared}/keyshield.db\"\n"),
        Store::Postgres(url) => {
            let lease = LEASE.as_secs();
            format!("database = \"{url}\"\npoll_interval_millis = 200\nlease_secs = {lease}\n")
        }
    };
    let minutes = ROTATION_INTERVAL.as_secs_f64() / 60.0;
    let mut config = format!(
        "[store]\n{store}[kms]\nmaster_key_file = \"{shared}/keyshield.master\"\n\
         [keys]\nsweep_interval_millis = 250\n\
         [policy]\nrotation_interval_minutes = {minutes}\nlead_segments = 3\n\
         grace_period_secs = 20\ncdn_ttl_secs = 5\n\
         [[origins]]\nname = \"live\"\nurls = [\"{url}\"]\n"
    );
    for stream in 0..streams {
        let playlist = Media::master_path(stream);
        config.push_str(&format!("[[streams]]\nid = \"s{stream:02}\"\nplaylist_url = \"{url}{playlist}\"\n"));
        if stream % 2 == 0 {
            config.push_str(&format!("[streams.policy]\nsegments_per_key = {SEGMENTS_PER_KEY}\n"));
        }
    }
    config
}

/// ffmpeg, decoding what it is given for some time.
pub struct Player {
    ffmpeg: Child,
    url: String,
    started: Instant,
    duration: Duration,
    progress: File,
    said: File,
}

impl Player {
    /// Starts one on a Multivariant Playlist.
    pub fn start(url: &str, duration: Duration) -> Self {
        // Files, because nobody empties a pipe meanwhile.
        let (progress, said) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let ffmpeg = Command::new("ffmpeg")
            .args(["-hide_banner", "-nostdin", "-v", "error", "-progress", "pipe:1", "-i", url])
            .args(["-t", &duration.as_secs().to_string(), "-f", "null", "-"])
            .stdin(Stdio::null())
            .stdout(progress.try_clone().unwrap())
            .stderr(said.try_clone().unwrap())
            .spawn()
            .expect("ffmpeg is installed");
        Self { ffmpeg, url: url.to_owned(), started: Instant::now(), duration, progress, said }
    }

    /// It must come to its end in time, have decoded every picture until then, and have had nothing to say.
    pub fn finish(mut self) {
        let mut ended = None;
        while ended.is_none() && self.started.elapsed() < self.duration + SOON {
            pause(Duration::from_millis(50));
            ended = self.ffmpeg.try_wait().unwrap();
        }
        let (said, progress) = (read_from_start(&mut self.said), read_from_start(&mut self.progress));
        assert!(
            ended.is_some_and(|status| status.success()) && said.is_empty(),
            "{}: {ended:?} {said}",
            self.url
        );
        let last = |name: &str| progress.lines().filter_map(|line| line.strip_prefix(name)).next_back();
        let frames = last("frame=").and_then(|frames| frames.trim().parse::<u64>().ok());
        // When playlists stop coming, it ends in silence and with success: only the pictures tell.
        assert_eq!(frames, Some(self.duration.as_secs() * FRAMES_PER_SEC), "{}: {progress}", self.url);
    }
}

fn read_from_start(file: &mut File) -> String {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

impl Drop for Player {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.ffmpeg.kill();
        let _ = self.ffmpeg.wait();
    }
}

/// Watches a fleet of so many nodes for some time, while ffmpeg plays three of its streams.
fn check_fleet(nodes: usize, store: &Store, duration: Duration) {
    const STREAMS: usize = 20;
    let fleet = Fleet::start(nodes, STREAMS, store, duration);
    let watch = fleet.watch();
    watch.during(|| {
        // The first of them with a limit of segments, the second without.
        let players: Vec<_> = [0, 1, 14].map(|stream| fleet.play(stream, duration)).into();
        watch.pause(duration);
        if !watch.has_failed() {
            players.into_iter().for_each(Player::finish);
        }
    });

    let (totals, rotations) = (&watch.totals, fleet.rotations());
    println!("{nodes} nodes for {duration:?}: {totals:?}, rotations: {rotations:?}");
    let segments = RENDITIONS.len() * STREAMS * usize::try_from(duration.as_secs()).unwrap();
    // The first window is longer than starting and stopping takes; and who looks has left none out.
    assert!(Totals::count(&totals.covered) >= segments, "of {segments}");
    assert!(Totals::count(&totals.decrypted) >= Totals::count(&totals.covered));
    // A slow machine may see the two at different states of the origin now and then, but not most of the time.
    assert!(Totals::count(&totals.compared) >= segments / 2, "of {segments}");
    let intervals = duration.as_secs() / ROTATION_INTERVAL.as_secs();
    let keys = STREAMS * usize::try_from(intervals).unwrap();
    assert!(Totals::count(&totals.keys) >= keys, "at least {keys}");
}

#[test]
fn two_nodes_behind_a_round_robin_publish_the_same_and_everything_decrypts() {
    let postgres = Postgres::shared();
    let duration = secs_from("FLEET_SECS", 60);
    check_fleet(2, &Store::Postgres(postgres.database()), duration);
}

#[test]
fn one_node_behind_a_round_robin_publishes_twenty_streams_that_decrypt_and_play() {
    check_fleet(1, &Store::Sqlite, Duration::from_secs(25));
}
