//! The function as it is shipped, over the store that the connector fills: `tests/edge/function.mjs` runs it in what
//! CloudFront's language has, and holds its answers to CloudFront's rules.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyshield::cdn::{Cdn, CloudFront, CloudFrontEdgeCode, DeliveryMode, KeySeen};
use keyshield::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentKey, ContentSecrets, EDGE_NONCE_LEN, EdgeSecret, KeyId, KeyMethod,
    SealedKey, StreamId, Timestamp, TokenScope, seal_for_edge, viewer_token,
};
use parking_lot::Mutex;
use serde_json::json;
use tempfile::TempDir;
use zeroize::Zeroizing;

use super::wires::{KEY_PATH, Wire, connector, connector_with, edge, run};
use crate::daemon::Daemon;
use crate::harness::{Answer, agent, ask, free_port, repository};
use crate::origin::{self, Origin};
use crate::sessions::{contains, spellings};

/// The code as the shield's defaults have it: keys are kept for five minutes and read by all.
fn edge_code(secret: &EdgeSecret, key_path: &str, needs_token: bool) -> Zeroizing<String> {
    let code = CloudFrontEdgeCode {
        key_path: key_path.to_owned(),
        key_max_age: Duration::from_secs(300),
        cors_origins: vec!["*".into()],
        secret: secret.clone(),
        needs_token,
    };
    code.text()
}

const SECRET: &str = "5f1c9f0e2d3b4a5968778695a4b3c2d1e0f00112233445566778899aabbccdde";

fn secret() -> EdgeSecret {
    SECRET.parse().unwrap()
}

fn stream(id: &str) -> StreamId {
    id.parse().unwrap()
}

fn id(n: u8) -> KeyId {
    KeyId::from_bytes([n; 16])
}

fn content(method: KeyMethod, n: u8) -> ContentKey {
    let random: [u8; CONTENT_SECRET_LEN] = std::array::from_fn(|i| n.wrapping_mul(31).wrapping_add(i as u8));
    ContentSecrets::from_random(method, &random).content
}

fn sealed(cdn: &CloudFront, method: KeyMethod, n: u8) -> SealedKey {
    let nonce = [n ^ 0x5a; EDGE_NONCE_LEN];
    seal_for_edge(&secret(), cdn.cipher(), (&stream("ch1.hd"), id(n)), &content(method, n), &nonce)
}

/// A CDN: ministack's store, the function, and an origin behind it that says 410 to every key.
struct Front {
    // Before the folder: fields are dropped in order.
    _node: Daemon,
    _dir: TempDir,
    origin: Origin,
    wire: Wire,
    arn: String,
    cdn: CloudFront,
    url: String,
}

impl Front {
    fn start(needs_token: bool) -> Self {
        Self::running(&edge_code(&secret(), KEY_PATH, needs_token))
    }

    fn running(code: &str) -> Self {
        let wire = Wire::ministack();
        let arn = wire.make_store("keys");
        let origin = Origin::start(|seen| match seen.target.starts_with(KEY_PATH) {
            true => origin::Answer::status(410).header("Keyshield-Served-By", "shield"),
            false => origin::Answer::ok("of the origin"),
        });
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let url = format!("http://127.0.0.1:{port}");
        let store = format!("{}/key-value-stores/{arn}", wire.url);
        let node = launch(dir.path(), port, code, [&store, &origin.url()]);
        node.wait_until(|| agent().get(format!("{url}/_ready")).call().is_ok());
        let cdn = connector_with(wire.settings_on(&arn), DeliveryMode::Push, edge(&url, true));
        Self { _node: node, _dir: dir, origin, wire, arn, cdn, url }
    }

    fn key_url(&self, n: u8) -> String {
        format!("{}{KEY_PATH}{}", self.url, id(n))
    }

    fn put(&self, method: KeyMethod, n: u8) {
        run(self.cdn.put_keys(&[sealed(&self.cdn, method, n)])).unwrap();
    }

    fn key(&self, n: u8) -> Answer {
        ask("GET", &self.key_url(n), &[])
    }

    fn key_for(&self, n: u8, token: &str) -> Answer {
        ask("GET", &format!("{}?token={token}", self.key_url(n)), &[])
    }

    fn seen(&self, n: u8) -> KeySeen {
        run(self.cdn.verify(id(n))).unwrap()
    }
}

fn launch(dir: &Path, port: u16, code: &str, [store, origin]: [&str; 2]) -> Daemon {
    let file = dir.join("function.js");
    std::fs::write(&file, code).unwrap();
    let (file, script) =
        (file.display().to_string(), repository("tests/edge/function.mjs").display().to_string());
    let port = port.to_string();
    let node = ["node", "--experimental-vm-modules", "--no-warnings"];
    let command = [&node[..], &[&script, &port, &file, store, origin]].concat();
    Daemon::start(&command, "TERM", dir.join("node.log"))
}

#[test]
fn what_the_connector_stores_the_edge_verifies_and_gives_out() {
    let front = Front::start(false);
    for (n, method) in (1..).zip(KeyMethod::ALL) {
        assert_eq!(front.seen(n), KeySeen::Missing);
        front.put(method, n);
        let expected = content(method, n);
        assert_eq!(front.seen(n), KeySeen::Has(CheckValue::of(id(n), &expected)), "{method:?}");
        let key = front.key(n);
        assert_eq!((key.status, &key.body[..]), (200, expected.expose()), "{method:?}: {}", key.text());
    }
    assert!(front.origin.targets().is_empty(), "the origin was not asked");
}

#[test]
fn a_key_from_the_edge_has_the_headers_of_one_from_the_shield() {
    let front = Front::start(false);
    front.put(KeyMethod::Aes128, 1);
    let key = front.key(1);
    let (tag, stream_tag) = (format!("keyshield-key-{}", id(1)), "keyshield-stream-ch1.hd");
    for (name, value) in [
        ("content-type", "application/octet-stream"),
        ("cache-control", "private, max-age=300"),
        ("x-content-type-options", "nosniff"),
        ("surrogate-key", &format!("{stream_tag} {tag}")),
        ("cache-tag", &format!("{stream_tag},{tag}")),
        ("access-control-allow-origin", "*"),
        ("access-control-expose-headers", "Accept-Ranges, Age, Content-Length, Content-Range, ETag"),
        ("keyshield-key", &id(1).to_string()),
        ("keyshield-served-by", "edge"),
    ] {
        assert_eq!(key.header(name), Some(value), "{name}");
    }
    let head = ask("HEAD", &front.key_url(1), &[]);
    assert_eq!((head.status, head.body.len()), (200, 0));
    let check = ask("GET", &format!("{}/check", front.key_url(1)), &[]);
    assert_eq!(check.header("cache-control"), Some("no-store"));
    assert_eq!(check.header("content-type"), Some("text/plain"));

    let options = ask("OPTIONS", &front.key_url(1), &[]);
    assert_eq!(
        (options.status, options.header("access-control-allow-methods")),
        (204, Some("GET, HEAD, OPTIONS"))
    );
    let post = ask("POST", &front.key_url(1), &[]);
    assert_eq!((post.status, post.header("allow")), (405, Some("GET, HEAD, OPTIONS")));
    assert!(post.problem().contains("GET, HEAD and OPTIONS"));
}

#[test]
fn scripts_of_hosts_that_are_listed_may_read_keys_and_others_may_not() {
    let code = CloudFrontEdgeCode {
        key_path: "/keys/".into(),
        key_max_age: Duration::from_secs(60),
        cors_origins: vec!["https://a.example".into(), "https://b.example".into()],
        secret: secret(),
        needs_token: false,
    };
    let front = Front::running(&code.text());
    front.put(KeyMethod::Aes128, 1);
    for (origin, allowed) in [("https://b.example", Some("https://b.example")), ("https://c.example", None)] {
        let key = ask("GET", &format!("{}/keys/{}", front.url, id(1)), &[("Origin", origin)]);
        assert_eq!((key.status, key.header("cache-control")), (200, Some("private, max-age=60")));
        assert_eq!(
            (key.header("access-control-allow-origin"), key.header("vary")),
            (allowed, Some("origin"))
        );
    }
    assert_eq!(front.key(1).status, 200, "at the path where the shield answers always");
    assert!(front.origin.targets().is_empty());
}

#[test]
fn a_key_that_was_deleted_is_the_origins_to_answer() {
    let front = Front::start(false);
    front.put(KeyMethod::Aes128, 1);
    assert_eq!(front.key(1).status, 200);
    run(front.cdn.delete_keys(&[id(1)])).unwrap();
    assert_eq!(front.seen(1), KeySeen::Missing, "its check is not the origin's to answer");
    assert!(front.origin.targets().is_empty());
    let key = front.key(1);
    assert_eq!((key.status, key.header("keyshield-served-by")), (410, Some("shield")));
}

#[test]
fn a_record_that_was_changed_or_moved_is_never_served() {
    let front = Front::start(false);
    let good = sealed(&front.cdn, KeyMethod::Aes128, 1);
    // One character of each part of it, what is no record at all, and another key's.
    let mut changed: Vec<String> =
        good.text.char_indices().filter(|(_, c)| *c == ':').map(|(at, _)| at).fold(
            vec!["".into(), ":".into(), "junk".into(), sealed(&front.cdn, KeyMethod::Aes128, 2).text],
            |mut all: Vec<String>, at| {
                let mut text = good.text.clone().into_bytes();
                text[at + 1] = if text[at + 1] == b'0' { b'1' } else { b'0' };
                all.push(String::from_utf8(text).unwrap());
                all
            },
        );
    changed.push(good.text.replace("ch1.hd", "ch2.hd"));
    for text in changed.into_iter().filter(|text| !text.is_empty()) {
        run(front.cdn.put_keys(&[SealedKey { key: id(1), text: text.clone() }])).unwrap();
        assert_eq!(front.seen(1), KeySeen::Missing, "{text}");
        assert_eq!(front.key(1).status, 410, "the origin's answer: {text}");
    }
    front.put(KeyMethod::Aes128, 1);
    assert_eq!(front.key(1).status, 200);
}

#[test]
fn a_key_is_given_for_a_token_that_is_good_and_for_nothing_else() {
    let front = Front::start(true);
    front.put(KeyMethod::Aes128, 1);
    let later = Timestamp::from_unix_millis(4_000_000_000_000);
    let token = |scope: &TokenScope| viewer_token(&secret(), scope, later);
    let own = token(&TokenScope::Stream(stream("ch1.hd")));
    for good in [&own, &token(&TokenScope::AllStreams), &own.replace('~', "%7E")] {
        let key = front.key_for(1, good);
        assert_eq!((key.status, &key.body[..]), (200, content(KeyMethod::Aes128, 1).expose()), "{good}");
    }
    let expired =
        viewer_token(&secret(), &TokenScope::AllStreams, Timestamp::from_unix_millis(1_000_000_000_000));
    let other: EdgeSecret = SECRET.replace('5', "6").parse().unwrap();
    let forged = viewer_token(&other, &TokenScope::AllStreams, later);
    let longer = own.replacen("4000000000", "5000000000", 1);
    let another = token(&TokenScope::Stream(stream("ch2")));
    for bad in ["", "junk", "a~b~c", "%", &expired, &forged, &longer, &another] {
        let refused = front.key_for(1, bad);
        assert_eq!(refused.status, 403, "{bad}");
        assert!(refused.problem().contains("token"), "{bad}");
        assert_eq!(refused.header("cache-control"), Some("no-store"));
    }
    assert_eq!(front.key(1).status, 403, "none");
    assert_eq!(ask("HEAD", &front.key_url(1), &[]).status, 403);
    assert!(matches!(front.seen(1), KeySeen::Has(_)), "the shield's question needs none");

    // A key that is not there: whoever has no token does not get to the origin, and no token does.
    assert_eq!(front.key(9).status, 403);
    assert!(front.origin.targets().is_empty());
    assert_eq!(front.key_for(9, &own).status, 410);
    assert_eq!(front.origin.targets(), [format!("{KEY_PATH}{}", id(9))]);
}

#[test]
fn every_other_path_is_the_origins_as_it_was_asked() {
    let front = Front::start(true);
    let upper = id(0xab).to_string().to_uppercase();
    for path in [
        "/live/ch1/720p.m3u8?_HLS_msn=7&_HLS_part=1".to_owned(),
        "/live/ch1/~ab.1.cd/seg_1.ts?r=2".to_owned(),
        format!("{KEY_PATH}{upper}"),
        format!("{KEY_PATH}{}/other", id(1)),
        KEY_PATH.to_owned(),
    ] {
        ask("GET", &format!("{}{path}", front.url), &[]);
        assert_eq!(front.origin.targets().last(), Some(&path));
    }
}

#[test]
fn a_function_without_its_keys_gives_nothing_out() {
    let source = std::fs::read_to_string(repository("edge/cloudfront/function.js")).unwrap();
    let front = Front::running(&source);
    front.put(KeyMethod::Aes128, 1);
    assert_eq!(front.key(1).status, 403);
    assert_eq!(front.seen(1), KeySeen::Missing);
}

#[test]
fn a_function_goes_live_with_its_store_and_once() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let cdn = connector(wire.settings_on(&arn), DeliveryMode::Push);
    let first = edge_code(&secret(), KEY_PATH, false);
    let second = edge_code(&secret(), KEY_PATH, true);
    run(async {
        assert!(cdn.deploy("keyshield", &first).await.unwrap());
        assert!(!cdn.deploy("keyshield", &first).await.unwrap(), "it is live");
        assert!(cdn.deploy("keyshield", &second).await.unwrap());
        assert!(!cdn.deploy("keyshield", &second).await.unwrap());
        let error = cdn.deploy("keyshield", &"x".repeat(10_241)).await.unwrap_err();
        assert!(error.what.contains("10241 bytes"), "{error}");
    });
    let live = json!({"Name": "keyshield", "Stage": "LIVE"});
    assert_eq!(wire.by_aws("get_function", live.clone())["FunctionCode"], second.as_str());
    let config = &wire.by_aws("describe_function", live)["FunctionSummary"]["FunctionConfig"];
    assert_eq!(config["Runtime"], "cloudfront-js-2.0");
    assert_eq!(config["KeyValueStoreAssociations"]["Items"][0]["KeyValueStoreARN"], arn.as_str(), "{config}");
}

#[test]
fn neither_the_store_nor_its_listing_shows_a_key() {
    let front = Front::start(false);
    front.put(KeyMethod::Aes256, 1);
    let listed = front.wire.stored(&front.arn, "/keys").to_string();
    assert!(listed.contains(&id(1).to_string()), "{listed}");
    for (spelling, needle) in spellings(content(KeyMethod::Aes256, 1).expose()) {
        assert!(!contains(listed.as_bytes(), &needle), "{spelling}");
    }
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
fn no_level_of_logging_shows_what_the_function_opens_keys_with() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let (log, cdn) = (Log::default(), connector(wire.settings_on(&arn), DeliveryMode::Push));
    let writer = log.clone();
    let everything = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let code = edge_code(&secret(), KEY_PATH, true);
    tracing::subscriber::with_default(everything, || {
        run(async {
            assert!(cdn.deploy("keyshield", &code).await.unwrap());
            assert!(cdn.deploy("keyshield", &code.replace("'private, ", "'private,  ")).await.unwrap());
            assert!(cdn.deploy("keyshield", &code).await.unwrap());
        });
    });
    let logged = log.0.lock();
    assert!(contains(&logged, b"/2020-05-31/function/keyshield"), "the SDK's other requests are logged");
    for key in [secret().encryption_key(), secret().mac_key(), secret().token_key()] {
        assert!(!contains(&logged, key.as_bytes()), "a key is logged");
        // The code travels in base64: where in it a key begins is one of three places.
        for shift in 0..3 {
            let within = STANDARD.encode(&key.as_bytes()[shift..]);
            assert!(!contains(&logged, &within.as_bytes()[..60]), "a key is logged in base64");
        }
    }
}
