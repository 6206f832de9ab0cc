//! Operators' calls, on one node and as another one sees them.

use super::*;
use crate::engine::{OperatorError, PolicyChange, StreamChange, StreamState};
use crate::keys::{KeyId, KeyMethod, KeyState};

pub(super) fn channel(id: &str, prefix: &str) -> StreamSpec {
    StreamSpec { id: id.parse().unwrap(), prefix: prefix.into(), ..spec() }
}

pub(super) fn id() -> crate::keys::StreamId {
    "ch1".parse().unwrap()
}

/// Waits until `what` holds on a node that hears of it by the store.
pub(super) async fn until(mut what: impl AsyncFnMut() -> bool) {
    let holds = async {
        while !what().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), holds).await.expect("it comes about");
}

#[tokio::test]
async fn the_same_initialization_twice_is_one_stream() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let first = node.operator.initialize(channel("ch2", "/two/"), "ops").await.unwrap();
    assert!(first.created);
    assert_eq!(first.stream.current_key.as_ref().unwrap().ordinal.0, 0, "it has a key at once");
    let again = node.operator.initialize(channel("ch2", "/two/"), "ops").await.unwrap();
    assert_eq!((again.created, again.stream), (false, first.stream));

    let other = StreamSpec { policy: Policy::default(), ..channel("ch2", "/two/") };
    let refused = node.operator.initialize(other, "ops").await.unwrap_err();
    assert!(matches!(&refused, OperatorError::Differs { field, .. } if field == "config"), "{refused}");
    let refused = node.operator.initialize(channel("ch3", "/two/"), "ops").await.unwrap_err();
    assert!(refused.to_string().contains("belongs to stream ch2"), "{refused}");
    let listed = node.operator.streams(None, 10).await.unwrap();
    assert_eq!(listed.iter().map(|s| s.spec.id.as_str()).collect::<Vec<_>>(), ["ch1", "ch2"]);
}

#[tokio::test]
async fn the_same_call_is_the_same_stream_whatever_its_rules_have_come_to() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let asking = |request: serde_json::Value, policy: Policy| StreamSpec {
        request: Some(request),
        policy,
        ..channel("ch2", "/two/")
    };
    let call = serde_json::json!({"playlistUrl": "https://o/a", "config": {"segmentsPerKey": 10}});
    let first = node.operator.initialize(asking(call.clone(), spec().policy), "ops").await.unwrap();
    let to = Policy { segments_per_key: 3, ..spec().policy };
    let policy = Some(PolicyChange { from: spec().policy, to: to.clone() });
    let change = StreamChange { policy, ..StreamChange::default() };
    node.operator.update(&first.stream.spec.id, change, "ops").await.unwrap();
    // By a node whose configuration fills in otherwise what the call leaves out.
    let elsewhere = Policy { grace_period: Duration::from_secs(7), ..spec().policy };
    let again = node.operator.initialize(asking(call, elsewhere.clone()), "ops").await.unwrap();
    assert_eq!((again.created, again.stream.spec.policy), (false, to), "it is found as it is");

    for (other, differing) in [
        (serde_json::json!({"playlistUrl": "https://o/b", "config": {"segmentsPerKey": 10}}), "playlistUrl"),
        (
            serde_json::json!({"playlistUrl": "https://o/a", "config": {"segmentsPerKey": 11}}),
            "config.segmentsPerKey",
        ),
        (serde_json::json!({"playlistUrl": "https://o/a", "config": {}}), "config.segmentsPerKey"),
    ] {
        let refused = node.operator.initialize(asking(other, elsewhere.clone()), "ops").await.unwrap_err();
        assert!(matches!(&refused, OperatorError::Differs { field, .. } if field == differing), "{refused}");
    }
}

#[tokio::test]
async fn a_manual_rotation_takes_every_rendition_over_a_lead_past_its_edge() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let before = node.published(RENDITION, 100, 104).await;
    let rotation = node.operator.rotate(&id(), "alice").await.unwrap();
    assert_eq!(rotation.previous.unwrap().id.to_string(), before[0].1);
    assert_eq!(rotation.key.activated_for.as_deref(), Some("manual"));
    assert_eq!(rotation.key.activated_by.as_deref(), Some("alice"));
    node.until_boundaries(2, 100, 104).await;
    let after = node.published(RENDITION, 100, 108).await;
    assert_eq!(after[..4], before[..4]);
    assert_eq!((keys(&after), after[6].1.clone()), (2, rotation.key.id.to_string()));
    let history = node.operator.rotations(&id(), None, 10).await.unwrap();
    let reasons: Vec<_> = history.iter().map(|key| key.activated_for.clone().unwrap()).collect();
    assert_eq!(reasons, ["manual", "start"]);
}

#[tokio::test]
async fn a_revoked_key_is_replaced_in_what_was_published_and_paths_stay() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let window = live(100, 105);
    let published = node.publish(RENDITION, window, Duration::from_secs(16)).await;
    let leaked = Arc::clone(&published.key_at(MediaSequenceNumber(100)).unwrap().signer);
    assert!(leaked.may_be_named());

    let revocation = node.operator.revoke(&id(), None, "leaked", "sec").await.unwrap();
    assert_eq!(revocation.revoked.iter().map(|key| key.id).collect::<Vec<_>>(), [leaked.id]);
    assert_eq!(revocation.transition, Duration::from_secs(4), "two Target Durations");
    assert!(!leaked.may_be_named());
    let listed = node.operator.keys(&id(), None, 10).await.unwrap();
    for info in [&revocation.revoked[0], listed.iter().find(|key| key.id == leaked.id).unwrap()] {
        assert_eq!((info.revoked_by.as_deref(), info.revoked_for.as_deref()), (Some("sec"), Some("leaked")));
    }

    let published = node.publish(RENDITION, window, Duration::from_secs(16)).await;
    let shown = published.key_at(MediaSequenceNumber(100)).unwrap();
    assert_eq!(shown.signer.id, leaked.id, "the path stays");
    assert_eq!(shown.cipher.id, revocation.successor.id);
    let chain = node.engine.successors(&leaked);
    assert_eq!(chain.iter().map(|key| key.id).collect::<Vec<_>>(), [revocation.successor.id]);

    // The successor leaks too.
    let second = node.operator.revoke(&id(), Some(revocation.successor.id), "again", "sec").await.unwrap();
    let published = node.publish(RENDITION, window, Duration::from_secs(16)).await;
    assert_eq!(published.key_at(MediaSequenceNumber(100)).unwrap().cipher.id, second.successor.id);
    let refused = node.operator.revoke(&id(), Some(leaked.id), "again", "sec").await.unwrap_err();
    assert!(matches!(refused, OperatorError::NotRevocable { state: "compromised", .. }), "{refused}");
    let unknown = KeyId::from_bytes([9; 16]);
    let refused = node.operator.revoke(&id(), Some(unknown), "x", "sec").await.unwrap_err();
    assert!(matches!(refused, OperatorError::NoKey { .. }), "{refused}");
}

#[tokio::test]
async fn a_revocation_and_a_restart_leave_the_same_playlist() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let node = Node::start(dir.path(), clock.clone()).await;
    node.published(RENDITION, 100, 125).await;
    node.operator.revoke(&id(), None, "leaked", "sec").await.unwrap();
    let before = node.published(RENDITION, 100, 125).await;
    assert_eq!(keys(&before), 1, "one successor for all that leaked");
    node.sweeps.abort();
    let again = Node::start(dir.path(), clock).await;
    assert_eq!(again.published(RENDITION, 100, 125).await, before);
}

#[tokio::test]
async fn what_one_node_does_another_knows() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let one = Node::start(dir.path(), clock.clone()).await;
    let two = Node::start(dir.path(), clock).await;
    one.operator.initialize(channel("ch2", "/two/"), "ops").await.unwrap();
    until(async || two.engine.stream_at("main", "/two/a.m3u8").is_some()).await;

    let key = one.published(RENDITION, 100, 108).await[0].1.parse::<KeyId>().unwrap();
    assert_eq!(two.engine.key(key).await.unwrap().id, key);
    one.operator.revoke(&id(), None, "leaked", "sec").await.unwrap();
    until(async || two.engine.key(key).await.unwrap().revoked().is_some()).await;
    assert_eq!(two.published(RENDITION, 100, 108).await, one.published(RENDITION, 100, 108).await);

    // A key that was made a moment ago is asked for before its news have come.
    let made = one.operator.rotate(&id(), "ops").await.unwrap().key.id;
    assert!(two.engine.key(made).await.is_some());

    one.operator.stop(&"ch2".parse().unwrap(), "ops").await.unwrap();
    until(async || !two.engine.stream_at("main", "/two/a.m3u8").unwrap().is_running()).await;
    one.operator.delete(&"ch2".parse().unwrap(), "ops").await.unwrap();
    until(async || two.engine.stream_at("main", "/two/a.m3u8").is_none()).await;
}

#[tokio::test]
async fn nodes_that_begin_a_stream_at_once_have_one_key_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(Node::start(dir.path(), clock.clone()).await);
    }
    for n in 0..10 {
        let spec = channel(&format!("new{n}"), &format!("/new{n}/"));
        let begun = nodes.iter().map(|node| {
            let (operator, spec) = (node.operator.clone(), spec.clone());
            tokio::spawn(async move { operator.initialize(spec, "ops").await.unwrap() })
        });
        let begun: Vec<_> = begun.collect();
        let mut initialized = Vec::new();
        for begun in begun {
            initialized.push(begun.await.unwrap());
        }
        assert_eq!(initialized.iter().filter(|i| i.created).count(), 1, "one made it");
        let ids: Vec<_> =
            initialized.iter().map(|i| i.stream.current_key.as_ref().map(|key| key.id)).collect();
        assert!(ids[0].is_some() && ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let erased = nodes[0].operator.erase(&spec.id, "ops").await.unwrap();
        assert_eq!(erased.data_encryption_keys, 1);
    }
}

#[tokio::test]
async fn a_successor_that_another_nodes_playlist_names_is_heard_of_before_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let one = Node::start(dir.path(), clock.clone()).await;
    // News come to it when it asks for them, and no sooner.
    let two = Node::start_polling(dir.path(), clock, Duration::from_secs(600)).await;
    let key = one.published(RENDITION, 100, 108).await[0].1.parse::<KeyId>().unwrap();
    let there = two.engine.key(key).await.unwrap();
    let successor = one.operator.revoke(&id(), None, "leaked", "sec").await.unwrap().successor;
    assert!(there.revoked().is_none(), "not heard of yet");
    let found = two.engine.successor(&there, successor.ordinal).await.unwrap();
    assert_eq!(found.unwrap().id, successor.id);
    assert!(there.revoked().is_some());
    assert!(two.engine.successor(&there, successor.ordinal.next()).await.unwrap().is_none());
}

#[tokio::test]
async fn a_stopped_stream_serves_nothing_until_it_is_initialized_again() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let spec = channel("ch2", "/two/");
    let begun = node.operator.initialize(spec.clone(), "ops").await.unwrap();
    let key = begun.stream.current_key.unwrap().id;
    assert!(node.engine.key(key).await.is_some());
    let stopped = node.operator.stop(&spec.id, "ops").await.unwrap();
    assert_eq!(stopped.state, StreamState::Stopped);
    assert!(node.engine.key(key).await.is_none());
    let refused = node.operator.rotate(&spec.id, "ops").await.unwrap_err();
    assert!(matches!(refused, OperatorError::Stopped(_)), "{refused}");
    let resumed = node.operator.initialize(spec, "ops").await.unwrap();
    assert_eq!((resumed.created, resumed.stream.state), (false, StreamState::Running));
    assert!(node.engine.key(key).await.is_some(), "its keys were kept");
}

#[tokio::test]
async fn a_deleted_stream_leaves_its_history_and_an_erased_one_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let spec = channel("ch2", "/two/");
    let key = node.operator.initialize(spec.clone(), "ops").await.unwrap().stream.current_key.unwrap().id;
    node.operator.delete(&spec.id, "ops").await.unwrap();
    assert!(node.engine.key(key).await.is_none());
    let gone = node.operator.stream(&spec.id).await.unwrap_err();
    assert!(matches!(gone, OperatorError::NoStream(_)), "{gone}");
    let history = node.operator.keys(&spec.id, None, 10).await.unwrap();
    assert!(!history.is_empty() && history.iter().all(|key| key.state == KeyState::Destroyed));

    let anew = node.operator.initialize(spec.clone(), "ops").await.unwrap();
    assert!(anew.created);
    let first = anew.stream.current_key.unwrap();
    assert!(first.ordinal > history[0].ordinal, "ordinals go on behind the old ones");
    let erased = node.operator.erase(&spec.id, "dpo").await.unwrap();
    assert_eq!(erased.content_keys as usize, history.len() * 2);
    assert_eq!(erased.data_encryption_keys, 2);
    assert!(node.operator.keys(&spec.id, None, 10).await.is_err());
    let refused = node.operator.erase(&id(), "dpo").await.unwrap_err();
    assert!(matches!(refused, OperatorError::Configured(_)), "{refused}");
}

#[tokio::test]
async fn a_new_policy_holds_from_the_next_key_on() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let spec = channel("ch2", "/two/");
    node.operator.initialize(spec.clone(), "ops").await.unwrap();
    let stream = node.engine.stream_at("main", "/two/a.m3u8").unwrap();
    let shown = |first, end| Shown {
        window: live(first, end),
        duration: Duration::from_secs(16),
        target_duration: Duration::from_secs(2),
    };
    node.engine.publish(&stream, "/two/a.m3u8", shown(100, 105)).await.unwrap();
    let change = StreamChange {
        policy: Some(PolicyChange {
            from: spec.policy.clone(),
            to: Policy { segments_per_key: 3, ..spec.policy.clone() },
        }),
        ..StreamChange::default()
    };
    let updated = node.operator.update(&spec.id, change.clone(), "ops").await.unwrap();
    assert_eq!(updated.spec.policy.segments_per_key, 3);
    let late = node.operator.update(&spec.id, change.clone(), "ops").await.unwrap_err();
    assert!(
        matches!(late, OperatorError::Overtaken(_)),
        "it was made from what is not there any more: {late}"
    );
    let published = node.engine.publish(&stream, "/two/a.m3u8", shown(100, 116)).await.unwrap();
    let key = |msn| published.key_at(MediaSequenceNumber(msn)).unwrap().cipher.ordinal.0;
    assert_eq!([key(105), key(109), key(110), key(112), key(113)], [0, 0, 1, 1, 2]);
    let refused = node.operator.update(&id(), change, "ops").await.unwrap_err();
    assert!(matches!(refused, OperatorError::Configured(_)), "{refused}");
}

#[tokio::test]
async fn a_new_method_shows_when_the_keys_that_wait_have_had_their_turn() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let spec = channel("ch2", "/two/");
    node.operator.initialize(spec.clone(), "ops").await.unwrap();
    let to = Policy { key_method: KeyMethod::Aes256, ..spec.policy.clone() };
    let policy = Some(PolicyChange { from: spec.policy, to });
    node.operator.update(&spec.id, StreamChange { policy, ..StreamChange::default() }, "ops").await.unwrap();
    let mut methods = Vec::new();
    for _ in 0..4 {
        methods.push(node.operator.rotate(&spec.id, "ops").await.unwrap().key.method);
    }
    use KeyMethod::{Aes128, Aes256};
    assert_eq!(methods, [Aes128, Aes128, Aes128, Aes256], "three keys waited");
}

#[tokio::test]
async fn what_is_stored_is_done_though_it_cannot_be_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let spec = channel("ch2", "/two/");
    node.operator.initialize(spec.clone(), "ops").await.unwrap();
    // A key that does not unwrap, as one of another node under a DEK that is wrapped by an unknown master key.
    let damage = "INSERT INTO content_keys (id, stream_id, ordinal, dek_id, method, iv_mode, wrapped, state, forced,
                                            created_at)
                  SELECT 'ffffffffffffffffffffffffffffffff', stream_id, 99, dek_id, method, iv_mode, zeroblob(80),
                         'pre-active', 0, 0
                  FROM content_keys WHERE stream_id = 'ch2' AND ordinal = 0";
    sqlx::query(damage).execute(&database(dir.path()).await).await.unwrap();
    let moved = ("https://origin.example/two/b.m3u8".to_owned(), "/two/b.m3u8".to_owned());
    let change = StreamChange { playlist: Some(moved), ..StreamChange::default() };
    let updated = node.operator.update(&spec.id, change, "ops").await.unwrap();
    assert_eq!(updated.spec.playlist_path, "/two/b.m3u8", "it is answered from what was stored");
    let stopped = node.operator.stop(&spec.id, "ops").await.unwrap();
    assert_eq!(stopped.state, StreamState::Stopped);
    assert!(!node.engine.stream_at("main", "/two/a.m3u8").unwrap().is_running());
    let failed = node.operator.revoke(&spec.id, None, "leaked", "sec").await.unwrap_err();
    assert!(matches!(failed, OperatorError::Failed(_)), "nothing was stored: {failed}");
    let moved = StreamSpec { playlist_url: "https://origin.example/two/b.m3u8".into(), ..spec };
    let unknown = node.operator.initialize(moved, "ops").await.unwrap_err();
    assert!(matches!(unknown, OperatorError::Unknown(_)), "it runs again, and cannot be read: {unknown}");
}

#[tokio::test]
async fn revocation_can_be_forbidden() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let policy = Policy { emergency_rotation: false, ..Policy::default() };
    let spec = StreamSpec { policy, ..channel("ch2", "/two/") };
    node.operator.initialize(spec.clone(), "ops").await.unwrap();
    let refused = node.operator.revoke(&spec.id, None, "leaked", "sec").await.unwrap_err();
    assert!(matches!(refused, OperatorError::RevocationDisabled(_)), "{refused}");
}
