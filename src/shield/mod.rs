//! The data plane: what players and CDNs speak to, on pingora.
//!
//! Every request is one of four things: a key, a segment (or init section) behind a link, a playlist of a
//! stream, or a path of an origin that is passed through. The first three are answered in the request phase
//! from memory or through [`upstream`]; only the last one goes the proxy's own way. Rule above all: what lies
//! under a stream's prefix leaves rewritten, encrypted, or not at all.
//!
//! Deliberately absent: changing anything. The engine is asked, never written to.

mod directives;
mod documents;
mod fill;
mod flow;
mod keys;
mod origin_keys;
mod pass_through;
mod playlist_body;
mod playlists;
mod publish;
mod range;
mod reply;
mod route;
mod segments;
mod service;
mod settings;
pub mod upstream;

pub use playlist_body::{PlaylistBodyError, playlist_body};
pub use service::{Shield, service};
pub use settings::ShieldSettings;
