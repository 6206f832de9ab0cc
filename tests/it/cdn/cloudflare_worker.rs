//! The worker that is shipped, in the workerd that Cloudflare runs: its KV filled by the connector over the stub of the
//! API, its answers asked for as players and the shield ask.

use std::collections::BTreeMap;
use std::time::Duration;

use keyshield::cdn::{Cdn, Cloudflare, DeliveryMode, KeySeen};
use keyshield::clock::Clock;
use keyshield::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentKey, ContentSecrets, EDGE_NONCE_LEN, EdgeCipher, EdgeSecret,
    KeyId, KeyMethod, SealedKey, TokenScope, seal_for_edge, viewer_token,
};
use serde_json::json;

use super::cloudflare::connector;
use super::cloudflare_stub::{Pairs, Stub};
use super::cloudflare_workerd::{KEY_PATH, SECRET, Worker, secret};
use super::run;
use crate::control_api::{call, tokens};
use crate::harness::{Answer, Running, ask, fetch_segments, get, repository};
use crate::origin::{self, Origin};

fn id(n: u8) -> KeyId {
    KeyId::from_bytes([n; KeyId::LEN])
}

/// A key of its own for every number.
fn content(method: KeyMethod, n: u8) -> ContentKey {
    let random: [u8; CONTENT_SECRET_LEN] = std::array::from_fn(|i| (i as u8).wrapping_mul(7) ^ n);
    ContentSecrets::from_random(method, &random).content
}

fn sealed_by(
    secret: &EdgeSecret,
    cipher: EdgeCipher,
    (stream, n): (&str, u8),
    key: &ContentKey,
) -> SealedKey {
    seal_for_edge(secret, cipher, (&stream.parse().unwrap(), id(n)), key, &[n; EDGE_NONCE_LEN])
}

fn sealed(n: u8, key: &ContentKey) -> SealedKey {
    sealed_by(&secret(), EdgeCipher::Ctr, ("ch1.hd", n), key)
}

fn token(scope: TokenScope, expires_in_secs: i64) -> String {
    let now = Clock::System.now().as_unix_millis();
    let expires = keyshield::keys::Timestamp::from_unix_millis(now + expires_in_secs * 1_000);
    format!("?token={}", viewer_token(&secret(), &scope, expires))
}

fn of_stream(stream: &str) -> TokenScope {
    TokenScope::Stream(stream.parse().unwrap())
}

/// A shield that has revoked all its keys.
fn gone() -> Origin {
    Origin::start(|_| origin::Answer::status(410).header("cache-control", "max-age=1"))
}

fn pushing(worker: &Worker) -> (Stub, Cloudflare) {
    let stub = Stub::start(Pairs::Workerd(worker.namespace()));
    let cloudflare = connector(&stub, DeliveryMode::Push, &worker.url, |_| ()).unwrap();
    (stub, cloudflare)
}

#[test]
fn what_the_connector_stores_the_worker_gives_out_and_what_it_deletes_the_shield_answers_for() {
    let origin = gone();
    let worker = Worker::start(&origin.url(), json!({}));
    let (_stub, cloudflare) = pushing(&worker);
    let keys: Vec<_> = (1..).zip(KeyMethod::ALL).map(|(n, method)| (n, content(method, n))).collect();
    let sealed: Vec<_> = keys.iter().map(|(n, key)| sealed(*n, key)).collect();
    run(async {
        cloudflare.put_keys(&sealed).await.unwrap();
        for (n, key) in &keys {
            let seen = cloudflare.verify(id(*n)).await.unwrap();
            assert!(seen == KeySeen::Has(CheckValue::of(id(*n), key)), "{seen:?}");
            let answer = worker.key(id(*n), "");
            assert_eq!((answer.status, &answer.body[..]), (200, key.expose()));
            let check = worker.check(id(*n));
            assert_eq!(check.header("content-type"), Some("text/plain"));
            assert_eq!(check.header("cache-control"), Some("no-store"));
        }
        assert_eq!(origin.targets(), Vec::<String>::new(), "the shield was not asked");

        cloudflare.delete_keys(&[id(1)]).await.unwrap();
        assert_eq!(cloudflare.verify(id(1)).await, Ok(KeySeen::Missing));
        assert!(matches!(cloudflare.verify(id(2)).await, Ok(KeySeen::Has(_))));
    });
    assert_eq!(origin.targets(), Vec::<String>::new(), "a check is never passed on");
    let answer = worker.key(id(1), "?hdnts=x");
    assert_eq!((answer.status, answer.header("cache-control")), (410, Some("max-age=1")));
    assert_eq!(origin.targets(), [format!("{KEY_PATH}{}?hdnts=x", id(1))]);
}

#[test]
fn a_single_key_is_stored_and_verified_under_both_ciphers() {
    let origin = gone();
    let worker = Worker::start(&origin.url(), json!({}));
    let (_stub, cloudflare) = pushing(&worker);
    for (n, cipher) in (1..).zip([EdgeCipher::Ctr, EdgeCipher::Hmac]) {
        let key = content(KeyMethod::Aes128, n);
        let sealed = sealed_by(&secret(), cipher, ("live", n), &key);
        run(async {
            cloudflare.put_keys(&[sealed]).await.unwrap();
            let seen = cloudflare.verify(id(n)).await.unwrap();
            assert!(seen == KeySeen::Has(CheckValue::of(id(n), &key)), "{seen:?}");
        });
        assert_eq!(worker.key(id(n), "").body, key.expose());
    }
}

#[test]
fn a_record_that_does_not_open_is_not_given_out() {
    let origin = gone();
    let worker = Worker::start(&origin.url(), json!({}));
    let key = content(KeyMethod::Aes128, 1);
    let good = sealed(1, &key);
    let another: EdgeSecret = SECRET.replace("00", "01").parse().unwrap();
    let stranger = sealed_by(&another, EdgeCipher::Ctr, ("ch1.hd", 1), &key).text;
    // A changed digit in each part; another key's record; another secret's; what is no record.
    let mut records: Vec<String> = Vec::new();
    for (at, part) in good.text.split(':').enumerate() {
        let mut parts: Vec<_> = good.text.split(':').map(str::to_owned).collect();
        let last = part.chars().last().unwrap();
        parts[at] = format!("{}{}", &part[..part.len() - 1], if last == '0' { '1' } else { '0' });
        records.push(parts.join(":"));
    }
    let moved = sealed(2, &key).text;
    let more = [moved, stranger, String::new(), ":".into(), "1:ctr".into(), good.text.to_uppercase()];
    for record in records.into_iter().chain(more) {
        worker.namespace().put(&[(format!("key:{}", id(1)), record.clone())]);
        let answer = worker.key(id(1), "");
        assert_eq!(answer.status, 410, "{record}: the shield answers");
        let check = worker.check(id(1));
        assert_eq!((check.status, check.header("keyshield-served-by")), (404, Some("edge")), "{record}");
    }
    worker.store(&good);
    assert_eq!(worker.key(id(1), "").body, key.expose());
    let logged = worker.namespace().logged();
    assert!(logged.contains(&format!("key {}: the sealed key was changed", id(1))), "{logged}");
    assert!(!logged.contains(&hex::encode(key.expose())) && !logged.contains(&*secret().mac_key()));
}

#[test]
fn without_its_secrets_the_worker_gives_nothing_out() {
    let origin = gone();
    let worker = Worker::start(&origin.url(), json!({"EDGE_MAC_KEY": ""}));
    worker.store(&sealed(1, &content(KeyMethod::Aes128, 1)));
    assert_eq!(worker.key(id(1), "").status, 410);
    assert_eq!(worker.check(id(1)).status, 404);
    let logged = worker.namespace().logged();
    assert!(logged.contains("the secret EDGE_MAC_KEY is missing"), "{logged}");
}

#[test]
fn a_viewer_needs_a_token_for_this_stream_that_has_not_run_out() {
    let origin = gone();
    let worker = Worker::start(&origin.url(), json!({"EDGE_TOKEN_KEY": *secret().token_key()}));
    let key = content(KeyMethod::Aes256, 1);
    worker.store(&sealed(1, &key));
    for good in [token(of_stream("ch1.hd"), 60), token(TokenScope::AllStreams, 60)] {
        let answer = worker.key(id(1), &good);
        assert_eq!((answer.status, &answer.body[..]), (200, key.expose()), "{good}");
    }
    let good = token(of_stream("ch1.hd"), 60);
    let other = if good.ends_with('0') { '1' } else { '0' };
    let forged = format!("{}{other}", &good[..good.len() - 1]);
    let widened = good.replace("~ch1.hd~", "~*~");
    for bad in [
        String::new(),
        "?token=".into(),
        "?token=~~".into(),
        "?other=1".into(),
        token(of_stream("ch1.hd"), -1),
        token(of_stream("ch2"), 60),
        forged.clone(),
        widened,
        good.to_uppercase().replace("?TOKEN", "?token"),
        format!("{good}~"),
    ] {
        let answer = worker.key(id(1), &bad);
        assert_eq!(answer.status, 403, "{bad}");
        assert!(answer.problem().contains("token"));
        assert_eq!(answer.header("cache-control"), Some("no-store"));
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    }
    assert_eq!(origin.targets(), Vec::<String>::new());

    // What the store does not have: whoever shows no token is not passed on either.
    assert_eq!(worker.key(id(2), "").status, 403);
    assert_eq!(worker.key(id(2), &token(of_stream("ch2"), -1)).status, 403);
    assert_eq!(worker.key(id(2), &token(of_stream("ch2"), 60)).status, 410);
    assert_eq!(origin.targets().len(), 1);
    // The shield asks for check values without one.
    assert_eq!(worker.check(id(1)).text(), CheckValue::of(id(1), &key).to_string());
}

#[test]
fn methods_paths_and_origins_are_treated_as_the_shield_treats_them() {
    let origin = Origin::start(|_| origin::Answer::ok("of the origin"));
    let allowed = json!({"CORS_ORIGINS": "https://a, https://b", "KEY_MAX_AGE": "20", "KEY_PATH": "/k/"});
    let worker = Worker::start(&origin.url(), allowed);
    let key = content(KeyMethod::Aes128, 1);
    worker.store(&sealed(1, &key));
    let url = format!("{}{KEY_PATH}{}", worker.url, id(1));

    let head = ask("HEAD", &url, &[("origin", "https://b")]);
    assert_eq!((head.status, head.header("content-length")), (200, Some("16")));
    assert_eq!(head.header("cache-control"), Some("private, max-age=20"));
    assert_eq!(head.header("access-control-allow-origin"), Some("https://b"));
    assert_eq!(head.header("vary"), Some("origin"));
    let stranger = ask("GET", &url, &[("origin", "https://c")]);
    assert_eq!((stranger.status, stranger.header("vary")), (200, Some("origin")));
    assert_eq!(stranger.header("access-control-allow-origin"), None);
    assert_eq!(stranger.header("access-control-expose-headers"), None);

    let elsewhere = get(&format!("{}/k/{}", worker.url, id(1)));
    assert_eq!((elsewhere.status, &elsewhere.body[..]), (200, key.expose()));

    let preflight = ask("OPTIONS", &url, &[("origin", "https://a")]);
    assert_eq!((preflight.status, preflight.header("access-control-allow-origin")), (204, Some("https://a")));
    for method in ["POST", "PUT", "DELETE"] {
        let answer = ask(method, &url, &[]);
        assert_eq!((answer.status, answer.header("allow")), (405, Some("GET, HEAD, OPTIONS")), "{method}");
        assert!(answer.problem().contains("only GET"));
    }
    assert_eq!(origin.targets(), Vec::<String>::new());

    for path in
        ["/live/720p.m3u8?_HLS_msn=3", "/api/hls/keys/", "/api/hls/keys/abc", "/api/hls/keys/abc/check"]
    {
        assert_eq!(get(&format!("{}{path}", worker.url)).text(), "of the origin", "{path}");
        assert_eq!(origin.targets().last().unwrap(), path);
    }
    for more in ["/", "/more", "/check/", "/check/more"] {
        assert_eq!(get(&format!("{url}{more}")).text(), "of the origin", "{more}");
    }
}

/// The headers that say how long something may be kept, by whom, and what it is.
fn about(answer: &Answer) -> BTreeMap<&str, &str> {
    let own = ["date", "connection", "keep-alive", "keyshield-served-by", "transfer-encoding"];
    let headers = answer.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    headers.filter(|(name, _)| !own.contains(name)).collect()
}

/// A shield with a stream, and the URL of the key that its first segment is under.
fn shield_and_key() -> (Origin, Running, KeyId) {
    let origin = crate::kms::origin();
    let shield = Running::serve(&format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{0}\"]\n\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{0}/live/index.m3u8\"\n{1}",
        origin.url(),
        tokens()
    ));
    let key_url = fetch_segments(&shield.at("/live/index.m3u8")).remove(0).key_url;
    let key = key_url.rsplit('/').next().unwrap().parse().unwrap();
    (origin, shield, key)
}

/// A key as the shield's engine would seal it, of what the shield gives out.
fn sealed_of(shield: &Running, key: KeyId) -> SealedKey {
    let mut random = [0; CONTENT_SECRET_LEN];
    random[..16].copy_from_slice(&shield.get(&format!("{KEY_PATH}{key}")).body);
    let content = ContentSecrets::from_random(KeyMethod::Aes128, &random).content;
    let stream = "live".parse().unwrap();
    seal_for_edge(&secret(), EdgeCipher::Ctr, (&stream, key), &content, &[9; EDGE_NONCE_LEN])
}

#[test]
fn a_revoked_key_that_was_taken_out_of_the_store_is_the_shields_410() {
    let (_origin, shield, key) = shield_and_key();
    let worker = Worker::start(&shield.url, json!({}));
    let (_stub, cloudflare) = pushing(&worker);
    run(cloudflare.put_keys(&[sealed_of(&shield, key)])).unwrap();
    assert_eq!(worker.key(key, "").status, 200);

    call(&shield, "POST", "/live/emergency-revoke", json!({"reason": "found on a forum"})).ok();
    assert_eq!(worker.key(key, "").header("keyshield-served-by"), Some("edge"), "KV knows nothing of it yet");
    run(cloudflare.delete_keys(&[key])).unwrap();
    assert_eq!(run(cloudflare.verify(key)), Ok(KeySeen::Missing));
    let refused = worker.key(key, "");
    assert_eq!((refused.status, refused.header("cache-control")), (410, Some("max-age=1")));
    assert!(refused.problem().contains("revoked"));
}

#[test]
fn an_answer_of_the_edge_is_the_shields_but_for_who_it_is_by() {
    let (_origin, shield, key) = shield_and_key();
    let worker = Worker::start(&shield.url, json!({}));
    let url = format!("{}{KEY_PATH}{key}", worker.url);

    let by_shield = get(&url);
    assert_ne!(by_shield.header("keyshield-served-by"), Some("edge"));
    worker.store(&sealed_of(&shield, key));
    let by_edge = get(&url);
    assert_eq!(by_edge.header("keyshield-served-by"), Some("edge"));
    assert_eq!((by_edge.status, &by_edge.body), (by_shield.status, &by_shield.body));
    let mut expected = about(&by_shield);
    let id = key.to_string();
    expected.insert("keyshield-key", &id);
    assert_eq!(about(&by_edge), expected);

    // Asked for without a body, and before a script of another origin asks.
    for method in ["HEAD", "OPTIONS", "POST"] {
        let (by_edge, by_shield) =
            (ask(method, &url, &[]), ask(method, &shield.at(&format!("{KEY_PATH}{id}")), &[]));
        let mut expected = about(&by_shield);
        if method == "HEAD" {
            expected.insert("keyshield-key", &id);
        }
        assert_eq!((by_edge.status, about(&by_edge)), (by_shield.status, expected), "{method}");
        assert_eq!(by_edge.body, by_shield.body, "{method}");
    }
}

#[test]
fn a_worker_that_is_not_on_the_route_is_found_out() {
    let origin = Origin::start(|_| origin::Answer::ok("0011223344556677"));
    let stub = Stub::in_memory();
    let cloudflare = connector(&stub, DeliveryMode::Push, &origin.url(), |_| ()).unwrap();
    let error = run(cloudflare.verify(id(1))).unwrap_err();
    assert!(error.to_string().contains("is it deployed on this route"), "{error}");
    assert!(cloudflare.limits().settles_within >= Duration::from_secs(60));
}

#[test]
fn the_shipped_settings_bind_what_the_worker_reads() {
    let read = |name: &str| std::fs::read_to_string(repository("edge/cloudflare").join(name)).unwrap();
    let settings: toml::Value = toml::from_str(&read("wrangler.toml")).unwrap();
    let worker = read(settings["main"].as_str().unwrap());
    assert_eq!(settings["kv_namespaces"][0]["binding"].as_str(), Some("KEYS"));
    assert!(settings["routes"][0]["pattern"].as_str().unwrap().ends_with(&format!("{KEY_PATH}*")));
    // Keys are not to be had at the addresses that Cloudflare gives workers by itself.
    for address in ["workers_dev", "preview_urls"] {
        assert_eq!(settings[address].as_bool(), Some(false), "{address}");
    }
    let variables = settings["vars"].as_table().unwrap().keys();
    for name in variables.map(String::as_str).chain(["KEYS"]) {
        assert!(worker.contains(&format!("env.{name}")), "{name}");
    }
}
