//! The clip itself: which renditions there are, their media, and what is true of it.
//!
//! The media is embedded, so that `keyshield demo` is one file that runs anywhere. What a
//! Multivariant Playlist says of a rendition (codec, resolution, frame rate) stands here beside
//! it, and the bit rates are computed from the bytes; tests hold each against the files, so that
//! a new clip cannot make the playlists lie.
//!
//! Deliberately absent: reading media from disk, and any parsing of media at run time other than
//! [`restamp`](super::restamp).

use axum::body::Bytes;

use super::restamp::{Stamp, restamp};
use super::timeline::{LOOP_SEGMENTS, Timing};
use crate::keys::MediaSequenceNumber;

/// Embeds `init.mp4` and the twelve segments of one rendition.
macro_rules! embed {
    ($rendition:literal) => {
        Media {
            init: include_bytes!(concat!("assets/", $rendition, "/init.mp4")),
            segments: [
                include_bytes!(concat!("assets/", $rendition, "/00.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/01.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/02.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/03.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/04.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/05.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/06.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/07.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/08.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/09.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/10.m4s")),
                include_bytes!(concat!("assets/", $rendition, "/11.m4s")),
            ],
        }
    };
}

/// The larger picture.
pub(super) static VIDEO_360P: Rendition = Rendition {
    name: "360p",
    content_type: "video/mp4",
    codec: "avc1.4d401e",
    timing: Timing { timescale: 12_800, ticks_per_frame: 512, frames_per_loop: 600 },
    media: embed!("360p"),
};
/// The smaller picture, of the same frames.
pub(super) static VIDEO_180P: Rendition = Rendition {
    name: "180p",
    content_type: "video/mp4",
    codec: "avc1.4d400d",
    timing: Timing { timescale: 12_800, ticks_per_frame: 512, frames_per_loop: 600 },
    media: embed!("180p"),
};
/// The sound of both.
pub(super) static AUDIO: Rendition = Rendition {
    name: "audio",
    content_type: "audio/mp4",
    codec: "mp4a.40.2",
    timing: Timing { timescale: 48_000, ticks_per_frame: 1_024, frames_per_loop: 1_125 },
    media: embed!("audio"),
};

/// The variants, the one that a player should try first on top.
pub(super) static VARIANTS: [Variant; 2] = [
    Variant { video: &VIDEO_360P, resolution: "640x360", frame_rate: "25.000" },
    Variant { video: &VIDEO_180P, resolution: "320x180", frame_rate: "25.000" },
];

/// One variant: a video rendition, always together with [`AUDIO`].
pub(super) struct Variant {
    pub video: &'static Rendition,
    pub resolution: &'static str,
    pub frame_rate: &'static str,
}

/// One rendition of the clip.
pub(super) struct Rendition {
    /// Its directory in the URL.
    pub name: &'static str,
    pub content_type: &'static str,
    /// Its part of CODECS (RFC 6381).
    pub codec: &'static str,
    pub timing: Timing,
    media: Media,
}

struct Media {
    init: &'static [u8],
    segments: [&'static [u8]; LOOP_SEGMENTS as usize],
}

/// Bit rates in bits per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BitRates {
    /// Of the largest segment.
    pub peak: u64,
    /// Of the whole clip.
    pub average: u64,
}

impl Rendition {
    /// The rendition with this directory name.
    pub(super) fn named(name: &str) -> Option<&'static Rendition> {
        [&VIDEO_360P, &VIDEO_180P, &AUDIO].into_iter().find(|rendition| rendition.name == name)
    }

    /// The Media Initialization Section.
    pub(super) fn init(&self) -> Bytes {
        Bytes::from_static(self.media.init)
    }

    /// Segment `msn` of the endless stream: the clip's segment at its place on the timeline.
    pub(super) fn segment(&self, msn: MediaSequenceNumber) -> Bytes {
        let stamp = Stamp {
            // Counts from 1 and wraps after 272 years.
            sequence_number: (msn.0 as u32).wrapping_add(1),
            decode_time: self.timing.decode_time(msn),
        };
        let segment = self.media.segments[(msn.0 % LOOP_SEGMENTS) as usize];
        // Invariant: every embedded segment can be restamped, which depends on its boxes alone and
        // not on `msn`. `the_timeline_is_continuous_over_loop_joins` tries each of them.
        restamp(segment, stamp).expect("an embedded segment can be restamped").into()
    }

    /// Bit rates as RFC 8216, 4.1 defines them. A run of segments that lasts half to one and a half
    /// Target Durations is a single segment here, so the peak is the largest of them.
    pub(super) fn bit_rates(&self) -> BitRates {
        let rate = |bytes: usize, ticks: u64| (bytes as u64 * 8 * self.timing.timescale).div_ceil(ticks);
        let ticks = |n: usize| self.timing.duration(MediaSequenceNumber(n as u64));
        let segments = self.media.segments.iter().enumerate();
        BitRates {
            peak: segments.map(|(n, segment)| rate(segment.len(), ticks(n))).max().unwrap_or(0),
            average: rate(
                self.media.segments.iter().map(|segment| segment.len()).sum(),
                self.timing.decode_time(MediaSequenceNumber(LOOP_SEGMENTS)),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::restamp::tests::read_stamp;

    const RENDITIONS: [&Rendition; 3] = [&VIDEO_360P, &VIDEO_180P, &AUDIO];

    /// Where the payload of the first box (or sample entry) of this name starts.
    fn after(bytes: &[u8], name: &[u8; 4]) -> usize {
        bytes.windows(4).position(|window| window == name).unwrap() + 4
    }

    #[test]
    fn the_timeline_is_continuous_over_loop_joins() {
        for rendition in RENDITIONS {
            // VOD from its start, and live over two joins: 900,000,000 opens a loop.
            for run in [0..25, 899_999_999..900_000_025] {
                let mut expected = None;
                for n in run {
                    let (stamp, duration) = read_stamp(&rendition.segment(MediaSequenceNumber(n)));
                    let name = rendition.name;
                    assert!(expected.is_none_or(|e| e == stamp.decode_time), "a gap before {name}/{n}");
                    assert_eq!(stamp.decode_time, rendition.timing.decode_time(MediaSequenceNumber(n)));
                    assert_eq!(duration, rendition.timing.duration(MediaSequenceNumber(n)), "{name}/{n}");
                    assert_eq!(u64::from(stamp.sequence_number), n + 1);
                    expected = Some(stamp.decode_time + duration);
                }
            }
        }
    }

    #[test]
    fn the_media_is_what_the_playlists_say() {
        for rendition in RENDITIONS {
            let init = rendition.media.init;
            // mdhd, version 0: version and flags, two dates, then the timescale.
            let at = after(init, b"mdhd") + 12;
            let timescale = u32::from_be_bytes(init[at..at + 4].try_into().unwrap());
            assert_eq!(u64::from(timescale), rendition.timing.timescale);
            assert!(!init.windows(4).any(|window| window == b"elst"), "an edit list in {}", rendition.name);
        }
        for variant in &VARIANTS {
            let init = variant.video.media.init;
            let at = after(init, b"avcC") + 1;
            let [profile, compatibility, level] = init[at..at + 3].try_into().unwrap();
            assert_eq!(variant.video.codec, format!("avc1.{profile:02x}{compatibility:02x}{level:02x}"));
            // VisualSampleEntry: 24 bytes come before the width.
            let at = after(init, b"avc1") + 24;
            let size = [at, at + 2].map(|at| u16::from_be_bytes([init[at], init[at + 1]]).to_string());
            assert_eq!(variant.resolution, size.join("x"));
            let Timing { timescale, ticks_per_frame, .. } = variant.video.timing;
            assert_eq!(variant.frame_rate, format!("{:.3}", timescale as f64 / ticks_per_frame as f64));
        }
        // An esds with object type 0x40 (MPEG-4 audio) and an AudioSpecificConfig that opens with
        // object type 2 (AAC-LC), 48 kHz (index 3) and one channel.
        let esds = &AUDIO.media.init[after(AUDIO.media.init, b"esds")..];
        assert!(esds.windows(2).any(|window| window == [0x11, 0x88]));
    }

    #[test]
    fn every_video_segment_opens_with_an_idr_picture() {
        for rendition in [&VIDEO_360P, &VIDEO_180P] {
            for segment in rendition.media.segments {
                // A NAL unit's length, then its header; type 5 is an IDR slice.
                let nal_header = segment[after(segment, b"mdat") + 4];
                assert_eq!(nal_header & 0x1f, 5);
            }
        }
    }

    #[test]
    fn the_clip_stays_small() {
        let total: usize = RENDITIONS
            .iter()
            .map(|r| r.media.init.len() + r.media.segments.iter().map(|s| s.len()).sum::<usize>())
            .sum();
        assert!(total < 700_000, "{total} bytes");
    }
}
