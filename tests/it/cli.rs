//! The command line: what it prints, how it fails, what it leaves behind.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::harness::{KEYSHIELD, Running, free_port, get, repository};

fn keyshield(arguments: &[&str]) -> Output {
    Command::new(KEYSHIELD).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A demo on free ports that keeps its state in `data`.
fn demo_on(data: &Path) -> Output {
    let free = || format!("127.0.0.1:{}", free_port());
    let (listen, control, origin) = (free(), free(), free());
    let listeners = ["--listen", &listen, "--control-listen", &control, "--origin-listen", &origin];
    keyshield(&[&["demo", "--data", data.to_str().unwrap()], &listeners[..]].concat())
}

/// One line on standard error, and the exit code.
fn failure(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.lines().count(), 1, "one clear line: {text}");
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().unwrap(), text)
}

#[test]
fn help_has_examples() {
    for arguments in [&["--help"][..], &["serve", "--help"], &["rewrite", "--help"], &["demo", "--help"]] {
        let output = keyshield(arguments);
        assert!(output.status.success());
        assert!(stdout(&output).contains("Example"), "{arguments:?}: {}", stdout(&output));
    }
    assert!(stdout(&keyshield(&["--version"])).starts_with("keyshield "));
}

#[test]
fn a_bad_argument_is_exit_code_2() {
    assert_eq!(keyshield(&["serve"]).status.code(), Some(2));
    assert_eq!(keyshield(&["demo", "--listen", "nowhere"]).status.code(), Some(2));
    assert_eq!(keyshield(&["no-such-command"]).status.code(), Some(2));
    assert_eq!(keyshield(&["rewrite", "--segments-per-key", "0", "/dev/null"]).status.code(), Some(2));
}

#[test]
fn check_shows_what_the_shipped_configuration_comes_to() {
    let path = repository("config/keyshield.toml");
    let output = keyshield(&["check", "--config", path.to_str().unwrap()]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("stream      ch1 at /live/ch1/master.m3u8: AES-128"), "{text}");
    assert!(text.contains("every 30 min or 100 segments, 3 made ahead"), "{text}");
}

#[test]
fn a_wrong_configuration_is_one_line_with_its_place_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    std::fs::write(&path, "[shield]\nlisten = \"somewhere\"\n").unwrap();
    let (code, line) = failure(&keyshield(&["check", "--config", path.to_str().unwrap()]));
    assert_eq!(code, 2);
    assert!(line.contains("shield.listen") && line.contains("somewhere"), "{line}");

    let missing = dir.path().join("none.toml");
    let (code, line) = failure(&keyshield(&["serve", "--config", missing.to_str().unwrap()]));
    assert_eq!(code, 2);
    assert!(line.contains("none.toml"), "{line}");
}

#[test]
fn a_taken_port_is_one_clear_line() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let free = || format!("127.0.0.1:{}", free_port());
    for flag in ["--listen", "--control-listen", "--origin-listen"] {
        let (mut listen, mut control, mut origin) = (free(), free(), free());
        *match flag {
            "--listen" => &mut listen,
            "--control-listen" => &mut control,
            _ => &mut origin,
        } = address.clone();
        let output = keyshield(&[
            "demo",
            "--listen",
            &listen,
            "--control-listen",
            &control,
            "--origin-listen",
            &origin,
        ]);
        let (code, line) = failure(&output);
        assert_eq!(code, 1, "{flag}");
        assert!(line.contains(&address) && line.contains("in use"), "{flag}: {line}");
    }
}

#[test]
fn logs_are_json_lines_when_they_are_asked_for() {
    let shield = Running::serve("[log]\nformat = \"json\"\n");
    let logged = shield.logged();
    assert!(logged.lines().count() >= 1);
    for line in logged.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
    }
}

#[test]
fn the_demo_says_where_it_plays_and_ends_cleanly_on_ctrl_c() {
    let mut demo = Running::demo();
    let logged = demo.logged();
    for url in [demo.at("/demo/master.m3u8"), format!("{}/demo/master.m3u8", demo.origin)] {
        assert!(logged.contains(&url), "{logged}");
    }
    let health = get(&format!("{}/api/hls/health", demo.control)).text();
    assert!(health.contains("\"status\":\"healthy\"") && health.contains("\"activeStreams\":1"), "{health}");
    assert_eq!(demo.stop("-INT"), Some(0));
    assert!(demo.logged().contains("stopped"), "{}", demo.logged());
}

#[test]
fn sigterm_ends_the_shield_with_exit_code_0() {
    let mut demo = Running::demo();
    assert_eq!(demo.stop("-TERM"), Some(0));
}

#[test]
fn the_master_key_file_is_its_owners_alone() {
    let demo = Running::demo();
    let file = demo.dir().join("data/keyshield.master");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_master_key_that_others_may_read_ends_the_start_with_one_line() {
    let mut demo = Running::demo();
    assert_eq!(demo.stop("-INT"), Some(0));
    let data = demo.dir().join("data");
    std::fs::set_permissions(data.join("keyshield.master"), PermissionsExt::from_mode(0o644)).unwrap();
    let output = demo_on(&data);
    let (code, line) = failure(&output);
    assert_eq!(code, 1);
    assert!(line.contains("chmod 600"), "{line}");
}

#[test]
fn a_database_belongs_to_one_process() {
    let demo = Running::demo();
    let output = demo_on(&demo.dir().join("data"));
    let (code, line) = failure(&output);
    assert_eq!(code, 1);
    assert!(line.contains("another keyshield"), "{line}");
}

#[test]
fn inspect_describes_the_demo_before_and_behind_the_shield() {
    let demo = Running::demo();
    let clear = keyshield(&["inspect", &format!("{}/demo/master.m3u8", demo.origin)]);
    let text = stdout(&clear);
    assert!(clear.status.success(), "{text}");
    assert!(text.contains("Multivariant Playlist") && text.contains("live, 8 segments"), "{text}");
    assert!(!text.contains("problem") && !text.contains("key:"), "{text}");

    let shielded = keyshield(&["inspect", "--json", &demo.at("/demo/master.m3u8")]);
    let report: serde_json::Value = serde_json::from_slice(&shielded.stdout).unwrap();
    assert_eq!(report["kind"], "Multivariant Playlist");
    let renditions = report["renditions"].as_array().unwrap();
    assert_eq!(renditions.len(), 3);
    for rendition in renditions {
        assert_eq!(rendition["media"]["segments"], 8, "{rendition}");
        assert_eq!(rendition["keys"][0]["method"], "AES-128", "{rendition}");
    }
}

#[test]
fn inspect_of_nothing_is_one_line() {
    let (code, line) = failure(&keyshield(&["inspect", &format!("http://127.0.0.1:{}/", free_port())]));
    assert_eq!(code, 1);
    assert!(line.contains("cannot be reached"), "{line}");
}

#[test]
fn rewrite_reads_standard_input_and_a_seed_makes_it_repeatable() {
    let playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXT-X-ENDLIST\n";
    let rewrite = || {
        let mut child = Command::new(KEYSHIELD)
            .args(["rewrite", "--seed", "1", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(playlist.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let (first, second) = (rewrite(), rewrite());
    assert!(first.status.success());
    assert_eq!(stdout(&first), stdout(&second));
    assert!(stdout(&first).contains("#EXT-X-KEY:METHOD=AES-128,URI=\"/api/hls/keys/"), "{}", stdout(&first));
    assert!(stdout(&first).ends_with("/a.ts\n#EXT-X-ENDLIST\n"), "{}", stdout(&first));
}

#[test]
fn rewrite_says_which_line_it_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.m3u8");
    std::fs::write(&path, "#EXTM3U\n#EXTINF:4,\nhttp://evil.example/a.ts\n").unwrap();
    let (code, line) = failure(&keyshield(&["rewrite", path.to_str().unwrap()]));
    assert_eq!(code, 1);
    assert!(line.contains("line 3") && line.contains("evil.example"), "{line}");
}

#[test]
fn health_is_the_exit_code() {
    let demo = Running::demo();
    let well = keyshield(&["health", "--control", &demo.control]);
    assert!(well.status.success() && stdout(&well).contains("healthy"));
    let nobody = keyshield(&["health", "--control", &format!("http://127.0.0.1:{}", free_port())]);
    assert_eq!(failure(&nobody).0, 1);
}

#[test]
fn the_guides_variables_reach_the_demo() {
    let free = || format!("127.0.0.1:{}", free_port());
    let output = Command::new(KEYSHIELD)
        .args(["demo", "--listen", &free(), "--control-listen", &free(), "--origin-listen", &free()])
        .env("KMS_PROVIDER", "AWS")
        .output()
        .unwrap();
    let (code, line) = failure(&output);
    assert_eq!(code, 2);
    assert!(line.contains("KMS_PROVIDER"), "{line}");
}
