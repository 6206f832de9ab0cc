//! A sample live origin: what `keyshield demo` puts behind the shield, so that a first look needs
//! no encoder, no footage and no network.
//!
//! One 24-second clip ([`clip`], made by `scripts/make-demo-clip.sh`, embedded in the binary) is
//! served as an endless live stream at `/demo/master.m3u8` and as VOD at `/vod/master.m3u8`. There
//! is no packager and no state: the Media Sequence Number is the wall clock divided by the segment
//! length ([`timeline`]), and a segment is the clip's segment with its decode time written anew
//! ([`restamp`]). So two processes, or one before and after a restart, serve the same bytes at the
//! same moment, and the loop has no seam: no EXT-X-DISCONTINUITY, the media timeline just goes on.
//!
//! The way in is [`router`], a thin shell over [`origin`], which computes every answer from a path
//! and a time. [`playlists`] writes the playlists.
//!
//! Deliberately absent: encryption (the shield's work), Low-Latency HLS, byte ranges, conditional
//! requests, and a clock (the caller brings one).

mod clip;
mod origin;
mod playlists;
mod restamp;
mod router;
mod timeline;

pub use router::router;
