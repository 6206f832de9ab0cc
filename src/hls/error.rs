//! What can be wrong with a playlist, and where.

use thiserror::Error;

/// A playlist that the shield will not serve: the line (from 1), the tag or URI on it, and the problem.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("line {line}: {problem}")]
pub struct PlaylistError {
    pub line: usize,
    /// Said with the line, so it is no source of the error that would be said again.
    pub problem: Problem,
}

/// Why a line stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Problem {
    #[error("not a playlist: the first line is not #EXTM3U")]
    NoHeader,
    #[error("not UTF-8 text")]
    NotUtf8,
    #[error("{tag} in a {playlist}")]
    WrongPlaylist { tag: &'static str, playlist: &'static str },
    #[error("{tag}: {why}")]
    BadTag { tag: String, why: String },
    #[error(
        "the origin's segments are already encrypted (METHOD={method}); on_encrypted says what becomes of such a stream"
    )]
    AlreadyEncrypted { method: String },
    #[error(
        "what the origin has encrypted so cannot be encrypted anew ({why}); on_encrypted = \"pass\" leaves it"
    )]
    NotRekeyable { why: String },
    #[error("EXT-X-SKIP has left out the EXT-X-KEY that says how the origin has encrypted it")]
    UnknownEncryption,
    #[error("the variable {name:?} is not defined")]
    UndefinedVariable { name: String },
    #[error("the URI {uri:?} cannot be followed: {why}")]
    BadUri { uri: String, why: String },
    #[error("more than {limit} segments")]
    TooManySegments { limit: usize },
    #[error("no key is there for Media Sequence Number {msn}")]
    NoKey { msn: u64 },
    #[error("a URI without an EXTINF before it")]
    NoDuration,
    #[error("no key is there for the init section")]
    NoKeyForInit,
}

impl Problem {
    pub(super) fn at(self, line: usize) -> PlaylistError {
        PlaylistError { line, problem: self }
    }
}
