//! A live origin of many streams, whose every byte is known: media that ffmpeg made beforehand, listed by a window
//! that moves on by one segment each second.
//!
//! The streams share their media, but not their numbering, so no two playlists are alike. What is listed at a step
//! follows from the step alone: two shields that ask within the same second get the same bytes. Segments are not
//! repeated, for time must go on: as many are made as the test will last.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::origin::{Answer, Origin};

/// Two of video and one of sound, in MPEG-TS.
pub const RENDITIONS: [&str; 3] = ["72p", "36p", "audio"];
/// Pictures, in both renditions of video.
pub const FRAMES_PER_SEC: u64 = 25;
const WINDOW: usize = 8;
/// Segments beyond a test's duration: the first window, and time to start and stop.
const SPARE: usize = 60;

/// The segments of one rendition.
struct Rendition {
    /// In seconds, as ffmpeg wrote them.
    durations: Vec<String>,
    segments: Vec<Vec<u8>>,
}

/// All the media, and which of it is published when.
pub struct Media {
    streams: usize,
    renditions: [Rendition; 3],
    started: Instant,
}

/// A running origin.
pub struct FleetOrigin {
    pub media: Arc<Media>,
    origin: Origin,
}

impl FleetOrigin {
    /// Streams whose media last for `duration` and a little longer.
    pub fn start(streams: usize, duration: Duration) -> Self {
        let media = Arc::new(Media::make(streams, duration));
        let answers = Arc::clone(&media);
        let origin = Origin::forgetful(move |request| answers.answer(&request.target));
        Self { media, origin }
    }

    pub fn url(&self) -> String {
        self.origin.url()
    }
}

impl Media {
    fn make(streams: usize, duration: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make_segments(dir.path(), usize::try_from(duration.as_secs()).unwrap() + SPARE);
        let renditions = RENDITIONS.map(|name| Rendition::read(dir.path(), name));
        Self { streams, renditions, started: Instant::now() }
    }

    /// Path of a stream's Multivariant Playlist.
    pub fn master_path(stream: usize) -> String {
        format!("/live/s{stream:02}/master.m3u8")
    }

    /// Path of a Media Playlist.
    pub fn playlist_path(stream: usize, rendition: usize) -> String {
        format!("/live/s{stream:02}/{}.m3u8", RENDITIONS[rendition])
    }

    /// The bytes of a segment, by its Media Sequence Number.
    pub fn segment(&self, stream: usize, rendition: usize, msn: u64) -> Option<&[u8]> {
        let at = usize::try_from(msn.checked_sub(first_msn(stream))?).ok()?;
        self.renditions[rendition].segments.get(at).map(Vec::as_slice)
    }

    /// The number after the last one that is published now.
    pub fn end(&self, stream: usize) -> u64 {
        first_msn(stream) + (self.step() + WINDOW) as u64
    }

    /// Seconds since the start, as far as there are media for them.
    fn step(&self) -> usize {
        let secs = usize::try_from(self.started.elapsed().as_secs()).unwrap();
        let shortest = self.renditions.iter().map(|rendition| rendition.segments.len()).min();
        secs.min(shortest.expect("three renditions") - WINDOW)
    }

    /// A Media Playlist as it stands at a step.
    fn playlist(&self, stream: usize, rendition: usize, step: usize) -> String {
        let name = RENDITIONS[rendition];
        let rendition = &self.renditions[rendition];
        let first = first_msn(stream);
        let mut text = format!(
            "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-TARGETDURATION:1\n#EXT-X-INDEPENDENT-SEGMENTS\n\
             #EXT-X-MEDIA-SEQUENCE:{}\n",
            first + step as u64
        );
        for (msn, duration) in (first + step as u64..).zip(&rendition.durations[step..step + WINDOW]) {
            text.push_str(&format!("#EXTINF:{duration},\n{name}/{msn}.ts\n"));
        }
        text
    }

    fn answer(&self, target: &str) -> Answer {
        self.find(target).map_or_else(|| Answer::status(404), Answer::ok)
    }

    fn find(&self, target: &str) -> Option<Vec<u8>> {
        let (stream, file) = target.strip_prefix("/live/s")?.split_once('/')?;
        let stream = stream.parse().ok().filter(|stream| *stream < self.streams)?;
        if file == "master.m3u8" {
            return Some(MULTIVARIANT.into());
        }
        let rendition_named = |name: &str| RENDITIONS.iter().position(|rendition| *rendition == name);
        if let Some(name) = file.strip_suffix(".m3u8") {
            return Some(self.playlist(stream, rendition_named(name)?, self.step()).into());
        }
        let (name, msn) = file.strip_suffix(".ts")?.split_once('/')?;
        let msn: u64 = msn.parse().ok()?;
        let is_published = msn < self.end(stream);
        let segment = self.segment(stream, rendition_named(name)?, msn).filter(|_| is_published);
        segment.map(<[u8]>::to_vec)
    }
}

/// Each stream counts from a number of its own.
fn first_msn(stream: usize) -> u64 {
    10_000 * (stream as u64 + 1)
}

const MULTIVARIANT: &str = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-INDEPENDENT-SEGMENTS\n\
    #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"tone\",NAME=\"tone\",DEFAULT=YES,AUTOSELECT=YES,URI=\"audio.m3u8\"\n\
    #EXT-X-STREAM-INF:BANDWIDTH=220000,CODECS=\"avc1.42c00a,mp4a.40.2\",RESOLUTION=128x72,AUDIO=\"tone\"\n\
    72p.m3u8\n\
    #EXT-X-STREAM-INF:BANDWIDTH=180000,CODECS=\"avc1.42c00a,mp4a.40.2\",RESOLUTION=64x36,AUDIO=\"tone\"\n\
    36p.m3u8\n";

/// Has ffmpeg make a second of each rendition `count` times, 10 to 20 kB each, and playlists of them.
fn make_segments(dir: &Path, count: usize) {
    let count = count.to_string();
    let mut command = Command::new("ffmpeg");
    command.current_dir(dir).args(["-hide_banner", "-nostdin", "-v", "error"]);
    for source in ["testsrc2=size=128x72:rate=25", "sine=sample_rate=48000"] {
        command.args(["-t", &count, "-f", "lavfi", "-i", source]);
    }
    let h264 = "-c:v libx264 -preset ultrafast -pix_fmt yuv420p -g 25 -keyint_min 25 -sc_threshold 0";
    for (name, coding) in RENDITIONS.into_iter().zip([
        format!("-map 0:v {h264} -b:v 90k"),
        format!("-map 0:v -s 64x36 {h264} -b:v 60k"),
        "-map 1:a -c:a aac -b:a 64k".to_owned(),
    ]) {
        command.args(coding.split(' ')).args("-f hls -hls_time 1 -hls_list_size 0".split(' '));
        command.args(["-hls_segment_filename", &format!("{name}_%d.ts"), &format!("{name}.m3u8")]);
    }
    let output = command.output().expect("ffmpeg is installed");
    assert!(output.status.success(), "ffmpeg: {}", String::from_utf8_lossy(&output.stderr));
}

impl Rendition {
    /// What ffmpeg made, but for the rest at the end that may be shorter than a second.
    fn read(dir: &Path, name: &str) -> Self {
        let playlist = std::fs::read_to_string(dir.join(format!("{name}.m3u8"))).unwrap();
        let durations = playlist.lines().filter_map(|line| line.strip_prefix("#EXTINF:"));
        let durations: Vec<_> = durations.map(|duration| duration.trim_end_matches(',').to_owned()).collect();
        let whole = |duration: &&String| (0.95..1.05).contains(&duration.parse::<f64>().unwrap());
        let durations: Vec<_> = durations.iter().take_while(whole).cloned().collect();
        let read = |at| std::fs::read(dir.join(format!("{name}_{at}.ts"))).unwrap();
        let segments = (0..durations.len()).map(read).collect();
        Self { durations, segments }
    }
}

#[test]
fn a_step_lists_the_same_segments_to_everybody_and_the_next_step_one_more() {
    let media = Media::make(2, Duration::ZERO);
    let uris = |stream, step| {
        let playlist = media.playlist(stream, 0, step);
        playlist.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(uris(0, 3)[1..], uris(0, 4)[..WINDOW - 1]);
    assert_eq!((uris(0, 0)[0].as_str(), uris(1, 7)[0].as_str()), ("72p/10000.ts", "72p/20007.ts"));
    assert!((SPARE - 1..=SPARE).contains(&media.renditions[2].segments.len()), "of sound");
    // What is not published yet is not there yet.
    assert!(media.find("/live/s01/audio/20007.ts").is_some());
    assert_eq!(media.answer("/live/s01/audio/20030.ts").status, 404);
    assert_eq!(media.answer("/live/s02/master.m3u8").status, 404);
}
