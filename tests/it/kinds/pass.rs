//! `on_encrypted = "pass"` and `"reject"`: what its origin has encrypted is left, or not served.

use super::{config, encrypt, iv_of_msn, media, part_of, read, served};
use crate::harness::{Running, get};
use crate::ll_playlist::attribute;
use crate::origin::{Answer, Origin};

const PATH: &str = "/live/index.m3u8";
const PASS: &str = "on_encrypted = \"pass\"\n";
const KEY: &[u8; 16] = b"0rigin-key-bytes";

/// Encrypted by the origin, then clear, then encrypted by a DRM.
const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:20\n\
    #EXT-X-KEY:METHOD=AES-128,URI=\"keys/1.bin\",IV=0x00000000000000000000000000000014,X-ODD=1\n\
    #EXT-X-MAP:URI=\"init.mp4\"\n\
    #EXTINF:4,\n20.m4s\n#EXTINF:4,\n#EXT-X-BYTERANGE:1600@160\n21.m4s\n\
    #EXT-X-KEY:METHOD=NONE\n#EXTINF:4,\n22.m4s\n\
    #EXT-X-KEY:METHOD=SAMPLE-AES,URI=\"skd://asset/1\",KEYFORMAT=\"com.apple.streamingkeydelivery\"\n\
    #EXT-X-KEY:METHOD=SAMPLE-AES-CTR,URI=\"https://licence.example/wv?a=1\",KEYFORMAT=\"urn:uuid:edef8ba9\"\n\
    #EXT-X-MAP:URI=\"drm.mp4\"\n#EXTINF:4,\n23.m4s\n\
    #EXT-X-KEY:METHOD=NONE\n#EXTINF:4,\n24.m4s\n";

fn body(name: &str) -> Vec<u8> {
    encrypt(&media(name, 5_000), KEY, iv_of_msn(20))
}

fn start(policy: &str) -> (Origin, Running) {
    let origin = Origin::start(|request| match request.target.rsplit('/').next().unwrap() {
        "index.m3u8" => Answer::ok(PLAYLIST),
        "1.bin" => Answer::ok(*KEY),
        name => part_of(&body(name), request.headers.get("range")),
    });
    let shield = Running::serve(&config(&origin, policy));
    (origin, shield)
}

/// The lines of a playlist that begin with a tag.
fn lines<'t>(text: &'t str, tag: &str) -> Vec<&'t str> {
    text.lines().filter(|line| line.starts_with(tag)).collect()
}

#[test]
fn what_the_origin_has_encrypted_comes_as_it_is_behind_links() {
    let (_origin, shield) = start(PASS);
    let got = served(&shield, PATH);
    for (segment, expected) in got.segments.iter().zip([body("20.m4s"), body("21.m4s")[160..1_760].to_vec()])
    {
        let answer = segment.fetch();
        assert!(answer.body == expected, "{}", segment.url);
        assert_eq!(answer.header("content-length"), Some(expected.len().to_string().as_str()));
    }
    assert!(got.segments[3].fetch().body == body("23.m4s"));
    for (init, name) in got.init_sections.iter().zip(["init.mp4", "drm.mp4"]) {
        assert!(init.fetch().body == body(name), "{name}");
    }
    assert!(!got.text.contains("BYTERANGE"), "{}", got.text);
}

#[test]
fn the_origins_key_is_served_behind_a_link_for_the_asker_alone() {
    let (_origin, shield) = start(PASS);
    let got = served(&shield, PATH);
    let line = lines(&got.text, "#EXT-X-KEY:METHOD=AES-128,")[0];
    assert!(line.contains("IV=0x00000000000000000000000000000014,X-ODD=1"), "{line}");
    let key = get(&got.segments[0].key.as_ref().unwrap().url);
    assert_eq!((key.status, key.body.as_slice()), (200, KEY.as_slice()));
    assert_eq!(key.header("cache-control"), Some("private, max-age=300"));
    // As a player would.
    assert!(got.segments[0].plain() == media("20.m4s", 5_000));
}

#[test]
fn clear_segments_between_are_encrypted_by_the_shield() {
    let (_origin, shield) = start(PASS);
    let got = served(&shield, PATH);
    for (segment, name) in [(&got.segments[2], "22.m4s"), (&got.segments[4], "24.m4s")] {
        assert!(segment.key.as_ref().unwrap().url.contains("/api/hls/keys/"), "{}", got.text);
        assert!(segment.fetch().body != body(name), "{name} must be encrypted");
        assert!(segment.plain() == body(name), "{name}");
    }
    // KEYs of other KEYFORMATs stay in force until METHOD=NONE (D22 §4.4.4.4), and ours has another one.
    let drm = got.text.find("com.apple.streamingkeydelivery").unwrap();
    let behind = lines(&got.text[drm..], "#EXT-X-KEY:");
    let methods: Vec<_> = behind.iter().map(|line| attribute(line, "METHOD").unwrap()).collect();
    assert_eq!(methods, ["SAMPLE-AES-CTR", "NONE", "AES-128"], "{}", got.text);
}

#[test]
fn keys_of_a_drm_are_the_players_business() {
    let (origin, shield) = start(PASS);
    let got = served(&shield, PATH);
    for line in lines(PLAYLIST, "#EXT-X-KEY:METHOD=SAMPLE-AES") {
        assert!(got.text.contains(line), "{line} in\n{}", got.text);
    }
    assert!(origin.targets().iter().all(|target| target == PATH));
}

#[test]
fn nothing_is_served_but_behind_links() {
    let (_origin, shield) = start(PASS);
    for path in ["/live/20.m4s", "/live/init.mp4", "/live/keys/1.bin", "/live/22.m4s"] {
        assert_eq!(shield.get(path).status, 403, "{path}");
    }
    let got = served(&shield, PATH);
    let key = got.segments[0].key.as_ref().unwrap().url.clone();
    // The link of the key leads nowhere else, and the link of what is clear does not lead past the cipher.
    for changed in [key.replace("1.bin", "2.bin"), key.replace(".key.", ".clear.")] {
        assert_eq!(get(&changed).status, 403, "{changed}");
    }
}

#[test]
fn by_default_an_encrypted_origin_is_refused_with_its_line_and_method() {
    let (_origin, shield) = start("");
    let got = shield.get(PATH);
    assert_eq!(got.status, 502);
    let reason = "line 5: the origin's segments are already encrypted (METHOD=AES-128)";
    assert!(got.problem().contains(reason), "{}", got.problem());
}

#[test]
fn a_playlist_that_says_none_throughout_is_clear() {
    let origin = Origin::start(|request| match request.target.as_str() {
        PATH => Answer::ok("#EXTM3U\n#EXT-X-KEY:METHOD=NONE\n#EXTINF:4,\na.ts\n"),
        _ => Answer::ok(body("a.ts")),
    });
    for policy in ["", PASS, "on_encrypted = \"rekey\"\n"] {
        let shield = Running::serve(&config(&origin, policy));
        let text = shield.get(PATH).text();
        let got = read(&shield.at(PATH), &text);
        assert!(got.segments[0].plain() == body("a.ts"), "{policy}");
        assert!(got.segments[0].fetch().body != body("a.ts"), "{policy}");
    }
}
