//! An agent: the API of `docs/custom-cdn.openapi.yaml` before some cache, which a closure purges.
//!
//! It is what docs/cdn-custom.md asks of an operator, and what `schemathesis` holds against the document. [`AgentHandle`]
//! counts its calls and makes it misbehave (`switches.rs`). In push mode it also is the edge that serves keys (`keys.rs`).
//!
//! Deliberately absent: a disk. What it holds ends with it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use http::StatusCode;
use http::header::{ALLOW, AUTHORIZATION, CONTENT_TYPE, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE};
use keyshield::keys::{EdgeSecret, KeyId};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::oneshot;

use super::keys::{self, Opened};
use super::switches::{Calls, Switches, Verdict};

/// The bearer token of every agent of the tests.
pub const TOKEN: &str = "agent-of-the-tests";
const MAX_ITEMS: usize = 100;
const MAX_BODY_BYTES: usize = 4 << 20;
/// Purges whose status is remembered, the newest.
const MAX_PURGES: usize = 10_000;
/// After which time a cache is looked through a second time: what it was fetching during the first may be kept by now.
const LOOKS_AGAIN_AFTER: Duration = Duration::from_millis(500);
const CAPABILITIES: [&str; 5] = ["tags", "paths", "prefixes", "batch", "store"];

/// What is to go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Purge {
    pub tags: Vec<String>,
    pub paths: Vec<String>,
    pub prefixes: Vec<String>,
}

/// Takes things out of a cache.
pub type Purger = Box<dyn Fn(&Purge) -> Result<(), String> + Send + Sync>;

/// All that an agent knows.
pub struct Agent {
    purger: Purger,
    secret: Option<EdgeSecret>,
    pub(super) switches: Switches,
    pub(super) calls: Calls,
    pub(super) stored: Mutex<BTreeMap<String, String>>,
    pub(super) purged: Mutex<Vec<Purge>>,
    pub(super) capabilities: Mutex<BTreeSet<&'static str>>,
    /// How far each purge that was accepted is, by its number.
    accepted: Mutex<BTreeMap<usize, PurgeStatus>>,
}

/// A running agent. Stops when dropped.
pub struct AgentHandle {
    pub(super) agent: Arc<Agent>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AgentHandle {
    /// On a free port of loopback. With a secret, it serves the keys that it holds.
    pub fn start(secret: Option<EdgeSecret>, purger: Purger) -> Self {
        let agent = Arc::new(Agent {
            purger,
            secret,
            switches: Switches::default(),
            calls: Calls::default(),
            stored: Mutex::default(),
            purged: Mutex::default(),
            capabilities: Mutex::new(CAPABILITIES.into()),
            accepted: Mutex::default(),
        });
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let app = router(Arc::clone(&agent));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let served = axum::serve(listener, app).into_future();
                // Whoever is still waiting for an answer gets none.
                tokio::select! { _ = served => {}, _ = stopped => {} }
            });
        });
        Self { agent, address, stop: Some(stop), thread: Some(thread) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for AgentHandle {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An error of the API.
pub struct Problem(StatusCode, String);

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self(status, detail.into())
    }

    fn unprocessable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "type": "about:blank",
            "title": self.0.canonical_reason(),
            "status": self.0.as_u16(),
            "detail": self.1,
        });
        (self.0, [(CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

type Answer<T = StatusCode> = Result<T, Problem>;
type Known = State<Arc<Agent>>;

fn router(agent: Arc<Agent>) -> Router {
    let api = Router::new()
        .route("/healthz", get(health).fallback(not_allowed("GET, HEAD")))
        .route("/v1/keys/batch", post(batch).fallback(not_allowed("POST")))
        .route(
            "/v1/keys/{key}",
            put(store).get(check_value).delete(forget).fallback(not_allowed("PUT, GET, HEAD, DELETE")),
        )
        .route("/v1/purge", post(purge).fallback(not_allowed("POST")))
        .route("/v1/purges/{purge}", get(purge_status).fallback(not_allowed("GET, HEAD")))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(Arc::clone(&agent), admit));
    let edge = Router::new()
        .route("/api/hls/keys/{key}", get(edge_key))
        .route("/api/hls/keys/{key}/check", get(edge_check));
    api.merge(edge)
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "there is no such thing") })
        .with_state(agent)
}

fn not_allowed(allowed: &'static str) -> axum::routing::MethodRouter<Arc<Agent>> {
    let refuse = move || async move {
        let detail = format!("{allowed} alone");
        ([(ALLOW, allowed)], Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)).into_response()
    };
    axum::routing::any(refuse)
}

/// Counts, misbehaves as it is told, and lets in who has the token.
async fn admit(State(agent): Known, request: Request, next: Next) -> Response {
    let called = format!("{} {}", request.method(), request.uri().path());
    let verdict = agent.switches.judge();
    if let Some(slow) = agent.switches.slowness() {
        tokio::time::sleep(slow).await;
    }
    let response = match verdict {
        Verdict::Serve => match is_known(&request) {
            true => next.run(request).await,
            false => {
                let problem = Problem::new(StatusCode::UNAUTHORIZED, "a bearer token, please");
                ([(WWW_AUTHENTICATE, "Bearer")], problem).into_response()
            }
        },
        Verdict::Fail(status) => Problem::new(status, "it is told to fail").into_response(),
        Verdict::TooMany(wait) => {
            let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "too many calls");
            ([(RETRY_AFTER, wait.as_secs_f64().ceil().to_string())], problem).into_response()
        }
    };
    agent.calls.note(called, response.status().as_u16());
    response
}

fn is_known(request: &Request) -> bool {
    let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    given == Some(&format!("Bearer {TOKEN}"))
}

impl Agent {
    fn can(&self, capability: &str) -> bool {
        self.capabilities.lock().contains(capability)
    }

    fn must(&self, capability: &str, wanted: bool) -> Answer<()> {
        if wanted && !self.can(capability) {
            return Err(Problem::unprocessable(format!("this CDN knows no {capability}")));
        }
        Ok(())
    }

    fn must_store(&self) -> Answer<()> {
        match self.can("store") {
            true => Ok(()),
            false => Err(Problem::new(StatusCode::NOT_IMPLEMENTED, "this CDN holds no keys")),
        }
    }
}

async fn health(State(agent): Known) -> Json<serde_json::Value> {
    Json(json!({ "status": "ok", "capabilities": *agent.capabilities.lock() }))
}

#[derive(Deserialize)]
struct SealedBody {
    sealed: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BatchedKey {
    key_id: String,
    sealed: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Batch {
    put: Vec<BatchedKey>,
    delete: Vec<String>,
}

fn key_id(text: &str) -> Answer<KeyId> {
    text.parse().map_err(|error| Problem::unprocessable(format!("{text}: {error}")))
}

/// What of a sealed key can be seen without the secret.
fn is_sealed(text: &str) -> Answer<()> {
    let parts: Vec<_> = text.split(':').collect();
    let is_hex = |text: &str, lengths: &[usize]| {
        lengths.contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    match parts[..] {
        ["1", "ctr" | "hmac", stream, nonce, key, tag]
            if stream.parse::<keyshield::keys::StreamId>().is_ok()
                && is_hex(nonce, &[32])
                && is_hex(key, &[32, 64])
                && is_hex(tag, &[64]) =>
        {
            Ok(())
        }
        _ => Err(Problem::unprocessable("sealed is no sealed key")),
    }
}

async fn store(
    State(agent): Known,
    Path(key): Path<String>,
    body: Result<Json<SealedBody>, JsonRejection>,
) -> Answer {
    agent.must_store()?;
    let (key, Json(SealedBody { sealed })) = (key_id(&key)?, body?);
    is_sealed(&sealed)?;
    agent.stored.lock().insert(key.to_string(), sealed);
    Ok(StatusCode::NO_CONTENT)
}

async fn forget(State(agent): Known, Path(key): Path<String>) -> Answer {
    agent.must_store()?;
    agent.stored.lock().remove(&key_id(&key)?.to_string());
    Ok(StatusCode::NO_CONTENT)
}

async fn batch(State(agent): Known, body: Result<Json<Batch>, JsonRejection>) -> Answer {
    agent.must_store()?;
    if !agent.can("batch") {
        return Err(Problem::new(StatusCode::NOT_FOUND, "there are no batches here"));
    }
    let Json(Batch { put, delete }) = body?;
    if put.len() > MAX_ITEMS || delete.len() > MAX_ITEMS {
        return Err(Problem::unprocessable(format!("at most {MAX_ITEMS} keys")));
    }
    // All are looked at before any is stored.
    for key in &put {
        key_id(&key.key_id)?;
        is_sealed(&key.sealed)?;
    }
    delete.iter().try_for_each(|key| key_id(key).map(drop))?;
    let mut stored = agent.stored.lock();
    stored.extend(put.into_iter().map(|key| (key.key_id, key.sealed)));
    delete.iter().for_each(|key| drop(stored.remove(key)));
    Ok(StatusCode::NO_CONTENT)
}

async fn check_value(State(agent): Known, Path(key): Path<String>) -> Answer<Response> {
    let key = key_id(&key)?;
    match keys::open(&agent.stored, agent.secret.as_ref(), key) {
        Opened::Key(opened) => {
            let body = json!({ "keyId": key.to_string(), "checkValue": keys::check_value(key, &opened) });
            Ok(Json(body).into_response())
        }
        Opened::Missing => Err(Problem::new(StatusCode::NOT_FOUND, "there is no such key")),
        Opened::Sealed => Err(Problem::new(StatusCode::NOT_IMPLEMENTED, "the edge alone can open it")),
    }
}

#[derive(Clone, Serialize)]
struct PurgeStatus {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

async fn purge(State(agent): Known, body: Result<Json<Purge>, JsonRejection>) -> Answer<Response> {
    let Json(purge) = body?;
    agent.must("tags", !purge.tags.is_empty())?;
    agent.must("paths", !purge.paths.is_empty())?;
    agent.must("prefixes", !purge.prefixes.is_empty())?;
    for (what, items) in [("tags", &purge.tags), ("paths", &purge.paths), ("prefixes", &purge.prefixes)] {
        if items.len() > MAX_ITEMS || !items.iter().all(|item| is_plain(what, item)) {
            return Err(Problem::unprocessable(format!(
                "{what}: at most {MAX_ITEMS}, in the characters of URLs"
            )));
        }
    }
    take_out(&agent, &purge).await.map_err(|why| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, why))?;
    let number = {
        let mut accepted = agent.accepted.lock();
        let number = accepted.last_key_value().map_or(0, |(last, _)| last + 1);
        accepted.insert(number, PurgeStatus { status: "running", detail: None });
        if accepted.len() > MAX_PURGES {
            accepted.pop_first();
        }
        number
    };
    tokio::spawn(look_again(agent, number, purge));
    let location = format!("/v1/purges/{number}");
    let status = Json(PurgeStatus { status: "running", detail: None });
    Ok((StatusCode::ACCEPTED, [(LOCATION, location)], status).into_response())
}

async fn look_again(agent: Arc<Agent>, number: usize, purge: Purge) {
    let later = agent.switches.purges_take().unwrap_or_default().max(LOOKS_AGAIN_AFTER);
    tokio::time::sleep(later).await;
    let status = match take_out(&agent, &purge).await {
        Ok(()) => PurgeStatus { status: "done", detail: None },
        Err(why) => PurgeStatus { status: "failed", detail: Some(why) },
    };
    agent.purged.lock().push(purge);
    agent.accepted.lock().insert(number, status);
}

/// Asks or reads a cache, on a thread that nobody else is answered by.
async fn take_out(agent: &Arc<Agent>, purge: &Purge) -> Result<(), String> {
    if agent.switches.loses_purges() {
        return Ok(());
    }
    let (worker, given) = (Arc::clone(agent), purge.clone());
    tokio::task::spawn_blocking(move || (worker.purger)(&given)).await.unwrap()
}

/// What is in a URL, and in no pattern's or expression's way.
fn is_plain(what: &str, item: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte);
    let legal_in_path = |byte: u8| legal(byte) || b"/?!$&'()*+,;=@%".contains(&byte);
    match what {
        "tags" => !item.is_empty() && item.len() <= 256 && item.bytes().all(legal),
        _ => item.starts_with('/') && item.len() <= 8_192 && item.bytes().all(legal_in_path),
    }
}

async fn purge_status(State(agent): Known, Path(purge): Path<String>) -> Answer<Json<PurgeStatus>> {
    let accepted = agent.accepted.lock();
    let status = purge.parse().ok().and_then(|purge| accepted.get(&purge)).cloned();
    status.map(Json).ok_or_else(|| Problem::new(StatusCode::NOT_FOUND, "there is no such purge"))
}

async fn edge_key(State(agent): Known, Path(key): Path<String>, request: Request) -> Response {
    keys::answer(&agent.stored, agent.secret.as_ref(), &key, request.uri().query())
}

async fn edge_check(State(agent): Known, Path(key): Path<String>) -> Response {
    keys::answer_check(&agent.stored, agent.secret.as_ref(), &key)
}
