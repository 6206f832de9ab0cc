//! A Media Playlist as the shield publishes it: keys named, segments linked, all else as it was.
//!
//! Each segment gets an EXT-X-KEY before its EXTINF, or before the first of its parts, and a link in its URI. Init
//! sections stand in clear by default: before the first KEY, and later between a KEY of METHOD=NONE and the next one,
//! because a KEY applies to every EXT-X-MAP behind it (D22 §4.4.4.4). When they are to be encrypted, each has a KEY
//! with an IV of its own before it (D22 §4.4.4.5 wants the IV written).
//!
//! A byte range is a segment of its own: it is linked with the range, and EXT-X-BYTERANGE goes (D22 §4.4.4.2). In an
//! I-frame playlist the whole file is one chain, into which players reach by ranges of their own (D22 §6.3.6), unless it
//! is sealed under AES-256-GCM.
//!
//! What cannot be rewritten rightly is refused with its line. A refusal is a clean error; a guess would be ciphertext
//! that no player can decrypt, or plaintext that slips by. What goes through the lines is `writer.rs`.

#[cfg(test)]
mod tests;
mod writer;

use super::error::PlaylistError;
use super::linker::Surroundings;
use super::playlist::Playlist;
use crate::keys::{IvMode, KeyId, KeyMethod, LinkKey, MediaSequenceNumber, Ordinal, Subtitles};

/// The content key that covers a segment, as far as a playlist shows it.
#[derive(Debug, Clone, Copy)]
pub struct PeriodKey<'a> {
    /// Whose ID and link key the links of the period bear, for good: a published path never changes.
    pub signer: (KeyId, &'a LinkKey),
    /// What the period's segments are encrypted under now.
    pub cipher: CipherKey<'a>,
    /// The ordinal of `cipher` where it took the place of a revoked signer.
    pub successor: Option<Ordinal>,
}

/// A content key that a playlist names.
#[derive(Debug, Clone, Copy)]
pub struct CipherKey<'a> {
    pub id: KeyId,
    pub method: KeyMethod,
    pub iv_mode: IvMode,
    pub link: &'a LinkKey,
}

/// What a Media Playlist's rewriting depends on besides its text.
pub struct MediaRewrite<'a> {
    pub surroundings: Surroundings<'a>,
    /// Names the rendition within its stream, the same at every node and for good.
    pub rendition: &'a str,
    pub encrypt_init_sections: bool,
    pub subtitles: Subtitles,
    /// The key that covers a segment; `None` refuses the playlist.
    pub key_at: &'a dyn Fn(MediaSequenceNumber) -> Option<PeriodKey<'a>>,
}

/// Rewrites a Media Playlist.
///
/// # Errors
/// The first line that cannot be rewritten rightly.
pub fn rewrite_media(playlist: &Playlist<'_>, rewrite: &MediaRewrite<'_>) -> Result<String, PlaylistError> {
    let facts = playlist.media_facts()?;
    writer::Writer::new(playlist, rewrite, &facts).run()
}
