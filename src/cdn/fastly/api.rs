//! Calls of Fastly's API: the token on each, its errors in the shield's words, and when the rate limit ends.
//!
//! Deliberately absent: what is called (`mod.rs`, `dictionary.rs`, `deploy.rs`), and trying again (`engine`).

use std::time::{Duration, UNIX_EPOCH};

use http::header::{ACCEPT, DATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use reqwest::{Client, RequestBuilder};
use serde::Deserialize;
use url::Url;

use super::FastlySettings;
use crate::cdn::{CdnError, CdnFault};
use crate::rest::{self, Answer, said};

const TOKEN: HeaderName = HeaderName::from_static("fastly-key");
const REMAINING: HeaderName = HeaderName::from_static("fastly-ratelimit-remaining");
/// Seconds since 1970.
const RESET: HeaderName = HeaderName::from_static("fastly-ratelimit-reset");
/// The limit counts by the hour: whatever a clock that goes wrong says, nobody waits longer.
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// The API, as one service's shield calls it.
#[derive(Debug)]
pub(super) struct Api {
    settings: FastlySettings,
    client: Client,
}

/// What Fastly says about an error.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Told {
    msg: String,
    detail: Option<String>,
}

impl Api {
    /// # Errors
    /// An address or an ID that no call can be made with.
    pub(super) fn new(settings: FastlySettings) -> Result<Self, CdnError> {
        let invalid = |what: String| CdnError::new(CdnFault::Invalid, what);
        let url = Url::parse(&settings.api_url)
            .map_err(|why| invalid(format!("the address of Fastly's API is no URL: {why}")))?;
        // The token is worth the whole service: it does not go over a network in the clear.
        let is_local = matches!(url.host_str(), Some("127.0.0.1" | "localhost" | "[::1]"));
        if url.scheme() != "https" && !(url.scheme() == "http" && is_local) {
            return Err(invalid("the address of Fastly's API must begin with https://".to_owned()));
        }
        let is_id = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric());
        if settings.service_id.is_empty() || !is_id(&settings.service_id) || !is_id(&settings.dictionary_id) {
            let what = "the IDs of a Fastly service and of its dictionary are letters and digits, \
                such as SU1Z0isxPaozGVKXdv0eY";
            return Err(invalid(what.to_owned()));
        }
        let client = rest::client(None, settings.timeout).map_err(invalid)?;
        Ok(Self { settings, client })
    }

    pub(super) fn settings(&self) -> &FastlySettings {
        &self.settings
    }

    /// A request for a path below the service, such as `version/3/clone`.
    pub(super) fn of_service(&self, method: Method, path: &str) -> RequestBuilder {
        self.request(method, &format!("service/{}/{path}", self.settings.service_id))
    }

    pub(super) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = format!("{}/{path}", self.settings.api_url.trim_end_matches('/'));
        self.client.request(method, url).timeout(self.settings.timeout)
    }

    /// Sends. `doing`: what for, for the error.
    ///
    /// # Errors
    /// Any answer but a success.
    pub(super) async fn call(&self, doing: &str, request: RequestBuilder) -> Result<Answer, CdnError> {
        let request = self.signed(request)?;
        judged(doing, rest::send(request, &self.settings.api_url).await?)
    }

    /// As [`Api::call`], for lists that may be long.
    pub(super) async fn call_for_much(
        &self,
        doing: &str,
        request: RequestBuilder,
        max_bytes: usize,
    ) -> Result<Answer, CdnError> {
        let request = self.signed(request)?;
        judged(doing, rest::send_within(request, &self.settings.api_url, max_bytes).await?)
    }

    fn signed(&self, request: RequestBuilder) -> Result<RequestBuilder, CdnError> {
        let refused = |what| CdnError::new(CdnFault::Refused, format!("the token for Fastly: {what}"));
        let token = self.settings.token.read().map_err(refused)?;
        let mut value = HeaderValue::from_str(token.expose())
            .map_err(|_| refused("it holds characters that no token has".to_owned()))?;
        value.set_sensitive(true);
        Ok(request.header(TOKEN, value).header(ACCEPT, "application/json"))
    }
}

fn judged(doing: &str, answer: Answer) -> Result<Answer, CdnError> {
    if answer.status.is_success() {
        return Ok(answer);
    }
    let mut error = CdnError::of_status(doing, answer.status, &answer.headers, &told(&answer));
    error.retry_after = until_reset(answer.status, &answer.headers).or(error.retry_after);
    if error.fault == CdnFault::Refused {
        error.what.push_str(
            "; the token needs the scope `global` for this service to store keys and deploy code, \
             `purge_select` to purge",
        );
    }
    Err(error)
}

/// In one line, both of the places where Fastly puts its reasons.
fn told(answer: &Answer) -> String {
    match answer.json::<Told>() {
        Some(Told { msg, detail: Some(detail) }) if !detail.is_empty() => said(&format!("{msg}: {detail}")),
        Some(Told { msg, .. }) if !msg.is_empty() => said(&msg),
        _ => said(&String::from_utf8_lossy(answer.body())),
    }
}

/// How long writes are refused: to the end of the hour that Fastly counts, by Fastly's own clock.
fn until_reset(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let is_used_up = text(REMAINING).is_some_and(|left| left.trim() == "0");
    if status != StatusCode::TOO_MANY_REQUESTS && !is_used_up {
        return None;
    }
    let reset = Duration::from_secs(text(RESET)?.trim().parse().ok()?);
    let now = httpdate::parse_http_date(text(DATE)?).ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(reset.saturating_sub(now).min(LONGEST_WAIT))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(status: u16, remaining: &'static str, reset: &'static str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(DATE, HeaderValue::from_static("Fri, 15 Jan 2027 08:00:00 GMT"));
        headers.insert(REMAINING, HeaderValue::from_static(remaining));
        headers.insert(RESET, HeaderValue::from_static(reset));
        until_reset(StatusCode::from_u16(status).unwrap(), &headers)
    }

    #[test]
    fn the_rate_limit_ends_when_fastly_says_by_its_own_clock() {
        // 1,800,000,000 is 08:00:00 of that day.
        assert_eq!(wait(429, "0", "1800000120"), Some(Duration::from_secs(120)));
        assert_eq!(wait(400, "0", "1800000120"), Some(Duration::from_secs(120)));
        assert_eq!(wait(400, "17", "1800000120"), None);
        assert_eq!(wait(429, "0", "1700000000"), Some(Duration::ZERO), "it has ended");
        assert_eq!(wait(429, "0", "1900000000"), Some(LONGEST_WAIT));
        assert_eq!(wait(429, "0", "soon"), None);
    }
}
