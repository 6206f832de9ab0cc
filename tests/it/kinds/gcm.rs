//! AES-256-GCM: a segment is its IV, its ciphertext and its tag.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::{Item, config, failure, media, part_of, served};
use crate::harness::{Running, ask};
use crate::origin::{Answer, Framing, Origin};
use crate::postgres::Postgres;

const PATH: &str = "/live/index.m3u8";
const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:10\n\
    #EXT-X-MAP:URI=\"init.mp4\"\n#EXTINF:4,\n10.m4s\n#EXTINF:4,\n11.m4s\n";
const POLICY: &str = "key_method = \"AES-256-GCM\"\n";
const LEN: usize = 100_001;

fn start(segment: impl Fn(&str) -> Answer + Send + Sync + 'static) -> (Origin, Running) {
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(PLAYLIST),
        target => segment(target),
    });
    let shield = Running::serve(&config(&origin, POLICY));
    (origin, shield)
}

fn well(target: &str) -> Answer {
    Answer::ok(media(target, LEN))
}

fn first(shield: &Running) -> Item {
    served(shield, PATH).segments.remove(0)
}

#[test]
fn a_segment_carries_its_iv_and_its_tag_and_its_key_tag_carries_none() {
    let (_origin, shield) = start(well);
    let got = served(&shield, PATH);
    for (segment, name) in got.segments.iter().zip(["10.m4s", "11.m4s"]) {
        let key = segment.key.as_ref().unwrap();
        assert_eq!((key.method.as_str(), &key.iv), ("AES-256-GCM", &None), "{}", got.text);
        let answer = segment.fetch();
        assert_eq!(answer.header("content-length"), Some((LEN + 32).to_string().as_str()));
        assert!(segment.decrypt(&answer.body) == media(&format!("/live/{name}"), LEN), "{name}");
    }
    assert_ne!(got.segments[0].fetch().body[..16], got.segments[1].fetch().body[..16], "an IV each");
    assert!(got.init_sections[0].key.is_none());
    assert!(got.init_sections[0].plain() == media("/live/init.mp4", LEN));
}

#[test]
fn an_encrypted_init_section_has_its_iv_in_it_too() {
    let origin = Origin::start(|request| match request.target.as_str() {
        PATH => Answer::ok(PLAYLIST),
        target => well(target),
    });
    let shield = Running::serve(&config(&origin, &format!("{POLICY}encrypt_init_sections = true\n")));
    let init = served(&shield, PATH).init_sections.remove(0);
    assert_eq!(init.key.as_ref().unwrap().iv, None);
    assert!(init.plain() == media("/live/init.mp4", LEN));
}

#[test]
fn the_same_bytes_after_a_restart_and_other_ones_for_another_plaintext() {
    let changed = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&changed);
    let (origin, shield) = start(move |target| match now.load(Ordering::SeqCst) {
        false => well(target),
        true => Answer::ok(media("other", LEN)),
    });
    let before = first(&shield).fetch().body;
    let shield = Running::serve_in(shield.kill(), &config(&origin, POLICY));
    assert!(first(&shield).fetch().body == before);

    changed.store(true, Ordering::SeqCst);
    let shield = Running::serve_in(shield.kill(), &config(&origin, POLICY));
    let segment = first(&shield);
    let after = segment.fetch().body;
    // Two plaintexts under one key and IV would give both away.
    assert_ne!(after[..16], before[..16]);
    assert!(segment.decrypt(&after) == media("other", LEN));
    assert!(segment.decrypt(&before) == media("/live/10.m4s", LEN), "caches may still hold it");
}

#[test]
fn two_nodes_give_the_same_bytes() {
    let origin = Origin::start(|request| match request.target.as_str() {
        PATH => Answer::ok(PLAYLIST),
        target => well(target),
    });
    let (postgres, shared) = (Postgres::shared(), tempfile::tempdir().unwrap());
    let config = format!(
        "[store]\ndatabase = \"{}\"\n[kms]\nmaster_key_file = \"{}/keyshield.master\"\n{}",
        postgres.database(),
        shared.path().display(),
        config(&origin, POLICY)
    );
    // One after the other: the first one makes the master key.
    let nodes = [0, 1].map(|_| Running::serve_with(tempfile::tempdir().unwrap(), &config));
    let [one, two] = nodes.each_ref().map(|node| first(node).fetch().body);
    assert!(one == two);
    assert_eq!(origin.count("/live/10.m4s"), 2, "neither had it from the other");
}

#[test]
fn a_truncated_origin_never_gives_a_whole_segment() {
    for framing in [Framing::ContentLength, Framing::Chunked] {
        let tries = Arc::new(AtomicUsize::new(0));
        let (_origin, shield) = start(move |target| {
            let cut_after = (tries.fetch_add(1, Ordering::SeqCst) == 0).then_some(50_000);
            Answer { framing, cut_after, ..well(target) }
        });
        let segment = first(&shield);
        failure(&segment.url);
        assert!(segment.plain() == media("/live/10.m4s", LEN), "the part was not kept");
    }
}

#[test]
fn ranges_and_head_are_answered() {
    let (_origin, shield) = start(well);
    let segment = first(&shield);
    let head = ask("HEAD", &segment.url, &[]);
    let length = (LEN + 32).to_string();
    assert_eq!((head.status, head.header("content-length")), (200, Some(length.as_str())));
    let part = ask("GET", &segment.url, &[("Range", "bytes=-16")]);
    let range = format!("bytes {}-{}/{length}", LEN + 16, LEN + 31);
    assert_eq!((part.status, part.header("content-range")), (206, Some(range.as_str())));
    assert_eq!(part.body, segment.fetch().body[LEN + 16..], "the tag");
}

const I_FRAMES: &str = "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:4\n#EXT-X-I-FRAMES-ONLY\n\
    #EXT-X-MAP:URI=\"all.mp4\",BYTERANGE=\"700@0\"\n\
    #EXTINF:4,\n#EXT-X-BYTERANGE:1000@700\nall.mp4\n#EXTINF:4,\n#EXT-X-BYTERANGE:50\nall.mp4\n";

#[test]
fn each_i_frame_is_sealed_by_itself_because_nobody_can_reach_into_a_sealed_file() {
    let origin = Origin::start(|request| match request.target.as_str() {
        PATH => Answer::ok(I_FRAMES),
        target => part_of(&media(target, LEN), request.headers.get("range")),
    });
    let shield = Running::serve(&config(&origin, POLICY));
    let got = served(&shield, PATH);
    assert!(!got.text.contains("BYTERANGE"), "{}", got.text);
    let file = media("/live/all.mp4", LEN);
    assert!(got.segments[0].plain() == file[700..1_700]);
    assert!(got.segments[1].plain() == file[1_700..1_750]);
    assert!(got.init_sections[0].plain() == file[..700]);
}

#[test]
fn i_frames_of_a_file_that_the_origin_has_encrypted_cannot_be_sealed_apart() {
    let key = "#EXT-X-KEY:METHOD=AES-128,URI=\"k.bin\",IV=0x01\n#EXT-X-MAP";
    let origin = Origin::start(move |_| Answer::ok(I_FRAMES.replace("#EXT-X-MAP", key)));
    let shield = Running::serve(&config(&origin, &format!("{POLICY}on_encrypted = \"rekey\"\n")));
    let got = shield.get(PATH);
    assert_eq!(got.status, 502);
    let reason =
        "line 9: what the origin has encrypted so cannot be encrypted anew (I-frames within one file";
    assert!(got.problem().contains(reason), "{}", got.problem());
}
