//! A key is taken back: what players, caches and latecomers get from that moment on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::control_api::{call, tokens};
use crate::harness::{
    Answer as Got, Running, Segment, get, openssl_decrypt, pause, repository, segments, wait_for,
};
use crate::origin::{Answer, Origin, Seen};

const PATH: &str = "/live/720p.m3u8";

/// Segments of `target_secs` each, the body of each after its name.
fn answer(target_secs: u32) -> impl Fn(&Seen) -> Answer + Send + Sync + 'static {
    move |request| {
        if !request.target.ends_with(".m3u8") {
            return Answer::ok(body(&request.target));
        }
        let header = format!("#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:{target_secs}\n");
        let segments = (10..14).map(|n| format!("#EXTINF:{target_secs},\nseg_{n}.ts\n")).collect::<String>();
        Answer::ok(format!("{header}#EXT-X-MEDIA-SEQUENCE:10\n{segments}"))
    }
}

fn body(path: &str) -> Vec<u8> {
    path.bytes().cycle().take(5_000).collect()
}

fn shield(origin: &Origin, policy: &str) -> Running {
    let url = origin.url();
    Running::serve(&format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"ch1\"\nplaylist_url = \"{url}{PATH}\"\n[streams.policy]\n{policy}{}",
        tokens()
    ))
}

fn published(shield: &Running) -> Vec<Segment> {
    let playlist = shield.get(PATH);
    assert_eq!(playlist.status, 200);
    segments(&shield.at(PATH), &playlist.text())
}

fn revoke(shield: &Running) -> Value {
    call(shield, "POST", "/ch1/emergency-revoke", json!({"reason": "found on a forum"})).ok()
}

fn decrypts(segment: &Got, key: &[u8], iv: &str, name: &str) {
    let plain = openssl_decrypt(&segment.body, key, iv);
    assert!(plain == body(&format!("/live/{name}")), "{name}");
}

fn without_query(url: &str) -> &str {
    url.split('?').next().unwrap()
}

#[test]
fn the_key_is_refused_at_once_and_the_playlist_names_its_successor_under_the_same_paths() {
    let origin = Origin::start(answer(6));
    let shield = shield(&origin, "");
    let before = published(&shield);
    let leaked = get(&before[0].key_url).body;

    let started = Instant::now();
    let answer = revoke(&shield);
    println!("revoked in {:?}", started.elapsed());
    for method in ["GET", "HEAD"] {
        let refused = crate::harness::ask(method, &before[0].key_url, &[]);
        assert_eq!(refused.status, 410, "{method}");
        assert!(refused.header("cache-control").unwrap().contains("max-age=1"), "{refused:?}");
    }
    let after = published(&shield);
    let successor = get(&after[0].key_url).body;
    assert_ne!(successor, leaked);
    assert!(after[0].key_url.ends_with(answer["successorKey"]["keyId"].as_str().unwrap()));
    for (old, new) in before.iter().zip(&after) {
        assert_eq!(without_query(&old.url), without_query(&new.url), "a published path never changes");
        assert_ne!((&old.iv, &old.key_url), (&new.iv, &new.key_url));
        let served = get(&new.url);
        decrypts(&served, &successor, &new.iv, &new.name);
        assert!(served.header("cache-control").unwrap().contains("immutable"));
        let tags = served.header("surrogate-key").unwrap();
        assert!(tags.contains(new.key_url.rsplit('/').next().unwrap()), "{tags}");
        assert!(!tags.contains(old.key_url.rsplit('/').next().unwrap()), "{tags}");
    }
    let playlist = shield.get(PATH);
    assert!(!playlist.header("cache-tag").unwrap().contains(before[0].key_url.rsplit('/').next().unwrap()));
}

#[test]
fn a_player_with_an_older_playlist_goes_on_for_the_transition_and_no_longer() {
    let origin = Origin::start(answer(1));
    let shield = shield(&origin, "revocation_transition_target_durations = 3\n");
    let held = published(&shield);
    let leaked = get(&held[0].key_url).body;
    let answer = revoke(&shield);
    assert_eq!(answer["transition"], 3, "{answer}");

    // It has the key, and its playlist is without `r`.
    let transitional = get(&held[0].url);
    decrypts(&transitional, &leaked, &held[0].iv, &held[0].name);
    assert_eq!(transitional.header("cache-control"), Some("no-store"));
    // An If-None-Match for what is under the old key does not keep the new bytes back.
    let now = published(&shield);
    let etag = transitional.header("etag").unwrap().to_owned();
    let asked = crate::harness::ask("GET", &now[0].url, &[("if-none-match", &etag)]);
    assert_eq!(asked.status, 200);

    let successor = get(&now[0].key_url).body;
    let over = wait_for("the end of the transition", || {
        let served = get(&held[0].url);
        (served.header("cache-control") != Some("no-store")).then_some(served)
    });
    // What a CDN that drops queries keeps from now on.
    decrypts(&over, &successor, &now[0].iv, &now[0].name);
}

#[test]
fn a_strict_stream_has_no_transition() {
    let origin = Origin::start(answer(6));
    let shield = shield(&origin, "revocation_transition_target_durations = 0\n");
    let held = published(&shield);
    revoke(&shield);
    let now = published(&shield);
    let successor = get(&now[0].key_url).body;
    let served = get(&held[0].url);
    decrypts(&served, &successor, &now[0].iv, &now[0].name);
}

#[test]
fn a_successor_that_leaks_too_has_a_successor() {
    let origin = Origin::start(answer(6));
    let shield = shield(&origin, "");
    let first = published(&shield);
    revoke(&shield);
    let second = published(&shield);
    let second_key = get(&second[0].key_url).body;
    revoke(&shield);
    let third = published(&shield);
    assert_eq!(get(&second[0].key_url).status, 410);
    let third_key = get(&third[0].key_url).body;
    decrypts(&get(&third[0].url), &third_key, &third[0].iv, &third[0].name);
    // Each generation of players goes on under the key that its playlist named.
    decrypts(&get(&second[0].url), &second_key, &second[0].iv, &second[0].name);
    assert_eq!(without_query(&first[0].url), without_query(&third[0].url));
    // What no playlist ever said names no successor.
    let odd = get(&format!("{}?r=99", without_query(&third[0].url)));
    assert_eq!((odd.status, odd.header("cache-control")), (200, Some("no-store")));
}

#[test]
fn a_revoked_key_is_not_served_stale_while_the_origin_is_away() {
    let is_away = Arc::new(AtomicBool::new(false));
    let (away, well) = (Arc::clone(&is_away), answer(6));
    let origin = Origin::start(
        move |request| {
            if away.load(Ordering::SeqCst) { Answer::status(500) } else { well(request) }
        },
    );
    let shield = shield(&origin, "");
    assert!(shield.get(PATH).text().contains("/api/hls/keys/"));
    is_away.store(true, Ordering::SeqCst);
    revoke(&shield);
    assert_eq!(shield.get(PATH).status, 502);
    is_away.store(false, Ordering::SeqCst);
    wait_for("the playlist under the successor", || (shield.get(PATH).status == 200).then_some(()));
}

#[test]
fn a_revocation_outlives_a_kill() {
    let origin = Origin::start(answer(6));
    let url = origin.url();
    let config = format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"ch1\"\nplaylist_url = \"{url}{PATH}\"\n{}",
        tokens()
    );
    let shield = Running::serve(&config);
    let before = published(&shield);
    revoke(&shield);
    let after = published(&shield);
    let shield = Running::serve_in(shield.kill(), &config);
    let path = |url: &str| url::Url::parse(url).unwrap()[url::Position::BeforePath..].to_owned();
    assert_eq!(get(&shield.at(&path(&before[0].key_url))).status, 410);
    let again = published(&shield);
    assert_eq!(
        again.iter().map(|s| (path(&s.url), path(&s.key_url), s.iv.clone())).collect::<Vec<_>>(),
        after.iter().map(|s| (path(&s.url), path(&s.key_url), s.iv.clone())).collect::<Vec<_>>(),
    );
}

#[test]
fn hls_js_and_ffmpeg_play_through_a_revocation() {
    let demo = Running::demo_with(
        tempfile::tempdir().unwrap(),
        crate::harness::free_port(),
        &[("KEYSHIELD_DEMO_TOKEN", "ks_revocation_test")],
    );
    let url = demo.at("/demo/master.m3u8");
    let spawn = |command: &mut std::process::Command| {
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let hls = spawn(std::process::Command::new("node").arg(repository("tests/players/chromium.mjs")).args([
        "--url",
        &url,
        "--seconds",
        "30",
    ]));
    let ffmpeg = spawn(
        std::process::Command::new("ffmpeg")
            .args(["-nostdin", "-v", "error", "-i", &url, "-t", "26", "-f", "null", "-"]),
    );
    // In the middle of playing, and not at a key change.
    pause(Duration::from_secs(12));
    let revoke = || {
        std::process::Command::new(crate::harness::KEYSHIELD)
            .args(["keys", "revoke", "demo", "--reason", "a test", "--json", "--control", &demo.control])
            .env("KEYSHIELD_TOKEN", "ks_revocation_test")
            .output()
            .unwrap()
    };
    let output = revoke();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(!report["revokedKeys"].as_array().unwrap().is_empty());

    let ffmpeg = ffmpeg.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ffmpeg.stderr), "");
    let hls = hls.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&hls.stdout).into_owned();
    assert!(hls.status.success(), "{text}{}", String::from_utf8_lossy(&hls.stderr));
    let played: Value = serde_json::from_str(&text).unwrap();
    println!("{text}");
    assert_eq!((&played["fatalErrors"], &played["decryptErrors"]), (&json!(0), &json!(0)), "{text}");
    assert!(played["played"].as_f64().unwrap() > 24.0, "the playhead moves: {text}");
}

#[test]
fn a_playlist_that_was_on_its_way_does_not_name_a_key_that_was_taken_back_meanwhile() {
    let is_slow = Arc::new(AtomicBool::new(false));
    let slow = Arc::clone(&is_slow);
    let fast = answer(2);
    let origin = Origin::start(move |request: &Seen| {
        if slow.load(Ordering::Relaxed) && request.target.ends_with(".m3u8") {
            pause(Duration::from_millis(3_000));
        }
        fast(request)
    });
    let shield = shield(&origin, "");
    let leaked = published(&shield)[0].key_url.clone();
    is_slow.store(true, Ordering::Relaxed);
    // No longer fresh, so the origin is asked; the stale one stands in when it takes too long.
    pause(Duration::from_millis(700));
    let waiting = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| shield.get(PATH));
        pause(Duration::from_millis(300));
        revoke(&shield);
        waiting.join().unwrap()
    });
    assert_eq!(waiting.status, 200);
    let leaked = format!("keys/{}\"", leaked.rsplit('/').next().unwrap());
    assert!(!waiting.text().contains(&leaked), "{}", waiting.text());
}
