//! The low-latency origin by itself, in the clear: what it owes to the specification and to players.
//!
//! What fails behind the shield and not here is the shield's doing.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{ask, get, repository};
use crate::ll_media::{FIRST_MSN, PART, PARTS, Place, RENDITIONS};
use crate::ll_origin::{LlOrigin, MASTER, Parts, TARGET_DURATION, WINDOW};
use crate::ll_playlist::{Follower, Playlist, blocking};
use crate::players::ffmpeg;

/// Plays for so long with hls.js in its low-latency mode, and says what it saw.
pub fn hls_js_report(url: &str, duration: Duration) -> Value {
    let secs = duration.as_secs().to_string();
    let output = Command::new("node")
        .arg(repository("tests/players/chromium.mjs"))
        .args(["--url", url, "--seconds", &secs, "--low-latency", "on"])
        .output()
        .expect("node is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
    serde_json::from_str(&text).unwrap()
}

/// What low-latency playback of `duration` is: smooth, close to the live edge, by parts, without an error.
pub fn check_low_latency(report: &Value, duration: Duration) {
    // hls.js gives a blocked reload 0.96 s and then asks again, and seeks to the live edge before there is anything of it:
    // on a busy machine both happen, and stop nothing.
    let is_late = |error: &&Value| {
        let details = error["details"].as_str().unwrap_or_default();
        error["fatal"] == false && (details.ends_with("LoadTimeOut") || details == "bufferSeekOverHole")
    };
    let errors: Vec<_> = report["errors"].as_array().unwrap().iter().filter(|e| !is_late(e)).collect();
    assert!(errors.is_empty() && report["fatalErrors"] == 0, "{report}");
    let figure = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("no {name}: {report}"));
    // Less the time it takes to begin.
    assert!(figure("played") > duration.as_secs_f64() - 5.0, "the playhead moves: {report}");
    assert!(figure("partsLoaded") > 20.0, "{report}");
    // It holds back by four parts, 1.28 s, and does not make up for the time it took to begin. By whole segments it
    // would hold back by three Target Durations.
    assert!(figure("latencySeconds") - figure("startupSeconds") < 2.5, "{report}");
}

/// Plays for so long with ffmpeg, which knows no parts.
pub fn check_ffmpeg(url: &str, duration: Duration) {
    let started = Instant::now();
    let (_, errors) =
        ffmpeg(&["-i", url, "-t", &duration.as_secs().to_string(), "-map", "0", "-f", "null", "-"]);
    assert_eq!(errors, "", "{url}");
    // It begins three segments back, and then has to wait for what it plays.
    assert!(started.elapsed() + 4 * TARGET_DURATION > duration, "{url} is live");
}

#[test]
fn a_playlist_lists_the_last_segments_the_parts_of_the_latest_and_the_next_part() {
    let origin = LlOrigin::start(Duration::from_secs(2), Parts::Files);
    origin.encoder.wait_for(Place { msn: FIRST_MSN + WINDOW, part: 1 }, TARGET_DURATION);
    origin.encoder.stop();
    let last = origin.last();
    for (rendition, other) in ["audio.m3u8", "video.m3u8"].into_iter().enumerate() {
        let playlist = Follower::start(&origin.at(&LlOrigin::playlist_path(rendition))).playlist;
        assert_eq!(playlist.segments.len() as u64, WINDOW, "{}", playlist.text);
        assert_eq!((playlist.last(), playlist.first_msn + WINDOW), (last, last.next().msn));
        let hint = playlist.hint.clone().unwrap();
        assert_eq!(hint, origin.at(&LlOrigin::part_path(rendition, last.next())));
        let report = format!("{other}\",LAST-MSN={},LAST-PART={}", last.msn, last.part);
        assert!(playlist.lines("#EXT-X-RENDITION-REPORT:URI=")[0].ends_with(&report), "{}", playlist.text);
        assert!(get(&format!("{hint}x")).status == 404);
    }
    // And m3u8-rs thinks that it is a playlist, too.
    let text = get(&origin.at("/live/video.m3u8")).text();
    assert!(m3u8_rs::parse_media_playlist_res(text.as_bytes()).is_ok(), "{text}");
}

#[test]
fn every_listed_part_and_segment_is_there_by_file_and_by_range() {
    for parts in [Parts::Files, Parts::Ranges] {
        let origin = LlOrigin::start(Duration::from_secs(2), parts);
        for rendition in 0..RENDITIONS.len() {
            let mut player = Follower::start(&origin.at(&LlOrigin::playlist_path(rendition)));
            player.next();
            for (place, link) in &player.playlist.parts {
                let got = match &link.range {
                    None => get(&link.url),
                    Some(range) => {
                        let (length, start) = range.split_once('@').unwrap();
                        let (length, start): (u64, u64) = (length.parse().unwrap(), start.parse().unwrap());
                        let range = format!("bytes={start}-{}", start + length - 1);
                        let got = ask("GET", &link.url, &[("Range", &range)]);
                        assert_eq!(got.status, 206);
                        got
                    }
                };
                assert_eq!(link.range.is_some(), parts == Parts::Ranges);
                assert!(got.body == origin.media.part(rendition, *place), "{link:?}");
            }
            for (msn, link) in &player.playlist.segments {
                let clear = origin.media.segment(rendition, *msn);
                assert!(get(&link.url).body == clear, "{link:?}");
                // As ffmpeg asks for everything.
                let got = ask("GET", &link.url, &[("Range", "bytes=0-")]);
                assert!(got.status == 206 && got.body == clear, "{link:?}");
            }
        }
    }
}

#[test]
fn a_reload_waits_for_what_it_asks_for_and_a_hundred_wait_as_well_as_one() {
    let origin = LlOrigin::start(Duration::from_secs(2), Parts::Files);
    let wanted = origin.last().next().next();
    let url = origin.at(&LlOrigin::playlist_path(0));
    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let url = format!("{url}{}", blocking(wanted));
            std::thread::spawn(move || (get(&url), Instant::now()))
        })
        .collect();
    assert!(origin.encoder.wait_for(wanted, TARGET_DURATION));
    let made = Instant::now();
    for waiting in waiting {
        let (answer, at) = waiting.join().unwrap();
        assert!(Playlist::parse(&url, &answer.text()).last() >= wanted);
        assert!(at.saturating_duration_since(made) < PART, "long after it was there");
    }
    assert_eq!(origin.count(&format!("{}{}", LlOrigin::playlist_path(0), blocking(wanted))), 100);
    // Whole segments can be waited for too, and what is past is there at once.
    let segment = get(&format!("{url}?_HLS_msn={}", wanted.msn + 1));
    assert!(Playlist::parse(&url, &segment.text()).segments.contains_key(&(wanted.msn + 1)));
    let beyond = Place { msn: wanted.msn, part: PARTS };
    assert!(Playlist::parse(&url, &get(&format!("{url}{}", blocking(beyond))).text()).last() > wanted);
}

#[test]
fn a_reload_that_asks_too_much_is_refused_and_one_that_waits_too_long_is_given_up() {
    let origin = LlOrigin::start(Duration::from_secs(2), Parts::Files);
    origin.encoder.stop();
    let last = origin.last();
    let status = |query: &str| get(&(origin.at(&LlOrigin::playlist_path(0)) + query)).status;
    assert_eq!(status("?_HLS_part=1"), 400);
    assert_eq!(status("?_HLS_msn=soon"), 400);
    assert_eq!(status(&format!("?_HLS_msn={}", last.msn + 3)), 400);
    assert_eq!(status(&blocking(last)), 200);
    let started = Instant::now();
    assert_eq!(status(&blocking(last.next())), 503);
    assert!(started.elapsed() >= 3 * TARGET_DURATION);
    origin.encoder.go_on();
    assert_eq!(status(&blocking(last.next())), 200);
}

#[test]
fn a_delta_update_leaves_out_what_is_older_than_the_skip_boundary() {
    let origin = LlOrigin::start(Duration::from_secs(2), Parts::Files);
    origin.encoder.stop();
    let player = Follower::start(&origin.at(&LlOrigin::playlist_path(1)));
    let delta = player.parse(&player.ask("?_HLS_skip=YES"));
    assert_eq!((delta.first_msn, delta.skipped), (player.playlist.first_msn, 5), "{}", delta.text);
    assert_eq!(delta.segments, player.playlist.segments.clone().split_off(&(delta.first_msn + 5)));
    assert_eq!((delta.parts, delta.hint), (player.playlist.parts, player.playlist.hint));
}

#[test]
fn a_hinted_part_comes_as_it_is_made() {
    let origin = LlOrigin::start(Duration::from_secs(3), Parts::Files);
    let mut player = Follower::start(&origin.at(&LlOrigin::playlist_path(0)));
    let place = origin.last().next().next();
    origin.encoder.stop_halfway(place);
    let hint = player.until_hint_at(place);
    let part = origin.media.part(0, place);
    let mut reader = crate::data_plane::open(&hint);
    let (head, first) = crate::data_plane::read_some(&mut reader, part.len() / 2);
    assert!(head.to_lowercase().contains("transfer-encoding: chunked"), "{head}");
    assert_eq!(origin.last().next(), place, "the encoder stands still");
    assert!(first.len() < part.len());
    origin.encoder.go_on();
    assert!(get(&hint).body == part);
}

#[test]
fn ffmpeg_plays_the_clear_low_latency_stream() {
    let duration = Duration::from_secs(8);
    let origin = LlOrigin::start(duration, Parts::Files);
    check_ffmpeg(&origin.at(MASTER), duration);
}

#[test]
fn hls_js_plays_the_clear_stream_by_parts_close_to_the_live_edge() {
    let duration = Duration::from_secs(12);
    let origin = LlOrigin::start(duration, Parts::Files);
    let report = hls_js_report(&origin.at(MASTER), duration);
    check_low_latency(&report, duration);
}
