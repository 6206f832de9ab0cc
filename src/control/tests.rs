//! The routes as a whole: who is let in, what is refused and how, and that the description says so.

use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, Response};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::auth::Call;
use super::*;
use crate::clock::Clock;
use crate::hls::{BaseUrl, Mount, OriginPath};

/// An origin at which nothing but `/stream/playlist.m3u8` is HLS.
struct Origin;

#[async_trait::async_trait]
impl OriginProbe for Origin {
    async fn probe(&self, place: &OriginPath<'_>) -> Result<(), String> {
        let is_there = place.path == "/stream/playlist.m3u8";
        is_there.then_some(()).ok_or_else(|| "the origin answered 404".into())
    }
}

fn token_of(role: Role) -> String {
    format!("ks_{role}")
}

fn everybody() -> AccessSettings {
    let token = |role| AccessToken { name: format!("the {role}"), role, sha256: hash_token(&token_of(role)) };
    AccessSettings { tokens: Role::ALL.into_iter().map(token).collect(), jwt: None }
}

fn routes(access: AccessSettings) -> Router {
    let metrics = Metrics::new();
    let (engine, _seat) = Engine::new(Clock::System, metrics.clone());
    let base = BaseUrl::parse("https://cdn.example.com").unwrap();
    let mount = Mount::new("main".into(), "/", vec![base], false).unwrap();
    router(ControlParts {
        engine,
        operator: OperatorSlot::default(),
        metrics,
        mounts: Mounts::new(vec![mount]).unwrap(),
        default_policy: Policy::default(),
        access: Access::new(access).unwrap(),
        probe: Arc::new(Origin),
    })
}

struct Answer {
    status: u16,
    head: Response<()>,
    body: Value,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        self.head.headers().get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// The problem's fields.
    fn fields(&self) -> Vec<&str> {
        self.body["errors"].as_array().unwrap().iter().map(|e| e["field"].as_str().unwrap()).collect()
    }
}

async fn send(routes: Router, request: Request<Body>) -> Answer {
    let (head, body) = routes.oneshot(request).await.unwrap().into_parts();
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let answer = Answer { status: head.status.as_u16(), head: Response::from_parts(head, ()), body };
    if answer.status >= 400 && answer.body["services"].is_null() {
        assert_eq!(answer.header("content-type"), "application/problem+json", "{}", answer.body);
        assert_eq!(answer.body["status"], answer.status);
        assert_eq!(answer.header("cache-control"), "no-store");
    }
    answer
}

async fn ask_as(token: Option<&str>, method: Method, path: &str, body: &str) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    if !body.is_empty() {
        request = request.header("content-type", "application/json");
    }
    send(routes(everybody()), request.body(Body::from(body.to_owned())).unwrap()).await
}

async fn admin(method: Method, path: &str, body: &str) -> Answer {
    ask_as(Some(&token_of(Role::Admin)), method, path, body).await
}

/// A row of docs/control-api.md: method, path, and for each role whether it may.
type Permissions = (Method, String, Vec<(Role, bool)>);

fn documented_permissions() -> Vec<Permissions> {
    let docs = include_str!("../../docs/control-api.md");
    let rows: Vec<Vec<_>> = docs
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let is_role = |cell: &&str| cell.parse::<Role>().is_ok();
    let head = rows.iter().position(|row| row.iter().filter(|cell| is_role(cell)).count() == 5).unwrap();
    let roles: Vec<Role> = rows[head].iter().filter_map(|cell| cell.parse().ok()).collect();
    let of_call = |row: &&Vec<&str>| row.len() == roles.len() + 2 && row[1].starts_with('`');
    let calls = rows[head + 2..].iter().take_while(of_call);
    calls
        .map(|row| {
            let (method, path) = row[1].trim_matches('`').split_once(' ').unwrap();
            let permits = row[2..].iter().map(|cell| match *cell {
                "yes" => true,
                "-" => false,
                other => panic!("{other:?} in the table"),
            });
            (method.parse().unwrap(), path.to_owned(), roles.iter().copied().zip(permits).collect())
        })
        .collect()
}

#[tokio::test]
async fn each_role_may_what_the_documentation_says_and_nothing_else() {
    let table = documented_permissions();
    assert_eq!(table.len(), Call::ALL.len());
    for (method, path, roles) in table {
        let call = Call::ALL.into_iter().find(|call| call.route() == (method.clone(), &path)).unwrap();
        for (role, may) in roles {
            assert_eq!(call.permitted().contains(&role), may, "{role}: {call:?}");
            let url = path.replace("{streamId}", "ch1");
            let answer = ask_as(Some(&token_of(role)), method.clone(), &url, "").await;
            assert_ne!(answer.status, 401);
            assert_eq!(answer.status != 403, may, "{role}: {method} {path}: {}", answer.body);
            if !may {
                let detail = answer.body["detail"].as_str().unwrap();
                assert!(detail.contains("admin") && !detail.contains(role.name()), "{detail}");
                assert!(answer.header("www-authenticate").contains("insufficient_scope"));
            }
        }
        // Strangers, before anything of what they sent is looked at.
        let url = path.replace("{streamId}", ".bad");
        for token in [None, Some("ks_stranger"), Some("a.b.c")] {
            let answer = ask_as(token, method.clone(), &url, "{").await;
            assert_eq!(answer.status, 401, "{method} {path}");
            assert!(answer.header("www-authenticate").starts_with("Bearer realm="), "{method} {path}");
        }
    }
}

#[tokio::test]
async fn without_tokens_nobody_is_let_in_and_told_what_to_do() {
    let request = Request::get("/api/hls/streams").header("authorization", "Bearer x").body(Body::empty());
    let answer = send(routes(AccessSettings::default()), request.unwrap()).await;
    assert_eq!(answer.status, 401);
    assert!(answer.body["detail"].as_str().unwrap().contains("[[control.tokens]]"));
}

#[tokio::test]
async fn health_metrics_and_the_description_need_no_token() {
    let health = ask_as(None, Method::GET, "/api/hls/health", "").await;
    assert_eq!((health.status, &health.body["status"]), (503, &json!("unhealthy")), "while keys are loaded");
    assert_eq!(ask_as(None, Method::GET, "/metrics", "").await.status, 200);
    let described = ask_as(None, Method::GET, DESCRIPTION, "").await;
    assert_eq!((described.status, described.header("content-type")), (200, "application/json"));
    assert!(described.body["openapi"].as_str().unwrap().starts_with("3.1"));
    let rules = &described.body["components"]["schemas"]["StreamConfigRequest"];
    assert_eq!(rules["not"]["properties"]["keyMethod"]["const"], "AES-256-GCM", "with an IV mode: {rules:#}");
}

#[tokio::test]
async fn calls_are_answered_with_503_until_keys_are_loaded() {
    let answer = admin(Method::GET, "/api/hls/streams/ch1", "").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, "1"));
    assert_eq!(answer.body["type"], "urn:keyshield:problem:not-ready");
}

const INITIALIZE: &str = "/api/hls/streams/ch1/initialize";

#[tokio::test]
async fn what_is_wrong_with_a_request_is_a_problem_that_names_it() {
    let good = json!({"playlistUrl": "https://cdn.example.com/stream/playlist.m3u8"}).to_string();
    assert_eq!(admin(Method::POST, INITIALIZE, &good).await.status, 503, "it is good");
    for (path, body, status, fields) in [
        (INITIALIZE, "{", 400, &[][..]),
        (INITIALIZE, "{}", 422, &["playlistUrl"]),
        (INITIALIZE, r#"{"playlistUrl": "https://evil.example/a.m3u8"}"#, 422, &["playlistUrl"]),
        (INITIALIZE, r#"{"playlistUrl": 5}"#, 422, &["playlistUrl"]),
        (
            INITIALIZE,
            r#"{"playlistUrl": "x", "config": {"segmentsPerKey": "many"}}"#,
            422,
            &["config.segmentsPerKey"],
        ),
        (INITIALIZE, r#"{"playlistUrl": "x", "config": {"keyMethod": "DES"}}"#, 422, &["config.keyMethod"]),
        (INITIALIZE, r#"{"playlistUrl": "x", "cdnEndpoints": [5]}"#, 422, &["cdnEndpoints[0]"]),
        ("/api/hls/streams/.hidden/initialize", &good, 422, &["streamId"]),
        ("/api/hls/streams/a%2Fb/initialize", &good, 422, &["streamId"]),
        ("/api/hls/streams/%FF/initialize", &good, 422, &["streamId"]),
        ("/api/hls/streams/ch1/erase", r#"{"confirm": "ch2"}"#, 422, &["confirm"]),
        ("/api/hls/streams/ch1/emergency-revoke", r#"{"reason": ""}"#, 422, &["reason"]),
        ("/api/hls/streams/ch1/emergency-revoke", "{}", 422, &["reason"]),
        ("/api/hls/kms/rewrap", "{}", 422, &["to"]),
        ("/api/hls/kms/rewrap", r#"{"to": "Vault!"}"#, 422, &["to"]),
    ] {
        let answer = admin(Method::POST, path, body).await;
        assert_eq!(answer.status, status, "{path} {body}: {}", answer.body);
        if !fields.is_empty() {
            assert_eq!(answer.fields(), fields, "{path} {body}");
        }
    }
    let list = admin(Method::GET, "/api/hls/streams?limit=0&after=.x&lmit=3", "").await;
    assert_eq!((list.status, list.fields()), (422, vec!["limit", "after", "lmit"]));
}

#[tokio::test]
async fn a_body_has_a_type_and_a_size() {
    let post = |kind: &str, body: String| {
        let request = Request::post(INITIALIZE).header("authorization", "Bearer ks_admin");
        send(routes(everybody()), request.header("content-type", kind).body(Body::from(body)).unwrap())
    };
    assert_eq!(post("text/plain", "{}".into()).await.status, 415);
    let large = format!("{{\"playlistUrl\": \"{}\"}}", "x".repeat(extract::MAX_BODY_BYTES));
    let answer = post("application/json", large).await;
    assert_eq!((answer.status, &answer.body["type"]), (413, &json!("urn:keyshield:problem:body-too-large")));
}

#[tokio::test]
async fn unknown_paths_and_methods_are_problems_too() {
    for path in ["/", "/api/hls/nothing", "/api/hls/streams/", "/api/hls/streams/ch1/keys/5"] {
        assert_eq!(admin(Method::GET, path, "").await.status, 404, "{path}");
    }
    let answer = admin(Method::PUT, "/api/hls/streams/ch1", "").await;
    assert_eq!(answer.status, 405);
    let mut allowed: Vec<_> = answer.header("allow").split(',').map(str::trim).collect();
    allowed.sort_unstable();
    assert_eq!(allowed, ["DELETE", "GET", "HEAD", "PATCH"]);
    assert_eq!(ask_as(None, Method::POST, "/api/hls/health", "").await.status, 405);
}

/// The description, and each of its operations with method and path.
async fn description() -> (Value, Vec<(Method, String, Value)>) {
    let document = ask_as(None, Method::GET, DESCRIPTION, "").await.body;
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let Ok(method) = method.to_uppercase().parse::<Method>() else { continue };
            operations.push((method, path.clone(), operation.clone()));
        }
    }
    (document, operations)
}

#[tokio::test]
async fn every_route_is_described_with_its_security_and_its_problems() {
    let (document, operations) = description().await;
    assert_eq!(document["security"], json!([{"bearer": []}]));
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
    let is_open = |operation: &Value| operation["security"] == json!([{}]);
    let guarded: Vec<_> = operations.iter().filter(|(_, _, operation)| !is_open(operation)).collect();
    assert_eq!(guarded.len(), Call::ALL.len());
    for call in Call::ALL {
        let described = guarded.iter().find(|(method, path, _)| call.route() == (method.clone(), path));
        let (_, path, operation) = described.unwrap_or_else(|| panic!("{call:?} is not described"));
        let responses = operation["responses"].as_object().unwrap();
        let mut statuses = vec!["401", "403", "503"];
        if operation.get("requestBody").is_some() || operation.get("parameters").is_some() {
            statuses.push("422");
        }
        if operation.get("requestBody").is_some() {
            statuses.extend(["400", "413", "415"]);
        }
        for status in statuses {
            let schema = &responses[status]["content"]["application/problem+json"]["schema"];
            assert_eq!(schema["$ref"], "#/components/schemas/Problem", "{path} {status}");
        }
        assert!(responses.keys().any(|status| status.starts_with('2')), "{path}");
    }
    let mut ids: Vec<_> =
        operations.iter().map(|(_, _, operation)| operation["operationId"].as_str()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), operations.len(), "{ids:?}");
    for (method, path, operation) in &operations {
        for word in ["summary", "operationId", "tags"] {
            assert!(operation.get(word).is_some(), "{method} {path} has no {word}");
        }
    }
}

#[tokio::test]
async fn bodies_of_requests_are_closed_and_bounded_in_the_description() {
    let (document, _) = description().await;
    let schemas = &document["components"]["schemas"];
    for name in [
        "InitializeRequest",
        "UpdateRequest",
        "StreamConfigRequest",
        "RevokeRequest",
        "EraseRequest",
        "RewrapRequest",
    ] {
        let schema = &schemas[name];
        assert_eq!(schema["additionalProperties"], false, "{name}");
        for (property, schema) in schema["properties"].as_object().unwrap() {
            let text = schema.to_string();
            assert!(!text.contains("null"), "{name}.{property} is nullable: {text}");
            let bounded = match schema["type"].as_str() {
                Some("string") => schema.get("maxLength").is_some(),
                Some("array") => schema.get("maxItems").is_some(),
                Some("integer" | "number") => {
                    schema.get("maximum").is_some() && schema.get("minimum").is_some()
                }
                _ => true,
            };
            assert!(bounded, "{name}.{property}: {text}");
        }
    }
    let example = &schemas["InitializeRequest"]["examples"][0];
    assert_eq!(example["playlistUrl"], "https://cdn.example.com/stream/playlist.m3u8");
    assert_eq!(schemas["KeyMethod"]["enum"], json!(["AES-128", "AES-256", "AES-256-GCM"]));
}
