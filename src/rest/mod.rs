//! What all who call somebody's REST API share: a client that follows nobody elsewhere, bodies that are cleared behind
//! the call, and answers that are read to a bound.
//!
//! Deliberately absent: retries and what an answer means, which are the caller's.

#[cfg(any(feature = "cdn-cloudfront", feature = "kms-aws"))]
pub(crate) mod aws;
mod secret;

use std::error::Error;
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Client, RequestBuilder, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use zeroize::Zeroizing;

pub use secret::{Credential, Secret};

const AGENT: &str = concat!("keyshield/", env!("CARGO_PKG_VERSION"));
/// Answers are a few kilobytes: an RSA key with its attributes is the longest.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Bodies hold a key, its context and a ciphertext; what grows beyond would leave a copy behind.
const BODY_BYTES: usize = 4 << 10;
/// What a server says about an error, as far as it is shown.
const MAX_SAID: usize = 300;

/// `timeout` is for connecting; who calls has one for the whole call. Of certificate authorities, those in
/// the PEM file alone are trusted, or the system's where there is none.
///
/// # Errors
/// A file that cannot be read or holds no certificate.
pub(crate) fn client(ca_file: Option<&Path>, timeout: Duration) -> Result<Client, String> {
    // The provider that the data plane's connections use too. An error says that it is there already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut client = Client::builder()
        .connect_timeout(timeout)
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(AGENT);
    if let Some(path) = ca_file {
        let bad = |error: &dyn Display| format!("ca_file {}: {error}", path.display());
        let pem = std::fs::read(path).map_err(|error| bad(&error))?;
        let authorities = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| bad(&error))?;
        if authorities.is_empty() {
            return Err(bad(&"holds no certificate"));
        }
        client = client.tls_certs_only(authorities);
    }
    client.build().map_err(|error| error.to_string())
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum RestError {
    #[error("{0}")]
    Unreachable(String),
    #[error("{0}")]
    TooLong(String),
}

/// An answer, read to its end.
pub(crate) struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Zeroizing<Vec<u8>>,
}

impl Answer {
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    /// `None` for a body that is not such JSON. The parser's own error may quote what it stumbled over.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_slice(&self.body).ok()
    }
}

/// A request's JSON, cleared when it was sent.
pub(crate) fn with_json(request: RequestBuilder, value: &impl Serialize) -> RequestBuilder {
    let mut body = Zeroizing::new(Vec::with_capacity(BODY_BYTES));
    serde_json::to_writer(&mut *body, value).expect("plain structures of text become JSON");
    request.header(CONTENT_TYPE, "application/json").body(Bytes::from_owner(body))
}

/// Sends, and reads the answer whatever its status. `at`: who is called, for the error.
pub(crate) async fn send(request: RequestBuilder, at: &str) -> Result<Answer, RestError> {
    send_within(request, at, MAX_ANSWER_BYTES).await
}

/// As [`send`], for answers that may rightly be longer than most.
pub(crate) async fn send_within(
    request: RequestBuilder,
    at: &str,
    max_bytes: usize,
) -> Result<Answer, RestError> {
    let unreachable = |error: reqwest::Error| {
        RestError::Unreachable(format!("{at} cannot be reached: {}", deepest(&error)))
    };
    let mut response = request.send().await.map_err(unreachable)?;
    let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
    let mut body = Zeroizing::new(Vec::with_capacity(BODY_BYTES));
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        if body.len() + chunk.len() > max_bytes {
            return Err(RestError::TooLong(format!(
                "{at} answers at too great length; is it the right address?"
            )));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status, headers, body })
}

/// What is at the bottom of an error, in one line.
pub(crate) fn deepest(error: &(dyn Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    said(&deepest.to_string())
}

/// What somebody else says, in one line of a length that a log bears.
pub(crate) fn said(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_SAID) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None if line.is_empty() => "no reason given".to_owned(),
        None => line,
    }
}
