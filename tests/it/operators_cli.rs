//! `keyshield streams …` and `keyshield keys …` against a running shield.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::control_api::tokens;
use crate::harness::{KEYSHIELD, Running, fetch_segments, free_port};
use crate::origin::{Answer, Origin};

const PLAYLIST: &str = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:10\n\
    #EXTINF:4,\nseg_10.ts\n";

fn start() -> (Origin, Running) {
    let origin = Origin::start(|_| Answer::ok(PLAYLIST));
    let config = format!("[[origins]]\nname = \"main\"\nurls = [\"{}\"]\n{}", origin.url(), tokens());
    let shield = Running::serve(&config);
    (origin, shield)
}

pub(crate) fn run_as(role: &str, control: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(KEYSHIELD);
    command.args(arguments).env("KEYSHIELD_CONTROL", control).stdin(Stdio::null());
    // One that leads nowhere: no call may be shown to a proxy.
    for name in ["HTTP_PROXY", "http_proxy", "ALL_PROXY"] {
        command.env(name, "http://127.0.0.1:1");
    }
    command.env_remove("NO_PROXY").env_remove("no_proxy");
    if role.is_empty() {
        command.env_remove("KEYSHIELD_TOKEN");
    } else {
        command.env("KEYSHIELD_TOKEN", format!("ks_{role}"));
    }
    command.output().unwrap()
}

/// What a command of the admin's printed, which must have gone well.
fn run(shield: &Running, arguments: &[&str]) -> String {
    let output = run_as("admin", &shield.control, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(shield: &Running, arguments: &[&str]) -> Value {
    serde_json::from_str(&run(shield, &[arguments, &["--json"]].concat())).unwrap()
}

/// The one line in which a command says why it did nothing.
fn refused(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    text
}

/// A table's cells.
fn cells(table: &str) -> Vec<Vec<&str>> {
    table
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect()
}

#[test]
fn a_stream_is_run_from_the_command_line_from_its_beginning_to_its_end() {
    let (origin, shield) = start();
    let url = format!("{}/ch1/index.m3u8", origin.url());
    let begun = run(
        &shield,
        &[
            "streams",
            "initialize",
            "ch1",
            "--playlist-url",
            &url,
            "--set",
            "segmentsPerKey=50",
            "--set",
            "keyMethod=AES-128",
            "--cdn",
            "https://cdn1.example.com",
        ],
    );
    assert!(begun.contains("segmentsPerKey") && begun.contains("https://cdn1.example.com"), "{begun}");
    let listed = run(&shield, &["streams", "list"]);
    let table = cells(&listed);
    assert_eq!(table[0][..3], ["STREAM", "STATE", "KEY"]);
    assert_eq!((table[1][..3].to_vec(), table[1][5]), (vec!["ch1", "running", "0"], "30 min or 50 segments"));
    assert_eq!(json(&shield, &["streams", "list"])["streams"][0]["streamId"], "ch1");

    run(&shield, &["streams", "update", "ch1", "--set", "rotationInterval=0"]);
    assert_eq!(json(&shield, &["streams", "show", "ch1"])["config"]["rotationInterval"], 0);
    run(&shield, &["keys", "rotate", "ch1"]);
    let rotations = run(&shield, &["keys", "rotations", "ch1"]);
    assert_eq!(cells(&rotations)[1][3..5], ["manual", "the-admin"], "{rotations}");

    let before = fetch_segments(&shield.at("/ch1/index.m3u8"));
    let revoked = run(&shield, &["keys", "revoke", "ch1", "--reason", "found on a forum"]);
    assert!(revoked.contains("found on a forum"), "{revoked}");
    let keys = run(&shield, &["keys", "list", "ch1"]);
    let key_id = before[0].key_url.rsplit('/').next().unwrap();
    let row = keys.lines().find(|line| line.contains(key_id)).unwrap();
    assert!(row.contains("compromised"), "{keys}");

    assert!(run(&shield, &["streams", "stop", "ch1"]).contains("stopped"));
    assert_eq!(shield.get("/ch1/index.m3u8").status, 404);
    run(&shield, &["streams", "delete", "ch1"]);
    assert_eq!(json(&shield, &["streams", "list"])["streams"], Value::Array(vec![]));
    assert!(
        !json(&shield, &["keys", "list", "ch1"])["keys"].as_array().unwrap().is_empty(),
        "its history stays"
    );
    let unsaid = run_as("admin", &shield.control, &["streams", "erase", "ch1"]);
    assert!(refused(&unsaid).contains("--yes"));
    run(&shield, &["streams", "erase", "ch1", "--yes"]);
    let gone = run_as("admin", &shield.control, &["keys", "list", "ch1"]);
    assert!(refused(&gone).contains("404 there is no stream ch1"));
}

#[test]
fn a_refusal_is_one_line_that_says_what_to_do() {
    let (origin, shield) = start();
    let url = format!("{}/ch1/index.m3u8", origin.url());
    let none = refused(&run_as("", &shield.control, &["streams", "list"]));
    assert!(none.contains("401") && none.contains("KEYSHIELD_TOKEN"), "{none}");
    let viewer = refused(&run_as("viewer", &shield.control, &["keys", "rotate", "ch1"]));
    assert!(viewer.contains("403") && viewer.contains("operator"), "{viewer}");
    let field = run_as(
        "admin",
        &shield.control,
        &["streams", "initialize", "ch1", "--playlist-url", &url, "--set", "segmentsPerKey=0"],
    );
    assert!(refused(&field).contains("config.segmentsPerKey"));
    let nobody =
        refused(&run_as("admin", &format!("http://127.0.0.1:{}", free_port()), &["streams", "list"]));
    assert!(nobody.contains("does not answer"), "{nobody}");
}

#[test]
fn lists_follow_their_pages() {
    let (origin, shield) = start();
    for n in 0..3 {
        let url = format!("{}/ch{n}/index.m3u8", origin.url());
        run(&shield, &["streams", "initialize", &format!("ch{n}"), "--playlist-url", &url]);
    }
    assert_eq!(json(&shield, &["streams", "list"])["streams"].as_array().unwrap().len(), 3);
    for _ in 0..4 {
        run(&shield, &["keys", "rotate", "ch0"]);
    }
    assert_eq!(cells(&run(&shield, &["keys", "rotations", "ch0"])).len(), 1 + 5);
}
