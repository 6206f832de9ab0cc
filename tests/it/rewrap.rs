//! From one KMS to another while streams play: nobody who watches notices, and whoever is killed loses nothing.
//!
//! The providers are a master key file, the real OpenBao, and moto for AWS. [`go_over`] takes any list of them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::control_api::{Got, call_at, tokens};
use crate::fleet_origin::{FleetOrigin, Media, RENDITIONS};
use crate::harness::{
    KEYSHIELD, Running, agent, ask, fetch_segments, get, pause, try_ask_by, wait_at_most, wait_for,
};
use crate::kms::bao::Bao;
use crate::kms::clouds::{Cloud, REGION};
use crate::kms::vault::{LONG, documented_policy};
use crate::kms::{check_plays, origin};
use crate::operators_cli::run_as;
use crate::origin::Origin;
use crate::postgres::Postgres;
use crate::sqlite::query;
use crate::watch::{Totals, Watch};
use crate::wire::Wire;

/// Streams that are played, and streams that are only there, so that there is something to re-wrap.
const PLAYED: usize = 4;
const IDLE: usize = 150;

const AWS_CREDENTIALS: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "AKIATESTS"),
    ("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests"),
    ("AWS_EC2_METADATA_DISABLED", "true"),
];

/// A provider, as the configuration has it, and how its key is taken away for good.
struct Provider<'a> {
    name: &'static str,
    /// Its part of the configuration, under `[kms]` and behind it.
    local: String,
    section: String,
    destroy: Box<dyn Fn() + 'a>,
}

fn local(dir: &TempDir) -> Provider<'_> {
    let file = dir.path().join("keyshield.master");
    Provider {
        name: "local",
        local: format!("master_key_file = \"{}\"\n", file.display()),
        section: String::new(),
        destroy: Box::new(move || std::fs::remove_file(&file).unwrap()),
    }
}

fn vault<'a>(bao: &'a Bao, dir: &TempDir, more: &str) -> Provider<'a> {
    bao.make_key("keyshield");
    let token = dir.path().join("token");
    std::fs::write(&token, bao.token(&documented_policy(), LONG)).unwrap();
    Provider {
        name: "vault",
        local: String::new(),
        section: format!(
            "[kms.vault]\naddress = \"http://{}\"\ntoken_file = \"{}\"\ntimeout_secs = 2\n{more}",
            bao.address(),
            token.display()
        ),
        destroy: Box::new(|| {
            bao.ok("POST", "transit/keys/keyshield/config", json!({"deletion_allowed": true}));
            bao.ok("DELETE", "transit/keys/keyshield", Value::Null);
        }),
    }
}

/// AWS as moto plays it.
fn aws(moto: &Cloud) -> Provider<'_> {
    moto.make_key("alias/keyshield");
    Provider {
        name: "aws",
        local: String::new(),
        section: format!("[kms.aws]\nregion = \"{REGION}\"\nendpoint = \"{}\"\n", moto.url()),
        // It forgets everything.
        destroy: Box::new(|| drop(agent().post(format!("{}/moto-api/reset", moto.url())).send("").unwrap())),
    }
}

/// `[kms]`, with one that wraps and others that are held.
fn keyring(wraps: &Provider<'_>, also: &[&Provider<'_>]) -> String {
    let names: Vec<_> = also.iter().map(|held| format!("{:?}", held.name)).collect();
    let mut text = format!("[kms]\nprovider = {:?}\nalso = [{}]\n", wraps.name, names.join(", "));
    let all = || std::iter::once(&wraps).chain(also);
    all().for_each(|held| text.push_str(&held.local));
    all().for_each(|held| text.push_str(&held.section));
    text
}

/// Nodes, as many as there are at a time, on one store and before one origin.
struct Shields {
    origin: FleetOrigin,
    nodes: usize,
    /// `[store]`.
    store: String,
}

impl Shields {
    fn new(nodes: usize, store: String) -> Self {
        Self { origin: FleetOrigin::start(PLAYED, Duration::from_secs(90)), nodes, store }
    }

    fn start(&self, kms: &str) -> Vec<Running> {
        let url = self.origin.url();
        let mut config = format!(
            "{}{kms}[keys]\nsweep_interval_millis = 250\n\
             [policy]\nrotation_interval_minutes = 0.1\nlead_segments = 3\n\
             [[origins]]\nname = \"live\"\nurls = [\"{url}\"]\n{}",
            self.store,
            tokens()
        );
        let played = (0..PLAYED).map(Media::master_path);
        let idle = (0..IDLE).map(|at| format!("/idle/{at:04}/master.m3u8"));
        for (at, path) in played.chain(idle).enumerate() {
            let _ = write!(config, "[[streams]]\nid = \"s{at:04}\"\nplaylist_url = \"{url}{path}\"\n");
        }
        let start = |_| Running::serve_under(tempfile::tempdir().unwrap(), &config, &AWS_CREDENTIALS);
        (0..self.nodes).map(start).collect()
    }

    /// Looks at every playlist and segment, and asks every node for keys without a pause, for as long as `act` takes.
    /// `known`: keys that must be served as they were, to which those of now are added.
    fn watched(&self, nodes: &[Running], known: &mut BTreeMap<String, Vec<u8>>, act: impl FnOnce()) {
        let node = |node: &Running| node.url.clone();
        let mut urls: Vec<_> = nodes.iter().map(node).collect();
        // One that is alone must publish the same twice.
        urls.extend((nodes.len() == 1).then(|| node(&nodes[0])));
        let watch = Watch::new(urls, node(&nodes[0]), &self.origin.media, PLAYED);
        let (asked, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        watch.during(|| {
            watch.pause(Duration::from_millis(2_500));
            for (stream, rendition) in (0..PLAYED).flat_map(|s| (0..RENDITIONS.len()).map(move |r| (s, r))) {
                for segment in fetch_segments(&nodes[0].at(&Media::playlist_path(stream, rendition))) {
                    let path = url::Url::parse(&segment.key_url).unwrap().path().to_owned();
                    known.entry(path).or_insert_with(|| ask("GET", &segment.key_url, &[]).body);
                }
            }
            std::thread::scope(|scope| {
                let (known, asked, over) = (&*known, &asked, &over);
                let hammers: Vec<_> = nodes
                    .iter()
                    .map(|node| {
                        scope.spawn(move || {
                            let agent = agent();
                            while !over.load(Ordering::Relaxed) {
                                for (path, key) in known {
                                    let answer = try_ask_by(&agent, "GET", &node.at(path), &[]);
                                    let answer = answer.unwrap_or_else(|error| panic!("{path}: {error}"));
                                    assert!(
                                        answer.status == 200 && answer.body == *key,
                                        "{path}: {answer:?}"
                                    );
                                    asked.fetch_add(1, Ordering::Relaxed);
                                }
                            }
                        })
                    })
                    .collect();
                act();
                watch.pause(Duration::from_secs(2));
                over.store(true, Ordering::Relaxed);
                hammers.into_iter().for_each(|hammer| hammer.join().expect("no key request failed"));
            });
        });
        let (decrypted, asked) = (Totals::count(&watch.totals.decrypted), asked.into_inner());
        println!("{decrypted} segments decrypted, {asked} keys asked for, {} of them different", known.len());
        assert!(decrypted >= PLAYED * RENDITIONS.len() && asked > known.len());
    }
}

/// Has all streams go from each provider to the next one. Each that is left loses its key.
fn go_over(shields: &Shields, providers: &[Provider<'_>]) {
    let mut known = BTreeMap::new();
    let first = shields.start(&keyring(&providers[0], &[]));
    shields.watched(&first, &mut known, || {});
    drop(first);
    for step in providers.windows(2) {
        let [from, to] = step else { unreachable!("it is a window of two") };
        let nodes = shields.start(&keyring(to, &[from]));
        shields.watched(&nodes, &mut known, || {
            assert_eq!(data_keys(&nodes[0], from.name), PLAYED + IDLE);
            let unwraps: Vec<_> = nodes[1..].iter().map(unwraps).collect();
            let said = rewrap(&nodes[0], to.name);
            assert!(said.status.success(), "{said:?}");
            for node in &nodes {
                assert_eq!((data_keys(node, from.name), data_keys(node, to.name)), (0, PLAYED + IDLE));
            }
            // They hear of it, and have no need to open what they have.
            let heard = || nodes[1..].iter().map(self::unwraps).collect::<Vec<_>>();
            pause(Duration::from_secs(1));
            assert_eq!(heard(), unwraps, "the others unwrapped anew");
        });
        drop(nodes);
        (from.destroy)();
        let nodes = shields.start(&keyring(to, &[]));
        shields.watched(&nodes, &mut known, || {});
        drop(nodes);
    }
}

/// How many data encryption keys are under a provider's keys, as `kms status` says.
fn data_keys(node: &Running, provider: &str) -> usize {
    let said = run_as("security", &node.control, &["kms", "status", "--json"]);
    assert!(said.status.success(), "{said:?}");
    let status: Value = serde_json::from_slice(&said.stdout).unwrap();
    let of = |key: &&Value| key["kekId"].as_str().unwrap().starts_with(&format!("{provider}:"));
    let keys = status["keys"].as_array().unwrap().iter().filter(of);
    keys.map(|key| usize::try_from(key["dataKeys"].as_u64().unwrap()).unwrap()).sum()
}

/// How many keys a node had unwrapped.
fn unwraps(node: &Running) -> String {
    let text = get(&format!("{}/metrics", node.control)).text();
    let unwraps = text.lines().filter(|line| line.contains("kms_calls_total") && line.contains("\"unwrap\""));
    let unwraps: String = unwraps.collect();
    assert!(unwraps.contains("\"ok\""), "{text}");
    unwraps
}

fn rewrap(node: &Running, to: &str) -> Output {
    run_as("security", &node.control, &["kms", "rewrap", "--to", to])
}

fn kms_call(node: &Running, method: &str, path: &str, body: Value) -> Got {
    call_at("admin", node, method, &format!("/api/hls/kms{path}"), &body)
}

#[test]
fn viewers_do_not_notice_that_their_keys_go_from_one_kms_to_another_and_back() {
    let (moto, bao, dir) = (Cloud::moto(), Bao::start(), tempfile::tempdir().unwrap());
    let store = format!("[store]\ndatabase = \"{}/keyshield.db\"\n", dir.path().display());
    let (file, new_file) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let providers = [local(&file), aws(&moto), vault(&bao, &dir, ""), local(&new_file)];
    go_over(&Shields::new(1, store), &providers);
}

#[test]
fn a_fleet_goes_from_one_kms_to_another() {
    let (bao, dir, postgres) = (Bao::start(), tempfile::tempdir().unwrap(), Postgres::shared());
    let store = format!(
        "[store]\ndatabase = \"{}\"\npoll_interval_millis = 200\nlease_secs = 3\n",
        postgres.database()
    );
    go_over(&Shields::new(2, store), &[local(&dir), vault(&bao, &dir, "")]);
}

/// A shield with so many streams of one segment each, whose state is in `dir`.
fn config(dir: &TempDir, kms: &str, origin: &Origin, streams: usize) -> String {
    let (dir, url) = (dir.path().display(), origin.url());
    let mut config = format!(
        "[store]\ndatabase = \"{dir}/keyshield.db\"\n{kms}[keys]\nsweep_interval_millis = 50\n{}\
         [[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n",
        tokens()
    );
    for at in 0..streams {
        let _ = write!(config, "[[streams]]\nid = \"ch{at}\"\nplaylist_url = \"{url}/ch{at}/index.m3u8\"\n");
    }
    config
}

#[test]
fn where_it_cannot_go_is_said_and_where_it_can() {
    let (origin, dir) = (origin(), tempfile::tempdir().unwrap());
    let master = tempfile::tempdir().unwrap();
    let config = config(&dir, &keyring(&local(&master), &[]), &origin, 1);
    let shield = Running::serve_with(dir, &config);
    let said = rewrap(&shield, "vault");
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!((said.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("kms.also") && text.contains("Held are local"), "{text}");
    assert_eq!(
        kms_call(&shield, "GET", "/rewrap", Value::Null).ok(),
        json!({"elsewhere": false, "rewrap": null})
    );
    let viewer = run_as("operator", &shield.control, &["kms", "rewrap", "--to", "local"]);
    assert!(String::from_utf8_lossy(&viewer.stderr).contains("403"), "{viewer:?}");
    // To where it is already: there is nothing to do, which is well.
    let said = rewrap(&shield, "local");
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.status.success() && text.contains("rewrapped  0") && text.contains("current    1"),
        "{text}"
    );
}

#[test]
fn a_key_that_is_rolled_is_followed_by_the_same_command() {
    let (bao, origin, dir) = (Bao::start(), origin(), tempfile::tempdir().unwrap());
    let provider = vault(&bao, &dir, "");
    let config = config(&dir, &keyring(&provider, &[]), &origin, 5);
    let shield = Running::serve_with(dir, &config);
    check_plays(&shield, "ch0");
    bao.ok("POST", "transit/keys/keyshield/rotate", json!({}));
    let status = kms_call(&shield, "GET", "", Value::Null).ok();
    assert_eq!((&status["providers"][0]["version"], &status["keys"][0]["version"]), (&json!(2), &json!(1)));
    assert!(rewrap(&shield, "vault").status.success());
    let status = kms_call(&shield, "GET", "", Value::Null).ok();
    let expected = json!([{"kekId": "vault:transit/keyshield", "version": 2, "held": true, "dataKeys": 5}]);
    assert_eq!(status["keys"], expected);

    // What was left behind may now be forbidden.
    bao.ok("POST", "transit/keys/keyshield/config", json!({"min_decryption_version": 2}));
    let shield = Running::serve_with(shield.kill(), &config);
    (0..5).for_each(|at| drop(check_plays(&shield, &format!("ch{at}"))));
}

#[test]
fn a_key_that_does_not_open_is_named_and_keeps_no_other() {
    let (bao, origin, dir) = (Bao::start(), origin(), tempfile::tempdir().unwrap());
    let master = tempfile::tempdir().unwrap();
    let (from, to) = (local(&master), vault(&bao, &dir, ""));
    let config = config(&dir, &keyring(&from, &[&to]), &origin, 6);
    let dir = Running::serve_with(dir, &config).kill();
    query(&dir.path().join("keyshield.db"), "UPDATE deks SET wrapped = x'00112233' WHERE stream_id = 'ch3'");
    let shield = Running::serve_with(dir, &config);
    let said = run_as("admin", &shield.control, &["kms", "rewrap", "--to", "vault", "--json"]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let job: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!((&job["state"], &job["failed"]), (&json!("done"), &json!(1)));
    assert_eq!((&job["total"], &job["rewrapped"]), (&json!(6), &json!(5)), "no stream got a second key");
    assert_eq!(job["failures"][0]["streamId"], "ch3");
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(text.contains("1 data encryption keys are left"), "{text}");
    let table = rewrap(&shield, "vault");
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(text.contains("current    5") && text.contains("ch3"), "{text}");
    assert_eq!(data_keys(&shield, "local"), 1);
    check_plays(&shield, "ch2");
}

#[test]
fn one_runs_at_a_time_and_goes_on_without_whoever_asked() {
    const STREAMS: usize = 500;
    let (bao, origin, dir, postgres) =
        (Bao::start(), origin(), tempfile::tempdir().unwrap(), Postgres::shared());
    let master = tempfile::tempdir().unwrap();
    // One call at a time, so that it takes a while.
    let (from, to) = (local(&master), vault(&bao, &dir, "max_concurrent = 1\n"));
    let config = config(&dir, &keyring(&from, &[&to]), &origin, STREAMS);
    let sqlite = format!("{}/keyshield.db", dir.path().display());
    let config = config.replace(&sqlite, &postgres.database());
    let [one, other] = [(), ()].map(|()| Running::serve_with(tempfile::tempdir().unwrap(), &config));

    let mut follows = Command::new(KEYSHIELD)
        .args(["kms", "rewrap", "--to", "vault"])
        .env("KEYSHIELD_CONTROL", &one.control)
        .env("KEYSHIELD_TOKEN", "ks_security")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(dir.path().join("said")).unwrap())
        .spawn()
        .unwrap();
    let said = || std::fs::read_to_string(dir.path().join("said")).unwrap();
    wait_for("a line about it", || said().contains("data encryption keys looked at").then_some(()));
    let interrupt = ["-INT", &follows.id().to_string()];
    assert!(Command::new("kill").args(interrupt).status().unwrap().success());
    let status = wait_for("the end of the command", || follows.try_wait().unwrap());
    assert_eq!(status.code(), Some(1), "{}", said());
    assert!(said().contains("goes on without this command"), "{}", said());

    let joined = kms_call(&one, "POST", "/rewrap", json!({"to": "vault"})).ok();
    assert_eq!((&joined["state"], &joined["startedBy"]), (&json!("running"), &json!("the-security")));
    let another_way = kms_call(&one, "POST", "/rewrap", json!({"to": "local"}));
    assert_eq!(another_way.problem(), "rewrap-runs");
    let elsewhere = kms_call(&other, "POST", "/rewrap", json!({"to": "vault"}));
    assert_eq!(elsewhere.problem(), "rewrap-runs");
    assert_eq!(
        kms_call(&other, "GET", "/rewrap", Value::Null).ok(),
        json!({"elsewhere": true, "rewrap": null})
    );

    let ended = wait_at_most(Duration::from_secs(60), "the end of it", || {
        let job = kms_call(&one, "GET", "/rewrap", Value::Null).ok()["rewrap"].take();
        (job["state"] != "running").then_some(job)
    });
    assert_eq!((&ended["state"], &ended["rewrapped"]), (&json!("done"), &json!(STREAMS)));
    let other_way = rewrap(&other, "vault");
    assert!(other_way.status.success(), "the lease is given up: {other_way:?}");
}

#[cfg(feature = "faults")]
#[test]
fn one_that_is_killed_in_the_middle_is_run_again_for_what_is_left() {
    const STREAMS: usize = 40;
    let (bao, origin, dir) = (Bao::start(), origin(), tempfile::tempdir().unwrap());
    let master = tempfile::tempdir().unwrap();
    let (from, to) = (local(&master), vault(&bao, &dir, ""));
    let config = config(&dir, &keyring(&from, &[&to]), &origin, STREAMS);
    let mut shield = Running::launch(dir, &config, &[("KEYSHIELD_FAULT", "re-wrap: committed#12")]);
    wait_for("a shield that is ready", || shield.is_ready().then_some(()));
    let before = check_plays(&shield, "ch0");
    assert_eq!(rewrap(&shield, "vault").status.code(), Some(1));
    wait_for("its end", || shield.ended());

    let shield = Running::serve_with(shield.kill(), &config);
    let done = data_keys(&shield, "vault");
    assert!((13..STREAMS).contains(&done), "{done}");
    assert_eq!(done + data_keys(&shield, "local"), STREAMS);
    (0..STREAMS).for_each(|at| drop(check_plays(&shield, &format!("ch{at}"))));
    assert_eq!(check_plays(&shield, "ch0").len(), before.len());
    let said = run_as("admin", &shield.control, &["kms", "rewrap", "--to", "vault", "--json"]);
    let job: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!((&job["current"], &job["rewrapped"]), (&json!(done), &json!(STREAMS - done)));
    assert_eq!(data_keys(&shield, "vault"), STREAMS);
}

#[test]
fn what_one_wrapped_that_is_away_is_put_off_and_the_others_play() {
    let (bao, origin, dir) = (Bao::start(), origin(), tempfile::tempdir().unwrap());
    let (master, wire) = (tempfile::tempdir().unwrap(), Wire::to(bao.address()));
    let new = local(&master);
    let mut old = vault(&bao, &dir, "");
    old.section = old.section.replace(&bao.address().to_string(), &wire.address.to_string());
    let before = config(&dir, &keyring(&old, &[]), &origin, 1);
    let after = config(&dir, &keyring(&new, &[&old]), &origin, 2);
    let shield = Running::serve_with(dir, &before);
    let published = check_plays(&shield, "ch0");
    let shield = Running::serve_with(shield.kill(), &after);
    check_plays(&shield, "ch1");

    let dir = shield.kill();
    wire.cut();
    let mut shield = Running::launch(dir, &after, &[]);
    wait_at_most(Duration::from_secs(30), "a shield that is ready", || {
        assert!(shield.ended().is_none());
        shield.is_ready().then_some(())
    });
    check_plays(&shield, "ch1");
    assert_eq!(shield.get("/ch0/index.m3u8").status, 503);
    assert_eq!(shield.metric("keyshield_kms_up"), 1.0, "the one that wraps is there");
    wire.mend();
    wait_at_most(Duration::from_secs(30), "the stream that was put off", || {
        (shield.get("/ch0/index.m3u8").status == 200).then_some(())
    });
    assert_eq!(check_plays(&shield, "ch0").len(), published.len());
    assert_eq!((data_keys(&shield, "vault"), data_keys(&shield, "local")), (1, 1));
}

#[test]
fn one_that_is_only_held_may_be_away() {
    let (bao, origin, dir) = (Bao::start(), origin(), tempfile::tempdir().unwrap());
    let (master, wire) = (tempfile::tempdir().unwrap(), Wire::to(bao.address()));
    let from = local(&master);
    let mut to = vault(&bao, &dir, "");
    to.section = to.section.replace(&bao.address().to_string(), &wire.address.to_string());
    let config = config(&dir, &keyring(&from, &[&to]), &origin, 1);
    let shield = Running::serve_with(dir, &config);
    let health = || ask("GET", &format!("{}/api/hls/health", shield.control), &[]).text();
    wait_for("a look at it", || (shield.metric("keyshield_kms_held_up") == 1.0).then_some(()));
    wire.cut();
    wait_at_most(Duration::from_secs(30), "it being missed", || {
        (shield.metric("keyshield_kms_held_up") == 0.0).then_some(())
    });
    assert_eq!(shield.metric("keyshield_kms_up"), 1.0);
    assert!(health().contains("\"healthy\""), "{}", health());
    check_plays(&shield, "ch0");
    let status = kms_call(&shield, "GET", "", Value::Null).ok();
    let [wraps, held] = [0, 1].map(|at| &status["providers"][at]);
    assert_eq!(
        (&wraps["wraps"], &wraps["error"], &held["kekId"]),
        (&json!(true), &Value::Null, &Value::Null)
    );
    assert!(held["error"].as_str().unwrap().contains("cannot be reached"), "{held}");
    let refused = kms_call(&shield, "POST", "/rewrap", json!({"to": "vault"}));
    assert_eq!(refused.problem(), "kms-failed");
    wire.mend();
    wait_at_most(Duration::from_secs(30), "it being back", || {
        (shield.metric("keyshield_kms_held_up") == 1.0).then_some(())
    });
}
