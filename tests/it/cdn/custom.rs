//! The custom CDN: its connector against the agents of two real caches, and the caches themselves.
//!
//! What stands behind the caches answers as a shield does, by a script. Deliberately absent: the shield itself
//! (`whole.rs`), and what the connector makes of an agent that breaks the API (`src/cdn/custom/tests.rs`).

use std::process::Command;
use std::time::{Duration, Instant};

use keyshield::cdn::{
    Cdn, CdnFault, CustomCdn, CustomSettings, DeliveryMode, Edge, EdgeSettings, KeySeen, Purge,
};
use keyshield::keys::{
    CONTENT_SECRET_LEN, CheckValue, ContentKey, ContentSecrets, EDGE_NONCE_LEN, EdgeCipher, EdgeSecret,
    KeyId, KeyMethod, SealedKey, Timestamp, TokenScope, seal_for_edge, viewer_token,
};
use keyshield::rest::{Credential, Secret};

use super::caches::{AgentHandle, Nginx, Varnish};
use crate::harness::{get, repository, wait_for};
use crate::origin::{Answer, Gate, Origin, Seen};

const A: KeyId = KeyId::from_bytes([0xaa; 16]);
const B: KeyId = KeyId::from_bytes([0xbb; 16]);
/// The longest time of a call.
const TIMEOUT: Duration = Duration::from_secs(2);

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}

/// At both caches, side by side.
fn at_both(secret: Option<&EdgeSecret>, check: impl Fn(&Site) + Sync) {
    let [varnish, nginx] = Site::both_with(secret);
    std::thread::scope(|scope| {
        let nginx = scope.spawn(|| check(&nginx));
        check(&varnish);
        nginx.join().unwrap();
    });
}

/// A script of a shield: `/live/{a|b}/…` under either key, with how long it may be kept in the file's name.
fn answer(request: &Seen) -> Answer {
    let path = request.target.split('?').next().unwrap();
    let key = if path.contains("/b/") { B } else { A };
    let kept = match path.rsplit('/').next().unwrap() {
        "check" => return Answer::ok("0123456789abcdef").header("Cache-Control", "no-store"),
        "reload.m3u8" => "public, max-age=0, s-maxage=60",
        "fresh.ts" => "no-store",
        "brief.m3u8" => "public, max-age=1",
        _ if path.starts_with("/api/hls/keys/") => "private, max-age=300",
        _ => "public, max-age=604800, immutable",
    };
    Answer::ok(format!("bytes of {}", request.target))
        .header("Cache-Control", kept)
        .header("Keyshield-Key", key.to_string())
        .header("Surrogate-Key", format!("keyshield-stream-ch.1 keyshield-key-{key}"))
}

/// A cache with what stands behind it.
struct Site {
    origin: Origin,
    edge_url: String,
    cache: Cache,
}

enum Cache {
    Varnish(Varnish),
    Nginx(Nginx),
}

impl Site {
    fn both() -> [Self; 2] {
        Self::both_with(None)
    }

    fn both_with(secret: Option<&EdgeSecret>) -> [Self; 2] {
        [true, false].map(|is_varnish| {
            let origin = Origin::start(answer);
            let nodes = [origin.address];
            let cache = match (is_varnish, secret.cloned()) {
                (true, None) => Cache::Varnish(Varnish::start(&nodes)),
                (true, Some(secret)) => Cache::Varnish(Varnish::start_push(&nodes, secret)),
                (false, None) => Cache::Nginx(Nginx::start(&nodes)),
                (false, Some(secret)) => Cache::Nginx(Nginx::start_push(&nodes, secret)),
            };
            Self::with(origin, cache)
        })
    }

    fn with(origin: Origin, cache: Cache) -> Self {
        let edge_url = match &cache {
            Cache::Varnish(varnish) => varnish.edge_url(),
            Cache::Nginx(nginx) => nginx.edge_url(),
        };
        Self { origin, edge_url, cache }
    }

    fn agent(&self) -> &AgentHandle {
        match &self.cache {
            Cache::Varnish(varnish) => &varnish.agent,
            Cache::Nginx(nginx) => &nginx.agent,
        }
    }

    fn cdn(&self, mode: DeliveryMode) -> CustomCdn {
        let (api_url, token) = match &self.cache {
            Cache::Varnish(varnish) => (varnish.agent_url(), varnish.token()),
            Cache::Nginx(nginx) => (nginx.agent_url(), nginx.token()),
        };
        cdn_at(api_url, token, &self.edge_url, mode)
    }

    /// Asks for a path until it has come from the cache.
    fn cache(&self, path: &str) {
        wait_for("a hit", || self.is_cached(path).then_some(()));
    }

    fn cache_all(&self, paths: &[&str]) {
        paths.iter().for_each(|path| self.cache(path));
    }

    fn is_cached(&self, path: &str) -> bool {
        let answer = get(&format!("{}{path}", self.edge_url));
        assert_eq!(answer.status, 200, "{path}");
        answer.header("x-cache") == Some("HIT")
    }
}

fn cdn_at(api_url: String, token: &str, edge_url: &str, mode: DeliveryMode) -> CustomCdn {
    let edge = Edge::new(EdgeSettings {
        url: edge_url.parse().unwrap(),
        key_path: "/api/hls/keys/".to_owned(),
        is_store: mode == DeliveryMode::Push,
        ca_file: None,
        timeout: TIMEOUT,
    });
    let token = Some(Credential::Text(Secret::new(token.to_owned())));
    let settings = CustomSettings { api_url, token, ca_file: None, timeout: TIMEOUT };
    CustomCdn::new(settings, mode, edge.unwrap()).unwrap()
}

fn by_tag(key: KeyId) -> Purge {
    Purge { tags: vec![format!("keyshield-key-{key}")], ..Purge::default() }
}

#[test]
fn caches_keep_what_the_shield_allows_and_no_longer() {
    at_both(None, |site| {
        site.cache("/live/a/1.ts");
        site.cache("/live/a/reload.m3u8");
        for path in ["/live/a/fresh.ts", "/api/hls/keys/key"] {
            assert!((0..3).all(|_| !site.is_cached(path)), "{path}");
            assert_eq!(site.origin.count(path), 3);
        }
        site.cache("/live/a/brief.m3u8");
        wait_for("its end", || (!site.is_cached("/live/a/brief.m3u8")).then_some(()));
        assert_eq!(site.origin.count("/live/a/1.ts"), 1, "one request filled it");
    });
}

#[test]
fn varnish_knows_an_object_by_its_query_and_nginx_does_not() {
    let [varnish, nginx] = Site::both();
    for site in [&varnish, &nginx] {
        site.cache("/live/a/1.ts");
    }
    assert!(!varnish.is_cached("/live/a/1.ts?r=7"));
    assert!(nginx.is_cached("/live/a/1.ts?r=7"));
}

#[test]
fn what_is_tagged_with_a_revoked_key_goes_and_the_rest_stays() {
    at_both(None, |site| {
        let cdn = site.cdn(DeliveryMode::Pull);
        site.cache_all(&["/live/a/1.ts", "/live/a/2.ts", "/live/b/1.ts"]);
        run(async {
            assert_eq!(cdn.has_cached("/live/a/1.ts", A).await, Ok(true));
            assert_eq!(cdn.has_cached("/live/a/1.ts", B).await, Ok(false), "it is under another key");
            cdn.purge(&by_tag(B)).await.unwrap();
        });
        assert!(site.is_cached("/live/a/1.ts") && site.is_cached("/live/a/2.ts"));
        assert!(!site.is_cached("/live/b/1.ts"));
        run(cdn.purge(&by_tag(A))).unwrap();
        assert!(!site.is_cached("/live/a/1.ts") && !site.is_cached("/live/a/2.ts"));
        // Fetched anew, and kept anew.
        assert!(site.is_cached("/live/a/1.ts") && site.is_cached("/live/b/1.ts"));
        assert_eq!(site.origin.count("/live/a/1.ts"), 2);
        // A tag is a whole word, and its dots are dots.
        for tag in ["keyshield-stream-ch", "keyshield-stream-ch-1", "stream-ch.1"] {
            run(cdn.purge(&Purge { tags: vec![tag.into()], ..Purge::default() })).unwrap();
            assert!(site.is_cached("/live/a/1.ts"), "{tag}");
        }
        run(cdn.purge(&Purge { tags: vec!["keyshield-stream-ch.1".into()], ..Purge::default() })).unwrap();
        assert!(!site.is_cached("/live/a/1.ts") && !site.is_cached("/live/b/1.ts"));
    });
}

#[test]
fn objects_go_by_path_and_by_prefix() {
    at_both(None, |site| {
        let cdn = site.cdn(DeliveryMode::Pull);
        let files = ["/live/a/~x.1/1.ts", "/live/a/~x.1/1.ts?r=7", "/live/a/~x.1/10.ts", "/live/a/~xx1/1.ts"];
        site.cache_all(&files);
        let purge = |purge: Purge| run(cdn.purge(&purge)).unwrap();
        purge(Purge { paths: vec!["/live/a/~x.1/1.ts".into()], ..Purge::default() });
        assert!(!site.is_cached(files[0]), "the path");
        assert!(site.is_cached(files[2]) && site.is_cached(files[3]), "no others");
        if matches!(site.cache, Cache::Varnish(_)) {
            assert!(!site.is_cached(files[1]), "the path with any query");
            purge(Purge { paths: vec![files[1].into()], ..Purge::default() });
            assert!(site.is_cached(files[0]) && !site.is_cached(files[1]), "with a query, that one alone");
        }
        site.cache_all(&files);
        purge(Purge { prefixes: vec!["/live/a/~x.1/".into()], ..Purge::default() });
        assert!(site.is_cached(files[3]));
        assert!(!site.is_cached(files[0]) && !site.is_cached(files[2]));
    });
}

#[test]
fn a_purge_that_takes_time_is_done_when_its_status_says_so() {
    let [site, _] = Site::both();
    let takes = Duration::from_secs(1);
    site.agent().purges_take(takes);
    let started = Instant::now();
    run(site.cdn(DeliveryMode::Pull).purge(&by_tag(A))).unwrap();
    assert!(started.elapsed() >= takes);
    assert!(site.agent().count("GET /v1/purges/0") >= 2);
}

#[test]
fn what_is_being_fetched_during_a_purge_is_not_kept() {
    let gates = [(); 2].map(|()| Gate::new());
    let mut both = gates.clone().map(|gate| {
        let half = move |request: &Seen| Answer { gate: Some((5, gate.clone())), ..answer(request) };
        Some(Origin::start(half))
    });
    let nodes = [0, 1].map(|n| both[n].as_ref().unwrap().address);
    let caches = [Cache::Varnish(Varnish::start(&nodes[..1])), Cache::Nginx(Nginx::start(&nodes[1..]))];
    for (n, cache) in caches.into_iter().enumerate() {
        let site = Site::with(both[n].take().unwrap(), cache);
        let path = "/live/a/1.ts";
        std::thread::scope(|scope| {
            let player = scope.spawn(|| site.is_cached(path));
            wait_for("a fetch", || (site.origin.count(path) == 1).then_some(()));
            let purge = scope.spawn(|| run(site.cdn(DeliveryMode::Pull).purge(&by_tag(A))));
            wait_for("a purge", || (site.agent().count("POST /v1/purge") == 1).then_some(()));
            gates[n].open();
            assert!(!player.join().unwrap());
            purge.join().unwrap().unwrap();
            // For what is fetched from now on.
            gates[n].open();
            assert!(!site.is_cached(path), "it was kept");
        });
    }
}

#[test]
fn an_agent_in_trouble_is_told_by_its_kind_of_trouble() {
    let [site, other] = Site::both();
    let (agent, cdn) = (site.agent(), site.cdn(DeliveryMode::Push));
    let put = || run(cdn.put_keys(&[sealed(&secret(), A).1]));
    put().unwrap();

    agent.refuse();
    assert_eq!(put().unwrap_err().fault, CdnFault::Away);
    assert_eq!(run(cdn.health()).unwrap_err().fault, CdnFault::Away);

    agent.heal();
    agent.rate_limit(2, Duration::from_secs(60));
    put().unwrap();
    put().unwrap();
    let error = put().unwrap_err();
    assert_eq!(error.fault, CdnFault::RateLimited, "{error}");
    assert!(error.retry_after.is_some_and(|wait| (50..=60).contains(&wait.as_secs())), "{error:?}");

    agent.heal();
    agent.slow(TIMEOUT * 2);
    let started = Instant::now();
    assert_eq!(put().unwrap_err().fault, CdnFault::Away);
    assert!(started.elapsed() < TIMEOUT * 2, "it waits no longer than it should");

    agent.heal();
    agent.flap(1, 2);
    let outcomes: Vec<_> = (0..6).map(|_| put().is_ok()).collect();
    assert_eq!(outcomes, [true, false, false, true, false, false]);
    assert_eq!(agent.calls().last().unwrap().status, 503);
    assert!(agent.most_within(Duration::from_secs(60), "POST /v1/keys/batch") >= 6);

    let stranger = cdn_at(agent.url(), "not-the-token", &site.edge_url, DeliveryMode::Push);
    agent.heal();
    assert_eq!(run(stranger.health()).unwrap_err().fault, CdnFault::Refused);

    let gone = other.cdn(DeliveryMode::Pull);
    drop(other);
    assert_eq!(run(gone.purge(&by_tag(A))).unwrap_err().fault, CdnFault::Away);
}

#[test]
fn an_agent_without_batches_or_tags_is_asked_for_what_it_can_do() {
    let [_, site] = Site::both();
    site.agent().can_only(&["paths", "store"]);
    let cdn = site.cdn(DeliveryMode::Push);
    run(cdn.health()).unwrap();
    let keys = [A, B].map(|id| sealed(&secret(), id).1);
    run(cdn.put_keys(&keys)).unwrap();
    assert_eq!((site.agent().count("PUT /v1/keys/"), site.agent().count("POST ")), (2, 0));
    assert_eq!(site.agent().stored().len(), 2);
    site.cache("/live/a/1.ts");
    assert_eq!(run(cdn.purge(&by_tag(A))).unwrap_err().fault, CdnFault::Invalid);
    run(cdn.purge(&Purge { paths: vec!["/live/a/1.ts".into()], ..by_tag(A) })).unwrap();
    assert!(!site.is_cached("/live/a/1.ts"));
    assert_eq!(site.agent().purged().len(), 1);
}

fn secret() -> EdgeSecret {
    "5e".repeat(32).parse().unwrap()
}

/// A key of the stream `ch1`, as it is and as the edge has it.
fn sealed(secret: &EdgeSecret, id: KeyId) -> (ContentKey, SealedKey) {
    let random: [u8; CONTENT_SECRET_LEN] =
        std::array::from_fn(|at| id.to_string().as_bytes()[at % 32] ^ at as u8);
    let content = ContentSecrets::from_random(KeyMethod::Aes128, &random).content;
    let stream = "ch1".parse().unwrap();
    let sealed = seal_for_edge(secret, EdgeCipher::Ctr, (&stream, id), &content, &[9; EDGE_NONCE_LEN]);
    (content, sealed)
}

#[test]
fn in_push_mode_keys_come_from_the_edge_and_are_gone_when_they_are_deleted() {
    let secret = secret();
    at_both(Some(&secret), |site| {
        let cdn = site.cdn(DeliveryMode::Push);
        run(cdn.health()).unwrap();
        let (content, key) = sealed(&secret, A);
        run(async {
            assert_eq!(cdn.verify(A).await, Ok(KeySeen::Missing));
            cdn.put_keys(&[key]).await.unwrap();
            let seen = cdn.verify(A).await.unwrap();
            assert_eq!(seen, KeySeen::Has(CheckValue::of(A, &content)));
        });
        let url = format!("{}/api/hls/keys/{A}", site.edge_url);
        let answer = get(&url);
        assert_eq!((answer.status, &answer.body[..]), (200, content.expose()));
        assert_eq!(answer.header("cache-control"), Some("private, max-age=300"));
        assert_eq!(answer.header("keyshield-served-by"), Some("edge"));
        let token = |secs| viewer_token(&secret, &TokenScope::AllStreams, Timestamp::from_unix_millis(secs));
        assert_eq!(get(&format!("{url}?token={}", token(4_000_000_000_000))).status, 200);
        assert_eq!(get(&format!("{url}?token={}", token(1_000_000_000_000))).status, 403, "it has run out");
        assert_eq!(get(&format!("{url}?token={}0", token(4_000_000_000_000))).status, 403);

        run(async {
            cdn.delete_keys(&[A, B]).await.unwrap();
            assert_eq!(cdn.verify(A).await, Ok(KeySeen::Missing));
        });
        assert_eq!(get(&url).status, 404);
        assert_eq!(site.origin.targets(), [""; 0], "the shield is not asked for keys");
    });
}

#[test]
fn agents_answer_as_the_document_says() {
    let secret = secret();
    let [varnish, nginx] = Site::both_with(Some(&secret));
    std::thread::scope(|scope| {
        for site in [&varnish, &nginx] {
            scope.spawn(|| check_against_the_document(site.agent()));
        }
    });
}

/// schemathesis makes requests that fit the document and requests that do not, and judges the answers by it.
fn check_against_the_document(agent: &AgentHandle) {
    let dir = tempfile::tempdir().unwrap();
    let ran = Command::new(repository("tests/tools/.venv/bin/schemathesis"))
        .arg("--config-file")
        .arg(repository("tests/tools/schemathesis-agent.toml"))
        .arg("run")
        .arg(repository("docs/custom-cdn.openapi.yaml"))
        .args(["--url", &agent.url(), "--header", "Authorization: Bearer agent-of-the-tests"])
        .args(["--max-examples", "30", "--continue-on-failure", "--no-color"])
        .current_dir(dir.path())
        .output()
        .expect("scripts/bootstrap.sh test installs schemathesis");
    let said = String::from_utf8_lossy(&ran.stdout);
    assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
    println!("{said}");
}
