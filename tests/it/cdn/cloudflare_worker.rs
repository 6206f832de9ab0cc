//! The worker that is shipped, in the workerd that Cloudflare runs: its KV filled by the connector over the stub of the
//! API, its answers asked for as players and the shield ask.

use std::collections::BTreeMap;
use std::time::Duration;

use keyshield::cdn::{Cdn, Cloudflare, DeliveryMode, KeySeen, is_verified};
use keyshield::clock::Clock;
use keyshield::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentKey, ContentSecrets, EDGE_NONCE_LEN, EdgeCipher, EdgeSecret,
    KeyId, KeyMethod, SealedKey, TokenScope, seal_for_edge, viewer_token,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::cloudflare::connector;
use super::cloudflare_stub::{Pairs, Stub};
use super::run;
use crate::daemon::Daemon;
use crate::harness::{Answer, Running, agent, ask, fetch_segments, free_port, get, repository, try_ask};
use crate::origin::{self, Origin};

const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const KEY_PATH: &str = "/api/hls/keys/";

/// The KV of a worker.
pub struct Namespace {
    url: String,
}

impl Namespace {
    pub fn put(&self, pairs: &[(String, String)]) {
        self.change("PUT", json!(pairs));
    }

    pub fn delete(&self, names: &[String]) {
        self.change("DELETE", json!(names));
    }

    pub fn get(&self, name: &str) -> Option<String> {
        let answer = get(&format!("{}/{}", self.url, name.replace(':', "%3A")));
        (answer.status == 200).then(|| answer.text())
    }

    /// What the worker logged.
    fn logged(&self) -> String {
        get(&format!("{}/", self.url)).text()
    }

    fn change(&self, method: &str, what: Value) {
        let request = ureq::http::Request::builder().method(method).uri(&self.url);
        let answer = agent().run(request.body(what.to_string()).unwrap()).unwrap();
        assert_eq!(answer.status(), 200, "{method} {what}");
    }
}

/// A workerd that runs the worker.
struct Worker {
    url: String,
    admin_url: String,
    // Before the folder: fields are dropped in order.
    _workerd: Daemon,
    _dir: TempDir,
}

impl Worker {
    /// Before an origin, with bindings besides those that every test has.
    fn start(origin: &str, more: Value) -> Self {
        let dir = tempfile::Builder::new().prefix("workerd").tempdir().unwrap();
        let (port, admin_port) = (free_port(), free_port());
        let mut bindings = json!({
            "EDGE_ENCRYPTION_KEY": *secret().encryption_key(),
            "EDGE_MAC_KEY": *secret().mac_key(),
            // This workerd is of a time when 60 was the least.
            "KV_CACHE_SECS": "60",
        });
        bindings.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let settings = json!({
            "script": repository("edge/cloudflare/worker.js"), "port": port, "adminPort": admin_port,
            "origin": origin, "bindings": bindings,
        });
        let script = repository("tests/edge/worker.mjs").display().to_string();
        let command = ["node", &script, &settings.to_string()];
        let workerd = Daemon::start(&command, "TERM", dir.path().join("workerd.log"));
        let url = |port| format!("http://127.0.0.1:{port}");
        let (url, admin_url) = (url(port), url(admin_port));
        workerd.wait_until(|| {
            let answers = |url: &str| try_ask("GET", url, &[]).is_ok_and(|answer| answer.status < 500);
            answers(&format!("{url}{KEY_PATH}{}/check", id(0))) && answers(&format!("{admin_url}/"))
        });
        Self { url, admin_url, _workerd: workerd, _dir: dir }
    }

    fn namespace(&self) -> Namespace {
        Namespace { url: self.admin_url.clone() }
    }

    fn store(&self, sealed: &SealedKey) {
        self.namespace().put(&[(format!("key:{}", sealed.key), sealed.text.clone())]);
    }

    fn key(&self, key: KeyId, query: &str) -> Answer {
        get(&format!("{}{KEY_PATH}{key}{query}", self.url))
    }

    fn check(&self, key: KeyId) -> Answer {
        get(&format!("{}{KEY_PATH}{key}/check", self.url))
    }
}

fn secret() -> EdgeSecret {
    SECRET.parse().unwrap()
}

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
            assert!(is_verified(&seen, CheckValue::of(id(*n), key)), "{seen:?}");
            let answer = worker.key(id(*n), "");
            assert_eq!((answer.status, &answer.body[..]), (200, key.expose()));
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
            assert!(is_verified(&seen, CheckValue::of(id(n), &key)), "{seen:?}");
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
    let forged = format!("{}0", &good[..good.len() - 1]).replace("~0", "~1");
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

#[test]
fn an_answer_of_the_edge_is_the_shields_but_for_who_it_is_by() {
    let origin = crate::kms::origin();
    let shield = Running::serve(&format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{0}\"]\n\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{0}/live/index.m3u8\"\n",
        origin.url()
    ));
    let key_url = fetch_segments(&shield.at("/live/index.m3u8")).remove(0).key_url;
    let key: KeyId = key_url.rsplit('/').next().unwrap().parse().unwrap();
    let worker = Worker::start(&shield.url, json!({}));
    let url = format!("{}{KEY_PATH}{key}", worker.url);

    let by_shield = get(&url);
    assert_ne!(by_shield.header("keyshield-served-by"), Some("edge"));
    let mut random = [0; CONTENT_SECRET_LEN];
    random[..16].copy_from_slice(&by_shield.body);
    let content = ContentSecrets::from_random(KeyMethod::Aes128, &random).content;
    worker.store(&seal_for_edge(
        &secret(),
        EdgeCipher::Ctr,
        (&"live".parse().unwrap(), key),
        &content,
        &[9; EDGE_NONCE_LEN],
    ));
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
