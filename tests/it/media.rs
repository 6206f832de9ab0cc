//! Media as real packagers make it: one clip, laid out by ffmpeg and Shaka Packager in the ways that HLS knows.
//!
//! The clip is encoded once; what follows copies its frames, so that every layout holds the same 600 pictures and the
//! same 24 s of sound, in two-second segments. Packed audio other than AAC is encoded anew.
//!
//! Deliberately absent: encryption. That is the shield's part.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::repository;
use crate::origin::{Answer, Origin, Seen};

pub const CLIP_SECS: u32 = 24;
/// At 25 a second.
pub const CLIP_FRAMES: u64 = 600;
const SEGMENT_SECS: u32 = 2;

/// How the clip is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    /// One Media Playlist, audio and video in one container, by ffmpeg.
    FfmpegTs,
    FfmpegFmp4,
    /// Likewise, in one file of which segments are byte ranges.
    FfmpegTsRanges,
    FfmpegFmp4Ranges,
    /// A Multivariant Playlist with a video and an audio rendition, by Shaka Packager.
    PackagerTs,
    PackagerFmp4,
    /// Likewise, one file a rendition.
    PackagerFmp4Ranges,
    /// Likewise, with a rendition of subtitles.
    PackagerSubtitles,
    /// Sound alone, in the container of its codec.
    PackedAac,
    PackedMp3,
    PackedAc3,
}

impl Media {
    /// What a person reads in a table.
    pub fn title(self) -> &'static str {
        match self {
            Self::FfmpegTs => "TS (ffmpeg)",
            Self::FfmpegFmp4 => "fMP4 (ffmpeg)",
            Self::FfmpegTsRanges => "TS, byte ranges (ffmpeg)",
            Self::FfmpegFmp4Ranges => "fMP4, byte ranges (ffmpeg)",
            Self::PackagerTs => "TS, audio rendition (Shaka Packager)",
            Self::PackagerFmp4 => "fMP4, audio rendition (Shaka Packager)",
            Self::PackagerFmp4Ranges => "fMP4, audio rendition, byte ranges (Shaka Packager)",
            Self::PackagerSubtitles => "fMP4, audio and WebVTT renditions (Shaka Packager)",
            Self::PackedAac => "packed audio, AAC (ffmpeg)",
            Self::PackedMp3 => "packed audio, MP3 (ffmpeg)",
            Self::PackedAc3 => "packed audio, AC-3 (ffmpeg)",
        }
    }

    pub fn has_video(self) -> bool {
        !matches!(self, Self::PackedAac | Self::PackedMp3 | Self::PackedAc3)
    }

    pub fn has_subtitles(self) -> bool {
        self == Self::PackagerSubtitles
    }

    /// The playlist to play.
    pub fn playlist(self) -> &'static str {
        match self {
            Self::PackagerTs | Self::PackagerFmp4 | Self::PackagerFmp4Ranges | Self::PackagerSubtitles => {
                "master.m3u8"
            }
            _ => MEDIA_PLAYLIST,
        }
    }

    /// A Media Playlist of it.
    pub fn media_playlist(self) -> &'static str {
        if self.playlist() == MEDIA_PLAYLIST { MEDIA_PLAYLIST } else { "video.m3u8" }
    }

    /// Lays the clip out in folder `dir`, which it makes.
    pub fn make(self, clip: &Path, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        match self {
            Self::FfmpegTs => ffmpeg_hls(clip, dir, &["-hls_segment_filename", "seg_%03d.ts"]),
            Self::FfmpegFmp4 => {
                ffmpeg_hls(
                    clip,
                    dir,
                    &["-hls_segment_type", "fmp4", "-hls_segment_filename", "seg_%03d.m4s"],
                );
            }
            Self::FfmpegTsRanges => ffmpeg_hls(clip, dir, &["-hls_flags", "single_file"]),
            Self::FfmpegFmp4Ranges => {
                ffmpeg_hls(clip, dir, &["-hls_segment_type", "fmp4", "-hls_flags", "single_file"]);
            }
            Self::PackagerTs => {
                packager(clip, dir, |stream, _| format!("segment_template={stream}_$Number$.ts"));
            }
            Self::PackagerFmp4 => packager(clip, dir, fmp4_segments),
            Self::PackagerFmp4Ranges => packager(clip, dir, |stream, _| format!("output={stream}.mp4")),
            Self::PackagerSubtitles => {
                fs::write(dir.join(SUBTITLES), subtitles()).unwrap();
                packager(clip, dir, fmp4_segments);
            }
            Self::PackedAac => packed_audio(clip, dir, ["aac", "adts", "aac"]),
            Self::PackedMp3 => packed_audio(clip, dir, ["libmp3lame", "mp3", "mp3"]),
            Self::PackedAc3 => packed_audio(clip, dir, ["ac3", "ac3", "ac3"]),
        }
    }
}

const MEDIA_PLAYLIST: &str = "vod.m3u8";
const SUBTITLES: &str = "subtitles.vtt";

/// Encodes the clip into folder `dir`: H.264 and AAC, a picture small enough to decode in no time.
pub fn make_clip(dir: &Path) -> PathBuf {
    let clip = dir.join("clip.mp4");
    let (length, gop) = (CLIP_SECS.to_string(), (25 * SEGMENT_SECS).to_string());
    let name = clip.display().to_string();
    let sources = ["-f", "lavfi", "-i", "testsrc2=size=160x90:rate=25", "-f", "lavfi", "-i"];
    let video = ["-c:v", "libx264", "-preset", "ultrafast", "-g", &gop, "-sc_threshold", "0"];
    let audio = ["-c:a", "aac", "-ac", "2", "-b:a", "64k"];
    run_ffmpeg(
        dir,
        &[&sources[..], &["sine=sample_rate=48000", "-t", &length], &video, &audio, &[&name]].concat(),
    );
    clip
}

/// A layout of a clip of its own, in folder `dir`.
pub fn make_one(media: Media, dir: &Path) {
    let clip_dir = tempfile::tempdir().unwrap();
    media.make(&make_clip(clip_dir.path()), dir);
}

fn ffmpeg_hls(clip: &Path, dir: &Path, options: &[&str]) {
    let (clip, length) = (clip.display().to_string(), SEGMENT_SECS.to_string());
    let input = ["-i", &clip, "-c", "copy", "-f", "hls", "-hls_time", &length, "-hls_playlist_type", "vod"];
    run_ffmpeg(dir, &[&input[..], options, &[MEDIA_PLAYLIST]].concat());
}

fn run_ffmpeg(dir: &Path, arguments: &[&str]) {
    run(Command::new("ffmpeg").args(["-nostdin", "-v", "error"]).args(arguments).current_dir(dir));
}

fn fmp4_segments(stream: &str, is_text: bool) -> String {
    if is_text {
        return format!("segment_template={stream}_$Number$.vtt");
    }
    format!("init_segment={stream}_init.mp4,segment_template={stream}_$Number$.m4s")
}

/// Runs Shaka Packager; `output` says where a rendition's media go, by its name and by whether it is text.
fn packager(clip: &Path, dir: &Path, output: impl Fn(&str, bool) -> String) {
    let clip = clip.display();
    let mut renditions = vec![
        format!("in={clip},stream=video,playlist_name=video.m3u8,{}", output("video", false)),
        format!(
            "in={clip},stream=audio,playlist_name=audio.m3u8,hls_group_id=audio,hls_name=Sine,{}",
            output("audio", false)
        ),
    ];
    if dir.join(SUBTITLES).exists() {
        renditions.push(format!(
            "in={SUBTITLES},stream=text,language=en,playlist_name=text.m3u8,hls_group_id=text,hls_name=English,{}",
            output("text", true)
        ));
    }
    let length = SEGMENT_SECS.to_string();
    let options = ["--quiet", "--hls_playlist_type", "VOD", "--hls_master_playlist_output", "master.m3u8"];
    let program = "tests/players/node_modules/shaka-packager/bin/packager-linux-";
    let program =
        repository(&format!("{program}{}", if cfg!(target_arch = "aarch64") { "arm64" } else { "x64" }));
    run(Command::new(program)
        .args(renditions)
        .args(options)
        .args(["--segment_duration", &length])
        .current_dir(dir));
}

/// What Shaka Packager calls itself.
pub fn packager_version() -> String {
    let package = repository("tests/players/node_modules/shaka-packager/package.json");
    let text = fs::read_to_string(package).expect("scripts/bootstrap.sh test installs Shaka Packager");
    let package: serde_json::Value = serde_json::from_str(&text).unwrap();
    package["version"].as_str().unwrap().to_owned()
}

/// A cue a second.
fn subtitles() -> String {
    let mut text = "WEBVTT\n".to_owned();
    for second in 0..CLIP_SECS {
        write!(text, "\n00:00:{second:02}.100 --> 00:00:{second:02}.900\nSecond {second}\n").unwrap();
    }
    text
}

/// Segments of one codec: encoder, ffmpeg's name of the format, extension.
///
/// ffmpeg cuts them; the time of its first sample is put before each, as RFC 8216 section 3.4 demands.
fn packed_audio(clip: &Path, dir: &Path, [encoder, format, extension]: [&str; 3]) {
    let (clip, length) = (clip.display().to_string(), SEGMENT_SECS.to_string());
    let pattern = format!("seg_%03d.{extension}");
    let mut arguments = vec!["-i", &clip, "-vn", "-c:a", encoder, "-f", "segment", "-segment_time", &length];
    if format == "mp3" {
        // Neither a tag nor a Xing header of the muxer's own.
        arguments.extend(["-segment_format_options", "id3v2_version=0:write_xing=0"]);
    }
    arguments.extend(["-segment_format", format, "-segment_list_type", "m3u8", "-segment_list", "cut.m3u8"]);
    arguments.push(&pattern);
    run_ffmpeg(dir, &arguments);

    let cut = fs::read_to_string(dir.join("cut.m3u8")).unwrap();
    let mut playlist = format!(
        "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:{}\n#EXT-X-PLAYLIST-TYPE:VOD\n",
        SEGMENT_SECS + 1
    );
    let mut start = 0.0;
    let mut lines = cut.lines();
    while let Some(line) = lines.next() {
        let Some(duration) = line.strip_prefix("#EXTINF:") else { continue };
        let name = lines.next().expect("a segment after its EXTINF");
        let segment = dir.join(name);
        fs::write(&segment, [timestamp_tag(start), fs::read(&segment).unwrap()].concat()).unwrap();
        writeln!(playlist, "{line}\n{name}").unwrap();
        start += duration.trim_end_matches(',').parse::<f64>().unwrap();
    }
    fs::write(dir.join(MEDIA_PLAYLIST), playlist + "#EXT-X-ENDLIST\n").unwrap();
}

/// An ID3v2.4 tag with one PRIV frame: a time in seconds as an MPEG-2 timestamp.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few seconds")]
fn timestamp_tag(time: f64) -> Vec<u8> {
    let owner = b"com.apple.streaming.transportStreamTimestamp\0";
    let timestamp = (time * 90_000.0).round() as u64;
    let frame_len = u8::try_from(owner.len() + 8).unwrap();
    // Both lengths are below 128, where a synchsafe integer is a plain one.
    let mut tag = [b"ID3\x04\x00\x00\x00\x00\x00", &[frame_len + 10][..]].concat();
    tag.extend([b"PRIV\x00\x00\x00", &[frame_len, 0, 0][..]].concat());
    tag.extend([&owner[..], &timestamp.to_be_bytes()].concat());
    tag
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An origin that serves the files below a folder, to pages of other origins too, and ranges of them.
pub fn folder_origin(dir: &Path) -> Origin {
    let dir = dir.to_owned();
    Origin::forgetful(move |request| {
        let path = request.target.split('?').next().unwrap_or_default().trim_start_matches('/');
        let answer = match fs::read(dir.join(path)) {
            Ok(body) => ranged(request, body),
            Err(_) => Answer::status(404),
        };
        answer.header("Access-Control-Allow-Origin", "*").header("Content-Type", content_type(path))
    })
}

fn ranged(request: &Seen, body: Vec<u8>) -> Answer {
    let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes="));
    let Some((first, last)) = range.and_then(|range| range.split_once('-')) else {
        return Answer::ok(body).header("Accept-Ranges", "bytes");
    };
    let first: usize = first.parse().expect("players ask for ranges from a place on");
    let last = last.parse().unwrap_or(usize::MAX).min(body.len() - 1);
    let content_range = format!("bytes {first}-{last}/{}", body.len());
    let mut answer = Answer::ok(&body[first..=last]).header("Content-Range", content_range);
    answer.status = 206;
    answer
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit('.').next().unwrap_or_default() {
        "m3u8" => "application/vnd.apple.mpegurl",
        "ts" => "video/mp2t",
        "mp4" | "m4s" => "video/mp4",
        "vtt" => "text/vtt",
        "aac" => "audio/aac",
        "mp3" => "audio/mpeg",
        "ac3" => "audio/ac3",
        _ => "application/octet-stream",
    }
}
