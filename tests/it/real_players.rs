//! Players that are not ours, each made to play a URL and to tell what it decoded.
//!
//! None is asked whether it is content: what counts are the pictures and the sound that come out of its decoders. The
//! ones of the command line run as fast as they can; those in Chromium play at four times the speed, side by side.
//!
//! Deliberately absent: a verdict, which is the player matrix's.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::daemon::as_user;
use crate::harness::repository;

/// How long players play, and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How long a player of the command line may take. One that hangs is ended, and has then decoded what it has.
    limit_secs: &'static str,
    /// How long a page plays, at most.
    page_secs: &'static str,
    page_rate: &'static str,
    /// Whether it comes to an end.
    ends: bool,
}

/// At its rate, the clip takes a page six seconds.
pub const RECORDED: Pace = Pace { limit_secs: "30", page_secs: "40", page_rate: "4", ends: true };
pub const LIVE: Pace = Pace { limit_secs: "20", page_secs: "20", page_rate: "1", ends: false };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Player {
    Ffmpeg,
    GStreamer,
    Vlc,
    HlsJs,
    Shaka,
    VideoJs,
}

impl Player {
    pub const ALL: [Self; 6] =
        [Self::Ffmpeg, Self::GStreamer, Self::Vlc, Self::HlsJs, Self::Shaka, Self::VideoJs];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ffmpeg => "ffmpeg",
            Self::GStreamer => "GStreamer",
            Self::Vlc => "VLC",
            Self::HlsJs => "hls.js",
            Self::Shaka => "Shaka Player",
            Self::VideoJs => "video.js",
        }
    }

    pub fn is_in_a_page(self) -> bool {
        self.page().is_some()
    }

    /// What `tests/players/chromium.mjs` calls it, if it runs there.
    fn page(self) -> Option<&'static str> {
        match self {
            Self::Ffmpeg | Self::GStreamer | Self::Vlc => None,
            Self::HlsJs => Some("hlsjs"),
            Self::Shaka => Some("shaka"),
            Self::VideoJs => Some("videojs"),
        }
    }
}

/// What a player decoded.
#[derive(Debug, Default, Clone)]
pub struct Played {
    pub version: String,
    pub video_frames: u64,
    pub audio_secs: f64,
    /// How many subtitles were ready to be shown, where that can be seen.
    pub cues: u64,
    /// What it said of failures.
    pub errors: String,
}

/// Plays a URL in every player, which takes some seconds.
pub fn play_in_all(url: &str, pace: Pace) -> Vec<(Player, Played)> {
    let pages: Vec<Player> = Player::ALL.into_iter().filter(|player| player.is_in_a_page()).collect();
    std::thread::scope(|scope| {
        let in_pages = scope.spawn(|| chromium(url, &pages, pace));
        let mut played = vec![
            (Player::Ffmpeg, ffmpeg(url, pace)),
            (Player::GStreamer, gstreamer(url, pace)),
            (Player::Vlc, vlc(url, pace)),
        ];
        played.extend(pages.iter().copied().zip(in_pages.join().unwrap()));
        played
    })
}

fn ffmpeg(url: &str, pace: Pace) -> Played {
    let first = run(&["ffmpeg", "-version"]);
    let arguments = ["-map", "0:v?", "-map", "0:a?", "-fps_mode", "passthrough", "-f", "framecrc", "-"];
    let output =
        run(&[&["timeout", pace.limit_secs, "ffmpeg", "-nostdin", "-v", "error", "-i", url][..], &arguments]
            .concat());
    // Of each stream its kind and its time base, then a line a frame: stream, dts, pts, duration, size, checksum.
    let mut played = Played { version: version(&first, "ffmpeg version "), ..told(&output, pace) };
    let (mut kinds, mut bases) = (Vec::new(), Vec::new());
    for line in text(&output.stdout).lines() {
        if let Some(kind) = line.strip_prefix("#media_type ") {
            kinds.push(kind.ends_with(": audio"));
        } else if let Some(base) = line.strip_prefix("#tb ") {
            let base = base.split(": ").nth(1).expect("a time base");
            let (one, of) = base.split_once('/').expect("a fraction");
            bases.push(one.parse::<f64>().unwrap() / of.parse::<f64>().unwrap());
        } else if !line.starts_with('#') {
            let fields: Vec<&str> = line.split(',').map(str::trim).collect();
            let stream: usize = fields[0].parse().unwrap();
            if kinds[stream] {
                played.audio_secs += fields[3].parse::<f64>().unwrap() * bases[stream];
            } else {
                played.video_frames += 1;
            }
        }
    }
    played
}

fn gstreamer(url: &str, pace: Pace) -> Played {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let video = format!(
        "video-sink=capsfilter caps=video/x-raw,format=I420,width=160,height=90 ! filesink sync=false location={}",
        file("video").display()
    );
    let audio = format!(
        "audio-sink=capsfilter caps=audio/x-raw,format=S16LE,channels=2,rate=48000,layout=interleaved ! filesink sync=false location={}",
        file("audio").display()
    );
    let uri = format!("uri={url}");
    let output = run(&[
        "timeout",
        pace.limit_secs,
        "gst-launch-1.0",
        "--no-fault",
        "--quiet",
        "playbin3",
        &uri,
        "flags=video+audio",
        &video,
        &audio,
    ]);
    let bytes = |name| fs::metadata(file(name)).map_or(0, |metadata| metadata.len());
    Played {
        version: version(&run(&["gst-launch-1.0", "--version"]), "GStreamer "),
        // Strides are multiples of four: 160, and 80 for each of the two others, over 90 and 45 lines rounded up.
        video_frames: bytes("video") / 21_600,
        audio_secs: (bytes("audio") / 4) as f64 / 48_000.0,
        ..told(&output, pace)
    }
}

/// VLC has no word for what it decoded: it encodes it anew, and ffprobe counts.
fn vlc(url: &str, pace: Pace) -> Played {
    let dir = tempfile::tempdir().unwrap();
    // VLC refuses to be root, and wants a home.
    let mut command = as_user(dir.path(), ["nobody", "nogroup"]);
    let again = dir.path().join("again.ts");
    let home = format!("HOME={}", dir.path().display());
    let sout = format!(
        "--sout=#transcode{{vcodec=mp2v,acodec=mpga,ab=64,scodec=none}}:std{{access=file,mux=ts,dst={}}}",
        again.display()
    );
    command.extend(
        ["env", &home, "timeout", pace.limit_secs, "cvlc", "-I", "dummy", "--quiet"].map(str::to_owned),
    );
    let mut about = command.clone();
    about.push("--version".to_owned());
    command.extend([sout, "--play-and-exit".to_owned(), url.to_owned(), "vlc://quit".to_owned()]);
    let output = run(&command);
    let mut played = Played { version: version(&run(&about), "VLC version "), ..told(&output, pace) };
    // It complains of a screen and a loudspeaker that it has no use for here.
    played.errors.clear();
    if again.exists() {
        (played.video_frames, played.audio_secs) = counted(&again);
    }
    played
}

/// The pictures and the seconds of sound in a file.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few hundred pictures")]
fn counted(file: &Path) -> (u64, f64) {
    let entries = "stream=codec_type,duration,nb_read_packets";
    let options = ["-v", "error", "-count_packets", "-show_entries", entries, "-of", "json"];
    let output = run(&[&["ffprobe"][..], &options, &[&file.display().to_string()]].concat());
    let counted: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let number = |kind: &str, name: &str| {
        let streams = counted["streams"].as_array().into_iter().flatten();
        let of_kind = streams.filter(|stream| stream["codec_type"] == kind);
        of_kind.filter_map(|stream| stream[name].as_str()?.parse::<f64>().ok()).sum::<f64>()
    };
    (number("video", "nb_read_packets") as u64, number("audio", "duration"))
}

fn chromium(url: &str, players: &[Player], pace: Pace) -> Vec<Played> {
    let runner = repository("tests/players/chromium.mjs").display().to_string();
    let mut command =
        vec!["node", &runner, "--url", url, "--seconds", pace.page_secs, "--rate", pace.page_rate];
    for player in players {
        command.extend(["--player", player.page().expect("one that runs in a page")]);
    }
    let output = run(&command);
    assert!(output.status.success(), "{url}: {}{}", text(&output.stdout), text(&output.stderr));
    let reports = text(&output.stdout);
    let reports = reports.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    reports.map(|report| seen_by_page(&report, pace)).collect()
}

fn seen_by_page(report: &Value, pace: Pace) -> Played {
    let number = |name: &str| report[name].as_f64().unwrap_or(0.0);
    let is_audible = number("decodedAudioBytes") > 0.0;
    let mut errors = String::new();
    if number("fatalErrors") + number("decryptErrors") > 0.0 {
        errors = report["errors"].to_string();
    } else if pace.ends && report["ended"] != true {
        errors = format!("did not reach the end: {report}");
    }
    Played {
        version: report["player"].as_str().unwrap().rsplit(' ').next().unwrap().to_owned(),
        video_frames: report["decodedFrames"].as_u64().unwrap(),
        audio_secs: if is_audible { number("played") } else { 0.0 },
        cues: report["cues"].as_u64().unwrap(),
        errors,
    }
}

/// What a command said on standard error, and that it failed.
fn told(output: &Output, pace: Pace) -> Played {
    let mut errors = text(&output.stderr);
    // What does not end is ended.
    if pace.ends && !output.status.success() {
        errors.push_str(&output.status.to_string());
    }
    Played { errors, ..Played::default() }
}

/// The version that stands behind `before` in what a program printed.
fn version(output: &Output, before: &str) -> String {
    let printed = text(&output.stdout);
    let version = printed.split(before).nth(1).unwrap_or_else(|| panic!("no version: {output:?}"));
    version.split(|c: char| !c.is_ascii_digit() && c != '.').next().expect("a version").to_owned()
}

fn run<Word: AsRef<str>>(command: &[Word]) -> Output {
    let words: Vec<&str> = command.iter().map(AsRef::as_ref).collect();
    let output = Command::new(words[0]).args(&words[1..]).current_dir(Path::new("/")).output();
    output.unwrap_or_else(|error| panic!("{words:?}: {error}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
