//! What stands for CloudFront: ministack for its KeyValueStore, functions and distributions; moto for its public keys; a
//! stub for what neither has (`tests/tools/cloudfront_stub.py`), judged by AWS's own client.

use std::process::Command;
use std::time::Duration;

use aws_credential_types::Credentials;
use keyshield::cdn::{CloudFront, CloudFrontSettings, DeliveryMode, Edge, EdgeSettings, SignerSettings};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::{agent, ask, free_port, repository};

pub const KEY_PATH: &str = "/api/hls/keys/";

/// A running server.
pub struct Wire {
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    pub dir: TempDir,
    pub url: String,
}

fn tool(name: &str) -> String {
    repository(&format!("tests/tools/.venv/bin/{name}")).display().to_string()
}

impl Wire {
    pub fn ministack() -> Self {
        let port = free_port();
        let gateway = format!("GATEWAY_PORT={port}");
        let services = "SERVICES=cloudfront,cloudfront-keyvaluestore";
        let quiet = ["BIND_HOST=127.0.0.1", services, "IOT_MTLS_ENABLED=0", "SFTP_ENABLED=0"];
        let program = tool("ministack");
        let command = [&["env", gateway.as_str()], &quiet[..], &[&program]].concat();
        Self::start(&command, port, "/2020-05-31/function")
    }

    pub fn moto() -> Self {
        let port = free_port();
        let text = port.to_string();
        Self::start(&[&tool("moto_server"), "-H", "127.0.0.1", "-p", &text], port, "/moto-api/data.json")
    }

    pub fn stub() -> Self {
        let port = free_port();
        let script = repository("tests/tools/cloudfront_stub.py").display().to_string();
        Self::start(&[&tool("python"), &script, &port.to_string()], port, "/_stub")
    }

    fn start(command: &[&str], port: u16, path: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("cloudfront").tempdir().unwrap();
        let server = Daemon::start(command, "TERM", dir.path().join("server.log"));
        let url = format!("http://127.0.0.1:{port}");
        server.wait_until(|| agent().get(format!("{url}{path}")).call().is_ok());
        Self { _server: server, dir, url }
    }

    /// By AWS's own client, which is not the connector's.
    pub fn by_aws(&self, operation: &str, arguments: Value) -> Value {
        let call = json!({"endpoint": self.url, "operation": operation, "arguments": arguments});
        let script = repository("tests/tools/cloudfront_client.py");
        let output = Command::new(tool("python")).arg(script).arg(call.to_string()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{call}: {told}"))
    }

    /// Tells the stub how to behave, and hears what it was asked.
    pub fn tell(&self, what: &Value) -> Value {
        let mut answer = agent().post(format!("{}/_stub", self.url)).send(what.to_string()).unwrap();
        serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap()
    }

    /// Makes a KeyValueStore, and gives its ARN.
    pub fn make_store(&self, name: &str) -> String {
        let made = self.by_aws("create_key_value_store", json!({"Name": name}));
        made["KeyValueStore"]["ARN"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
    }

    /// Makes a distribution before a shield, and gives its ID.
    pub fn make_distribution(&self, is_enabled: bool, extra: Value) -> String {
        let origin = json!({"Id": "shield", "DomainName": "shield.example.com", "CustomOriginConfig": {
            "HTTPPort": 80, "HTTPSPort": 443, "OriginProtocolPolicy": "https-only"}});
        let mut behaviour = json!({"TargetOriginId": "shield", "ViewerProtocolPolicy": "https-only",
            "CachePolicyId": "658327ea-f89d-4fab-a63d-7e88639e58f6"});
        if extra["Function"] == true {
            let arn = "arn:aws:cloudfront::000000000000:function/keyshield";
            let one = json!({"FunctionARN": arn, "EventType": "viewer-request"});
            behaviour["FunctionAssociations"] = json!({"Quantity": 1, "Items": [one]});
        }
        let mut config = json!({"CallerReference": format!("r{}", free_port()), "Comment": "",
            "Enabled": is_enabled, "Origins": {"Quantity": 1, "Items": [origin]}, "DefaultCacheBehavior": behaviour});
        if let Some(name) = extra["TagHeader"].as_str() {
            config["CacheTagConfig"] = json!({"HeaderName": name});
        }
        let made = self.by_aws("create_distribution", json!({"DistributionConfig": config}));
        made["Distribution"]["Id"].as_str().unwrap_or_else(|| panic!("{made}")).to_owned()
    }

    /// What the store has, past the connector.
    pub fn stored(&self, arn: &str, path: &str) -> Value {
        serde_json::from_slice(&ask("GET", &format!("{}/key-value-stores/{arn}{path}", self.url), &[]).body)
            .unwrap()
    }

    /// Settings that lead here.
    pub fn settings(&self) -> CloudFrontSettings {
        CloudFrontSettings {
            distribution_id: "EDISTRIBUTION".into(),
            key_value_store_arn: String::new(),
            has_cache_tags: true,
            endpoint: Some(self.url.clone()),
            key_value_store_endpoint: Some(self.url.clone()),
            signer: None,
            timeout: Duration::from_secs(5),
        }
    }

    /// The same, with a store.
    pub fn settings_on(&self, arn: &str) -> CloudFrontSettings {
        CloudFrontSettings { key_value_store_arn: arn.into(), ..self.settings() }
    }
}

pub fn edge(url: &str, is_store: bool) -> Edge {
    let (url, timeout) = (url.parse().unwrap(), Duration::from_secs(5));
    let key_path = KEY_PATH.to_owned();
    Edge::new(EdgeSettings { url, key_path, is_store, ca_file: None, timeout }).unwrap()
}

/// The connector, with an edge that nobody asks.
pub fn connector(settings: CloudFrontSettings, mode: DeliveryMode) -> CloudFront {
    connector_with(settings, mode, edge("http://127.0.0.1:9", mode == DeliveryMode::Push))
}

pub fn connector_with(settings: CloudFrontSettings, mode: DeliveryMode, edge: Edge) -> CloudFront {
    let credentials = Credentials::new("AKIDTEST", "secret-of-the-tests", None, None, "the tests");
    CloudFront::new(settings, mode, edge).unwrap().with_credentials(credentials)
}

pub fn signer_settings(wire: &Wire, key_group_id: &str) -> SignerSettings {
    let directory = wire.dir.path().join("keys");
    let longest_life = Duration::from_secs(6 * 3_600);
    SignerSettings { key_group_id: key_group_id.into(), directory, longest_life }
}

pub fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test)
}
