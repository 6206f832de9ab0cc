//! What went wrong, as `application/problem+json` (RFC 9457), and the one table from reason to status.
//!
//! `type` tells programs which of several conflicts it was, `detail` tells people what to do, `errors` names the
//! fields. Deliberately absent: anything that only the log should have.

use axum::Json;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::OperatorError;

pub(super) const PROBLEM_JSON: &str = "application/problem+json";

/// Why a call is not answered with what it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    BadJson,
    Unauthenticated,
    Forbidden,
    NoRoute,
    NoStream,
    NoKey,
    NoIncident,
    Method,
    StreamDiffers,
    PrefixTaken,
    StreamConfigured,
    StreamStopped,
    StreamChanged,
    RevocationDisabled,
    KeyNotRevocable,
    RewrapRuns,
    TooLarge,
    NotJson,
    Invalid,
    NotReady,
    Failed,
    KmsFailed,
    OutcomeUnknown,
    NoIssuerKeys,
}

impl Kind {
    #[cfg(test)]
    pub(super) const ALL: [Kind; 24] = [
        Kind::BadJson,
        Kind::Unauthenticated,
        Kind::Forbidden,
        Kind::NoRoute,
        Kind::NoStream,
        Kind::NoKey,
        Kind::NoIncident,
        Kind::Method,
        Kind::StreamDiffers,
        Kind::PrefixTaken,
        Kind::StreamConfigured,
        Kind::StreamStopped,
        Kind::StreamChanged,
        Kind::RevocationDisabled,
        Kind::KeyNotRevocable,
        Kind::RewrapRuns,
        Kind::TooLarge,
        Kind::NotJson,
        Kind::Invalid,
        Kind::NotReady,
        Kind::Failed,
        Kind::KmsFailed,
        Kind::OutcomeUnknown,
        Kind::NoIssuerKeys,
    ];

    /// Status, the end of `type`, `title`.
    pub(super) fn row(self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        match self {
            Kind::BadJson => (S::BAD_REQUEST, "malformed-json", "The body is not JSON"),
            Kind::Unauthenticated => (S::UNAUTHORIZED, "unauthenticated", "No valid token"),
            Kind::Forbidden => (S::FORBIDDEN, "forbidden", "Not permitted to this role"),
            Kind::NoRoute => (S::NOT_FOUND, "no-such-path", "Nothing is at this path"),
            Kind::NoStream => (S::NOT_FOUND, "no-such-stream", "No such stream"),
            Kind::NoKey => (S::NOT_FOUND, "no-such-key", "No such key"),
            Kind::NoIncident => (S::NOT_FOUND, "no-such-incident", "No such incident"),
            Kind::Method => (S::METHOD_NOT_ALLOWED, "method-not-allowed", "Method not allowed"),
            Kind::StreamDiffers => (S::CONFLICT, "stream-differs", "The stream exists otherwise"),
            Kind::PrefixTaken => (S::CONFLICT, "prefix-taken", "The path prefix is taken"),
            Kind::StreamConfigured => (S::CONFLICT, "stream-configured", "Declared in the configuration"),
            Kind::StreamStopped => (S::CONFLICT, "stream-stopped", "The stream is stopped"),
            Kind::StreamChanged => (S::CONFLICT, "stream-changed", "The stream was changed meanwhile"),
            Kind::RevocationDisabled => (S::CONFLICT, "revocation-disabled", "Revocation is switched off"),
            Kind::KeyNotRevocable => (S::CONFLICT, "key-not-revocable", "The key cannot be revoked"),
            Kind::RewrapRuns => (S::CONFLICT, "rewrap-runs", "Another re-wrap runs"),
            Kind::TooLarge => (S::PAYLOAD_TOO_LARGE, "body-too-large", "The body is too large"),
            Kind::NotJson => (S::UNSUPPORTED_MEDIA_TYPE, "not-json", "The body's type is not JSON"),
            Kind::Invalid => (S::UNPROCESSABLE_ENTITY, "invalid", "The request does not make sense"),
            Kind::NotReady => (S::SERVICE_UNAVAILABLE, "not-ready", "Keys are not loaded yet"),
            Kind::Failed => (S::SERVICE_UNAVAILABLE, "failed", "It could not be done"),
            Kind::KmsFailed => (S::SERVICE_UNAVAILABLE, "kms-failed", "The KMS does not do it"),
            Kind::OutcomeUnknown => {
                (S::SERVICE_UNAVAILABLE, "outcome-unknown", "It is not known whether it was done")
            }
            Kind::NoIssuerKeys => (S::SERVICE_UNAVAILABLE, "no-issuer-keys", "Tokens cannot be checked"),
        }
    }
}

/// Why a call is not answered with what it asks for (RFC 9457).
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct Problem {
    /// Which problem this is, for programs: `urn:keyshield:problem:` and a name.
    #[serde(rename = "type")]
    #[schema(value_type = String, pattern = "^urn:keyshield:problem:[a-z-]+$",
        examples("urn:keyshield:problem:invalid"))]
    type_uri: String,
    #[schema(value_type = String, examples("The request does not make sense"))]
    title: &'static str,
    /// The answer's status.
    #[schema(minimum = 400, maximum = 599, examples(422))]
    status: u16,
    /// What is wrong here, and what to do about it.
    #[schema(examples("config.segmentsPerKey must be between 1 and 1000000"))]
    detail: String,
    /// The fields that are wrong.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    errors: Vec<FieldError>,
    #[serde(skip)]
    challenge: Option<&'static str>,
}

/// A field that is wrong.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub(super) struct FieldError {
    /// Its path in the body, or the name of a parameter.
    #[schema(examples("config.segmentsPerKey"))]
    pub(super) field: String,
    #[schema(examples("must be between 1 and 1000000"))]
    pub(super) detail: String,
}

impl Problem {
    pub(super) fn new(kind: Kind, detail: impl Into<String>) -> Self {
        let (status, name, title) = kind.row();
        Self {
            type_uri: format!("urn:keyshield:problem:{name}"),
            title,
            status: status.as_u16(),
            detail: detail.into(),
            errors: Vec::new(),
            challenge: None,
        }
    }

    pub(super) fn with_challenge(mut self, challenge: &'static str) -> Self {
        self.challenge = Some(challenge);
        self
    }

    #[cfg(test)]
    pub(super) fn detail(&self) -> &str {
        &self.detail
    }

    #[cfg(test)]
    pub(super) fn errors(&self) -> &[FieldError] {
        &self.errors
    }
}

/// Fields that were found wrong, gathered so that one answer names them all.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<FieldError>);

impl Faults {
    pub(super) fn of(field: impl Into<String>, detail: impl Into<String>) -> Problem {
        let mut faults = Self::default();
        faults.add(field, detail);
        faults.into_problem()
    }

    pub(super) fn add(&mut self, field: impl Into<String>, detail: impl Into<String>) {
        self.0.push(FieldError { field: field.into(), detail: detail.into() });
    }

    /// # Errors
    /// The problem that names every field, when there is one.
    pub(super) fn none(self) -> Result<(), Problem> {
        if self.0.is_empty() { Ok(()) } else { Err(self.into_problem()) }
    }

    fn into_problem(self) -> Problem {
        let all: Vec<_> = self.0.iter().map(|e| format!("{} {}", e.field, e.detail)).collect();
        Problem { errors: self.0, ..Problem::new(Kind::Invalid, all.join("; ")) }
    }
}

impl From<OperatorError> for Problem {
    fn from(error: OperatorError) -> Self {
        let kind = match &error {
            OperatorError::NoStream(_) => Kind::NoStream,
            OperatorError::NoKey { .. } => Kind::NoKey,
            OperatorError::NoIncident(_) => Kind::NoIncident,
            OperatorError::Differs { .. } => Kind::StreamDiffers,
            OperatorError::PrefixTaken { .. } => Kind::PrefixTaken,
            OperatorError::Configured(_) => Kind::StreamConfigured,
            OperatorError::Stopped(_) => Kind::StreamStopped,
            OperatorError::Overtaken(_) => Kind::StreamChanged,
            OperatorError::RevocationDisabled(_) => Kind::RevocationDisabled,
            OperatorError::NotRevocable { .. } => Kind::KeyNotRevocable,
            OperatorError::NotReady => Kind::NotReady,
            OperatorError::NotHeld { held, .. } => {
                return Faults::of("to", format!("is not held here; name it in kms.also. Held are {held}"));
            }
            OperatorError::RewrapRuns(_) => Kind::RewrapRuns,
            OperatorError::Kms(_) => Kind::KmsFailed,
            OperatorError::Failed(why) => {
                tracing::error!(why, "an operator's call failed");
                return Problem::new(
                    Kind::Failed,
                    "the store or the KMS failed: nothing was changed, and the log says why",
                );
            }
            OperatorError::Unknown(why) => {
                tracing::error!(why, "an operator's call may have been carried out or not");
                return Problem::new(
                    Kind::OutcomeUnknown,
                    "the store did not say whether it was done, and the log says why: read the stream and its \
                     keys, and ask again if it was not",
                );
            }
        };
        Problem::new(kind, error.to_string())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let challenge = self.challenge;
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(challenge) = challenge {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operators_error_has_the_status_its_reader_expects() {
        let id = || "ch1".parse().unwrap();
        let key = crate::keys::KeyId::from_bytes([7; 16]);
        let taken = OperatorError::PrefixTaken {
            prefix: "/live/".into(),
            origin: "main".into(),
            owner: "ch2".parse().unwrap(),
        };
        for (error, status) in [
            (OperatorError::NoStream(id()), 404),
            (OperatorError::NoKey { stream: id(), key }, 404),
            (OperatorError::Differs { id: id(), field: "playlistUrl".into() }, 409),
            (taken, 409),
            (OperatorError::Configured(id()), 409),
            (OperatorError::Stopped(id()), 409),
            (OperatorError::Overtaken(id()), 409),
            (OperatorError::RevocationDisabled(id()), 409),
            (OperatorError::NotRevocable { key, state: "destroyed" }, 409),
            (OperatorError::NotReady, 503),
            (OperatorError::NotHeld { provider: "aws".into(), held: "local".into() }, 422),
            (OperatorError::RewrapRuns("to vault".into()), 409),
            (OperatorError::Kms("it is sealed".into()), 503),
            (OperatorError::Failed("password=hunter2".into()), 503),
            (OperatorError::Unknown("password=hunter2".into()), 503),
        ] {
            let problem = Problem::from(error);
            assert_eq!(problem.status, status, "{problem:?}");
            assert!(!problem.detail.contains("hunter2"), "only the log has it: {problem:?}");
        }
    }

    #[test]
    fn every_problem_has_a_type_of_its_own_and_is_documented() {
        let docs = include_str!("../../docs/control-api.md");
        let mut types: Vec<_> = Kind::ALL.iter().map(|kind| kind.row().1).collect();
        for kind in Kind::ALL {
            let (status, name, _) = kind.row();
            let row = format!("| {} | `{name}` |", status.as_u16());
            assert!(docs.contains(&row), "docs/control-api.md lacks {row}");
        }
        types.sort_unstable();
        types.dedup();
        assert_eq!(types.len(), Kind::ALL.len());
    }

    #[test]
    fn fields_that_are_wrong_are_all_named() {
        let mut faults = Faults::default();
        faults.add("config.segmentsPerKey", "must be between 1 and 1000000");
        faults.add("playlistUrl", "is too long");
        let problem = serde_json::to_value(faults.none().unwrap_err()).unwrap();
        assert_eq!(problem["type"], "urn:keyshield:problem:invalid");
        assert_eq!(problem["errors"][0]["field"], "config.segmentsPerKey");
        assert_eq!(problem["errors"][1]["detail"], "is too long");
        assert!(Faults::default().none().is_ok());
    }
}
