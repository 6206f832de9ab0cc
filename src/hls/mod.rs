//! HLS playlists: read, understood and rewritten; segment links spelt and read.
//!
//! Pure, and lossless: a line that is not ours to change goes out with the bytes it came in with. Rules cite
//! the sections of draft-pantos-hls-rfc8216bis-22 as "D22 §…". Deliberately absent: fetching, caching, and
//! which key a segment gets (`keys::schedule` says, a closure here asks).

mod attributes;
mod byte_range;
mod encrypted;
mod error;
mod link;
mod linker;
mod media;
mod mounts;
mod multivariant;
mod playlist;
#[cfg(test)]
mod properties;
mod steering;
#[cfg(test)]
mod tests;
mod variables;
mod version;

pub use error::{PlaylistError, Problem};
pub use link::{Link, LinkError, LinkedPath, ORIGIN_QUERY_PARAM, OriginKey, read_successor};
pub use linker::Surroundings;
pub use media::{CipherKey, MediaRewrite, PeriodKey, rewrite_media};
pub use mounts::{
    BaseUrl, Mount, MountError, Mounts, Place as OriginPath, canonical_path, normalized_path, without_params,
};
pub use multivariant::{SessionKey, rewrite_multivariant};
pub use playlist::{Kind, MediaFacts, Playlist, looks_like_a_playlist};
pub use steering::{SteeringError, rewrite_steering};
pub use variables::{VariableSources, Variables};
