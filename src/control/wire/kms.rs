//! Key management services, as they are asked for and told of.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::date_time;
use crate::control::problem::{Faults, Problem};
use crate::engine::{self, RewrapState};

const MAX_PROVIDER_LEN: usize = 64;

/// Where all data encryption keys are to go.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(examples(json!({"to": "vault"})))]
pub(in crate::control) struct RewrapRequest {
    /// A provider of `kms.provider` or `kms.also`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[a-z]+$")]
    to: String,
}

impl RewrapRequest {
    /// # Errors
    /// What cannot be a provider's name. Whether it is held, the engine knows.
    pub(in crate::control) fn checked(self) -> Result<String, Problem> {
        let length = 1..=MAX_PROVIDER_LEN;
        let is_name =
            length.contains(&self.to.len()) && self.to.bytes().all(|byte| byte.is_ascii_lowercase());
        match is_name {
            true => Ok(self.to),
            false => Err(Faults::of("to", format!("must be 1 to {MAX_PROVIDER_LEN} of the letters a-z"))),
        }
    }
}

/// Who wraps the data encryption keys.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct KmsStatus {
    /// The one that wraps new keys is the first.
    providers: Vec<Provider>,
    /// What the data encryption keys are under.
    keys: Vec<KeyUse>,
}

/// A provider that is held.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = KmsProvider)]
pub(in crate::control) struct Provider {
    #[schema(value_type = String, examples("vault"))]
    provider: &'static str,
    /// New keys are wrapped by it.
    wraps: bool,
    /// The key by which it would wrap now; null when it does not answer, or does not let the key be used.
    #[schema(required = true, examples("vault:transit/keyshield"))]
    kek_id: Option<String>,
    /// Of that key, where keys have versions.
    #[schema(required = true)]
    version: Option<u64>,
    /// Why there is no key, and what to look at.
    #[schema(required = true)]
    error: Option<String>,
}

/// How much a key wraps, or a version of it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = KmsKeyUse)]
pub(in crate::control) struct KeyUse {
    #[schema(examples("vault:transit/keyshield"))]
    kek_id: String,
    #[schema(required = true)]
    version: Option<u64>,
    /// Its provider is held by this node. What is under another one does not open here.
    held: bool,
    /// Data encryption keys of streams that are not deleted.
    #[schema(minimum = 0)]
    data_keys: u64,
}

impl From<engine::KmsStatus> for KmsStatus {
    fn from(status: engine::KmsStatus) -> Self {
        let provider = |held: engine::HeldStatus| {
            let (key, error) = match held.key {
                Ok(key) => (Some(key), None),
                Err(error) => (None, Some(error.to_string())),
            };
            Provider {
                provider: held.provider,
                wraps: held.wraps,
                version: key.as_ref().and_then(|key| key.version),
                kek_id: key.map(|key| key.kek_id),
                error,
            }
        };
        let key = |key: engine::KeyUse| KeyUse {
            kek_id: key.kek_id,
            version: key.version,
            held: key.held,
            data_keys: key.data_keys,
        };
        Self {
            providers: status.held.into_iter().map(provider).collect(),
            keys: status.keys.into_iter().map(key).collect(),
        }
    }
}

/// A re-wrap, and how far it is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Rewrap {
    /// `running`, `done` (every key was looked at) or `broken-off`.
    #[schema(value_type = String, examples("running"))]
    state: &'static str,
    #[schema(value_type = String, examples("vault"))]
    to: &'static str,
    /// The key that all are to be under.
    #[schema(examples("vault:transit/keyshield"))]
    kek_id: String,
    #[schema(required = true)]
    version: Option<u64>,
    /// Data encryption keys when it began.
    #[schema(minimum = 0)]
    total: u64,
    #[schema(minimum = 0)]
    rewrapped: u64,
    /// Under the key before.
    #[schema(minimum = 0)]
    current: u64,
    /// Gone meanwhile, with their streams.
    #[schema(minimum = 0)]
    gone: u64,
    /// Left as they were.
    #[schema(minimum = 0)]
    failed: u64,
    /// The first hundred of those.
    failures: Vec<RewrapFailure>,
    /// Why it broke off.
    #[schema(required = true)]
    error: Option<String>,
    started_by: String,
    #[schema(format = DateTime)]
    started_at: String,
    #[schema(format = DateTime, required = true)]
    ended_at: Option<String>,
}

/// A data encryption key that was left as it was.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct RewrapFailure {
    stream_id: String,
    /// Of the stream's data encryption keys.
    #[schema(minimum = 1)]
    dek_version: u32,
    /// What wraps it.
    kek_id: String,
    error: String,
}

impl From<engine::Rewrap> for Rewrap {
    fn from(rewrap: engine::Rewrap) -> Self {
        let (state, error) = match rewrap.state {
            RewrapState::Running => ("running", None),
            RewrapState::Done => ("done", None),
            RewrapState::BrokenOff(why) => ("broken-off", Some(why)),
        };
        let failure = |failure: engine::RewrapFailure| RewrapFailure {
            stream_id: failure.stream.to_string(),
            dek_version: failure.version.0,
            kek_id: failure.kek_id,
            error: failure.why,
        };
        Self {
            state,
            to: rewrap.to,
            kek_id: rewrap.kek_id,
            version: rewrap.version,
            total: rewrap.total,
            rewrapped: rewrap.rewrapped,
            current: rewrap.current,
            gone: rewrap.gone,
            failed: rewrap.failed,
            failures: rewrap.failures.into_iter().map(failure).collect(),
            error,
            started_by: rewrap.started_by,
            started_at: date_time(rewrap.started_at),
            ended_at: rewrap.ended_at.map(date_time),
        }
    }
}

/// What a node knows of re-wrapping.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Rewrapping {
    /// Another node is at it: ask that one how far it is.
    elsewhere: bool,
    /// The last one of this node since it was started.
    #[schema(required = true)]
    rewrap: Option<Rewrap>,
}

impl From<engine::Rewrapping> for Rewrapping {
    fn from(rewrapping: engine::Rewrapping) -> Self {
        Self { elsewhere: rewrapping.elsewhere, rewrap: rewrapping.job.map(Rewrap::from) }
    }
}
