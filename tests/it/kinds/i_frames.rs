//! I-frame playlists: a file is one chain under one key, into which players reach by ranges of their own.

use aes::Aes128;
use aes::cipher::{Block, BlockModeDecrypt, KeyIvInit};

use serde_json::json;

use super::{Item, config, encrypt, media, served};
use crate::control_api::{call, tokens};
use crate::harness::{Running, ask, get};
use crate::origin::{Answer, Origin};

const PATH: &str = "/live/iframes.m3u8";
const BLOCK: usize = 16;
/// Files with their I-frames: at the beginning of the file, within one block, across blocks, at the end of the file.
const FILES: [File; 2] = [
    File { name: "a.ts", len: 20_007, i_frames: &[(0, 1_000), (1_003, 7), (5_000, 10_000), (20_000, 7)] },
    File { name: "b.ts", len: 5_008, i_frames: &[(376, 1_504), (4_992, 16)] },
];

struct File {
    name: &'static str,
    len: usize,
    /// Offset and length of each.
    i_frames: &'static [(usize, usize)],
}

impl File {
    fn at(target: &str) -> &'static Self {
        let is_it = |file: &&Self| target == format!("/live/{}", file.name);
        FILES.iter().find(is_it).unwrap_or_else(|| panic!("nothing is at {target}"))
    }

    fn body(&self) -> Vec<u8> {
        media(self.name, self.len)
    }
}

fn playlist() -> String {
    let entry = |name: &str, (offset, length): (usize, usize)| {
        format!("#EXTINF:1,\n#EXT-X-BYTERANGE:{length}@{offset}\n{name}\n")
    };
    let entries = FILES.iter().flat_map(|file| file.i_frames.iter().map(|frame| entry(file.name, *frame)));
    let header = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:4\n#EXT-X-I-FRAMES-ONLY\n";
    format!("{header}{}#EXT-X-ENDLIST\n", entries.collect::<String>())
}

fn start(policy: &str) -> (Origin, Running) {
    let origin = Origin::start(|request| match request.target.as_str() {
        PATH => Answer::ok(playlist()),
        target => Answer::ok(File::at(target).body()),
    });
    let shield = Running::serve(&config(&origin, policy));
    (origin, shield)
}

/// What a player makes of an I-frame (D22 §6.3.6): it widens the range to whole blocks, and asks for the block before
/// them too, which is the IV of the first.
fn i_frame(item: &Item, (offset, length): (usize, usize)) -> Vec<u8> {
    let key = item.key.as_ref().unwrap();
    let first = offset / BLOCK * BLOCK;
    let end = (offset + length).div_ceil(BLOCK) * BLOCK;
    let from = first.saturating_sub(BLOCK);
    let range = format!("bytes={from}-{}", end - 1);
    let got = ask("GET", &item.url, &[("Range", &range)]);
    assert_eq!((got.status, got.body.len()), (206, end - from), "{range} of {}", item.url);
    let mut iv = [0; BLOCK];
    let mut body = got.body;
    if first == 0 {
        hex::decode_to_slice(key.iv.as_ref().unwrap(), &mut iv).unwrap();
    } else {
        iv.copy_from_slice(&body[..BLOCK]);
        body.drain(..BLOCK);
    }
    let bytes: [u8; BLOCK] = get(&key.url).body.try_into().unwrap();
    let mut chain = cbc::Decryptor::<Aes128>::new(&bytes.into(), &iv.into());
    let (blocks, rest) = Block::<Aes128>::slice_as_chunks_mut(&mut body);
    assert!(rest.is_empty());
    chain.decrypt_blocks(blocks);
    body[offset - first..offset - first + length].to_vec()
}

/// Every I-frame comes out, and every file as a whole.
fn check(shield: &Running) -> Vec<Item> {
    let got = served(shield, PATH);
    let frames = FILES.iter().flat_map(|file| file.i_frames.iter().map(move |frame| (file, *frame)));
    let frames: Vec<_> = frames.collect();
    assert_eq!(got.segments.len(), frames.len());
    for ((file, (offset, length)), item) in frames.into_iter().zip(&got.segments) {
        assert!(got.text.contains(&format!("#EXT-X-BYTERANGE:{length}@{offset}\n")), "{}", got.text);
        let frame = i_frame(item, (offset, length));
        assert!(frame == file.body()[offset..offset + length], "{length}@{offset} of {}", file.name);
        assert!(item.plain() == file.body(), "{}", file.name);
    }
    got.segments
}

#[test]
fn a_player_that_widens_a_range_to_whole_blocks_gets_the_i_frame() {
    for mode in ["segment", "period", "sequence"] {
        let (_origin, shield) = start(&format!("iv_mode = \"{mode}\"\n"));
        check(&shield);
    }
}

#[test]
fn all_i_frames_of_a_file_are_one_fetch_of_the_whole_file() {
    let (origin, shield) = start("");
    let items = check(&shield);
    assert!(items[..4].iter().all(|item| item.url == items[0].url && item.key == items[0].key));
    for File { name, .. } in &FILES {
        let asked = origin.asked(&format!("/live/{name}"));
        assert_eq!(asked.len(), 1, "{name}");
        assert!(!asked[0].headers.contains_key("range"), "{name}");
    }
}

#[test]
fn i_frames_of_one_file_on_both_sides_of_a_key_change_decrypt() {
    let (origin, shield) = start("segments_per_key = 3\n");
    let items = check(&shield);
    assert_ne!(items[2].key_id(), items[3].key_id(), "a.ts lies on both sides");
    assert_eq!(items[3].key_id(), items[4].key_id());
    assert_eq!(origin.count("/live/a.ts"), 2, "once under each key");
    assert_eq!(origin.count("/live/b.ts"), 1);
}

#[test]
fn after_a_revocation_they_decrypt_under_the_successor_at_the_same_paths() {
    let (_origin, shield) = start(&tokens());
    let before = check(&shield);
    call(&shield, "POST", "/live/emergency-revoke", json!({"reason": "found on a forum"})).ok();
    for (before, after) in before.iter().zip(check(&shield)) {
        assert_ne!(before.key, after.key);
        assert_eq!(Some(before.url.as_str()), after.url.split('?').next(), "a published path never changes");
    }
}

#[test]
fn i_frames_of_a_file_that_the_origin_has_encrypted_decrypt_too() {
    const KEY: &[u8; 16] = b"0rigin-key-bytes";
    const IV: [u8; 16] = [0x5a; 16];
    let key = format!("#EXT-X-KEY:METHOD=AES-128,URI=\"k.bin\",IV=0x{}\n#EXTINF", hex::encode(IV));
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(playlist().replacen("#EXTINF", &key, 1)),
        "/live/k.bin" => Answer::ok(*KEY),
        target => Answer::ok(encrypt(&File::at(target).body(), KEY, IV)),
    });
    let shield = Running::serve(&config(&origin, "on_encrypted = \"rekey\"\n"));
    check(&shield);
    assert_eq!(origin.count("/live/a.ts"), 1);
}
