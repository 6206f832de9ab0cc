//! `on_encrypted = "rekey"`: what its origin has encrypted is decrypted by the origin's keys and encrypted anew.

use serde_json::{Value, json};

use super::{Item, config, config_of, encrypt, iv_of_msn, media, part_of, served};
use crate::control_api::{call, tokens};
use crate::harness::{Running, openssl_decrypt};
use crate::origin::{Answer, Origin, Seen};

pub(super) const PATH: &str = "/live/index.m3u8";
pub(super) const POLICY: &str = "on_encrypted = \"rekey\"\n";
/// Letters, so that it would be seen wherever it is written out.
pub(super) const KEY: &[u8; 16] = b"0rigin-key-bytes";
const SECOND_KEY: &[u8; 16] = b"another-key-of-1";
const IV: [u8; 16] = [0xa5; 16];
const IV_TEXT: &str = "0xA5A5a5a5A5A5A5A5A5A5A5A5A5A5A5A5";

/// Encrypted with an IV; with none; clear; under another key; as ranges of one file.
const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:20\n\
    #EXT-X-KEY:METHOD=AES-128,URI=\"../keys/1.bin?t=x%2Fy\",IV=IV_TEXT\n#EXT-X-MAP:URI=\"init.mp4\"\n\
    #EXTINF:4,\n20.m4s\n#EXTINF:4,\n21.m4s?sig=a%2Fb\n\
    #EXT-X-KEY:METHOD=AES-128,URI=\"/keys/2.bin\"\n#EXTINF:4,\n22.m4s\n#EXTINF:4,\n23.m4s\n\
    #EXT-X-KEY:METHOD=NONE\n#EXT-X-MAP:URI=\"clear.mp4\"\n#EXTINF:4,\n24.m4s\n\
    #EXT-X-KEY:METHOD=AES-128,URI=\"../keys/1.bin?t=x%2Fy\",KEYFORMAT=\"identity\",IV=IV_TEXT\n\
    #EXTINF:4,\n#EXT-X-BYTERANGE:RANGE_A@0\nranges.m4s\n#EXTINF:4,\n#EXT-X-BYTERANGE:RANGE_B\nranges.m4s\n";

pub(super) fn plain(name: &str) -> Vec<u8> {
    // Of whole blocks, and not.
    media(name, if name.starts_with("21") { 64_000 } else { 50_003 })
}

fn range(name: &str) -> Vec<u8> {
    encrypt(&plain(name), KEY, IV)
}

fn playlist() -> String {
    PLAYLIST
        .replace("IV_TEXT", IV_TEXT)
        .replace("RANGE_A", &range("range-a").len().to_string())
        .replace("RANGE_B", &range("range-b").len().to_string())
}

fn answer(request: &Seen) -> Answer {
    match request.target.as_str() {
        PATH => Answer::ok(playlist()),
        "/keys/1.bin?t=x%2Fy" => Answer::ok(*KEY),
        "/keys/2.bin" => Answer::ok(*SECOND_KEY),
        "/live/ranges.m4s" => {
            part_of(&[range("range-a"), range("range-b")].concat(), request.headers.get("range"))
        }
        // Signed, and refused without the signature.
        "/live/21.m4s" => Answer::status(403),
        target => Answer::ok(match target.split('?').next().unwrap().rsplit('/').next().unwrap() {
            name @ ("22.m4s" | "23.m4s") => {
                encrypt(&plain(name), SECOND_KEY, iv_of_msn(name[..2].parse().unwrap()))
            }
            name @ ("24.m4s" | "clear.mp4") => plain(name),
            name => encrypt(&plain(name), KEY, IV),
        }),
    }
}

/// Everything decrypts, under keys of the shield's, to the plaintext of the origin's.
fn check(shield: &Running) -> Vec<Item> {
    let got = served(shield, PATH);
    assert!(!got.text.contains(".bin"), "no player needs the origin's keys:\n{}", got.text);
    let names = ["20.m4s", "21.m4s", "22.m4s", "23.m4s", "24.m4s", "range-a", "range-b"];
    assert_eq!(got.segments.len(), names.len());
    for (segment, name) in got.segments.iter().zip(names) {
        assert!(segment.key.as_ref().unwrap().url.contains("/api/hls/keys/"), "{}", got.text);
        assert!(segment.plain() == plain(name), "{name}");
    }
    for (init, name) in got.init_sections.iter().zip(["init.mp4", "clear.mp4"]) {
        assert_eq!(init.key, None, "{}", got.text);
        assert!(init.plain() == plain(name), "{name}");
    }
    got.segments
}

#[test]
fn every_segment_decrypts_to_the_origins_plaintext_and_the_origins_keys_are_fetched_once() {
    let origin = Origin::start(answer);
    let shield = Running::serve(&config(&origin, POLICY));
    // What the shield makes of the origin's ciphertext is what openssl makes of it.
    let by_openssl = openssl_decrypt(&encrypt(&plain("20.m4s"), KEY, IV), KEY, &hex::encode(IV));
    assert!(by_openssl == plain("20.m4s"));
    check(&shield);
    for key in ["/keys/1.bin?t=x%2Fy", "/keys/2.bin"] {
        assert_eq!(origin.count(key), 1, "{key}");
    }
}

#[test]
fn encrypted_init_sections_are_encrypted_anew_where_the_policy_says_so() {
    let origin = Origin::start(answer);
    let shield = Running::serve(&config(&origin, &format!("{POLICY}encrypt_init_sections = true\n")));
    let got = served(&shield, PATH);
    for (init, name) in got.init_sections.iter().zip(["init.mp4", "clear.mp4"]) {
        assert!(init.key.is_some(), "{}", got.text);
        assert!(init.plain() == plain(name), "{name}");
    }
}

#[test]
fn it_stays_so_over_key_changes_rotations_revocations_and_a_restart() {
    let origin = Origin::start(answer);
    let policy = format!("{POLICY}segments_per_key = 2\n{}", tokens());
    let shield = Running::serve(&config(&origin, &policy));
    let before = check(&shield);
    assert!(before.windows(2).any(|pair| pair[0].key_id() != pair[1].key_id()), "a key change");
    call(&shield, "POST", "/live/rotate", Value::Null).ok();
    check(&shield);
    call(&shield, "POST", "/live/emergency-revoke", json!({"reason": "found on a forum"})).ok();
    let revoked = check(&shield);
    let without_query = |item: &Item| item.url.split('?').next().unwrap().to_owned();
    for (before, after) in before.iter().zip(&revoked) {
        assert_eq!(without_query(before), without_query(after), "a published path never changes");
    }
    assert!(before.iter().zip(&revoked).any(|(before, after)| before.key != after.key));
    let bodies: Vec<_> = revoked.iter().map(|segment| segment.fetch().body).collect();
    let shield = Running::serve_in(shield.kill(), &config(&origin, &policy));
    for ((before, after), body) in revoked.iter().zip(check(&shield)).zip(bodies) {
        assert_eq!(before.path(), after.path());
        assert!(after.fetch().body == body);
    }
}

#[test]
fn a_key_may_lie_at_another_allowed_origin() {
    let keys = Origin::start(|_| Answer::ok(*KEY));
    let key_url = format!("{}/vault/1.bin", keys.url());
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(format!(
            "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:3\n#EXT-X-KEY:METHOD=AES-128,URI=\"{key_url}\"\n#EXTINF:4,\na.ts\n"
        )),
        _ => Answer::ok(encrypt(&plain("a.ts"), KEY, iv_of_msn(3))),
    });
    let elsewhere =
        format!("[[origins]]\nname = \"keys\"\nmount = \"/vault-of-keys\"\nurls = [\"{}\"]\n", keys.url());
    let shield = Running::serve(&config_of(&origin, &elsewhere, POLICY));
    assert!(served(&shield, PATH).segments[0].plain() == plain("a.ts"));
    assert_eq!(keys.targets(), ["/vault/1.bin"]);
    // The key is the shield's business: nobody gets it through the shield.
    assert_eq!(shield.get("/vault-of-keys/vault/1.bin").status, 404);
}

#[test]
fn the_origins_key_stands_in_no_log_and_no_answer() {
    use base64::Engine;
    let origin = Origin::start(answer);
    let traced = "[log]\nfilter = \"trace\"\n";
    let shield = Running::serve(&format!("{traced}{}", config(&origin, POLICY)));
    let segments = check(&shield);
    let logged = shield.logged();
    assert!(logged.contains("TRACE"), "everything is logged");
    let playlist = served(&shield, PATH).text;
    let mut everything = logged + &playlist;
    everything.extend(segments.iter().flat_map(|segment| segment.fetch().headers).map(|(_, value)| value));
    for key in [KEY, SECOND_KEY] {
        let decimal = key.map(|byte| byte.to_string()).join(", ");
        let base64 = base64::engine::general_purpose::STANDARD_NO_PAD.encode(key);
        let text = String::from_utf8(key.to_vec()).unwrap();
        for spelling in [text, hex::encode(key), hex::encode_upper(key), decimal, base64] {
            assert!(!everything.contains(&spelling), "{spelling}");
        }
    }
}
