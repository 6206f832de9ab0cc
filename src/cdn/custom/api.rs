//! The calls of a custom CDN's API, each by itself.
//!
//! Deliberately absent: which of them are made (`custom.rs`), and when they are made again (`engine`).

use std::time::Duration;

use http::header::{AUTHORIZATION, LOCATION};
use http::{HeaderValue, Method, StatusCode};
use reqwest::{Client, RequestBuilder};
use serde::{Deserialize, Serialize};
use url::Url;

use super::CustomSettings;
use crate::cdn::{CdnError, CdnFault, Purge};
use crate::keys::{KeyId, SealedKey};
use crate::rest::{self, Answer, said};

/// How long a purge that was accepted may take, and how often it is asked for: at first, and at most.
const PURGE_WAIT: Duration = Duration::from_secs(60);
const FIRST_POLL: Duration = Duration::from_millis(100);
const LONGEST_POLL: Duration = Duration::from_secs(5);

/// What an agent can do, by its own word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// It purges by tags.
    pub tags: bool,
    pub paths: bool,
    pub prefixes: bool,
    /// It takes several keys in one call.
    pub batch: bool,
    /// It holds keys and its edge serves them.
    pub store: bool,
}

impl Capabilities {
    pub(super) const ALL: Self = Self { tags: true, paths: true, prefixes: true, batch: true, store: true };

    fn named(names: &[String]) -> Self {
        let can = |name: &str| names.iter().any(|named| named == name);
        Self {
            tags: can("tags"),
            paths: can("paths"),
            prefixes: can("prefixes"),
            batch: can("batch"),
            store: can("store"),
        }
    }
}

/// The body of `POST /v1/keys/batch`.
#[derive(Serialize)]
pub(super) struct Batch<'k> {
    put: Vec<BatchedKey<'k>>,
    delete: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct BatchedKey<'k> {
    key_id: String,
    sealed: &'k str,
}

impl<'k> Batch<'k> {
    pub(super) fn of(put: &'k [SealedKey], delete: &[KeyId]) -> Self {
        let batched = |key: &'k SealedKey| BatchedKey { key_id: key.key.to_string(), sealed: &key.text };
        Self { put: put.iter().map(batched).collect(), delete: delete.iter().map(KeyId::to_string).collect() }
    }
}

/// What became of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Batched {
    Done,
    /// There are no batches here.
    Unknown,
}

#[derive(Serialize)]
struct SealedBody<'k> {
    sealed: &'k str,
}

#[derive(Serialize)]
struct PurgeBody<'p> {
    tags: &'p [String],
    paths: &'p [String],
    prefixes: &'p [String],
}

#[derive(Deserialize)]
struct HealthBody {
    status: String,
    capabilities: Vec<String>,
}

#[derive(Deserialize)]
struct PurgeStatus {
    status: String,
    detail: Option<String>,
}

/// RFC 9457, as far as it is shown.
#[derive(Deserialize)]
struct Problem {
    title: Option<String>,
    detail: Option<String>,
}

/// Who is called.
#[derive(Debug)]
pub(super) struct Api {
    settings: CustomSettings,
    base: Url,
    client: Client,
}

impl Api {
    pub(super) fn new(settings: CustomSettings) -> Result<Self, CdnError> {
        let invalid = |why: String| CdnError::new(CdnFault::Invalid, why);
        let base = Url::parse(&settings.api_url).ok().filter(is_base);
        // Whatever it is, it may hold a password.
        let base = base.ok_or_else(|| {
            invalid("the address of a custom CDN's API is http:// or https://, a host and a path".to_owned())
        })?;
        let client = rest::client(settings.ca_file.as_deref(), settings.timeout).map_err(invalid)?;
        Ok(Self { settings, base, client })
    }

    pub(super) fn timeout(&self) -> Duration {
        self.settings.timeout
    }

    pub(super) fn url(&self) -> &str {
        &self.settings.api_url
    }

    fn at(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{path}", self.base.path().trim_end_matches('/')));
        url
    }

    pub(super) async fn health(&self) -> Result<Capabilities, CdnError> {
        let answer =
            self.send("asking for its health", Method::GET, &self.at("/healthz"), None::<&()>).await?;
        let answer = expect_success("asking for its health", answer)?;
        let Some(HealthBody { status, capabilities }) = answer.json() else {
            let what = format!("{}/healthz answers with something else than its health", self.url());
            return Err(CdnError::new(CdnFault::Invalid, what));
        };
        if status != "ok" {
            let what = format!("{} says that it is {}", self.url(), said(&status));
            return Err(CdnError::new(CdnFault::Away, what));
        }
        Ok(Capabilities::named(&capabilities))
    }

    pub(super) async fn put(&self, key: &SealedKey) -> Result<(), CdnError> {
        let doing = format!("storing the key {}", key.key);
        let body = SealedBody { sealed: &key.text };
        let url = self.at(&format!("/v1/keys/{}", key.key));
        let answer = self.send(&doing, Method::PUT, &url, Some(&body)).await?;
        expect_success(&doing, answer).map(drop)
    }

    pub(super) async fn delete(&self, key: KeyId) -> Result<(), CdnError> {
        let doing = format!("deleting the key {key}");
        let url = self.at(&format!("/v1/keys/{key}"));
        let answer = self.send(&doing, Method::DELETE, &url, None::<&()>).await?;
        // What is not there need not be deleted, though 204 is what is documented.
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(());
        }
        expect_success(&doing, answer).map(drop)
    }

    pub(super) async fn batch(&self, batch: &Batch<'_>) -> Result<Batched, CdnError> {
        let doing = "storing and deleting keys";
        let answer = self.send(doing, Method::POST, &self.at("/v1/keys/batch"), Some(batch)).await?;
        match answer.status {
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {
                Ok(Batched::Unknown)
            }
            _ => expect_success(doing, answer).map(|_| Batched::Done),
        }
    }

    /// Returns when it is done.
    pub(super) async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        let doing = "purging";
        let Purge { tags, paths, prefixes } = purge;
        let url = self.at("/v1/purge");
        let answer = self.send(doing, Method::POST, &url, Some(&PurgeBody { tags, paths, prefixes })).await?;
        let answer = expect_success(doing, answer)?;
        if answer.status != StatusCode::ACCEPTED {
            return Ok(());
        }
        let status = self.status_of(&url, &answer)?;
        let done = tokio::time::timeout(PURGE_WAIT, self.wait_for(&status)).await;
        done.unwrap_or_else(|_| {
            let what = format!("a purge is not done within {PURGE_WAIT:?}, says {status}");
            Err(CdnError::new(CdnFault::Away, what))
        })
    }

    /// Where an accepted purge's status is. The token goes along, so it must be at the same server.
    fn status_of(&self, url: &Url, answer: &Answer) -> Result<Url, CdnError> {
        let location = answer.headers.get(LOCATION).and_then(|location| location.to_str().ok());
        let status = location.and_then(|location| url.join(location).ok());
        status.filter(|status| status.origin() == url.origin()).ok_or_else(|| {
            let what = format!("{url} accepts a purge (202) without a Location at the same server");
            CdnError::new(CdnFault::Invalid, what)
        })
    }

    async fn wait_for(&self, status: &Url) -> Result<(), CdnError> {
        let doing = "asking whether a purge is done";
        let mut pause = FIRST_POLL;
        loop {
            let answer = self.send(doing, Method::GET, status, None::<&()>).await?;
            // One that is forgotten is made again, and so is not an error of the configuration.
            if matches!(answer.status, StatusCode::NOT_FOUND | StatusCode::GONE) {
                let what = format!("{status} knows nothing of the purge any more");
                return Err(CdnError::new(CdnFault::Away, what));
            }
            let answer = expect_success(doing, answer)?;
            let Some(PurgeStatus { status: state, detail }) = answer.json() else {
                let what = format!("{status} answers with something else than a purge's status");
                return Err(CdnError::new(CdnFault::Invalid, what));
            };
            match state.as_str() {
                "done" => return Ok(()),
                "running" => {}
                state => {
                    let detail = said(&detail.unwrap_or_default());
                    let what = format!("{status}: the purge is {}: {detail}", said(state));
                    return Err(CdnError::new(CdnFault::Away, what));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_POLL);
        }
    }

    async fn send<Body: Serialize>(
        &self,
        doing: &str,
        method: Method,
        url: &Url,
        body: Option<&Body>,
    ) -> Result<Answer, CdnError> {
        let request = self.client.request(method, url.clone()).timeout(self.settings.timeout);
        let mut request = self.with_token(request)?;
        if let Some(body) = body {
            request = rest::with_json(request, body);
        }
        let sent = rest::send(request, self.url()).await.map_err(CdnError::from);
        sent.map_err(|error| CdnError { what: format!("{doing}: {}", error.what), ..error })
    }

    fn with_token(&self, request: RequestBuilder) -> Result<RequestBuilder, CdnError> {
        let Some(token) = &self.settings.token else { return Ok(request) };
        let refused = |why: String| CdnError::new(CdnFault::Refused, why);
        let token = token.read().map_err(|why| refused(format!("the token of {}: {why}", self.url())))?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
            .map_err(|_| refused(format!("the token of {} is not one line of ASCII text", self.url())))?;
        value.set_sensitive(true);
        Ok(request.header(AUTHORIZATION, value))
    }
}

fn is_base(url: &Url) -> bool {
    let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
    is_bare && ["http", "https"].contains(&url.scheme())
}

fn expect_success(doing: &str, answer: Answer) -> Result<Answer, CdnError> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    let problem = answer.json().and_then(|Problem { title, detail }| detail.or(title));
    let text = problem.unwrap_or_else(|| String::from_utf8_lossy(answer.body()).into_owned());
    Err(CdnError::of_status(doing, answer.status, &answer.headers, &said(&text)))
}
