//! Stubs of Google Cloud KMS and Azure Key Vault, and the vendors' own clients that judge them: programs of
//! `tests/tools`, one process each.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::repository;
use crate::machine::free_port;

fn python() -> String {
    repository("tests/tools/.venv/bin/python").display().to_string()
}

/// A running stub.
pub struct Stub {
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    dir: TempDir,
    pub url: String,
}

impl Stub {
    /// `kind`: `gcp` or `azure`.
    pub fn start(kind: &str) -> Self {
        let dir = tempfile::Builder::new().prefix(kind).tempdir().unwrap();
        let port = free_port();
        let url = match kind {
            "azure" => format!("https://localhost:{port}"),
            _ => format!("http://127.0.0.1:{port}"),
        };
        let script = repository("tests/tools/kms_stubs.py").display().to_string();
        let (port, folder) = (port.to_string(), dir.path().display().to_string());
        let command = [&python(), &script, kind, &port, &folder];
        let server = Daemon::start(&command, "TERM", dir.path().join("server.log"));
        let stub = Self { _server: server, dir, url };
        stub._server.wait_until(|| stub.try_ask(&json!({"do": "nothing"})).is_some());
        stub
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Whom a client of the stub must trust.
    pub fn ca_file(&self) -> PathBuf {
        self.dir().join("ca.pem")
    }

    fn try_ask(&self, what: &Value) -> Option<Value> {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--max-time", "10", "--data-binary", "@-"]);
        if self.url.starts_with("https") {
            curl.arg("--cacert").arg(self.ca_file());
        }
        let curl = curl.arg(format!("{}/_stub", self.url)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = curl.spawn().expect("curl is installed");
        child.stdin.take().unwrap().write_all(what.to_string().as_bytes()).unwrap();
        serde_json::from_slice(&child.wait_with_output().unwrap().stdout).ok()
    }

    /// Changes something of the stub's.
    pub fn ask(&self, what: Value) -> Value {
        self.try_ask(&what).unwrap_or_else(|| panic!("the stub does {what}"))
    }

    /// Answers so many calls with an error.
    pub fn fail(&self, times: u32, status: u16, error: Value) {
        self.ask(json!({"do": "fail", "times": times, "status": status, "body": {"error": error}}));
    }

    /// What the vendor's own client makes of a call.
    pub fn by_vendor(&self, vendor: &str, mut call: Value) -> Value {
        call["vendor"] = vendor.into();
        call["endpoint"] = self.url.as_str().into();
        call["ca_file"] = self.ca_file().display().to_string().into();
        let script = repository("tests/tools/kms_clients.py");
        let output = Command::new(python()).arg(script).arg(call.to_string()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{call}: {told}"))
    }
}

/// What the vendor's client was given or gives.
pub fn bytes(answer: &Value) -> Vec<u8> {
    hex::decode(answer["bytes"].as_str().unwrap_or_else(|| panic!("no bytes in {answer}"))).unwrap()
}
