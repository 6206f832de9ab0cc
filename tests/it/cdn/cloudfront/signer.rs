//! Signed URLs and cookies, checked by OpenSSL and by the policy that AWS's own library writes.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyshield::cdn::{Cdn, CloudFrontSettings, DeliveryMode, KeySeen, Signer, SignerSettings};
use keyshield::clock::Clock;
use keyshield::keys::{KeyId, Timestamp};
use serde_json::{Value, json};

use super::wires::{Wire, connector_with, edge, run};
use crate::harness::repository;
use crate::origin::{Answer, Origin};

pub const NOW: Timestamp = Timestamp::from_unix_millis(1_800_000_000_000);
const HOUR: Duration = Duration::from_secs(3_600);

fn openssl(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl").args(arguments).output().expect("openssl is installed");
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// As CloudFront reads what is in a URL or a cookie.
fn bytes_of(safe: &str) -> Vec<u8> {
    assert!(!safe.contains(['+', '=', '/', '%']), "{safe}");
    STANDARD.decode(safe.replace('-', "+").replace('_', "=").replace('~', "/")).unwrap()
}

/// By the public half of a private key's file: whether the signature is the policy's, and the policy.
pub fn check_signature(folder: &Path, parts: &HashMap<String, String>) -> Value {
    let policy = bytes_of(&parts["Policy"]);
    assert_eq!(parts["Hash-Algorithm"], "SHA256");
    let text = |name: &str| folder.join(name).display().to_string();
    let scratch = tempfile::tempdir().unwrap();
    let file = |name: &str| scratch.path().join(name).display().to_string();
    std::fs::write(file("policy"), &policy).unwrap();
    std::fs::write(file("signature"), bytes_of(&parts["Signature"])).unwrap();
    let private = text(&format!("{}.pem", parts["Key-Pair-Id"]));
    openssl(&["pkey", "-in", &private, "-pubout", "-out", &file("public")]);
    let (public, signature, policy_file) = (file("public"), file("signature"), file("policy"));
    let told = openssl(&["dgst", "-sha256", "-verify", &public, "-signature", &signature, &policy_file]);
    assert!(String::from_utf8_lossy(&told).contains("Verified OK"));
    serde_json::from_slice(&policy).unwrap()
}

pub fn parts_of_url(url: &str) -> HashMap<String, String> {
    let (_, query) = url.split_once('?').unwrap();
    query.split('&').filter_map(|pair| pair.split_once('=')).map(|(n, v)| (n.into(), v.into())).collect()
}

fn signer(folder: &Path) -> Signer {
    let settings =
        SignerSettings { key_group_id: "G".into(), directory: folder.into(), longest_life: 24 * HOUR };
    Signer::new(settings, Clock::manual(NOW))
}

/// What AWS's library for Python writes for it.
fn policy_by_aws(resource: &str, until: i64) -> Value {
    let script = "import sys, datetime\nfrom botocore.signers import CloudFrontSigner\n\
        until = datetime.datetime.fromtimestamp(int(sys.argv[2]), datetime.timezone.utc)\n\
        print(CloudFrontSigner('K', None).build_policy(sys.argv[1], until))";
    let python = repository("tests/tools/.venv/bin/python");
    let output = Command::new(python).args(["-c", script, resource, &until.to_string()]).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

#[test]
fn signatures_by_an_operators_own_keys_are_what_cloudfront_checks() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    // As the documentation of CloudFront says to make them, and as OpenSSL writes them by default.
    openssl(&["genrsa", "-traditional", "-out", &file("KRSAONE.pem"), "2048"]);
    openssl(&["genrsa", "-out", &file("KRSATWO.pem"), "2048"]);
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &file("KECONE.pem")]);
    let until = NOW.plus(HOUR);
    for id in ["KRSAONE", "KRSATWO", "KECONE"] {
        std::fs::write(dir.path().join("signing"), format!("{id}\n")).unwrap();
        let url = "https://d111111abcdef8.cloudfront.net/live/ch1/master.m3u8?a=b";
        let signed = signer(dir.path()).sign_url(url, until).unwrap();
        let parts = parts_of_url(&signed);
        assert_eq!((parts["a"].as_str(), parts["Key-Pair-Id"].as_str()), ("b", id));
        let policy = check_signature(dir.path(), &parts);
        assert_eq!(policy, policy_by_aws(url, until.as_unix_millis() / 1_000));

        let pattern = "https://d111111abcdef8.cloudfront.net/live/*";
        let cookies = signer(dir.path()).sign_cookies(pattern, until).unwrap();
        let parts =
            cookies.iter().map(|cookie| (cookie.name.replace("CloudFront-", ""), cookie.value.clone()));
        let policy = check_signature(dir.path(), &parts.collect());
        assert_eq!(policy["Statement"][0]["Resource"], pattern);
    }
}

#[test]
fn the_edge_is_asked_with_cookies_where_viewers_need_them() {
    let front = Origin::start(|seen| match seen.headers.contains_key("cookie") {
        true => Answer::status(404).header("Keyshield-Served-By", "shield"),
        false => Answer::status(403),
    });
    let wire = Wire::stub();
    let folder = wire.dir.path().join("keys");
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("KONE.pem").display().to_string();
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", &file]);
    std::fs::write(folder.join("signing"), "KONE").unwrap();
    let signer = SignerSettings { key_group_id: "G".into(), directory: folder.clone(), longest_life: HOUR };
    let settings = CloudFrontSettings { signer: Some(signer), ..wire.settings() };
    let cdn = connector_with(settings, DeliveryMode::Pull, edge(&front.url(), false));
    assert_eq!(run(cdn.verify(KeyId::from_bytes([1; 16]))).unwrap(), KeySeen::Missing);
    let cookie = front.last(&front.targets()[0]).headers["cookie"].clone();
    let pairs = cookie.split("; ").filter_map(|pair| pair.split_once('='));
    let parts = pairs.map(|(name, value)| (name.replace("CloudFront-", ""), value.to_owned()));
    let policy = check_signature(&folder, &parts.collect());
    assert_eq!(policy["Statement"][0]["Resource"], json!(format!("{}/*", front.url())));
}
