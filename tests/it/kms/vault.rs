//! Vault's transit engine: OpenBao's real server.

use std::path::Path;
use std::time::Duration;

use keyshield::keys::DataEncryptionKey;
use keyshield::kms::{Kms, Login, Secret};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::bao::Bao;
use super::*;
use crate::control_api::call;
use crate::harness::{ask, pause, try_ask, wait_at_most, wait_for};
use crate::wire::Wire;

/// A token's life, where it is not what is tested.
pub(crate) const LONG: Duration = Duration::from_secs(3_600);

/// The policy that the documentation tells to paste.
pub(crate) fn documented_policy() -> String {
    let page = include_str!("../../../docs/kms.md");
    let (_, rest) = page.split_once("```hcl\n").expect("a policy");
    rest.split_once("```").expect("its end").0.to_owned()
}

/// `[kms]` for a shield whose token lies in its folder.
fn section(dir: &Path, address: &str, key: &str) -> String {
    format!(
        "[kms]\nprovider = \"vault\"\n[kms.vault]\naddress = \"http://{address}\"\nkey = \"{key}\"\n\
         token_file = \"{}/token\"\ntimeout_secs = 1\n",
        dir.display()
    )
}

pub(crate) fn folder(bao: &Bao, policy: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), bao.token(policy, LONG)).unwrap();
    dir
}

#[test]
fn transit_conforms_with_no_more_than_the_documented_policy() {
    let bao = Bao::start();
    bao.make_key("keyshield");
    let token = bao.token(&documented_policy(), LONG);
    run(async {
        conforms(&bao.kms_by("keyshield", Login::Token(Secret::new(token)))).await;

        let (ch1, kms) = (stream("ch1"), bao.kms("keyshield"));
        let (_, wrapped) = kms.generate_data_key(&context(&ch1, 1)).await.unwrap();
        let without = json!({"ciphertext": String::from_utf8(wrapped.bytes).unwrap()});
        let (status, answer) = bao.call("POST", "transit/decrypt/keyshield", without);
        assert_eq!(status, 400, "it does not open without its context: {answer}");
    });
}

#[test]
fn a_transit_key_that_is_rotated_opens_what_it_wrapped_until_that_is_forbidden() {
    let bao = Bao::start();
    bao.make_key("k");
    let (ch1, kms) = (stream("ch1"), bao.kms("k"));
    run(async {
        let (key, old) = kms.generate_data_key(&context(&ch1, 1)).await.unwrap();
        bao.ok("POST", "transit/keys/k/rotate", json!({}));
        assert_eq!(kms.describe().await.unwrap().version, Some(2));
        assert_eq!(kms.unwrap(&context(&ch1, 1), &old).await.unwrap().expose(), key.expose());
        let new = kms.wrap(&context(&ch1, 1), &key).await.unwrap();
        assert!(new.bytes.starts_with(b"vault:v2:"));

        bao.ok("POST", "transit/keys/k/config", json!({"min_decryption_version": 2}));
        let error = kms.unwrap(&context(&ch1, 1), &old).await.unwrap_err();
        assert!(error.is_about_what_was_wrapped() && error.to_string().contains("too old"), "{error}");
        assert!(kms.unwrap(&context(&ch1, 1), &new).await.is_ok());
    });
}

#[test]
fn a_missing_transit_key_is_named_with_the_command_and_not_made() {
    let bao = Bao::start();
    let (ch1, kms) = (stream("ch1"), bao.kms("nokey"));
    run(async {
        let key = DataEncryptionKey::from_bytes([1; 32]);
        let errors = [
            kms.describe().await.map(drop).unwrap_err(),
            kms.generate_data_key(&context(&ch1, 1)).await.map(drop).unwrap_err(),
            // Root may make keys, and transit would.
            kms.wrap(&context(&ch1, 1), &key).await.map(drop).unwrap_err(),
        ];
        for error in errors {
            assert!(error.to_string().contains("vault write -f transit/keys/nokey"), "{error}");
            assert!(!error.is_retryable());
        }
    });
    assert_eq!(bao.call("GET", "transit/keys/nokey", Value::Null).0, 404);
    let elsewhere = bao.kms("signing");
    bao.ok("POST", "transit/keys/signing", json!({"type": "ed25519"}));
    let error = run(elsewhere.describe()).unwrap_err().to_string();
    assert!(error.contains("ed25519") && error.contains("aes256-gcm96"), "{error}");
}

#[test]
fn what_transit_refuses_is_told_apart_and_shows_no_token() {
    let bao = Bao::start();
    bao.make_key("k");
    let bad = bao.kms_by("k", Login::Token(Secret::new("s.not-a-token".into())));
    let error = run(bad.describe()).unwrap_err();
    assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{error}");
    let text = format!("{error} {error:?} {bad:?}");
    assert!(text.contains("permission denied") && text.contains("policy"), "{text}");
    assert!(!text.contains("not-a-token"), "{text}");

    let kms = bao.kms("k");
    assert!(run(kms.describe()).is_ok());
    bao.ok("POST", "sys/seal", json!({}));
    let error = run(bao.kms("k").describe()).unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("sealed"), "{error}");
}

#[test]
fn a_token_is_renewed_before_it_expires() {
    let bao = Bao::start();
    bao.make_key("keyshield");
    let file = bao.dir().join("token");
    std::fs::write(&file, bao.token(&documented_policy(), Duration::from_secs(3)) + "\n").unwrap();
    let kms = bao.kms_by("keyshield", Login::TokenFile(file));
    run(async {
        // Three lives of a token that nothing but renewal makes longer.
        for _ in 0..18 {
            kms.describe().await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    });
}

#[test]
fn a_token_that_is_refused_is_come_by_anew() {
    let bao = Bao::start();
    bao.make_key("keyshield");
    bao.set_policy(&documented_policy());
    bao.ok("POST", "sys/auth/approle", json!({"type": "approle"}));
    bao.ok("POST", "auth/approle/role/shield", json!({"token_policies": "keyshield"}));
    let role = bao.ok("GET", "auth/approle/role/shield/role-id", Value::Null);
    let secret = bao.ok("POST", "auth/approle/role/shield/secret-id", json!({}));
    let secret_id_file = bao.dir().join("secret-id");
    std::fs::write(&secret_id_file, secret["data"]["secret_id"].as_str().unwrap()).unwrap();
    let role_id = role["data"]["role_id"].as_str().unwrap().to_owned();
    let login = Login::AppRole { role_id, secret_id_file: secret_id_file.clone() };
    let kms = bao.kms_by("keyshield", login.clone());
    run(async {
        conforms(&kms).await;
        // Every token of the role is taken back.
        bao.ok("POST", "sys/leases/revoke-prefix/auth/approle/login", json!({}));
        assert!(kms.describe().await.is_ok());

        std::fs::write(&secret_id_file, "3f0e7cbb-no-secret").unwrap();
        let error = bao.kms_by("keyshield", login).describe().await.unwrap_err();
        let text = error.to_string();
        assert!(!error.is_retryable() && text.contains("auth/approle/login"), "{text}");
        assert!(!text.contains("no-secret"), "{text}");
    });
}

#[test]
fn a_pods_token_is_what_kubernetes_logs_in_with() {
    // Kubernetes's own part: whose token it is.
    let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": {
        "authenticated": true,
        "user": {"username": "system:serviceaccount:video:keyshield", "uid": "1", "groups": []},
    }});
    let kubernetes = Origin::start(move |_| {
        Answer { status: 201, ..Answer::ok(review.to_string()) }.header("Content-Type", "application/json")
    });
    let bao = Bao::start();
    bao.make_key("keyshield");
    bao.set_policy(&documented_policy());
    bao.ok("POST", "sys/auth/kubernetes", json!({"type": "kubernetes"}));
    let authority = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-keyout", "/dev/null", "-subj", "/CN=kubernetes"])
        .output()
        .expect("openssl is installed");
    let config = json!({"kubernetes_host": kubernetes.url(), "disable_local_ca_jwt": true,
        "kubernetes_ca_cert": String::from_utf8(authority.stdout).unwrap(), "token_reviewer_jwt": jwt()});
    bao.ok("POST", "auth/kubernetes/config", config);
    let role = json!({"bound_service_account_names": "keyshield",
        "bound_service_account_namespaces": "video", "token_policies": "keyshield"});
    bao.ok("POST", "auth/kubernetes/role/shield", role);
    let jwt_file = bao.dir().join("jwt");
    std::fs::write(&jwt_file, jwt()).unwrap();
    let login = Login::Kubernetes { role: "shield".into(), jwt_file };
    run(conforms(&bao.kms_by("keyshield", login)));
}

/// A service account's token as far as it is looked at before the review.
fn jwt() -> String {
    use base64::Engine;
    let part = |value: Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"iss": "kubernetes/serviceaccount", "sub": "system:serviceaccount:video:keyshield",
        "kubernetes.io/serviceaccount/namespace": "video",
        "kubernetes.io/serviceaccount/service-account.name": "keyshield",
        "kubernetes.io/serviceaccount/service-account.uid": "1"});
    format!("{}.{}.{}", part(json!({"alg": "RS256", "typ": "JWT"})), part(claims), "c2lnbmF0dXJl")
}

#[test]
fn a_shield_on_transit_plays_survives_a_restart_and_keeps_no_key_in_clear() {
    let bao = Bao::start();
    bao.make_key("keyshield");
    let dir = folder(&bao, &documented_policy());
    let token = std::fs::read(dir.path().join("token")).unwrap();
    let section = section(dir.path(), &bao.address().to_string(), "keyshield");
    let kms = bao.kms("keyshield");
    plays_survives_a_restart_and_keeps_no_key_in_clear(Site {
        dir,
        section,
        environment: Vec::new(),
        credentials: vec![token],
        kms: &kms,
    });
}

#[test]
fn streams_go_on_without_the_kms_and_a_start_waits_for_it() {
    let (bao, origin) = (Bao::start(), origin());
    bao.make_key("keyshield");
    let wire = Wire::to(bao.address());
    let dir = folder(&bao, &documented_policy());
    let section = section(dir.path(), &wire.address.to_string(), "keyshield");
    let config = config(dir.path(), &section, &origin, &["ch1"]);
    let shield = Running::serve_with(dir, &config);
    check_plays(&shield, "ch1");
    wire.cut();
    wait_at_most(Duration::from_secs(30), "the KMS being missed", || {
        (shield.metric("keyshield_kms_up") == 0.0).then_some(())
    });
    let health = ask("GET", &format!("{}/api/hls/health", shield.control), &[]);
    assert!(health.status == 200 && health.text().contains("degraded"), "{health:?}");
    for _ in 0..3 {
        call(&shield, "POST", "/ch1/rotate", Value::Null).ok();
        check_plays(&shield, "ch1");
    }
    let before = check_plays(&shield, "ch1");

    // A new stream has no key, and gets one when the KMS is back.
    let url = format!("{}/ch2/index.m3u8", origin.url());
    let begun = json!({"playlistUrl": url, "cdnEndpoints": ["https://cdn1.example.com"]});
    call(&shield, "POST", "/ch2/initialize", begun);
    assert_eq!(shield.get("/ch2/index.m3u8").status, 503, "nothing leaves in clear");
    wire.mend();
    wait_at_most(Duration::from_secs(30), "the new stream's keys", || {
        (shield.get("/ch2/index.m3u8").status == 200).then_some(())
    });
    check_plays(&shield, "ch2");

    wire.cut();
    let dir = shield.kill();
    let mut shield = Running::launch(dir, &config, &[]);
    let health = format!("{}/api/hls/health", shield.control);
    let unhealthy = wait_for("an answer of health", || try_ask("GET", &health, &[]).ok());
    assert!(unhealthy.status == 503 && unhealthy.text().contains("unhealthy"), "{unhealthy:?}");
    let why = "KMS vault, key transit/keyshield";
    wait_for("the reason in the log", || shield.logged().contains(why).then_some(()));
    assert!(shield.logged().contains("cannot be reached"), "{}", shield.logged());
    pause(Duration::from_secs(1));
    assert!(shield.ended().is_none() && !shield.is_ready());
    let health = ask("GET", &health, &[]).text();
    assert!(health.contains(why) && health.contains("this node waits for it"), "{health}");
    wire.mend();
    wait_at_most(Duration::from_secs(30), "keys that are loaded", || shield.is_ready().then_some(()));
    assert_eq!(paths(&check_plays(&shield, "ch1")), paths(&before));
    check_plays(&shield, "ch2");

    wire.cut();
    let dir = shield.kill();
    let mut shield = Running::launch(dir, &config, &[]);
    let health = format!("{}/api/hls/health", shield.control);
    wait_for("an answer of health", || try_ask("GET", &health, &[]).ok());
    // By then it has begun to listen for signals too.
    wait_for("the reason in the log", || shield.logged().contains(why).then_some(()));
    assert_eq!(shield.stop("-TERM"), Some(0), "one that waits can be stopped");
}

#[test]
fn a_stream_whose_key_may_not_be_used_is_put_off_and_the_others_play() {
    let (bao, origin) = (Bao::start(), origin());
    bao.make_key("old");
    bao.make_key("new");
    let of = |key: &str| documented_policy().replace("keyshield", key);
    let both = of("old") + &of("new");
    let dir = folder(&bao, &both);
    let address = bao.address().to_string();
    let first = config(dir.path(), &section(dir.path(), &address, "old"), &origin, &["ch1"]);
    let dir = Running::serve_with(dir, &first).kill();

    let second = config(dir.path(), &section(dir.path(), &address, "new"), &origin, &["ch1", "ch2"]);
    let shield = Running::serve_with(dir, &second);
    check_plays(&shield, "ch1");
    check_plays(&shield, "ch2");
    let dir = shield.kill();

    bao.set_policy(&of("new"));
    let shield = Running::serve_with(dir, &second);
    check_plays(&shield, "ch2");
    assert_eq!(shield.get("/ch1/index.m3u8").status, 503);
    assert!(shield.logged().contains("transit/decrypt/old"), "{}", shield.logged());
    bao.set_policy(&both);
    wait_at_most(Duration::from_secs(30), "the stream that was put off", || {
        (shield.get("/ch1/index.m3u8").status == 200).then_some(())
    });
    check_plays(&shield, "ch1");
}
