//! The engine on a real store and a clock that stands still.

mod deks;
mod delivery;
mod limits;
mod operators;
mod policies;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{DekRules, DeliveryRules, Engine, Fleet, Operator, Published, Shown, Stream, StreamSpec, Worker};
use crate::cdn::NamedCdn;
use crate::clock::Clock;
use crate::keys::{
    Boundary, MediaSequenceNumber, Ordinal, PlaylistWindow, Policy, REPORT_INTERVAL, Timestamp,
};
use crate::kms::{Keyring, Kms, LocalKms};
use crate::store::{Location, Store};
use crate::telemetry::Metrics;

const START: Timestamp = Timestamp::from_unix_millis(1_700_000_000_000);
const RENDITION: &str = "/live/720p.m3u8";

struct Node {
    engine: Engine,
    operator: Operator,
    clock: Clock,
    sweeps: tokio::task::JoinHandle<()>,
}

impl Node {
    /// A node on the state in `dir`, sweeping every millisecond of real time.
    async fn start(dir: &Path, clock: Clock) -> Self {
        Self::start_polling(dir, clock, Duration::from_millis(20)).await
    }

    /// As [`Self::start`], asking for changes so often.
    async fn start_polling(dir: &Path, clock: Clock, poll_interval: Duration) -> Self {
        let kms = Arc::new(LocalKms::open(&dir.join("master.key")).unwrap());
        Self::start_on(dir, clock, poll_interval, kms, DekRules::default()).await
    }

    async fn start_on(
        dir: &Path,
        clock: Clock,
        poll_interval: Duration,
        kms: Arc<dyn Kms>,
        rules: DekRules,
    ) -> Self {
        let node = Self::start_with(dir, clock, (poll_interval, kms, rules), Vec::new(), spec());
        node.await
    }

    async fn start_with(
        dir: &Path,
        clock: Clock,
        (poll_interval, kms, rules): (Duration, Arc<dyn Kms>, DekRules),
        cdns: Vec<NamedCdn>,
        spec: StreamSpec,
    ) -> Self {
        let sweep_interval = Duration::from_millis(1);
        Self::start_streams(dir, clock, (poll_interval, kms, rules), cdns, vec![spec], sweep_interval).await
    }

    /// As [`Self::start_with`], with many streams, and sweeping so often.
    async fn start_streams(
        dir: &Path,
        clock: Clock,
        (poll_interval, kms, rules): (Duration, Arc<dyn Kms>, DekRules),
        cdns: Vec<NamedCdn>,
        specs: Vec<StreamSpec>,
        sweep_interval: Duration,
    ) -> Self {
        let (engine, seat) = Engine::new(clock.clone(), Metrics::new());
        let store = Store::open(&Location::Sqlite(dir.join("keyshield.db")), 4).await.unwrap();
        let kms = Arc::new(Keyring::of("local", kms));
        let fleet = Fleet {
            node: hex::encode(&crate::entropy::random::<8>()[..]),
            is_alone: false,
            poll_interval,
            sweep_interval,
            lease: Duration::from_millis(400),
        };
        let worker = Worker::load(seat, store, kms, rules, fleet, (cdns, DeliveryRules::default()), specs)
            .await
            .unwrap();
        let operator = worker.operator();
        let sweeps = tokio::spawn(worker.run());
        Self { engine, operator, clock, sweeps }
    }

    fn stream(&self) -> Arc<Stream> {
        self.engine.stream_at("main", "/live/720p.m3u8").unwrap()
    }

    /// (MSN, key ID) of every segment of a window.
    async fn published(&self, rendition: &str, first: u64, end: u64) -> Vec<(u64, String)> {
        let published = self.publish(rendition, live(first, end), Duration::from_secs(20)).await;
        (first..end)
            .map(|msn| (msn, published.key_at(MediaSequenceNumber(msn)).unwrap().cipher.id.to_string()))
            .collect()
    }

    async fn publish(&self, rendition: &str, window: PlaylistWindow, duration: Duration) -> Published {
        let shown = Shown { window, duration, target_duration: Duration::from_secs(2) };
        self.engine.publish(&self.stream(), rendition, shown).await.unwrap()
    }

    /// Publishes a window again and again until `enough` boundaries are known.
    async fn until_boundaries(&self, enough: usize, first: u64, end: u64) {
        let known = async {
            while self.stream().call(RENDITION, &live(first, end), self.clock.now()).unwrap().have < enough {
                self.published(RENDITION, first, end).await;
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), known).await.expect("the boundary comes");
    }
}

fn spec() -> StreamSpec {
    StreamSpec {
        id: "ch1".parse().unwrap(),
        playlist_url: "https://origin.example/live/master.m3u8".into(),
        origin: "main".into(),
        prefix: "/live/".into(),
        playlist_path: "/live/master.m3u8".into(),
        cdn_endpoints: Vec::new(),
        cdn_sync_enabled: false,
        policy: Policy { segments_per_key: 10, ..Policy::default() },
        request: None,
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
async fn a_promotion_that_was_interrupted_keeps_the_reason_of_its_boundary() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    node.published(RENDITION, 100, 114).await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    // As it is after a kill between the boundary and the promotion of its key.
    let sql = "UPDATE content_keys SET state = 'pre-active', activated_at = NULL, activated_for = NULL,
                                       activated_by = NULL, forced = 0
               WHERE ordinal = 1";
    sqlx::query(sql).execute(&database(dir.path()).await).await.unwrap();
    let again = Node::start(dir.path(), Clock::manual(START)).await;
    sweeps(&again).await;
    let history = again.operator.rotations(&again.stream().id, None, 10).await.unwrap();
    let reasons: Vec<_> = history.iter().map(|key| key.activated_for.clone().unwrap()).collect();
    assert_eq!(reasons, ["count", "start"]);
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
async fn what_was_published_without_the_store_stays_when_a_kill_comes_before_it_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let node = Node::start(dir.path(), clock.clone()).await;
    node.published(RENDITION, 100, 106).await;
    {
        // As it is decided while the store is away.
        let stream = node.stream();
        let mut known = stream.known.write();
        let own = known.renditions.get_mut(RENDITION).unwrap();
        let first = *own.schedule.last().unwrap();
        let by_count = Boundary { ordinal: Ordinal(1), first: MediaSequenceNumber(110), ..first };
        own.schedule = Arc::new(own.schedule.extended(&[by_count]));
    }
    let before = node.published(RENDITION, 105, 114).await;
    assert_eq!(keys(&before), 2);
    // The store is back, and is told what was served before it is given what waits.
    node.clock.advance(REPORT_INTERVAL * 2);
    assert_eq!(node.published(RENDITION, 105, 114).await, before);
    for _ in 0..20 {
        sweeps(&node).await;
    }
    node.sweeps.abort();
    let again = Node::start(dir.path(), clock).await;
    assert_eq!(again.published(RENDITION, 105, 114).await, before);
}

#[tokio::test]
async fn the_rotation_interval_changes_the_key_a_lead_past_the_live_edge() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let mut rotations = node.engine.rotations();
    let before = node.published(RENDITION, 100, 103).await;
    // Watched all the time: a rendition that nobody asks for begins anew.
    for _ in 0..6 {
        node.clock.advance(Duration::from_secs(300));
        assert_eq!(node.published(RENDITION, 100, 103).await, before);
    }
    let rotation = tokio::time::timeout(Duration::from_secs(5), rotations.recv()).await;
    assert_eq!(rotation.expect("a rotation comes").unwrap().ordinal.0, 1);
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
    assert!(node.engine.key(old).await.is_some());
    // Deactivated in one sweep, destroyed when 20 s of playlist, 60 s of CDN and 300 s of grace are over.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
    while node.engine.key(old).await.is_some() {
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
    let published = node.publish(RENDITION, window, hour).await;
    assert_eq!(published.keys().count(), 1_000);
}

#[tokio::test]
async fn an_empty_playlist_calls_for_no_keys() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    for _ in 0..3 {
        let published = node.publish(RENDITION, live(0, 0), Duration::ZERO).await;
        assert_eq!(published.keys().count(), 0);
    }
    assert_eq!(node.stream().call(RENDITION, &live(0, 6), START).unwrap().have, 0);
}

#[tokio::test]
async fn a_recording_is_decryptable_after_a_restart_and_a_long_idle_time() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let node = Node::start(dir.path(), clock.clone()).await;
    let event = PlaylistWindow { keeps_all: true, ..live(0, 45) };
    let show = async |node: &Node| {
        let published = node.publish(RENDITION, event, Duration::from_secs(90)).await;
        (0..45).map(|msn| published.key_at(MediaSequenceNumber(msn)).map(|k| k.cipher.id)).collect::<Vec<_>>()
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
    assert!(node.engine.key(after[0].1.parse().unwrap()).await.is_some());
}

#[tokio::test]
async fn a_stream_that_cannot_be_read_is_known_and_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let other = StreamSpec { id: "ch2".parse().unwrap(), prefix: "/two/".into(), ..spec() };
    node.operator.initialize(other, "ops").await.unwrap();
    node.sweeps.abort();
    let _ = node.sweeps.await;
    let database = database(dir.path()).await;
    let count = async || {
        let row =
            sqlx::query("SELECT count(*) AS keys FROM content_keys").fetch_one(&database).await.unwrap();
        sqlx::Row::get::<i64, _>(&row, "keys")
    };
    let made = count().await;
    let damage = "UPDATE content_keys SET wrapped = zeroblob(80) WHERE stream_id = 'ch2' AND ordinal = 1";
    sqlx::query(damage).execute(&database).await.unwrap();

    let again = Node::start(dir.path(), Clock::manual(START)).await;
    // Its paths are its own: nothing of it may be passed through.
    let damaged = again.engine.stream_at("main", "/two/a.ts").expect("it is known");
    let shown = Shown {
        window: live(0, 6),
        duration: Duration::from_secs(12),
        target_duration: Duration::from_secs(2),
    };
    let refused = again.engine.publish(&damaged, "/two/a.m3u8", shown).await;
    assert_eq!(refused.unwrap_err(), super::EngineError::NotReady);
    assert_eq!(keys(&again.published(RENDITION, 100, 106).await), 1, "the other one is served");
    sweeps(&again).await;
    assert_eq!(count().await, made, "no new keys are made in place of those that cannot be read");
    assert!(again.engine.status().store_up);
    again.operator.delete(&damaged.id, "ops").await.unwrap();
    assert!(again.engine.stream_at("main", "/two/a.ts").is_none());
}

#[tokio::test]
async fn one_stream_that_cannot_be_taken_in_does_not_hold_the_others_up() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let one = Node::start(dir.path(), clock.clone()).await;
    // It asks when it is told to, and does nothing else.
    let two = Node::start(dir.path(), clock).await;
    two.sweeps.abort();
    let core = Arc::clone(&two.operator.core);
    let channel = |id: &str| StreamSpec { id: id.parse().unwrap(), prefix: format!("/{id}/"), ..spec() };
    one.operator.initialize(channel("ch2"), "ops").await.unwrap();
    one.operator.initialize(channel("ch3"), "ops").await.unwrap();
    let database = database(dir.path()).await;
    let whole: Vec<u8> = {
        let row = sqlx::query("SELECT wrapped FROM deks WHERE stream_id = 'ch2'").fetch_one(&database).await;
        sqlx::Row::get(&row.unwrap(), "wrapped")
    };
    let wrap = async |wrapped: &[u8]| {
        let sql = "UPDATE deks SET wrapped = $1 WHERE stream_id = 'ch2'";
        sqlx::query(sql).bind(wrapped.to_vec()).execute(&database).await.unwrap();
    };
    // As if by a master key that this node does not have.
    wrap(&[7; 60]).await;
    let before = core.cursors.lock().changes;
    assert!(core.sync().await.is_err(), "the log says so");
    assert!(two.engine.stream_at("main", "/ch3/a.m3u8").is_some(), "the other one is taken in");
    let (after, retries) = {
        let cursors = core.cursors.lock();
        (cursors.changes, cursors.retries.len())
    };
    assert!(after > before && retries == 1, "it is read on behind it: {before} {after} {retries}");
    core.sync().await.expect("it is left alone for now");
    // A row that this version cannot read at all.
    let moved = ("https://origin.example/ch3/b.m3u8".to_owned(), "/ch3/b.m3u8".to_owned());
    let change = super::StreamChange { playlist: Some(moved), ..super::StreamChange::default() };
    one.operator.update(&"ch3".parse().unwrap(), change, "ops").await.unwrap();
    let sql = "UPDATE streams SET policy = '{}', rev = rev + 1 WHERE id = 'ch2'";
    sqlx::query(sql).execute(&database).await.unwrap();
    assert!(core.sync().await.unwrap_err().to_string().contains("policy"));
    let listed = two.operator.stream(&"ch3".parse().unwrap()).await.unwrap();
    assert_eq!(listed.spec.playlist_path, "/ch3/b.m3u8", "though both are read at once");
    let sql = "UPDATE streams SET rev = rev + 1, policy = (SELECT policy FROM streams WHERE id = 'ch3')
               WHERE id = 'ch2'";
    sqlx::query(sql).execute(&database).await.unwrap();
    wrap(&whole).await;
    let healed = async {
        while core.cursors.lock().retries.len() > 0 {
            let _ = core.sync().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), healed).await.expect("it is tried again");
    let found = two.engine.stream_at("main", "/ch2/a.m3u8").unwrap();
    assert!(found.call("/ch2/a.m3u8", &live(0, 6), START).is_some(), "its keys are there");
}

#[tokio::test]
async fn what_the_store_could_not_be_told_it_is_told_later() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let old = node.published(RENDITION, 100, 108).await[0].1.parse().unwrap();
    node.published(RENDITION, 120, 128).await;
    sweeps(&node).await;

    let database = database(dir.path()).await;
    let run = async |sql: &'static str| sqlx::query(sql).execute(&database).await.map(drop).unwrap();
    run("CREATE TRIGGER refuse BEFORE UPDATE OF last_named_at ON content_keys
         BEGIN SELECT RAISE(ABORT, 'not now'); END")
    .await;
    let at = START.plus(Duration::from_secs(7));
    node.engine.key(old).await.unwrap().named_at(at);
    // Some reports fail.
    tokio::time::sleep(Duration::from_millis(100)).await;
    run("DROP TRIGGER refuse").await;
    let told = async {
        let sql = "SELECT count(*) AS told FROM content_keys WHERE last_named_at = $1";
        let row = async || sqlx::query(sql).bind(at.as_unix_millis()).fetch_one(&database).await.unwrap();
        while sqlx::Row::get::<i64, _>(&row().await, "told") == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), told).await.expect("the store is told");
}

/// The database of the nodes in `dir`, for a test to meddle with.
async fn database(dir: &Path) -> sqlx::AnyPool {
    let url = format!("sqlite://{}", dir.join("keyshield.db").display());
    sqlx::AnyPool::connect(&url).await.unwrap()
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
