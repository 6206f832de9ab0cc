//! The connector of Fastly: what it stores, purges and deploys by the API, and what players then get at the edge.

use std::time::Duration;

use keyshield::cdn::{
    Cdn, CdnError, CdnFault, DeliveryMode, Edge, EdgeSettings, Fastly, FastlyEdgeCode, FastlySettings,
    KeySeen, Purge,
};
use keyshield::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentKey, ContentSecrets, EDGE_NONCE_LEN, EdgeSecret, KeyId, KeyMethod,
    SealedKey, StreamId, seal_for_edge,
};
use keyshield::rest::{Credential, Secret};
use serde_json::json;

use super::fastly_edge::Pop;
use super::fastly_stub::{SERVICE, Snippet, Stub, TOKEN};

pub const KEY_PATH: &str = "/api/hls/keys/";

pub fn secret() -> EdgeSecret {
    "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff".parse().unwrap()
}

pub fn code() -> FastlyEdgeCode {
    FastlyEdgeCode {
        key_path: KEY_PATH.into(),
        key_max_age: Duration::from_secs(300),
        cors_origins: vec!["*".into()],
        secret: secret(),
        needs_token: false,
    }
}

pub fn key_id(n: u8) -> KeyId {
    KeyId::from_bytes([n; 16])
}

pub fn content(method: KeyMethod) -> ContentKey {
    // With a zero byte, which no string of VCL can hold.
    let random: [u8; CONTENT_SECRET_LEN] = std::array::from_fn(|i| i as u8);
    ContentSecrets::from_random(method, &random).content
}

pub fn sealed(n: u8, stream: &str, method: KeyMethod) -> SealedKey {
    let stream: StreamId = stream.parse().unwrap();
    let cipher = keyshield::keys::EdgeCipher::Ctr;
    seal_for_edge(&secret(), cipher, (&stream, key_id(n)), &content(method), &[n; EDGE_NONCE_LEN])
}

pub fn settings(stub: &Stub, dictionary_id: &str) -> FastlySettings {
    FastlySettings {
        api_url: stub.server.url.clone(),
        service_id: SERVICE.into(),
        dictionary_id: dictionary_id.into(),
        token: Credential::Text(Secret::new(TOKEN.into())),
        timeout: Duration::from_secs(10),
    }
}

pub fn edge(url: &str) -> Edge {
    Edge::new(EdgeSettings {
        url: url.parse().unwrap(),
        key_path: KEY_PATH.into(),
        is_store: true,
        ca_file: None,
        timeout: Duration::from_secs(10),
    })
    .unwrap()
}

fn at(settings: FastlySettings, mode: DeliveryMode, url: &str) -> Result<Fastly, CdnError> {
    Ok(Fastly::new(settings, mode, edge(url))?.with_pause_between_purges(Duration::ZERO))
}

pub fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

/// The code deployed, and the connector with the dictionary that the deployment names.
pub async fn deployed(stub: &Stub, pop: &Pop, code: &FastlyEdgeCode) -> Fastly {
    let connector = |id: &str| at(settings(stub, id), DeliveryMode::Push, &pop.server.url).unwrap();
    let deployed = connector("").deploy(Some(code)).await.unwrap();
    connector(&deployed.dictionary_id.unwrap())
}

/// A connector to a deployed service whose edge nobody asks.
async fn alone(stub: &Stub) -> Fastly {
    let connector = |id: &str| at(settings(stub, id), DeliveryMode::Push, "https://cdn.example.com").unwrap();
    let id = connector("").deploy(Some(&code())).await.unwrap().dictionary_id.unwrap();
    stub.calls();
    connector(&id)
}

#[test]
fn keys_go_to_the_edge_and_are_verified_there() {
    run(async {
        let stub = Stub::start();
        let pop = Pop::start(&stub, None);
        let fastly = deployed(&stub, &pop, &code()).await;
        let methods = [(1, KeyMethod::Aes128), (2, KeyMethod::Aes256)];
        let keys: Vec<_> = methods.map(|(n, method)| sealed(n, "ch1.hd", method)).into();
        stub.calls();
        fastly.put_keys(&keys).await.unwrap();
        fastly.put_keys(&keys).await.unwrap();
        assert_eq!(stub.calls().len(), 2, "a batch is one call");
        for (n, method) in methods {
            let expected = CheckValue::of(key_id(n), &content(method));
            assert_eq!(fastly.verify(key_id(n)).await, Ok(KeySeen::Has(expected)), "{method:?}");
        }
        assert_eq!(fastly.verify(key_id(3)).await, Ok(KeySeen::Missing));
        assert!(stub.items("keyshield_keys").values().all(|value| value.starts_with("1:ctr:ch1.hd:")));
        fastly.health().await.unwrap();
    });
}

#[test]
fn deleting_a_key_that_is_not_there_is_no_error() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        let keys: Vec<_> = (0..120).map(|n| sealed(n, "ch1", KeyMethod::Aes128)).collect();
        fastly.put_keys(&keys).await.unwrap();
        fastly.delete_keys(&[key_id(110), key_id(200)]).await.unwrap();
        assert_eq!(stub.items("keyshield_keys").len(), 119);
        fastly.delete_keys(&[key_id(110)]).await.unwrap();
        let all: Vec<_> = (0..120).map(key_id).collect();
        fastly.delete_keys(&all).await.unwrap();
        assert!(stub.items("keyshield_keys").is_empty());
        fastly.delete_keys(&[]).await.unwrap();
    });
}

#[test]
fn what_overruns_a_limit_names_it() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        let key = sealed(1, "ch1", KeyMethod::Aes128);
        let many: Vec<_> = (0..1_001_u16)
            .map(|n| {
                let bytes = std::array::from_fn(|i| n.to_be_bytes().get(i).copied().unwrap_or(9));
                SealedKey { key: KeyId::from_bytes(bytes), ..key.clone() }
            })
            .collect();
        let refused = fastly.put_keys(&many).await.unwrap_err();
        assert_eq!((refused.fault, stub.calls().len()), (CdnFault::Invalid, 0), "{refused}");

        fastly.put_keys(&many[..1_000]).await.unwrap();
        let refused = fastly.put_keys(&many[1_000..]).await.unwrap_err();
        assert_eq!(refused.fault, CdnFault::Invalid);
        assert!(refused.what.contains("1,000 items") && refused.what.contains("Exceeding max"), "{refused}");

        let long = SealedKey { text: "1".repeat(8_001), ..key };
        assert!(fastly.put_keys(&[long]).await.unwrap_err().what.contains("8000 characters"));
    });
}

#[test]
fn a_rate_limit_says_when_it_ends_and_purges_are_not_among_it() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        stub.account.lock().writes_left = 1;
        let key = [sealed(1, "ch1", KeyMethod::Aes128)];
        fastly.put_keys(&key).await.unwrap();
        let refused = fastly.put_keys(&key).await.unwrap_err();
        assert_eq!(refused.fault, CdnFault::RateLimited);
        assert_eq!(refused.retry_after, Some(Duration::from_secs(120)), "by the answer's own date");
        assert!(refused.is_passing());

        let tags = vec!["keyshield-key-1".to_owned()];
        fastly.purge(&Purge { tags, ..Purge::default() }).await.unwrap();
        fastly.health().await.unwrap();
    });
}

#[test]
fn purges_are_by_tag_or_by_url_and_never_soft() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        let tags: Vec<_> = (0..256).map(|n| format!("keyshield-key-{n}")).collect();
        let paths = vec!["/live/ch1/720p.m3u8?r=3".to_owned()];
        let purge = Purge { tags: tags.clone(), paths: paths.clone(), prefixes: Vec::new() };
        fastly.purge(&purge).await.unwrap();
        let twice = [format!("POST /service/{SERVICE}/purge"), format!("POST /service/{SERVICE}/purge")];
        assert_eq!(stub.calls(), twice, "paths are for who knows no tags");
        assert_eq!(stub.account.lock().purged_tags, [tags.clone(), tags].concat());

        fastly.purge(&Purge { paths, ..Purge::default() }).await.unwrap();
        assert_eq!(stub.account.lock().purged_urls, ["cdn.example.com/live/ch1/720p.m3u8?r=3"; 2]);

        let too_many = Purge { tags: vec!["a".to_owned(); 257], ..Purge::default() };
        assert_eq!(fastly.purge(&too_many).await.unwrap_err().fault, CdnFault::Invalid);
        let prefixes = Purge { prefixes: vec!["/live/".to_owned()], ..Purge::default() };
        assert_eq!(fastly.purge(&prefixes).await.unwrap_err().fault, CdnFault::Invalid);
        fastly.purge(&Purge::default()).await.unwrap();
    });
}

#[test]
fn the_same_code_is_deployed_once_and_changed_code_again() {
    run(async {
        let stub = Stub::start();
        let fastly = at(settings(&stub, ""), DeliveryMode::Push, "https://cdn.example.com").unwrap();
        let first = fastly.deploy(Some(&code())).await.unwrap();
        assert!(first.is_new && first.version == 2 && stub.active().number == 2);
        assert_eq!(stub.active().snippets.len(), 5);
        assert_eq!(stub.items("keyshield_secrets").len(), 2, "no key for tokens that nobody needs");
        assert!(stub.active().dictionaries.iter().any(|it| it.name == "keyshield_secrets" && it.is_private));

        let again = fastly.deploy(Some(&code())).await.unwrap();
        assert_eq!((again.is_new, again.version, &again.dictionary_id), (false, 2, &first.dictionary_id));

        let tokens = FastlyEdgeCode { needs_token: true, ..code() };
        let changed = fastly.deploy(Some(&tokens)).await.unwrap();
        assert!(changed.is_new && stub.active().number == 3);
        assert_eq!(changed.dictionary_id, first.dictionary_id, "the keys stay where they are");
        assert_eq!(stub.items("keyshield_secrets").len(), 3);
        stub.calls();
        fastly.deploy(Some(&code())).await.unwrap();
        assert_eq!(stub.items("keyshield_secrets").len(), 2, "what is not needed any more is taken away");
        let calls = stub.calls();
        let at = |end: &str| calls.iter().position(|call| call.ends_with(end)).unwrap();
        assert!(at("/activate") < at("/item/token_key"), "and not before the code that needs it is gone");
        assert!(at("/validate") < at("/items") && at("/items") < at("/activate"), "{calls:?}");
    });
}

#[test]
fn in_pull_mode_only_the_rule_for_caches_is_deployed() {
    run(async {
        let stub = Stub::start();
        let fastly = at(settings(&stub, ""), DeliveryMode::Pull, "https://cdn.example.com").unwrap();
        let deployed = fastly.deploy(None).await.unwrap();
        assert_eq!((deployed.is_new, deployed.dictionary_id), (true, None));
        let names: Vec<_> = stub.active().snippets.into_iter().map(|snippet| snippet.name).collect();
        assert_eq!((names, stub.active().dictionaries.len()), (vec!["keyshield_fetch".to_owned()], 0));
        assert!(!fastly.deploy(None).await.unwrap().is_new);
        // To push mode and back.
        fastly.deploy(Some(&code())).await.unwrap();
        assert_eq!(stub.active().snippets.len(), 5);
        fastly.deploy(None).await.unwrap();
        assert_eq!(stub.active().snippets.len(), 1);
    });
}

#[test]
fn code_that_fastly_finds_wrong_is_not_activated() {
    run(async {
        let stub = Stub::start();
        let someone = Snippet {
            name: "someones".into(),
            place: "recv".into(),
            priority: "100".into(),
            dynamic: "0".into(),
            content: "call nobody;".into(),
        };
        stub.account.lock().versions[0].snippets.push(someone);
        let fastly = at(settings(&stub, ""), DeliveryMode::Push, "https://cdn.example.com").unwrap();
        let refused = fastly.deploy(Some(&code())).await.unwrap_err();
        assert_eq!(refused.fault, CdnFault::Invalid);
        assert!(refused.what.contains("no subroutine nobody"), "{refused}");
        assert!(refused.what.contains("version 1 stays active"), "{refused}");
        assert_eq!(stub.active().number, 1);
        assert!(stub.account.lock().items.values().all(|items| items.is_empty()), "no secret was given out");
    });
}

#[test]
fn what_stands_in_the_way_of_a_deployment_is_said_before_anything_is_changed() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        let writes = stub.account.lock().writes_left;
        let elsewhere = at(settings(&stub, "other"), DeliveryMode::Push, "https://cdn.example.com").unwrap();
        let refused = elsewhere.deploy(Some(&code())).await.unwrap_err();
        assert!(refused.what.contains("the configuration names other"), "{refused}");
        let fresh = Stub::start();
        let elsewhere = at(settings(&fresh, "other"), DeliveryMode::Push, "https://cdn.example.com").unwrap();
        assert!(
            elsewhere.deploy(Some(&code())).await.unwrap_err().what.contains("leave dictionary_id empty")
        );

        stub.account
            .lock()
            .versions
            .iter_mut()
            .flat_map(|it| &mut it.dictionaries)
            .for_each(|it| it.is_private = false);
        let refused = fastly.deploy(Some(&code())).await.unwrap_err();
        assert!(refused.what.contains("not private"), "{refused}");

        stub.account.lock().versions.iter_mut().for_each(|version| version.is_active = false);
        assert_eq!(fastly.deploy(Some(&code())).await.unwrap_err().fault, CdnFault::NotFound);
        assert_eq!(stub.account.lock().writes_left, writes);
    });
}

#[test]
fn health_says_what_the_token_lacks() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        let pull = at(settings(&stub, ""), DeliveryMode::Pull, "https://cdn.example.com").unwrap();
        stub.account.lock().scope = "purge_select".into();
        pull.health().await.unwrap();
        let refused = fastly.health().await.unwrap_err();
        assert!(refused.fault == CdnFault::Refused && refused.what.contains("`global`"), "{refused}");
        stub.account.lock().services = vec!["another".into()];
        assert_eq!(pull.health().await.unwrap_err().fault, CdnFault::Refused);

        let bad =
            FastlySettings { token: Credential::Text(Secret::new("wrong".into())), ..settings(&stub, "") };
        let refused =
            at(bad, DeliveryMode::Pull, "https://cdn.example.com").unwrap().health().await.unwrap_err();
        assert_eq!(refused.fault, CdnFault::Refused);
        assert!(refused.what.contains("missing or invalid") && !refused.what.contains("wrong"), "{refused}");

        (stub.account.lock().scope, stub.account.lock().services) = ("global".into(), Vec::new());
        let lost = at(settings(&stub, "gone"), DeliveryMode::Push, "https://cdn.example.com").unwrap();
        assert_eq!(lost.health().await.unwrap_err().fault, CdnFault::NotFound);
        drop(stub.server);
        assert_eq!(fastly.health().await.unwrap_err().fault, CdnFault::Away);
    });
}

#[test]
fn in_pull_mode_nothing_is_stored() {
    run(async {
        let stub = Stub::start();
        let pull = at(settings(&stub, ""), DeliveryMode::Pull, "https://cdn.example.com").unwrap();
        pull.put_keys(&[sealed(1, "ch1", KeyMethod::Aes128)]).await.unwrap();
        pull.delete_keys(&[key_id(1)]).await.unwrap();
        assert!(stub.calls().is_empty());
        assert!(pull.limits().settles_within < Duration::from_secs(30));
        let push = at(settings(&stub, ""), DeliveryMode::Push, "https://cdn.example.com").unwrap();
        assert_eq!(push.limits().settles_within, Duration::from_secs(30));
        assert!(
            push.put_keys(&[sealed(1, "ch1", KeyMethod::Aes128)])
                .await
                .unwrap_err()
                .what
                .contains("dictionary_id")
        );
    });
}

#[test]
fn all_pops_can_be_asked_for_one_key() {
    run(async {
        let stub = Stub::start();
        let fastly = alone(&stub).await;
        let answer = |pop: &str, hash: &str| {
            json!({"pop": pop, "server": format!("cache-{pop}"), "hash": hash,
            "request": {"method": "GET", "headers": {}}, "response_time": 0.013,
            "response": {"status": 200, "headers": {"X-Filler": "x".repeat(900)}}})
        };
        let mut pops: Vec<_> =
            (0..120).map(|n| answer(&format!("P{n}"), "68b329da9893e34099c7d8ad5cb9c940")).collect();
        pops.push(answer("SYD", "error-timeout-SYD"));
        stub.account.lock().pops = json!(pops);
        let tally = fastly.key_at_pops(key_id(1)).await.unwrap();
        assert_eq!((tally.asked, tally.agreeing), (121, 120));
        assert_eq!(tally.others[0].pop, "SYD");
        assert_eq!(stub.calls(), ["GET /content/edge_check"]);
    });
}

#[test]
fn settings_that_no_call_can_be_made_with_are_refused() {
    let stub = Stub::start();
    let good = settings(&stub, "");
    assert!(
        !format!("{:?}", at(good.clone(), DeliveryMode::Pull, "https://cdn.example.com")).contains(TOKEN)
    );
    for bad in [
        FastlySettings { api_url: "http://api.example.com".into(), ..good.clone() },
        FastlySettings { api_url: "api".into(), ..good.clone() },
        FastlySettings { service_id: String::new(), ..good.clone() },
        FastlySettings { service_id: "a/../b".into(), ..good.clone() },
        FastlySettings { dictionary_id: "a?b".into(), ..good },
    ] {
        let refused = at(bad.clone(), DeliveryMode::Pull, "https://cdn.example.com").unwrap_err();
        assert_eq!(refused.fault, CdnFault::Invalid, "{bad:?}");
    }
}
