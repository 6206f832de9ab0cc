//! `session_keys`: the key that players may load before a Media Playlist names it.

use serde_json::{Value, json};

use super::{config, media, served};
use crate::control_api::{call, tokens};
use crate::harness::{Running, get, wait_for};
use crate::ll_playlist::attribute;
use crate::origin::{Answer, Origin};

const MASTER: &str = "/live/index.m3u8";
const MEDIA: &str = "/live/720p.m3u8";

fn start(policy: &str) -> (Origin, Running) {
    let origin = Origin::start(|request| match request.target.as_str() {
        MASTER => Answer::ok("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n720p.m3u8\n"),
        MEDIA => Answer::ok("#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXTINF:4,\nb.ts\n"),
        target => Answer::ok(media(target, 5_000)),
    });
    let shield = Running::serve(&config(&origin, &format!("{policy}{}", tokens())));
    (origin, shield)
}

/// The key's ID, from the only EXT-X-SESSION-KEY.
fn named(shield: &Running) -> String {
    let text = shield.get(MASTER).text();
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("#EXT-X-SESSION-KEY:")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(text.find(lines[0]) < text.find("#EXT-X-STREAM-INF"), "{text}");
    attribute(lines[0], "URI").unwrap().rsplit('/').next().unwrap().to_owned()
}

#[test]
fn the_key_of_the_segments_is_named_early() {
    for method in ["AES-128", "AES-256-GCM"] {
        let (_origin, shield) = start(&format!("session_keys = true\nkey_method = \"{method}\"\n"));
        let text = shield.get(MASTER).text();
        assert!(text.contains(&format!("#EXT-X-SESSION-KEY:METHOD={method},URI=")), "{text}");
        let segment = served(&shield, MEDIA).segments.remove(0);
        assert_eq!(named(&shield), segment.key_id());
        let got = shield.get(MASTER);
        assert!(got.header("surrogate-key").unwrap().contains(segment.key_id()), "it is purged with its key");
        assert_eq!(shield.get(&format!("/api/hls/keys/{}", segment.key_id())).status, 200);
    }
}

#[test]
fn nobody_is_told_unless_the_policy_says_so() {
    let (_origin, shield) = start("");
    assert!(!shield.get(MASTER).text().contains("SESSION-KEY"));
}

#[test]
fn after_a_rotation_the_new_key_is_named_within_the_playlists_freshness() {
    let (_origin, shield) = start("session_keys = true\n");
    let before = named(&shield);
    let rotated = call(&shield, "POST", "/live/rotate", Value::Null).ok();
    let after = wait_for("the new key", || Some(named(&shield)).filter(|now| *now != before));
    assert!(rotated.to_string().contains(&after), "{rotated}");
    assert_eq!(get(&shield.at(&format!("/api/hls/keys/{after}"))).status, 200);
}

#[test]
fn a_revoked_key_is_gone_from_the_playlist_at_once() {
    let (_origin, shield) = start("session_keys = true\n");
    let before = named(&shield);
    call(&shield, "POST", "/live/emergency-revoke", json!({"reason": "found on a forum"})).ok();
    let after = named(&shield);
    assert_ne!(after, before);
    assert_eq!(after, served(&shield, MEDIA).segments[0].key_id());
    assert_eq!(shield.get(&format!("/api/hls/keys/{before}")).status, 410);
}
