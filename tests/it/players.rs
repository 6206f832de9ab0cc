//! What ffmpeg demuxes through the shield, to the bit, and the live demo in ffmpeg and hls.js. What other players take is
//! in the player matrix.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use crate::harness::{Running, repository};
use crate::media::{Media, folder_origin, make_one};
use crate::origin::Origin;

/// Runs ffmpeg; returns what it wrote to standard output and standard error.
pub fn ffmpeg(arguments: &[&str]) -> (String, String) {
    let output = Command::new("ffmpeg")
        .args(["-hide_banner", "-nostdin", "-v", "error"])
        .args(arguments)
        .output()
        .expect("ffmpeg is installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "ffmpeg {arguments:?}: {}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

/// The hash of every packet of every stream, as ffmpeg demuxes them.
fn stream_hashes(url: &str) -> String {
    let (hashes, errors) = ffmpeg(&["-i", url, "-map", "0", "-c", "copy", "-f", "streamhash", "-"]);
    assert_eq!(errors, "", "{url}");
    hashes
}

pub fn key_uris(playlist: &str) -> BTreeSet<String> {
    playlist
        .lines()
        .filter_map(|line| line.strip_prefix("#EXT-X-KEY:")?.split("URI=\"").nth(1)?.split('"').next())
        .map(str::to_owned)
        .collect()
}

fn vod_shield(origin: &Origin, policy: &str) -> Running {
    let url = origin.url();
    Running::serve(&format!(
        "[[origins]]\nname = \"vod\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"vod\"\nplaylist_url = \"{url}/vod/vod.m3u8\"\n\
         [streams.policy]\nsegments_per_key = 4\n{policy}"
    ))
}

fn check_vod(media: Media, policy: &str) {
    let dir = tempfile::tempdir().unwrap();
    make_one(media, &dir.path().join("vod"));
    let origin = folder_origin(dir.path());
    let shield = vod_shield(&origin, policy);
    let playlist = shield.get("/vod/vod.m3u8").text();
    assert_eq!(key_uris(&playlist).len(), 3, "12 segments at 4 a key: {playlist}");
    let clear = stream_hashes(&format!("{}/vod/vod.m3u8", origin.url()));
    assert_eq!(clear.lines().count(), 2, "video and audio: {clear}");
    assert_eq!(stream_hashes(&shield.at("/vod/vod.m3u8")), clear);
}

#[test]
fn ffmpeg_demuxes_a_ts_vod_through_the_shield_as_from_the_origin() {
    check_vod(Media::FfmpegTs, "");
}

#[test]
fn ffmpeg_demuxes_an_fmp4_vod_through_the_shield_as_from_the_origin() {
    check_vod(Media::FfmpegFmp4, "");
}

#[test]
fn ffmpeg_demuxes_an_fmp4_vod_whose_init_section_is_encrypted_too() {
    check_vod(Media::FfmpegFmp4, "encrypt_init_sections = true\n");
}

#[test]
fn ffmpeg_demuxes_the_other_iv_modes_too() {
    check_vod(Media::FfmpegTs, "iv_mode = \"period\"\n");
    check_vod(Media::FfmpegTs, "iv_mode = \"sequence\"\n");
}

#[test]
fn ffmpeg_plays_an_event_as_it_grows() {
    // A VOD without its end, marked EVENT: what a recording looks like while it runs.
    let dir = tempfile::tempdir().unwrap();
    make_one(Media::FfmpegTs, &dir.path().join("vod"));
    let playlist = dir.path().join("vod/vod.m3u8");
    let event = std::fs::read_to_string(&playlist).unwrap().replace("TYPE:VOD", "TYPE:EVENT");
    let whole = event.clone();
    let half: String = event.split_inclusive('\n').take(5 + 2 * 6).collect();
    std::fs::write(&playlist, &half).unwrap();
    let origin = folder_origin(dir.path());
    let shield = vod_shield(&origin, "");
    let before = shield.get("/vod/vod.m3u8").text();
    assert!(!before.contains("ENDLIST"), "{before}");
    std::fs::write(&playlist, &whole).unwrap();
    let after = crate::harness::wait_for("the end of the event", || {
        let text = shield.get("/vod/vod.m3u8").text();
        text.contains("ENDLIST").then_some(text)
    });
    assert!(after.starts_with(&before), "only appended:\n{before}\n{after}");
    let clear = stream_hashes(&format!("{}/vod/vod.m3u8", origin.url()));
    assert_eq!(stream_hashes(&shield.at("/vod/vod.m3u8")), clear);
}

#[test]
fn ffmpeg_plays_the_live_demo_over_key_changes_without_an_error() {
    let demo = Running::demo();
    let url = demo.at("/demo/master.m3u8");
    let before = demo.metric("keyshield_key_promotions_total");
    let (_, errors) = ffmpeg(&["-i", &url, "-t", "40", "-f", "null", "-"]);
    assert_eq!(errors, "");
    let rotations = demo.metric("keyshield_key_promotions_total") - before;
    assert!(rotations >= 2.0, "{rotations} rotations");
    let told = demo.logged().lines().filter(|line| line.starts_with("rotation ")).count();
    assert!(told >= 2, "one line a rotation: {told}");
}

#[test]
fn hls_js_plays_the_live_demo_over_key_changes_without_an_error() {
    let demo = Running::demo();
    let output = Command::new("node")
        .arg(repository("tests/players/chromium.mjs"))
        .args(["--url", &demo.at("/demo/master.m3u8"), "--seconds", "45"])
        .output()
        .expect("node is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_str(&text).unwrap();
    println!("{text}");
    assert_eq!(report["fatalErrors"], 0, "{text}");
    assert_eq!(report["decryptErrors"], 0, "{text}");
    assert!(report["played"].as_f64().unwrap() > 38.0, "the playhead moves: {text}");
    assert!(report["decodedFrames"].as_u64().unwrap() > 700, "{text}");
    assert!(report["keysLoaded"].as_array().unwrap().len() >= 4, "three rotations: {text}");
    assert!(report["fragmentsDecrypted"].as_u64().unwrap() >= 30, "{text}");
}
