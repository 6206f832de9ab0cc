//! The connector against a server that is scripted answer by answer. Real agents are in `tests/it/cdn`.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use parking_lot::Mutex;

use super::*;
use crate::cdn::EdgeSettings;
use crate::rest::Secret;

const TOKEN: &str = "token-of-the-tests";
const ALL: &str = r#"{"status":"ok","capabilities":["tags","paths","prefixes","batch","store","new"]}"#;

/// What was asked: method and path, and the body.
type Asked = Arc<Mutex<Vec<(String, Bytes)>>>;

/// A server that answers by a function of method and path.
struct Server {
    address: SocketAddr,
    asked: Asked,
}

impl Server {
    async fn start(answer: impl Fn(&str) -> Response + Clone + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, asked) = (listener.local_addr().unwrap(), Asked::default());
        let seen = Arc::clone(&asked);
        let handler = move |request: Request| {
            let (answer, seen) = (answer.clone(), Arc::clone(&seen));
            async move {
                assert_eq!(request.headers()["authorization"], format!("Bearer {TOKEN}"));
                let what = format!("{} {}", request.method(), request.uri());
                let body = to_bytes(request.into_body(), 1 << 20).await.unwrap();
                seen.lock().push((what.clone(), body));
                answer(&what)
            }
        };
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(handler)).await });
        Self { address, asked }
    }

    /// One that does all, but for what a function answers otherwise.
    async fn but(answer: impl Fn(&str) -> Option<Response> + Clone + Send + Sync + 'static) -> Self {
        Self::start(move |asked| {
            answer(asked).unwrap_or_else(|| match asked {
                "GET /agent/healthz" => ALL.into_response(),
                _ => StatusCode::NO_CONTENT.into_response(),
            })
        })
        .await
    }

    fn cdn(&self, mode: DeliveryMode) -> CustomCdn {
        let url = format!("http://{}", self.address);
        CustomCdn::new(settings(&format!("{url}/agent/")), mode, edge(&url)).unwrap()
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().iter().map(|(what, _)| what.clone()).collect()
    }

    fn last_body(&self) -> serde_json::Value {
        serde_json::from_slice(&self.asked.lock().last().unwrap().1).unwrap()
    }
}

fn settings(api_url: &str) -> CustomSettings {
    let token = Some(Credential::Text(Secret::new(TOKEN.to_owned())));
    CustomSettings { api_url: api_url.to_owned(), token, ca_file: None, timeout: Duration::from_secs(5) }
}

fn edge(url: &str) -> Edge {
    Edge::new(EdgeSettings {
        url: url.parse().unwrap(),
        key_path: "/api/hls/keys/".to_owned(),
        is_store: false,
        ca_file: None,
        timeout: Duration::from_secs(5),
    })
    .unwrap()
}

fn id(n: u8) -> KeyId {
    KeyId::from_bytes([n; 16])
}

fn key(n: u8) -> SealedKey {
    SealedKey { key: id(n), text: format!("1:ctr:ch1:{n}") }
}

fn by_tag() -> Purge {
    Purge { tags: vec!["keyshield-stream-ch1".into()], ..Purge::default() }
}

#[tokio::test]
async fn keys_go_in_one_call_and_an_agent_without_batches_gets_them_one_by_one_from_then_on() {
    let all = Server::but(|_| None).await;
    let cdn = all.cdn(DeliveryMode::Push);
    cdn.put_keys(&[key(1), key(2)]).await.unwrap();
    let sent = all.last_body();
    assert_eq!(sent["put"][1]["keyId"], id(2).to_string());
    assert_eq!(sent["put"][1]["sealed"], key(2).text);
    cdn.delete_keys(&[id(1)]).await.unwrap();
    assert_eq!(all.last_body()["delete"][0], id(1).to_string());
    assert_eq!(all.asked(), ["GET /agent/healthz", "POST /agent/v1/keys/batch", "POST /agent/v1/keys/batch"]);
    assert_eq!(cdn.limits().keys_per_call, ITEMS_PER_CALL);

    for status in [404, 405, 501] {
        let status = StatusCode::from_u16(status).unwrap();
        let few = Server::but(move |asked| asked.ends_with("/batch").then(|| status.into_response())).await;
        let cdn = few.cdn(DeliveryMode::Push);
        cdn.put_keys(&[key(1)]).await.unwrap();
        assert_eq!(few.last_body()["sealed"], key(1).text);
        cdn.delete_keys(&[id(1)]).await.unwrap();
        let one = format!("/agent/v1/keys/{}", id(1));
        assert_eq!(
            few.asked()[1..],
            ["POST /agent/v1/keys/batch".to_owned(), format!("PUT {one}"), format!("DELETE {one}")]
        );
        assert_eq!(cdn.limits().keys_per_call, 1);
    }
}

#[tokio::test]
async fn in_pull_mode_no_key_is_stored() {
    let server = Server::but(|_| None).await;
    let cdn = server.cdn(DeliveryMode::Pull);
    cdn.put_keys(&[key(1)]).await.unwrap();
    cdn.delete_keys(&[id(1)]).await.unwrap();
    assert_eq!(server.asked(), [""; 0]);
}

#[tokio::test]
async fn who_knows_tags_is_told_nothing_else_and_lists_are_as_long_as_the_document_says() {
    let server = Server::but(|_| None).await;
    let cdn = server.cdn(DeliveryMode::Pull);
    let many = |what: &str| (0..250).map(|n| format!("{what}{n}")).collect::<Vec<_>>();
    let bodies = || -> Vec<serde_json::Value> {
        let asked = std::mem::take(&mut *server.asked.lock());
        let purges = asked.iter().filter(|(what, _)| what.starts_with("POST "));
        purges.map(|(_, body)| serde_json::from_slice(body).unwrap()).collect()
    };
    let all = Purge { tags: many("tag"), paths: many("/a"), prefixes: many("/b") };
    for (purge, kinds) in [
        (all.clone(), [[100, 100, 50], [0; 3], [0; 3]]),
        (Purge { tags: Vec::new(), ..all }, [[0; 3], [100, 100, 50], [100, 100, 50]]),
    ] {
        cdn.purge(&purge).await.unwrap();
        let bodies = bodies();
        let lengths = ["tags", "paths", "prefixes"]
            .map(|kind| bodies.iter().map(|body| body[kind].as_array().unwrap().len()).collect::<Vec<_>>());
        assert_eq!(lengths, kinds);
    }
}

#[tokio::test]
async fn a_purge_names_what_the_agent_understands_and_fails_where_something_would_stay() {
    let paths_alone = |asked: &str| {
        (asked == "GET /agent/healthz").then(|| r#"{"status":"ok","capabilities":["paths"]}"#.into_response())
    };
    let server = Server::but(paths_alone).await;
    let cdn = server.cdn(DeliveryMode::Pull);
    let error = cdn.purge(&by_tag()).await.unwrap_err();
    assert_eq!(error.fault, CdnFault::Invalid, "{error}");
    assert_eq!((cdn.limits().tags_per_purge, cdn.limits().urls_per_purge), (0, ITEMS_PER_CALL));

    let both = Purge { paths: vec!["/live/a.ts".into()], ..by_tag() };
    cdn.purge(&both).await.unwrap();
    assert_eq!(server.last_body(), serde_json::json!({"tags": [], "paths": ["/live/a.ts"], "prefixes": []}));
    let prefix = Purge { prefixes: vec!["/live/".into()], ..Purge::default() };
    assert_eq!(cdn.purge(&prefix).await.unwrap_err().fault, CdnFault::Invalid);

    let before = server.asked().len();
    cdn.purge(&Purge::default()).await.unwrap();
    assert_eq!(server.asked().len(), before, "nothing is to be purged");
}

#[tokio::test]
async fn a_purge_that_takes_time_is_waited_for_at_the_same_server_alone() {
    let polls = Arc::new(Mutex::new(0));
    let server = Server::but(move |asked| match asked {
        "POST /agent/v1/purge" => {
            Some((StatusCode::ACCEPTED, [("location", "/agent/v1/purges/7")]).into_response())
        }
        "GET /agent/v1/purges/7" => {
            *polls.lock() += 1;
            let state = if *polls.lock() < 3 { "running" } else { "done" };
            Some(format!(r#"{{"status":"{state}"}}"#).into_response())
        }
        _ => None,
    })
    .await;
    server.cdn(DeliveryMode::Pull).purge(&by_tag()).await.unwrap();
    assert_eq!(server.asked().iter().filter(|asked| asked.ends_with("/7")).count(), 3);

    let elsewhere = Server::but(|_| None).await;
    let location = format!("http://{}/agent/v1/purges/7", elsewhere.address);
    let server = Server::but(move |asked| {
        let accepted = (StatusCode::ACCEPTED, [("location", location.clone())]).into_response();
        asked.ends_with("/purge").then_some(accepted)
    })
    .await;
    let error = server.cdn(DeliveryMode::Pull).purge(&by_tag()).await.unwrap_err();
    assert_eq!(error.fault, CdnFault::Invalid, "{error}");
    assert_eq!(elsewhere.asked(), [""; 0], "nobody else is shown the token");
}

#[tokio::test]
async fn a_purge_that_failed_or_is_forgotten_may_be_made_again() {
    for (status, body) in [(200, r#"{"status":"failed","detail":"disk"}"#), (404, "{}")] {
        let status = StatusCode::from_u16(status).unwrap();
        let server = Server::but(move |asked| match asked {
            "POST /agent/v1/purge" => {
                Some((StatusCode::ACCEPTED, [("location", "/agent/v1/purges/7")]).into_response())
            }
            "GET /agent/v1/purges/7" => Some((status, body).into_response()),
            _ => None,
        })
        .await;
        let error = server.cdn(DeliveryMode::Pull).purge(&by_tag()).await.unwrap_err();
        assert!(error.is_passing(), "{error}");
    }
}

#[tokio::test]
async fn an_error_says_what_the_agent_says_and_never_the_token() {
    let server = Server::but(|asked| {
        let refused = [("retry-after", "3"), ("content-type", "application/problem+json")];
        let body = r#"{"status":429,"title":"Too Many Requests","detail":"10 calls a second"}"#;
        asked.contains("/v1/").then(|| (StatusCode::TOO_MANY_REQUESTS, refused, body).into_response())
    })
    .await;
    let cdn = server.cdn(DeliveryMode::Push);
    let error = cdn.put_keys(&[key(1)]).await.unwrap_err();
    assert_eq!((error.fault, error.retry_after), (CdnFault::RateLimited, Some(Duration::from_secs(3))));
    assert_eq!(error.to_string(), "storing and deleting keys: 429 10 calls a second");
    assert!(!format!("{error:?} {cdn:?}").contains(TOKEN));
}

#[tokio::test]
async fn health_says_what_is_missing() {
    for (mode, body, fault) in [
        (DeliveryMode::Push, r#"{"status":"ok","capabilities":["tags"]}"#, CdnFault::Invalid),
        (DeliveryMode::Pull, r#"{"status":"ok","capabilities":["store"]}"#, CdnFault::Invalid),
        (DeliveryMode::Pull, r#"{"status":"degraded","capabilities":["tags"]}"#, CdnFault::Away),
        (DeliveryMode::Pull, "<html>", CdnFault::Invalid),
    ] {
        let server = Server::but(move |_| Some(body.into_response())).await;
        let error = server.cdn(mode).health().await.unwrap_err();
        assert_eq!(error.fault, fault, "{error}");
    }
    let server = Server::but(|_| None).await;
    server.cdn(DeliveryMode::Push).health().await.unwrap();
}

#[test]
fn an_address_is_that_of_an_api_and_is_not_shown_if_it_is_not() {
    for bad in ["agent:8080", "ftp://agent/", "http://me:secret@agent/", "http://agent/?key=secret"] {
        let error = CustomCdn::new(settings(bad), DeliveryMode::Pull, edge("http://127.0.0.1")).unwrap_err();
        assert!(error.fault == CdnFault::Invalid && !error.what.contains("secret"), "{error}");
    }
}
