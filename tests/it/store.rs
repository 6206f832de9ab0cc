//! One conformance suite for the store, run against SQLite and PostgreSQL.

use std::sync::Arc;
use std::time::Duration;

use keyshield::keys::{
    Boundary, DekId, DekVersion, Edge, IvMode, KeyId, KeyMethod, KeyState, MediaSequenceNumber, Ordinal,
    Policy, Reason, StreamId, Timestamp,
};
use keyshield::store::{
    Applied, BoundaryRow, CdnRow, DekCursor, DekRow, KeyLife, KeyRow, Lease, Location, Registered,
    RenditionRow, Replaced, Served, Store, StoreError, StoredStream, StreamRow, StreamState, Write, WriteOp,
};
use serde_json::json;
use sqlx::{Connection, Executor, PgConnection};

use crate::machine::SOON;
use crate::postgres::Postgres;

pub(crate) const NOW: Timestamp = Timestamp::from_unix_millis(1_700_000_000_000);
const RENDITION: &str = "/live/720p.m3u8";

pub(crate) fn later(secs: u64) -> Timestamp {
    NOW.plus(Duration::from_secs(secs))
}

/// A database of its own, and what keeps it there.
pub(crate) struct Database {
    pub(crate) location: Location,
    _keep: (Option<tempfile::TempDir>, Option<Arc<Postgres>>),
}

impl Database {
    pub(crate) fn sqlite() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { location: Location::Sqlite(dir.path().join("store.db")), _keep: (Some(dir), None) }
    }

    pub(crate) fn postgres() -> Self {
        let postgres = Postgres::shared();
        Self { location: Location::Postgres(postgres.database()), _keep: (None, Some(postgres)) }
    }

    pub(crate) fn url(&self) -> String {
        match &self.location {
            Location::Sqlite(path) => format!("sqlite://{}", path.display()),
            Location::Postgres(url) => url.clone(),
        }
    }

    pub(crate) async fn open(&self) -> Store {
        Store::open(&self.location, 8).await.unwrap()
    }

    /// With stream `ch1` and its DEK.
    pub(crate) async fn with_stream(&self) -> (Store, StreamId) {
        let store = self.open().await;
        let stream = stream("ch1", "/live/");
        assert!(matches!(store.register(&stream).await.unwrap(), Registered::Created(_)));
        put_dek(&store, &stream.id, dek(1, 1)).await;
        (store, stream.id)
    }
}

/// Each case as a test of either database.
macro_rules! conforms {
    ($($case:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test] async fn $case() { super::$case(super::Database::sqlite()).await })+
        }
        mod postgres {
            $(#[tokio::test] async fn $case() { super::$case(super::Database::postgres()).await })+
        }
    };
}
pub(crate) use conforms;

conforms!(
    who_comes_second_gets_what_the_first_stored,
    of_many_who_store_at_once_one_wins_and_all_agree,
    a_wrapping_takes_the_place_of_the_one_that_was_read,
    all_keys_that_wrap_come_page_by_page,
    a_boundary_is_added_behind_the_known_ones_or_not_at_all,
    a_key_goes_through_its_states_once_and_in_their_order,
    a_promotion_takes_the_keys_before_it_along,
    a_revoked_key_has_its_successor_and_reason,
    a_destroyed_key_leaves_no_bytes_and_no_boundary_but_the_last,
    a_key_that_was_named_of_late_is_not_destroyed,
    writes_of_several_streams_are_all_stored_or_none,
    writes_of_several_streams_come_to_the_same_as_one_after_the_other,
    of_many_new_streams_those_begin_whose_names_nobody_has,
    a_stream_has_one_owner_of_its_prefix,
    a_deleted_stream_leaves_its_history_and_may_begin_anew,
    a_dek_is_shredded_when_it_is_not_the_newest_and_wraps_no_key,
    an_erased_stream_leaves_nothing,
    an_update_is_seen_as_a_change,
    of_two_who_change_a_stream_neither_undoes_what_the_other_did,
    reports_say_the_same_in_whatever_order_they_come,
    a_lease_is_held_by_one_until_it_runs_out,
    a_lease_is_looked_at_and_given_up_by_its_holder,
    a_node_that_is_silent_is_missing_until_it_is_given_up,
    the_history_of_keys_comes_in_pages,
    many_streams_are_loaded_in_their_order,
    renditions_that_nobody_asks_for_are_forgotten,
    what_was_stored_is_there_after_opening_again,
    work_that_waits_for_a_connection_is_no_sign_of_a_store_that_is_away,
);

pub(crate) fn stream(id: &str, prefix: &str) -> StreamRow {
    StreamRow {
        id: id.parse().unwrap(),
        playlist_url: format!("https://origin.example{prefix}master.m3u8"),
        playlist_path: format!("{prefix}master.m3u8"),
        origin: "main".into(),
        prefix: prefix.into(),
        cdn: CdnRow { endpoints: vec!["https://cdn1.example.com".into()], sync_enabled: true },
        policy: Policy { segments_per_key: 7, rotation_interval: None, ..Policy::default() },
        request: Some(json!({"config": {"segmentsPerKey": 7}})),
        state: StreamState::Running,
        created_at: NOW,
        updated_at: NOW,
        rev: 0,
        incarnation: 0,
    }
}

pub(crate) fn dek(n: u8, version: u32) -> DekRow {
    DekRow {
        id: DekId::from_bytes([n; 16]),
        version: DekVersion(version),
        kek_id: "local:a".into(),
        wrapped: vec![n; 60],
        created_at: NOW,
    }
}

pub(crate) fn key(n: u8, ordinal: u32) -> KeyRow {
    KeyRow {
        id: KeyId::from_bytes([n; 16]),
        ordinal: Ordinal(ordinal),
        dek: DekId::from_bytes([1; 16]),
        method: KeyMethod::Aes256,
        iv_mode: IvMode::Period,
        wrapped: vec![n; 76],
        life: KeyLife::pre_active(NOW),
    }
}

fn boundary(seq: usize, ordinal: u32, first: u64) -> (BoundaryRow, Reason) {
    let msn = MediaSequenceNumber;
    let row = BoundaryRow {
        rendition: RENDITION.into(),
        seq,
        boundary: Boundary { epoch: 0, ordinal: Ordinal(ordinal), first: msn(first), segments: 100 },
        edge: Edge { first: msn(first), end: msn(first + 8) },
    };
    (row, Reason::Count)
}

fn rendition(end: u64, served_secs: u64) -> RenditionRow {
    RenditionRow {
        rendition: RENDITION.into(),
        ended: false,
        keeps_all: false,
        target_duration: Duration::from_secs(6),
        longest_playlist: Duration::from_secs(48),
        epoch: 0,
        edge: Edge { first: MediaSequenceNumber(end - 8), end: MediaSequenceNumber(end) },
        last_served_at: later(served_secs),
    }
}

pub(crate) fn writes(stream: &StreamId, ops: Vec<WriteOp>) -> Vec<Write> {
    ops.into_iter().map(|op| Write { stream: stream.clone(), op }).collect()
}

pub(crate) async fn apply(store: &Store, stream: &StreamId, op: WriteOp) -> Applied {
    store.apply(&writes(stream, vec![op])).await.unwrap().0.remove(0)
}

pub(crate) async fn put(store: &Store, stream: &StreamId, keys: &[KeyRow]) -> Vec<KeyRow> {
    match apply(store, stream, WriteOp::PutKeys(keys.to_vec())).await {
        Applied::Keys(keys) => keys,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn put_dek(store: &Store, stream: &StreamId, dek: DekRow) -> DekRow {
    match apply(store, stream, WriteOp::PutDek(dek)).await {
        Applied::Dek(dek) => dek,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn promote(upto: u32, reason: Reason, at: Timestamp) -> WriteOp {
    WriteOp::Promote { upto: Ordinal(upto), reason, actor: Some("ops".into()), at }
}

fn destroy(ordinal: u32, unless_named_after: Timestamp) -> WriteOp {
    WriteOp::Destroy { ordinal: Ordinal(ordinal), at: later(900), unless_named_after }
}

pub(crate) async fn load(store: &Store, stream: &StreamId) -> StoredStream {
    store.load(std::slice::from_ref(stream)).await.unwrap().remove(0)
}

async fn who_comes_second_gets_what_the_first_stored(database: Database) {
    let (store, stream) = database.with_stream().await;
    assert_eq!(put_dek(&store, &stream, dek(2, 1)).await, dek(1, 1));
    assert_eq!(put(&store, &stream, &[key(5, 0)]).await, [key(5, 0)]);
    assert_eq!(put(&store, &stream, &[key(6, 0), key(7, 1)]).await, [key(5, 0), key(7, 1)]);
    assert_eq!(load(&store, &stream).await.next_ordinal, Ordinal(2));
}

async fn of_many_who_store_at_once_one_wins_and_all_agree(database: Database) {
    let (store, stream) = database.with_stream().await;
    let node = |n: u8| {
        let (store, stream) = (store.clone(), stream.clone());
        tokio::spawn(async move {
            let keys = put(&store, &stream, &[key(n, 0), key(n + 100, 1)]).await;
            let rows = [boundary(0, 0, u64::from(n)), boundary(1, 1, 100 + u64::from(n))];
            let added = store.add_boundaries(&stream, &rows, &rendition(200, 0), NOW).await.unwrap();
            (keys, added.is_some())
        })
    };
    let nodes: Vec<_> = (1..=8).map(node).collect();
    let mut outcomes = Vec::new();
    for node in nodes {
        outcomes.push(node.await.unwrap());
    }
    assert!(outcomes.iter().all(|(keys, _)| *keys == outcomes[0].0), "{outcomes:?}");
    assert_eq!(outcomes.iter().filter(|(_, added)| *added).count(), 1);
    let stored = load(&store, &stream).await;
    assert_eq!(stored.keys, outcomes[0].0);
    assert_eq!(stored.boundaries.len(), 2);
}

async fn a_wrapping_takes_the_place_of_the_one_that_was_read(database: Database) {
    let (store, stream) = database.with_stream().await;
    let read = store.deks_after(&DekCursor::default(), 10).await.unwrap();
    assert_eq!((read.len(), &read[0].stream, read[0].row.id), (1, &stream, dek(1, 1).id));
    let rev = load(&store, &stream).await.stream.rev;
    assert_eq!(store.replace_dek(&read[0], "vault:k", b"new").await.unwrap(), Replaced::Done);
    let loaded = load(&store, &stream).await;
    let expected = DekRow { kek_id: "vault:k".into(), wrapped: b"new".to_vec(), ..read[0].row.clone() };
    assert_eq!((loaded.deks, loaded.stream.rev), (vec![expected], rev + 1), "and other nodes hear of it");

    // Whoever read it before is too late, and nobody hears of what was not done.
    assert_eq!(store.replace_dek(&read[0], "vault:k", b"newer").await.unwrap(), Replaced::Changed);
    assert_eq!(load(&store, &stream).await.stream.rev, rev + 1);
    let read = store.deks_after(&DekCursor::default(), 10).await.unwrap();
    store.delete_stream(&stream, later(1)).await.unwrap();
    assert_eq!(store.replace_dek(&read[0], "vault:k", b"newest").await.unwrap(), Replaced::Gone);
    assert!(store.deks_after(&DekCursor::default(), 10).await.unwrap().is_empty());
    assert_eq!(store.count_deks().await.unwrap(), 0);
}

async fn all_keys_that_wrap_come_page_by_page(database: Database) {
    let store = database.open().await;
    // In another order than that of their bytes, which databases need not sort by.
    for (n, id) in (1..).zip(["b", "A", "a-1", "a.1", "C", "a1"]) {
        let stream = stream(id, &format!("/{id}/"));
        store.register(&stream).await.unwrap();
        put_dek(&store, &stream.id, dek(n, 1)).await;
        put_dek(&store, &stream.id, dek(n + 100, 2)).await;
    }
    let (mut after, mut all) = (DekCursor::default(), Vec::new());
    loop {
        let page = store.deks_after(&after, 5).await.unwrap();
        let Some(last) = page.last() else { break };
        after = last.cursor();
        all.extend(page.into_iter().map(|dek| (dek.stream, dek.row.version)));
    }
    assert_eq!((all.len(), store.count_deks().await.unwrap()), (12, 12));
    assert!(all.chunks(2).all(|of| of[0].0 == of[1].0 && of[0].1 < of[1].1), "{all:?}");
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 12, "each once");
}

async fn a_boundary_is_added_behind_the_known_ones_or_not_at_all(database: Database) {
    let (store, stream) = database.with_stream().await;
    let add = async |rows: &[(BoundaryRow, Reason)]| {
        store.add_boundaries(&stream, rows, &rendition(108, 0), NOW).await.unwrap().is_some()
    };
    let two = [boundary(0, 0, 100), boundary(1, 1, 200)];
    assert!(add(&two).await);
    // Another node that knows only the first one plans otherwise, and loses as a whole.
    assert!(!add(&[boundary(1, 3, 150), boundary(2, 4, 250)]).await);
    // So does one whose rows would leave a gap.
    assert!(!add(&[boundary(3, 4, 400)]).await);
    assert_eq!(load(&store, &stream).await.boundaries, two.map(|(row, _)| row));
    assert!(add(&[boundary(2, 2, 300)]).await);
}

async fn a_key_goes_through_its_states_once_and_in_their_order(database: Database) {
    let (store, stream) = database.with_stream().await;
    put(&store, &stream, &[key(5, 0)]).await;
    let state = async || load(&store, &stream).await.keys.pop().map(|key| key.life.state);
    let deactivate = || WriteOp::Deactivate { ordinal: Ordinal(0), at: later(9) };
    let nothing = Applied::Changed(0);
    let one = Applied::Changed(1);

    assert_eq!(apply(&store, &stream, deactivate()).await, nothing, "it was not active");
    assert_eq!(apply(&store, &stream, destroy(0, NOW)).await, nothing, "it was not retired");
    assert_eq!(apply(&store, &stream, promote(0, Reason::Promotion, NOW)).await, one);
    assert_eq!(apply(&store, &stream, promote(0, Reason::Count, later(5))).await, nothing, "once");
    let active = load(&store, &stream).await.keys.remove(0).life;
    assert_eq!((active.state, active.activated_at, active.forced), (KeyState::Active, Some(NOW), true));
    assert_eq!(active.activated_for.as_deref(), Some("promotion"));
    assert_eq!(active.activated_by.as_deref(), Some("ops"));
    assert_eq!(apply(&store, &stream, deactivate()).await, one);
    assert_eq!(state().await, Some(KeyState::Deactivated));
    assert_eq!(apply(&store, &stream, promote(0, Reason::Count, later(5))).await, nothing, "never back");
    assert_eq!(apply(&store, &stream, destroy(0, NOW)).await, one);
    assert_eq!(state().await, None);
    assert_eq!(apply(&store, &stream, destroy(0, NOW)).await, nothing);
}

async fn a_promotion_takes_the_keys_before_it_along(database: Database) {
    let (store, stream) = database.with_stream().await;
    put(&store, &stream, &[key(5, 0), key(6, 1), key(7, 2)]).await;
    assert_eq!(apply(&store, &stream, promote(1, Reason::Count, NOW)).await, Applied::Changed(2));
    let states: Vec<_> = load(&store, &stream).await.keys.iter().map(|key| key.life.state).collect();
    assert_eq!(states, [KeyState::Active, KeyState::Active, KeyState::PreActive]);
    assert_eq!(apply(&store, &stream, WriteOp::Force { ordinal: Ordinal(1) }).await, Applied::Changed(1));
    assert!(load(&store, &stream).await.keys[1].life.forced);
}

async fn a_revoked_key_has_its_successor_and_reason(database: Database) {
    let (store, stream) = database.with_stream().await;
    put(&store, &stream, &[key(5, 0), key(6, 1)]).await;
    apply(&store, &stream, promote(0, Reason::Start, NOW)).await;
    let revoke = WriteOp::Revoke {
        ordinals: vec![Ordinal(0)],
        successor: Ordinal(1),
        reason: "leaked".into(),
        actor: "sec".into(),
        at: later(3),
        transition_until: later(15),
    };
    let both = writes(&stream, vec![revoke.clone(), promote(1, Reason::Revocation, later(3))]);
    let (applied, revs) = store.apply(&both).await.unwrap();
    assert_eq!(applied, [Applied::Changed(1), Applied::Changed(1)]);
    assert_eq!(revs.len(), 1, "one revision for one transaction");
    let life = load(&store, &stream).await.keys.remove(0).life;
    assert_eq!((life.state, life.compromised_at), (KeyState::Compromised, Some(later(3))));
    assert_eq!((life.revoked_by.as_deref(), life.revoked_for.as_deref()), (Some("sec"), Some("leaked")));
    assert_eq!((life.successor, life.transition_until), (Some(Ordinal(1)), Some(later(15))));
    assert_eq!(apply(&store, &stream, revoke).await, Applied::Changed(0), "revoked once");
    assert_eq!(apply(&store, &stream, destroy(0, NOW)).await, Applied::Changed(1));
}

async fn a_destroyed_key_leaves_no_bytes_and_no_boundary_but_the_last(database: Database) {
    let (store, stream) = database.with_stream().await;
    let keys: Vec<_> = (0..4).map(|n| key(5 + n, u32::from(n))).collect();
    put(&store, &stream, &keys).await;
    let rows: Vec<_> = (0..4).map(|n| boundary(n, n as u32, 100 * n as u64)).collect();
    assert!(store.add_boundaries(&stream, &rows, &rendition(400, 0), NOW).await.unwrap().is_some());
    apply(&store, &stream, promote(3, Reason::Count, NOW)).await;
    let seqs = async || load(&store, &stream).await.boundaries.iter().map(|b| b.seq).collect::<Vec<_>>();
    let retire = async |ordinal: u32| {
        apply(&store, &stream, WriteOp::Deactivate { ordinal: Ordinal(ordinal), at: NOW }).await;
        apply(&store, &stream, destroy(ordinal, NOW)).await;
    };
    retire(1).await;
    assert_eq!(seqs().await, [0, 1, 2, 3], "what comes before it is still needed");
    retire(0).await;
    retire(2).await;
    assert_eq!(seqs().await, [3]);
    retire(3).await;
    assert_eq!(seqs().await, [3], "numbers are counted from the last one");
    let history = store.key_history(&stream, false, None, 10).await.unwrap();
    assert!(history.iter().all(|key| key.wrapped.is_empty() && key.life.destroyed_at == Some(later(900))));
    let next = [boundary(4, 4, 400)];
    assert!(store.add_boundaries(&stream, &next, &rendition(408, 0), NOW).await.unwrap().is_some());
}

async fn a_key_that_was_named_of_late_is_not_destroyed(database: Database) {
    let (store, stream) = database.with_stream().await;
    put(&store, &stream, &[key(5, 0)]).await;
    apply(&store, &stream, promote(0, Reason::Start, NOW)).await;
    apply(&store, &stream, WriteOp::Deactivate { ordinal: Ordinal(0), at: NOW }).await;
    let named = |secs| Served { renditions: vec![], keys: vec![(stream.clone(), Ordinal(0), later(secs))] };
    store.report(&named(50)).await.unwrap();
    store.report(&named(20)).await.unwrap();
    assert_eq!(apply(&store, &stream, destroy(0, later(49))).await, Applied::Changed(0));
    assert_eq!(store.reports_since(0).await.unwrap().0.keys, named(50).keys);
    assert_eq!(apply(&store, &stream, destroy(0, later(50))).await, Applied::Changed(1));
    assert_eq!(store.reports_since(0).await.unwrap().0.keys, []);
}

async fn writes_of_several_streams_are_all_stored_or_none(database: Database) {
    let (store, one) = database.with_stream().await;
    let two = stream("ch2", "/two/");
    store.register(&two).await.unwrap();
    let put = |stream: &StreamId, key| Write { stream: stream.clone(), op: WriteOp::PutKeys(vec![key]) };
    // The second one names a DEK that is not there.
    let broken = KeyRow { dek: DekId::from_bytes([9; 16]), ..key(6, 0) };
    let refused = store.apply(&[put(&one, key(5, 0)), put(&two.id, broken)]).await;
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(load(&store, &one).await.keys, []);

    put_dek(&store, &two.id, dek(2, 1)).await;
    let good = KeyRow { dek: DekId::from_bytes([2; 16]), ..key(6, 0) };
    let gone: StreamId = "gone".parse().unwrap();
    let batch = [put(&one, key(5, 0)), put(&gone, key(8, 0)), put(&two.id, good)];
    let (applied, revs) = store.apply(&batch).await.unwrap();
    assert_eq!(applied[1], Applied::Changed(0), "a stream that is gone holds nothing up");
    assert_eq!(revs.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["ch1", "ch2"]);
}

async fn writes_of_several_streams_come_to_the_same_as_one_after_the_other(database: Database) {
    let store = database.open().await;
    let mut ids = Vec::new();
    for n in 1..=3 {
        let stream = stream(&format!("ch{n}"), &format!("/{n}/"));
        store.register(&stream).await.unwrap();
        put_dek(&store, &stream.id, dek(n, 1)).await;
        ids.push(stream.id);
    }
    let key = |n: usize, ordinal: u32| {
        let id = n as u8 * 10 + ordinal as u8;
        KeyRow { dek: DekId::from_bytes([n as u8; 16]), ..key(id, ordinal) }
    };
    let deactivate = |ordinal| WriteOp::Deactivate { ordinal: Ordinal(ordinal), at: later(9) };
    put(&store, &ids[1], &[key(2, 0)]).await;
    let ops = [
        vec![WriteOp::PutKeys(vec![key(1, 0), key(1, 1)]), promote(1, Reason::Count, NOW), deactivate(0)],
        vec![
            promote(0, Reason::Start, later(1)),
            deactivate(0),
            WriteOp::PutKeys(vec![KeyRow { wrapped: vec![0; 76], ..key(2, 9) }, key(2, 0)]),
            destroy(0, NOW),
        ],
        vec![deactivate(0), WriteOp::PutKeys(vec![key(3, 0)]), promote(0, Reason::Promotion, later(2))],
    ];
    let batch: Vec<_> = ids.iter().zip(ops).flat_map(|(id, ops)| writes(id, ops)).collect();
    let (applied, revs) = store.apply(&batch).await.unwrap();
    let changed: Vec<_> = applied
        .iter()
        .map(|applied| match applied {
            Applied::Changed(count) => *count as i64,
            Applied::Keys(keys) => -(keys.len() as i64),
            Applied::Dek(_) => unreachable!(),
        })
        .collect();
    assert_eq!(changed, [-2, 2, 1, 1, 1, -2, 1, 0, -1, 1]);
    assert_eq!(revs.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>(), ids);

    let loaded = store.load(&ids).await.unwrap();
    let lives = |n: usize| {
        let life = |key: &KeyRow| (key.id, key.life.state, key.life.activated_at, key.life.forced);
        loaded[n].keys.iter().map(life).collect::<Vec<_>>()
    };
    let id = |n, ordinal| key(n, ordinal).id;
    use KeyState::{Active, Deactivated, PreActive};
    assert_eq!(lives(0), [(id(1, 0), Deactivated, Some(NOW), false), (id(1, 1), Active, Some(NOW), false)]);
    assert_eq!(lives(1), [(id(2, 9), PreActive, None, false)]);
    assert_eq!(lives(2), [(id(3, 0), Active, Some(later(2)), true)]);
    assert!(loaded.iter().zip(&revs).all(|(stored, (_, rev))| stored.stream.rev == *rev));
}

async fn of_many_new_streams_those_begin_whose_names_nobody_has(database: Database) {
    let (store, first) = database.with_stream().await;
    store.register(&stream("ch9", "/nine/")).await.unwrap();
    store.delete_stream(&"ch9".parse().unwrap(), NOW).await.unwrap();
    let streams = [
        stream("ch1", "/one/"),
        stream("ch2", "/live/"),
        stream("ch3", "/three/"),
        stream("ch4", "/three/"),
        stream("ch5", "/nine/"),
        stream("ch9", "/anew/"),
    ];
    let made = store.register_new(&streams).await.unwrap();
    let new: Vec<StreamId> = ["ch3", "ch5"].map(|id| id.parse().unwrap()).into();
    assert_eq!(made, new.iter().cloned().collect());
    assert_eq!(load(&store, &first).await.stream.prefix, "/live/", "what is there stays");
    let there = load(&store, &new[0]).await.stream;
    let described = StreamRow { rev: there.rev, incarnation: there.incarnation, ..stream("ch3", "/three/") };
    assert_eq!(there, described);
    assert_eq!(store.register_new(&streams).await.unwrap(), [].into());
}

async fn a_stream_has_one_owner_of_its_prefix(database: Database) {
    let (store, first) = database.with_stream().await;
    let there = load(&store, &first).await.stream;
    assert_eq!(store.register(&stream("ch1", "/other/")).await.unwrap(), Registered::Exists(there.clone()));
    assert_eq!(store.register(&stream("ch2", "/live/")).await.unwrap(), Registered::PrefixTaken(first));
    let elsewhere = StreamRow { origin: "other".into(), ..stream("ch2", "/live/") };
    assert!(matches!(store.register(&elsewhere).await.unwrap(), Registered::Created(_)));
    let described = StreamRow { rev: there.rev, incarnation: there.incarnation, ..stream("ch1", "/live/") };
    assert_eq!(there, described, "it reads back as it was written");
}

async fn a_deleted_stream_leaves_its_history_and_may_begin_anew(database: Database) {
    let (store, id) = database.with_stream().await;
    put(&store, &id, &[key(5, 0), key(6, 1)]).await;
    apply(&store, &id, promote(0, Reason::Start, NOW)).await;
    store.add_boundaries(&id, &[boundary(0, 0, 1)], &rendition(9, 0), NOW).await.unwrap();
    assert!(store.delete_stream(&id, later(5)).await.unwrap());
    assert!(!store.delete_stream(&id, later(5)).await.unwrap());

    let deleted = load(&store, &id).await;
    assert_eq!((deleted.stream.state, deleted.stream.request), (StreamState::Deleted, None));
    assert_eq!((deleted.keys.len(), deleted.deks.len(), deleted.boundaries.len()), (0, 0, 0));
    assert_eq!(store.key_history(&id, false, None, 10).await.unwrap().len(), 2);
    assert!(matches!(store.update_stream(&id, NOW, Some).await, Err(StoreError::NoStream)));
    assert_eq!(apply(&store, &id, WriteOp::PutKeys(vec![key(9, 2)])).await, Applied::Changed(0));

    // Another may have the prefix now; then the old one may begin elsewhere.
    assert!(matches!(store.register(&stream("ch2", "/live/")).await.unwrap(), Registered::Created(_)));
    assert!(matches!(store.register(&stream("ch1", "/live/")).await.unwrap(), Registered::PrefixTaken(_)));
    assert!(matches!(store.register(&stream("ch1", "/anew/")).await.unwrap(), Registered::Created(_)));
    let anew = load(&store, &id).await;
    assert!(anew.stream.incarnation > deleted.stream.incarnation && anew.stream.rev > deleted.stream.rev);
    assert_eq!(anew.next_ordinal, Ordinal(2), "ordinals go on behind the old ones");
    let late = WriteOp::PutKeys(vec![key(9, 2)]);
    let refused = store.apply(&writes(&id, vec![late])).await;
    assert!(refused.is_err(), "a node that has not heard wraps under a DEK that is gone: {refused:?}");
    assert_eq!(store.highest_deks(std::slice::from_ref(&id)).await.unwrap(), [(id, 1)].into());
}

async fn a_dek_is_shredded_when_it_is_not_the_newest_and_wraps_no_key(database: Database) {
    let (store, id) = database.with_stream().await;
    let first = load(&store, &id).await.deks.remove(0);
    put(&store, &id, &[key(5, 0)]).await;
    let shred = || WriteOp::ShredDek { dek: first.id };
    assert_eq!(apply(&store, &id, shred()).await, Applied::Changed(0), "it is the newest");
    let second = put_dek(&store, &id, dek(0x77, 2)).await;
    assert_eq!(put_dek(&store, &id, dek(0x78, 2)).await, second, "who comes second gets the first one's");
    assert_eq!(apply(&store, &id, shred()).await, Applied::Changed(0), "it wraps a key");
    apply(&store, &id, promote(0, Reason::Start, NOW)).await;
    apply(&store, &id, WriteOp::Deactivate { ordinal: Ordinal(0), at: NOW }).await;
    apply(&store, &id, destroy(0, later(9))).await;
    assert_eq!(apply(&store, &id, shred()).await, Applied::Changed(1));
    assert_eq!(apply(&store, &id, shred()).await, Applied::Changed(0), "once");
    assert_eq!(load(&store, &id).await.deks, [second]);
    assert_eq!(store.highest_deks(std::slice::from_ref(&id)).await.unwrap(), [(id.clone(), 2)].into());
    let late = WriteOp::PutKeys(vec![key(9, 1)]);
    assert!(store.apply(&writes(&id, vec![late])).await.is_err(), "nothing is put under it any more");
}

async fn an_erased_stream_leaves_nothing(database: Database) {
    let (store, id) = database.with_stream().await;
    put(&store, &id, &[key(5, 0), key(6, 1)]).await;
    store.add_boundaries(&id, &[boundary(0, 0, 1)], &rendition(9, 0), NOW).await.unwrap();
    let removed = store.erase_stream(&id, later(5)).await.unwrap().unwrap();
    assert_eq!((removed.deks, removed.keys, removed.renditions), (1, 2, 1));
    assert_eq!(store.key_history(&id, false, None, 10).await.unwrap(), []);
    let left = load(&store, &id).await.stream;
    assert_eq!((left.state, left.playlist_url.as_str()), (StreamState::Deleted, ""));
    assert_eq!((left.cdn, left.request), (CdnRow::default(), None));
    assert_eq!(store.erase_stream(&"none".parse().unwrap(), NOW).await.unwrap(), None);
}

async fn an_update_is_seen_as_a_change(database: Database) {
    let (store, id) = database.with_stream().await;
    let mut news = store.news().await.unwrap();
    let before = load(&store, &id).await.stream;
    let stop = |row| Some(StreamRow { state: StreamState::Stopped, ..row });
    let updated = store.update_stream(&id, later(7), stop).await.unwrap().unwrap();
    assert_eq!((updated.state, updated.updated_at), (StreamState::Stopped, later(7)));
    if matches!(database.location, Location::Postgres(_)) {
        tokio::time::timeout(Duration::from_secs(5), news.next()).await.expect("news come").unwrap();
    }
    let changes = store.changes(0).await.unwrap();
    assert_eq!(changes.streams, [(id, updated.rev)]);
    assert!(updated.rev > before.rev);
    // What is committed a moment later may bear an earlier time: the next question reaches back.
    assert_eq!(store.changes(changes.next).await.unwrap().streams.len(), 1);
    assert_eq!(store.changes(changes.next + 3_600_000).await.unwrap().streams, []);
}

async fn of_two_who_change_a_stream_neither_undoes_what_the_other_did(database: Database) {
    let (store, id) = database.with_stream().await;
    let stop = |row| Some(StreamRow { state: StreamState::Stopped, ..row });
    let move_on = |row| Some(StreamRow { playlist_path: "/live/other.m3u8".into(), ..row });
    let (stopped, moved) =
        tokio::join!(store.update_stream(&id, NOW, stop), store.update_stream(&id, NOW, move_on));
    assert!(stopped.unwrap().is_some() && moved.unwrap().is_some());
    let there = load(&store, &id).await.stream;
    assert_eq!((there.state, there.playlist_path.as_str()), (StreamState::Stopped, "/live/other.m3u8"));
    assert_eq!(store.update_stream(&id, NOW, |_| None).await.unwrap(), None);
    assert_eq!(load(&store, &id).await.stream, there, "nothing was changed");
}

async fn reports_say_the_same_in_whatever_order_they_come(database: Database) {
    let (store, id) = database.with_stream().await;
    store.add_boundaries(&id, &[boundary(0, 0, 90)], &rendition(98, 0), NOW).await.unwrap();
    let rev = load(&store, &id).await.stream.rev;
    let long = RenditionRow { longest_playlist: Duration::from_secs(90), ..rendition(110, 3) };
    let new = RenditionRow { ended: true, keeps_all: true, ..rendition(120, 9) };
    let expected =
        RenditionRow { longest_playlist: Duration::from_secs(90), last_served_at: later(9), ..new.clone() };
    for order in [[&long, &new], [&new, &long]] {
        for row in order {
            let served = Served { renditions: vec![(id.clone(), row.clone())], keys: vec![] };
            store.report(&served).await.unwrap();
        }
        assert_eq!(load(&store, &id).await.renditions, std::slice::from_ref(&expected));
    }
    // A new run of numbers is newer than the highest of the old one.
    let reset = RenditionRow { epoch: 1, ..rendition(10, 12) };
    store.report(&Served { renditions: vec![(id.clone(), reset.clone())], keys: vec![] }).await.unwrap();
    let (heard, next) = store.reports_since(0).await.unwrap();
    assert_eq!(heard.renditions[0].1.edge, reset.edge);
    assert_eq!(store.reports_since(next + 3_600_000).await.unwrap().0.renditions, []);
    assert_eq!(load(&store, &id).await.stream.rev, rev, "a report is no change");
    let gone = Served { renditions: vec![("gone".parse().unwrap(), rendition(9, 0))], keys: vec![] };
    store.report(&gone).await.unwrap();
}

async fn a_lease_is_held_by_one_until_it_runs_out(database: Database) {
    let store = database.open().await;
    let (long, short) = (Duration::from_secs(600), Duration::from_millis(1));
    let hold = async |name, holder, length| store.hold_lease(name, holder, length).await.unwrap();
    assert_eq!(hold("sweep", "a", long).await, Lease::Held);
    let Lease::Taken { expires_in } = hold("sweep", "b", long).await else { panic!("it is taken") };
    assert!(expires_in <= long && expires_in > long - SOON, "{expires_in:?}");
    assert_eq!(hold("other", "b", long).await, Lease::Held);
    assert_eq!(hold("sweep", "a", short).await, Lease::Held, "the holder may renew it");
    let taken_over = async {
        while let Lease::Taken { expires_in } = hold("sweep", "b", long).await {
            assert!(expires_in <= short, "{expires_in:?}");
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), taken_over).await.expect("it runs out");
    assert_ne!(hold("sweep", "a", long).await, Lease::Held);
    store.leave("b").await.unwrap();
    assert_eq!(hold("sweep", "a", long).await, Lease::Held, "given up at once");
}

async fn a_lease_is_looked_at_and_given_up_by_its_holder(database: Database) {
    let store = database.open().await;
    assert_eq!(store.lease_holder("re-wrap").await.unwrap(), None);
    store.hold_lease("re-wrap", "a", Duration::from_secs(60)).await.unwrap();
    assert_eq!(store.lease_holder("re-wrap").await.unwrap().as_deref(), Some("a"));
    store.give_up_lease("re-wrap", "b").await.unwrap();
    assert_eq!(store.lease_holder("re-wrap").await.unwrap().as_deref(), Some("a"), "it is another's");
    store.give_up_lease("re-wrap", "a").await.unwrap();
    assert_eq!(store.lease_holder("re-wrap").await.unwrap(), None);
}

async fn a_node_that_is_silent_is_missing_until_it_is_given_up(database: Database) {
    let store = database.open().await;
    let (soon, hour) = (Duration::from_millis(1), Duration::from_secs(3600));
    store.beat("a").await.unwrap();
    assert!(!store.is_a_node_missing(hour, hour).await.unwrap());
    let missing = async |dead_after| {
        tokio::time::timeout(Duration::from_secs(5), async {
            while !store.is_a_node_missing(soon, dead_after).await.unwrap() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .is_ok()
    };
    assert!(missing(hour).await);
    store.beat("a").await.unwrap();
    assert!(!store.is_a_node_missing(hour, hour).await.unwrap(), "it is back");
    assert!(missing(hour).await);
    assert!(!store.is_a_node_missing(Duration::ZERO, soon).await.unwrap(), "given up");
}

async fn the_history_of_keys_comes_in_pages(database: Database) {
    let (store, id) = database.with_stream().await;
    let keys: Vec<_> = (0..5).map(|n| key(5 + n, u32::from(n))).collect();
    put(&store, &id, &keys).await;
    apply(&store, &id, promote(2, Reason::Start, NOW)).await;
    let page = async |promoted, before: Option<u32>| -> Vec<u32> {
        let rows = store.key_history(&id, promoted, before.map(Ordinal), 2).await.unwrap();
        rows.iter().map(|key| key.ordinal.0).collect()
    };
    assert_eq!(page(false, None).await, [4, 3]);
    assert_eq!(page(false, Some(3)).await, [2, 1]);
    assert_eq!(page(true, None).await, [2, 1]);
    assert_eq!(page(true, Some(1)).await, [0]);
}

async fn many_streams_are_loaded_in_their_order(database: Database) {
    let store = database.open().await;
    let mut ids = Vec::new();
    for n in 0..60_u8 {
        let row = stream(&format!("ch{n:03}"), &format!("/{n:03}/"));
        store.register(&row).await.unwrap();
        let own = DekRow { id: DekId::from_bytes([n; 16]), ..dek(n, 1) };
        put_dek(&store, &row.id, own.clone()).await;
        put(&store, &row.id, &[KeyRow { dek: own.id, ..key(n, 0) }]).await;
        ids.push(row.id);
    }
    assert_eq!(store.stream_ids("", 25).await.unwrap(), ids[..25]);
    assert_eq!(store.stream_ids("ch024", 100).await.unwrap(), ids[25..]);
    let loaded = store.load(&ids).await.unwrap();
    assert_eq!(loaded.iter().map(|s| s.stream.id.clone()).collect::<Vec<_>>(), ids);
    for (n, stored) in (0..60).zip(&loaded) {
        assert_eq!(stored.keys[0].id, KeyId::from_bytes([n; 16]), "each has its own");
        assert_eq!(stored.deks.len(), 1);
    }
}

async fn renditions_that_nobody_asks_for_are_forgotten(database: Database) {
    let (store, id) = database.with_stream().await;
    store.add_boundaries(&id, &[boundary(0, 0, 1)], &rendition(9, 0), NOW).await.unwrap();
    let kept = RenditionRow { rendition: "/live/vod.m3u8".into(), keeps_all: true, ..rendition(9, 0) };
    let mut first = boundary(0, 0, 1);
    first.0.rendition = kept.rendition.clone();
    store.add_boundaries(&id, &[first], &kept, NOW).await.unwrap();
    assert_eq!(store.forget_renditions(NOW).await.unwrap(), 0);
    assert_eq!(store.forget_renditions(later(1)).await.unwrap(), 1);
    let left = load(&store, &id).await;
    assert_eq!((left.renditions.len(), left.boundaries.len()), (1, 1));
    assert_eq!(left.renditions[0].rendition, kept.rendition);
}

async fn what_was_stored_is_there_after_opening_again(database: Database) {
    let (store, id) = database.with_stream().await;
    put(&store, &id, &[key(5, 0)]).await;
    let far = (1 << 62) - 8;
    store.add_boundaries(&id, &[boundary(0, 0, far)], &rendition(far + 8, 3), NOW).await.unwrap();
    let before = load(&store, &id).await;
    assert_eq!(before.boundaries[0].boundary.first, MediaSequenceNumber(far));
    store.close().await;
    assert_eq!(load(&database.open().await, &id).await, before);
}

#[tokio::test]
async fn what_is_destroyed_is_in_no_file_of_sqlite_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&Location::Sqlite(dir.path().join("store.db")), 8).await.unwrap();
    let hold = |bytes: &[u8]| -> Vec<String> {
        let files = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().path());
        let held =
            files.filter(|path| std::fs::read(path).unwrap().windows(bytes.len()).any(|part| part == bytes));
        held.map(|path| path.display().to_string()).collect()
    };
    let wrapped = |n: u8| KeyRow { wrapped: vec![n; 76], dek: DekId::from_bytes([n; 16]), ..key(n, 0) };
    for (n, name) in [(0xA1, "destroyed"), (0xA2, "deleted"), (0xA3, "erased")] {
        let row = stream(name, &format!("/{name}/"));
        store.register(&row).await.unwrap();
        put_dek(&store, &row.id, DekRow { wrapped: vec![n + 16; 60], ..dek(n, 1) }).await;
        put(&store, &row.id, &[wrapped(n)]).await;
        assert_ne!(hold(&[n; 76]), [""; 0], "it is stored");
        match name {
            "destroyed" => {
                apply(&store, &row.id, promote(0, Reason::Start, NOW)).await;
                apply(&store, &row.id, WriteOp::Deactivate { ordinal: Ordinal(0), at: NOW }).await;
                assert_eq!(apply(&store, &row.id, destroy(0, NOW)).await, Applied::Changed(1));
            }
            "deleted" => assert!(store.delete_stream(&row.id, NOW).await.unwrap()),
            _ => assert!(store.erase_stream(&row.id, NOW).await.unwrap().is_some()),
        }
        assert_eq!(hold(&[n; 76]), [""; 0], "the key of the {name} one");
        if name != "destroyed" {
            assert_eq!(hold(&[n + 16; 60]), [""; 0], "the DEK of the {name} one");
        }
    }
}

async fn work_that_waits_for_a_connection_is_no_sign_of_a_store_that_is_away(database: Database) {
    let store = Store::open(&database.location, 3).await.unwrap();
    store.register(&stream("ch1", "/live/")).await.unwrap();
    // Somebody else keeps the stream to himself, and so the one connection that is not kept for other things.
    let mut other = sqlx::AnyConnection::connect(&database.url()).await.unwrap();
    let lock = match database.location {
        Location::Sqlite(_) => "BEGIN IMMEDIATE",
        Location::Postgres(_) => "BEGIN; LOCK TABLE streams IN EXCLUSIVE MODE",
    };
    other.execute(lock).await.unwrap();
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.delete_stream(&"ch1".parse().unwrap(), NOW).await }
    });
    let refused = until("no connection is left", async || {
        let asked = store.stream_ids("", 1).await;
        store.changes(0).await.expect("what tells that the store is there goes on");
        asked.err()
    })
    .await;
    assert!(refused.is_busy() && !refused.is_away(), "{refused}");
    other.execute("ROLLBACK").await.unwrap();
    assert!(waiting.await.unwrap().unwrap());
}

#[tokio::test]
async fn a_connection_whose_other_end_fell_silent_is_given_up() {
    let postgres = Postgres::shared();
    let url = postgres.database();
    let database = url.rsplit('/').next().unwrap().to_owned();
    let store = Store::open(&Location::Postgres(url.clone()), 1).await.unwrap();
    let mut locker = PgConnection::connect(&url).await.unwrap();
    locker.execute("BEGIN; LOCK TABLE streams").await.unwrap();
    // The store's one connection for this waits for the lock while the process behind it is stopped.
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.stream_ids("", 1).await }
    });
    let waits =
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    let backend = until("the store's connection waits", async || {
        let pid = postgres.sql(&database, waits);
        (!pid.is_empty()).then_some(pid)
    })
    .await;
    let signal = |name: &str| {
        assert!(
            std::process::Command::new("kill").args([name, backend.as_str()]).status().unwrap().success()
        );
    };
    signal("-STOP");
    locker.execute("COMMIT").await.unwrap();
    let given_up = waiting.await.unwrap();
    let back = tokio::time::timeout(SOON, async { while store.stream_ids("", 1).await.is_err() {} }).await;
    signal("-CONT");
    assert!(given_up.unwrap_err().is_away());
    back.expect("another connection takes its place");
}

/// Two that wait for each other: the one that has waited for a second finds out, and is undone. Here that is the store.
#[tokio::test]
async fn a_change_that_is_undone_in_a_deadlock_is_carried_out_again() {
    let postgres = Postgres::shared();
    let url = postgres.database();
    let database = url.rsplit('/').next().unwrap().to_owned();
    // A session looks once, so long after it has begun to wait: the other must wait for it by then.
    postgres.sql("postgres", &format!("ALTER DATABASE {database} SET deadlock_timeout = '2500ms'"));
    let store = Store::open(&Location::Postgres(url.clone()), 8).await.unwrap();
    let mut ids: Vec<StreamId> = Vec::new();
    for (n, name) in [(1, "a"), (2, "b")] {
        let row = stream(name, &format!("/{name}/"));
        store.register(&row).await.unwrap();
        put_dek(&store, &row.id, dek(n, 1)).await;
        put(&store, &row.id, &[KeyRow { dek: DekId::from_bytes([n; 16]), ..key(n, 0) }]).await;
        ids.push(row.id);
    }
    let mut other = PgConnection::connect(&url).await.unwrap();
    // It is never the one that finds out.
    other
        .execute("SET deadlock_timeout = '60s'; BEGIN; SELECT 1 FROM streams WHERE id = 'b' FOR UPDATE")
        .await
        .unwrap();
    let changed = tokio::spawn({
        let store = store.clone();
        let batch: Vec<_> =
            ids.iter().flat_map(|id| writes(id, vec![promote(0, Reason::Start, NOW)])).collect();
        async move { store.apply(&batch).await }
    });
    until("the store waits for the second stream", async || {
        let waits = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND wait_event_type = 'Lock'";
        (postgres.sql(&database, waits) == "1").then_some(())
    })
    .await;
    other.execute("SELECT 1 FROM streams WHERE id = 'a' FOR UPDATE").await.unwrap();
    let undone = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    other.execute("ROLLBACK").await.unwrap();
    let (applied, _) = changed.await.unwrap().unwrap();
    assert_eq!(applied, [Applied::Changed(1), Applied::Changed(1)]);
    until("the deadlock is counted", async || (postgres.sql(&database, undone) == "1").then_some(())).await;
}

#[tokio::test]
async fn a_database_that_only_reads_is_away() {
    let postgres = Postgres::shared();
    let url = postgres.database();
    let database = url.rsplit('/').next().unwrap().to_owned();
    let store = Store::open(&Location::Postgres(url), 1).await.unwrap();
    store.beat("node").await.unwrap();
    // As a standby that has not been promoted yet.
    postgres.sql(
        "postgres",
        &format!(
            "ALTER DATABASE {database} SET default_transaction_read_only = on;
             SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
        ),
    );
    let refused = until("the database refuses", async || match store.beat("node").await {
        // The old connection, or its end.
        Ok(_) | Err(StoreError::Query(sqlx::Error::Io(_))) => None,
        Err(error) if error.to_string().contains("terminating") => None,
        Err(error) => Some(error),
    })
    .await;
    assert!(refused.to_string().contains("read-only"), "{refused}");
    assert!(refused.is_away());
}

/// Asks until there is an answer, for as long as [`SOON`].
async fn until<T>(what: &str, mut answer: impl AsyncFnMut() -> Option<T>) -> T {
    let asked = async {
        loop {
            if let Some(value) = answer().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(SOON, asked).await.unwrap_or_else(|_| panic!("{what}: not within {SOON:?}"))
}
