//! `subtitles`: WebVTT in clear for players that do not decrypt text, or encrypted like everything else.

use super::{config, served};
use crate::harness::Running;
use crate::origin::{Answer, Origin};

const PATH: &str = "/live/en.m3u8";
const CUES: &str = "WEBVTT\n\n00:00.000 --> 00:04.000\nGood evening.\n";

fn start(policy: &str, extra: &'static str) -> (Origin, Running) {
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(format!(
            "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n0.vtt\n#EXTINF:4,\n1.WebVTT?sig=a%2Fb\n{extra}"
        )),
        _ => Answer::ok(CUES).header("Content-Type", "text/vtt"),
    });
    let shield = Running::serve(&config(&origin, policy));
    (origin, shield)
}

#[test]
fn clear_subtitles_come_as_they_are_behind_links() {
    let (origin, shield) = start("subtitles = \"clear\"\n", "");
    let got = served(&shield, PATH);
    assert!(!got.text.contains("#EXT-X-KEY"), "{}", got.text);
    for segment in &got.segments {
        let answer = segment.fetch();
        assert_eq!((answer.text().as_str(), answer.header("content-type")), (CUES, Some("text/vtt")));
    }
    assert_eq!(origin.count("/live/1.WebVTT?sig=a%2Fb"), 1);
    assert_eq!(shield.get("/live/0.vtt").status, 403);
}

#[test]
fn subtitles_are_encrypted_by_default() {
    let (_origin, shield) = start("", "");
    for segment in served(&shield, PATH).segments {
        assert!(segment.key.is_some());
        assert_ne!(segment.fetch().body, CUES.as_bytes());
        assert_eq!(segment.plain(), CUES.as_bytes());
    }
}

#[test]
fn a_playlist_with_anything_else_in_it_is_no_playlist_of_subtitles() {
    let (_origin, shield) = start("subtitles = \"clear\"\n", "#EXTINF:4,\n2.ts\n");
    let got = served(&shield, PATH);
    assert!(got.segments.iter().all(|segment| segment.key.is_some()), "{}", got.text);
}
