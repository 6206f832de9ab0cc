//! What can be wrong with the configuration: one line each, with the place and what to do.

use std::path::PathBuf;

use thiserror::Error;

use super::Source;
use crate::hls::MountError;
use crate::keys::{IdError, PolicyError};

/// What is wrong with the configuration: where, and what to do.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error(
        "there is no configuration: give --config FILE, or origins by KEYSHIELD_ORIGINS or --set origins=[…]"
    )]
    Nothing,
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}, line {line}: {why}")]
    Syntax { path: PathBuf, line: usize, why: String },
    #[error("{path}: unknown key {key}, line {line}{hint}")]
    UnknownInFile { path: PathBuf, key: String, line: usize, hint: String },
    #[error("{given_by}: unknown key {key}{hint}")]
    Unknown { given_by: Source, key: String, hint: String },
    #[error("unknown environment variable {name}{hint}")]
    UnknownVariable { name: String, hint: String },
    #[error("environment variable {name}={value:?}: {why}")]
    Environment { name: String, value: String, why: String },
    #[error("{given_by}: {key} {why}")]
    Kind { given_by: Source, key: String, why: String },
    #[error("{one} and {other} disagree on {key}: {one_value} and {other_value}; keep one of them")]
    Disagree { key: String, one: Source, one_value: String, other: Source, other_value: String },
    #[error("{field} = {value:?}: {why}")]
    Field { field: String, value: String, why: String },
    /// As [`ConfigError::Field`], where the value is a secret or there is none.
    #[error("{field}: {why}")]
    Entry { field: String, why: String },
    #[error("{error} ({given_by})")]
    At { error: Box<ConfigError>, given_by: Source },
    #[error("{0}")]
    Origins(#[from] MountError),
    #[error("stream {stream}: {source}")]
    Policy { stream: String, source: PolicyError },
    #[error("stream {id:?}: {source}")]
    StreamId { id: String, source: IdError },
    #[error("stream {stream}: playlist_url {url:?}: {source}; add it to [[origins]] or correct it")]
    StreamUrl { stream: String, url: String, source: MountError },
    #[error("stream {stream}: path_prefix {prefix:?} does not begin the path of playlist_url, {path:?}")]
    StreamPrefix { stream: String, prefix: String, path: String },
    #[error("streams {one} and {other} both own {prefix:?} at origin {origin:?}")]
    PrefixTaken { one: String, other: String, prefix: String, origin: String },
    #[error("stream {0} is configured twice")]
    StreamTwice(String),
}

impl ConfigError {
    /// The error with the place that gave the field, where it has one and that place is not the default.
    pub(super) fn at(self, source_of: impl Fn(&str) -> Source) -> Self {
        let given_by = match &self {
            Self::Field { field, .. } | Self::Entry { field, .. } => source_of(field),
            _ => return self,
        };
        match given_by {
            Source::Default => self,
            given_by => Self::At { error: Box::new(self), given_by },
        }
    }
}
