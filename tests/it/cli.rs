//! The command line: what it prints, how it fails, what it leaves behind.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

use crate::harness::{KEYSHIELD, Running, ask, free_port, get, repository};

fn keyshield(arguments: &[&str]) -> Output {
    Command::new(KEYSHIELD).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn keyshield_under(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(KEYSHIELD);
    command.args(arguments).envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap()
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
    for (option, value) in [("--key-method", "AES-512"), ("--on-encrypted", "ignore"), ("--subtitles", "no")]
    {
        let output = keyshield(&["rewrite", option, value, "/dev/null"]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("must be "), "{output:?}");
    }
}

#[test]
fn rewrite_takes_an_iv_mode_with_methods_that_have_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.m3u8");
    std::fs::write(&path, "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n#EXT-X-ENDLIST\n").unwrap();
    let rewrite = |options: &[&str]| {
        let treated = ["rewrite", "--on-encrypted", "pass", "--subtitles", "clear", path.to_str().unwrap()];
        keyshield(&[&treated[..], options].concat())
    };
    assert!(rewrite(&["--key-method", "AES-256", "--iv-mode", "period"]).status.success());
    let gcm = rewrite(&["--key-method", "AES-256-GCM"]);
    assert!(stdout(&gcm).contains("#EXT-X-KEY:METHOD=AES-256-GCM,"), "{gcm:?}");
    let (code, line) = failure(&rewrite(&["--key-method", "AES-256-GCM", "--iv-mode", "segment"]));
    assert_eq!(code, 2);
    assert!(line.contains("--iv-mode must be left out with AES-256-GCM"), "{line}");
}

#[test]
fn a_token_is_printed_with_the_entry_that_lets_it_in() {
    let output = keyshield(&["token", "--name", "ci", "--role", "operator"]);
    let text = stdout(&output);
    let token = text.lines().find(|line| line.starts_with("ks_")).expect("a token");
    let entry: toml::Table = text[text.find("[[").unwrap()..].parse().unwrap();
    let entry = &entry["control"]["tokens"][0];
    assert_eq!((entry["name"].as_str(), entry["role"].as_str()), (Some("ci"), Some("operator")));
    assert_eq!(entry["sha256"].as_str(), Some(hex::encode(Sha256::digest(token)).as_str()));
    assert_ne!(stdout(&keyshield(&["token", "--name", "ci", "--role", "operator"])), text);
    for wrong in [["--name", "c\"i", "--role", "admin"], ["--name", "ci", "--role", "root"]] {
        assert_eq!(keyshield(&[&["token"], &wrong[..]].concat()).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn the_demos_token_is_printed_and_lets_in() {
    let start = |environment: &[(&str, &str)]| {
        Running::demo_with(tempfile::tempdir().unwrap(), free_port(), environment)
    };
    let status = |demo: &Running, token: &str| {
        let streams = format!("{}/api/hls/streams", demo.control);
        ask("GET", &streams, &[("Authorization", &format!("Bearer {token}"))]).status
    };
    let demo = start(&[]);
    let log = demo.logged();
    let printed = log.lines().find_map(|line| line.strip_prefix("token ")).expect("a token").trim();
    assert!(printed.starts_with("ks_") && printed.len() == 46, "{printed}");
    assert!(!matches!(status(&demo, printed), 401 | 403));
    assert_eq!(status(&demo, "ks_other"), 401);
    let given = start(&[("KEYSHIELD_DEMO_TOKEN", "let-me-in")]);
    assert!(!matches!(status(&given, "let-me-in"), 401 | 403));
}

#[test]
fn check_shows_what_the_shipped_configuration_comes_to() {
    let path = repository("config/keyshield.toml");
    let output = keyshield(&["check", "--config", path.to_str().unwrap()]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("stream      ch1 at /live/ch1/master.m3u8: AES-128"), "{text}");
    assert!(text.contains("every 30 min or 100 segments, 3 made ahead"), "{text}");
    let (summary, values) = text.split_once("the configuration is right\n\n").expect(&text);
    assert!(summary.contains("players     0.0.0.0:8080"), "{summary}");
    assert!(values.lines().count() > 40 && values.lines().all(|line| line.contains("   # ")), "{values}");
    let listen = values.lines().find(|line| line.starts_with("shield.listen = \"0.0.0.0:8080\" ")).unwrap();
    let file = std::fs::read_to_string(&path).unwrap();
    let line = 1 + file.lines().position(|line| line.starts_with("listen = ")).unwrap();
    assert!(listen.ends_with(&format!("# file {}, line {line}", path.display())), "{listen}");
}

#[test]
fn check_says_which_layer_gave_a_value() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keyshield.toml");
    std::fs::write(&path, "[shield]\nthreads = 2\n[policy]\nlead_segments = 3\n").unwrap();
    let path = path.to_str().unwrap();
    let variables =
        [("MAX_SEGMENTS_PER_KEY", "50"), ("KEYSHIELD_LOG_FORMAT", "json"), ("KEYSHIELD_SHIELD_THREADS", "4")];
    let flags = ["--listen", "127.0.0.1:1", "--set", "shield.threads=8", "--set", "log.filter=a=warn,b=info"];
    let output = keyshield_under(&variables, &[&["check", "--json", "--config", path], &flags[..]].concat());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["valid"], true);
    let values = report["values"].as_array().unwrap();
    for (key, value, source) in [
        ("control.listen", "\"127.0.0.1:8081\"", "default".to_owned()),
        ("policy.lead_segments", "3", format!("file {path}, line 4")),
        ("policy.segments_per_key", "50", "environment variable MAX_SEGMENTS_PER_KEY".into()),
        ("log.format", "\"json\"", "environment variable KEYSHIELD_LOG_FORMAT".into()),
        ("shield.listen", "\"127.0.0.1:1\"", "flag --listen".into()),
        ("shield.threads", "8", "flag --set".into()),
        ("log.filter", "\"a=warn,b=info\"", "flag --set".into()),
    ] {
        let found = values.iter().find(|value| value["key"] == key).expect(key);
        assert_eq!(
            (found["value"].to_string(), &found["source"]),
            (value.to_owned(), &source.into()),
            "{key}"
        );
    }
}

#[test]
fn check_needs_no_file_and_shows_no_secret() {
    let hash = "0123456789abcdef".repeat(4);
    let tokens = format!("[{{name = \"ci\", role = \"viewer\", sha256 = \"{hash}\"}}]");
    let variables = [
        ("KEYSHIELD_ORIGINS", "[{\"name\": \"main\", \"urls\": [\"https://origin.example\"]}]"),
        ("KEYSHIELD_CONTROL_TOKENS", &tokens),
        ("KEYSHIELD_STORE_DATABASE", "postgres://user:sesame@db.example/keys"),
        ("AUDIT_LOGGING_ENABLED", "true"),
        ("CDN_ENDPOINTS", "cdn.example"),
    ];
    for arguments in [&["check"][..], &["check", "--json"]] {
        let output = keyshield_under(&variables, arguments);
        let text = stdout(&output);
        assert!(output.status.success(), "{output:?}");
        assert!(text.contains("postgres://user:***@db.example/keys") && text.contains("01234567…"), "{text}");
        assert!(!text.contains("sesame") && !text.contains(&hash), "{text}");
    }
    let text = stdout(&keyshield_under(&variables, &["check"]));
    assert!(text.contains("origins[0].urls = [\"https://origin.example\"]"), "{text}");
    assert!(
        text.contains("token       ci: viewer") && text.contains("note: AUDIT_LOGGING_ENABLED"),
        "{text}"
    );
    assert!(text.contains("CDN         cdn.example: known by its address alone"), "{text}");
}

#[test]
fn what_no_layer_knows_is_one_line_with_a_suggestion_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    std::fs::write(&path, "[shield]\n\nlisen = \"127.0.0.1:1\"\n").unwrap();
    let shipped = repository("config/keyshield.toml");
    let with = |path: &Path, more: &[&str]| {
        let arguments = ["check", "--config", path.to_str().unwrap()];
        [&arguments, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let disagree = [("PRE_GENERATE_KEYS", "4"), ("KEYSHIELD_POLICY_PRE_GENERATE_KEYS", "5")];
    for (variables, arguments, parts) in [
        (&[][..], with(&path, &[]), &["bad.toml", "shield.lisen, line 3", "did you mean shield.listen?"][..]),
        (
            &[("KEYSHIELD_SHIELD_LISEN", "")],
            with(&shipped, &[]),
            &["KEYSHIELD_SHIELD_LISEN", "did you mean KEYSHIELD_SHIELD_LISTEN?"],
        ),
        (
            &[],
            with(&shipped, &["--set", "kms.masterkey_file=a"]),
            &["--set", "did you mean kms.master_key_file?"],
        ),
        (
            &disagree,
            with(&shipped, &[]),
            &["PRE_GENERATE_KEYS", "KEYSHIELD_POLICY_PRE_GENERATE_KEYS", "disagree"],
        ),
        (
            &[],
            with(&shipped, &["--set", "shield.threads=many"]),
            &["--set", "shield.threads must be a whole number"],
        ),
        (&[], vec!["serve".into()], &["--config"]),
    ] {
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        let (code, line) = failure(&keyshield_under(variables, &arguments));
        assert_eq!(code, 2, "{line}");
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert_eq!(keyshield(&["check", "--set", "shield.threads"]).status.code(), Some(2));
}

#[test]
fn a_wrong_configuration_is_one_line_with_its_place_and_exit_code_2() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.toml");
    std::fs::write(&path, "[shield]\nlisten = \"somewhere\"\n").unwrap();
    let (code, line) = failure(&keyshield(&["check", "--config", path.to_str().unwrap()]));
    assert_eq!(code, 2);
    assert!(line.contains("shield.listen") && line.contains("somewhere"), "{line}");
    assert!(line.contains("bad.toml, line 2"), "{line}");

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
        .env("KMS_PROVIDER", "abacus")
        .output()
        .unwrap();
    let (code, line) = failure(&output);
    assert_eq!(code, 2);
    assert!(line.contains("KMS_PROVIDER"), "{line}");
}

#[test]
fn every_key_reaches_the_demo_and_its_flags_go_over() {
    let origin = format!("127.0.0.1:{}", free_port());
    let arguments = ["demo", "--origin-listen", &origin];
    let output = keyshield_under(&[("KEYSHIELD_LOG_FORMAT", "xml")], &arguments);
    let (code, line) = failure(&output);
    assert_eq!(code, 2);
    assert!(line.contains("log.format = \"xml\"") && line.contains("KEYSHIELD_LOG_FORMAT"), "{line}");

    let nowhere =
        [("KEYSHIELD_SHIELD_LISTEN", "nowhere"), ("KEYSHIELD_STORE_DATABASE", "/nowhere/at/all.db")];
    let demo = Running::demo_with(tempfile::tempdir().unwrap(), free_port(), &nowhere);
    assert!(demo.dir().join("data/keyshield.db").exists());
}
