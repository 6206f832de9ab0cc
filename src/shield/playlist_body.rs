//! A playlist's bytes from its origin: whole, bounded, without their Content-Encoding.
//!
//! Apart from `playlists.rs`, because others than the data plane ask too: a stream that begins is looked at
//! first. Deliberately absent: what the playlist says.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use flate2::read::GzDecoder;
use thiserror::Error;

use super::upstream::{OriginError, OriginRequest, Upstream};
use crate::hls::{OriginPath, looks_like_a_playlist};

/// As much of a body as tells what it is, when it is no playlist.
const HEAD_LEN: usize = 16;

/// Why there is no playlist at a place.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlaylistBodyError {
    #[error("{0}")]
    Origin(#[from] OriginError),
    #[error("the origin's answer is empty")]
    Empty,
    #[error("not a playlist: begins with {}", String::from_utf8_lossy(.head).escape_debug())]
    NotAPlaylist { head: Bytes },
}

/// Fetches what begins like a playlist, of at most `limit` bytes, without its Content-Encoding. The origin may think
/// for `patience` longer than usual.
///
/// # Errors
/// [`PlaylistBodyError`]; what is no playlist is told from its first bytes, and no more of it is fetched.
pub async fn playlist_body(
    upstream: &Upstream,
    place: &OriginPath<'_>,
    limit: usize,
    patience: Duration,
) -> Result<Bytes, PlaylistBodyError> {
    let request = OriginRequest {
        query: place.query.as_deref(),
        accept_gzip: true,
        patience,
        ..OriginRequest::to(place.mount, &place.path)
    };
    let mut response = upstream.fetch(request).await?.ok()?.framed()?;
    let gzip = match response.encoding() {
        None => false,
        Some(encoding) if encoding.eq_ignore_ascii_case("gzip") => true,
        Some(encoding) => {
            let (origin, encoding) = (response.origin().to_owned(), encoding.to_owned());
            return Err(OriginError::Encoded { origin, encoding }.into());
        }
    };
    let first = response.chunk().await?.unwrap_or_default();
    // A long media file is told from its first bytes, and no more of it is fetched. A playlist's first
    // chunk can be shorter than its header, when the origin dribbles: then the rest decides.
    if !gzip && first.len() >= HEAD_LEN && !looks_like_a_playlist(&first) {
        return Err(not_a_playlist(&first));
    }
    if first.is_empty() {
        return Err(PlaylistBodyError::Empty);
    }
    let rest = response.body(limit.saturating_sub(first.len())).await?;
    let body = if rest.is_empty() { first } else { Bytes::from([first, rest].concat()) };
    let body = if gzip { gunzip(&body, limit, response.origin())? } else { body };
    if looks_like_a_playlist(&body) { Ok(body) } else { Err(not_a_playlist(&body)) }
}

fn not_a_playlist(body: &[u8]) -> PlaylistBodyError {
    PlaylistBodyError::NotAPlaylist { head: Bytes::copy_from_slice(&body[..body.len().min(HEAD_LEN)]) }
}

/// # Errors
/// Damaged gzip, and what would unpack to more than `limit` bytes.
fn gunzip(body: &[u8], limit: usize, origin: &str) -> Result<Bytes, OriginError> {
    let mut plain = Vec::new();
    let read = GzDecoder::new(body).take(limit as u64 + 1).read_to_end(&mut plain);
    read.map_err(|_| OriginError::BadGzip { origin: origin.to_owned() })?;
    if plain.len() > limit {
        return Err(OriginError::TooLong { origin: origin.to_owned(), limit: limit as u64 });
    }
    Ok(plain.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(plain: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(plain).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn gzip_is_undone_up_to_the_limit() {
        assert_eq!(gunzip(&gzip(b"#EXTM3U\n"), 100, "main").unwrap(), "#EXTM3U\n");
        let bomb = gzip(&vec![b'x'; 10_000_000]);
        assert!(bomb.len() < 20_000);
        assert!(matches!(gunzip(&bomb, 1_000_000, "main"), Err(OriginError::TooLong { .. })));
        assert!(matches!(gunzip(b"not gzip", 100, "main"), Err(OriginError::BadGzip { .. })));
    }

    #[test]
    fn what_is_no_playlist_is_named_by_its_beginning() {
        let reason = |body: &[u8]| not_a_playlist(body).to_string();
        assert_eq!(reason(b"<html>"), "not a playlist: begins with <html>");
        assert_eq!(reason(b"\x47\x00\n"), "not a playlist: begins with G\\0\\n");
        assert!(reason(&[b'x'; 1_000]).len() < 60);
    }
}
