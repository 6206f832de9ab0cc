//! The connector of Cloudflare over a stub of its API, and the stub before Cloudflare's own client.

use std::process::Command;
use std::time::Duration;

use keyshield::cdn::{
    Cdn, CdnError, CdnFault, Cloudflare, CloudflareSettings, DeliveryMode, Edge, EdgeSettings, Purge,
};
use keyshield::keys::{KeyId, SealedKey};
use keyshield::rest::{Credential, Secret};
use serde_json::{Value, json};

use super::cloudflare_stub::{ACCOUNT, ALL, NAMESPACE, Stub, ZONE};
use super::run;
use crate::harness::repository;
use crate::machine::SOON;

fn credential(token: &str) -> Credential {
    Credential::Text(Secret::new(token.into()))
}

/// The connector to a stub, and to an edge, with settings changed.
pub fn connector(
    stub: &Stub,
    mode: DeliveryMode,
    edge_url: &str,
    change: impl FnOnce(&mut CloudflareSettings),
) -> Result<Cloudflare, CdnError> {
    let mut settings = CloudflareSettings {
        api_url: format!("{}/client/v4", stub.url),
        account_id: ACCOUNT.into(),
        namespace_id: NAMESPACE.into(),
        zone_id: ZONE.into(),
        token: credential("good"),
        purges_per_minute: 5,
        timeout: SOON,
    };
    change(&mut settings);
    let edge = Edge::new(EdgeSettings {
        url: edge_url.parse().unwrap(),
        key_path: "/api/hls/keys/".into(),
        is_store: mode == DeliveryMode::Push,
        ca_file: None,
        timeout: SOON,
    })?;
    Cloudflare::new(settings, mode, edge)
}

fn push(stub: &Stub, change: impl FnOnce(&mut CloudflareSettings)) -> Cloudflare {
    connector(stub, DeliveryMode::Push, "https://cdn.example", change).unwrap()
}

fn id(n: u16) -> KeyId {
    let mut bytes = [0; KeyId::LEN];
    bytes[..2].copy_from_slice(&n.to_be_bytes());
    KeyId::from_bytes(bytes)
}

fn keys(count: u16) -> Vec<SealedKey> {
    (0..count).map(|n| SealedKey { key: id(n), text: format!("1:ctr:ch1:sealed {n}") }).collect()
}

fn texts(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n}")).collect()
}

#[test]
fn keys_are_stored_and_deleted_by_as_few_calls_as_can_be() {
    let stub = Stub::in_memory();
    let cloudflare = push(&stub, |_| ());
    let namespace = format!("/client/v4/accounts/{ACCOUNT}/storage/kv/namespaces/{NAMESPACE}");
    run(async {
        cloudflare.put_keys(&keys(1)).await.unwrap();
        assert_eq!(stub.calls(), [format!("PUT {namespace}/values/key%3A{}", id(0))]);
        cloudflare.put_keys(&keys(2_500)[1..]).await.unwrap();
        assert_eq!(stub.calls(), vec![format!("PUT {namespace}/bulk"); 3]);
        for n in [0, 1, 2_499] {
            assert_eq!(stub.account().pair(&format!("key:{}", id(n))), Some(format!("1:ctr:ch1:sealed {n}")));
        }
        // Half of these were never there.
        let gone: Vec<_> = (2_000..3_000).map(id).collect();
        cloudflare.delete_keys(&gone).await.unwrap();
        assert_eq!(stub.calls(), [format!("POST {namespace}/bulk/delete")]);
        assert_eq!(stub.account().pair(&format!("key:{}", id(2_000))), None);
        assert!(stub.account().pair(&format!("key:{}", id(1_999))).is_some());
        cloudflare.put_keys(&[]).await.unwrap();
        cloudflare.delete_keys(&[]).await.unwrap();
        assert_eq!(stub.calls(), Vec::<String>::new());
    });
}

#[test]
fn in_pull_mode_nothing_is_stored() {
    let stub = Stub::in_memory();
    let cloudflare = connector(&stub, DeliveryMode::Pull, "https://cdn.example", |settings| {
        settings.namespace_id = String::new();
    });
    let cloudflare = cloudflare.unwrap();
    run(async {
        cloudflare.put_keys(&keys(2)).await.unwrap();
        cloudflare.delete_keys(&[id(1)]).await.unwrap();
    });
    assert_eq!(stub.calls(), Vec::<String>::new());
}

#[test]
fn pairs_that_a_bulk_call_left_out_are_to_be_sent_again() {
    let stub = Stub::in_memory();
    let cloudflare = push(&stub, |_| ());
    run(async {
        stub.account().leave_out = 3;
        let error = cloudflare.put_keys(&keys(10)).await.unwrap_err();
        assert!(error.is_passing() && error.to_string().contains("left out 3 of 10"), "{error}");
        stub.account().leave_out = 1_000;
        let all: Vec<_> = (0..1_000).map(id).collect();
        let error = cloudflare.delete_keys(&all).await.unwrap_err();
        assert!(error.is_passing() && error.to_string().contains("left out 1000 of 1000"), "{error}");
        cloudflare.delete_keys(&all).await.unwrap();
    });
}

#[test]
fn caches_are_purged_by_tag_and_where_there_is_none_by_url_and_prefix() {
    let stub = Stub::in_memory();
    let cloudflare = connector(&stub, DeliveryMode::Pull, "https://cdn.example/tv", |_| ()).unwrap();
    let purges = || std::mem::take(&mut stub.account().purges);
    let counts = |kind: &str| -> Vec<usize> {
        purges().iter().map(|purge| purge[kind].as_array().unwrap().len()).collect()
    };
    run(async {
        let paths = texts("/live/", 150);
        let tags = Purge { tags: texts("keyshield-key-", 250), paths: paths.clone(), ..Purge::default() };
        cloudflare.purge(&tags).await.unwrap();
        assert_eq!(counts("tags"), [100, 100, 50]);
        cloudflare.purge(&Purge { paths, ..Purge::default() }).await.unwrap();
        assert_eq!(counts("files"), [100, 50]);
        cloudflare.purge(&Purge { prefixes: texts("/live/", 31), ..Purge::default() }).await.unwrap();
        assert_eq!(counts("prefixes"), [30, 1]);
        let both = Purge { paths: texts("/a", 1), prefixes: texts("/b/", 1), ..Purge::default() };
        cloudflare.purge(&both).await.unwrap();
        let expected =
            [json!({"files": ["https://cdn.example/tv/a0"]}), json!({"prefixes": ["cdn.example/tv/b/0"]})];
        assert_eq!(purges(), expected);
    });
}

#[test]
fn health_says_which_permission_or_setting_is_wrong() {
    let stub = Stub::in_memory();
    let sick = |change: &dyn Fn(&mut CloudflareSettings), fault, words: &str| {
        let error = run(push(&stub, change).health()).unwrap_err();
        assert_eq!(error.fault, fault, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    run(push(&stub, |_| ()).health()).unwrap();
    stub.calls();
    use CdnFault::{NotFound, Refused};
    sick(&|of| of.token = credential("unknown"), Refused, "not revoked");
    sick(&|of| of.namespace_id = ACCOUNT.into(), NotFound, "namespace_id");
    sick(&|of| of.zone_id = ACCOUNT.into(), NotFound, "zone_id");
    sick(&|of| of.api_url = stub.url.clone(), NotFound, "account_id");
    let tokens = [("no zone", &ALL[..2]), ("no store", &ALL[1..])];
    stub.account().tokens.extend(tokens.map(|(name, may)| (name.to_owned(), may)));
    sick(&|of| of.token = credential("no zone"), Refused, "Zone, Read");
    sick(&|of| of.token = credential("no store"), Refused, "Workers KV Storage, Edit");
    assert!(stub.account().purges.is_empty());

    // What is not needed in pull mode is not asked for.
    let pull =
        connector(&stub, DeliveryMode::Pull, "https://cdn.example", |of| of.token = credential("no store"));
    run(pull.unwrap().health()).unwrap();
    stub.account().token_status = "expired";
    sick(&|_| (), Refused, "expired");
}

#[test]
fn a_token_of_the_account_is_one_too() {
    let stub = Stub::in_memory();
    stub.account().account_token = Some("of the account".into());
    run(push(&stub, |of| of.token = credential("of the account")).health()).unwrap();
}

#[test]
fn a_token_in_a_file_is_read_anew_for_every_call_and_never_shown() {
    let stub = Stub::in_memory();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let cloudflare = push(&stub, |of| of.token = Credential::File(file.clone()));
    let outcome = || run(cloudflare.delete_keys(&[id(1)]));
    let error = outcome().unwrap_err();
    assert!(error.fault == CdnFault::Refused && error.to_string().contains("cannot read"), "{error}");
    std::fs::write(&file, "wrong-token\n").unwrap();
    let error = outcome().unwrap_err();
    assert!(error.fault == CdnFault::Refused && !error.to_string().contains("wrong-token"), "{error}");
    std::fs::write(&file, "good\n").unwrap();
    outcome().unwrap();
}

#[test]
fn whoever_calls_too_often_is_told_for_how_long_to_wait() {
    let stub = Stub::in_memory();
    let cloudflare = push(&stub, |_| ());
    let purge = Purge { tags: texts("keyshield-stream-", 1), ..Purge::default() };
    let waits = |error: CdnError, most: u64| {
        assert_eq!(error.fault, CdnFault::RateLimited, "{error}");
        let wait = error.retry_after.expect("a time to wait for");
        assert!(wait <= Duration::from_secs(most) && wait > Duration::from_secs(most / 2), "{wait:?}");
    };
    for says_retry_after in [true, false] {
        stub.account().says_retry_after = says_retry_after;
        stub.account().allow_purges(1);
        stub.account().allow_calls(3);
        run(async {
            cloudflare.purge(&purge).await.unwrap();
            waits(cloudflare.purge(&purge).await.unwrap_err(), 60);
            cloudflare.delete_keys(&[id(1)]).await.unwrap();
            waits(cloudflare.delete_keys(&[id(1)]).await.unwrap_err(), 300);
        });
    }
    stub.account().allow_calls(10);
    let twice = [keys(1), keys(1)].concat();
    let error = run(cloudflare.put_keys(&twice)).unwrap_err();
    assert_eq!(error.fault, CdnFault::RateLimited, "the same key twice in a second: {error}");
}

#[test]
fn an_api_that_is_away_or_something_else_is_told_apart() {
    let stub = Stub::in_memory();
    stub.account().broken = true;
    let error = run(push(&stub, |_| ()).put_keys(&keys(2))).unwrap_err();
    assert!(error.fault == CdnFault::Away && error.to_string().contains("502"), "{error}");
    let nobody = format!("http://127.0.0.1:{}", crate::machine::free_port());
    let error = run(push(&stub, |of| of.api_url = nobody).put_keys(&keys(2))).unwrap_err();
    assert_eq!(error.fault, CdnFault::Away, "{error}");
    let other = crate::origin::Origin::start(|_| crate::origin::Answer::ok("hello"));
    let error = run(push(&stub, |of| of.api_url = other.url()).put_keys(&keys(2))).unwrap_err();
    assert!(error.fault == CdnFault::Invalid && error.to_string().contains("api_url"), "{error}");
}

/// What Cloudflare's own client makes of calls to the stub.
fn by_vendor(stub: &Stub, token: &str, calls: Value) -> Vec<Value> {
    let ask = json!({"endpoint": format!("{}/client/v4", stub.url), "token": token, "calls": calls});
    let python = repository("tests/tools/.venv/bin/python");
    let script = repository("tests/tools/cloudflare_client.py");
    let output = Command::new(python).arg(script).arg(ask.to_string()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{ask}: {told}"))
}

#[test]
fn the_stub_is_one_in_the_eyes_of_cloudflares_own_client() {
    let stub = Stub::in_memory();
    run(push(&stub, |_| ()).put_keys(&keys(1))).unwrap();
    let kv = |call: &str, more: Value| {
        let mut call = json!({"call": call, "account_id": ACCOUNT, "namespace_id": NAMESPACE});
        call.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        call
    };
    let pairs = [json!({"key": "key:a", "value": "1"}), json!({"key": "key:b", "value": "2"})];
    let calls = json!([
        {"call": "verify"},
        {"call": "zone", "zone_id": ZONE},
        kv("namespace", json!({})),
        kv("put all", json!({"body": pairs})),
        kv("read", json!({"key_name": format!("key:{}", id(0))})),
        kv("delete all", json!({"body": ["key:a", "key:z"]})),
        {"call": "purge", "zone_id": ZONE, "tags": ["one", "two"]},
        {"call": "purge", "zone_id": ZONE, "files": ["https://cdn.example/a"]},
        {"call": "purge", "zone_id": ZONE, "prefixes": ["cdn.example/live"]},
        {"call": "namespace", "account_id": ACCOUNT, "namespace_id": ZONE},
        {"call": "purge", "zone_id": ZONE, "tags": texts("t", 101)},
        {"call": "verify of the account", "account_id": ACCOUNT},
    ]);
    let answers = by_vendor(&stub, "good", calls);
    assert_eq!(answers[0]["status"], "active");
    assert_eq!(answers[1]["id"], ZONE);
    assert_eq!(answers[2]["id"], NAMESPACE);
    assert_eq!(answers[3]["successful_key_count"], 2.0);
    assert_eq!(answers[5]["successful_key_count"], 2.0);
    let pair = |name| stub.account().pair(name);
    assert_eq!((pair("key:a"), pair("key:b").as_deref()), (None, Some("2")));
    assert_eq!(answers[4], keys(1)[0].text, "what the connector stored, the client reads");
    let purged = [
        json!({"tags": ["one", "two"]}),
        json!({"files": ["https://cdn.example/a"]}),
        json!({"prefixes": ["cdn.example/live"]}),
    ];
    assert_eq!(stub.account().purges, purged);
    assert_eq!(answers[9], json!({"error": "NotFoundError", "status": 404, "codes": [10013]}));
    assert_eq!(answers[10]["error"], "BadRequestError");
    assert_eq!(answers[11], json!({"error": "AuthenticationError", "status": 401, "codes": [1000]}));
    stub.account().allow_purges(0);
    let answers = by_vendor(&stub, "good", json!([{"call": "purge", "zone_id": ZONE, "tags": ["one"]}]));
    assert_eq!(answers[0], json!({"error": "RateLimitError", "status": 429, "codes": [1134]}));
    let answers = by_vendor(&stub, "another", json!([{"call": "zone", "zone_id": ZONE}]));
    assert_eq!(answers[0], json!({"error": "PermissionDeniedError", "status": 403, "codes": [10000]}));
}
