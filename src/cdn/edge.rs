//! Asking the edge of a CDN, on the way that players take.
//!
//! `{edge URL}{key path}{key ID}/check` is answered by the shield (through a CDN in pull mode) and by the code at the
//! edge (in push mode, from its own store): the key's check value, never cached. For segments, what the answer's header
//! `Keyshield-Key` says is compared: a cached object names the key that it was encrypted under.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::header::CACHE_CONTROL;
use http::{HeaderMap, StatusCode};
use reqwest::Client;
use url::Url;

use super::{CdnError, CdnFault};
use crate::keys::{CheckValue, KEY_HEADER, KeyId, SERVED_BY_HEADER};
use crate::rest::{self, said};

/// Where the edge is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeSettings {
    /// As players have it: `https://cdn.example.com`.
    pub url: Url,
    /// What stands before key IDs: `/api/hls/keys/`.
    pub key_path: String,
    /// Whether the edge must answer from its own store.
    pub is_store: bool,
    /// Of certificate authorities, those that alone are trusted; `None` for the system's.
    pub ca_file: Option<PathBuf>,
    /// The longest time of one question.
    pub timeout: Duration,
}

/// What the edge says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySeen {
    /// It gives this key out.
    Has(CheckValue),
    /// It was revoked or destroyed: 410.
    Gone,
    /// It is not known: 404.
    Missing,
}

/// What goes with every question, such as a signed cookie. Made anew for each, because such things run out.
pub trait ProbeHeaders: fmt::Debug + Send + Sync {
    /// # Errors
    /// What it takes is not to be had.
    fn headers(&self, url: &Url) -> Result<HeaderMap, CdnError>;
}

/// The edge of one CDN.
#[derive(Debug, Clone)]
pub struct Edge {
    settings: EdgeSettings,
    client: Client,
    headers: Option<Arc<dyn ProbeHeaders>>,
}

impl Edge {
    /// # Errors
    /// A file of authorities that cannot be used.
    pub fn new(settings: EdgeSettings) -> Result<Self, CdnError> {
        let client = rest::client(settings.ca_file.as_deref(), settings.timeout)
            .map_err(|why| CdnError::new(CdnFault::Invalid, why))?;
        Ok(Self { settings, client, headers: None })
    }

    /// With headers on every question.
    #[must_use]
    pub fn with_headers(mut self, headers: Arc<dyn ProbeHeaders>) -> Self {
        self.headers = Some(headers);
        self
    }

    pub fn settings(&self) -> &EdgeSettings {
        &self.settings
    }

    /// The absolute URL of a path.
    pub fn url_of(&self, path: &str) -> String {
        format!("{}{path}", self.settings.url.as_str().trim_end_matches('/'))
    }

    /// See [`super::Cdn::verify`].
    pub async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        let path = format!("{}{key}/check", self.settings.key_path);
        let answer = self.get(&path).await?;
        let served_by = answer.headers.get(SERVED_BY_HEADER).and_then(|by| by.to_str().ok());
        let who = self.url_of(&path);
        if self.settings.is_store && answer.status.is_success() && served_by != Some("edge") {
            let what =
                format!("{who} was not answered by the code at the edge; is it deployed on this route?");
            return Err(CdnError::new(CdnFault::Mismatch, what));
        }
        match answer.status {
            StatusCode::OK => {
                match std::str::from_utf8(answer.body()).ok().and_then(|text| text.parse().ok()) {
                    Some(value) => Ok(KeySeen::Has(value)),
                    None => {
                        Err(CdnError::new(CdnFault::Mismatch, format!("{who} answers with no check value")))
                    }
                }
            }
            StatusCode::GONE => Ok(KeySeen::Gone),
            // Of the shield or its edge code, and not of whatever else has that host.
            StatusCode::NOT_FOUND if served_by.is_some() => Ok(KeySeen::Missing),
            StatusCode::NOT_FOUND => {
                let what =
                    format!("{who} is not answered by the shield (404); does the CDN send key URIs to it?");
                Err(CdnError::new(CdnFault::Mismatch, what))
            }
            status => {
                let said = said(&String::from_utf8_lossy(answer.body()));
                Err(CdnError::of_status(&format!("asking {who}"), status, &answer.headers, &said))
            }
        }
    }

    /// Whether the key itself is given out at its URI, by whatever cache has it. Asked for by HEAD: no key is read.
    pub async fn gives_out(&self, key: KeyId) -> Result<bool, CdnError> {
        let path = format!("{}{key}", self.settings.key_path);
        Ok(self.head(&path).await?.status.is_success())
    }

    /// See [`super::Cdn::has_cached`].
    pub async fn has_cached(&self, path: &str, key: KeyId) -> Result<bool, CdnError> {
        let answer = self.head(path).await?;
        let text = |name| answer.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let is_under_it = text(KEY_HEADER).split(',').any(|under| under.trim() == key.to_string());
        // For a while after a revocation the shield itself answers so, to players that hold an older playlist.
        let is_fresh = text(CACHE_CONTROL.as_str()).contains("no-store");
        Ok(answer.status.is_success() && is_under_it && !is_fresh)
    }

    async fn get(&self, path: &str) -> Result<rest::Answer, CdnError> {
        self.ask(http::Method::GET, path).await
    }

    async fn head(&self, path: &str) -> Result<rest::Answer, CdnError> {
        self.ask(http::Method::HEAD, path).await
    }

    async fn ask(&self, method: http::Method, path: &str) -> Result<rest::Answer, CdnError> {
        let url = self.url_of(path);
        let mut request = self.client.request(method, &url).timeout(self.settings.timeout);
        if let Some(headers) = &self.headers
            && let Ok(url) = Url::parse(&url)
        {
            request = request.headers(headers.headers(&url)?);
        }
        Ok(rest::send(request, &url).await?)
    }
}
