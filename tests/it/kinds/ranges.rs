//! Byte ranges: each is a segment of its own, encrypted by itself, whatever the origin makes of Range.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Failure, config, failure, media, part_of, served};
use crate::harness::{Running, ask, get};
use crate::origin::{Answer, Framing, Origin, Seen};

const PATH: &str = "/live/index.m3u8";
const FILE: &str = "/live/all.mp4";
const FILE_LEN: usize = 100_001;
/// Offset and length of each segment: of many blocks, of whole blocks, of one byte, up to the end of the file.
const RANGES: [(usize, usize); 4] = [(700, 30_000), (30_700, 32), (30_732, 1), (30_733, 69_268)];
const INIT_LEN: usize = 700;

fn playlist() -> String {
    let [(first_at, first), (_, second), (_, third), (last_at, last)] = RANGES;
    format!(
        "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:5\n\
         #EXT-X-MAP:URI=\"all.mp4\",BYTERANGE=\"{INIT_LEN}@0\"\n\
         #EXTINF:4,\n#EXT-X-BYTERANGE:{first}@{first_at}\nall.mp4\n\
         #EXTINF:4,\n#EXT-X-BYTERANGE:{second}\nall.mp4\n\
         #EXT-X-BYTERANGE:{third}\n#EXTINF:4,\nall.mp4\n\
         #EXTINF:4,\n#EXT-X-BYTERANGE:{last}@{last_at}\nall.mp4\n#EXT-X-ENDLIST\n"
    )
}

fn file() -> Vec<u8> {
    media(FILE, FILE_LEN)
}

fn start(policy: &str, answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> (Origin, Running) {
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(playlist()),
        _ => answer(request),
    });
    let shield = Running::serve(&config(&origin, policy));
    (origin, shield)
}

fn asked_range(request: &Seen) -> Option<&String> {
    request.headers.get("range")
}

fn knows_ranges(request: &Seen) -> Answer {
    part_of(&file(), asked_range(request))
}

/// Every range decrypts to its bytes, and the init section too.
fn check(policy: &str, answer: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> (Origin, Running) {
    let (origin, shield) = start(policy, answer);
    let got = served(&shield, PATH);
    assert!(!got.text.contains("BYTERANGE"), "what is encrypted by itself is no range:\n{}", got.text);
    for (segment, (offset, length)) in got.segments.iter().zip(RANGES) {
        let answer = segment.fetch();
        assert_eq!(answer.body.len(), 16 * (length / 16 + 1), "{}", segment.url);
        let expected = &file()[offset..offset + length];
        assert!(segment.decrypt(&answer.body) == expected, "{length}@{offset}");
    }
    assert_eq!(got.segments.len(), RANGES.len());
    assert!(got.init_sections[0].plain() == file()[..INIT_LEN]);
    (origin, shield)
}

#[test]
fn every_range_is_asked_for_by_itself_and_decrypts_to_its_bytes() {
    let (origin, shield) = check("", knows_ranges);
    let asked: Vec<_> = origin.asked(FILE).iter().map(|seen| asked_range(seen).cloned().unwrap()).collect();
    let init = (0, INIT_LEN);
    let range = |(at, length): (usize, usize)| format!("bytes={at}-{}", at + length - 1);
    assert_eq!(asked, [RANGES.map(range).to_vec(), vec![range(init)]].concat());
    let keys = served(&shield, PATH).segments;
    assert!(keys.windows(2).all(|pair| pair[0].key != pair[1].key), "each has an IV of its own");
}

#[test]
fn an_init_section_that_is_a_range_is_clear_or_encrypted_as_the_policy_says() {
    let (_origin, shield) = check("", knows_ranges);
    assert_eq!(served(&shield, PATH).init_sections[0].key, None);
    let (_origin, shield) = check("encrypt_init_sections = true\n", knows_ranges);
    let init = served(&shield, PATH).init_sections.remove(0);
    assert!(init.key.is_some());
    assert_eq!(init.fetch().body.len(), 16 * (INIT_LEN / 16 + 1));
}

#[test]
fn an_origin_that_knows_no_ranges_gives_the_right_parts_all_the_same() {
    for framing in [Framing::ContentLength, Framing::Chunked] {
        check("", move |_| Answer { framing, ..Answer::ok(file()) });
    }
}

#[test]
fn a_part_whose_length_is_not_told_is_fine() {
    check("", |request| Answer { framing: Framing::Chunked, ..knows_ranges(request) });
    check("", |request| {
        let answer = knows_ranges(request);
        let unknown = |value: &str| format!("{}/*", value.split('/').next().unwrap());
        let headers = answer.headers.iter().map(|(name, value)| (*name, unknown(value))).collect();
        Answer { headers, ..answer }
    });
}

/// How an origin answers a range.
type Answers = fn(&Seen) -> Answer;

fn cut_to(length: usize, whole: &Answer) -> Answer {
    Answer { body: whole.body[..length].to_vec(), ..whole.clone() }
}

fn named(range: &str) -> Answer {
    Answer { status: 206, ..Answer::ok(&file()[..30_000]) }.header("Content-Range", range)
}

/// Answers of which none holds the first segment.
const WRONG: [(&str, Answers); 10] = [
    ("another part of the same length", |_| named("bytes 0-29999/100001")),
    ("less than was asked for", |request| {
        cut_to(20_000, &Answer { headers: vec![], ..knows_ranges(request) })
            .header("Content-Range", "bytes 700-20699/100001")
    }),
    ("more than was asked for", |_| {
        let answer = Answer { status: 206, ..Answer::ok(&file()[700..]) };
        answer.header("Content-Range", "bytes 700-100000/100001")
    }),
    ("no Content-Range", |request| Answer { headers: vec![], ..knows_ranges(request) }),
    ("another unit", |_| named("items 700-30699/100001")),
    ("several parts", |_| {
        Answer { status: 206, ..Answer::ok("--x\r\n") }
            .header("Content-Type", "multipart/byteranges; boundary=x")
    }),
    ("a part that is shorter than it says", |request| cut_to(29_999, &knows_ranges(request))),
    ("a whole file that is too short", |_| Answer::ok(&file()[..30_699])),
    ("no such part", |_| Answer::status(416).header("Content-Range", "bytes */600")),
    ("a chunked part that breaks off", |request| Answer {
        framing: Framing::Chunked,
        cut_after: Some(29_999),
        ..knows_ranges(request)
    }),
];

#[test]
fn another_part_is_an_error_and_nothing_of_it_is_kept() {
    let answers: Arc<Mutex<Answers>> = Arc::new(Mutex::new(knows_ranges));
    let now = Arc::clone(&answers);
    let (_origin, shield) = start("", move |request| (*now.lock())(request));
    let segment = served(&shield, PATH).segments.remove(0);
    for (what, wrong) in WRONG {
        *answers.lock() = wrong;
        match failure(&segment.url) {
            // The origin's 416 is about the shield's Range and not the player's, who sent none.
            Failure::Status(status) => assert_eq!(status, 502, "{what}"),
            Failure::BrokeOff => {}
        }
    }
    *answers.lock() = knows_ranges;
    assert!(segment.plain() == file()[700..30_700]);
}

#[test]
fn the_range_in_a_link_is_part_of_its_proof() {
    let (origin, shield) = start("", knows_ranges);
    let url = served(&shield, PATH).segments.remove(0).url;
    assert!(url.contains(".5.700-30000."), "{url}");
    for changed in [".5.700-30001.", ".5.699-30000.", ".5.0-100001.", ".5.", ".5.700-30000.k."] {
        assert_eq!(get(&url.replace(".5.700-30000.", changed)).status, 403, "{changed}");
    }
    assert_eq!(origin.count(FILE), 0);
}

#[test]
fn players_may_ask_for_ranges_of_a_range() {
    let (_origin, shield) = start("", knows_ranges);
    let segment = served(&shield, PATH).segments.remove(0);
    let whole = segment.fetch().body;
    let part = ask("GET", &segment.url, &[("Range", "bytes=100-199")]);
    assert_eq!((part.status, part.header("content-range")), (206, Some("bytes 100-199/30016")));
    assert_eq!(part.body, whole[100..200]);
}

#[test]
fn a_range_that_has_no_file_of_its_own_before_it_is_refused_with_its_line() {
    let origin = Origin::start(|_| Answer::ok("#EXTM3U\n#EXTINF:4,\n#EXT-X-BYTERANGE:10\nall.mp4\n"));
    let shield = Running::serve(&config(&origin, ""));
    let got = shield.get(PATH);
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("line 3: EXT-X-BYTERANGE"), "{}", got.problem());
}

#[test]
fn a_range_goes_on_behind_a_gap() {
    let origin = Origin::start(|request| match request.target.as_str() {
        PATH => Answer::ok(
            "#EXTM3U\n#EXT-X-VERSION:8\n#EXT-X-TARGETDURATION:4\n\
             #EXTINF:4,\n#EXT-X-BYTERANGE:100@0\nall.mp4\n\
             #EXT-X-GAP\n#EXTINF:4,\n#EXT-X-BYTERANGE:50\nall.mp4\n\
             #EXTINF:4,\n#EXT-X-BYTERANGE:200\nall.mp4\n",
        ),
        _ => knows_ranges(request),
    });
    let shield = Running::serve(&config(&origin, ""));
    let got = served(&shield, PATH);
    // A range of the gap would go on where one before it ends, and those are in the links (D22 §4.4.4.2).
    assert!(got.text.contains("#EXT-X-GAP\n#EXTINF:4,\nall.mp4\n"), "{}", got.text);
    assert!(got.segments[2].plain() == file()[150..350]);
}
