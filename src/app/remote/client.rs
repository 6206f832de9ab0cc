//! Calls of the control API, and its refusals in words.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
pub(super) use reqwest::Method;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::RemoteArgs;

const TIMEOUT: Duration = Duration::from_secs(30);
/// Rows that are asked for at once.
const PAGE: usize = 500;

pub(super) struct Client {
    http: reqwest::Client,
    control: String,
    token: Option<Zeroizing<String>>,
}

impl Client {
    pub(super) fn new(args: &RemoteArgs) -> anyhow::Result<Self> {
        // Another part of the process may have been first; one is as good as the other.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Straight to the control plane, whatever HTTP_PROXY says: it is on loopback or a private network, which no proxy
        // reaches, and the token is nobody else's to see.
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        Ok(Self {
            http: http.build().context("cannot make an HTTP client")?,
            control: args.control.trim_end_matches('/').to_owned(),
            // Set to nothing is not set.
            token: args.token.clone().filter(|token| !token.is_empty()),
        })
    }

    /// One call. An answer without a body is `null`.
    ///
    /// # Errors
    /// No answer, or a refusal with its reason.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Value> {
        let mut request = self.http.request(method, format!("{}{path}", self.control));
        if let Some(token) = &self.token {
            request = request.bearer_auth(&**token);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.map_err(|error| {
            let cause =
                std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
            anyhow!("the control plane at {} does not answer: {cause}", self.control)
        })?;
        let status = response.status();
        let bytes = response.bytes().await.context("the answer broke off")?;
        if status.is_success() {
            if bytes.is_empty() {
                return Ok(Value::Null);
            }
            return serde_json::from_slice(&bytes)
                .with_context(|| format!("{} answered with something that is no JSON", self.control));
        }
        let problem: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let hint = match status.as_u16() {
            401 if self.token.is_none() => "; give a token with KEYSHIELD_TOKEN",
            _ => "",
        };
        bail!(
            "{} {}{hint}",
            status.as_u16(),
            reason(&problem, status.canonical_reason().unwrap_or("refused"))
        )
    }

    /// All rows of a list, page by page, under the name that they have in each.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub(super) async fn pages(&self, path: &str, rows: &str, cursor: &str) -> anyhow::Result<Value> {
        let mut all = Vec::new();
        let mut query = format!("?limit={PAGE}");
        loop {
            let mut page = self.call(Method::GET, &format!("{path}{query}"), None).await?;
            let Some(Value::Array(more)) = page.get_mut(rows).map(Value::take) else {
                bail!("{} answered without {rows:?}: is it a keyshield of this version?", self.control);
            };
            let ended = more.is_empty();
            all.extend(more);
            query = match &page["next"] {
                Value::String(next) if !ended => format!("?limit={PAGE}&{cursor}={next}"),
                Value::Number(next) if !ended => format!("?limit={PAGE}&{cursor}={next}"),
                _ => return Ok(json!({ rows: all })),
            };
        }
    }
}

/// What a problem (RFC 9457) says, with the fields that it names.
fn reason(problem: &Value, otherwise: &str) -> String {
    let mut text = problem["detail"].as_str().unwrap_or(otherwise).to_owned();
    for error in problem["errors"].as_array().into_iter().flatten() {
        if let (Some(field), Some(detail)) = (error["field"].as_str(), error["detail"].as_str()) {
            text.push_str(&format!("; {field}: {detail}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_its_fields() {
        let problem = json!({
            "status": 422, "detail": "the body is not valid",
            "errors": [{ "field": "config.segmentsPerKey", "detail": "must be at least 1" }],
        });
        assert_eq!(reason(&problem, ""), "the body is not valid; config.segmentsPerKey: must be at least 1");
        assert_eq!(reason(&Value::Null, "Bad Gateway"), "Bad Gateway");
    }
}
