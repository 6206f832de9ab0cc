//! What a stream's policy says to the data plane.

use super::operators::{channel, id, until};
use super::*;
use crate::engine::{PolicyChange, StreamChange};
use crate::keys::{OnEncrypted, Subtitles};

/// A stream of its own under a policy.
async fn under(node: &Node, policy: Policy) -> Arc<Stream> {
    let spec = StreamSpec { policy, ..channel("ch2", "/two/") };
    node.operator.initialize(spec, "ops").await.unwrap();
    node.engine.stream_at("main", "/two/a.m3u8").unwrap()
}

#[tokio::test]
async fn what_is_published_says_how_the_origins_encryption_and_subtitles_are_treated() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    let shown = |end| Shown {
        window: live(100, end),
        duration: Duration::from_secs(16),
        target_duration: Duration::from_secs(2),
    };
    for end in [100, 105] {
        let published = node.engine.publish(&node.stream(), RENDITION, shown(end)).await.unwrap();
        assert_eq!((published.on_encrypted, published.subtitles), Default::default(), "as nothing was said");
    }
    assert_eq!(node.stream().on_encrypted(), OnEncrypted::Reject);

    let policy = Policy {
        on_encrypted: OnEncrypted::Rekey,
        subtitles: Subtitles::Clear,
        encrypt_init_sections: true,
        ..Policy::default()
    };
    let stream = under(&node, policy).await;
    assert_eq!(stream.on_encrypted(), OnEncrypted::Rekey);
    for end in [100, 105] {
        let published = node.engine.publish(&stream, "/two/a.m3u8", shown(end)).await.unwrap();
        let treatment = (published.on_encrypted, published.subtitles);
        assert_eq!(treatment, (OnEncrypted::Rekey, Subtitles::Clear), "up to {end}");
        assert!(published.encrypt_init_sections);
    }
}

#[tokio::test]
async fn a_stream_knows_where_its_main_playlist_plays() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    assert_eq!(node.stream().playlist_path(), "/live/master.m3u8");
    let stream = under(&node, Policy::default()).await;
    let elsewhere = ("https://origin.example/two/b.m3u8?quality=high", "/two/b.m3u8?quality=high");
    let change =
        StreamChange { playlist: Some((elsewhere.0.into(), elsewhere.1.into())), ..StreamChange::default() };
    node.operator.update(&stream.id, change, "ops").await.unwrap();
    assert_eq!(stream.playlist_path(), elsewhere.1);
}

#[tokio::test]
async fn the_newest_key_is_named_for_the_session_where_the_policy_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), Clock::manual(START)).await;
    assert!(node.stream().session_key().is_none(), "nobody asked for it");

    let asked = Policy { session_keys: true, ..Policy::default() };
    let stream = under(&node, asked.clone()).await;
    let named = |stream: &Stream| stream.session_key().map(|key| key.id);
    let first = named(&stream).expect("a stream has a key once it has begun");
    let rotated = node.operator.rotate(&stream.id, "ops").await.unwrap();
    assert_eq!(rotated.previous.unwrap().id, first);
    assert_eq!(named(&stream), Some(rotated.key.id));

    let revocation = node.operator.revoke(&stream.id, None, "leaked", "sec").await.unwrap();
    assert_eq!(named(&stream), Some(revocation.successor.id), "a revoked key is not named");

    let to = Policy { session_keys: false, ..asked.clone() };
    let change = StreamChange { policy: Some(PolicyChange { from: asked, to }), ..StreamChange::default() };
    node.operator.update(&stream.id, change, "ops").await.unwrap();
    assert_eq!(named(&stream), None, "nobody asks for it any more");
}

#[tokio::test]
async fn two_nodes_name_the_same_key_for_the_session_and_a_stopped_stream_none() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let one = Node::start(dir.path(), clock.clone()).await;
    let two = Node::start(dir.path(), clock).await;
    let here = under(&one, Policy { session_keys: true, ..Policy::default() }).await;
    one.operator.rotate(&here.id, "ops").await.unwrap();
    let named = |stream: &Stream| stream.session_key().map(|key| key.id);
    let there = async || two.engine.stream_at("main", "/two/a.m3u8").and_then(|stream| named(&stream));
    let newest = named(&here);
    assert!(newest.is_some() && here.id != id());
    until(async || there().await == newest).await;
    one.operator.stop(&here.id, "ops").await.unwrap();
    assert_eq!(named(&here), None);
    until(async || there().await.is_none()).await;
}
