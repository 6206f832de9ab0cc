//! What cannot be encrypted anew: wrong keys, missing ones, links that lost theirs, methods that are none of ours.

use std::sync::Arc;

use parking_lot::Mutex;

use super::rekey::{KEY, PATH, POLICY, plain};
use super::{Failure, Item, config, encrypt, failure, iv_of_msn, served};
use crate::harness::{Running, get, wait_for};
use crate::origin::{Answer, Framing, Gate, Origin};

/// A playlist of one encrypted segment, whose EXT-X-KEY has these attributes.
fn playlist(key: &str) -> String {
    format!(
        "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:7\n#EXT-X-KEY:{key}\n#EXTINF:4,\na.ts\n"
    )
}

fn ciphertext() -> Vec<u8> {
    encrypt(&plain("a.ts"), KEY, iv_of_msn(7))
}

/// An origin that answers for its key and its segment as it is told at the moment.
struct Script {
    key: Mutex<Answer>,
    segment: Mutex<Answer>,
}

fn start() -> (Arc<Script>, Origin, Running) {
    let script = Script { key: Mutex::new(Answer::ok(*KEY)), segment: Mutex::new(Answer::ok(ciphertext())) };
    let script = Arc::new(script);
    let now = Arc::clone(&script);
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(playlist("METHOD=AES-128,URI=\"k.bin\"")),
        "/live/k.bin" => now.key.lock().clone(),
        _ => now.segment.lock().clone(),
    });
    let shield = Running::serve(&config(&origin, POLICY));
    (script, origin, shield)
}

fn first(shield: &Running) -> Item {
    served(shield, PATH).segments.remove(0)
}

#[test]
fn what_does_not_decrypt_is_never_a_whole_answer_and_is_not_kept() {
    let (script, _origin, shield) = start();
    let segment = first(&shield);
    let good = ciphertext();
    let longer = [good.clone(), vec![0; 7]].concat();
    let wrong = [
        ("under another key", Answer::ok(encrypt(&plain("a.ts"), b"not the key here", iv_of_msn(7)))),
        ("not encrypted at all", Answer::ok(plain("a.ts"))),
        ("not whole blocks", Answer::ok(longer)),
        ("its end is missing", Answer::ok(&good[..good.len() - 16])),
        ("nothing", Answer::ok("")),
        ("broken off", Answer { cut_after: Some(20_000), ..Answer::ok(good.clone()) }),
        (
            "broken off between blocks",
            Answer { cut_after: Some(16_000), framing: Framing::Chunked, ..Answer::ok(good.clone()) },
        ),
    ];
    for (what, answer) in wrong {
        *script.segment.lock() = answer;
        // Small ones fail before the first byte; of others some went out, and the answer breaks off.
        let failure = failure(&segment.url);
        assert!([Failure::Status(502), Failure::BrokeOff].contains(&failure), "{what}: {failure:?}");
    }
    *script.segment.lock() = Answer::ok(good);
    assert!(segment.plain() == plain("a.ts"));
}

#[test]
fn a_key_that_is_missing_or_none_is_an_error_until_it_is_there() {
    let (script, origin, shield) = start();
    let segment = first(&shield);
    let keys = [
        (Answer::status(404), 404),
        (Answer::status(500), 502),
        (Answer::ok("fifteen bytes !"), 502),
        (Answer::ok("it has 17 bytes !"), 502),
        (Answer::ok("<html>a login page instead of a key</html>"), 502),
        (Answer { framing: Framing::Close, ..Answer::ok(*KEY) }, 502),
    ];
    for (key, status) in keys {
        *script.key.lock() = key;
        // A refusal is remembered for a moment.
        wait_for("the answer for this key", || (get(&segment.url).status == status).then_some(()));
        let got = get(&segment.url);
        assert!(!got.problem().contains("login page") && !got.problem().contains("fifteen"), "{got:?}");
    }
    assert_eq!(origin.count("/live/a.ts"), 0, "without a key, no segment");
    *script.key.lock() = Answer::ok(*KEY);
    assert!(segment.plain() == plain("a.ts"));
}

#[test]
fn a_crowd_that_needs_one_key_is_one_request_for_it() {
    let gate = Gate::new();
    let held = gate.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        PATH => Answer::ok(
            playlist("METHOD=AES-128,URI=\"k.bin\"")
                + "#EXTINF:4,\nb.ts\n#EXTINF:4,\nc.ts\n#EXTINF:4,\nd.ts\n",
        ),
        "/live/k.bin" => Answer { gate: Some((0, held.clone())), ..Answer::ok(*KEY) },
        target => {
            let at = u64::from(target.as_bytes()["/live/".len()] - b'a');
            Answer::ok(encrypt(&plain("any"), KEY, iv_of_msn(7 + at)))
        }
    });
    let shield = Running::serve(&config(&origin, POLICY));
    let segments = served(&shield, PATH).segments;
    assert_eq!(segments.len(), 4);
    std::thread::scope(|scope| {
        let crowd: Vec<_> =
            segments.iter().map(|segment| scope.spawn(|| segment.plain() == plain("any"))).collect();
        wait_for("all of them to wait for the key", || {
            (shield.metric("keyshield_flows_filling") == 4.0 && origin.count("/live/k.bin") > 0).then_some(())
        });
        gate.open();
        assert!(crowd.into_iter().all(|one| one.join().unwrap()));
    });
    assert_eq!(origin.count("/live/k.bin"), 1);
}

#[test]
fn a_link_without_its_reference_to_the_key_is_refused() {
    let (_script, origin, shield) = start();
    let url = first(&shield).url;
    let (path, query) = url.split_once('?').unwrap();
    let reference = query.strip_prefix("_ok=").expect("the reference to the key");
    for changed in [
        String::new(),
        format!("?_ok=A{reference}"),
        format!("?_ok={}", &reference[..reference.len() - 1]),
        format!("?_ok={}", reference.replacen(".00", ".01", 1)),
        format!("?{query}&{query}"),
        "?_ok=".to_owned(),
    ] {
        let got = get(&format!("{path}{changed}"));
        assert_eq!(got.status, 403, "{changed}");
        assert!(got.problem().contains("_ok"), "{}", got.problem());
    }
    assert_eq!(origin.targets().iter().filter(|target| *target != PATH).count(), 0);
    // What players put around it changes nothing.
    assert_eq!(get(&format!("{path}?CMCD=bl%3D1&{query}&token=x")).status, 200);
}

#[test]
fn what_is_not_ours_to_decrypt_is_a_502_that_says_why() {
    for (key, reason) in [
        (
            "METHOD=SAMPLE-AES,URI=\"skd://x\"",
            "line 5: what the origin has encrypted so cannot be encrypted anew (METHOD=SAMPLE-AES)",
        ),
        ("METHOD=AES-128,URI=\"k\",KEYFORMAT=\"com.example.drm\"", "KEYFORMAT=\"com.example.drm\""),
        (
            "METHOD=AES-128,URI=\"https://evil.example/k.bin?s3cret\"",
            "https://evil.example/k.bin is not an allowed origin",
        ),
        ("METHOD=AES-128,URI=\"k.bin\",IV=0xZZ", "line 5: EXT-X-KEY"),
        ("METHOD=AES-128", "line 5: EXT-X-KEY: it has no URI"),
    ] {
        let origin = Origin::start(move |_| Answer::ok(playlist(key)));
        let shield = Running::serve(&config(&origin, POLICY));
        let got = shield.get(PATH);
        assert_eq!(got.status, 502, "{key}");
        assert!(got.problem().contains(reason) && !got.problem().contains("s3cret"), "{}", got.problem());
    }
}

#[test]
fn an_encrypted_file_without_an_iv_of_its_own_is_a_502() {
    let map = "METHOD=AES-128,URI=\"k.bin\"\n#EXT-X-MAP:URI=\"init.mp4\"";
    // Its I-frames have numbers; the file, which is one chain, has none.
    let i_frames = "METHOD=AES-128,URI=\"k.bin\"\n#EXT-X-I-FRAMES-ONLY\n#EXT-X-BYTERANGE:10@0";
    for key in [map, i_frames] {
        let origin = Origin::start(move |_| Answer::ok(playlist(key)));
        let shield = Running::serve(&config(&origin, POLICY));
        let got = shield.get(PATH);
        assert_eq!(got.status, 502, "{key}");
        assert!(got.problem().contains("EXT-X-KEY has no IV"), "{}", got.problem());
    }
}
