//! What live playlists do at their worst, and the longest that is served.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Served, config, media, served};
use crate::harness::{Running, wait_for};
use crate::origin::{Answer, Origin};

const PATH: &str = "/live/index.m3u8";

/// An origin whose playlist is what it is told to be; `None` is a 404. Segments are named after themselves.
fn start(policy: &str, first: String) -> (Arc<Mutex<Option<String>>>, Origin, Running) {
    let playlist = Arc::new(Mutex::new(Some(first)));
    let now = Arc::clone(&playlist);
    let origin = Origin::start(move |request| match request.target.split('?').next().unwrap() {
        PATH => now.lock().clone().map_or(Answer::status(404), Answer::ok),
        target => Answer::ok(media(target.rsplit('/').next().unwrap(), 5_000)),
    });
    let shield = Running::serve(&config(&origin, policy));
    (playlist, origin, shield)
}

fn playlist(first: u64, names: &[String]) -> String {
    let entries = names.iter().map(|name| format!("#EXTINF:1,\n{name}\n"));
    let entries = entries.collect::<String>();
    format!("#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:{first}\n{entries}")
}

fn names(run: &str, msns: std::ops::Range<u64>) -> Vec<String> {
    msns.map(|msn| format!("{run}-{msn}.ts")).collect()
}

/// The served playlist once it begins with this segment, and everything in it decrypted.
fn check(shield: &Running, first: u64, names: &[String]) -> Served {
    let got = wait_for("the new playlist", || {
        let got = served(shield, PATH);
        let is_new = |(segment, name): (&super::Item, &String)| {
            segment.url.split('?').next().unwrap().ends_with(name.as_str())
        };
        let same = got.segments.len() == names.len() && got.segments[0].msn == first;
        (same && got.segments.iter().zip(names).all(is_new)).then_some(got)
    });
    for (segment, name) in got.segments.iter().zip(names) {
        assert!(segment.plain() == media(name, 5_000), "{name}");
    }
    got
}

#[test]
fn numbers_that_jump_back_begin_anew_under_keys_of_their_own() {
    let (origin_says, _origin, shield) =
        start("segments_per_key = 2\n", playlist(100, &names("a", 100..105)));
    let before = check(&shield, 100, &names("a", 100..105));
    *origin_says.lock() = Some(playlist(0, &names("b", 0..4)));
    let after = check(&shield, 0, &names("b", 0..4));
    let used = |got: &Served| got.segments.iter().map(|s| s.key_id().to_owned()).collect::<Vec<_>>();
    assert!(used(&after).iter().all(|key| !used(&before).contains(key)), "a key covers one run of numbers");
    // Who still holds the earlier playlist goes on with it.
    assert!(before.segments[4].plain() == media("a-104.ts", 5_000));
    // And on it goes, up to where the numbers were before.
    *origin_says.lock() = Some(playlist(98, &names("b", 98..103)));
    let later = check(&shield, 98, &names("b", 98..103));
    for (early, late) in before.segments.iter().zip(&later.segments[2..]) {
        assert_ne!((&early.url, &early.key), (&late.url, &late.key));
    }
}

#[test]
fn a_playlist_that_shrinks_and_grows_again_keeps_its_links() {
    let (origin_says, _origin, shield) = start("segments_per_key = 2\n", playlist(10, &names("a", 10..16)));
    let before = check(&shield, 10, &names("a", 10..16));
    for msns in [10..13, 12..15, 12..18] {
        *origin_says.lock() = Some(playlist(msns.start, &names("a", msns.clone())));
        let now = check(&shield, msns.start, &names("a", msns));
        for segment in &now.segments {
            if let Some(known) = before.segments.iter().find(|known| known.msn == segment.msn) {
                assert_eq!(known, segment, "a published path never changes");
            }
        }
    }
}

#[test]
fn a_playlist_that_was_taken_away_is_not_served_stale() {
    let (origin_says, _origin, shield) = start("", playlist(10, &names("a", 10..13)));
    check(&shield, 10, &names("a", 10..13));
    *origin_says.lock() = None;
    wait_for("its end", || (shield.get(PATH).status == 404).then_some(()));
    *origin_says.lock() = Some(playlist(11, &names("a", 11..14)));
    wait_for("its return", || (shield.get(PATH).status == 200).then_some(()));
    check(&shield, 11, &names("a", 11..14));
}

#[test]
fn a_segment_that_is_repeated_has_a_link_and_an_iv_for_each_place() {
    let slate: Vec<_> = ["slate.ts", "a.ts", "slate.ts", "slate.ts"].map(str::to_owned).to_vec();
    let (_origin_says, origin, shield) = start("", playlist(1, &slate));
    let got = check(&shield, 1, &slate);
    assert_ne!(got.segments[0].url, got.segments[2].url);
    assert_ne!(got.segments[2].key, got.segments[3].key);
    assert_eq!(origin.count("/live/slate.ts"), 3);
}

#[test]
fn a_gap_is_not_linked_and_counts() {
    let text = playlist(5, &names("a", 5..8)).replace("#EXTINF:1,\na-6.ts", "#EXTINF:1,\n#EXT-X-GAP\na-6.ts");
    let (_origin_says, origin, shield) = start("segments_per_key = 1\n", text);
    let got = served(&shield, PATH);
    assert!(got.text.contains("#EXTINF:1,\n#EXT-X-GAP\na-6.ts\n"), "{}", got.text);
    for (at, name) in [(0, "a-5.ts"), (2, "a-7.ts")] {
        assert!(got.segments[at].plain() == media(name, 5_000), "{name}");
    }
    assert!(got.segments[2].url.contains(".7."), "{}", got.segments[2].url);
    assert_eq!(origin.count("/live/a-6.ts"), 0);
}

#[test]
fn line_endings_and_a_byte_order_mark_stay_as_they_are() {
    let text = playlist(5, &names("a", 5..8)).replace('\n', "\r\n");
    let (_origin_says, _origin, shield) = start("", format!("\u{feff}{text}"));
    let got = served(&shield, PATH);
    assert!(got.text.starts_with("\u{feff}#EXTM3U\r\n"), "{}", got.text);
    assert_eq!(got.text.matches('\n').count(), got.text.matches("\r\n").count());
    assert_eq!(got.segments.len(), 3);
    for (segment, name) in got.segments.iter().zip(names("a", 5..8)) {
        assert!(segment.plain() == media(&name, 5_000), "{name}");
    }
}

#[test]
fn waiting_for_a_segment_means_nothing_to_an_origin_that_does_not_wait() {
    let (_origin_says, origin, shield) = start("", playlist(5, &names("a", 5..8)));
    // The first time, the shield does not know yet.
    for _ in 0..2 {
        let waited = shield.get(&format!("{PATH}?_HLS_msn=99"));
        assert_eq!((waited.status, waited.header("cache-control")), (200, Some("public, max-age=1")));
        assert_eq!(waited.body, shield.get(PATH).body);
    }
    let told = origin.targets().iter().filter(|target| target.contains("_HLS")).count();
    assert_eq!(told, 1);
    assert_eq!(shield.get(&format!("{PATH}?_HLS_part=1")).status, 400);
}

#[test]
fn a_vod_of_100_000_segments_is_served_and_plays_to_its_end() {
    let all = names("v", 0..100_000);
    let text = playlist(0, &all) + "#EXT-X-ENDLIST\n";
    let (_origin_says, _origin, shield) = start("", text);
    let got = served(&shield, PATH);
    assert_eq!(got.segments.len(), 100_000);
    for at in [0, 50_000, 99_999] {
        assert!(got.segments[at].plain() == media(&all[at], 5_000), "{}", all[at]);
    }
}

#[test]
fn one_segment_more_is_refused_with_its_line() {
    let (_origin_says, _origin, shield) = start("", playlist(0, &names("v", 0..100_001)));
    let got = shield.get(PATH);
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("line 200006: more than 100000 segments"), "{}", got.problem());
}
