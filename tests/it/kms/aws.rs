//! AWS KMS, by two servers that stand for it: where one falls short of AWS, the other does not.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use aws_sdk_kms::config::Credentials;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyshield::keys::DataEncryptionKey;
use keyshield::kms::{AwsKms, Guard, Kms, Limits};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::clouds::{Cloud, REGION, failure, kms_at, kms_by};
use super::*;
use crate::harness::{free_port, try_ask, wait_for};
use crate::origin::Origin;

const ALIAS: &str = "alias/keyshield";

/// Nothing of the machine's own: neither its settings nor its instance's role.
fn environment<'a>(cloud: &'a str, rest: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let alone = [
        ("AWS_ENDPOINT_URL", cloud),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
    ];
    [&alone, rest].concat()
}

fn guarded(kms: AwsKms) -> Guard<AwsKms> {
    let limits = Limits { timeout: Duration::from_secs(5), max_concurrent: 4 };
    Guard::new(kms, "aws", ALIAS.into(), limits)
}

#[test]
fn aws_kms_conforms_and_opens_nothing_without_its_context() {
    let moto = Cloud::moto();
    let arn = moto.make_key(ALIAS);
    let (ch1, kms) = (stream("ch1"), moto.kms(ALIAS));
    run(async {
        conforms(&kms).await;
        let (key, wrapped) = kms.generate_data_key(&context(&ch1, 1)).await.unwrap();
        assert_eq!(wrapped.kek_id, format!("aws:{arn}"));

        let blob = STANDARD.encode(&wrapped.bytes);
        let without = json!({"CiphertextBlob": blob, "KeyId": arn});
        let (status, answer) = moto.call(REGION, "Decrypt", &without);
        assert_eq!((status, answer["__type"].as_str()), (400, Some("InvalidCiphertextException")));
        let words = json!({"keyshield:purpose": "dek", "keyshield:stream": "ch1", "keyshield:version": "1",
            "keyshield:dek": "07".repeat(16)});
        let with = json!({"CiphertextBlob": blob, "KeyId": arn, "EncryptionContext": words});
        let opened = moto.ok(REGION, "Decrypt", &with);
        assert_eq!(
            opened["Plaintext"],
            STANDARD.encode(key.expose()),
            "the documented words are its context"
        );
    });
}

/// The policy that the documentation tells to paste.
fn documented_policy() -> Value {
    let page = include_str!("../../../docs/kms.md");
    let (_, rest) = page.split_once("```json\n").expect("a policy");
    serde_json::from_str(rest.split_once("```").expect("its end").0).unwrap()
}

#[test]
fn aws_kms_conforms_with_no_more_than_the_documented_policy() {
    let mut policy = documented_policy();
    let statements = policy["Statement"].as_array_mut().unwrap();
    let condition = statements[1]["Condition"]["StringEquals"].as_object().unwrap();
    let (ch1, purpose) = (stream("ch1"), ("purpose", "dek".to_owned()));
    assert!(context(&ch1, 1).named_parts().contains(&purpose));
    let expected = json!({"kms:EncryptionContext:keyshield:purpose": "dek"});
    assert_eq!(Some(condition), expected.as_object(), "what moto does not look at");
    for statement in statements.iter_mut() {
        statement["Resource"] = json!("*");
        statement.as_object_mut().unwrap().remove("Condition");
    }
    let moto = Cloud::moto();
    moto.make_key(ALIAS);
    let user = moto.user(&policy.to_string());
    run(conforms(&kms_by(user, &moto.url(), REGION, ALIAS)));

    // Policies are in force, and so are signatures.
    let moto = Cloud::moto();
    moto.make_key(ALIAS);
    policy["Statement"].as_array_mut().unwrap().pop();
    let user = moto.user(&policy.to_string());
    let kms = kms_by(user.clone(), &moto.url(), REGION, ALIAS);
    run(async {
        kms.describe().await.unwrap();
        let error = kms.generate_data_key(&context(&ch1, 1)).await.unwrap_err();
        let text = error.to_string();
        // Which moto does not say in AWS's words.
        assert!(
            !error.is_retryable() && text.contains("status 403") && text.contains("IAM policy"),
            "{text}"
        );
        let forged = Credentials::new(user.access_key_id(), "another-secret", None, None, "the tests");
        let error = kms_by(forged, &moto.url(), REGION, ALIAS).describe().await.unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(!error.is_retryable() && text.contains("check the credentials"), "{text}");
        assert!(!text.contains("another-secret"), "{text}");
    });
}

#[test]
fn aws_kms_conforms_on_a_second_server_but_for_what_that_does_not_authenticate() {
    let ministack = Cloud::ministack();
    ministack.make_key(ALIAS);
    run(conforms_but_for(&ministack.kms(ALIAS), &[Gap::OpensChangedBytes]));
}

#[test]
fn a_key_that_is_disabled_or_to_be_deleted_says_so_with_the_command() {
    let ministack = Cloud::ministack();
    let arn = ministack.make_key(ALIAS);
    let (ch1, kms) = (stream("ch1"), ministack.kms(ALIAS));
    let (_, wrapped) = run(kms.generate_data_key(&context(&ch1, 1))).unwrap();
    let check = |command: &str| {
        let errors = run(async {
            [
                kms.describe().await.map(drop).unwrap_err(),
                kms.generate_data_key(&context(&ch1, 1)).await.map(drop).unwrap_err(),
                kms.wrap(&context(&ch1, 1), &DataEncryptionKey::from_bytes([1; 32]))
                    .await
                    .map(drop)
                    .unwrap_err(),
                kms.unwrap(&context(&ch1, 1), &wrapped).await.map(drop).unwrap_err(),
            ]
        });
        for error in errors {
            assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{error}");
            assert!(error.to_string().contains(command), "{error}");
        }
    };
    ministack.ok(REGION, "DisableKey", &json!({"KeyId": arn}));
    check("aws kms enable-key --key-id");
    ministack.ok(REGION, "EnableKey", &json!({"KeyId": arn}));
    assert!(run(kms.describe()).is_ok());
    ministack.ok(REGION, "ScheduleKeyDeletion", &json!({"KeyId": arn, "PendingWindowInDays": 7}));
    check("aws kms cancel-key-deletion --key-id");
}

#[test]
fn a_key_that_is_not_there_is_looked_for_where_the_error_says() {
    let moto = Cloud::moto();
    let (ch1, kms) = (stream("ch1"), moto.kms("alias/nokey"));
    let signing = moto.make_key_in(REGION, json!({"KeyUsage": "SIGN_VERIFY", "KeySpec": "ECC_NIST_P256"}));
    run(async {
        for error in [
            kms.describe().await.map(drop).unwrap_err(),
            kms.generate_data_key(&context(&ch1, 1)).await.map(drop).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(!error.is_retryable(), "{text}");
            for part in ["KMS aws, key alias/nokey", "NotFoundException", REGION] {
                assert!(text.contains(part), "{text}");
            }
        }
        let error = moto.kms(&signing).describe().await.unwrap_err().to_string();
        assert!(error.contains("symmetric"), "{error}");
    });
}

#[test]
fn what_a_key_wrapped_opens_under_it_when_the_alias_names_another() {
    let moto = Cloud::moto();
    let first = moto.make_key(ALIAS);
    let (ch1, kms) = (stream("ch1"), moto.kms(ALIAS));
    run(async {
        let (key, wrapped) = kms.generate_data_key(&context(&ch1, 1)).await.unwrap();
        let second = moto.make_key_in(REGION, json!({}));
        moto.ok(REGION, "UpdateAlias", &json!({"AliasName": ALIAS, "TargetKeyId": second}));
        assert_eq!(kms.describe().await.unwrap().kek_id, format!("aws:{second}"), "it is noticed");
        assert_eq!(wrapped.kek_id, format!("aws:{first}"));
        assert_eq!(kms.unwrap(&context(&ch1, 1), &wrapped).await.unwrap().expose(), key.expose());
        let other = WrappedKey { kek_id: format!("aws:{second}"), ..wrapped };
        // AWS says that the key is the wrong one, moto that it may not be used.
        assert!(!kms.unwrap(&context(&ch1, 1), &other).await.unwrap_err().is_retryable());
    });
}

#[test]
fn what_was_wrapped_in_another_region_opens_there_or_by_the_replica_here() {
    let moto = Cloud::moto();
    let there = moto.make_key_in("us-east-1", json!({}));
    moto.make_key(ALIAS);
    let ch1 = stream("ch1");
    let context = context(&ch1, 1);
    run(async {
        let (key, wrapped) =
            kms_at(&moto.url(), "us-east-1", &there).generate_data_key(&context).await.unwrap();
        let opened = moto.kms(ALIAS).unwrap(&context, &wrapped).await.unwrap();
        assert_eq!(opened.expose(), key.expose());

        // A key of many regions: its own, whichever wrapped.
        let far = moto.make_key_in("us-east-1", json!({"MultiRegion": true}));
        let (_, id) = far.rsplit_once('/').unwrap();
        moto.ok("us-east-1", "ReplicateKey", &json!({"KeyId": id, "ReplicaRegion": REGION}));
        let (_, wrapped) = kms_at(&moto.url(), "us-east-1", id).generate_data_key(&context).await.unwrap();
        assert_eq!(wrapped.kek_id, format!("aws:{far}"));
        let seen = moto.behind("none", Vec::new());
        let here = kms_at(&seen.url(), REGION, id);
        // Whether the replica opens it is AWS's matter, and not moto's: it is asked where it is.
        let _ = here.unwrap(&context, &wrapped).await;
        let asked = seen.last("/");
        assert!(asked.headers["authorization"].contains(REGION), "{asked:?}");
        let body = String::from_utf8(asked.body).unwrap();
        assert!(body.contains(&far.replace("us-east-1", REGION)), "{body}");
    });
}

#[test]
fn what_may_pass_is_asked_again_and_what_is_denied_is_asked_once() {
    let moto = Cloud::moto();
    moto.make_key(ALIAS);
    let ch1 = stream("ch1");
    let context = context(&ch1, 1);
    let calls = |way: &Origin| way.targets().len();
    let busy =
        || failure(400, "ThrottlingException", "You have exceeded the rate at which you may call KMS.");
    run(async {
        let way = moto.behind("GenerateDataKey", vec![busy(), failure(500, "KMSInternalException", "")]);
        let kms = guarded(kms_at(&way.url(), REGION, ALIAS));
        kms.generate_data_key(&context).await.unwrap();
        assert_eq!(calls(&way), 3, "two that failed, and no attempts of the SDK between them");

        let way = moto.behind("DescribeKey", vec![busy(); 3]);
        let error = guarded(kms_at(&way.url(), REGION, ALIAS)).describe().await.unwrap_err();
        let text = error.to_string();
        assert!(
            error.is_retryable() && text.contains("quota") && text.contains("7c3b5a1e-request"),
            "{text}"
        );
        assert_eq!(calls(&way), 3);

        let way =
            moto.behind("DescribeKey", vec![Answer { body: b"<html>".to_vec(), ..Answer::status(502) }]);
        guarded(kms_at(&way.url(), REGION, ALIAS)).describe().await.unwrap();
        assert_eq!(calls(&way), 2, "what stands before KMS fails too");

        let user =
            "User: arn:aws:sts::123456789012:assumed-role/video is not authorized to perform: kms:Decrypt";
        let denied = failure(400, "AccessDeniedException", user);
        let way = moto.behind("Decrypt", vec![denied]);
        let kms = guarded(kms_at(&way.url(), REGION, ALIAS));
        let (_, wrapped) = kms.generate_data_key(&context).await.unwrap();
        let error = kms.unwrap(&context, &wrapped).await.unwrap_err();
        let text = error.to_string();
        assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{text}");
        for part in [user, "IAM policy", "7c3b5a1e-request"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(calls(&way), 2, "one to make the key, one to open it");
    });
    let nobody = kms_at(&format!("http://127.0.0.1:{}", free_port()), REGION, ALIAS);
    let error = run(nobody.describe()).unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("refused"), "{error}");
}

/// What is logged, kept.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn no_level_of_logging_shows_a_key_that_is_wrapped() {
    let moto = Cloud::moto();
    moto.make_key(ALIAS);
    let (ch1, kms, log) = (stream("ch1"), moto.kms(ALIAS), Log::default());
    let key = DataEncryptionKey::from_bytes(std::array::from_fn(|i| 17 + i as u8));
    let writer = log.clone();
    let everything = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(everything, || {
        run(async {
            let wrapped = kms.wrap(&context(&ch1, 1), &key).await.unwrap();
            kms.unwrap(&context(&ch1, 1), &wrapped).await.unwrap();
            kms.describe().await.unwrap();
        });
    });
    let logged = log.0.lock();
    assert!(contains(&logged, b"TrentService.DescribeKey"), "the SDK's other requests are logged");
    for (spelling, needle) in spellings(key.expose()) {
        assert!(!contains(&logged, &needle), "the log shows it as {spelling}");
    }
}

#[test]
fn a_shield_without_credentials_waits_and_says_what_to_give() {
    let (moto, origin) = (Cloud::moto(), origin());
    moto.make_key(ALIAS);
    let dir = tempfile::tempdir().unwrap();
    let kms = format!("[kms]\nprovider = \"aws\"\n[kms.aws]\nregion = \"{REGION}\"\n");
    let config = config(dir.path(), &kms, &origin, &["ch1"]);
    let url = moto.url();
    let shield = Running::launch(dir, &config, &environment(&url, &[]));
    wait_for("the reason in the log", || shield.logged().contains("no credentials").then_some(()));
    for part in ["KMS aws, key alias/keyshield", "AWS_ACCESS_KEY_ID", "role of this pod"] {
        assert!(shield.logged().contains(part), "{}", shield.logged());
    }
    let health = try_ask("GET", &format!("{}/api/hls/health", shield.control), &[]).unwrap();
    assert_eq!(health.status, 503, "{health:?}");
}

#[test]
fn a_shield_on_aws_plays_survives_a_restart_and_keeps_no_key_in_clear() {
    let moto = Cloud::moto();
    moto.make_key(ALIAS);
    let dir = tempfile::tempdir().unwrap();
    // As a pod gets its role.
    let (token, file) = ("token-of-the-pod", moto.dir().join("token"));
    std::fs::write(&file, token).unwrap();
    let (url, file, kms) = (moto.url(), file.display().to_string(), moto.kms(ALIAS));
    let pod = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", file.as_str()),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/video-shield"),
        ("AWS_REGION", REGION),
        // The SDK's own, for whoever debugs it.
        ("LOG_SENSITIVE_BODIES", "true"),
    ];
    plays_survives_a_restart_and_keeps_no_key_in_clear(Site {
        dir,
        section: "[kms]\nprovider = \"aws\"\n".into(),
        environment: environment(&url, &pod),
        credentials: vec![token.into()],
        kms: &kms,
    });
}

#[test]
fn the_demo_plays_on_aws_by_the_guides_variables() {
    let moto = Cloud::moto();
    let arn = moto.make_key("alias/hls-encryption-keys");
    let url = moto.url();
    let guide = [
        ("KMS_PROVIDER", "AWS"),
        ("KMS_REGION", REGION),
        ("KMS_KEY_RING", "hls-encryption-keys"),
        ("AWS_ACCESS_KEY_ID", "AKIDOFTHEDEMO"),
        ("AWS_SECRET_ACCESS_KEY", "secret-of-the-demo"),
    ];
    let shield = Running::demo_with(tempfile::tempdir().unwrap(), free_port(), &environment(&url, &guide));
    let segments = fetch_segments(&shield.at("/demo/360p/live.m3u8"));
    for segment in &segments {
        let key = Keys::default().get(&segment.key_url);
        let clear = get(&format!("{}/demo/360p/{}", shield.origin, segment.name));
        assert!(openssl_decrypt(&get(&segment.url).body, &key, &segment.iv) == clear.body, "{segment:?}");
    }
    assert!(!segments.is_empty());
    let logged = shield.logged();
    assert!(logged.contains(&format!("aws:{arn}")), "which key wraps is said");
    assert!(!logged.contains("secret-of-the-demo") && !logged.contains("is set, but not honoured"));
}
