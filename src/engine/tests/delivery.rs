//! Delivery to CDNs that do as a test tells them.

use std::collections::HashMap;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::operators::{id, until};
use super::*;
use crate::cdn::{Cdn, CdnError, CdnFault, CdnLimits, DeliveryMode, KeySeen, NamedCdn, Purge, Rate};
use crate::engine::{PurgeState, SyncState};
use crate::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentSecrets, KeyId, KeyMethod, SealedKey, SyncPolicy, open_at_edge,
};

pub(super) const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A CDN in memory, in push mode.
#[derive(Debug, Default)]
pub(super) struct Fake {
    pub(super) store: Mutex<HashMap<KeyId, SealedKey>>,
    pub(super) calls: Mutex<Vec<String>>,
    pub(super) purges: Mutex<Vec<Purge>>,
    /// Every call fails.
    pub(super) is_away: Mutex<bool>,
    /// Calls of this name are refused.
    pub(super) refused: Mutex<&'static str>,
    /// Who asks for what is cached gets no answer.
    pub(super) looks_hang: Mutex<bool>,
    /// The next purge gets no answer.
    pub(super) purge_hangs: Mutex<bool>,
    /// Puts wait for a ring.
    pub(super) puts_hang: Mutex<Option<Arc<tokio::sync::Notify>>>,
    /// It takes keys, and its answer is lost.
    pub(super) is_mute: Mutex<bool>,
    /// Every key that was ever stored.
    pub(super) ever: Mutex<Vec<KeyId>>,
    /// So many looks at its caches still find something.
    pub(super) still_cached: Mutex<u32>,
}

impl Fake {
    fn call(&self, name: &str) -> Result<(), CdnError> {
        self.calls.lock().push(name.to_owned());
        if *self.refused.lock() == name {
            return Err(CdnError::new(CdnFault::Invalid, format!("{name}: 400")));
        }
        match *self.is_away.lock() {
            true => Err(CdnError::new(CdnFault::Away, format!("{name}: 503"))),
            false => Ok(()),
        }
    }

    pub(super) fn count(&self, name: &str) -> usize {
        self.calls.lock().iter().filter(|call| *call == name).count()
    }

    pub(super) fn has(&self, key: KeyId) -> bool {
        self.store.lock().contains_key(&key)
    }
}

#[async_trait]
impl Cdn for Fake {
    fn limits(&self) -> CdnLimits {
        let rate = Rate { calls: 1_000, per: Duration::from_secs(1) };
        CdnLimits {
            keys_per_call: 3,
            tags_per_purge: 10,
            urls_per_purge: 10,
            writes: rate,
            purges: rate,
            settles_within: Duration::ZERO,
        }
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        self.call("put")?;
        assert!(keys.len() <= 3, "more than the vendor takes");
        let gate = self.puts_hang.lock().clone();
        if let Some(gate) = &gate {
            gate.notified().await;
        }
        self.ever.lock().extend(keys.iter().map(|key| key.key));
        self.store.lock().extend(keys.iter().map(|key| (key.key, key.clone())));
        match *self.is_mute.lock() {
            true => Err(CdnError::new(CdnFault::Away, "put: no answer")),
            false => Ok(()),
        }
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        self.call("delete")?;
        keys.iter().for_each(|key| drop(self.store.lock().remove(key)));
        Ok(())
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        self.call("verify")?;
        Ok(self.store.lock().get(&key).map_or(KeySeen::Missing, shown))
    }

    async fn has_cached(&self, _path: &str, _key: KeyId) -> Result<bool, CdnError> {
        self.call("look")?;
        if *self.looks_hang.lock() {
            std::future::pending::<()>().await;
        }
        let mut left = self.still_cached.lock();
        *left = left.saturating_sub(1);
        Ok(*left > 0)
    }

    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        self.call("purge")?;
        if std::mem::take(&mut *self.purge_hangs.lock()) {
            std::future::pending::<()>().await;
        }
        self.purges.lock().push(purge.clone());
        Ok(())
    }

    async fn health(&self) -> Result<(), CdnError> {
        self.call("health")
    }
}

/// What an edge says of a key; it misses what does not open there.
pub(super) fn shown(sealed: &SealedKey) -> KeySeen {
    let Ok((_, bytes)) = open_at_edge(&SECRET.parse().unwrap(), sealed) else { return KeySeen::Missing };
    let mut random = [0; CONTENT_SECRET_LEN];
    random[..bytes.len()].copy_from_slice(&bytes);
    let content = ContentSecrets::from_random(KeyMethod::Aes128, &random).content;
    KeySeen::Has(CheckValue::of(sealed.key, &content))
}

/// And the secret of their edges.
pub(super) struct Cdns(pub(super) Vec<Arc<Fake>>, pub(super) String);

impl Cdns {
    pub(super) fn new(count: usize) -> Self {
        Self((0..count).map(|_| Arc::default()).collect(), SECRET.to_owned())
    }

    pub(super) fn named(&self) -> Vec<NamedCdn> {
        let named = |(at, fake): (usize, &Arc<Fake>)| NamedCdn {
            name: format!("cdn{at}"),
            kind: "custom",
            mode: DeliveryMode::Push,
            edge: format!("https://cdn{at}.example.com/"),
            secret: self.1.parse().ok(),
            cdn: Arc::clone(fake) as Arc<dyn Cdn>,
        };
        self.0.iter().enumerate().map(named).collect()
    }

    pub(super) async fn node(&self, dir: &Path, clock: Clock, change: impl FnOnce(&mut StreamSpec)) -> Node {
        let kms = Arc::new(LocalKms::open(&dir.join("master.key")).unwrap());
        let mut spec = StreamSpec { cdn_sync_enabled: true, ..spec() };
        change(&mut spec);
        let rest = (Duration::from_millis(20), kms as Arc<dyn Kms>, DekRules::default());
        Node::start_with(dir, clock, rest, self.named(), spec).await
    }
}

impl Node {
    /// The stream's keys by their ordinals.
    pub(super) async fn key_ids(&self) -> Vec<KeyId> {
        let mut keys = self.operator.keys(&id(), None, 100).await.unwrap();
        keys.reverse();
        keys.iter().map(|key| key.id).collect()
    }

    pub(super) async fn in_sync(&self, at: usize) -> bool {
        self.operator.cdns().await.unwrap()[at].state == SyncState::InSync
    }

    pub(super) async fn head(&self) -> u32 {
        self.operator.stream(&id()).await.unwrap().current_key.unwrap().ordinal.0
    }
}

#[tokio::test]
async fn keys_that_wait_are_at_every_edge_before_their_turn() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(2));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await && node.in_sync(1).await).await;
    let keys = node.key_ids().await;
    assert_eq!(keys.len(), 4, "the newest and three that wait");
    for cdn in &cdns.0 {
        assert!(keys.iter().all(|key| cdn.has(*key)));
        assert_eq!(
            (cdn.count("put"), cdn.count("verify")),
            (2, 4),
            "in batches of three, each looked at once"
        );
    }
    let at_cdns = node.operator.key_at_cdns(&id(), keys[3]).await.unwrap();
    let states: Vec<_> = at_cdns.iter().map(|at| (at.endpoint.as_str(), at.state)).collect();
    assert_eq!(states, [("cdn0", SyncState::InSync), ("cdn1", SyncState::InSync)]);
}

#[tokio::test]
async fn a_restart_goes_on_where_it_was_and_delivers_nothing_twice() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    let again = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || again.engine.shared.metrics.cdn_keys.with_label_values(&["cdn0", "verified"]).get() == 4)
        .await;
    // The next key is known to be delivered: the interval promotes it.
    again.published(RENDITION, 100, 103).await;
    again.clock.advance(Duration::from_secs(1_800));
    until(async || again.head().await == 1).await;
    until(async || again.in_sync(0).await).await;
    assert_eq!(cdns.0[0].count("verify"), 5, "four before, and the one that was made since");
}

#[tokio::test]
async fn under_another_secret_all_keys_are_delivered_anew() {
    let (dir, mut cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    cdns.1 = SECRET.replace("00", "77");
    let before = cdns.0[0].store.lock().clone();
    let again = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    let sealed = || cdns.0[0].store.lock().clone();
    until(async || sealed().iter().all(|(key, sealed)| before[key] != *sealed)).await;
    assert_eq!(sealed().len(), again.key_ids().await.len());
}

#[tokio::test]
async fn a_promotion_by_time_waits_for_all_or_for_none_as_the_policy_says() {
    for (policy, waits) in
        [(SyncPolicy::All, true), (SyncPolicy::Quorum, false), (SyncPolicy::BestEffort, false)]
    {
        let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(3));
        *cdns.0[1].is_away.lock() = true;
        let node = cdns.node(dir.path(), Clock::manual(START), |spec| spec.policy.sync_policy = policy).await;
        until(async || node.in_sync(0).await && node.in_sync(2).await).await;
        node.clock.advance(Duration::from_secs(1_800));
        sweeps(&node).await;
        assert_eq!(node.head().await == 0, waits, "{policy:?}");
        if waits {
            node.clock.advance(Duration::from_secs(3_600));
            until(async || node.head().await == 1).await;
        }
    }
}

#[tokio::test]
async fn a_cdn_that_stays_away_is_degraded_and_caught_up_without_holding_up_the_other() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(2));
    *cdns.0[0].is_away.lock() = true;
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(1).await).await;
    until(async || node.operator.cdns().await.unwrap()[0].state == SyncState::Degraded).await;
    let status = node.operator.cdns().await.unwrap().remove(0);
    assert!(status.health.failures >= 3 && status.health.last_error.unwrap().contains("503"));
    until(async || node.engine.problems().iter().any(|problem| problem.starts_with("CDN cdn0: put: 503")))
        .await;
    assert_eq!(node.engine.status().cdn_sync, Some(false));

    *cdns.0[0].is_away.lock() = false;
    until(async || node.in_sync(0).await).await;
    until(async || node.engine.status().cdn_sync == Some(true)).await;
    assert!(node.key_ids().await.iter().all(|key| cdns.0[0].has(*key)));
}

#[tokio::test]
async fn a_key_that_is_destroyed_is_taken_out_of_the_edge() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    let old: KeyId = node.published(RENDITION, 100, 108).await[0].1.parse().unwrap();
    until(async || cdns.0[0].has(old)).await;
    node.published(RENDITION, 120, 128).await;
    until(async || {
        node.published(RENDITION, 120, 128).await;
        node.clock.advance(Duration::from_secs(50));
        !cdns.0[0].has(old)
    })
    .await;
    until(async || node.in_sync(0).await).await;
}

#[tokio::test]
async fn a_key_that_a_cdn_took_without_an_answer_goes_with_its_stream() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    let held = || cdns.0[0].store.lock().len();
    assert_eq!(held(), 4);
    *cdns.0[0].is_mute.lock() = true;
    let brief = StreamSpec {
        id: "ch2".parse().unwrap(),
        playlist_url: "https://origin.example/two/master.m3u8".into(),
        prefix: "/two/".into(),
        playlist_path: "/two/master.m3u8".into(),
        cdn_sync_enabled: true,
        ..spec()
    };
    node.operator.initialize(brief.clone(), "ops").await.unwrap();
    until(async || held() > 4).await;
    let status = node.operator.cdns().await.unwrap().remove(0);
    assert_eq!((status.keys.verified, status.keys.stored), (4, 0), "nobody knows whether it has the others");
    node.operator.delete(&brief.id, "ops").await.unwrap();
    *cdns.0[0].is_mute.lock() = false;
    until(async || held() == 4 && node.in_sync(0).await).await;
}

#[tokio::test]
async fn a_stream_is_delivered_to_the_cdns_that_it_names() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(2));
    let endpoints = ["cdn1.example.com", "https://elsewhere.example.com"].map(str::to_owned);
    let node =
        cdns.node(dir.path(), Clock::manual(START), |spec| spec.cdn_endpoints = endpoints.to_vec()).await;
    until(async || node.in_sync(1).await).await;
    let keys = node.key_ids().await;
    assert!(!cdns.0[0].has(keys[0]) && cdns.0[1].has(keys[0]));
    let states = node.operator.key_at_cdns(&id(), keys[0]).await.unwrap();
    let states: Vec<_> = states.iter().map(|at| (at.endpoint.as_str(), at.state)).collect();
    assert_eq!(
        states,
        [("cdn1", SyncState::InSync), ("https://elsewhere.example.com", SyncState::Unmanaged)]
    );
}

#[tokio::test]
async fn a_revocation_is_complete_when_no_edge_gives_anything_out() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(2));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await && node.in_sync(1).await).await;
    let revoked = node.key_ids().await[0];
    let done = node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap();
    assert_eq!(done.incident.cdns.len(), 2);
    assert!(done.incident.cdns.iter().all(|at| at.state == PurgeState::Pending));

    let incident = async || node.operator.incident(done.incident.id).await.unwrap();
    let are = async |state: PurgeState| incident().await.cdns.iter().all(|at| at.state == state);
    until(async || are(PurgeState::Purged).await).await;
    assert!(cdns.0.iter().all(|cdn| !cdn.has(revoked) && cdn.count("purge") == 1));
    let tags = cdns.0[0].purges.lock()[0].tags.clone();
    assert_eq!(tags, [format!("keyshield-key-{revoked}")]);

    // What was under way is over: purged again, and looked at. One of them still has something.
    *cdns.0[1].still_cached.lock() = 2;
    node.clock.advance(Duration::from_secs(5));
    until(async || incident().await.cdns[0].state == PurgeState::Complete).await;
    until(async || incident().await.cdns[1].last_error.is_some()).await;
    let found = incident().await;
    assert_eq!((found.completed_at, found.cdns[0].purges, found.cdns[1].purges), (None, 2, 2));
    assert!(found.cdns[1].last_error.clone().unwrap().contains("a cache still gives out key"), "{found:?}");
    node.clock.advance(Duration::from_secs(2));
    until(async || incident().await.completed_at.is_some()).await;
    let found = incident().await;
    assert_eq!(
        (found.reason.as_str(), found.revoked_by.as_str(), found.keys),
        ("leaked", "sam", vec![revoked])
    );
    assert_eq!(found.cdns[1].purges, 3);
    assert_eq!(node.operator.incidents(None, 10).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_cdn_that_is_away_purges_when_it_is_back_and_the_other_at_once() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(2));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await && node.in_sync(1).await).await;
    *cdns.0[0].is_away.lock() = true;
    let done = node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap();
    let at = async |at: usize| node.operator.incident(done.incident.id).await.unwrap().cdns.remove(at);
    until(async || at(1).await.state == PurgeState::Purged).await;
    until(async || at(0).await.last_error.is_some_and(|error| error.contains("503"))).await;
    node.clock.advance(Duration::from_secs(5));
    until(async || at(1).await.state == PurgeState::Complete).await;
    *cdns.0[0].is_away.lock() = false;
    until(async || at(0).await.state == PurgeState::Complete).await;
    assert_eq!(at(0).await.purges, 1, "nothing was under way any more");
}
