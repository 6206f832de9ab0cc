//! A workerd that runs the worker that is shipped, with a KV namespace and an origin: `tests/edge/worker.mjs`, one process
//! each.

use keyshield::keys::{EdgeSecret, KeyId, SealedKey};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::{Answer, agent, free_port, get, repository, try_ask};

pub const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
pub const KEY_PATH: &str = "/api/hls/keys/";

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
    pub fn logged(&self) -> String {
        get(&format!("{}/", self.url)).text()
    }

    fn change(&self, method: &str, what: Value) {
        let request = ureq::http::Request::builder().method(method).uri(&self.url);
        let answer = agent().run(request.body(what.to_string()).unwrap()).unwrap();
        assert_eq!(answer.status(), 200, "{method} {what}");
    }
}

/// A workerd that runs the worker.
pub struct Worker {
    pub url: String,
    admin_url: String,
    // Before the folder: fields are dropped in order.
    _workerd: Daemon,
    _dir: TempDir,
}

impl Worker {
    /// Before an origin, with bindings besides those that every test has.
    pub fn start(origin: &str, more: Value) -> Self {
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
            answers(&format!("{url}{KEY_PATH}{}/check", KeyId::from_bytes([0; KeyId::LEN])))
                && answers(&format!("{admin_url}/"))
        });
        Self { url, admin_url, _workerd: workerd, _dir: dir }
    }

    pub fn namespace(&self) -> Namespace {
        Namespace { url: self.admin_url.clone() }
    }

    pub fn store(&self, sealed: &SealedKey) {
        self.namespace().put(&[(format!("key:{}", sealed.key), sealed.text.clone())]);
    }

    pub fn key(&self, key: KeyId, query: &str) -> Answer {
        get(&format!("{}{KEY_PATH}{key}{query}", self.url))
    }

    pub fn check(&self, key: KeyId) -> Answer {
        get(&format!("{}{KEY_PATH}{key}/check", self.url))
    }
}

/// What the worker's secrets are derived from.
pub fn secret() -> EdgeSecret {
    SECRET.parse().unwrap()
}
