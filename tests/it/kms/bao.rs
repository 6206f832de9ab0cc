//! OpenBao, for the tests that need a KMS: the real `bao`, in memory, unsealed, with a transit engine.
//!
//! Deliberately absent: TLS and a disk. It listens on loopback, and what it holds ends with it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use keyshield::kms::{Login, Secret, VaultKms, VaultSettings};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::{agent, repository};
use crate::machine::free_port;

const ROOT_TOKEN: &str = "root-of-the-tests";

/// A port with the one behind it, where the server listens to others of its cluster, though it has none.
fn two_ports() -> u16 {
    loop {
        let port = free_port();
        if free_port() == port + 1 {
            return port;
        }
    }
}

/// A running server.
pub struct Bao {
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    dir: TempDir,
    port: u16,
}

impl Bao {
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("bao").tempdir().unwrap();
        let port = two_ports();
        let program = repository("tests/tools/.venv/bin/bao").display().to_string();
        let root = format!("-dev-root-token-id={ROOT_TOKEN}");
        let listen = format!("-dev-listen-address=127.0.0.1:{port}");
        let command = [&program, "server", "-dev", "-dev-no-store-token", &root, &listen];
        let server = Daemon::start(&command, "TERM", dir.path().join("server.log"));
        let bao = Self { _server: server, dir, port };
        bao._server
            .wait_until(|| bao.try_call("GET", "sys/health", &Value::Null).is_some_and(|(s, _)| s == 200));
        bao.ok("POST", "sys/mounts/transit", json!({"type": "transit"}));
        bao
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn try_call(&self, method: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://{}/v1/{path}", self.address()))
            .header("X-Vault-Token", ROOT_TOKEN);
        let mut response = match body {
            Value::Null => agent().run(request.body(()).unwrap()).ok()?,
            body => agent().run(request.body(body.to_string()).unwrap()).ok()?,
        };
        let text = response.body_mut().read_to_string().ok()?;
        Some((response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Calls as root.
    pub fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.try_call(method, path, &body).expect("bao answers")
    }

    /// As [`Self::call`], where it must go well.
    pub fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// Makes a transit key.
    pub fn make_key(&self, name: &str) {
        self.ok("POST", &format!("transit/keys/{name}"), json!({}));
    }

    /// Makes a policy, and a token that has it alone; the token lives for so long unless it is renewed.
    pub fn token(&self, policy: &str, ttl: Duration) -> String {
        self.set_policy(policy);
        let body =
            json!({"policies": ["keyshield"], "ttl": format!("{}s", ttl.as_secs()), "no_parent": true});
        let made = self.ok("POST", "auth/token/create", body);
        made["auth"]["client_token"].as_str().unwrap().to_owned()
    }

    pub fn set_policy(&self, policy: &str) {
        self.ok("POST", "sys/policies/acl/keyshield", json!({"policy": policy}));
    }

    /// The shield's own way to a key, as root.
    pub fn kms(&self, key: &str) -> VaultKms {
        self.kms_by(key, Login::Token(Secret::new(ROOT_TOKEN.into())))
    }

    pub fn kms_by(&self, key: &str, login: Login) -> VaultKms {
        let settings = VaultSettings {
            address: format!("http://{}", self.address()),
            mount: "transit".into(),
            key: key.into(),
            namespace: None,
            login,
            ca_file: None,
        };
        VaultKms::new(settings, Duration::from_secs(5)).unwrap()
    }
}
