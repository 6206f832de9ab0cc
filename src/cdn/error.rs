//! Why a CDN did not do what it was asked.

use std::fmt;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use thiserror::Error;

use crate::rest::RestError;

/// What kind of trouble it is: it decides whether, and when, the same call is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CdnFault {
    /// Nobody answers, or not in time, or only that it cannot now.
    Away,
    /// Too many calls: [`CdnError::retry_after`] says when.
    RateLimited,
    /// The credential is not taken, or may not do this.
    Refused,
    /// What the configuration names (account, namespace, service, distribution) is not there.
    NotFound,
    /// The call itself is wrong in its vendor's eyes: trying again changes nothing.
    Invalid,
    /// It answers, and its edge has something else than was stored.
    Mismatch,
}

impl fmt::Display for CdnFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CdnFault::Away => "away",
            CdnFault::RateLimited => "rate-limited",
            CdnFault::Refused => "refused",
            CdnFault::NotFound => "not found",
            CdnFault::Invalid => "invalid",
            CdnFault::Mismatch => "mismatch",
        })
    }
}

/// A call that failed. The text names what was done and what the vendor said, never a credential.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what}")]
pub struct CdnError {
    pub fault: CdnFault,
    pub what: String,
    /// When the vendor says that calls are taken again.
    pub retry_after: Option<Duration>,
}

impl CdnError {
    pub fn new(fault: CdnFault, what: impl Into<String>) -> Self {
        Self { fault, what: what.into(), retry_after: None }
    }

    /// An answer's status, in the words of HTTP: what all vendors that are called by REST have in common.
    /// `said`: what the answer says, shortened.
    pub fn of_status(doing: &str, status: StatusCode, headers: &HeaderMap, said: &str) -> Self {
        let fault = match status {
            StatusCode::TOO_MANY_REQUESTS => CdnFault::RateLimited,
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => CdnFault::Refused,
            StatusCode::NOT_FOUND => CdnFault::NotFound,
            StatusCode::REQUEST_TIMEOUT => CdnFault::Away,
            status if status.is_client_error() => CdnFault::Invalid,
            _ => CdnFault::Away,
        };
        let what = format!("{doing}: {} {said}", status.as_u16());
        Self { fault, what, retry_after: retry_after(headers) }
    }

    /// Whether the same call may succeed later without anybody changing a setting.
    pub fn is_passing(&self) -> bool {
        matches!(self.fault, CdnFault::Away | CdnFault::RateLimited | CdnFault::Mismatch)
    }
}

impl From<RestError> for CdnError {
    fn from(error: RestError) -> Self {
        let fault = match error {
            RestError::Unreachable(_) => CdnFault::Away,
            RestError::TooLong(_) => CdnFault::Invalid,
        };
        Self::new(fault, error.to_string())
    }
}

/// Retry-After in seconds (RFC 9110 §10.2.3); the form with a date is not used by any of these APIs.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_whether_to_try_again_and_when() {
        let mut headers = HeaderMap::new();
        headers.insert("retry-after", "17".parse().unwrap());
        let of = |status: u16| {
            let status = StatusCode::from_u16(status).unwrap();
            CdnError::of_status("storing keys", status, &headers, "said")
        };
        assert_eq!(of(429).fault, CdnFault::RateLimited);
        assert_eq!(of(429).retry_after, Some(Duration::from_secs(17)));
        assert_eq!(of(429).to_string(), "storing keys: 429 said");
        for (status, passing) in
            [(500, true), (503, true), (408, true), (403, false), (404, false), (400, false)]
        {
            assert_eq!(of(status).is_passing(), passing, "{status}");
        }
    }
}
