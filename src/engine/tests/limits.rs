//! A thousand streams at CDNs that take as many calls as the strictest vendors document, and no more.
//!
//! Time is moved on by the test: the clock, and with it what pauses and rates are measured by. Deliberately absent: the
//! vendors themselves, whose connectors are tested with stubs that count too.

#![expect(clippy::print_stdout, reason = "the figures are what one wants to see")]

use std::collections::HashMap;
use std::time::Instant;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::delivery::{SECRET, shown};
use super::*;
use crate::cdn::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, KeySeen, Purge, Rate};
use crate::engine::SyncState;
use crate::keys::{KeyId, SealedKey, SyncPolicy, belongs_at_edges};

const STREAMS: usize = 1_000;
/// Each has one in use and three that wait.
const KEYS: u64 = 4 * STREAMS as u64;
const HOUR: Duration = Duration::from_secs(3_600);
const ROTATIONS: u64 = 300;
/// Of operators.
const CALLS_AT_ONCE: usize = 20;
/// Machines of tests are slow, and busy with others.
const SOON: Duration = Duration::from_secs(60);

const FASTLY: CdnLimits = CdnLimits {
    keys_per_call: 1_000,
    tags_per_purge: 256,
    urls_per_purge: 1,
    writes: Rate { calls: 1_000, per: HOUR },
    purges: Rate { calls: 1_000, per: HOUR },
    settles_within: Duration::from_secs(30),
};
const CLOUDFLARE: CdnLimits = CdnLimits {
    keys_per_call: 1_000,
    tags_per_purge: 100,
    urls_per_purge: 100,
    writes: Rate { calls: 1_000, per: Duration::from_secs(300) },
    purges: Rate { calls: 5, per: Duration::from_secs(60) },
    settles_within: Duration::from_secs(60),
};

/// Refuses what is beyond its limits, as vendors do.
#[derive(Debug)]
struct Vendor {
    limits: CdnLimits,
    clock: Clock,
    store: Mutex<HashMap<KeyId, SealedKey>>,
    writes: Mutex<Vec<Instant>>,
    purges: Mutex<Vec<Instant>>,
    /// Tags that were purged, however often.
    tags: Mutex<HashMap<String, u32>>,
    beyond: Mutex<Vec<String>>,
}

impl Vendor {
    fn new(limits: CdnLimits, clock: &Clock) -> Arc<Self> {
        Arc::new(Self {
            limits,
            clock: clock.clone(),
            store: Mutex::default(),
            writes: Mutex::default(),
            purges: Mutex::default(),
            tags: Mutex::default(),
            beyond: Mutex::default(),
        })
    }

    /// Counts a call, or refuses it.
    fn count(&self, calls: &Mutex<Vec<Instant>>, rate: Rate, what: &str) -> Result<(), CdnError> {
        let (mut calls, now) = (calls.lock(), self.clock.monotonic());
        calls.push(now);
        let within = calls.iter().rev().take_while(|at| now.duration_since(**at) < rate.per).count();
        if within <= usize::try_from(rate.calls).unwrap() {
            return Ok(());
        }
        self.beyond.lock().push(format!("{what}: {within} calls in {:?}", rate.per));
        Err(CdnError::new(CdnFault::RateLimited, what))
    }

    fn count_write(&self, keys: usize) -> Result<(), CdnError> {
        if keys > self.limits.keys_per_call {
            self.beyond.lock().push(format!("{keys} keys in a call"));
        }
        self.count(&self.writes, self.limits.writes, "write")
    }
}

#[async_trait]
impl Cdn for Vendor {
    fn limits(&self) -> CdnLimits {
        self.limits
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        self.count_write(keys.len())?;
        self.store.lock().extend(keys.iter().map(|key| (key.key, key.clone())));
        Ok(())
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        self.count_write(keys.len())?;
        let mut store = self.store.lock();
        keys.iter().for_each(|key| drop(store.remove(key)));
        Ok(())
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        Ok(self.store.lock().get(&key).map_or(KeySeen::Missing, shown))
    }

    async fn has_cached(&self, _path: &str, key: KeyId) -> Result<bool, CdnError> {
        Ok(!self.tags.lock().contains_key(&format!("keyshield-key-{key}")))
    }

    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        if purge.tags.len() > self.limits.tags_per_purge {
            self.beyond.lock().push(format!("{} tags in a purge", purge.tags.len()));
        }
        self.count(&self.purges, self.limits.purges, "purge")?;
        let mut tags = self.tags.lock();
        purge.tags.iter().for_each(|tag| *tags.entry(tag.clone()).or_default() += 1);
        Ok(())
    }

    async fn health(&self) -> Result<(), CdnError> {
        Ok(())
    }
}

/// Each with a rotation interval of its own, one after the other.
fn specs() -> Vec<StreamSpec> {
    let spec = |n: usize| {
        let rotation_interval = Some(FIRST_ROTATION + BETWEEN_ROTATIONS * u32::try_from(n).unwrap());
        StreamSpec {
            id: format!("s{n:04}").parse().unwrap(),
            prefix: format!("/s{n:04}/"),
            playlist_url: format!("https://origin.example/s{n:04}/master.m3u8"),
            playlist_path: format!("/s{n:04}/master.m3u8"),
            cdn_sync_enabled: true,
            policy: Policy {
                rotation_interval,
                sync_policy: SyncPolicy::All,
                grace_period: Duration::from_secs(60),
                ..spec().policy
            },
            ..spec()
        }
    };
    (0..STREAMS).map(spec).collect()
}

const FIRST_ROTATION: Duration = Duration::from_secs(3_600);
const BETWEEN_ROTATIONS: Duration = Duration::from_secs(4);

async fn start(dir: &Path, vendors: &[Arc<Vendor>], clock: Clock) -> Node {
    let named = |(at, vendor): (usize, &Arc<Vendor>)| NamedCdn {
        name: format!("cdn{at}"),
        kind: "custom",
        mode: DeliveryMode::Push,
        edge: format!("https://cdn{at}.example.com/"),
        secret: SECRET.parse().ok(),
        cdn: Arc::clone(vendor) as Arc<dyn Cdn>,
    };
    let cdns = vendors.iter().enumerate().map(named).collect();
    let kms = Arc::new(LocalKms::open(&dir.join("master.key")).unwrap());
    let rest = (Duration::from_millis(200), kms as Arc<dyn Kms>, DekRules::default());
    Node::start_streams(dir, clock, rest, cdns, specs(), Duration::from_millis(40)).await
}

impl Node {
    async fn are_in_sync(&self, count: usize) -> bool {
        let cdns = self.operator.cdns().await.unwrap();
        assert_eq!(cdns.len(), count);
        cdns.iter().all(|cdn| cdn.state == SyncState::InSync && cdn.keys.verified == KEYS)
    }

    /// How many keys a CDN should have.
    fn wanted(&self) -> usize {
        let directory = self.operator.core.shared.directory.read();
        let of = |stream: &Arc<Stream>| {
            stream.known.read().keys.values().filter(|key| belongs_at_edges(key.life.state)).count()
        };
        directory.iter().map(of).sum()
    }

    fn promotions(&self) -> u64 {
        self.engine.shared.metrics.promotions.with_label_values(&["promotion"]).get()
    }
}

/// Moves time on by steps until `what` holds.
async fn move_until(node: &Node, step: Duration, mut what: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !what().await {
            node.clock.advance(step);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(SOON, holds).await.expect("it comes about");
}

#[tokio::test]
async fn a_thousand_streams_rotate_within_the_limits_of_vendors() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Clock::manual(START));
    let vendors = [FASTLY, CLOUDFLARE].map(|limits| Vendor::new(limits, &clock));
    let node = start(dir.path(), &vendors, clock).await;
    // No time is moved: what was made together is stored together.
    move_until(&node, Duration::ZERO, async || node.are_in_sync(vendors.len()).await).await;
    for vendor in &vendors {
        let writes = vendor.writes.lock().len();
        println!("{writes} calls for {KEYS} keys");
        assert!((4..=12).contains(&writes), "{writes}");
    }
    let at_start = vendors.each_ref().map(|vendor| vendor.writes.lock().len());

    node.clock.advance(FIRST_ROTATION);
    let rotating_from = node.clock.now();
    move_until(&node, BETWEEN_ROTATIONS, async || node.promotions() >= ROTATIONS).await;
    let took = node.clock.now().since(rotating_from);
    // A key is promoted when both have shown it.
    assert!(took < BETWEEN_ROTATIONS * (ROTATIONS as u32 + 20), "none had to wait: {took:?}");
    for (vendor, before) in vendors.iter().zip(at_start) {
        let writes = vendor.writes.lock().len() - before;
        let (there, wanted) = (vendor.store.lock().len(), node.wanted());
        println!("{writes} calls for {ROTATIONS} rotations in {took:?}; {there} keys there of {wanted}");
        assert_eq!(*vendor.beyond.lock(), [""; 0]);
        // Those that wait for the next call to be put there, or to be taken out.
        assert!(there.abs_diff(wanted) < 30, "{there} keys there, {wanted} wanted");
    }
}

#[tokio::test]
async fn a_thousand_streams_are_taken_back_within_the_limits_of_vendors() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Clock::manual(START));
    let vendors = [FASTLY, CLOUDFLARE].map(|limits| Vendor::new(limits, &clock));
    let node = start(dir.path(), &vendors, clock).await;
    move_until(&node, Duration::ZERO, async || node.are_in_sync(vendors.len()).await).await;
    let (revoked_at, started) = (node.clock.now(), Instant::now());
    let mut calls = tokio::task::JoinSet::new();
    for spec in specs() {
        if calls.len() == CALLS_AT_ONCE {
            calls.join_next().await.unwrap().unwrap();
        }
        let operator = node.operator.clone();
        calls.spawn(async move { operator.revoke(&spec.id, None, "leaked", "sam").await.map(drop).unwrap() });
    }
    calls.join_all().await;
    println!("revoked in {:?}", started.elapsed());
    let is_over = async || node.operator.core.store.count_open_incidents().await.unwrap() == 0;
    move_until(&node, Duration::from_secs(1), is_over).await;
    println!("{:?}: over after {:?}", started.elapsed(), node.clock.now().since(revoked_at));
    for vendor in &vendors {
        println!("{} purges, {} writes", vendor.purges.lock().len(), vendor.writes.lock().len());
        assert_eq!(*vendor.beyond.lock(), [""; 0]);
        assert!(vendor.tags.lock().len() >= STREAMS);
    }
    move_until(&node, Duration::from_secs(1), async || node.are_in_sync(vendors.len()).await).await;
    assert!(vendors.iter().all(|vendor| vendor.beyond.lock().is_empty()));
}
