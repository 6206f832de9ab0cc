//! The store's conformance, continued: what CDNs have of keys, how CDNs are, and incidents.

use std::time::Duration;

use keyshield::keys::{IncidentId, KeyId, KeyState, Ordinal, Reason, StreamId, Timestamp};
use keyshield::store::{
    Applied, CdnStateRow, DeliveryRow, DeliveryState, IncidentCdnRow, IncidentRow, NewIncident, PurgeState,
    Store, WriteOp,
};
use sqlx::{Connection, Executor};

use crate::store::{
    Database, NOW, apply, conforms, dek, key, later, load, promote, put, put_dek, stream, writes,
};

conforms!(
    what_a_cdn_has_is_noted_once_and_may_change,
    what_a_cdn_has_comes_in_pages_and_is_counted,
    what_a_cdn_has_let_go_of_is_forgotten,
    what_cdns_have_outlives_its_stream,
    how_a_cdn_is_takes_the_place_of_how_it_was,
    a_revocation_its_successor_and_its_incident_are_stored_together,
    a_revocation_that_took_nothing_back_is_no_incident,
    keys_that_another_took_back_meanwhile_leave_the_rest_an_incident,
    an_incident_without_cdns_is_complete_at_once,
    a_cdn_goes_forward_alone_and_the_last_completes_the_incident,
    of_cdns_that_complete_at_once_one_completes_the_incident,
    incidents_come_by_their_age,
    an_erased_stream_leaves_no_incident,
    a_database_of_the_version_before_keeps_what_it_has,
);

fn delivery(cdn: &str, n: u8, state: DeliveryState) -> DeliveryRow {
    DeliveryRow {
        cdn: cdn.into(),
        key: KeyId::from_bytes([n; 16]),
        stream: "ch1".parse().unwrap(),
        ordinal: Ordinal(u32::from(n)),
        state,
        last_error: None,
        updated_at: NOW,
    }
}

fn incident(n: u8, stream: &StreamId, keys: &[u8], cdns: &[&str]) -> NewIncident {
    let at = later(u64::from(n));
    NewIncident {
        id: IncidentId::at(at, [n; 16]),
        stream: stream.clone(),
        reason: "found on a forum".into(),
        actor: "sec".into(),
        revoked_at: at,
        transition_until: later(100),
        successor: Ordinal(9),
        keys: keys.iter().map(|n| KeyId::from_bytes([*n; 16])).collect(),
        paths: vec!["/live/~1/seg 1.ts".into()],
        cdns: cdns.iter().map(|cdn| (*cdn).to_owned()).collect(),
    }
}

/// Takes the keys of these ordinals back, for an incident.
fn revoke(ordinals: &[u32], incident: &NewIncident) -> Vec<WriteOp> {
    vec![
        WriteOp::Revoke {
            ordinals: ordinals.iter().copied().map(Ordinal).collect(),
            successor: incident.successor,
            reason: incident.reason.clone(),
            actor: incident.actor.clone(),
            at: incident.revoked_at,
            transition_until: incident.transition_until,
        },
        WriteOp::PutIncident(Box::new(incident.clone())),
    ]
}

/// A stream with keys 1, 2, 3 that are active, and 9, which waits.
async fn with_keys(database: &Database) -> (Store, StreamId) {
    let (store, stream) = database.with_stream().await;
    put(&store, &stream, &[key(1, 1), key(2, 2), key(3, 3), key(9, 9)]).await;
    apply(&store, &stream, promote(3, Reason::Start, NOW)).await;
    (store, stream)
}

/// Opens an incident about a key of [`with_keys`].
async fn open(store: &Store, stream: &StreamId, n: u8, cdns: &[&str]) -> IncidentRow {
    let new = incident(n, stream, &[n], cdns);
    let (applied, _) = store.apply(&writes(stream, revoke(&[u32::from(n)], &new))).await.unwrap();
    assert_eq!(applied, [Applied::Changed(1), Applied::Changed(1)]);
    store.incident(new.id).await.unwrap().expect("it was stored")
}

fn at_cdn(cdn: &str, state: PurgeState, at: Timestamp) -> IncidentCdnRow {
    IncidentCdnRow {
        cdn: cdn.into(),
        state,
        purges: 1,
        purged_at: Some(at),
        last_error: None,
        updated_at: at,
        completed_at: Some(at).filter(|_| state == PurgeState::Complete),
    }
}

async fn what_a_cdn_has_is_noted_once_and_may_change(database: Database) {
    let store = database.open().await;
    store.put_deliveries(&[]).await.unwrap();
    let first = [delivery("a", 1, DeliveryState::Sending), delivery("b", 1, DeliveryState::Stored)];
    store.put_deliveries(&first).await.unwrap();
    store.put_deliveries(&first).await.unwrap();
    let of_key = async || store.deliveries_of(KeyId::from_bytes([1; 16])).await.unwrap();
    assert_eq!(of_key().await, first, "noted twice is noted once");

    let late = DeliveryRow {
        last_error: Some("the edge does not have \"it\"".into()),
        updated_at: later(1),
        ..delivery("a", 1, DeliveryState::Stored)
    };
    store.put_deliveries(std::slice::from_ref(&late)).await.unwrap();
    assert_eq!(of_key().await, [late, first[1].clone()]);
    let shown = DeliveryRow { updated_at: later(2), ..delivery("a", 1, DeliveryState::Verified) };
    store.put_deliveries(std::slice::from_ref(&shown)).await.unwrap();
    assert_eq!(of_key().await, [shown, first[1].clone()], "and its error is gone");
}

async fn what_a_cdn_has_comes_in_pages_and_is_counted(database: Database) {
    let store = database.open().await;
    // Their IDs begin with digits and with letters.
    let numbers = [0x05, 0x5a, 0x99, 0xa5, 0xff];
    let rows = numbers.map(|n| delivery("a", n, DeliveryState::Verified));
    let other = [delivery("A", 0x99, DeliveryState::Stored), delivery("b", 0x99, DeliveryState::Stored)];
    store.put_deliveries(&[&rows[..], &other].concat()).await.unwrap();
    let (mut after, mut all) = (None, Vec::new());
    loop {
        let page = store.deliveries("a", after, 2).await.unwrap();
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 2);
        after = Some(last.key);
        all.extend(page);
    }
    assert_eq!(all, rows);
    let mut counts = store.count_deliveries().await.unwrap();
    counts.sort_by(|one, other| one.0.cmp(&other.0));
    let (stored, verified) = (DeliveryState::Stored, DeliveryState::Verified);
    assert_eq!(counts, [("A".into(), stored, 1), ("a".into(), verified, 5), ("b".into(), stored, 1)]);
}

async fn what_a_cdn_has_let_go_of_is_forgotten(database: Database) {
    let store = database.open().await;
    let rows = [1, 2, 3].map(|n| delivery("a", n, DeliveryState::Verified));
    store.put_deliveries(&[&rows[..], &[delivery("b", 1, DeliveryState::Stored)]].concat()).await.unwrap();
    store.drop_deliveries("a", &[]).await.unwrap();
    // Twice, and with one that was never there.
    for _ in 0..2 {
        store.drop_deliveries("a", &[rows[0].key, rows[2].key, KeyId::from_bytes([7; 16])]).await.unwrap();
    }
    assert_eq!(store.deliveries("a", None, 10).await.unwrap(), [rows[1].clone()]);
    assert_eq!(store.deliveries("b", None, 10).await.unwrap().len(), 1, "the other CDN's stays");
}

async fn what_cdns_have_outlives_its_stream(database: Database) {
    let (store, stream) = database.with_stream().await;
    let row = delivery("a", 1, DeliveryState::Verified);
    assert_eq!(row.stream, stream);
    store.put_deliveries(std::slice::from_ref(&row)).await.unwrap();
    store.delete_stream(&stream, later(1)).await.unwrap();
    store.erase_stream(&stream, later(2)).await.unwrap().unwrap();
    assert_eq!(store.deliveries("a", None, 10).await.unwrap(), [row]);
}

async fn how_a_cdn_is_takes_the_place_of_how_it_was(database: Database) {
    let store = database.open().await;
    let well = |name: &str| CdnStateRow {
        name: name.into(),
        failing_since: None,
        failures: 0,
        last_error: None,
        updated_at: NOW,
    };
    let failing = CdnStateRow {
        failing_since: Some(NOW),
        failures: u32::MAX,
        last_error: Some("it is away".into()),
        updated_at: later(1),
        ..well("b")
    };
    for state in [well("b"), well("a"), failing.clone(), failing.clone()] {
        store.put_cdn_state(&state).await.unwrap();
    }
    assert_eq!(store.cdn_states().await.unwrap(), [well("a"), failing]);
    store.put_cdn_state(&well("b")).await.unwrap();
    assert_eq!(store.cdn_states().await.unwrap(), [well("a"), well("b")], "it is back");
}

async fn a_revocation_its_successor_and_its_incident_are_stored_together(database: Database) {
    let (store, stream) = with_keys(&database).await;
    let new = NewIncident { successor: Ordinal(10), ..incident(5, &stream, &[2, 3], &["b", "a"]) };
    let mut ops = vec![WriteOp::PutKeys(vec![key(10, 10)])];
    ops.extend(revoke(&[2, 3], &new));
    ops.insert(2, promote(10, Reason::Revocation, new.revoked_at));
    let (applied, revs) = store.apply(&writes(&stream, ops)).await.unwrap();
    assert_eq!(applied[1..], [Applied::Changed(2), Applied::Changed(2), Applied::Changed(1)]);
    assert_eq!(revs.len(), 1, "one revision for one transaction");
    let pending = |cdn: &str| IncidentCdnRow {
        purges: 0,
        purged_at: None,
        ..at_cdn(cdn, PurgeState::Pending, new.revoked_at)
    };
    let expected = IncidentRow {
        id: new.id,
        stream: stream.clone(),
        reason: new.reason.clone(),
        actor: new.actor.clone(),
        revoked_at: new.revoked_at,
        transition_until: new.transition_until,
        successor: KeyId::from_bytes([10; 16]),
        keys: new.keys.clone(),
        paths: new.paths.clone(),
        completed_at: None,
        cdns: vec![pending("a"), pending("b")],
    };
    assert_eq!(store.incident(new.id).await.unwrap(), Some(expected.clone()));
    assert_eq!(store.open_incidents("a").await.unwrap(), [expected]);

    // A successor that is not there takes all of it back.
    let bad = NewIncident { successor: Ordinal(77), ..incident(6, &stream, &[1], &["a"]) };
    let refused = store.apply(&writes(&stream, revoke(&[1], &bad))).await;
    assert!(refused.is_err(), "{refused:?}");
    let keys = load(&store, &stream).await.keys;
    assert_eq!(keys[0].life.state, KeyState::Active);
    assert_eq!(store.incident(bad.id).await.unwrap(), None);
}

async fn a_revocation_that_took_nothing_back_is_no_incident(database: Database) {
    let (store, stream) = with_keys(&database).await;
    let first = open(&store, &stream, 1, &["a"]).await;
    let again = incident(6, &stream, &[1], &["a"]);
    let (applied, _) = store.apply(&writes(&stream, revoke(&[1], &again))).await.unwrap();
    assert_eq!(applied, [Applied::Changed(0), Applied::Changed(0)]);
    assert_eq!(store.incidents(None, 10).await.unwrap(), [first]);
    let gone: StreamId = "gone".parse().unwrap();
    let nowhere = incident(7, &gone, &[1], &["a"]);
    let (applied, _) = store.apply(&writes(&gone, revoke(&[1], &nowhere))).await.unwrap();
    assert_eq!(applied, [Applied::Changed(0), Applied::Changed(0)]);
}

async fn keys_that_another_took_back_meanwhile_leave_the_rest_an_incident(database: Database) {
    let (store, stream) = with_keys(&database).await;
    open(&store, &stream, 1, &["a"]).await;
    // Whoever wanted all three back did not know of it.
    let all = incident(6, &stream, &[1, 2, 3], &["a"]);
    let (applied, _) = store.apply(&writes(&stream, revoke(&[1, 2, 3], &all))).await.unwrap();
    assert_eq!(applied, [Applied::Changed(2), Applied::Changed(1)]);
    assert_eq!(store.incident(all.id).await.unwrap().expect("it was stored").keys, all.keys);
}

async fn an_incident_without_cdns_is_complete_at_once(database: Database) {
    let (store, stream) = with_keys(&database).await;
    let stored = open(&store, &stream, 1, &[]).await;
    assert_eq!((stored.completed_at, stored.cdns), (Some(stored.revoked_at), vec![]));
    assert_eq!(store.open_incidents("a").await.unwrap(), []);
}

async fn a_cdn_goes_forward_alone_and_the_last_completes_the_incident(database: Database) {
    let (store, stream) = with_keys(&database).await;
    let id = open(&store, &stream, 1, &["a", "b"]).await.id;
    let other = open(&store, &stream, 2, &["a"]).await;
    let note =
        async |row: &IncidentCdnRow| !store.note_purges(&[(id, row.clone())]).await.unwrap().is_empty();
    let cdns = async || store.incident(id).await.unwrap().unwrap().cdns;
    let failed = IncidentCdnRow {
        purges: 0,
        purged_at: None,
        last_error: Some("it is away".into()),
        ..at_cdn("a", PurgeState::Pending, later(11))
    };
    assert!(!note(&failed).await);
    assert_eq!(cdns().await[0], failed);
    let purged = at_cdn("a", PurgeState::Purged, later(12));
    assert!(!note(&purged).await);
    assert_eq!(cdns().await[0], purged);
    let complete = at_cdn("a", PurgeState::Complete, later(13));
    assert!(!note(&complete).await, "the other one has not");
    let left = async |cdn| store.open_incidents(cdn).await.unwrap().iter().map(|i| i.id).collect::<Vec<_>>();
    assert_eq!((left("a").await, left("b").await), (vec![other.id], vec![id]), "each has its own to do");
    assert!(!note(&at_cdn("a", PurgeState::Pending, later(14))).await);
    assert_eq!(cdns().await[0], complete, "what was completed stays so");
    assert!(!note(&at_cdn("c", PurgeState::Complete, later(14))).await, "it is no CDN of this incident");

    assert!(note(&at_cdn("b", PurgeState::Complete, later(15))).await, "it is the last");
    assert!(!note(&at_cdn("b", PurgeState::Complete, later(16))).await, "once");
    assert_eq!(store.incident(id).await.unwrap().unwrap().completed_at, Some(later(15)));
    assert_eq!(store.count_open_incidents().await.unwrap(), 1);
    assert_eq!(store.open_incidents("a").await.unwrap(), [other], "others are not touched");
}

async fn of_cdns_that_complete_at_once_one_completes_the_incident(database: Database) {
    let (store, stream) = with_keys(&database).await;
    let names = ["a", "b", "c", "d"];
    for n in [1, 2, 3] {
        let id = open(&store, &stream, n, &names).await.id;
        let note = |cdn: &'static str| {
            let store = store.clone();
            let row = at_cdn(cdn, PurgeState::Complete, later(20));
            tokio::spawn(async move { !store.note_purges(&[(id, row)]).await.unwrap().is_empty() })
        };
        let noted: Vec<_> = names.into_iter().map(note).collect();
        let mut last = 0;
        for noted in noted {
            last += usize::from(noted.await.unwrap());
        }
        assert_eq!(last, 1);
        assert_eq!(store.incident(id).await.unwrap().unwrap().completed_at, Some(later(20)));
    }
}

async fn incidents_come_by_their_age(database: Database) {
    let (store, stream) = with_keys(&database).await;
    assert_eq!(store.incidents(None, 10).await.unwrap(), []);
    let mut all = Vec::new();
    for n in [1, 2, 3] {
        all.push(open(&store, &stream, n, &["a", "b"]).await);
    }
    assert_eq!(store.open_incidents("a").await.unwrap(), all, "the oldest first");
    all.reverse();
    let first = store.incidents(None, 2).await.unwrap();
    let second = store.incidents(first.last().map(|last| last.id), 2).await.unwrap();
    assert_eq!((&first[..], &second[..]), (&all[..2], &all[2..]), "the newest first");
    assert_eq!(store.incidents(Some(all[2].id), 2).await.unwrap(), []);
    assert_eq!(store.incident(IncidentId::from_bytes([0; 16])).await.unwrap(), None);
    // Whatever an ID is, it comes before none at all.
    assert_eq!(store.incidents(Some(IncidentId::from_bytes([0xff; 16])), 9).await.unwrap(), all);
}

async fn an_erased_stream_leaves_no_incident(database: Database) {
    let (store, id) = with_keys(&database).await;
    open(&store, &id, 1, &["a", "b"]).await;
    let other = stream("ch2", "/two/");
    store.register(&other).await.unwrap();
    put_dek(&store, &other.id, dek(2, 1)).await;
    let of_other = |n, ordinal| keyshield::store::KeyRow { dek: dek(2, 1).id, ..key(n, ordinal) };
    put(&store, &other.id, &[of_other(0x22, 1), of_other(0x23, 9)]).await;
    apply(&store, &other.id, promote(1, Reason::Start, NOW)).await;
    let kept = incident(5, &other.id, &[0x22], &["a"]);
    store.apply(&writes(&other.id, revoke(&[1], &kept))).await.unwrap();

    store.delete_stream(&id, later(9)).await.unwrap();
    assert_eq!(store.incidents(None, 9).await.unwrap().len(), 2, "a deleted one leaves it, for its history");
    store.erase_stream(&id, later(9)).await.unwrap().unwrap();
    let left = store.incidents(None, 9).await.unwrap();
    assert_eq!((left.len(), left[0].id, left[0].cdns.len()), (1, kept.id, 1));
}

async fn a_database_of_the_version_before_keeps_what_it_has(database: Database) {
    let (store, stream) = with_keys(&database).await;
    let before = load(&store, &stream).await;
    store.close().await;
    // Back to it: the second migration does nothing but add tables.
    sqlx::any::install_default_drivers();
    let mut old = sqlx::AnyConnection::connect(&database.url()).await.unwrap();
    for table in ["incident_cdns", "incidents", "cdns", "deliveries"] {
        old.execute(sqlx::AssertSqlSafe(format!("DROP TABLE {table}"))).await.unwrap();
    }
    let left = old.execute("DELETE FROM _sqlx_migrations WHERE version = 2").await.unwrap();
    assert_eq!(left.rows_affected(), 1);
    old.close().await.unwrap();

    let store = tokio::time::timeout(Duration::from_secs(20), database.open()).await.unwrap();
    assert_eq!(load(&store, &stream).await, before);
    assert_eq!(store.deliveries("a", None, 9).await.unwrap(), []);
    open(&store, &stream, 1, &["a"]).await;
    store.put_deliveries(&[delivery("a", 1, DeliveryState::Stored)]).await.unwrap();
}
