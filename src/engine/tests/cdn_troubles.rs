//! Delivery and purging when something comes in between: a call whose answer is lost, another node, another
//! configuration, an edge that does not answer.

use super::delivery::Cdns;
use super::operators::{channel, id, until};
use super::*;
use crate::engine::{PurgeState, SyncState};
use crate::keys::{IncidentId, KeyId};
use crate::store::{CdnStateRow, DeliveryRow, DeliveryState, NewIncident, Write, WriteOp};

async fn store(dir: &Path) -> Store {
    Store::open(&Location::Sqlite(dir.join("keyshield.db")), 1).await.unwrap()
}

impl Node {
    /// Begins another stream.
    async fn begin(&self, id: &str) {
        let spec = StreamSpec { cdn_sync_enabled: true, ..channel(id, &format!("/{id}/")) };
        self.operator.initialize(spec, "ops").await.unwrap();
    }
}

#[tokio::test]
async fn a_key_that_is_taken_back_while_it_is_stored_does_not_stay_at_the_edge() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let (cdn, gate) = (&cdns.0[0], Arc::new(tokio::sync::Notify::new()));
    *cdn.puts_hang.lock() = Some(Arc::clone(&gate));
    *cdn.is_mute.lock() = true;
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || cdn.count("put") == 1).await;
    let revoked = node.key_ids().await[0];
    node.operator.revoke(&id(), Some(revoked), "leaked", "sam").await.unwrap();
    until(async || cdn.count("purge") == 1).await;
    // It comes to the store behind the purge, and nobody is told so.
    *cdn.puts_hang.lock() = None;
    gate.notify_one();
    until(async || cdn.ever.lock().contains(&revoked)).await;
    *cdn.is_mute.lock() = false;
    until(async || !cdn.has(revoked)).await;
    until(async || node.in_sync(0).await).await;
}

#[tokio::test]
async fn a_key_that_was_taken_back_since_it_was_looked_for_is_not_stored() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let (cdn, gate) = (&cdns.0[0], Arc::new(tokio::sync::Notify::new()));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    cdn.ever.lock().clear();
    *cdn.puts_hang.lock() = Some(Arc::clone(&gate));
    // Four keys of a stream that comes: three in a batch that takes its time, and one behind them.
    node.begin("ch2").await;
    until(async || cdn.count("put") == 3).await;
    let other = "ch2".parse().unwrap();
    let last = node.operator.keys(&other, None, 100).await.unwrap()[0].id;
    *cdn.puts_hang.lock() = None;
    node.operator.revoke(&other, Some(last), "leaked", "sam").await.unwrap();
    gate.notify_one();
    until(async || node.in_sync(0).await).await;
    assert!(!cdn.ever.lock().contains(&last));
}

#[tokio::test]
async fn a_store_that_takes_no_more_is_tidied_all_the_same() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let cdn = &cdns.0[0];
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    node.begin("ch2").await;
    until(async || cdn.store.lock().len() == 8 && node.in_sync(0).await).await;
    let gone = "ch2".parse().unwrap();
    let keys: Vec<_> = node.operator.keys(&gone, None, 100).await.unwrap().iter().map(|key| key.id).collect();
    *cdn.refused.lock() = "put";
    // The keys of one stream go while those of another cannot come.
    let puts = cdn.count("put");
    node.begin("ch3").await;
    until(async || cdn.count("put") > puts).await;
    node.operator.delete(&gone, "sam").await.unwrap();
    until(async || keys.iter().all(|key| !cdn.has(*key))).await;
    until(async || node.operator.cdns().await.unwrap()[0].health.failures > 0).await;
    *cdn.refused.lock() = "";
    until(async || node.in_sync(0).await).await;
}

#[tokio::test]
async fn caches_are_purged_though_the_edges_own_store_is_away() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let cdn = &cdns.0[0];
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    *cdn.refused.lock() = "delete";
    let done = node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap();
    until(async || cdn.count("purge") >= 1).await;
    let at = async || node.operator.incident(done.incident.id).await.unwrap().cdns.remove(0);
    until(async || at().await.last_error.is_some()).await;
    assert_eq!(at().await.state, PurgeState::Pending, "the key is still in the store");
}

#[tokio::test]
async fn an_edge_that_does_not_answer_holds_up_no_later_purge() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let cdn = &cdns.0[0];
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    *cdn.looks_hang.lock() = true;
    node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap();
    until(async || cdn.count("purge") == 1).await;
    node.clock.advance(Duration::from_secs(5));
    until(async || cdn.count("look") == 1).await;
    let purges = cdn.count("purge");
    node.operator.revoke(&id(), None, "leaked again", "sam").await.unwrap();
    until(async || cdn.count("purge") == purges + 1).await;
}

#[tokio::test]
async fn a_purge_that_takes_its_time_holds_up_no_other_and_is_not_begun_twice() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let cdn = &cdns.0[0];
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    *cdn.purge_hangs.lock() = true;
    let first = node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap().incident.id;
    until(async || cdn.count("purge") == 1).await;
    let second = node.operator.revoke(&id(), None, "leaked again", "sam").await.unwrap().incident.id;
    let state = async |id| node.operator.incident(id).await.unwrap().cdns.remove(0).state;
    until(async || state(second).await == PurgeState::Purged).await;
    node.clock.advance(Duration::from_secs(5));
    until(async || state(second).await == PurgeState::Complete).await;
    assert_eq!((state(first).await, cdn.count("purge")), (PurgeState::Pending, 3));
}

#[tokio::test]
async fn what_a_cdn_has_is_known_of_a_key_that_is_opened_later() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    let key = Arc::clone(&node.stream().known.read().keys[&Ordinal(1)].live);
    // As a key that was opened since the lane read what is delivered, with which its stream has another revision.
    key.note_delivered(0, false);
    node.stream().known.write().row.rev -= 1;
    until(async || key.delivered().has(0)).await;
}

#[tokio::test]
async fn a_key_that_another_node_has_delivered_is_left_until_it_is_heard_of() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    let row = DeliveryRow {
        cdn: "cdn0".into(),
        key: KeyId::from_bytes([9; 16]),
        stream: id(),
        ordinal: Ordinal(9),
        state: DeliveryState::Verified,
        last_error: None,
        updated_at: START,
    };
    store(dir.path()).await.put_deliveries(&[row]).await.unwrap();
    let again = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || again.engine.shared.metrics.cdn_keys.with_label_values(&["cdn0", "verified"]).get() == 5)
        .await;
    sweeps(&again).await;
    sweeps(&again).await;
    assert_eq!(cdns.0[0].count("delete"), 0);
}

#[tokio::test]
async fn a_cdn_that_another_node_found_away_is_well_when_this_one_finds_it_so() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let row = CdnStateRow {
        name: "cdn0".into(),
        failing_since: Some(START),
        failures: 9,
        last_error: Some("503".into()),
        updated_at: START,
    };
    store(dir.path()).await.put_cdn_state(&row).await.unwrap();
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.operator.cdns().await.unwrap()[0].state == SyncState::InSync).await;
}

#[tokio::test]
async fn trouble_ends_when_there_is_nothing_left_to_be_done() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    *cdns.0[0].refused.lock() = "put";
    node.begin("ch2").await;
    until(async || node.operator.cdns().await.unwrap()[0].health.failures > 0).await;
    node.operator.delete(&"ch2".parse().unwrap(), "sam").await.unwrap();
    until(async || node.operator.cdns().await.unwrap()[0].health.failures == 0).await;
    assert!(node.in_sync(0).await);
}

#[tokio::test]
async fn an_incident_does_not_wait_for_a_cdn_that_is_gone_from_the_configuration() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(2));
    let clock = Clock::manual(START);
    let node = cdns.node(dir.path(), clock.clone(), |_| {}).await;
    until(async || node.in_sync(0).await && node.in_sync(1).await).await;
    *cdns.0[1].is_away.lock() = true;
    let done = node.operator.revoke(&id(), None, "leaked", "sam").await.unwrap();
    until(async || cdns.0[0].count("purge") == 1).await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    let left = Cdns(vec![Arc::clone(&cdns.0[0])], cdns.1.clone());
    let again = left.node(dir.path(), clock.clone(), |_| {}).await;
    let incident = async || again.operator.incident(done.incident.id).await.unwrap();
    clock.advance(Duration::from_secs(5));
    until(async || incident().await.cdns[0].state == PurgeState::Complete).await;
    assert_eq!(incident().await.completed_at, None, "it may come back with the next node");
    clock.advance(Duration::from_secs(3_600));
    until(async || incident().await.completed_at.is_some()).await;
    let gone = incident().await.cdns.remove(1);
    assert_eq!(gone.state.name(), "abandoned");
    assert!(gone.last_error.unwrap().contains("no CDN of this name"));
}

#[tokio::test]
async fn what_another_node_has_taken_back_meanwhile_loses_no_incident() {
    let (dir, cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    let keys = node.key_ids().await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    let store = store(dir.path()).await;
    let revoke = |ordinals: &[u32], actor: &str| WriteOp::Revoke {
        ordinals: ordinals.iter().map(|n| Ordinal(*n)).collect(),
        successor: Ordinal(2),
        reason: "leaked".into(),
        actor: actor.into(),
        at: START,
        transition_until: START,
    };
    let incident = NewIncident {
        id: IncidentId::from_bytes([7; 16]),
        stream: id(),
        reason: "leaked".into(),
        actor: "sam".into(),
        revoked_at: START,
        transition_until: START,
        successor: Ordinal(2),
        keys: keys[..2].to_vec(),
        paths: Vec::new(),
        cdns: vec!["cdn0".into()],
    };
    let write = |op| Write { stream: id(), op };
    store.apply(&[write(revoke(&[0], "kim"))]).await.unwrap();
    let writes = [write(revoke(&[0, 1], "sam")), write(WriteOp::PutIncident(Box::new(incident)))];
    store.apply(&writes).await.unwrap();
    let open = store.open_incidents("cdn0").await.unwrap();
    assert_eq!(open.len(), 1, "key 1 was taken back here, and CDNs are to be told");
}

#[tokio::test]
async fn what_is_to_go_goes_though_it_lies_under_another_secret() {
    let (dir, mut cdns) = (tempfile::tempdir().unwrap(), Cdns::new(1));
    let node = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || node.in_sync(0).await).await;
    node.sweeps.abort();
    let _ = node.sweeps.await;
    // Of a stream that was erased while the CDN was away.
    let key = KeyId::from_bytes([9; 16]);
    let sealed = cdns.0[0].store.lock().values().next().cloned().unwrap();
    cdns.0[0].store.lock().insert(key, sealed);
    let row = DeliveryRow {
        cdn: "cdn0".into(),
        key,
        stream: "erased".parse().unwrap(),
        ordinal: Ordinal(0),
        state: DeliveryState::Verified,
        last_error: None,
        updated_at: START,
    };
    store(dir.path()).await.put_deliveries(&[row]).await.unwrap();
    cdns.1 = cdns.1.replace("00", "77");
    let _again = cdns.node(dir.path(), Clock::manual(START), |_| {}).await;
    until(async || !cdns.0[0].has(key)).await;
}
