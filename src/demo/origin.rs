//! Every answer of the sample origin, computed from a path and a time.
//!
//! Two trees of the same shape: `/demo/…` is live, `/vod/…` is one loop. In each,
//! `master.m3u8`, and for every rendition `{rendition}/live.m3u8` (VOD: `index.m3u8`),
//! `{rendition}/init.mp4` and `{rendition}/{msn}.m4s`. Whatever is not one of these, and a segment
//! that does not exist yet or any more, is `None`, which the shell makes a 404.
//!
//! Deliberately absent: HTTP itself ([`router`](super::router)) and percent-decoding (no path here
//! needs an escape).

use axum::body::Bytes;

use super::clip::Rendition;
use super::playlists::{Form, media, multivariant};
use super::timeline::UnixMillis;
use crate::keys::MediaSequenceNumber;

const PLAYLIST_TYPE: &str = "application/vnd.apple.mpegurl";

/// What a path holds at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Resource {
    pub content_type: &'static str,
    pub cache_control: &'static str,
    pub body: Bytes,
}

/// The resource at `path` (as it stands in the request line, without a query) at `now`.
pub(super) fn resource(path: &str, now: UnixMillis) -> Option<Resource> {
    let (tree, rest) = path.strip_prefix('/')?.split_once('/')?;
    let form = match tree {
        "demo" => Form::Live,
        "vod" => Form::Vod,
        _ => return None,
    };
    if rest == "master.m3u8" {
        return Some(playlist(multivariant(form)));
    }
    let (directory, file) = rest.split_once('/')?;
    let rendition = Rendition::named(directory)?;
    if file == form.media_playlist_name() {
        Some(playlist(media(rendition, form, now)))
    } else if file == "init.mp4" {
        Some(media_file(rendition, rendition.init()))
    } else {
        let msn = segment_number(file).filter(|msn| form.segments(now).contains(&msn.0))?;
        Some(media_file(rendition, rendition.segment(msn)))
    }
}

/// The number in `{msn}.m4s`, in its one canonical spelling: one segment, one path.
fn segment_number(file: &str) -> Option<MediaSequenceNumber> {
    let digits = file.strip_suffix(".m4s")?;
    let number: u64 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(MediaSequenceNumber(number))
}

/// A playlist is not to be stored: the live ones change every two seconds, and whoever tries the
/// shield out should see it ask.
fn playlist(text: String) -> Resource {
    Resource { content_type: PLAYLIST_TYPE, cache_control: "no-store", body: text.into() }
}

/// Media never changes under its path.
fn media_file(rendition: &Rendition, body: Bytes) -> Resource {
    Resource { content_type: rendition.content_type, cache_control: "public, max-age=3600, immutable", body }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn found(path: &str) -> bool {
        resource(path, NOW).is_some()
    }

    #[test]
    fn whatever_a_playlist_names_is_there() {
        for tree in ["/demo", "/vod"] {
            let master =
                String::from_utf8(resource(&format!("{tree}/master.m3u8"), NOW).unwrap().body.to_vec())
                    .unwrap();
            let renditions = ["360p", "180p", "audio"];
            for rendition in renditions {
                let file = if tree == "/demo" { "live.m3u8" } else { "index.m3u8" };
                assert!(master.contains(&format!("{rendition}/{file}")), "{master}");
                let text = resource(&format!("{tree}/{rendition}/{file}"), NOW).unwrap();
                assert_eq!((text.content_type, text.cache_control), (PLAYLIST_TYPE, "no-store"));
                let text = String::from_utf8(text.body.to_vec()).unwrap();
                let segments: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
                assert_eq!(segments.len(), if tree == "/demo" { 8 } else { 12 });
                for file in segments.into_iter().chain(["init.mp4"]) {
                    let media = resource(&format!("{tree}/{rendition}/{file}"), NOW).unwrap();
                    let expected = if rendition == "audio" { "audio/mp4" } else { "video/mp4" };
                    assert_eq!(media.content_type, expected);
                }
            }
        }
    }

    #[test]
    fn a_segment_is_there_from_its_completion_until_a_minute_behind_the_window() {
        assert!(found("/demo/360p/899999999.m4s"), "the newest complete one");
        assert!(!found("/demo/360p/900000000.m4s"), "starts now");
        assert!(found("/demo/360p/899999962.m4s"), "8 in the window and 30 behind it");
        assert!(!found("/demo/360p/899999961.m4s"), "too old");
        assert!(found("/vod/audio/0.m4s") && found("/vod/audio/11.m4s"));
        assert!(!found("/vod/audio/12.m4s"));
    }

    #[test]
    fn unknown_paths_are_not_found() {
        for path in [
            "",
            "/",
            "/demo",
            "/demo/",
            "/demo//",
            "/vod/",
            "/other/master.m3u8",
            "/demo/master.m3u8/",
            "/demo/720p/live.m3u8",
            "/demo/360p/index.m3u8",
            "/vod/360p/live.m3u8",
            "/demo/360p/",
            "/demo/360p/init.mp4/",
            "/demo/360p/899999999",
            "/demo/360p/.m4s",
            "/demo/360p/+899999999.m4s",
            "/demo/360p/0899999999.m4s",
            "/demo/360p/-1.m4s",
            "/demo/360p/99999999999999999999999.m4s",
            "/vod/../demo/master.m3u8",
            "/demo/360p/../360p/init.mp4",
            "demo/master.m3u8",
        ] {
            assert!(!found(path), "{path}");
        }
    }

    #[test]
    fn one_segment_has_the_same_bytes_as_long_as_it_is_served() {
        let path = "/demo/180p/899999999.m4s";
        let later = UnixMillis(NOW.0 + 70_000);
        assert_eq!(resource(path, NOW).unwrap(), resource(path, later).unwrap());
    }
}
