//! Fastly's API, as far as the connector and the Fastly CLI call it, with the limits that Fastly documents: batches of
//! 1,000, dictionaries of 1,000 items, values of 8,000 characters, 256 surrogate keys a purge, 1,000 writes an hour
//! (purges are not among them), versions that are locked once they were active.
//!
//! Deliberately absent: the edge (`fastly_edge.rs` runs what is active here), and everything else that a service has.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::response::Response;
use http::{HeaderMap, Method, Request, StatusCode};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::served::{Answers, Served};
use super::vcl::Program;

pub const SERVICE: &str = "SU1Z0isxPaozGVKXdv0eY";
pub const TOKEN: &str = "d3cafb4dde4dbeef";
/// 1,800,000,000 seconds since 1970: the time at which this API lives, and two minutes before its hour ends.
const DATE: &str = "Fri, 15 Jan 2027 08:00:00 GMT";
const RESET: &str = "1800000120";
const ITEMS_PER_BATCH: usize = 1_000;
const ITEMS_PER_DICTIONARY: usize = 1_000;
const MAX_KEY_LEN: usize = 256;
const MAX_VALUE_LEN: usize = 8_000;
const TAGS_PER_PURGE: usize = 256;

#[derive(Debug, Clone)]
pub struct Snippet {
    pub name: String,
    pub place: String,
    pub priority: String,
    pub dynamic: String,
    pub content: String,
}

#[derive(Debug, Clone)]
pub struct Dictionary {
    pub id: String,
    pub name: String,
    pub is_private: bool,
}

#[derive(Debug, Clone)]
pub struct Version {
    pub number: u64,
    pub is_active: bool,
    pub is_locked: bool,
    pub snippets: Vec<Snippet>,
    pub dictionaries: Vec<Dictionary>,
}

/// An answer in a cache.
#[derive(Debug, Clone)]
pub struct Kept {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

/// One account with one service.
#[derive(Debug)]
pub struct Account {
    pub versions: Vec<Version>,
    /// By dictionary ID.
    pub items: HashMap<String, BTreeMap<String, String>>,
    pub purged_tags: Vec<String>,
    pub purged_urls: Vec<String>,
    pub writes_left: u32,
    /// What the token may do, and for which services.
    pub scope: String,
    pub services: Vec<String>,
    /// Method and path of each call.
    pub calls: Vec<String>,
    /// What POPs keep of the origin's answers, by path and query.
    pub kept: HashMap<String, Kept>,
    /// What POPs answer; by default nobody is asked.
    pub pops: Value,
}

type Answered = Result<Value, (u16, Value)>;

fn no(status: u16, msg: &str, detail: impl Into<String>) -> Answered {
    Err((status, json!({"msg": msg, "detail": detail.into()})))
}

/// The running API.
pub struct Stub {
    pub account: Arc<Mutex<Account>>,
    pub server: Served,
}

#[derive(Clone)]
struct Api(Arc<Mutex<Account>>);

impl Stub {
    /// With version 1 active: a backend and nothing of the shield's.
    pub fn start() -> Self {
        let version = Version {
            number: 1,
            is_active: true,
            is_locked: true,
            snippets: Vec::new(),
            dictionaries: Vec::new(),
        };
        let account = Arc::new(Mutex::new(Account {
            versions: vec![version],
            items: HashMap::new(),
            purged_tags: Vec::new(),
            purged_urls: Vec::new(),
            writes_left: 1_000,
            scope: "global".into(),
            services: Vec::new(),
            calls: Vec::new(),
            kept: HashMap::new(),
            pops: json!([]),
        }));
        Self { server: Served::start(Api(account.clone())), account }
    }

    pub fn active(&self) -> Version {
        self.account.lock().versions.iter().find(|version| version.is_active).unwrap().clone()
    }

    /// The items of a dictionary of the active version.
    pub fn items(&self, name: &str) -> BTreeMap<String, String> {
        let id = self.active().dictionaries.into_iter().find(|it| it.name == name).map(|it| it.id).unwrap();
        self.account.lock().items[&id].clone()
    }

    /// The calls since the last time.
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.account.lock().calls)
    }
}

impl Answers for Api {
    fn answer(&self, request: Request<Bytes>) -> Response {
        let mut account = self.0.lock();
        let (status, body) = match account.answer(&request) {
            Ok(body) => (200, body),
            Err((status, body)) => (status, body),
        };
        Response::builder()
            .status(StatusCode::from_u16(status).unwrap())
            .header("content-type", "application/json")
            .header("date", DATE)
            .header("fastly-ratelimit-remaining", account.writes_left.to_string())
            .header("fastly-ratelimit-reset", RESET)
            .body(Body::from(body.to_string()))
            .unwrap()
    }
}

impl Account {
    fn answer(&mut self, request: &Request<Bytes>) -> Answered {
        let (method, path) = (request.method(), request.uri().path().to_owned());
        self.calls.push(format!("{method} {path}"));
        if request.headers().get("fastly-key").is_none_or(|token| token.as_bytes() != TOKEN.as_bytes()) {
            return Err((401, json!({"msg": "Provided credentials are missing or invalid"})));
        }
        let parts: Vec<&str> = path.trim_start_matches('/').splitn(2, '/').collect();
        let is_purge = path.starts_with("/purge/") || path == format!("/service/{SERVICE}/purge");
        if method != Method::GET && !is_purge {
            if self.scope != "global" {
                return no(403, "You are not authorized to perform this action", "");
            }
            if self.writes_left == 0 {
                return no(429, "You have exceeded your hourly rate limit", "");
            }
            self.writes_left -= 1;
        }
        match (method.as_str(), parts[0]) {
            ("GET", "tokens") => {
                Ok(json!({"scope": self.scope, "services": self.services, "name": "shield"}))
            }
            ("GET", "content") => Ok(self.pops.clone()),
            ("POST", "purge") => {
                self.purged_urls
                    .push(request.uri().path_and_query().unwrap().as_str()["/purge/".len()..].to_owned());
                Ok(json!({"status": "ok", "id": "108-1391560174-974124"}))
            }
            (_, "service")
                if path == format!("/service/{SERVICE}/details") || path == format!("/service/{SERVICE}") =>
            {
                let versions: Vec<_> = self.versions.iter().map(Version::json).collect();
                Ok(json!({"id": SERVICE, "name": "shield", "type": "vcl", "versions": versions}))
            }
            (_, "service") => {
                let Some(rest) = parts.get(1).and_then(|rest| rest.strip_prefix(SERVICE)) else {
                    return no(404, "Record not found", "Cannot load service");
                };
                let parts: Vec<&str> = rest.trim_start_matches('/').split('/').collect();
                self.of_service(method, &parts, request)
            }
            _ => no(404, "Record not found", path),
        }
    }

    fn of_service(&mut self, method: &Method, parts: &[&str], request: &Request<Bytes>) -> Answered {
        match (method.as_str(), parts) {
            ("POST", ["purge"]) => self.purge(request.headers()),
            ("POST", ["purge", tag]) => {
                self.purged_tags.push((*tag).to_owned());
                Ok(json!({"status": "ok", "id": "108-1391560174-974124"}))
            }
            (_, ["dictionary", id, rest @ ..]) => self.of_dictionary(method, id, rest, request),
            ("GET", ["version"]) => Ok(self.versions.iter().map(Version::json).collect()),
            (_, ["version", number, rest @ ..]) => {
                let number: u64 = number.parse().unwrap_or_default();
                let Some(at) = self.versions.iter().position(|version| version.number == number) else {
                    return no(404, "Record not found", "Cannot find version");
                };
                self.of_version(method, at, rest, request)
            }
            _ => no(404, "Record not found", parts.join("/")),
        }
    }

    fn purge(&mut self, headers: &HeaderMap) -> Answered {
        let tags = headers.get("surrogate-key").and_then(|tags| tags.to_str().ok()).unwrap_or_default();
        let tags: Vec<_> = tags.split_whitespace().map(str::to_owned).collect();
        if tags.is_empty() || tags.len() > TAGS_PER_PURGE || headers.contains_key("fastly-soft-purge") {
            return no(400, "Bad request", format!("{} surrogate keys", tags.len()));
        }
        let ids: BTreeMap<_, _> = tags.iter().map(|tag| (tag.clone(), "108-1391560174-974124")).collect();
        let is_tagged = |kept: &Kept| {
            let of = kept.headers.get("surrogate-key").map(String::as_str).unwrap_or_default();
            of.split_whitespace().any(|tag| tags.iter().any(|purged| purged == tag))
        };
        self.kept.retain(|_, kept| !is_tagged(kept));
        self.purged_tags.extend(tags);
        Ok(json!(ids))
    }

    fn of_dictionary(
        &mut self,
        method: &Method,
        id: &str,
        rest: &[&str],
        request: &Request<Bytes>,
    ) -> Answered {
        let is_private = self
            .versions
            .iter()
            .flat_map(|version| &version.dictionaries)
            .any(|it| it.id == id && it.is_private);
        let Some(items) = self.items.get_mut(id) else {
            return no(404, "Record not found", "Cannot find dictionary");
        };
        let json = |key: &str, value: &str| {
            json!({"service_id": SERVICE, "dictionary_id": id, "item_key": key, "item_value": value,
                "created_at": "2027-01-15T08:00:00Z", "updated_at": "2027-01-15T08:00:00Z", "deleted_at": null})
        };
        match (method.as_str(), rest) {
            ("GET", ["items"] | ["item", _]) if is_private => {
                no(403, "You may not read a private dictionary", "")
            }
            ("GET", ["items"]) => {
                let query = fields(request.uri().query().unwrap_or_default());
                let number =
                    |name: &str, otherwise| query.get(name).map_or(otherwise, |n| n.parse().unwrap());
                let (page, per_page): (usize, usize) = (number("page", 1), number("per_page", 100));
                Ok(items.iter().skip((page - 1) * per_page).take(per_page).map(|(k, v)| json(k, v)).collect())
            }
            ("PATCH", ["items"]) => {
                let batch: Value = serde_json::from_slice(request.body()).unwrap_or_default();
                let Some(batch) = batch["items"].as_array() else { return no(400, "Bad request", "items") };
                if batch.len() > ITEMS_PER_BATCH {
                    return no(400, "You can't have more than 1000 items in one batch operation", "");
                }
                // All of a batch, or nothing of it.
                let mut after = items.clone();
                for change in batch {
                    let text = |name: &str| change[name].as_str().unwrap_or_default();
                    changed(&mut after, text("op"), text("item_key"), text("item_value"))?;
                }
                *items = after;
                Ok(json!({"status": "ok"}))
            }
            ("POST", ["item"]) => {
                let fields = fields(&String::from_utf8_lossy(request.body()));
                let text = |name: &str| fields.get(name).map(String::as_str).unwrap_or_default();
                changed(items, "create", text("item_key"), text("item_value"))?;
                Ok(json(text("item_key"), text("item_value")))
            }
            ("GET", ["item", key]) => match items.get(*key) {
                Some(value) => Ok(json(key, value)),
                None => no(404, "Record not found", "Cannot find dictionary item"),
            },
            ("DELETE", ["item", key]) => match items.remove(*key) {
                Some(_) => Ok(json!({"status": "ok"})),
                None => no(404, "Record not found", "Cannot find dictionary item"),
            },
            _ => no(404, "Record not found", rest.join("/")),
        }
    }

    fn of_version(
        &mut self,
        method: &Method,
        at: usize,
        rest: &[&str],
        request: &Request<Bytes>,
    ) -> Answered {
        let next = self.versions.iter().map(|version| version.number).max().unwrap_or_default() + 1;
        if let ("PUT", ["clone"]) = (method.as_str(), rest) {
            let clone =
                Version { number: next, is_active: false, is_locked: false, ..self.versions[at].clone() };
            self.versions.push(clone.clone());
            return Ok(clone.json());
        }
        if let ("PUT", ["activate"]) = (method.as_str(), rest) {
            if let Err(why) = self.versions[at].program() {
                return no(400, "Bad request", why);
            }
            self.versions.iter_mut().for_each(|version| version.is_active = false);
            let version = &mut self.versions[at];
            (version.is_active, version.is_locked) = (true, true);
            return Ok(version.json());
        }
        let version = &mut self.versions[at];
        if method != Method::GET && version.is_locked {
            return no(
                422,
                "Version is locked",
                format!("Version {} is locked and cannot be changed", version.number),
            );
        }
        let fields = fields(&String::from_utf8_lossy(request.body()));
        let text = |name: &str| fields.get(name).cloned().unwrap_or_default();
        match (method.as_str(), rest) {
            ("GET", []) => Ok(version.json()),
            ("GET", ["validate"]) => Ok(match version.program() {
                Ok(_) => json!({"status": "ok", "msg": null, "errors": [], "messages": [], "warnings": []}),
                Err(why) => {
                    json!({"status": "error", "msg": why, "errors": [], "messages": [], "warnings": []})
                }
            }),
            ("GET", ["snippet"]) => Ok(version.snippets.iter().map(|it| it.json(version.number)).collect()),
            ("POST", ["snippet"]) => {
                if version.snippets.iter().any(|snippet| snippet.name == text("name")) {
                    return no(409, "Duplicate record", format!("Duplicate snippet: '{}'", text("name")));
                }
                let snippet = Snippet {
                    name: text("name"),
                    place: text("type"),
                    priority: text("priority"),
                    dynamic: text("dynamic"),
                    content: text("content"),
                };
                version.snippets.push(snippet.clone());
                Ok(snippet.json(version.number))
            }
            (_, ["snippet", name]) => {
                let Some(found) = version.snippets.iter().position(|snippet| snippet.name == *name) else {
                    return no(404, "Record not found", format!("Couldn't find snippet '{name}'"));
                };
                if method == Method::DELETE {
                    version.snippets.remove(found);
                    return Ok(json!({"status": "ok"}));
                }
                let snippet = &mut version.snippets[found];
                if method == Method::PUT {
                    (snippet.place, snippet.priority, snippet.content) =
                        (text("type"), text("priority"), text("content"));
                }
                Ok(snippet.json(version.number))
            }
            ("GET", ["dictionary"]) => {
                Ok(version.dictionaries.iter().map(|it| it.json(version.number)).collect())
            }
            ("POST", ["dictionary"]) => {
                let id = format!("dict{next}n{}", version.dictionaries.len());
                let made = Dictionary {
                    id: id.clone(),
                    name: text("name"),
                    is_private: text("write_only") == "true",
                };
                version.dictionaries.push(made.clone());
                self.items.insert(id, BTreeMap::new());
                Ok(made.json(next - 1))
            }
            _ => no(404, "Record not found", rest.join("/")),
        }
    }
}

fn changed(
    items: &mut BTreeMap<String, String>,
    op: &str,
    key: &str,
    value: &str,
) -> Result<(), (u16, Value)> {
    let bad = |detail: String| Err((400, json!({"msg": "Bad request", "detail": detail})));
    if key.is_empty() || key.len() > MAX_KEY_LEN || value.chars().count() > MAX_VALUE_LEN {
        return bad("Item key or value is too long".into());
    }
    match (op, items.contains_key(key)) {
        // As it was seen to answer to an update; to a deletion it may be kinder.
        ("update" | "delete", false) => return bad(format!("1 dictionary_item(s) for {op} not found")),
        ("create", true) => return bad(format!("Duplicate dictionary_item: '{key}'")),
        ("delete", true) => drop(items.remove(key)),
        ("create" | "update" | "upsert", _) => drop(items.insert(key.to_owned(), value.to_owned())),
        _ => return bad(format!("unknown op {op}")),
    }
    if items.len() > ITEMS_PER_DICTIONARY {
        return bad("Exceeding max dictionary items".into());
    }
    Ok(())
}

fn fields(form: &str) -> HashMap<String, String> {
    url::form_urlencoded::parse(form.as_bytes()).into_owned().collect()
}

impl Version {
    fn json(&self) -> Value {
        json!({"number": self.number, "active": self.is_active, "locked": self.is_locked, "service_id": SERVICE,
            "comment": "", "staging": false, "testing": false, "deployed": false,
            "created_at": "2027-01-15T08:00:00Z", "updated_at": "2027-01-15T08:00:00Z", "deleted_at": null})
    }

    /// What Fastly would compile of it.
    pub fn program(&self) -> Result<Program, String> {
        let mut snippets: Vec<_> = self.snippets.iter().collect();
        snippets.sort_by_key(|snippet| snippet.priority.parse::<u32>().unwrap_or(100));
        let at = |place: &str| -> Vec<String> {
            snippets.iter().filter(|it| it.place == place).map(|it| it.content.clone()).collect()
        };
        let names: Vec<_> = self.dictionaries.iter().map(|it| it.name.clone()).collect();
        let hooks = ["recv", "error", "fetch"].map(|place| at(place).join("\n"));
        Program::new(&at("init"), hooks.each_ref().map(String::as_str), &names)
    }
}

impl Snippet {
    fn json(&self, version: u64) -> Value {
        json!({"id": format!("id-{}", self.name), "name": self.name, "type": self.place, "priority": self.priority,
            "dynamic": self.dynamic, "content": self.content, "service_id": SERVICE, "version": version.to_string(),
            "created_at": "2027-01-15T08:00:00Z", "updated_at": "2027-01-15T08:00:00Z", "deleted_at": null})
    }
}

impl Dictionary {
    fn json(&self, version: u64) -> Value {
        json!({"id": self.id, "name": self.name, "write_only": self.is_private, "service_id": SERVICE,
            "version": version, "created_at": "2027-01-15T08:00:00Z", "updated_at": "2027-01-15T08:00:00Z",
            "deleted_at": null})
    }
}
