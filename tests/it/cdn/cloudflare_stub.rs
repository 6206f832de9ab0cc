//! A stub of those calls of Cloudflare's API that the connector makes, within the limits that Cloudflare documents.
//!
//! Pairs lie in memory, or in the KV of a workerd (`cloudflare_workerd.rs`). It is judged by Cloudflare's own Python
//! client (`tests/tools/cloudflare_client.py`). The numbers of its errors are Cloudflare's where they are known to be;
//! 1 stands for those that are not. Quotas fill up again with real time, so tests give them few calls.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use parking_lot::Mutex;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::cloudflare_workerd::Namespace;

pub const ACCOUNT: &str = "a0000000000000000000000000000001";
pub const NAMESPACE: &str = "b0000000000000000000000000000002";
pub const ZONE: &str = "c0000000000000000000000000000003";
/// What the token may do, in full.
pub const ALL: &[&str] = &["kv:edit", "purge", "zone:read"];

/// All of a request; of one pair; of a name.
const MAX_BODY_BYTES: usize = 100_000_000;
const MAX_VALUE_BYTES: usize = 25 << 20;
const MAX_NAME_BYTES: usize = 512;
const MAX_PAIRS: usize = 10_000;
const MAX_PURGED: usize = 100;
const MAX_PREFIXES: usize = 30;

/// So many calls in a time, counted over a window that moves.
struct Quota {
    name: &'static str,
    calls: usize,
    window: Duration,
    made: VecDeque<Instant>,
}

impl Quota {
    fn new(name: &'static str, calls: usize, secs: u64) -> Self {
        Self { name, calls, window: Duration::from_secs(secs), made: VecDeque::new() }
    }

    /// Whether one more call is within it.
    fn take(&mut self, now: Instant) -> bool {
        while self.made.front().is_some_and(|first| now - *first >= self.window) {
            self.made.pop_front();
        }
        let has_room = self.made.len() < self.calls;
        if has_room {
            self.made.push_back(now);
        }
        has_room
    }

    fn secs_until_more(&self, now: Instant) -> u64 {
        let first = self.made.front().map_or(now, |first| *first);
        (self.window - (now - first)).as_secs_f64().ceil() as u64
    }
}

/// What a call is answered with.
type Answered = Result<Value, (u16, u32, String)>;

fn refused(status: u16, code: u32, message: &str) -> Answered {
    Err((status, code, message.to_owned()))
}

pub enum Pairs {
    Memory(BTreeMap<String, String>),
    Workerd(Namespace),
}

/// What tests look at and change.
pub struct Account {
    pub tokens: BTreeMap<String, &'static [&'static str]>,
    /// A token that belongs to the account, and is no user's.
    pub account_token: Option<String>,
    pub token_status: &'static str,
    pub pairs: Pairs,
    /// Bodies of purges that were taken.
    pub purges: Vec<Value>,
    /// Method and path of each call.
    pub calls: Vec<String>,
    /// So many pairs of the next bulk call are left out of it.
    pub leave_out: usize,
    /// Answers what is no envelope, as a proxy in between does.
    pub broken: bool,
    /// Whether a 429 says when to come again by Retry-After, or by its quotas alone.
    pub says_retry_after: bool,
    written: BTreeMap<String, Instant>,
    all_calls: Quota,
    all_purges: Quota,
}

impl Account {
    fn new(pairs: Pairs) -> Self {
        Self {
            tokens: BTreeMap::from([("good".to_owned(), ALL)]),
            account_token: None,
            token_status: "active",
            pairs,
            purges: Vec::new(),
            calls: Vec::new(),
            leave_out: 0,
            broken: false,
            says_retry_after: true,
            written: BTreeMap::new(),
            all_calls: Quota::new("default", 1_200, 300),
            // The Free plan's 5 a minute, of which 25 may come at once.
            all_purges: Quota::new("purge", 25, 300),
        }
    }

    pub fn allow_calls(&mut self, calls: usize) {
        self.all_calls = Quota::new("default", calls, 300);
    }

    pub fn allow_purges(&mut self, calls: usize) {
        self.all_purges = Quota::new("purge", calls, 60);
    }

    pub fn pair(&self, name: &str) -> Option<String> {
        match &self.pairs {
            Pairs::Memory(pairs) => pairs.get(name).cloned(),
            Pairs::Workerd(namespace) => namespace.get(name),
        }
    }

    fn put(&mut self, new: &[(String, String)]) {
        match &mut self.pairs {
            Pairs::Memory(pairs) => pairs.extend(new.iter().cloned()),
            Pairs::Workerd(namespace) => namespace.put(new),
        }
    }

    fn delete(&mut self, names: &[String]) {
        match &mut self.pairs {
            Pairs::Memory(pairs) => names.iter().for_each(|name| drop(pairs.remove(name))),
            Pairs::Workerd(namespace) => namespace.delete(names),
        }
    }

    fn answered(&mut self, method: &str, path: &str, token: Option<&str>, body: &[u8]) -> Answered {
        let now = Instant::now();
        self.calls.push(format!("{method} {path}"));
        let Some(token) = token else { return refused(400, 6003, "Invalid request headers") };
        if !self.all_calls.take(now) {
            return refused(429, 971, "Please wait and consider throttling your request speed");
        }
        let Some(path) = path.strip_prefix("/client/v4/") else { return no_route(path) };
        let parts: Vec<_> = path.split('/').collect();
        let named = |id: &str, expected: &str| if id == expected { Ok(()) } else { no_route(path).map(drop) };
        match (method, &parts[..]) {
            ("GET", ["user", "tokens", "verify"]) => match self.tokens.contains_key(token) {
                true => Ok(json!({"id": "d0", "status": self.token_status})),
                false => refused(401, 1000, "Invalid API Token"),
            },
            ("GET", ["accounts", account, "tokens", "verify"]) => {
                named(account, ACCOUNT)?;
                match self.account_token.as_deref() == Some(token) {
                    true => Ok(json!({"id": "d1", "status": self.token_status})),
                    false => refused(401, 1000, "Invalid API Token"),
                }
            }
            ("GET", ["zones", zone]) => {
                self.may(token, "zone:read")?;
                named(zone, ZONE)?;
                Ok(json!({"id": ZONE, "name": "cdn.example", "status": "active"}))
            }
            ("POST", ["zones", zone, "purge_cache"]) => {
                self.may(token, "purge")?;
                named(zone, ZONE)?;
                self.purge(now, body)
            }
            (method, ["accounts", account, "storage", "kv", "namespaces", namespace, rest @ ..]) => {
                self.may(token, "kv:edit")?;
                named(account, ACCOUNT)?;
                if *namespace != NAMESPACE {
                    return refused(404, 10013, "namespace not found");
                }
                self.stored(now, method, rest, body)
            }
            _ => no_route(path),
        }
    }

    fn may(&self, token: &str, what: &str) -> Result<(), (u16, u32, String)> {
        let is_the_accounts = self.account_token.as_deref() == Some(token);
        let may = is_the_accounts || self.tokens.get(token).is_some_and(|all| all.contains(&what));
        if may { Ok(()) } else { refused(403, 10000, "Authentication error").map(drop) }
    }

    fn stored(&mut self, now: Instant, method: &str, rest: &[&str], body: &[u8]) -> Answered {
        let text = || String::from_utf8(body.to_vec()).map_err(|_| (400, 1, "not text".to_owned()));
        match (method, rest) {
            ("GET", []) => Ok(json!({"id": NAMESPACE, "title": "keyshield", "supports_url_encoding": true})),
            ("GET", ["values", name]) => match self.pair(&decoded(name)) {
                Some(value) => Ok(Value::String(value)),
                None => refused(404, 10009, "key not found"),
            },
            ("PUT", ["values", name]) => {
                let pair = (decoded(name), text()?);
                self.write(now, &[pair])?;
                Ok(json!({}))
            }
            ("PUT", ["bulk"]) => {
                let given: Vec<Value> = parsed(body)?;
                let field = |pair: &Value, name: &str| pair[name].as_str().map(str::to_owned);
                let pair = |pair| field(pair, "key").zip(field(pair, "value"));
                let pairs: Option<Vec<_>> = given.iter().map(pair).collect();
                let pairs = pairs.ok_or((400, 1, "a pair has a key and a value".to_owned()))?;
                self.bulk(pairs, |account, pairs| account.write(now, pairs), |pair| pair.0.clone())
            }
            ("POST", ["bulk", "delete"]) | ("DELETE", ["bulk"]) => {
                let names: Vec<String> = parsed(body)?;
                let delete = |account: &mut Self, names: &[String]| {
                    account.delete(names);
                    Ok(())
                };
                self.bulk(names, delete, Clone::clone)
            }
            _ => no_route(&rest.join("/")),
        }
    }

    fn bulk<T>(
        &mut self,
        mut all: Vec<T>,
        does: impl Fn(&mut Self, &[T]) -> Result<(), (u16, u32, String)>,
        name: impl Fn(&T) -> String,
    ) -> Answered {
        if all.is_empty() || all.len() > MAX_PAIRS {
            return refused(400, 1, "a bulk call has 1 to 10,000 pairs");
        }
        let left = all.split_off(all.len() - std::mem::take(&mut self.leave_out).min(all.len()));
        does(self, &all)?;
        let left: Vec<_> = left.iter().map(name).collect();
        Ok(json!({"successful_key_count": all.len(), "unsuccessful_keys": left}))
    }

    fn write(&mut self, now: Instant, pairs: &[(String, String)]) -> Result<(), (u16, u32, String)> {
        for (name, value) in pairs {
            let is_name = !name.is_empty() && name.len() <= MAX_NAME_BYTES && name != "." && name != "..";
            if !is_name || value.len() > MAX_VALUE_BYTES {
                return refused(400, 1, "a name has 1 to 512 bytes, a value up to 25 MiB").map(drop);
            }
            let last = self.written.insert(name.clone(), now);
            if last.is_some_and(|last| now - last < Duration::from_secs(1)) {
                return refused(429, 1, "one write a second for the same key").map(drop);
            }
        }
        self.put(pairs);
        Ok(())
    }

    fn purge(&mut self, now: Instant, body: &[u8]) -> Answered {
        let asked: BTreeMap<String, Vec<String>> = parsed(body)?;
        let Some((kind, items)) = asked.first_key_value().filter(|_| asked.len() == 1) else {
            return refused(400, 1, "one of files, tags, hosts and prefixes");
        };
        let (max, is_one): (usize, fn(&str) -> bool) = match kind.as_str() {
            "tags" => (MAX_PURGED, |tag| !tag.is_empty() && tag.len() <= 1_024 && !tag.contains([' ', ','])),
            "files" => (MAX_PURGED, |file| url::Url::parse(file).is_ok_and(|url| url.has_host())),
            "prefixes" => (MAX_PREFIXES, |prefix| !prefix.contains("://") && !prefix.starts_with('/')),
            _ => return refused(400, 1, "no such kind of purge"),
        };
        if items.is_empty() || items.len() > max || !items.iter().all(|item| is_one(item)) {
            return refused(400, 1, &format!("{kind}: 1 to {max} of them, each of its form"));
        }
        if !self.all_purges.take(now) {
            return refused(429, 1134, "Unable to purge, rate limit reached");
        }
        self.purges.push(json!({ kind.as_str(): items }));
        Ok(json!({"id": ZONE}))
    }

    fn headers(&self, answered: &Answered) -> Vec<(&'static str, String)> {
        let now = Instant::now();
        let quotas = [&self.all_calls, &self.all_purges];
        let of = |made: &dyn Fn(&Quota) -> String| quotas.map(made).join(", ");
        let left = of(&|q| format!("{:?};r={};t={}", q.name, q.calls - q.made.len(), q.secs_until_more(now)));
        let policy = of(&|q| format!("{:?};q={};w={}", q.name, q.calls, q.window.as_secs()));
        let mut headers = vec![("ratelimit", left), ("ratelimit-policy", policy)];
        if self.says_retry_after
            && let Err((429, code, _)) = answered
        {
            let secs = match code {
                971 => self.all_calls.secs_until_more(now),
                1134 => self.all_purges.secs_until_more(now),
                _ => 1,
            };
            headers.push(("retry-after", secs.to_string()));
        }
        headers
    }
}

fn no_route(path: &str) -> Answered {
    let message = format!("Could not route to /client/v4/{path}, perhaps your object identifier is invalid?");
    refused(404, 7003, &message)
}

fn decoded(name: &str) -> String {
    percent_decode_str(name).decode_utf8_lossy().into_owned()
}

fn parsed<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, (u16, u32, String)> {
    serde_json::from_slice(body).map_err(|error| (400, 1, error.to_string()))
}

/// A running stub, stopped when dropped.
pub struct Stub {
    pub url: String,
    account: Arc<Mutex<Account>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Stub {
    pub fn start(pairs: Pairs) -> Self {
        let account = Arc::new(Mutex::new(Account::new(pairs)));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let router = Router::new().fallback(answer).with_state(account.clone());
        let serve = async move {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let stopped = async move { drop(stopped.await) };
            axum::serve(listener, router).with_graceful_shutdown(stopped).await.unwrap();
        };
        let thread = std::thread::spawn(move || super::run(serve));
        Self { url, account, stop: Some(stop), thread: Some(thread) }
    }

    pub fn in_memory() -> Self {
        Self::start(Pairs::Memory(BTreeMap::new()))
    }

    pub fn account(&self) -> parking_lot::MutexGuard<'_, Account> {
        self.account.lock()
    }

    /// The calls since it was asked last.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.account().calls)
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(ended.is_none_or(|ended| ended.is_ok()) || std::thread::panicking(), "the stub broke");
    }
}

async fn answer(State(account): State<Arc<Mutex<Account>>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let Ok(body) = to_bytes(body, MAX_BODY_BYTES).await else {
        return Response::builder().status(413).body(Body::empty()).unwrap();
    };
    let authorization = head.headers.get("authorization").and_then(|value| value.to_str().ok());
    let token = authorization.and_then(|value| value.strip_prefix("Bearer "));
    let mut account = account.lock();
    if account.broken {
        return Response::builder().status(502).body("<html>Bad gateway</html>".into()).unwrap();
    }
    let answered = account.answered(head.method.as_str(), head.uri.path(), token, &body);
    let mut response = Response::builder().header("content-type", "application/json");
    for (name, value) in account.headers(&answered) {
        response = response.header(name, value);
    }
    let (status, envelope) = match answered {
        // A pair's value comes bare.
        Ok(Value::String(value)) => return response.body(value.into()).unwrap(),
        Ok(result) => (200, json!({"success": true, "errors": [], "messages": [], "result": result})),
        Err((status, code, message)) => {
            let errors = [json!({"code": code, "message": message})];
            (status, json!({"success": false, "errors": errors, "messages": [], "result": null}))
        }
    };
    response.status(status).body(envelope.to_string().into()).unwrap()
}
