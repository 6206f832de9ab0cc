//! What real players make of real media through the shield: every row of a table in every player, and the table itself
//! as `docs/players.md`.
//!
//! A player has played a row when its decoders gave all pictures and all sound, over two key changes at least; that it
//! ended without an error says little. What a player does not take for reasons of its own is part of the table, and a
//! cell that turns out otherwise than the table says fails the test, whichever way.
//!
//! `PLAYERS_TABLE=write` writes the table instead of comparing it. `PLAYERS_ROWS=WORD` plays only the rows that have
//! the word in their titles, and leaves the table alone.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::harness::{Running, repository, variable};
use crate::ll_origin::{LlOrigin, MASTER, Parts};
use crate::low_latency;
use crate::media::{CLIP_FRAMES, CLIP_SECS, Media, folder_origin, make_clip, packager_version};
use crate::origin::Origin;
use crate::players::key_uris;
use crate::real_players::{LIVE, Played, Player, RECORDED, play_in_all};
use Otherwise::{Fails, Varies, Without};
use Player::{Ffmpeg, GStreamer, HlsJs, Shaka, VideoJs, Vlc};

/// How a player differs from one that plays, and why.
#[derive(Debug, Clone, Copy)]
enum Otherwise {
    Fails(&'static str),
    /// It depends on how the bytes happen to arrive.
    Varies(&'static str),
    /// Pictures and sound it plays, but not the subtitles, or not where a test could see them.
    Without(&'static str),
}

struct Row {
    media: Media,
    method: &'static str,
    encrypts_init_sections: bool,
    otherwise: &'static [(Player, Otherwise)],
}

const fn row(media: Media, method: &'static str, otherwise: &'static [(Player, Otherwise)]) -> Row {
    Row { media, method, encrypts_init_sections: false, otherwise }
}

const SEGMENTS_PER_KEY: &str = "4";
/// Rows at a time. The players wait more than they compute.
const WORKERS: usize = 4;
/// Of 20 s of a live stream, at 25 pictures a second, less the time it takes to begin. A key is for three seconds.
const LIVE_FRAMES: u64 = 300;
const LIVE_AUDIO_SECS: f64 = 12.0;
/// How much a decoder or an encoder may hold back at the end.
const LOST_FRAMES: u64 = 10;
/// Likewise of sound, and what a player skips to begin where both begin.
const LOST_SECS: f64 = 1.0;

const GST_INIT: Otherwise = Fails(
    "decrypts the Media Initialization Section with the key and IV of the segment after it, even one that is clear",
);
const VLC_PADDING: Otherwise = Varies(
    "removes the padding of a segment only if it knows in time that the last bytes are the last, and what is left of \
     it ends its fMP4 and MP3 demuxers",
);
const VLC_INIT: Otherwise = Fails("does not decrypt a Media Initialization Section");
const NO_MP3: Otherwise = Fails("takes no MP3 as packed audio");
const NO_AC3: Otherwise = Fails("Debian's Chromium decodes no AC-3");
const ONLY_128: Otherwise = Fails("knows AES-128 alone");
const NO_GCM: Otherwise = Fails("knows no AES-256-GCM");
const UNSEEN: Otherwise = Without("pictures and sound; the test does not see its subtitles");

const ONLY_HLSJS_AND_SHAKA: &[(Player, Otherwise)] =
    &[(Ffmpeg, ONLY_128), (GStreamer, ONLY_128), (Vlc, ONLY_128), (VideoJs, ONLY_128)];
const ONLY_SHAKA: &[(Player, Otherwise)] =
    &[(Ffmpeg, ONLY_128), (GStreamer, ONLY_128), (Vlc, ONLY_128), (HlsJs, NO_GCM), (VideoJs, ONLY_128)];
const FMP4: &[(Player, Otherwise)] = &[(GStreamer, GST_INIT), (Vlc, VLC_PADDING)];

/// All but LL-HLS, which no folder of files can be.
static ROWS: &[Row] = &[
    row(Media::FfmpegTs, "AES-128", &[]),
    row(Media::FfmpegTs, "AES-256", ONLY_HLSJS_AND_SHAKA),
    row(Media::FfmpegTs, "AES-256-GCM", ONLY_SHAKA),
    row(Media::FfmpegTsRanges, "AES-128", &[]),
    row(Media::PackagerTs, "AES-128", &[]),
    row(Media::FfmpegFmp4, "AES-128", FMP4),
    row(Media::FfmpegFmp4, "AES-256", ONLY_HLSJS_AND_SHAKA),
    row(Media::FfmpegFmp4, "AES-256-GCM", ONLY_SHAKA),
    Row {
        encrypts_init_sections: true,
        ..row(Media::FfmpegFmp4, "AES-128", &[(GStreamer, GST_INIT), (Vlc, VLC_INIT)])
    },
    row(Media::FfmpegFmp4Ranges, "AES-128", FMP4),
    row(Media::PackagerFmp4, "AES-128", FMP4),
    row(Media::PackagerFmp4, "AES-256", ONLY_HLSJS_AND_SHAKA),
    row(Media::PackagerFmp4, "AES-256-GCM", ONLY_SHAKA),
    row(Media::PackagerFmp4Ranges, "AES-128", FMP4),
    row(Media::PackagerSubtitles, "AES-128", &[(Ffmpeg, UNSEEN), (GStreamer, GST_INIT), (Vlc, VLC_PADDING)]),
    row(Media::PackedAac, "AES-128", &[]),
    row(Media::PackedMp3, "AES-128", &[(Vlc, VLC_PADDING), (VideoJs, NO_MP3)]),
    row(Media::PackedAc3, "AES-128", &[(HlsJs, NO_AC3), (Shaka, NO_AC3), (VideoJs, NO_AC3)]),
];

/// Low-Latency HLS, from an origin that makes Partial Segments as time goes by. It has no end and no number of pictures: a
/// player plays it that has most of the time's.
fn low_latency() -> Line {
    let origin = LlOrigin::start(Duration::from_secs(45), Parts::Files);
    let shield = low_latency::shield(&origin);
    let played = play_in_all(&shield.at(MASTER), LIVE);
    for (player, played) in &played {
        println!("low latency: {}: {played:?}", player.name());
    }
    Line::of("Low-Latency HLS, fMP4 (live)", "AES-128", FMP4, played, |_, played, _| {
        let fail = |what: String| Err(format!("{what}; it said: {}", played.errors.trim()));
        if played.video_frames < LIVE_FRAMES {
            return fail(format!("{} of {LIVE_FRAMES} pictures", played.video_frames));
        }
        if played.audio_secs < LIVE_AUDIO_SECS {
            return fail(format!("{:.1} s of {LIVE_AUDIO_SECS} s of sound", played.audio_secs));
        }
        if played.errors.is_empty() { Ok(()) } else { fail("an error".to_owned()) }
    })
}

/// One line of the table, filled.
struct Line {
    title: String,
    method: String,
    cells: Vec<(Player, Option<Otherwise>)>,
    versions: Vec<(Player, String)>,
    /// What was not as the table says.
    surprises: Vec<String>,
}

impl Line {
    fn of(
        title: &str,
        method: &str,
        otherwise: &[(Player, Otherwise)],
        played: Vec<(Player, Played)>,
        judge: impl Fn(Player, &Played, Option<Otherwise>) -> Result<(), String>,
    ) -> Self {
        let (mut cells, mut versions, mut surprises) = (Vec::new(), Vec::new(), Vec::new());
        for (player, played) in played {
            let otherwise =
                otherwise.iter().find(|(other, _)| *other == player).map(|(_, otherwise)| *otherwise);
            let who = format!("{title}, {method}: {} {}", player.name(), played.version);
            match (otherwise, judge(player, &played, otherwise)) {
                (Some(Varies(_)), _) | (Some(Fails(_)), Err(_)) | (Some(Without(_)) | None, Ok(())) => {}
                (Some(Fails(why)), Ok(())) => surprises.push(format!("{who} plays it, against \"{why}\"")),
                (_, Err(how)) => surprises.push(format!("{who} does not play it: {how}")),
            }
            cells.push((player, otherwise));
            versions.push((player, played.version));
        }
        Self { title: title.to_owned(), method: method.to_owned(), cells, versions, surprises }
    }
}

/// Whether everything came out of the decoders.
fn judge(media: Media, player: Player, played: &Played, otherwise: Option<Otherwise>) -> Result<(), String> {
    let wants_subtitles =
        media.has_subtitles() && player.is_in_a_page() && !matches!(otherwise, Some(Without(_)));
    let told = if played.errors.is_empty() { "nothing" } else { &played.errors };
    let fail = |what: String| Err(format!("{what}; it said: {}", told.trim()));
    if media.has_video() && played.video_frames + LOST_FRAMES < CLIP_FRAMES {
        return fail(format!("{} of {CLIP_FRAMES} pictures", played.video_frames));
    }
    if played.audio_secs + LOST_SECS < f64::from(CLIP_SECS) {
        return fail(format!("{:.1} s of {CLIP_SECS} s of sound", played.audio_secs));
    }
    if wants_subtitles && played.cues != u64::from(CLIP_SECS) {
        return fail(format!("{} of {CLIP_SECS} subtitles", played.cues));
    }
    if played.errors.is_empty() { Ok(()) } else { fail("an error".to_owned()) }
}

#[test]
fn every_player_plays_what_the_table_says() {
    let dir = tempfile::tempdir().unwrap();
    let clip = make_clip(dir.path());
    let origin = folder_origin(dir.path());
    let only = variable("PLAYERS_ROWS");
    let rows: Vec<(String, &Row)> =
        ROWS.iter().enumerate().map(|(n, row)| (format!("row{n}"), row)).collect();
    let chosen = |row: &Row| only.as_ref().is_none_or(|word| title(row).contains(word));
    let rows: Vec<_> = rows.into_iter().filter(|(_, row)| chosen(row)).collect();
    for (name, row) in &rows {
        row.media.make(&clip, &dir.path().join(name));
    }
    let shield = Running::serve(&config(&origin, &rows));

    let (next, lines) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some((name, row)) = rows.get(at) else { return };
                    lines.lock().insert(at, play_row(name, row, &shield));
                }
            });
        }
    });
    let mut lines: Vec<Line> = lines.into_inner().into_values().collect();
    assert_eq!(lines.len(), rows.len(), "a line a row");
    // On a busy machine a player may be too late for a picture or a subtitle. A row that surprises is played once more,
    // by itself: what is wrong with it is wrong again.
    for (line, (name, row)) in lines.iter_mut().zip(&rows).filter(|(line, _)| !line.surprises.is_empty()) {
        println!("once more, after: {}", line.surprises.join("; "));
        *line = play_row(name, row, &shield);
    }
    if only.as_ref().is_none_or(|word| "Low-Latency HLS".contains(word)) {
        let first = low_latency();
        lines.push(if first.surprises.is_empty() { first } else { low_latency() });
    }

    let surprises: Vec<&str> = lines.iter().flat_map(|line| &line.surprises).map(String::as_str).collect();
    assert!(surprises.is_empty(), "otherwise than the table says:\n{}", surprises.join("\n"));
    if only.is_none() {
        compare(&page(&lines));
    }
}

fn title(row: &Row) -> String {
    let init = if row.encrypts_init_sections { ", encrypted init section" } else { "" };
    format!("{}{init}", row.media.title())
}

fn config(origin: &Origin, rows: &[(String, &Row)]) -> String {
    let url = origin.url();
    let mut config = format!("[[origins]]\nname = \"media\"\nurls = [\"{url}\"]\n");
    for (name, row) in rows {
        write!(
            config,
            "[[streams]]\nid = \"{name}\"\nplaylist_url = \"{url}/{name}/{}\"\n\
             [streams.policy]\nsegments_per_key = {SEGMENTS_PER_KEY}\nkey_method = \"{}\"\n\
             encrypt_init_sections = {}\n",
            row.media.playlist(),
            row.method,
            row.encrypts_init_sections
        )
        .unwrap();
    }
    config
}

fn play_row(name: &str, row: &Row, shield: &Running) -> Line {
    let played = play_in_all(&shield.at(&format!("/{name}/{}", row.media.playlist())), RECORDED);
    for (player, played) in &played {
        println!("{}, {}: {}: {played:?}", title(row), row.method, player.name());
    }
    let playlist = shield.get(&format!("/{name}/{}", row.media.media_playlist())).text();
    assert!(key_uris(&playlist).len() >= 3, "two key changes: {playlist}");
    let judge = |player, played: &Played, otherwise| judge(row.media, player, played, otherwise);
    Line::of(&title(row), row.method, row.otherwise, played, judge)
}

/// The whole of `docs/players.md`.
fn page(lines: &[Line]) -> String {
    let first = lines.first().expect("a line");
    let players: Vec<String> =
        first.versions.iter().map(|(player, version)| format!("{} {version}", player.name())).collect();
    let mut page = format!("{}\n\n| Media | Method |", introduction());
    for player in &players {
        write!(page, " {player} |").unwrap();
    }
    page.push_str("\n|---|---|");
    page.push_str(&":-:|".repeat(players.len()));
    let mut reasons: Vec<String> = Vec::new();
    for line in lines {
        write!(page, "\n| {} | {} |", line.title, line.method).unwrap();
        for (column, (_, otherwise)) in line.cells.iter().enumerate() {
            let (sign, why) = match otherwise {
                None => ("✓", None),
                Some(Without(why)) => ("✓", Some(why)),
                Some(Varies(why)) => ("~", Some(why)),
                Some(Fails(why)) => ("✗", Some(why)),
            };
            write!(page, " {sign}").unwrap();
            if let Some(why) = why {
                let reason = format!("{}: {why}.", players[column]);
                let known = reasons.iter().position(|other| *other == reason);
                let number = known.unwrap_or_else(|| {
                    reasons.push(reason);
                    reasons.len() - 1
                });
                write!(page, " {}", number + 1).unwrap();
            }
            page.push_str(" |");
        }
    }
    page.push_str("\n\n");
    for (n, reason) in reasons.iter().enumerate() {
        writeln!(page, "{}. {reason}", n + 1).unwrap();
    }
    page
}

fn introduction() -> String {
    format!(
        "# What plays\n\n\
         Written by `tests/it/player_matrix.rs`, which plays every row in every player through the shield and fails where\n\
         a cell is not as it stands here; `PLAYERS_TABLE=write make test` writes it anew.\n\n\
         ✓ means that all pictures and all sound of {CLIP_SECS} s came out of the player's decoders, over two key changes at\n\
         least (of a live stream: most of what 20 s hold). ✗ means that they did not, ~ that it depends; the number tells\n\
         why. hls.js, Shaka Player and video.js run in Chromium; the media are made by ffmpeg and Shaka Packager {}.",
        packager_version()
    )
}

/// Compares the page with the one in the repository, but for versions: other machines have others.
fn compare(page: &str) {
    let file = repository("docs/players.md");
    if variable("PLAYERS_TABLE").as_deref() == Some("write") {
        fs::write(file, page).unwrap();
        return;
    }
    let kept = fs::read_to_string(file).unwrap_or_default();
    assert_eq!(
        without_versions(&kept),
        without_versions(page),
        "docs/players.md is not what was played; PLAYERS_TABLE=write writes it anew"
    );
    if kept != page {
        println!("docs/players.md was written with other versions of the players; they play the same");
    }
}

fn without_versions(page: &str) -> String {
    let names = Player::ALL.map(Player::name);
    let mut text = page.to_owned();
    for name in names.into_iter().chain(["Shaka Packager"]) {
        let before_version = format!("{name} ");
        let mut parts = text.split(&before_version);
        let mut bare = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            bare.push_str(&before_version);
            bare.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.'));
        }
        text = bare;
    }
    text
}

#[test]
fn pages_that_differ_in_versions_alone_are_the_same() {
    let page = |ffmpeg: &str, vlc: &str| format!("| ffmpeg {ffmpeg} | VLC {vlc} |\n1. VLC {vlc}: knows 1.\n");
    assert_eq!(without_versions(&page("5.1.9", "3.0.24")), without_versions(&page("8.0", "3.0.21")));
    assert_ne!(
        without_versions(&page("5", "3")),
        without_versions(&page("5", "3").replace("knows 1", "knows 2"))
    );
}
