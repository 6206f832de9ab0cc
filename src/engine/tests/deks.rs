//! Data encryption keys: unwrapped for a time, away with their KMS, renewed.

use async_trait::async_trait;
use parking_lot::Mutex;

use super::operators::{channel, id, until};
use super::*;
use crate::engine::OperatorError;
use crate::keys::{Context, DataEncryptionKey, KeyState};
use crate::kms::{Cause, KeyDescription, KmsError, WrappedKey};

/// The master key file's, as if it were far away: its calls are counted, and it can be cut off.
#[derive(Debug)]
struct Remote {
    kms: LocalKms,
    is_up: Mutex<bool>,
    unwraps: Mutex<u64>,
}

impl Remote {
    fn open(dir: &Path) -> Arc<Self> {
        let kms = LocalKms::open(&dir.join("master.key")).unwrap();
        Arc::new(Self { kms, is_up: Mutex::new(true), unwraps: Mutex::new(0) })
    }

    fn set(&self, is_up: bool) {
        *self.is_up.lock() = is_up;
    }

    fn unwraps(&self) -> u64 {
        *self.unwraps.lock()
    }

    fn reach(&self) -> Result<(), KmsError> {
        let away = || KmsError {
            provider: "test",
            key: "far/away".into(),
            cause: Cause::Unavailable("cut off".into()),
        };
        if *self.is_up.lock() { Ok(()) } else { Err(away()) }
    }
}

#[async_trait]
impl Kms for Remote {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        self.reach()?;
        self.kms.generate_data_key(context).await
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.reach()?;
        self.kms.wrap(context, key).await
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        self.reach()?;
        *self.unwraps.lock() += 1;
        self.kms.unwrap(context, wrapped).await
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.reach()?;
        self.kms.describe().await
    }
}

const TTL: Duration = Duration::from_secs(3_600);
const MINUTE: Duration = Duration::from_secs(60);

async fn start(dir: &Path, clock: &Clock, kms: &Arc<Remote>) -> Node {
    let rules = DekRules { unwrapped_ttl: TTL, ..DekRules::default() };
    let kms = Arc::clone(kms) as Arc<dyn Kms>;
    Node::start_on(dir, clock.clone(), Duration::from_millis(20), kms, rules).await
}

/// How many DEKs are unwrapped.
fn held(node: &Node) -> i64 {
    node.engine.shared.metrics.deks_unwrapped.get()
}

/// Until the engine knows how the KMS is.
async fn noticed(node: &Node, is_up: bool) {
    until(async || node.engine.status().kms_up == is_up).await;
}

async fn versions(dir: &Path) -> Vec<(i64, bool)> {
    let rows = sqlx::query("SELECT version, length(wrapped) AS length FROM deks ORDER BY version")
        .fetch_all(&database(dir).await)
        .await
        .unwrap();
    let get = |row: &sqlx::any::AnyRow, name: &str| sqlx::Row::get::<i64, _>(row, name);
    rows.iter().map(|row| (get(row, "version"), get(row, "length") > 0)).collect()
}

#[tokio::test]
async fn a_dek_is_unwrapped_once_at_the_start_and_again_only_when_a_key_is_to_be_made() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    // By count alone: an hour of nobody watching would have time promote a key, or not yet.
    let start = async || {
        let mut by_count = spec();
        by_count.policy.rotation_interval = None;
        let rules = DekRules { unwrapped_ttl: TTL, ..DekRules::default() };
        let kms = Arc::clone(&kms) as Arc<dyn Kms>;
        let rest = (Duration::from_millis(20), kms, rules);
        Node::start_with(dir.path(), clock.clone(), rest, Vec::new(), by_count).await
    };
    let first = start().await;
    for end in (106..190).step_by(6) {
        first.published(RENDITION, end - 6, end).await;
    }
    assert_eq!(kms.unwraps(), 0, "it was made here, and none is made for a content key");
    first.sweeps.abort();
    let _ = first.sweeps.await;

    let node = start().await;
    sweeps(&node).await;
    assert_eq!((kms.unwraps(), held(&node)), (1, 1));
    let before = node.published(RENDITION, 184, 190).await;
    // Nothing is due, and nothing is unwrapped for it.
    clock.advance(TTL);
    until(async || held(&node) == 0 || kms.unwraps() == 2).await;
    assert_eq!(node.published(RENDITION, 184, 190).await, before, "what plays goes on");
    for end in (196..250).step_by(6) {
        node.published(RENDITION, end - 6, end).await;
        sweeps(&node).await;
    }
    until(async || node.stream().known.read().waiting() == 3).await;
    assert_eq!(kms.unwraps(), 2, "once for all the keys that were made");
}

#[tokio::test]
async fn without_the_kms_keys_that_wait_are_used_up_then_the_last_stays_and_then_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    let node = start(dir.path(), &clock, &kms).await;
    kms.set(false);
    noticed(&node, false).await;
    assert!(node.engine.problems()[0].contains("far/away: cut off"), "{:?}", node.engine.problems());
    clock.advance(TTL);
    until(async || held(&node) == 0).await;

    // Ten minutes at six segments a minute, each window published twice.
    let mut shown = node.published(RENDITION, 100, 106).await;
    sweeps(&node).await;
    let waiting = node.stream().known.read().waiting();
    for end in 107..=166 {
        clock.advance(Duration::from_secs(10));
        let published = node.published(RENDITION, end - 6, end).await;
        assert_eq!(node.published(RENDITION, end - 6, end).await, published);
        for (msn, key) in &published {
            if let Some((_, before)) = shown.iter().find(|(before, _)| before == msn) {
                assert_eq!(before, key, "segment {msn} keeps its key");
            } else {
                shown.push((*msn, key.clone()));
            }
        }
        sweeps(&node).await;
    }
    assert!(waiting >= 2, "time has taken one");
    assert_eq!(keys(&shown), 1 + waiting, "the newest and those that waited: {shown:?}");
    assert_eq!(shown.len(), 66, "without a gap");
    let out = |node: &Node| node.engine.problems().iter().any(|text| text.contains("none can be made: 1"));
    until(async || out(&node)).await;
    let refused = node.operator.rotate(&id(), "ops").await.unwrap_err();
    assert!(refused.to_string().contains("none can be made: KMS test, key far/away"), "{refused}");
    let active =
        || node.engine.alerts().active().into_iter().map(|(alert, ..)| alert.name()).collect::<Vec<_>>();
    assert_eq!(active(), ["kms-unavailable", "keys-running-out"]);
    // Nor does time take the last key out of use, whoever watches.
    clock.advance(MINUTE * 300);
    for _ in 0..5 {
        sweeps(&node).await;
    }
    let newest = node.operator.stream(&id()).await.unwrap().current_key.unwrap();
    assert_eq!(newest.state, KeyState::Active);
    assert_eq!(node.engine.status().overdue_rotations, 1);
    assert_eq!(active(), ["kms-unavailable", "keys-running-out", "rotation-overdue"]);
    let last = node.published(RENDITION, 160, 166).await;
    assert_eq!(keys(&last), 1);

    kms.set(true);
    until(async || node.stream().known.read().waiting() == 3).await;
    until(async || node.engine.problems().is_empty()).await;
    assert_eq!(active(), [""; 0]);
    node.published(RENDITION, 160, 166).await;
    let after = node.published(RENDITION, 166, 176).await;
    assert_ne!(after.last().unwrap().1, last[0].1, "the rotation that was due is made up for");
}

#[tokio::test]
async fn a_revocation_is_carried_out_and_heard_of_without_the_kms() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    let one = start(dir.path(), &clock, &kms).await;
    let two = start(dir.path(), &clock, &kms).await;
    let published = one.publish(RENDITION, live(100, 106), Duration::from_secs(20)).await;
    let leaked = Arc::clone(&published.key_at(MediaSequenceNumber(100)).unwrap().signer);
    let known = async || two.engine.key(leaked.id).await;
    until(async || known().await.is_some()).await;
    kms.set(false);
    noticed(&one, false).await;
    clock.advance(TTL);
    until(async || held(&one) + held(&two) == 0).await;
    // Time has taken one of three.
    for left in [1, 0] {
        one.operator.revoke(&id(), None, "leaked", "sec").await.unwrap();
        assert_eq!(one.stream().known.read().waiting(), left);
    }
    let refused = one.operator.revoke(&id(), None, "leaked", "sec").await.unwrap_err();
    assert!(matches!(refused, OperatorError::Failed(_)), "{refused}");
    until(async || known().await.unwrap().revoked().is_some()).await;
    assert_eq!(
        one.published(RENDITION, 100, 106).await,
        two.published(RENDITION, 100, 106).await,
        "both under the last successor"
    );
}

#[tokio::test]
async fn a_stream_that_waits_for_its_key_holds_no_news_up() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, near) = (Clock::manual(START), Remote::open(dir.path()));
    let one = start(dir.path(), &clock, &near).await;
    let hanging = Arc::new(Hanging {
        kms: LocalKms::open(&dir.path().join("master.key")).unwrap(),
        hangs: Mutex::new(false),
    });
    let kms = Arc::clone(&hanging) as Arc<dyn Kms>;
    let two = Node::start_on(dir.path(), clock, Duration::from_millis(20), kms, DekRules::default()).await;
    *hanging.hangs.lock() = true;
    one.operator.initialize(channel("ch2", "/two/"), "ops").await.unwrap();
    until(async || two.operator.core.cursors.lock().retries.is_waiting_for_keys()).await;
    one.operator.stop(&id(), "ops").await.unwrap();
    let stopped = async || !two.stream().is_running();
    tokio::time::timeout(Duration::from_secs(2), until(stopped)).await.expect("news come meanwhile");
    *hanging.hangs.lock() = false;
    until(async || two.engine.stream_at("main", "/two/a").is_some()).await;
}

#[tokio::test]
async fn a_kms_that_is_away_for_a_moment_alerts_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    let node = start(dir.path(), &clock, &kms).await;
    let mut heard = node.engine.alerts().listen();
    kms.set(false);
    noticed(&node, false).await;
    clock.advance(Duration::from_secs(29));
    sweeps(&node).await;
    assert!(heard.try_recv().is_err() && !node.engine.problems().is_empty());
    clock.advance(Duration::from_secs(1));
    let notice = heard.recv().await.unwrap();
    assert!(
        notice.is_raised && notice.text.contains("cut off: streams go on, each with 3 keys"),
        "{notice:?}"
    );
    kms.set(true);
    assert!(!heard.recv().await.unwrap().is_raised);
}

#[tokio::test]
async fn a_dek_is_renewed_by_time_and_shredded_when_no_key_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    let node = start(dir.path(), &clock, &kms).await;
    let first = node.publish(RENDITION, live(100, 106), Duration::from_secs(20)).await;
    let day = Duration::from_secs(86_400);
    clock.advance(day * 89);
    sweeps(&node).await;
    assert_eq!(versions(dir.path()).await, [(1, true)]);
    clock.advance(day);
    until(async || versions(dir.path()).await == [(1, true), (2, true)]).await;
    let (old, new) = {
        let stream = node.stream();
        let known = stream.known.read();
        let mut deks = known.deks.values().map(|dek| dek.row.id);
        (deks.next().unwrap(), deks.next().unwrap())
    };
    assert_eq!(first.clear_init.dek, old);
    let before = node.publish(RENDITION, live(100, 106), Duration::from_secs(20)).await;
    assert_eq!(before.clear_init.dek, old, "as long as the window's keys are under it");
    // Keys that wait are used up, and new ones come under the new one.
    for end in (112..400).step_by(6) {
        node.published(RENDITION, end - 6, end).await;
        clock.advance(MINUTE);
        sweeps(&node).await;
    }
    until(async || versions(dir.path()).await == [(1, false), (2, true)]).await;
    until(async || node.stream().known.read().deks.len() == 1).await;
    assert!(node.engine.clear_init_signer(old).await.is_none());
    let after = node.publish(RENDITION, live(394, 400), Duration::from_secs(20)).await;
    assert_eq!(after.clear_init.dek, new);
    let shown = node.published(RENDITION, 394, 400).await;
    node.sweeps.abort();
    let again = start(dir.path(), &clock, &kms).await;
    assert_eq!(again.published(RENDITION, 394, 400).await, shown);
}

#[tokio::test]
async fn two_nodes_that_renew_a_dek_at_once_make_one() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    let one = start(dir.path(), &clock, &kms).await;
    let two = start(dir.path(), &clock, &kms).await;
    let (stream, actor) = (id(), "ops");
    let (a, b) =
        tokio::join!(one.operator.rotate_dek(&stream, actor), two.operator.rotate_dek(&stream, actor));
    let (a, b) = (a.unwrap(), b.unwrap());
    // Either at once, or one behind the other.
    let stored = versions(dir.path()).await;
    assert_eq!(stored.len() as u32, a.version.0.max(b.version.0), "{stored:?}");
    assert!(a == b || a.version != b.version, "{a:?} {b:?}");
    let newest = async |node: &Node| node.stream().known.read().dek().map(|dek| dek.row.id);
    until(async || newest(&one).await == newest(&two).await).await;
    for end in (106..160).step_by(6) {
        let published = one.published(RENDITION, end - 6, end).await;
        assert_eq!(two.published(RENDITION, end - 6, end).await, published);
    }
    let deks: std::collections::BTreeSet<_> =
        one.stream().known.read().keys.values().map(|key| key.dek).collect();
    assert!(deks.contains(&newest(&one).await.unwrap()), "new keys are under it");
}

#[tokio::test]
async fn a_dek_is_not_renewed_without_the_kms_and_what_is_there_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (clock, kms) = (Clock::manual(START), Remote::open(dir.path()));
    let node = start(dir.path(), &clock, &kms).await;
    let before = node.published(RENDITION, 100, 106).await;
    kms.set(false);
    let refused = node.operator.rotate_dek(&id(), "ops").await.unwrap_err();
    assert!(refused.to_string().contains("KMS test, key far/away: cut off"), "{refused}");
    assert_eq!(versions(dir.path()).await, [(1, true)]);
    assert_eq!(node.published(RENDITION, 100, 106).await, before);
    kms.set(true);
    let renewed = node.operator.rotate_dek(&id(), "ops").await.unwrap();
    assert_eq!(renewed.version.0, 2);
    assert_eq!(node.published(RENDITION, 100, 106).await, before);
    node.operator.stop(&id(), "ops").await.unwrap();
    let stopped = node.operator.rotate_dek(&id(), "ops").await.unwrap_err();
    assert!(matches!(stopped, OperatorError::Stopped(_)), "{stopped}");
}

/// Does not answer while it hangs.
#[derive(Debug)]
struct Hanging {
    kms: LocalKms,
    hangs: Mutex<bool>,
}

#[async_trait]
impl Kms for Hanging {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        self.kms.generate_data_key(context).await
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        self.kms.wrap(context, key).await
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        while *self.hangs.lock() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.kms.unwrap(context, wrapped).await
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        self.kms.describe().await
    }
}

#[tokio::test]
async fn a_revocation_whose_successor_waits_waits_for_no_kms() {
    let dir = tempfile::tempdir().unwrap();
    let kms = LocalKms::open(&dir.path().join("master.key")).unwrap();
    let hanging = Arc::new(Hanging { kms, hangs: Mutex::new(false) });
    let rules = DekRules { unwrapped_ttl: Duration::from_millis(100), ..DekRules::default() };
    let kms = Arc::clone(&hanging) as Arc<dyn Kms>;
    let node = Node::start_on(dir.path(), Clock::manual(START), Duration::from_millis(20), kms, rules).await;
    *hanging.hangs.lock() = true;
    node.clock.advance(Duration::from_millis(100));
    let dek = node.stream().known.read().dek().unwrap().row.id;
    until(async || node.operator.core.deks.held(dek).is_none()).await;
    let begun = std::time::Instant::now();
    node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap();
    assert!(begun.elapsed() < Duration::from_millis(500), "{:?}", begun.elapsed());
}
