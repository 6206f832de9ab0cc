//! Google Cloud KMS: the provider against a stub that Google's own client has judged, and a shield on it.
//!
//! Deliberately absent: credentials of machines and of other clouds, which need a metadata server of Google's, and
//! impersonation.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use keyshield::keys::DataEncryptionKey;
use keyshield::kms::{GcpKms, GcpSettings, Guard, Kms, Limits, WrappedKey};
use serde_json::{Value, json};

use super::stubs::{Stub, bytes};
use super::{Site, conforms, context, plays_survives_a_restart_and_keeps_no_key_in_clear, run, stream};

const KEY: &str = "projects/video/locations/europe-west1/keyRings/keyshield/cryptoKeys/keyshield";

struct Gcp {
    stub: Stub,
}

impl Gcp {
    fn start() -> Self {
        let gcp = Self { stub: Stub::start("gcp") };
        gcp.ask(json!({"do": "make", "key": KEY}));
        gcp
    }

    fn ask(&self, what: Value) -> Value {
        self.stub.ask(what)
    }

    /// As `gcloud auth application-default login` leaves it.
    fn user(&self, refresh_token: &str) -> PathBuf {
        let file = self.stub.dir().join("user.json");
        let user = json!({"type": "authorized_user", "client_id": "id", "client_secret": "no-secret",
            "refresh_token": refresh_token, "token_uri": format!("{}/token", self.stub.url)});
        std::fs::write(&file, user.to_string()).unwrap();
        file
    }

    fn kms_by(&self, credentials_file: PathBuf) -> GcpKms {
        let settings = GcpSettings {
            endpoint: self.stub.url.clone(),
            project: "video".into(),
            location: "europe-west1".into(),
            key_ring: "keyshield".into(),
            key: "keyshield".into(),
            credentials_file: Some(credentials_file),
        };
        GcpKms::new(settings, Duration::from_secs(5)).unwrap()
    }

    fn kms(&self) -> GcpKms {
        self.kms_by(self.user("refresh-of-the-tests"))
    }

    fn by_google(&self, call: Value) -> Value {
        self.stub.by_vendor("gcp", call)
    }
}

#[test]
fn cloud_kms_conforms() {
    let gcp = Gcp::start();
    run(conforms(&gcp.kms()));
}

#[test]
fn googles_own_client_takes_the_stub_for_cloud_kms() {
    let gcp = Gcp::start();
    let key = gcp.by_google(json!({"call": "get", "key": KEY}));
    let version = format!("{KEY}/cryptoKeyVersions/1");
    assert_eq!(key, json!({"key": version, "state": "ENABLED", "purpose": "ENCRYPT_DECRYPT"}));
    let encrypt = |crc32c: u32| {
        let plaintext = "00".repeat(32);
        gcp.by_google(json!({"call": "encrypt", "key": KEY, "bytes": plaintext, "crc32c": crc32c}))
    };
    // RFC 3720, B.4.
    let made = encrypt(0x8a91_36aa);
    assert_eq!(made["key"], version);
    assert_eq!(encrypt(0x8a91_36ab), json!({"error": "BadRequest"}));
    let opened = gcp.by_google(json!({"call": "decrypt", "key": KEY, "bytes": made["bytes"]}));
    assert_eq!((bytes(&opened), &opened["crc32c"]), (vec![0; 32], &json!(0x8a91_36aa_u32)));
    let missing = gcp.by_google(json!({"call": "get", "key": format!("{KEY}-not")}));
    assert_eq!(missing, json!({"error": "NotFound"}));
}

#[test]
fn what_the_shield_wraps_googles_own_client_opens_and_the_other_way_round() {
    let gcp = Gcp::start();
    let (ch1, kms) = (stream("ch1"), gcp.kms());
    let here = context(&ch1, 1);
    let (key, wrapped) = run(kms.generate_data_key(&here)).unwrap();
    let decrypt = |aad: &[u8]| {
        let bytes = hex::encode(&wrapped.bytes);
        gcp.by_google(json!({"call": "decrypt", "key": KEY, "bytes": bytes, "aad": hex::encode(aad)}))
    };
    assert_eq!(bytes(&decrypt(&here.aad())), key.expose());
    assert_eq!(decrypt(b""), json!({"error": "BadRequest"}), "it does not open without its context");
    assert_eq!(decrypt(&context(&ch1, 2).aad()), json!({"error": "BadRequest"}));

    // A checksum of zeros, which the client must send: this key is zeros.
    let made = gcp.by_google(json!({"call": "encrypt", "key": KEY, "bytes": "00".repeat(32),
        "crc32c": 0x8a91_36aa_u32, "aad": hex::encode(here.aad())}));
    // Its assertion that a context without checksum is not verified holds for the stub too.
    let wrapped =
        WrappedKey { kek_id: format!("gcp:{}", made["key"].as_str().unwrap()), bytes: bytes(&made) };
    assert_eq!(run(kms.unwrap(&here, &wrapped)).unwrap().expose(), &[0; 32]);
}

#[test]
fn a_key_that_is_rotated_opens_what_it_wrapped_until_its_version_is_disabled() {
    let gcp = Gcp::start();
    let (ch1, kms) = (stream("ch1"), gcp.kms());
    run(async {
        let here = context(&ch1, 1);
        let (key, old) = kms.generate_data_key(&here).await.unwrap();
        assert_eq!(old.kek_id, format!("gcp:{KEY}/cryptoKeyVersions/1"));
        gcp.ask(json!({"do": "rotate", "key": KEY}));
        let now = kms.describe().await.unwrap();
        assert_eq!((now.version, now.kek_id), (Some(2), format!("gcp:{KEY}/cryptoKeyVersions/2")));
        assert_eq!(kms.unwrap(&here, &old).await.unwrap().expose(), key.expose());
        let new = kms.wrap(&here, &key).await.unwrap();
        assert_eq!(new.kek_id, format!("gcp:{KEY}/cryptoKeyVersions/2"));

        gcp.ask(json!({"do": "state", "key": KEY, "version": 1, "state": "DISABLED"}));
        let error = kms.unwrap(&here, &old).await.unwrap_err();
        assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{error}");
        assert!(error.to_string().contains("gcloud kms keys versions list"), "{error}");
        assert!(kms.unwrap(&here, &new).await.is_ok());

        gcp.ask(json!({"do": "state", "key": KEY, "version": 2, "state": "DESTROY_SCHEDULED"}));
        let error = kms.describe().await.unwrap_err();
        assert!(!error.is_retryable(), "{error}");
        assert!(error.to_string().contains("primary version 2 is DESTROY_SCHEDULED"), "{error}");
        assert!(kms.wrap(&here, &key).await.is_err());
    });
}

#[test]
fn what_is_damaged_on_the_way_is_noticed_by_its_checksum() {
    let gcp = Gcp::start();
    let (ch1, kms) = (stream("ch1"), gcp.kms());
    run(async {
        let here = context(&ch1, 1);
        let (key, wrapped) = kms.generate_data_key(&here).await.unwrap();
        for damaged in ["verified", "ciphertext"] {
            gcp.ask(json!({"do": "damage", "what": damaged}));
            let error = kms.wrap(&here, &key).await.unwrap_err();
            assert!(error.is_retryable() && error.to_string().contains("checksum"), "{damaged}: {error}");
            assert!(kms.unwrap(&here, &wrapped).await.is_ok());
        }
        gcp.ask(json!({"do": "damage", "what": "plaintext"}));
        let error = kms.unwrap(&here, &wrapped).await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("checksum"), "{error}");
        gcp.ask(json!({"do": "damage", "what": null}));
        assert_eq!(kms.unwrap(&here, &wrapped).await.unwrap().expose(), key.expose());
    });
}

#[test]
fn what_cloud_kms_refuses_is_told_apart_and_says_what_to_check() {
    let gcp = Gcp::start();
    let (ch1, kms) = (stream("ch1"), gcp.kms());
    run(async {
        let here = context(&ch1, 1);
        let key = DataEncryptionKey::from_bytes([1; 32]);
        let wrapped = kms.wrap(&here, &key).await.unwrap();
        gcp.ask(json!({"do": "deny", "key": KEY, "denied": true}));
        for error in [
            kms.describe().await.map(drop).unwrap_err(),
            kms.wrap(&here, &key).await.map(drop).unwrap_err(),
            kms.unwrap(&here, &wrapped).await.map(drop).unwrap_err(),
        ] {
            assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{error}");
            let text = error.to_string();
            assert!(text.contains("Permission 'cloudkms.") && text.contains("docs/kms.md"), "{text}");
        }

        let signing = KEY.replace("cryptoKeys/keyshield", "cryptoKeys/signing");
        gcp.ask(json!({"do": "make", "key": signing, "purpose": "ASYMMETRIC_SIGN"}));
        let settings = |key: &str| GcpSettings {
            endpoint: gcp.stub.url.clone(),
            project: "video".into(),
            location: "europe-west1".into(),
            key_ring: "keyshield".into(),
            key: key.into(),
            credentials_file: Some(gcp.user("refresh-of-the-tests")),
        };
        for (key, told) in [("signing", "--purpose=encryption"), ("nokey", "gcloud kms keys create")] {
            let error =
                GcpKms::new(settings(key), Duration::from_secs(5)).unwrap().describe().await.unwrap_err();
            assert!(!error.is_retryable() && error.to_string().contains(told), "{error}");
        }
        let gone = GcpSettings { endpoint: "http://127.0.0.1:1".into(), ..settings("keyshield") };
        let error = GcpKms::new(gone, Duration::from_secs(5)).unwrap().describe().await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("cannot be reached"), "{error}");
    });
}

#[test]
fn a_quota_that_is_used_up_is_waited_for_by_the_guard() {
    let gcp = Gcp::start();
    let ch1 = stream("ch1");
    let limits = Limits { timeout: Duration::from_secs(5), max_concurrent: 2 };
    let guarded = Guard::new(gcp.kms(), "gcp", KEY.into(), limits);
    run(async {
        let exhausted = json!({"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Quota exceeded"});
        gcp.stub.fail(2, 429, exhausted.clone());
        assert!(guarded.generate_data_key(&context(&ch1, 1)).await.is_ok());
        gcp.stub.fail(1, 503, json!({"code": 503, "status": "UNAVAILABLE", "message": "try again"}));
        assert!(guarded.describe().await.is_ok());
        gcp.stub.fail(1, 429, exhausted);
        let error = gcp.kms().describe().await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("quota"), "{error}");
    });
}

#[test]
fn a_service_account_signs_for_itself_and_for_no_more_than_keys() {
    let gcp = Gcp::start();
    let openssl = |args: &[&str]| {
        let output = Command::new("openssl").args(args).output().expect("openssl is installed");
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let file = gcp.stub.dir().join("private.pem").display().to_string();
    let private_key = openssl(&["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]);
    std::fs::write(&file, &private_key).unwrap();
    let email = "shield@video.iam.gserviceaccount.com";
    let account = json!({"type": "service_account", "project_id": "video", "private_key_id": "1",
        "private_key": private_key, "client_email": email, "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token"});
    let credentials = gcp.stub.dir().join("account.json");
    std::fs::write(&credentials, account.to_string()).unwrap();
    let kms = gcp.kms_by(credentials);
    run(async {
        let error = kms.describe().await.unwrap_err();
        assert!(!error.is_retryable() && error.to_string().contains("the token is not taken"), "{error}");
        let public_key = openssl(&["pkey", "-pubout", "-in", &file]);
        gcp.ask(json!({"do": "account", "email": email, "public_key": public_key}));
        conforms(&kms).await;
        let claims = gcp.ask(json!({"do": "claims"}));
        assert_eq!(claims["scope"], "https://www.googleapis.com/auth/cloudkms");
    });
}

#[test]
fn credentials_that_are_mended_are_taken_without_a_new_start() {
    let gcp = Gcp::start();
    let kms = gcp.kms_by(gcp.user("revoked"));
    run(async {
        let error = kms.describe().await.unwrap_err();
        let text = format!("{error} {error:?} {kms:?}");
        assert!(!error.is_retryable() && text.contains("user.json"), "{text}");
        assert!(!text.contains("no-secret") && !text.contains("revoked\""), "{text}");
        gcp.user("refresh-of-the-tests");
        assert!(kms.describe().await.is_ok());
        gcp.ask(json!({"do": "forget tokens"}));
        assert!(kms.describe().await.is_ok(), "a token that is not taken is come by anew");

        let missing = gcp.kms_by(gcp.stub.dir().join("missing.json"));
        let error = missing.describe().await.unwrap_err();
        assert!(!error.is_retryable() && error.to_string().contains("missing.json"), "{error}");
        let unknown = gcp.stub.dir().join("unknown.json");
        std::fs::write(&unknown, "{\"type\": \"abacus\"}").unwrap();
        let error = gcp.kms_by(unknown).describe().await.unwrap_err();
        assert!(error.to_string().contains("service_account"), "{error}");
    });
}

#[test]
fn a_shield_on_cloud_kms_plays_survives_a_restart_and_keeps_no_key_in_clear() {
    let gcp = Gcp::start();
    let section = format!(
        "provider = \"gcp\"\n[kms.gcp]\nlocation = \"europe-west1\"\nendpoint = \"{}\"\n",
        gcp.stub.url
    );
    let credentials = gcp.user("refresh-of-the-tests").display().to_string();
    let environment =
        [("GOOGLE_CLOUD_PROJECT", "video"), ("GOOGLE_APPLICATION_CREDENTIALS", credentials.as_str())];
    plays_survives_a_restart_and_keeps_no_key_in_clear(Site {
        dir: tempfile::tempdir().unwrap(),
        section: format!("[kms]\n{section}"),
        environment: environment.to_vec(),
        credentials: vec![b"no-secret".to_vec()],
        kms: &gcp.kms(),
    });
}
