//! Servers that answer as AWS does, in memory and on loopback: moto, which seals as AWS does but lets disabled keys work,
//! and ministack, which is the other way round.

use std::path::Path;
use std::time::Duration;

use aws_sdk_kms::config::Credentials;
use keyshield::kms::{AwsKms, AwsSettings};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::harness::{agent, free_port, repository};
use crate::origin::{Answer, Origin};

pub const REGION: &str = "eu-west-1";

/// A running server.
pub struct Cloud {
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    dir: TempDir,
    port: u16,
}

impl Cloud {
    pub fn moto() -> Self {
        let port = free_port().to_string();
        let program = repository("tests/tools/.venv/bin/moto_server").display().to_string();
        Self::start(&[&program, "-H", "127.0.0.1", "-p", &port], &port)
    }

    pub fn ministack() -> Self {
        let port = free_port().to_string();
        let program = repository("tests/tools/.venv/bin/ministack").display().to_string();
        let gateway = format!("GATEWAY_PORT={port}");
        // Without what listens beside it.
        let quiet = ["BIND_HOST=127.0.0.1", "SERVICES=kms", "IOT_MTLS_ENABLED=0", "SFTP_ENABLED=0"];
        let command = [&["env", gateway.as_str()], &quiet[..], &[&program]].concat();
        Self::start(&command, &port)
    }

    fn start(command: &[&str], port: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("cloud").tempdir().unwrap();
        let server = Daemon::start(command, "TERM", dir.path().join("server.log"));
        let cloud = Self { _server: server, dir, port: port.parse().unwrap() };
        cloud._server.wait_until(|| cloud.try_call(REGION, "ListKeys", &json!({})).is_some());
        cloud
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn try_call(&self, region: &str, operation: &str, body: &Value) -> Option<(u16, Value)> {
        // Nobody checks it, but the region is read from it.
        let signed = format!(
            "AWS4-HMAC-SHA256 Credential=test/20260101/{region}/kms/aws4_request, SignedHeaders=host, Signature=0"
        );
        let request = ureq::http::Request::post(self.url())
            .header("X-Amz-Target", format!("TrentService.{operation}"))
            .header("Content-Type", "application/x-amz-json-1.1")
            .header("Authorization", signed);
        let mut response = agent().run(request.body(body.to_string()).unwrap()).ok()?;
        let text = response.body_mut().read_to_string().ok()?;
        Some((response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Calls KMS past the shield.
    pub fn call(&self, region: &str, operation: &str, body: &Value) -> (u16, Value) {
        self.try_call(region, operation, body).expect("it answers")
    }

    /// As [`Self::call`], where it must go well.
    pub fn ok(&self, region: &str, operation: &str, body: &Value) -> Value {
        let (status, answer) = self.call(region, operation, body);
        assert_eq!(status, 200, "{operation} {body}: {answer}");
        answer
    }

    /// Calls IAM.
    fn iam(&self, action: &str, parameters: &[(&str, &str)]) -> String {
        let signed = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/iam/aws4_request, SignedHeaders=host, \
            Signature=0";
        let mut body = url::form_urlencoded::Serializer::new(String::new());
        body.append_pair("Action", action).append_pair("Version", "2010-05-08");
        body.extend_pairs(parameters);
        let request = ureq::http::Request::post(self.url())
            .header("Content-Type", "application/x-www-form-urlencoded")
            .header("Authorization", signed);
        let mut response = agent().run(request.body(body.finish()).unwrap()).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        assert_eq!(response.status(), 200, "{action}: {text}");
        text
    }

    /// A user who may do what a policy says and nothing else. From here on, signatures and policies are looked at.
    pub fn user(&self, policy: &str) -> Credentials {
        let user = ("UserName", "shield");
        self.iam("CreateUser", &[user]);
        let document = ("PolicyDocument", policy);
        self.iam("PutUserPolicy", &[user, ("PolicyName", "keyshield"), document]);
        let made = self.iam("CreateAccessKey", &[user]);
        let part = |name: &str| {
            let (_, rest) = made.split_once(&format!("<{name}>")).expect(name);
            rest.split_once('<').expect(name).0.to_owned()
        };
        let credentials =
            Credentials::new(part("AccessKeyId"), part("SecretAccessKey"), None, None, "the tests");
        agent().post(format!("{}/moto-api/reset-auth", self.url())).send("0").unwrap();
        credentials
    }

    /// Makes a key that an alias points to, and gives its ARN.
    pub fn make_key(&self, alias: &str) -> String {
        let arn = self.make_key_in(REGION, json!({}));
        self.ok(REGION, "CreateAlias", &json!({"AliasName": alias, "TargetKeyId": arn}));
        arn
    }

    pub fn make_key_in(&self, region: &str, kind: Value) -> String {
        let mut body = json!({"KeyUsage": "ENCRYPT_DECRYPT"});
        body.as_object_mut().unwrap().extend(kind.as_object().unwrap().clone());
        let made = self.ok(region, "CreateKey", &body);
        made["KeyMetadata"]["Arn"].as_str().unwrap().to_owned()
    }

    /// The shield's own way to a key.
    pub fn kms(&self, key: &str) -> AwsKms {
        kms_at(&self.url(), REGION, key)
    }

    /// A way to it on which calls of an operation fail by a script, one line a call, and then go through.
    pub fn behind(&self, operation: &'static str, failures: Vec<Answer>) -> Origin {
        let (far, failures) = (self.url(), Mutex::new(failures.into_iter()));
        Origin::start(move |seen| {
            let is_hit = seen.headers["x-amz-target"].ends_with(operation);
            if let Some(failure) = is_hit.then(|| failures.lock().next()).flatten() {
                return failure;
            }
            let mut request = ureq::http::Request::post(&far);
            for name in ["x-amz-target", "content-type", "authorization", "x-amz-date"] {
                request = request.header(name, &seen.headers[name]);
            }
            let mut response = agent().run(request.body(&seen.body[..]).unwrap()).unwrap();
            let body = response.body_mut().read_to_vec().unwrap();
            Answer { status: response.status().as_u16(), ..Answer::ok(body) }
        })
    }
}

/// What AWS says when it refuses.
pub fn failure(status: u16, code: &str, message: &str) -> Answer {
    let body = json!({"__type": code, "message": message}).to_string();
    let answer = Answer { status, ..Answer::ok(body) }.header("Content-Type", "application/x-amz-json-1.1");
    answer.header("x-amzn-RequestId", "7c3b5a1e-request")
}

pub fn kms_at(endpoint: &str, region: &str, key: &str) -> AwsKms {
    let credentials = Credentials::new("AKIDTEST", "secret-of-the-tests", None, None, "the tests");
    kms_by(credentials, endpoint, region, key)
}

pub fn kms_by(credentials: Credentials, endpoint: &str, region: &str, key: &str) -> AwsKms {
    let settings =
        AwsSettings { region: Some(region.into()), key: key.into(), endpoint: Some(endpoint.into()) };
    AwsKms::new(settings, Duration::from_secs(5)).with_credentials(credentials)
}
