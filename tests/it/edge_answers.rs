//! What the shield tells CDNs, and those who look after them: check values, which key an answer is under, and an end to
//! what caches were told to keep before its key was taken back.
//!
//! Check values are computed by the `openssl` command line, and connections are read byte by byte: nothing here is the
//! product's.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control_api::{call, tokens};
use crate::data_plane::{open, read_some};
use crate::harness::{Answer as Got, Running, ask, get, openssl_decrypt, segments, wait_for};
use crate::origin::{Answer, Framing, Gate, Origin, Seen};

const PATH: &str = "/live/720p.m3u8";
const I_FRAMES: &str = "/live/iframes.m3u8";
/// Longer than what a connection holds of an answer that nobody reads.
const LONG: usize = 24 << 20;

fn playlist(target_secs: u32) -> String {
    let segments = (10..16).map(|n| format!("#EXTINF:{target_secs},\nseg_{n}.mp4\n")).collect::<String>();
    format!(
        "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:{target_secs}\n#EXT-X-MEDIA-SEQUENCE:10\n\
         #EXT-X-MAP:URI=\"init.mp4\"\n{segments}"
    )
}

fn i_frames() -> String {
    "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:6\n#EXT-X-I-FRAMES-ONLY\n#EXT-X-MAP:URI=\"init.mp4\"\n\
     #EXTINF:6,\n#EXT-X-BYTERANGE:100@0\nall.mp4\n#EXT-X-ENDLIST\n"
        .to_owned()
}

fn body(path: &str, len: usize) -> Vec<u8> {
    path.bytes().cycle().take(len).collect()
}

fn well(target_secs: u32) -> impl Fn(&Seen) -> Answer + Send + Sync + 'static {
    move |request| match request.target.as_str() {
        PATH => Answer::ok(playlist(target_secs)),
        I_FRAMES => Answer::ok(i_frames()),
        target => Answer::ok(body(target, 5_000)),
    }
}

fn shield(origin: &Origin, policy: &str) -> Running {
    let url = origin.url();
    Running::serve(&format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"ch1\"\nplaylist_url = \"{url}{PATH}\"\n[streams.policy]\n{policy}{}",
        tokens()
    ))
}

fn published(shield: &Running) -> Vec<crate::harness::Segment> {
    segments(&shield.at(PATH), &shield.get(PATH).text())
}

fn revoke(shield: &Running) -> Value {
    call(shield, "POST", "/ch1/emergency-revoke", json!({"reason": "found on a forum"})).ok()
}

fn key_id(key_url: &str) -> &str {
    key_url.rsplit('/').next().unwrap()
}

/// The check value as docs/http.md has it.
fn check_value(id: &str, key: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text");
    std::fs::write(&file, format!("keyshield check {id}")).unwrap();
    let key = format!("key:{}", hex::encode(key));
    let output = std::process::Command::new("openssl")
        .args(["dgst", "-sha256", "-r", "-mac", "HMAC", "-macopt", &key])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()[..16].to_owned()
}

fn is_of_the_shield(answer: &Got) {
    assert_eq!(answer.header("keyshield-served-by"), Some("shield"), "{answer:?}");
}

#[test]
fn a_key_is_checked_without_being_given() {
    let origin = Origin::start(well(6));
    let shield = shield(&origin, "");
    published(&shield);
    let keys = call(&shield, "GET", "/ch1/keys?limit=1000", Value::Null).ok()["keys"].clone();
    let states: BTreeSet<_> = keys.as_array().unwrap().iter().map(|key| key["state"].to_string()).collect();
    assert!(states.contains("\"pre-active\"") && states.contains("\"active\""), "{states:?}");
    for key in keys.as_array().unwrap() {
        let id = key["keyId"].as_str().unwrap();
        let url = shield.at(&format!("/api/hls/keys/{id}"));
        let key = get(&url);
        assert_eq!(key.header("keyshield-key"), Some(id));
        is_of_the_shield(&key);
        let check = get(&format!("{url}/check"));
        assert_eq!((check.status, check.text()), (200, check_value(id, &key.body)));
        assert_eq!(check.header("content-type"), Some("text/plain"));
        assert_eq!(check.header("cache-control"), Some("no-store"));
        is_of_the_shield(&check);
        let head = ask("HEAD", &format!("{url}/check"), &[]);
        assert_eq!((head.status, head.body.len(), head.header("content-length")), (200, 0, Some("16")));
        is_of_the_shield(&head);
    }
}

#[test]
fn a_key_that_is_not_given_out_has_no_check_value_and_the_shield_says_so() {
    let origin = Origin::start(well(6));
    let shield = shield(&origin, "");
    let leaked = published(&shield)[0].key_url.clone();
    revoke(&shield);
    let unknown = shield.at(&format!("/api/hls/keys/{}", "0".repeat(32)));
    let odd = shield.at("/api/hls/keys/what");
    for (url, status) in [(&leaked, 410), (&unknown, 404), (&odd, 404)] {
        for method in ["GET", "HEAD"] {
            let key = ask(method, url, &[]);
            assert_eq!((key.status, key.header("cache-control")), (status, Some("max-age=1")), "{url}");
            is_of_the_shield(&key);
            // Whoever asks again gets what holds then.
            let check = ask(method, &format!("{url}/check"), &[]);
            assert_eq!((check.status, check.header("cache-control")), (status, Some("no-store")), "{url}");
            is_of_the_shield(&check);
        }
    }
    // A 404 of something else is told from these.
    assert_eq!(shield.get("/nowhere/else").header("keyshield-served-by"), None);
}

/// The URLs of what a playlist links to.
fn links(playlist_url: &str, text: &str) -> Vec<String> {
    let base = url::Url::parse(playlist_url).unwrap();
    let uri = |line: &str| match line.strip_prefix("#EXT-X-MAP:URI=\"") {
        Some(rest) => rest.split('"').next().map(str::to_owned),
        None => (!line.starts_with('#')).then(|| line.to_owned()),
    };
    text.lines().filter_map(uri).map(|uri| base.join(&uri).unwrap().to_string()).collect()
}

#[test]
fn whatever_caches_may_keep_under_a_key_names_it_and_has_its_tag() {
    let origin = Origin::start(well(6));
    let shield = shield(&origin, "encrypt_init_sections = true\n");
    let tagged = |answer: &Got, id: &str| {
        let tag = format!("keyshield-key-{id}");
        let has = |name, by: char| answer.header(name).unwrap().split(by).any(|t| t == tag);
        assert!(has("surrogate-key", ' ') && has("cache-tag", ','), "{answer:?}");
    };
    for path in [PATH, I_FRAMES] {
        let playlist = shield.get(path);
        let text = playlist.text();
        let (_, after) = text.split_once("/api/hls/keys/").unwrap();
        let id = &after[..32];
        let etag = playlist.header("etag").unwrap().to_owned();
        tagged(&playlist, id);
        tagged(&ask("HEAD", &shield.at(path), &[]), id);
        let same = ask("GET", &shield.at(path), &[("if-none-match", &etag)]);
        assert_eq!(same.status, 304);
        tagged(&same, id);
        let links = links(&shield.at(path), &text);
        assert!(links.len() >= 2 && links[0].contains(".init."), "{text}");
        for url in links {
            let whole = get(&url);
            let etag = whole.header("etag").unwrap().to_owned();
            let part = ask("GET", &url, &[("range", "bytes=0-9")]);
            let same = ask("GET", &url, &[("if-none-match", &etag)]);
            let head = ask("HEAD", &url, &[]);
            assert_eq!([whole.status, part.status, same.status, head.status], [200, 206, 304, 200]);
            for answer in [whole, part, same, head] {
                assert_eq!(answer.header("keyshield-key"), Some(id), "{url}");
                assert!(answer.header("cache-control").unwrap().starts_with("public"), "{url}");
                tagged(&answer, id);
            }
        }
        tagged(&shield.get(&format!("/api/hls/keys/{id}")), id);
    }
    // What is in clear is under none.
    let shield = crate::edge_answers::shield(&origin, "");
    let init = get(&links(&shield.at(PATH), &shield.get(PATH).text())[0]);
    assert_eq!((init.status, init.header("keyshield-key")), (200, None));
}

#[test]
fn no_cache_renews_what_it_has_under_a_key_that_was_taken_back() {
    let origin = Origin::start(well(1));
    let shield = shield(&origin, "revocation_transition_target_durations = 3\n");
    let held = published(&shield)[0].clone();
    let (before, leaked) = (get(&held.url), get(&held.key_url).body);
    let playlist_etag = shield.get(PATH).header("etag").unwrap().to_owned();
    let etag = before.header("etag").unwrap().to_owned();
    assert_eq!(ask("GET", &held.url, &[("if-none-match", &etag)]).status, 304);
    revoke(&shield);

    assert_eq!(ask("GET", &shield.at(PATH), &[("if-none-match", &playlist_etag)]).status, 200);
    // In the transition: the bytes for who has the key already, and for nobody else.
    let again = ask("GET", &held.url, &[("if-none-match", &etag)]);
    assert_eq!((again.status, &again.body), (200, &before.body));
    let range = ("range", "bytes=0-9");
    let parts = [vec![range], vec![range, ("if-range", &etag)], vec![range, ("if-none-match", &etag)]];
    let parts = parts.map(|headers| ask("GET", &held.url, &headers));
    assert_eq!(parts.each_ref().map(|part| part.status), [206, 206, 206]);
    let head = ask("HEAD", &held.url, &[("if-none-match", &etag)]);
    let any = ask("GET", &held.url, &[("if-none-match", "*")]);
    for answer in parts.iter().chain([&again, &head, &any]) {
        assert_eq!(answer.header("cache-control"), Some("no-store"), "{answer:?}");
        assert_eq!(answer.header("keyshield-key"), Some(key_id(&held.key_url)));
    }
    assert!(!openssl_decrypt(&again.body, &leaked, &held.iv).is_empty());

    let over = wait_for("the end of the transition", || {
        let got = ask("GET", &held.url, &[("if-none-match", &etag)]);
        (got.header("cache-control") != Some("no-store")).then_some(got)
    });
    let successor = published(&shield)[0].key_url.clone();
    assert_eq!((over.status, over.header("keyshield-key")), (200, Some(key_id(&successor))));
    assert_ne!(over.header("etag"), Some(etag.as_str()));
    assert!(!over.header("surrogate-key").unwrap().contains(key_id(&held.key_url)));
}

/// Reads to the end, which may be a reset, and says when it came.
fn read_on(mut reader: TcpStream) -> (Vec<u8>, Instant) {
    let mut rest = Vec::new();
    let _ = reader.read_to_end(&mut rest);
    (rest, Instant::now())
}

#[test]
fn what_caches_were_told_to_keep_is_broken_off_when_its_key_is_taken_back() {
    let is_open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&is_open);
    let origin = Origin::start(move |request| {
        let opened = Arc::clone(&opened);
        let held = || {
            let opened = Arc::clone(&opened);
            let wait = move || wait_for("the test", || opened.load(Ordering::SeqCst).then_some(()));
            Some((100_000, Gate::after(wait)))
        };
        match request.target.as_str() {
            PATH => Answer::ok(playlist(20)),
            "/live/seg_10.mp4" => Answer { gate: held(), ..Answer::ok(body("10", 200_000)) },
            "/live/seg_11.mp4" => {
                Answer { gate: held(), framing: Framing::Chunked, ..Answer::ok(body("11", 200_000)) }
            }
            "/live/seg_12.mp4" => Answer::ok(body("12", LONG)),
            target => Answer { gate: held(), ..Answer::ok(body(target, 200_000)) },
        }
    });
    let shield = shield(&origin, "");
    let segments = published(&shield);
    // Two wait for the origin, one waits for its reader.
    let mut readers = [0, 1, 2].map(|n| open(&segments[n].url));
    let [known, chunked, unread] = readers.each_mut().map(|reader| read_some(reader, 1));
    for (head, _) in [&known, &chunked, &unread] {
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("public, max-age"), "{head}");
    }
    let [known_reader, chunked_reader, unread_reader] = readers;
    let [known_end, chunked_end] =
        [known_reader, chunked_reader].map(|reader| std::thread::spawn(move || read_on(reader)));

    // And one by HTTP/2, which gives up by itself if it must.
    let file = shield.dir().join("http2");
    let mut http2 = std::process::Command::new("curl")
        .args(["-sN", "--http2-prior-knowledge", "--max-time", "15", "-o"])
        .args([file.as_os_str(), segments[5].url.as_ref()])
        .spawn()
        .expect("curl is installed");
    wait_for("the answer by HTTP/2", || (std::fs::metadata(&file).ok()?.len() > 50_000).then_some(()));

    let revoked = Instant::now();
    revoke(&shield);
    // These began after it: one under the successor, and one of a player that holds the older playlist.
    let now = published(&shield);
    let leaked = key_id(&segments[0].key_url);
    let going_on = [&now[3], &segments[4]].map(|segment| {
        let mut reader = open(&segment.url);
        let (head, first) = read_some(&mut reader, 50_000);
        assert_eq!(head.contains("no-store"), head.contains(leaked), "{head}");
        (reader, first)
    });

    for (end, (head, first)) in [(known_end, known), (chunked_end, chunked)] {
        let (rest, at) = end.join().unwrap();
        let took = at - revoked;
        println!("broken off after {took:?}");
        assert!(took > Duration::from_millis(2_500) && took < Duration::from_secs(4), "{took:?}");
        let got = [first, rest].concat();
        assert!(got.len() < 200_000 && !got.ends_with(b"0\r\n\r\n"), "{head}: {} bytes", got.len());
    }
    wait_for("the answers that were broken off", || {
        let metrics = get(&format!("{}/metrics", shield.control)).text();
        let aborted = "keyshield_responses_total{kind=\"segment\",status=\"aborted\"} 4";
        metrics.lines().any(|line| line == aborted).then_some(())
    });
    let code = http2.wait().unwrap().code();
    assert!(matches!(code, Some(18 | 56 | 92)), "the stream is reset: {code:?}");
    let (rest, _) = read_on(unread_reader);
    assert!(unread.1.len() + rest.len() < LONG, "what nobody read did not become whole");

    is_open.store(true, Ordering::SeqCst);
    for ((reader, first), segment) in going_on.into_iter().zip([&now[3], &segments[4]]) {
        let (rest, _) = read_on(reader);
        assert_eq!(first.len() + rest.len(), 200_016, "{}", segment.name);
    }
}

#[test]
fn an_answer_that_waited_for_its_origin_through_a_revocation_is_not_kept() {
    let is_open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&is_open);
    let origin = Origin::start(move |request| {
        if request.target == PATH {
            return Answer::ok(playlist(20));
        }
        // Before the first byte of its header.
        wait_for("the test", || opened.load(Ordering::SeqCst).then_some(()));
        Answer::ok(body(&request.target, 5_000))
    });
    let shield = shield(&origin, "");
    let segment = published(&shield)[0].clone();
    let leaked = get(&segment.key_url).body;
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| get(&segment.url));
        wait_for("the origin to be asked", || (origin.count("/live/seg_10.mp4") == 1).then_some(()));
        revoke(&shield);
        is_open.store(true, Ordering::SeqCst);
        waiting.join().unwrap()
    });
    assert_eq!((waiting.status, waiting.header("cache-control")), (200, Some("no-store")));
    assert!(openssl_decrypt(&waiting.body, &leaked, &segment.iv) == body("/live/seg_10.mp4", 5_000));
}
