//! The engine on a real store and a clock that stands still.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{Engine, Stream, StreamSettings, Worker};
use crate::clock::Clock;
use crate::keys::{MediaSequenceNumber, PlaylistWindow, Policy, Timestamp};
use crate::kms::LocalKms;
use crate::store::Store;
use crate::telemetry::Metrics;

const START: Timestamp = Timestamp::from_unix_millis(1_700_000_000_000);
const RENDITION: &str = "/live/720p.m3u8";

struct Node {
    engine: Engine,
    clock: Clock,
    sweeps: tokio::task::JoinHandle<()>,
}

impl Node {
    /// A node on the state in `dir`, sweeping every millisecond of real time.
    async fn start(dir: &Path, clock: Clock) -> Self {
        let settings = StreamSettings {
            id: "ch1".parse().unwrap(),
            origin: "main".into(),
            prefix: "/live/".into(),
            policy: Policy { segments_per_key: 10, ..Policy::default() },
        };
        let (engine, seat) = Engine::new(vec![settings], clock.clone(), Metrics::new());
        let store = Store::open(&dir.join("keyshield.db")).await.unwrap();
        let kms = LocalKms::open(&dir.join("master.key")).unwrap();
        let worker = Worker::load(seat, store, &kms).await.unwrap();
        let sweeps = tokio::spawn(worker.run(Duration::from_millis(1)));
        Self { engine, clock, sweeps }
    }

    fn stream(&self) -> Arc<Stream> {
        Arc::clone(self.engine.stream_at("main", "/live/720p.m3u8").unwrap())
    }

    /// (MSN, key ID) of every segment of a window.
    async fn published(&self, rendition: &str, first: u64, end: u64) -> Vec<(u64, String)> {
        let window = live(first, end);
        let published =
            self.engine.publish(&self.stream(), rendition, window, Duration::from_secs(20)).await.unwrap();
        (first..end)
            .map(|msn| (msn, published.key_at(MediaSequenceNumber(msn)).unwrap().id.to_string()))
            .collect()
    }

    /// Publishes a window again and again until `enough` boundaries are known.
    async fn until_boundaries(&self, enough: usize, first: u64, end: u64) {
        let known = async {
            while self.stream().call(RENDITION, &live(first, end)).unwrap().have < enough {
                self.published(RENDITION, first, end).await;
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), known).await.expect("the boundary comes");
    }

    async fn next_rotation(&self) -> u32 {
        let mut rotations = self.engine.rotations();
        let rotation = tokio::time::timeout(Duration::from_secs(5), rotations.recv()).await;
        rotation.expect("a rotation comes").unwrap().ordinal.0
    }
}

fn live(first: u64, end: u64) -> PlaylistWindow {
    let (first, end) = (MediaSequenceNumber(first), MediaSequenceNumber(end));
    PlaylistWindow { first, end, ended: false, keeps_all: false }
}

/// How many keys a published window shows.
fn keys(published: &[(u64, String)]) -> usize {
    published.chunk_by(|a, b| a.1 == b.1).count()
}

#[tokio::test]
async fn a_count_of_segments_changes_the_key_and_what_was_published_stays() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let first = node.published(RENDITION, 100, 108).await;
    assert_eq!(keys(&first), 1);
    let second = node.published(RENDITION, 106, 114).await;
    assert_eq!(keys(&second), 2);
    assert_eq!(second[..2], first[6..], "segments 106 and 107 keep their key");
    assert_ne!(second[3].1, second[4].1, "the boundary lies at 100 + 10");
}

#[tokio::test]
async fn renditions_change_their_key_at_the_same_number() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let video = node.published(RENDITION, 100, 114).await;
    let audio = node.published("/live/audio.m3u8", 104, 116).await;
    assert_eq!(video[4..14], audio[..10]);
}

#[tokio::test]
async fn after_a_kill_and_a_restart_the_same_keys_are_published() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let before = node.published(RENDITION, 100, 125).await;
    // No orderly end: the task is dropped where it stands.
    node.sweeps.abort();
    let again = Node::start(dir.path(), Clock::manual(START)).await;
    assert_eq!(again.published(RENDITION, 100, 125).await, before);
}

#[tokio::test]
async fn the_rotation_interval_changes_the_key_a_lead_past_the_live_edge() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let before = node.published(RENDITION, 100, 103).await;
    node.clock.advance(Duration::from_secs(1800));
    assert_eq!(node.next_rotation().await, 1);
    let at_once = node.published(RENDITION, 100, 103).await;
    assert_eq!(at_once, before, "what is published does not change");
    node.until_boundaries(2, 100, 103).await;
    let after = node.published(RENDITION, 100, 108).await;
    assert_eq!(keys(&after), 2);
    assert_ne!(after[4].1, after[5].1, "two segments past the edge at 103");
}

#[tokio::test]
async fn two_nodes_on_one_store_agree() {
    let dir = tempfile::tempdir().unwrap();
    let one = Node::start(dir.path(), Clock::manual(START)).await;
    let from_one = one.published(RENDITION, 100, 125).await;
    let two = Node::start(dir.path(), Clock::manual(START)).await;
    assert_eq!(two.published(RENDITION, 100, 125).await, from_one);
    // One goes on; the other plans the same boundary, loses, and takes the winner's.
    let from_one = one.published(RENDITION, 118, 134).await;
    assert_eq!(two.published(RENDITION, 118, 134).await, from_one);
}

#[tokio::test]
async fn a_jump_back_is_one_epoch_for_all_who_see_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let before = node.published(RENDITION, 5000, 5008).await;
    let (one, two) = tokio::join!(node.published(RENDITION, 0, 6), node.published(RENDITION, 0, 6));
    assert_eq!(one, two);
    assert_ne!(one[0].1, before[0].1, "the new epoch has a key of its own");
    assert_eq!(node.published(RENDITION, 0, 6).await, one);
}

#[tokio::test]
async fn old_keys_are_destroyed_and_no_longer_found() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let old = node.published(RENDITION, 100, 108).await[0].1.parse().unwrap();
    node.published(RENDITION, 120, 128).await;
    assert!(node.engine.key(old).is_some());
    // Deactivated in one sweep, destroyed when 20 s of playlist, 60 s of CDN and 300 s of grace are over.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    while node.engine.key(old).is_some() {
        node.published(RENDITION, 120, 128).await;
        node.clock.advance(Duration::from_secs(50));
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(tokio::time::Instant::now() < deadline, "the key was never destroyed");
    }
}

#[tokio::test]
async fn a_long_vod_gets_all_its_keys_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let window = PlaylistWindow { ended: true, keeps_all: true, ..live(0, 10_000) };
    let hour = Duration::from_secs(3_600);
    let published = node.engine.publish(&node.stream(), RENDITION, window, hour).await.unwrap();
    assert_eq!(published.keys().count(), 1_000);
}

#[tokio::test]
async fn an_empty_playlist_calls_for_no_keys() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    for _ in 0..3 {
        let second = Duration::ZERO;
        let published = node.engine.publish(&node.stream(), RENDITION, live(0, 0), second).await.unwrap();
        assert_eq!(published.keys().count(), 0);
    }
    assert_eq!(node.stream().call(RENDITION, &live(0, 6)).unwrap().have, 0);
}

#[tokio::test]
async fn a_recording_is_decryptable_after_a_restart_and_a_long_idle_time() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let node = Node::start(dir.path(), clock.clone()).await;
    let event = PlaylistWindow { keeps_all: true, ..live(0, 45) };
    let show = |node: &Node| {
        let (engine, stream) = (node.engine.clone(), node.stream());
        async move {
            let published = engine.publish(&stream, RENDITION, event, Duration::from_secs(90)).await.unwrap();
            (0..45).map(|msn| published.key_at(MediaSequenceNumber(msn)).map(|k| k.id)).collect::<Vec<_>>()
        }
    };
    let before = show(&node).await;
    assert!(before.iter().all(Option::is_some));
    sweeps(&node).await;
    node.sweeps.abort();

    let node = Node::start(dir.path(), clock).await;
    for _ in 0..20 {
        node.clock.advance(Duration::from_secs(600));
        sweeps(&node).await;
    }
    assert_eq!(show(&node).await, before);
}

#[tokio::test]
async fn a_channel_that_nobody_watched_for_hours_plays_at_once_under_living_keys() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let before = node.published(RENDITION, 100, 106).await;
    for _ in 0..20 {
        node.clock.advance(Duration::from_secs(1800));
        sweeps(&node).await;
    }
    // Within the old crypto period by its numbers, whose key is long destroyed.
    let after = node.published(RENDITION, 103, 109).await;
    assert_eq!(keys(&after), 1);
    assert_ne!(after[0].1, before[0].1);
    assert!(node.engine.key(after[0].1.parse().unwrap()).is_some());
}

/// Waits for two whole sweeps: one that began before may not have seen what a test did.
async fn sweeps(node: &Node) {
    for _ in 0..2 {
        let seen = node.engine.shared.metrics.sweep_seconds.get_sample_count();
        let next = async {
            while node.engine.shared.metrics.sweep_seconds.get_sample_count() == seen {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), next).await.expect("sweeps go on");
    }
}
