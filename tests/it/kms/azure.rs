//! Azure Key Vault: the provider against a stub that Microsoft's own client has judged, and a shield on it.
//!
//! Deliberately absent: managed identities, whose endpoint has a fixed address that only machines of Azure can reach.

use std::time::Duration;

use keyshield::keys::{DataEncryptionKey, open};
use keyshield::kms::{AzureIdentity, AzureKms, AzureSettings, Guard, Kms, Limits, Secret, WrappedKey};
use serde_json::{Value, json};

use super::stubs::{Stub, bytes};
use super::{Site, conforms, context, plays_survives_a_restart_and_keeps_no_key_in_clear, run, stream};

struct Azure {
    stub: Stub,
}

impl Azure {
    fn start() -> Self {
        let azure = Self { stub: Stub::start("azure") };
        azure.ask(json!({"do": "make", "key": "keyshield"}));
        azure
    }

    fn ask(&self, what: Value) -> Value {
        self.stub.ask(what)
    }

    fn settings(&self, identity: AzureIdentity) -> AzureSettings {
        AzureSettings {
            vault: self.stub.url.parse().unwrap(),
            key: "keyshield".into(),
            resource: "https://vault.test".into(),
            identity,
            authority: Some(self.stub.url.clone()),
            ca_file: Some(self.stub.ca_file()),
        }
    }

    fn kms_by(&self, secret: &str) -> AzureKms {
        let identity = AzureIdentity::ClientSecret {
            tenant_id: "tenant".into(),
            client_id: "client".into(),
            secret: Secret::new(secret.into()),
        };
        AzureKms::new(self.settings(identity), Duration::from_secs(5)).unwrap()
    }

    fn kms(&self) -> AzureKms {
        self.kms_by("sesame")
    }

    fn by_microsoft(&self, call: Value) -> Value {
        self.stub.by_vendor("azure", call)
    }
}

/// The wrapped key and the sealed DEK of what is stored.
fn parts(stored: &[u8]) -> (&[u8], &[u8]) {
    assert_eq!(stored[0], 1, "the format");
    stored[3..].split_at(usize::from(u16::from_be_bytes([stored[1], stored[2]])))
}

#[test]
fn key_vault_conforms() {
    let azure = Azure::start();
    run(conforms(&azure.kms()));
}

#[test]
fn a_pod_conforms_by_its_token_file() {
    let azure = Azure::start();
    let token_file = azure.stub.dir().join("token");
    std::fs::write(&token_file, "assertion-of-the-pod").unwrap();
    let (tenant_id, client_id) = ("tenant".into(), "client".into());
    let identity = AzureIdentity::Workload { tenant_id, client_id, token_file };
    run(conforms(&AzureKms::new(azure.settings(identity), Duration::from_secs(5)).unwrap()));
}

#[test]
fn microsofts_own_client_takes_the_stub_for_key_vault() {
    let azure = Azure::start();
    let key = azure.by_microsoft(json!({"call": "get", "key": "keyshield"}));
    assert_eq!((&key["type"], &key["operations"]), (&json!("RSA"), &json!(["wrapKey", "unwrapKey"])));
    for way in ["wrap", "wrap locally"] {
        let wrapped = azure.by_microsoft(json!({"call": way, "key": "keyshield", "bytes": "00112233"}));
        assert_eq!(wrapped["key"], key["key"], "{way}");
        let unwrap = json!({"call": "unwrap", "key": "keyshield", "bytes": wrapped["bytes"]});
        assert_eq!(bytes(&azure.by_microsoft(unwrap)), [0x00, 0x11, 0x22, 0x33], "{way}");
    }
    let missing = azure.by_microsoft(json!({"call": "get", "key": "nokey"}));
    assert_eq!(missing, json!({"error": "ResourceNotFoundError", "code": "KeyNotFound"}));
}

#[test]
fn what_the_shield_wraps_microsofts_own_client_opens_and_the_other_way_round() {
    let azure = Azure::start();
    let (ch1, kms) = (stream("ch1"), azure.kms());
    let here = context(&ch1, 1);
    let (key, stored) = run(kms.generate_data_key(&here)).unwrap();
    let (wrapped, sealed) = parts(&stored.bytes);
    let id = stored.kek_id.strip_prefix("azure:").unwrap();
    let unwrap = json!({"call": "unwrap", "key": "keyshield", "id": id, "bytes": hex::encode(wrapped)});
    let under: [u8; 32] = bytes(&azure.by_microsoft(unwrap)).try_into().unwrap();
    assert_eq!(&open(&under, &here, sealed).unwrap()[..], key.expose());

    let wrap = json!({"call": "wrap locally", "key": "keyshield", "bytes": hex::encode(under)});
    let wrapped = bytes(&azure.by_microsoft(wrap));
    let len = u16::try_from(wrapped.len()).unwrap().to_be_bytes();
    let again = [&[1][..], &len, &wrapped, sealed].concat();
    let stored = WrappedKey { bytes: again, ..stored };
    assert_eq!(run(kms.unwrap(&here, &stored)).unwrap().expose(), key.expose());
}

#[test]
fn parts_of_two_streams_keys_do_not_open_together() {
    let azure = Azure::start();
    let (ch1, ch2, kms) = (stream("ch1"), stream("ch2"), azure.kms());
    run(async {
        let (_, mut one) = kms.generate_data_key(&context(&ch1, 1)).await.unwrap();
        let (_, two) = kms.generate_data_key(&context(&ch2, 1)).await.unwrap();
        // One stream's wrapped key before the other's sealed one.
        let (wrapped, sealed) = (parts(&one.bytes).0, parts(&two.bytes).1);
        one.bytes = [&one.bytes[..3], wrapped, sealed].concat();
        for context in [context(&ch1, 1), context(&ch2, 1)] {
            assert!(kms.unwrap(&context, &one).await.unwrap_err().is_about_what_was_wrapped());
        }
        // What OAEP does not open.
        let mut changed = two.clone();
        changed.bytes[40] ^= 1;
        let error = kms.unwrap(&context(&ch2, 1), &changed).await.unwrap_err();
        assert!(error.is_about_what_was_wrapped() && error.to_string().contains("BadParameter"), "{error}");
    });
}

#[test]
fn a_key_that_is_rotated_wraps_by_its_newest_version_and_opens_by_the_one_that_wrapped() {
    let azure = Azure::start();
    let (ch1, kms) = (stream("ch1"), azure.kms());
    run(async {
        let here = context(&ch1, 1);
        let (key, old) = kms.generate_data_key(&here).await.unwrap();
        azure.ask(json!({"do": "rotate", "key": "keyshield"}));
        let new = kms.wrap(&here, &key).await.unwrap();
        assert_ne!(new.kek_id, old.kek_id);
        assert_eq!(kms.describe().await.unwrap().kek_id, new.kek_id);
        for wrapped in [&old, &new] {
            assert_eq!(kms.unwrap(&here, wrapped).await.unwrap().expose(), key.expose());
        }
        let of = |name: &str| WrappedKey { kek_id: name.into(), ..old.clone() };
        let error = kms.unwrap(&here, &of("azure:https://evil.example/keys/keyshield/0f3c")).await;
        assert!(
            error.unwrap_err().to_string().contains("is not held here"),
            "no token goes to another vault"
        );
    });
}

#[test]
fn a_key_that_may_not_wrap_is_said_to_be_so_before_it_is_needed() {
    let azure = Azure::start();
    let kms = azure.kms();
    let refused = |told: &str| {
        let error = run(kms.describe()).unwrap_err();
        assert!(!error.is_retryable() && error.to_string().contains(told), "{told}: {error}");
    };
    azure.ask(json!({"do": "attributes", "key": "keyshield", "attributes": {"enabled": false}}));
    refused("--enabled true");
    azure.ask(json!({"do": "attributes", "key": "keyshield", "attributes": {"enabled": true, "exp": 1_000}}));
    refused("has expired");
    let next_year = 20_000_000_000_u64;
    let attributes = json!({"exp": next_year, "nbf": next_year});
    azure.ask(json!({"do": "attributes", "key": "keyshield", "attributes": attributes}));
    refused("may not be used yet");
    azure.ask(json!({"do": "attributes", "key": "keyshield", "attributes": {"nbf": 1_000}}));
    assert!(run(kms.describe()).is_ok());
    azure.ask(json!({"do": "rotate", "key": "keyshield", "ops": ["wrapKey"]}));
    refused("does not permit unwrapKey");
    azure.ask(json!({"do": "rotate", "key": "keyshield", "kty": "EC"}));
    refused("of type EC");
}

#[test]
fn what_key_vault_refuses_is_told_apart_and_shows_no_secret() {
    let azure = Azure::start();
    let (ch1, kms) = (stream("ch1"), azure.kms());
    run(async {
        let here = context(&ch1, 1);
        let key = DataEncryptionKey::from_bytes([1; 32]);
        let wrapped = kms.wrap(&here, &key).await.unwrap();
        let disabled = json!({"do": "attributes", "key": "keyshield", "attributes": {"enabled": false}});
        azure.ask(disabled);
        let error = kms.unwrap(&here, &wrapped).await.unwrap_err();
        assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{error}");
        assert!(error.to_string().contains("KeyDisabled"), "{error}");

        azure.ask(json!({"do": "deny", "denied": true}));
        for error in [
            kms.describe().await.map(drop).unwrap_err(),
            kms.wrap(&here, &key).await.map(drop).unwrap_err(),
            kms.unwrap(&here, &wrapped).await.map(drop).unwrap_err(),
        ] {
            assert!(!error.is_retryable() && !error.is_about_what_was_wrapped(), "{error}");
            let text = error.to_string();
            assert!(text.contains("ForbiddenByRbac") && text.contains("docs/kms.md"), "{text}");
        }
        azure.ask(json!({"do": "deny", "denied": false}));

        let stranger = azure.kms_by("not-sesame");
        let error = stranger.describe().await.unwrap_err();
        let text = format!("{error} {error:?} {stranger:?}");
        assert!(!error.is_retryable() && text.contains("AADSTS7000215"), "{text}");
        assert!(!text.contains("not-sesame"), "{text}");
        azure.ask(json!({"do": "secrets", "secrets": ["not-sesame"]}));
        assert!(stranger.describe().await.is_err(), "the key is disabled still");
        azure.ask(json!({"do": "attributes", "key": "keyshield", "attributes": {"enabled": true}}));
        assert!(stranger.describe().await.is_ok(), "a secret that is known now is taken without a new start");
        azure.ask(json!({"do": "forget tokens"}));
        assert!(stranger.describe().await.is_ok(), "a token that is not taken is come by anew");

        let identity = AzureIdentity::Managed { client_id: None };
        let settings = AzureSettings { ca_file: Some("/dev/null".into()), ..azure.settings(identity) };
        let error = AzureKms::new(settings, Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains("kms.azure.ca_file") && error.contains("no certificate"), "{error}");
    });
}

#[test]
fn a_vault_that_limits_the_rate_is_waited_for_by_the_guard() {
    let azure = Azure::start();
    let ch1 = stream("ch1");
    let limits = Limits { timeout: Duration::from_secs(5), max_concurrent: 2 };
    let guarded = Guard::new(azure.kms(), "azure", "keyshield".into(), limits);
    run(async {
        let throttled = json!({"code": "Throttled", "message": "Request was not processed"});
        azure.stub.fail(2, 429, throttled.clone());
        assert!(guarded.generate_data_key(&context(&ch1, 1)).await.is_ok());
        azure.stub.fail(1, 503, json!({"code": "ServiceUnavailable", "message": "try again"}));
        assert!(guarded.describe().await.is_ok());
        azure.stub.fail(1, 429, throttled);
        let error = azure.kms().describe().await.unwrap_err();
        assert!(error.is_retryable() && error.to_string().contains("limits the rate"), "{error}");
    });
}

#[test]
fn a_shield_on_key_vault_plays_survives_a_restart_and_keeps_no_key_in_clear() {
    let azure = Azure::start();
    let section = format!(
        "provider = \"azure\"\n[kms.azure]\nvault = \"{}\"\nresource = \"https://vault.test\"\nca_file = \"{}\"\n",
        azure.stub.url,
        azure.stub.ca_file().display()
    );
    let environment = [
        ("AZURE_TENANT_ID", "tenant"),
        ("AZURE_CLIENT_ID", "client"),
        ("AZURE_CLIENT_SECRET", "sesame"),
        ("AZURE_AUTHORITY_HOST", azure.stub.url.as_str()),
    ];
    plays_survives_a_restart_and_keeps_no_key_in_clear(Site {
        dir: tempfile::tempdir().unwrap(),
        section: format!("[kms]\n{section}"),
        environment: environment.to_vec(),
        credentials: vec![b"sesame".to_vec()],
        kms: &azure.kms(),
    });
}
