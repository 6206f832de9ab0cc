//! What the data plane answers, request by request, over an origin that does as it is told.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::harness::{
    Answer as Got, Keys, Running, Segment, ask, fetch_segments, get, openssl_decrypt, segments, try_ask,
    wait_for,
};
use crate::origin::{Answer, Framing, Gate, Origin};

const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:10\n\
    #EXTINF:4,\nseg_10.ts\n#EXTINF:4,\nseg_11.ts\n#EXTINF:4,\nseg_12.ts\n";

/// Bytes that look like media: long enough for several reads, not a multiple of a block.
fn media() -> Vec<u8> {
    (0..300_001_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// One stream under `/live/` at an origin that serves `PLAYLIST`, and segments by `segment`.
fn stream(segment: impl Fn(&str) -> Answer + Send + Sync + 'static) -> (Origin, Running) {
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok(PLAYLIST),
        target => segment(target),
    });
    let shield = Running::serve(&config(&origin, ""));
    (origin, shield)
}

fn config(origin: &Origin, more: &str) -> String {
    let url = origin.url();
    format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n{more}\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{url}/live/index.m3u8\"\n"
    )
}

fn first_segment(shield: &Running) -> Segment {
    fetch_segments(&shield.at("/live/index.m3u8")).remove(0)
}

fn decrypt(segment: &Segment, got: &Got) -> Vec<u8> {
    openssl_decrypt(&got.body, &Keys::default().get(&segment.key_url), &segment.iv)
}

/// A request on a connection of its own, of which the test reads as much as it likes.
pub fn open(url: &str) -> TcpStream {
    let url = url::Url::parse(url).unwrap();
    let mut stream = TcpStream::connect((url.host_str().unwrap(), url.port().unwrap())).unwrap();
    stream.set_read_timeout(Some(crate::harness::SOON)).unwrap();
    write!(
        stream,
        "GET {} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
        &url[url::Position::BeforePath..]
    )
    .unwrap();
    stream
}

/// Reads the header and at least `body` bytes behind it.
pub fn read_some(stream: &mut TcpStream, body: usize) -> (String, Vec<u8>) {
    let mut read = Vec::new();
    let mut buffer = [0; 65_536];
    loop {
        if let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n")
            && read.len() >= end + 4 + body
        {
            return (String::from_utf8(read[..end].to_vec()).unwrap(), read[end + 4..].to_vec());
        }
        let n = stream.read(&mut buffer).expect("bytes come");
        assert!(n > 0, "the answer ended: {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&buffer[..n]);
    }
}

#[test]
fn a_segment_streams_to_its_reader_while_the_origin_is_still_sending() {
    let gate = Gate::new();
    let held = gate.clone();
    let (_origin, shield) =
        stream(move |_| Answer { gate: Some((100_000, held.clone())), ..Answer::ok(media()) });
    let segment = first_segment(&shield);
    let mut reader = open(&segment.url);
    // The origin holds back two thirds: what comes now comes before it has finished.
    let (head, first) = read_some(&mut reader, 90_000);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    gate.open();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    let whole = Got { status: 200, headers: vec![], body: [first, rest].concat() };
    assert!(decrypt(&segment, &whole) == media());
}

#[test]
fn equal_requests_are_one_fetch_and_later_ones_none() {
    let gate = Gate::new();
    let held = gate.clone();
    let (origin, shield) =
        stream(move |_| Answer { gate: Some((1_000, held.clone())), ..Answer::ok(media()) });
    let segment = first_segment(&shield);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let url = segment.url.clone();
            std::thread::spawn(move || get(&url).body)
        })
        .collect();
    wait_for("eight readers of one flow", || {
        let requests = shield.metric("keyshield_segment_requests_total");
        (requests >= 8.0).then_some(())
    });
    gate.open();
    let bodies: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert!(bodies.iter().all(|body| *body == bodies[0]));
    assert_eq!(get(&segment.url).body, bodies[0]);
    assert_eq!(origin.count("/live/seg_10.ts"), 1);
}

#[test]
fn a_reader_who_leaves_does_not_cost_the_others_the_segment() {
    let gate = Gate::new();
    let held = gate.clone();
    let (origin, shield) =
        stream(move |_| Answer { gate: Some((100_000, held.clone())), ..Answer::ok(media()) });
    let segment = first_segment(&shield);
    let mut leaver = open(&segment.url);
    read_some(&mut leaver, 1);
    drop(leaver);
    gate.open();
    assert!(decrypt(&segment, &get(&segment.url)) == media());
    assert_eq!(origin.count("/live/seg_10.ts"), 1);
}

/// An origin that breaks off once ends the reader's connection, and is asked again by the next one.
fn check_truncation(framing: Framing) {
    let tries = Arc::new(AtomicUsize::new(0));
    // It breaks off when the reader has the beginning: before that, it would be a clean 502.
    let gate = Gate::new();
    let held = gate.clone();
    let (_origin, shield) = stream(move |_| {
        let is_first = tries.fetch_add(1, Ordering::SeqCst) == 0;
        let (cut_after, gate) = (is_first.then_some(150_000), is_first.then(|| (100_000, held.clone())));
        Answer { framing, cut_after, gate, ..Answer::ok(media()) }
    });
    let segment = first_segment(&shield);
    let mut reader = open(&segment.url);
    let (head, mut answer) = read_some(&mut reader, 1);
    gate.open();
    // The connection may be reset, which is an abort too.
    let _ = reader.read_to_end(&mut answer);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    match framing {
        Framing::Chunked => assert!(!answer.ends_with(b"0\r\n\r\n"), "a well-formed end"),
        _ => assert!(
            answer.len() < 300_000 && head.to_lowercase().contains("content-length: 300016"),
            "{head}"
        ),
    }
    let again = get(&segment.url);
    assert!(decrypt(&segment, &again) == media(), "the part was not kept");
}

#[test]
fn a_truncated_origin_aborts_the_answer_and_is_not_kept() {
    check_truncation(Framing::ContentLength);
}

#[test]
fn a_truncated_chunked_origin_aborts_the_answer_and_is_not_kept() {
    check_truncation(Framing::Chunked);
}

#[test]
fn a_body_whose_end_cannot_be_proven_is_refused() {
    let (_origin, shield) = stream(|_| Answer { framing: Framing::Close, ..Answer::ok(media()) });
    let got = get(&first_segment(&shield).url);
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("Content-Length"), "{}", got.problem());
}

#[test]
fn a_transfer_coding_that_is_not_chunked_proves_no_end() {
    let (_origin, shield) = stream(|_| {
        let answer = Answer::ok(media()).header("Transfer-Encoding", "identity");
        Answer { framing: Framing::Close, cut_after: Some(1_000), ..answer }
    });
    assert_eq!(get(&first_segment(&shield).url).status, 502);
}

#[test]
fn http_1_0_gets_a_length_or_nothing() {
    let whole = Arc::new(AtomicUsize::new(0));
    let tries = Arc::clone(&whole);
    let (_origin, shield) = stream(move |_| {
        let cut_after = (tries.fetch_add(1, Ordering::SeqCst) == 0).then_some(150_000);
        Answer { framing: Framing::Chunked, cut_after, ..Answer::ok(media()) }
    });
    let segment = first_segment(&shield);
    let curl = || {
        std::process::Command::new("curl")
            .args(["-s", "-f", "--http1.0", &segment.url])
            .output()
            .expect("curl is installed")
    };
    assert!(!curl().status.success(), "curl took the part for the whole");
    let got = Got { status: 200, headers: vec![], body: curl().stdout };
    assert!(decrypt(&segment, &got) == media());
}

#[test]
fn a_chunked_origin_gives_a_chunked_answer_that_decrypts() {
    let (_origin, shield) = stream(|_| Answer { framing: Framing::Chunked, ..Answer::ok(media()) });
    let segment = first_segment(&shield);
    let got = get(&segment.url);
    assert_eq!(got.header("content-length"), None);
    assert!(decrypt(&segment, &got) == media());
    let part = ask("GET", &segment.url, &[("Range", "bytes=-10")]);
    assert_eq!(part.header("content-range"), Some("bytes 300006-300015/300016"));
    assert!(part.body == got.body[300_006..]);
}

#[test]
fn a_segment_says_its_length_type_tags_and_how_long_it_may_be_kept() {
    let (_origin, shield) = stream(|_| Answer::ok(media()).header("Content-Type", "video/mp2t"));
    let segment = first_segment(&shield);
    let got = get(&segment.url);
    assert_eq!(got.header("content-length"), Some("300016"));
    assert_eq!(got.header("content-type"), Some("video/mp2t"));
    assert_eq!(got.header("accept-ranges"), Some("bytes"));
    assert_eq!(got.header("cache-control"), Some("public, max-age=604800, immutable"));
    let key = segment.key_url.rsplit('/').next().unwrap();
    assert_eq!(
        got.header("surrogate-key"),
        Some(format!("keyshield-stream-live keyshield-key-{key}").as_str())
    );
    assert_eq!(got.header("cache-tag"), Some(format!("keyshield-stream-live,keyshield-key-{key}").as_str()));
    assert_eq!(got.header("access-control-allow-origin"), Some("*"));

    let head = ask("HEAD", &segment.url, &[]);
    assert_eq!((head.status, head.body.len()), (200, 0));
    for name in ["content-length", "content-type", "etag", "accept-ranges"] {
        assert_eq!(head.header(name), got.header(name), "{name}");
    }
}

#[test]
fn ranges_are_answered_on_complete_flows() {
    let (_origin, shield) = stream(|_| Answer::ok(media()));
    let url = first_segment(&shield).url;
    let whole = get(&url).body;
    let part = |range: &str| ask("GET", &url, &[("Range", range)]);
    let got = part("bytes=16-31");
    assert_eq!((got.status, got.header("content-range")), (206, Some("bytes 16-31/300016")));
    assert_eq!(got.header("content-length"), Some("16"));
    assert_eq!(got.body, whole[16..32]);
    assert!(part("bytes=100000-").body == whole[100_000..]);
    assert!(part("bytes=-16").body == whole[300_000..]);
    let outside = part("bytes=300016-");
    assert_eq!((outside.status, outside.header("content-range")), (416, Some("bytes */300016")));
    assert_eq!(outside.header("cache-control"), Some("no-store"));
    let several = part("bytes=0-1,5-6");
    assert_eq!((several.status, several.body.len()), (200, 300_016));
}

#[test]
fn ranges_are_answered_on_flows_that_fill() {
    let gate = Gate::new();
    let held = gate.clone();
    let (_origin, shield) =
        stream(move |_| Answer { gate: Some((100_000, held.clone())), ..Answer::ok(media()) });
    let url = first_segment(&shield).url;
    // Within what has come: answered while the origin holds the rest back.
    let early = ask("GET", &url, &[("Range", "bytes=16-31")]);
    assert_eq!((early.status, early.header("content-range")), (206, Some("bytes 16-31/300016")));
    gate.open();
    let late = ask("GET", &url, &[("Range", "bytes=200000-200015")]);
    let whole = get(&url).body;
    assert_eq!(early.body, whole[16..32]);
    assert_eq!(late.body, whole[200_000..200_016]);
}

#[test]
fn an_etag_saves_the_bytes_and_guards_ranges() {
    let (origin, shield) = stream(|_| Answer::ok(media()));
    let url = first_segment(&shield).url;
    let etag = get(&url).header("etag").unwrap().to_owned();
    // Another process, whose memory is empty: it need not ask the origin for what the client has.
    let shield = Running::serve_in(shield.kill(), &config(&origin, ""));
    let url = shield.at(url::Url::parse(&url).unwrap().path());
    let same = ask("GET", &url, &[("If-None-Match", &format!("\"x\", W/{etag}"))]);
    assert_eq!((same.status, same.body.len()), (304, 0));
    assert_eq!(origin.count("/live/seg_10.ts"), 1);
    assert_eq!(ask("GET", &url, &[("If-None-Match", "\"other\"")]).status, 200);
    let range = ("Range", "bytes=0-9");
    assert_eq!(ask("GET", &url, &[range, ("If-Range", &etag)]).status, 206);
    assert_eq!(ask("GET", &url, &[range, ("If-Range", "\"other\"")]).status, 200);
}

#[test]
fn plaintext_of_an_encrypted_stream_does_not_leave() {
    let (origin, shield) = stream(|_| Answer::ok(media()));
    let segment = first_segment(&shield);
    let unlinked = shield.get("/live/seg_10.ts");
    assert_eq!(unlinked.status, 403);
    assert!(unlinked.problem().contains("links"), "{}", unlinked.problem());

    let path = segment.url.strip_prefix(&shield.url).unwrap().to_owned();
    let link = path.split('/').find(|part| part.starts_with('~')).unwrap();
    let (_, mac) = link.rsplit_once('.').unwrap();
    for forged in [
        path.replace("seg_10", "seg_11"),
        path.replace("/live/", "/other/"),
        path.replace(".10.", ".11."),
        path.replace(".10.", ".clear."),
        path.replace(".10.", ".init."),
        path.replace(mac, "AAAAAAAAAAAAAAAA"),
        path.replace(&format!(".{mac}"), ""),
    ] {
        let got = shield.get(&forged);
        assert!([403, 410].contains(&got.status), "{forged}: {}", got.status);
        assert!(!got.problem().is_empty());
    }
    let other_key = path.replace(&link[1..33], &"ab".repeat(16));
    assert_eq!(shield.get(&other_key).status, 410);
    for spelling in ["/%6Cive/seg_10.ts", "/live/%73eg_10.ts", "/x/../live/seg_10.ts", "//live/seg_10.ts"] {
        let mut stream = TcpStream::connect(shield.url.strip_prefix("http://").unwrap()).unwrap();
        write!(stream, "GET {spelling} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(
            ["HTTP/1.1 400", "HTTP/1.1 403"].iter().any(|s| answer.starts_with(s)),
            "{spelling}: {answer}"
        );
    }
    // Nothing of this made the origin send more than the first bytes of a segment.
    let forged = origin.targets().iter().filter(|t| t.contains("seg_11")).count();
    assert_eq!(forged, 0);
}

#[test]
fn paths_outside_every_stream_pass_only_where_the_origin_says_so() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok(PLAYLIST),
        "/poster.jpg?v=2" => Answer::ok("poster").header("Content-Type", "image/jpeg"),
        _ => Answer::ok(media()),
    });
    let shut = Running::serve(&config(&origin, ""));
    let refused = shut.get("/poster.jpg?v=2");
    assert_eq!(refused.status, 404);
    assert!(refused.problem().contains("no stream"), "{}", refused.problem());

    let open = Running::serve(&config(&origin, "pass_through = true\n"));
    let passed = open.get("/poster.jpg?v=2");
    assert_eq!((passed.status, passed.text().as_str()), (200, "poster"));
    assert_eq!(passed.header("content-type"), Some("image/jpeg"));
    assert_eq!(origin.last("/poster.jpg?v=2").headers["host"], origin.address.to_string());
    // The stream is no less encrypted for it.
    assert_eq!(open.get("/live/seg_10.ts").status, 403);
    let segment = first_segment(&open);
    assert!(decrypt(&segment, &get(&segment.url)) == media());
}

#[test]
fn a_playlist_is_told_by_its_content_and_comes_out_of_gzip() {
    let gzipped = {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(PLAYLIST.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/live/watch?channel=1" => Answer::ok(gzipped.clone()).header("Content-Encoding", "gzip"),
        "/live/not-really.m3u8" => Answer::ok("<html>an error page</html>"),
        _ => Answer::ok(PLAYLIST),
    });
    let shield = Running::serve(&config(&origin, "query_params = [\"channel\"]\n"));
    let got = shield.get("/live/watch?channel=1");
    assert_eq!(got.status, 200);
    assert_eq!(got.header("content-type"), Some("application/vnd.apple.mpegurl"));
    assert_eq!(segments(&shield.at("/live/watch"), &got.text()).len(), 3);
    assert!(origin.last("/live/watch?channel=1").headers["accept-encoding"].contains("gzip"));
    assert_eq!(shield.get("/live/not-really.m3u8").status, 403);
}

#[test]
fn viewers_queries_neither_reach_the_origin_nor_multiply_playlists() {
    let (origin, shield) = stream(|_| Answer::ok(media()));
    let first = shield.get("/live/index.m3u8?token=a");
    for query in ["?token=b", "?CMCD=bl%3D100", ""] {
        assert_eq!(shield.get(&format!("/live/index.m3u8{query}")).body, first.body);
    }
    assert!(origin.targets().iter().all(|target| target == "/live/index.m3u8"), "{:?}", origin.targets());
}

#[test]
fn playlists_that_a_query_chooses_have_schedules_of_their_own() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok(PLAYLIST),
        "/live/index.m3u8?start=1000" => Answer::ok(PLAYLIST.replace("SEQUENCE:10", "SEQUENCE:1000")),
        _ => Answer::ok(media()),
    });
    let shield = Running::serve(&config(&origin, "query_params = [\"start\"]\n"));
    let now = || shield.get("/live/index.m3u8").body;
    let before = now();
    assert_eq!(shield.get("/live/index.m3u8?start=1000").status, 200);
    assert_eq!(now(), before, "one viewer's time shift changes nobody's keys");
}

#[test]
fn segments_that_a_query_chooses_are_not_taken_for_one_another() {
    let playlist = |r: u32| format!("#EXTM3U\n#EXTINF:4,\nseg?r={r}\n");
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/live/720.m3u8" => Answer::ok(playlist(720)),
        "/live/1080.m3u8" => Answer::ok(playlist(1080)),
        "/live/seg?r=720" => Answer::ok(vec![72; 5_000]),
        "/live/seg?r=1080" => Answer::ok(vec![108; 5_000]),
        _ => Answer::status(403),
    });
    let shield = Running::serve(&config(&origin, ""));
    for (name, byte) in [("720", 72), ("1080", 108)] {
        let segment = fetch_segments(&shield.at(&format!("/live/{name}.m3u8"))).remove(0);
        // Whoever leaves the query out gets the origin's refusal, and nobody else does.
        assert_eq!(get(segment.url.split('?').next().unwrap()).status, 403);
        assert_eq!(decrypt(&segment, &get(&segment.url)), vec![byte; 5_000]);
    }
}

#[test]
fn a_playlist_may_be_kept_for_half_its_target_duration_and_has_an_etag() {
    let (_origin, shield) = stream(|_| Answer::ok(media()));
    let got = shield.get("/live/index.m3u8");
    assert_eq!(got.header("cache-control"), Some("public, max-age=2"));
    assert_eq!(got.header("access-control-allow-origin"), Some("*"));
    let etag = got.header("etag").unwrap();
    let same = ask("GET", &shield.at("/live/index.m3u8"), &[("If-None-Match", etag)]);
    assert_eq!((same.status, same.body.len()), (304, 0));
    let head = ask("HEAD", &shield.at("/live/index.m3u8"), &[]);
    assert_eq!(head.header("content-length"), Some(got.body.len().to_string().as_str()));
    let preflight = ask("OPTIONS", &shield.at("/live/index.m3u8"), &[("Origin", "https://a.example")]);
    assert_eq!(preflight.status, 204);
    assert_eq!(preflight.header("access-control-allow-origin"), Some("*"));
    let post = ask("POST", &shield.at("/live/index.m3u8"), &[]);
    assert_eq!((post.status, post.header("allow")), (405, Some("GET, HEAD, OPTIONS")));
}

#[test]
fn a_playlist_that_cannot_be_rewritten_is_a_502_with_its_line() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/ranges.m3u8" => Answer::ok("#EXTM3U\n#EXTINF:4,\n#EXT-X-BYTERANGE:10\na.ts\n"),
        "/live/part.m3u8" => Answer::ok("#EXTM3U\n#EXT-X-PART:DURATION=1\n#EXTINF:4,\na.ts\n"),
        "/live/variable.m3u8" => Answer::ok("#EXTM3U\n#EXTINF:4,\n{$where}/a.ts\n"),
        "/live/foreign.m3u8" => Answer::ok("#EXTM3U\n#EXTINF:4,\nhttp://evil.example/a.ts\n"),
        "/live/drm.m3u8" => {
            Answer::ok("#EXTM3U\n#EXT-X-KEY:METHOD=SAMPLE-AES,URI=\"skd://k\"\n#EXTINF:4,\na.ts\n")
        }
        "/live/long.m3u8" => Answer::ok(format!("#EXTM3U\n{}", "# padding\n".repeat(200_000))),
        _ => Answer::status(404),
    });
    let shield = Running::serve(&format!("[playlists]\nmax_bytes = 1000000\n{}", config(&origin, "")));
    for (path, reason) in [
        ("/live/ranges.m3u8", "line 3: EXT-X-BYTERANGE: \"10\" has no offset"),
        ("/live/part.m3u8", "line 2: EXT-X-PART: it has no URI"),
        ("/live/variable.m3u8", "line 3: the variable \"where\" is not defined"),
        ("/live/foreign.m3u8", "line 3: the URI \"http://evil.example/a.ts\""),
        ("/live/drm.m3u8", "line 2: the origin's segments are already encrypted (METHOD=SAMPLE-AES)"),
        ("/live/long.m3u8", "longer than"),
    ] {
        let got = shield.get(path);
        assert_eq!(got.status, 502, "{path}");
        assert!(got.problem().contains(reason), "{}", got.problem());
    }
    assert_eq!(shield.get("/live/missing.m3u8").status, 404);
}

#[test]
fn a_multivariant_playlist_names_nothing_that_would_play_in_clear() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/good.m3u8" => Answer::ok("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nindex.m3u8\n"),
        "/live/clear.m3u8" => Answer::ok("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n/shared/audio.m3u8\n"),
        _ => Answer::ok(PLAYLIST),
    });
    let shield = Running::serve(&config(&origin, "pass_through = true\n"));
    assert_eq!(shield.get("/live/good.m3u8").status, 200);
    let got = shield.get("/live/clear.m3u8");
    assert_eq!(got.status, 502);
    assert!(got.problem().contains("outside every stream"), "{}", got.problem());
}

#[test]
fn every_spelling_of_a_playlists_path_gives_segments_that_play() {
    let origin = Origin::start(|request| match request.target.as_str() {
        target if target.ends_with(".m3u8") => Answer::ok("#EXTM3U\n#EXTINF:4,\na%2Db.ts\n"),
        _ => Answer::ok(media()),
    });
    let shield = Running::serve(&config(&origin, ""));
    for directory in ["caf%C3%A9", "caf%c3%a9", "%7Ebob", "~bob", "a%20b"] {
        let playlist = shield.at(&format!("/live/{directory}/a.m3u8"));
        let text = get(&playlist).text();
        // By hand: the `url` crate would normalise what a player may leave as it is.
        let uri = text.lines().last().unwrap();
        for uri in [uri.to_owned(), uri.replace("%2D", "-")] {
            let got = get(&format!("{}/{uri}", playlist.rsplit_once('/').unwrap().0));
            assert_eq!((got.status, got.body.len()), (200, 300_016), "{directory} {uri}");
        }
    }
}

#[test]
fn an_absurd_duration_harms_nobody() {
    let absurd = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4000000000000000000,\na.ts\n";
    let origin = Origin::start(move |_| Answer::ok(absurd));
    let shield = Running::serve(&config(&origin, ""));
    assert_eq!(shield.get("/live/index.m3u8").status, 200);
    let sweeps = || shield.metric("keyshield_sweep_seconds_count");
    let before = sweeps();
    wait_for("further sweeps", || (sweeps() > before + 2.0).then_some(()));
    assert_eq!(shield.metric("keyshield_sweep_errors_total"), 0.0);
}

#[test]
fn a_playlist_may_be_as_long_as_the_limit_says() {
    let long = format!("{PLAYLIST}{}", "# padding\n".repeat(90_000));
    let body = long.clone();
    let origin = Origin::start(move |_| Answer::ok(body.clone()));
    let limit = long.len();
    for (limit, status) in [(limit, 200), (limit - 1, 502)] {
        let shield = Running::serve(&format!("[playlists]\nmax_bytes = {limit}\n{}", config(&origin, "")));
        assert_eq!(shield.get("/live/index.m3u8").status, status);
    }
}

#[test]
fn an_empty_live_playlist_is_served_and_costs_no_key() {
    let empty = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n";
    let origin = Origin::start(move |_| Answer::ok(empty));
    let shield = Running::serve(&config(&origin, ""));
    assert_eq!(shield.get("/live/index.m3u8").text(), empty);
    assert_eq!(shield.metric("keyshield_key_promotions_total"), 1.0, "only the stream's first");
}

#[test]
fn a_change_of_policy_does_not_touch_what_was_published() {
    let (origin, shield) = stream(|_| Answer::ok(media()));
    let (playlist, segment) = (shield.get("/live/index.m3u8").body, first_segment(&shield));
    let body = get(&segment.url).body;
    let dir = shield.kill();
    let policy = "[streams.policy]\nkey_method = \"AES-256\"\niv_mode = \"sequence\"\n";
    let again = Running::serve_in(dir, &(config(&origin, "") + policy));
    assert_eq!(again.get("/live/index.m3u8").body, playlist);
    assert!(get(&first_segment(&again).url).body == body);
}

#[test]
fn an_origins_signed_query_reaches_it_and_a_changed_one_does_not() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok("#EXTM3U\n#EXTINF:4,\na.ts?sig=x%2Fy&e=1\n"),
        "/live/a.ts?sig=x%2Fy&e=1" => Answer::ok(media()),
        _ => Answer::status(403),
    });
    let shield = Running::serve(&config(&origin, ""));
    let segment = first_segment(&shield);
    assert!(decrypt(&segment, &get(&format!("{}&CMCD=bl%3D100", segment.url))) == media());
    let changed = segment.url.replace("_oq=", "_oq=A");
    assert_eq!(get(&changed).status, 403);
}

#[test]
fn the_key_endpoint_gives_raw_bytes_or_404() {
    let (_origin, shield) = stream(|_| Answer::ok(media()));
    let segment = first_segment(&shield);
    let key = get(&segment.key_url);
    assert_eq!((key.status, key.body.len()), (200, 16));
    assert_eq!(key.header("content-type"), Some("application/octet-stream"));
    assert_eq!(key.header("cache-control"), Some("private, max-age=300"));
    assert_eq!(key.header("access-control-allow-origin"), Some("*"));
    assert!(key.header("surrogate-key").unwrap().contains("keyshield-key-"));
    for unknown in ["/api/hls/keys/", "/api/hls/keys/x", &format!("/api/hls/keys/{}", "ab".repeat(16))] {
        assert_eq!(shield.get(unknown).status, 404, "{unknown}");
    }
}

#[test]
fn aes_256_streams_name_their_method_and_decrypt() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/live/index.m3u8" => Answer::ok(PLAYLIST),
        _ => Answer::ok(media()),
    });
    let policy = "[streams.policy]\nkey_method = \"AES-256\"\n";
    let shield = Running::serve(&(config(&origin, "") + policy));
    let playlist = shield.get("/live/index.m3u8").text();
    assert!(playlist.contains("#EXT-X-KEY:METHOD=AES-256,"), "{playlist}");
    let segment = first_segment(&shield);
    let key = get(&segment.key_url).body;
    assert_eq!(key.len(), 32);
    assert!(openssl_decrypt(&get(&segment.url).body, &key, &segment.iv) == media());
}

#[test]
fn the_same_playlists_and_ciphertext_after_a_restart() {
    let (origin, shield) = stream(|_| Answer::ok(media()));
    let path = "/live/index.m3u8";
    let (playlist, body) = (shield.get(path).body, get(&first_segment(&shield).url).body);
    let dir = shield.kill();
    let again = Running::serve_in(dir, &config(&origin, ""));
    assert_eq!(again.get(path).body, playlist);
    assert!(get(&first_segment(&again).url).body == body);
}

#[test]
fn http_2_in_clear_text_is_spoken_too() {
    let (_origin, shield) = stream(|_| Answer::ok(media()));
    let segment = first_segment(&shield);
    let output = std::process::Command::new("curl")
        .args(["-s", "--http2-prior-knowledge", "-w", "%{stderr}%{http_version} %{http_code}", &segment.url])
        .output()
        .expect("curl is installed");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "2 200");
    let got = Got { status: 200, headers: vec![], body: output.stdout };
    assert!(decrypt(&segment, &got) == media());
}

#[test]
fn a_truncated_origin_resets_an_http_2_stream() {
    let (_origin, shield) = stream(|_| Answer { cut_after: Some(150_000), ..Answer::ok(media()) });
    let segment = first_segment(&shield);
    let output = std::process::Command::new("curl")
        .args(["-s", "--http2-prior-knowledge", "-o", "/dev/null", &segment.url])
        .output()
        .expect("curl is installed");
    assert!(!output.status.success(), "curl took the part for the whole");
    assert!(try_ask("GET", &segment.url, &[]).is_err());
}
