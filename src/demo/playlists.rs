//! Writes the playlists of both forms of the clip, live and VOD.
//!
//! They are written by hand: a dozen lines of fixed shape, whose exact text the tests show. That
//! also keeps the sample origin independent of the parser that the shield reads it with.
//!
//! Both forms list the same segments in the same way and differ in three points: which segments,
//! whether their wall-clock time is told, and whether the list is closed.
//!
//! Deliberately absent: EXT-X-DISCONTINUITY (the timeline goes on over a loop join), EXT-X-START,
//! and every Low-Latency tag.

use std::fmt::Write;
use std::ops::Range;

use super::clip::{AUDIO, Rendition, VARIANTS};
use super::timeline::{LOOP_SEGMENTS, UnixMillis, live_segments, live_window, rfc3339};
use crate::keys::MediaSequenceNumber;

/// The lowest version that knows EXT-X-MAP in a playlist of whole segments (RFC 8216, 7).
const VERSION: u32 = 6;
/// In seconds. An audio segment lasts up to 2.005 s, which rounds to it (RFC 8216, 4.3.3.1).
const TARGET_DURATION_SECS: u32 = 2;

/// Which form of the clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Endless, with a sliding window.
    Live,
    /// One loop, complete.
    Vod,
}

impl Form {
    /// File name of its Media Playlists.
    pub(super) fn media_playlist_name(self) -> &'static str {
        match self {
            Form::Live => "live.m3u8",
            Form::Vod => "index.m3u8",
        }
    }

    /// The segments that are served at `now`.
    pub(super) fn segments(self, now: UnixMillis) -> Range<u64> {
        match self {
            Form::Live => live_segments(now),
            Form::Vod => 0..LOOP_SEGMENTS,
        }
    }

    /// The segments that its Media Playlists list at `now`.
    fn listed(self, now: UnixMillis) -> Range<u64> {
        match self {
            Form::Live => live_window(now),
            Form::Vod => 0..LOOP_SEGMENTS,
        }
    }
}

/// The Multivariant Playlist: two variants that share one audio rendition.
pub(super) fn multivariant(form: Form) -> String {
    let file = form.media_playlist_name();
    let audio = AUDIO.bit_rates();
    let mut text = format!(
        "#EXTM3U\n\
         #EXT-X-VERSION:{VERSION}\n\
         #EXT-X-INDEPENDENT-SEGMENTS\n\
         #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"audio\",NAME=\"Tone\",DEFAULT=YES,AUTOSELECT=YES,\
         CHANNELS=\"1\",URI=\"{}/{file}\"\n",
        AUDIO.name
    );
    for variant in &VARIANTS {
        let video = variant.video.bit_rates();
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "#EXT-X-STREAM-INF:BANDWIDTH={},AVERAGE-BANDWIDTH={},CODECS=\"{},{}\",RESOLUTION={},\
             FRAME-RATE={},AUDIO=\"audio\",CLOSED-CAPTIONS=NONE\n{}/{file}",
            declared_bps(video.peak + audio.peak),
            declared_bps(video.average + audio.average),
            variant.video.codec,
            AUDIO.codec,
            variant.resolution,
            variant.frame_rate,
            variant.video.name,
        );
    }
    text
}

/// A bit rate as a playlist declares it: with room for what encryption adds (at most one AES block
/// per two-second segment of video and of audio), so that it is still true behind the shield, and
/// rounded up to whole kilobits.
fn declared_bps(bits_per_second: u64) -> u64 {
    const PADDING_BPS: u64 = 2 * 16 * 8 / 2;
    // The shortest segment is 1.984 s; the rounding-up of a bit covers the difference.
    (bits_per_second + PADDING_BPS + 1).next_multiple_of(1_000)
}

/// The Media Playlist of one rendition at `now`.
pub(super) fn media(rendition: &Rendition, form: Form, now: UnixMillis) -> String {
    let listed = form.listed(now);
    let mut text = format!(
        "#EXTM3U\n\
         #EXT-X-VERSION:{VERSION}\n\
         #EXT-X-TARGETDURATION:{TARGET_DURATION_SECS}\n\
         #EXT-X-MEDIA-SEQUENCE:{}\n",
        listed.start
    );
    if form == Form::Vod {
        text.push_str("#EXT-X-PLAYLIST-TYPE:VOD\n");
    }
    text.push_str("#EXT-X-INDEPENDENT-SEGMENTS\n#EXT-X-MAP:URI=\"init.mp4\"\n");
    for msn in listed.map(MediaSequenceNumber) {
        if form == Form::Live {
            let start = rfc3339(rendition.timing.start(msn));
            let _ = writeln!(text, "#EXT-X-PROGRAM-DATE-TIME:{start}");
        }
        let secs = rendition.timing.duration(msn) as f64 / rendition.timing.timescale as f64;
        let _ = writeln!(text, "#EXTINF:{secs:.6},\n{}.m4s", msn.0);
    }
    if form == Form::Vod {
        text.push_str("#EXT-X-ENDLIST\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::clip::{VIDEO_180P, VIDEO_360P};

    /// Segment 900,000,000 opens a loop; here it is the sixth in the window.
    const NOW: UnixMillis = UnixMillis(1_800_000_006_500);

    #[test]
    fn live_video_at_a_given_time() {
        let expected = "\
#EXTM3U
#EXT-X-VERSION:6
#EXT-X-TARGETDURATION:2
#EXT-X-MEDIA-SEQUENCE:899999995
#EXT-X-INDEPENDENT-SEGMENTS
#EXT-X-MAP:URI=\"init.mp4\"
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T07:59:50.000Z
#EXTINF:2.000000,
899999995.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T07:59:52.000Z
#EXTINF:2.000000,
899999996.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T07:59:54.000Z
#EXTINF:2.000000,
899999997.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T07:59:56.000Z
#EXTINF:2.000000,
899999998.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T07:59:58.000Z
#EXTINF:2.000000,
899999999.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T08:00:00.000Z
#EXTINF:2.000000,
900000000.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T08:00:02.000Z
#EXTINF:2.000000,
900000001.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T08:00:04.000Z
#EXTINF:2.000000,
900000002.m4s
";
        assert_eq!(media(&VIDEO_360P, Form::Live, NOW), expected);
        assert_eq!(media(&VIDEO_180P, Form::Live, NOW), expected);
    }

    #[test]
    fn audio_tells_the_durations_of_its_frames() {
        let text = media(&AUDIO, Form::Live, NOW);
        let tail = "\
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T07:59:58.016Z
#EXTINF:1.984000,
899999999.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T08:00:00.000Z
#EXTINF:2.005333,
900000000.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T08:00:02.005Z
#EXTINF:2.005333,
900000001.m4s
#EXT-X-PROGRAM-DATE-TIME:2027-01-15T08:00:04.010Z
#EXTINF:2.005333,
900000002.m4s
";
        assert!(text.ends_with(tail), "{text}");
    }

    #[test]
    fn vod_is_one_closed_loop() {
        let text = media(&VIDEO_360P, Form::Vod, NOW);
        assert!(text.starts_with(
            "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:2\n#EXT-X-MEDIA-SEQUENCE:0\n\
             #EXT-X-PLAYLIST-TYPE:VOD\n#EXT-X-INDEPENDENT-SEGMENTS\n#EXT-X-MAP:URI=\"init.mp4\"\n\
             #EXTINF:2.000000,\n0.m4s\n#EXTINF:2.000000,\n1.m4s\n"
        ));
        assert!(text.ends_with("#EXTINF:2.000000,\n11.m4s\n#EXT-X-ENDLIST\n"), "{text}");
        assert_eq!(text.matches("#EXTINF").count(), 12);
        assert_eq!(media(&VIDEO_360P, Form::Vod, UnixMillis(0)), text, "VOD does not depend on time");
    }

    #[test]
    fn a_window_only_drops_at_its_head_and_grows_at_its_tail() {
        for rendition in [&VIDEO_360P, &VIDEO_180P, &AUDIO] {
            // A little over one loop, so that the join passes through the window.
            for step in 0..14 {
                let at = |ms| media(rendition, Form::Live, UnixMillis(NOW.0 + ms));
                let (now, next) = (at(step * 2_000), at((step + 1) * 2_000));
                let entries = |text: &str| -> Vec<String> {
                    text.split("#EXT-X-PROGRAM-DATE-TIME").skip(1).map(str::to_owned).collect()
                };
                let sequence = |text: &str| -> u64 {
                    let (_, rest) = text.split_once("MEDIA-SEQUENCE:").unwrap();
                    rest.lines().next().unwrap().parse().unwrap()
                };
                assert_eq!(entries(&now)[1..], entries(&next)[..7]);
                assert_eq!(sequence(&now) + 1, sequence(&next));
                assert_eq!(now, at(step * 2_000 + 1_499), "unchanged until a segment is complete");
            }
        }
    }

    #[test]
    fn every_duration_rounds_to_at_most_the_target_duration() {
        for rendition in [&VIDEO_360P, &VIDEO_180P, &AUDIO] {
            for line in media(rendition, Form::Vod, NOW).lines() {
                if let Some(secs) = line.strip_prefix("#EXTINF:") {
                    let secs: f64 = secs.trim_end_matches(',').parse().unwrap();
                    assert!(secs.round() <= f64::from(TARGET_DURATION_SECS), "{line}");
                }
            }
        }
    }

    #[test]
    fn the_multivariant_playlist_tells_the_renditions() {
        assert_eq!(multivariant(Form::Vod), multivariant(Form::Live).replace("live.m3u8", "index.m3u8"));
        let expected = "\
#EXTM3U
#EXT-X-VERSION:6
#EXT-X-INDEPENDENT-SEGMENTS
#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"audio\",NAME=\"Tone\",DEFAULT=YES,AUTOSELECT=YES,CHANNELS=\"1\",URI=\"audio/live.m3u8\"
#EXT-X-STREAM-INF:BANDWIDTH=152000,AVERAGE-BANDWIDTH=139000,CODECS=\"avc1.4d401e,mp4a.40.2\",RESOLUTION=640x360,FRAME-RATE=25.000,AUDIO=\"audio\",CLOSED-CAPTIONS=NONE
360p/live.m3u8
#EXT-X-STREAM-INF:BANDWIDTH=105000,AVERAGE-BANDWIDTH=96000,CODECS=\"avc1.4d400d,mp4a.40.2\",RESOLUTION=320x180,FRAME-RATE=25.000,AUDIO=\"audio\",CLOSED-CAPTIONS=NONE
180p/live.m3u8
";
        assert_eq!(multivariant(Form::Live), expected);
    }
}
