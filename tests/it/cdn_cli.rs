//! `keyshield cdn …` over an agent that is a CDN of an operator's own: its API, and the edge that gives keys out.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use keyshield::keys::EdgeSecret;
use serde_json::Value;
use tempfile::TempDir;

use crate::cdn::caches::AgentHandle;
use crate::harness::KEYSHIELD;

const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const OTHER: &str = "ff112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const TOKEN: &str = "agent-of-the-tests";

/// A CDN whose edge opens keys under `secret`, and a configuration that names it.
struct Site {
    agent: AgentHandle,
    dir: TempDir,
}

impl Site {
    fn start(secret: &str) -> Self {
        let secret = secret.parse::<EdgeSecret>().unwrap();
        let agent = AgentHandle::start(Some(secret), Box::new(|_| Ok(())));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("edge.secret"), SECRET).unwrap();
        std::fs::write(dir.path().join("agent.token"), TOKEN).unwrap();
        Self { agent, dir }
    }

    /// With an entry in the mode, and more.
    fn config(&self, mode: &str, more: &str) -> PathBuf {
        let path = self.dir.path().join("keyshield.toml");
        let (url, dir) = (self.agent.url(), self.dir.path().display());
        let text = format!(
            "[[cdns]]\nname = \"own\"\nkind = \"custom\"\nmode = \"{mode}\"\nedge_url = \"{url}\"\n\
             edge_secret_file = \"{dir}/edge.secret\"\ntoken_file = \"{dir}/agent.token\"\n\
             [cdns.custom]\napi_url = \"{url}\"\n{more}"
        );
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn cdn(command: &str, config: &PathBuf, more: &[&str]) -> Output {
    let mut keyshield = Command::new(KEYSHIELD);
    keyshield.args(["cdn", command, "--config"]).arg(config).args(more).stdin(Stdio::null()).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// (step, outcome) of the one CDN.
fn steps(output: &Output) -> Vec<(String, String)> {
    let shown: Value = serde_json::from_str(&stdout(output)).unwrap();
    let steps = shown["cdns"][0]["steps"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    steps.iter().map(|step| (text(&step["step"]), text(&step["outcome"]))).collect()
}

#[test]
fn a_cdn_that_is_right_passes_and_keeps_nothing() {
    let site = Site::start(SECRET);
    let output = cdn("check", &site.config("push", ""), &[]);
    let text = stdout(&output);
    assert!(output.status.success(), "{text}{}", stderr(&output));
    assert!(text.starts_with("own (custom, push)\n  ok       health"), "{text}");
    assert!(!text.contains("FAILED") && !text.contains(SECRET) && !text.contains(TOKEN), "{text}");
    assert!(site.agent.stored().is_empty());
    assert_eq!(site.agent.purged().len(), 2);
}

#[test]
fn in_pull_mode_nothing_is_stored() {
    let site = Site::start(SECRET);
    let output = cdn("check", &site.config("pull", ""), &["--json"]);
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
    let names: Vec<_> = steps(&output).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["health", "route", "purge tag", "purge path"]);
    assert_eq!(site.agent.count("PUT"), 0);
}

#[test]
fn what_is_wrong_is_exit_code_1_and_says_what_to_do() {
    let site = Site::start(SECRET);
    let config = site.config("push", "");
    std::fs::write(site.dir.path().join("agent.token"), "another").unwrap();
    let output = cdn("check", &config, &[]);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("FAILED   health") && text.contains("→ the agent takes another token"), "{text}");
    assert!(stderr(&output).contains("1 of 1 CDNs are not right: own: health"), "{}", stderr(&output));

    let output = cdn("check", &config, &["--cdn", "other"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no CDN \"other\": configured are own"), "{}", stderr(&output));
}

#[test]
fn an_edge_with_another_secret_is_found_and_the_key_is_taken_away() {
    let site = Site::start(OTHER);
    let output = cdn("check", &site.config("push", ""), &["--json", "--wait", "0"]);
    assert_eq!(output.status.code(), Some(1), "{}", stdout(&output));
    let of = |name: &str| steps(&output).into_iter().find(|step| step.0 == name).unwrap().1;
    assert_eq!((of("store").as_str(), of("read back").as_str()), ("ok", "failed"));
    assert_eq!(of("delete"), "ok");
    assert!(site.agent.stored().is_empty());
}

#[test]
fn secrets_go_to_standard_output_alone_and_the_token_is_one_that_the_edge_takes() {
    let site = Site::start(SECRET);
    let config = site.config("push", "");
    let output = cdn("secrets", &config, &["--cdn", "own"]);
    let (text, warning) = (stdout(&output), stderr(&output));
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.expect(name).to_owned()
    };
    let secret = SECRET.parse::<EdgeSecret>().unwrap();
    assert_eq!(value("EDGE_ENCRYPTION_KEY"), *secret.encryption_key());
    assert_eq!(value("EDGE_TOKEN_KEY"), *secret.token_key());
    assert!(
        warning.contains("keep them out of logs") && !warning.contains(&value("EDGE_MAC_KEY")),
        "{warning}"
    );

    let token = cdn("token", &config, &["--cdn", "own", "--stream", "ch1", "--ttl", "60"]);
    assert_eq!(stdout(&token).split('~').nth(1), Some("ch1"));
    let neither = cdn("token", &config, &["--cdn", "own", "--ttl", "60"]);
    assert_eq!(neither.status.code(), Some(2), "{}", stderr(&neither));
}

#[test]
fn what_only_other_vendors_have_is_refused_by_name() {
    let site = Site::start(SECRET);
    let config = site.config("push", "");
    for (command, more, part) in [
        ("deploy", &[][..], "docs/cdn-custom.md"),
        ("sign", &["--url", "https://cdn.example/a", "--ttl", "60"], "CloudFront"),
        ("rotate-signer", &["--status"], "CloudFront"),
    ] {
        let output = cdn(command, &config, &[&["--cdn", "own"], more].concat());
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(stderr(&output).contains(part), "{command}: {}", stderr(&output));
    }
}
