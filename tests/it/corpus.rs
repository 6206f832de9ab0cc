//! Playlists of other projects: what the shield makes of each, judged by parsers that share no code with the rewriting.
//!
//! The folder is `KEYSHIELD_CORPUS` (the product knows the name as none of its own); without it there is nothing to
//! do, and the test says so. None of it is part of this repository. A playlist that quick-m3u8 and m3u8-rs both accept
//! is rewritten; m3u8-rs must see the same segments in the result, and every line that is not the shield's to change
//! must be there. What the shield refuses is printed with the reason: read it when the corpus changes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use keyshield::app::{RewriteOptions, rewrite};
use keyshield::keys::{OnEncrypted, Policy};
use m3u8_rs::{MasterPlaylist, MediaPlaylist, MediaSegment, Playlist};
use quick_m3u8::HlsLine;
use quick_m3u8::config::ParsingOptions;

#[expect(clippy::disallowed_methods, reason = "it sets a test, not the product")]
fn folder() -> Option<PathBuf> {
    std::env::var_os("KEYSHIELD_CORPUS").map(PathBuf::from)
}

fn playlists(folder: &Path) -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![folder.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for path in entries.map(|entry| entry.unwrap().path()) {
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|extension| extension == "m3u8") => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found
}

/// Whether quick-m3u8 reads every line.
fn quick_m3u8_accepts(text: &str) -> bool {
    let mut reader = quick_m3u8::Reader::from_str(text, ParsingOptions::default());
    loop {
        match reader.read_line() {
            Ok(Some(HlsLine::KnownTag(_) | HlsLine::UnknownTag(_) | HlsLine::Uri(_))) => {}
            Ok(Some(HlsLine::Comment(_) | HlsLine::Blank)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// The hosts that a playlist names, as origins that are allowed: what leads elsewhere is refused, which other tests see.
/// Licence servers are none.
fn origins_of(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter(|line| !names_a_key(line) && !line.starts_with("#EXT-X-DATERANGE"));
    let mut found = BTreeSet::new();
    for line in lines {
        let starts = line.match_indices("http://").chain(line.match_indices("https://"));
        let urls = starts.filter_map(|(at, _)| line[at..].split(['"', ' ']).next());
        found.extend(urls.filter_map(|url| Some(url::Url::parse(url).ok()?.origin().ascii_serialization())));
    }
    found
}

fn names_a_key(line: &str) -> bool {
    line.starts_with("#EXT-X-KEY") || line.starts_with("#EXT-X-SESSION-KEY")
}

/// The names of query parameters in a playlist's URIs and variables: those that its origin would be configured with.
fn params_of(text: &str) -> BTreeSet<String> {
    let queries =
        text.lines().flat_map(|line| line.split('?').skip(1)).flat_map(|query| query.split(['&', '"']));
    let names = queries.filter_map(|pair| pair.split_once('=')).map(|(name, _)| name);
    let variables = text.split("QUERYPARAM=\"").skip(1).filter_map(|rest| rest.split('"').next());
    names.chain(variables).map(str::to_owned).collect()
}

fn options(text: &str) -> RewriteOptions {
    let params = params_of(text);
    // With nothing encrypted, `pass` would doubt what EXT-X-SKIP leaves out.
    let on_encrypted = if text.lines().any(names_a_key) { OnEncrypted::Pass } else { OnEncrypted::Reject };
    let query: Vec<_> = params.iter().map(|name| format!("{name}=value")).collect();
    RewriteOptions {
        url: format!("https://origin.example/live/ch1/playlist.m3u8?{}", query.join("&")),
        allowed: origins_of(text).into_iter().collect(),
        query_params: params.into_iter().collect(),
        seed: Some(1),
        policy: Policy { on_encrypted, ..Policy::default() },
    }
}

/// The lines that the shield hands on as they came.
fn untouched(text: &str) -> Vec<&str> {
    const OURS: [&str; 12] = [
        "#EXT-X-KEY",
        "#EXT-X-MAP",
        "#EXT-X-BYTERANGE",
        "#EXT-X-VERSION",
        "#EXT-X-PART",
        "#EXT-X-PRELOAD-HINT",
        "#EXT-X-RENDITION-REPORT",
        "#EXT-X-MEDIA",
        "#EXT-X-I-FRAME-STREAM-INF",
        "#EXT-X-SESSION-DATA",
        "#EXT-X-SESSION-KEY",
        "#EXT-X-CONTENT-STEERING",
    ];
    let is_ours = |line: &&str| OURS.contains(&line.split(':').next().unwrap().trim_end());
    text.lines()
        .filter(|line| line.starts_with('#') || line.trim().is_empty())
        .filter(|line| !is_ours(line))
        .collect()
}

fn file_of(uri: &str) -> &str {
    uri.split(['?', '#']).next().unwrap().rsplit('/').next().unwrap().trim_end()
}

/// What is wrong with the rewriting, by m3u8-rs and line for line.
fn compare(before: &str, after: &str) -> Result<(), String> {
    let same = |what: &str, before: String, after: String| {
        if before == after { Ok(()) } else { Err(format!("{what}: {before} before, {after} after")) }
    };
    let read = |text: &str| {
        m3u8_rs::parse_playlist_res(text.as_bytes()).map_err(|_| "m3u8-rs cannot read it".to_owned())
    };
    let (lines, lines_after) = (untouched(before), untouched(after));
    same("untouched lines", lines.len().to_string(), lines_after.len().to_string())?;
    lines
        .iter()
        .zip(lines_after)
        .try_for_each(|(before, after)| same("a line", (*before).into(), after.into()))?;
    match (read(before)?, read(after)?) {
        (Playlist::MediaPlaylist(before), Playlist::MediaPlaylist(after)) => {
            let head = |playlist: &MediaPlaylist| {
                let MediaPlaylist { media_sequence, discontinuity_sequence, end_list, playlist_type, .. } =
                    playlist;
                format!("{media_sequence} {discontinuity_sequence} {end_list} {playlist_type:?}")
            };
            same("head", head(&before), head(&after))?;
            same("segments", before.segments.len().to_string(), after.segments.len().to_string())?;
            let segment = |segment: &MediaSegment| {
                let MediaSegment { duration, title, discontinuity, program_date_time, daterange, .. } =
                    segment;
                format!("{duration} {title:?} {discontinuity} {program_date_time:?} {daterange:?}")
            };
            for (before, after) in before.segments.iter().zip(&after.segments) {
                same("a segment", segment(before), segment(after))?;
                // Variables are put in, so a name with some is another one.
                if !before.uri.contains("{$") {
                    same("a file", file_of(&before.uri).replace(' ', "%20"), file_of(&after.uri).into())?;
                }
            }
            Ok(())
        }
        (Playlist::MasterPlaylist(before), Playlist::MasterPlaylist(after)) => {
            let facts = |playlist: &MasterPlaylist| {
                let variants: Vec<_> = playlist
                    .variants
                    .iter()
                    .map(|variant| (variant.bandwidth, file_of(&variant.uri)))
                    .collect();
                let names: Vec<_> = playlist.alternatives.iter().map(|media| &media.name).collect();
                let (data, keys) = (playlist.session_data.len(), playlist.session_key.len());
                format!("{variants:?} {names:?} {data} {keys}")
            };
            same("renditions", facts(&before), facts(&after))
        }
        _ => Err("it has become another kind of playlist".into()),
    }
}

#[test]
fn playlists_of_other_projects_are_rewritten_or_refused_for_a_reason() {
    let Some(folder) = folder() else {
        println!("skipped: KEYSHIELD_CORPUS names no folder of playlists");
        return;
    };
    let (mut rewritten, mut refused, mut not_accepted, mut wrong) = (0, 0, 0, Vec::new());
    let playlists = playlists(&folder);
    assert!(!playlists.is_empty(), "{} holds no playlist", folder.display());
    for path in &playlists {
        let name = path.strip_prefix(&folder).unwrap().display();
        let bytes = fs::read(path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let judges = [("quick-m3u8", quick_m3u8_accepts(&text)), ("m3u8-rs", m3u8_rs_accepts(&text))];
        let against: Vec<_> =
            judges.into_iter().filter(|(_, accepts)| !accepts).map(|(judge, _)| judge).collect();
        if !against.is_empty() {
            println!("{name}: not accepted by {}", against.join(" and "));
            not_accepted += 1;
            continue;
        }
        match rewrite(&bytes, &options(&text)) {
            Ok(output) => {
                rewritten += 1;
                wrong.extend(compare(&text, &output).map_err(|why| format!("{name}: {why}")).err());
            }
            Err(error) => {
                refused += 1;
                println!("{name}: refused: {error:#}");
            }
        }
    }
    println!(
        "{} playlists: {rewritten} rewritten, {refused} refused by us, {not_accepted} not accepted by a judge",
        playlists.len()
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn m3u8_rs_accepts(text: &str) -> bool {
    m3u8_rs::parse_playlist_res(text.as_bytes()).is_ok()
}
