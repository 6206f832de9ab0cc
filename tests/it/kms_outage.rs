//! A shield whose KMS goes away for longer than keys stay unwrapped, and what an operator hears of it.
//!
//! The KMS is the real `bao` behind a wire that is cut. Everything that takes minutes in life takes seconds here; the
//! same in simulated time stands in `engine/tests/deks.rs`.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::control_api::{call, tokens};
use crate::harness::{Keys, Running, ask, fetch_segments, get, openssl_decrypt, wait_at_most, wait_for};
use crate::hook::Receiver;
use crate::kms::bao::Bao;
use crate::kms::vault::{documented_policy, folder};
use crate::origin::{Answer, Origin};
use crate::wire::Wire;

const LONG: Duration = Duration::from_secs(30);

fn media(name: &str) -> Vec<u8> {
    name.bytes().cycle().take(20_001).collect()
}

/// A live origin: two segments further on with every second look at its playlist.
fn origin() -> Origin {
    let looks = AtomicU64::new(20);
    Origin::start(move |request| {
        if !request.target.ends_with(".m3u8") {
            return Answer::ok(media(&request.target));
        }
        let first = looks.fetch_add(1, Ordering::SeqCst);
        let mut text =
            format!("#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:{first}\n");
        for msn in first..first + 4 {
            text.push_str(&format!("#EXTINF:1,\nseg_{msn}.ts\n"));
        }
        Answer::ok(text)
    })
}

/// Plays what is there now: every segment decrypts. Gives the path of the last one's key.
fn play(shield: &Running) -> String {
    let segments = fetch_segments(&shield.at("/ch1/index.m3u8"));
    for segment in &segments {
        let key = Keys::default().get(&segment.key_url);
        let served = get(&segment.url).body;
        let name = segment.url.rsplit('/').next().unwrap();
        let clear = media(&format!("/ch1/{name}"));
        assert!(openssl_decrypt(&served, &key, &segment.iv) == clear, "{segment:?}");
        assert_ne!(served[..64], clear[..64], "{segment:?} is in clear");
    }
    segments.last().expect("there are segments").key_url.clone()
}

fn health(shield: &Running) -> Value {
    let answer = ask("GET", &format!("{}/api/hls/health", shield.control), &[]);
    serde_json::from_slice(&answer.body).unwrap()
}

#[test]
fn an_outage_beyond_the_time_of_keys_is_played_through_told_and_made_up_for() {
    let (bao, origin, receiver) = (Bao::start(), origin(), Receiver::start());
    bao.make_key("keyshield");
    let wire = Wire::to(bao.address());
    let dir = folder(&bao, &documented_policy());
    let (path, url) = (dir.path().display(), origin.url());
    let config = format!(
        "[store]\ndatabase = \"{path}/keyshield.db\"\n\
         [kms]\nprovider = \"vault\"\nunwrapped_ttl_secs = 1\n\
         [kms.vault]\naddress = \"http://{}\"\ntoken_file = \"{path}/token\"\ntimeout_secs = 1\n\
         [alerts]\nwebhook_url = \"{}\"\n[keys]\nsweep_interval_millis = 50\n\
         [policy]\nsegments_per_key = 4\npre_generate_keys = 2\nlead_segments = 1\n{}\
         [[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"ch1\"\nplaylist_url = \"{url}/ch1/index.m3u8\"\n",
        wire.address,
        receiver.url,
        tokens()
    );
    let shield = Running::serve_with(dir, &config);
    let mut shown = vec![play(&shield)];
    let renewed = call(&shield, "POST", "/ch1/rotate-dek", Value::Null).ok();
    assert_eq!(
        (&renewed["version"], &renewed["kekId"]),
        (&Value::from(2), &Value::from("vault:transit/keyshield"))
    );
    assert_eq!(health(&shield)["problems"], Value::Array(Vec::new()));

    wire.cut();
    wait_at_most(LONG, "the KMS being missed", || (shield.metric("keyshield_kms_up") == 0.0).then_some(()));
    wait_for("keys whose time is over", || (shield.metric("keyshield_deks_unwrapped") == 0.0).then_some(()));
    // Until what waits is used up, and well beyond.
    let mut beyond = 0;
    wait_at_most(LONG, "keys that are used up", || {
        let key = play(&shield);
        if shown.last() != Some(&key) {
            shown.push(key);
        }
        beyond += usize::from(receiver.has("keys-running-out", "raised").is_some());
        (beyond > 12).then_some(())
    });
    let last = shown.last().unwrap().clone();
    assert_eq!(play(&shield), last, "the last key stays");
    let notice = receiver.has("keys-running-out", "raised").unwrap();
    assert_eq!((&notice["severity"], notice["node"].as_str().unwrap().len()), (&Value::from("critical"), 16));
    assert_eq!(shield.metric("keyshield_alert_active"), 1.0);
    let problems = health(&shield)["problems"].to_string();
    assert!(problems.contains("KMS vault, key transit/keyshield: "), "{problems}");
    assert!(problems.contains("0 keys made ahead at least"), "{problems}");
    let told = Command::new(env!("CARGO_BIN_EXE_keyshield"))
        .args(["health", "--control", &shield.control])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&told.stdout).contains("KMS vault, key transit/keyshield"), "{told:?}");
    let renew = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keyshield"));
        command.args(["kms", "rotate-dek", "--all", "--control", &shield.control]);
        command.env("KEYSHIELD_TOKEN", "ks_admin").output().unwrap()
    };
    let told = renew();
    let why = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(!told.status.success() && why.contains("0 of 1 streams have a new key; ch1: 503"), "{why}");
    let refused = call(&shield, "POST", "/ch1/rotate-dek", Value::Null);
    assert_eq!(refused.problem(), "failed");

    wire.mend();
    wait_at_most(LONG, "a rotation", || (play(&shield) != last).then_some(()));
    wait_at_most(LONG, "the end of the alert", || receiver.has("keys-running-out", "resolved"));
    wait_for("health", || (health(&shield)["status"] == "healthy").then_some(()));
    let log = shield.logged();
    assert!(log.contains("alert raised") && log.contains("alert resolved"), "{log}");
    assert!(!log.contains("secret-of-the-webhook"), "{log}");
    let told = renew();
    let table = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.status.success() && table.contains("vault:transit/keyshield"), "{told:?}");
    play(&shield);
}
