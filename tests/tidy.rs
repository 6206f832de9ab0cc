//! House rules that the compiler does not keep: the direction of imports, the purity of the pure rooms, and
//! the opening `//!` of every file.
//!
//! Works on the text of the sources, as a reader would. A rule that is broken names its file and line.

use std::fs;
use std::path::{Path, PathBuf};

/// A room, and the rooms that it may import. Whatever is not listed here may not be imported.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("keys", &[]),
    ("cipher", &["keys"]),
    ("hls", &["keys"]),
    ("clock", &["keys"]),
    ("entropy", &[]),
    ("fault", &[]),
    ("telemetry", &[]),
    ("alert", &["keys", "entropy", "telemetry"]),
    ("store", &["keys", "fault"]),
    ("rest", &[]),
    ("kms", &["keys", "entropy", "fault", "rest"]),
    ("cdn", &["keys", "clock", "entropy", "rest"]),
    ("config", &["keys", "hls", "kms", "cdn", "telemetry", "fault", "alert", "rest"]),
    ("engine", &["keys", "alert", "store", "kms", "cdn", "clock", "entropy", "fault", "telemetry"]),
    ("shield", &["keys", "cipher", "hls", "engine", "clock", "telemetry"]),
    ("control", &["keys", "hls", "clock", "entropy", "telemetry", "engine"]),
    ("demo", &["keys"]),
    (
        "app",
        &[
            "keys",
            "hls",
            "clock",
            "entropy",
            "telemetry",
            "alert",
            "store",
            "kms",
            "cdn",
            "rest",
            "config",
            "engine",
            "shield",
            "control",
            "demo",
        ],
    ),
];

/// Rooms that are computable on paper from their arguments.
const PURE: &[&str] = &["keys", "cipher", "hls"];

/// What a pure room does not touch, and why it would not be pure if it did.
const IMPURE: &[(&str, &str)] = &[
    ("async fn", "waits"),
    ("tokio", "waits"),
    ("std::fs", "touches files"),
    ("std::net", "touches sockets"),
    ("std::env", "reads the environment"),
    ("std::process", "touches processes"),
    ("SystemTime", "asks the clock"),
    ("Instant", "asks the clock"),
    ("getrandom", "draws randomness"),
    ("thread::", "starts threads"),
    ("println!", "prints"),
    ("tracing::", "logs"),
];

struct Source {
    path: PathBuf,
    room: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let first = path.strip_prefix(&root).unwrap().components().next().unwrap();
                let room = Path::new(first.as_os_str()).with_extension("").display().to_string();
                found.push(Source { text: fs::read_to_string(&path).unwrap(), room, path });
            }
        }
    }
    assert!(found.len() > 20, "the sources were not found");
    found
}

/// (line number, line) of code: no comments.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines()).filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Names after `crate::` on a line, in `use` items and in paths.
fn imported_rooms(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").filter(|(at, _)| !line[..*at].ends_with('$')).map(|(at, prefix)| {
        let rest = &line[at + prefix.len()..];
        &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())]
    })
}

#[test]
fn arrows_between_rooms_run_one_way() {
    let mut broken = Vec::new();
    for source in sources() {
        if source.room == "lib" || source.room == "main" {
            continue;
        }
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(room, _)| *room == source.room) else {
            broken.push(format!("{}: the room {} is not on the list", source.path.display(), source.room));
            continue;
        };
        for (number, line) in code(&source.text) {
            for room in imported_rooms(line) {
                if room != source.room && !allowed.contains(&room) {
                    broken.push(format!(
                        "{}:{number}: {} may not import {room}",
                        source.path.display(),
                        source.room
                    ));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn the_list_of_arrows_has_no_circle() {
    // A room may only import rooms that stand before it.
    for (at, (room, allowed)) in MAY_IMPORT.iter().enumerate() {
        for import in *allowed {
            let before = MAY_IMPORT[..at].iter().any(|(earlier, _)| earlier == import);
            assert!(before, "{room} imports {import}, which does not stand before it");
        }
    }
}

#[test]
fn pure_rooms_touch_nothing_outside() {
    let mut broken = Vec::new();
    for source in sources().iter().filter(|source| PURE.contains(&source.room.as_str())) {
        for (number, line) in code(&source.text) {
            for (word, does) in IMPURE {
                if line.contains(word) {
                    let (path, room) = (source.path.display(), &source.room);
                    broken.push(format!("{path}:{number}: {room} is pure, but {word} {does}"));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn every_file_opens_by_saying_what_it_is_for() {
    for source in sources() {
        assert!(source.text.starts_with("//! "), "{} has no opening //!", source.path.display());
    }
}

#[test]
fn nothing_but_the_tests_asks_for_points_to_be_killed_at() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest: toml::Table = fs::read_to_string(root.join("Cargo.toml")).unwrap().parse().unwrap();
    for (feature, enables) in manifest["features"].as_table().unwrap() {
        let names_it = |name: &toml::Value| name.as_str().is_some_and(|name| name.contains("faults"));
        assert!(!enables.as_array().unwrap().iter().any(names_it), "{feature} is `faults` too");
    }
    for file in ["Dockerfile", "Makefile"] {
        let text = fs::read_to_string(root.join(file)).unwrap();
        let released = text.lines().filter(|line| line.contains("--release"));
        assert!(released.clone().count() > 0, "{file} makes a release");
        assert!(released.clone().all(|line| !line.contains("features")), "{file}: a release has no features");
    }
    for source in sources().iter().filter(|source| source.room != "fault") {
        assert!(!source.text.contains("KEYSHIELD_FAULT"), "{}: this is fault.rs's", source.path.display());
    }
}

#[test]
fn no_file_grows_beyond_what_one_can_hold_in_mind() {
    for source in sources() {
        let lines = source.text.lines().count();
        assert!(lines <= 600, "{} has {lines} lines: what is it two of?", source.path.display());
    }
}
