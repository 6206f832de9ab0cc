//! Scenarios of `tests/golden/`: playlists, and byte for byte what the shield makes of them.
//!
//! A folder holds `input.m3u8`, `schedule.toml` (what the rewriting depends on besides the playlist, defaults left out)
//! and `expected.m3u8`, or `expected.error` for what is refused. What an origin shows next, and what is made of it, is
//! `input-2.m3u8` and `expected-2.m3u8`. Keys are fixed, so MACs and IVs are the real ones. `GOLDEN_REWRITE=1` writes
//! the expected files; they are read against the specification then, not only accepted: `tests/golden/README.md` says
//! by which sections. Rules that hold for all of them are checked here too, by a reader of playlists that shares no
//! code with the rewriting.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use keyshield::hls::{
    BaseUrl, CipherKey, Kind, LinkedPath, MediaRewrite, Mount, Mounts, PeriodKey, Playlist, PlaylistError,
    SessionKey, Surroundings, VariableSources, Variables, rewrite_media, rewrite_multivariant,
};
use keyshield::keys::{
    Boundary, DekId, IvMode, KeyId, KeyMethod, LinkKey, MediaSequenceNumber, OnEncrypted, Ordinal, Place,
    Schedule, Subtitles,
};
use serde::Deserialize;

use crate::harness::repository;

/// More ordinals than any scenario has.
const ORDINALS: u32 = 8;

/// `schedule.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Setting {
    /// Where the playlist lies; the query is what of it the origin gets.
    url: String,
    method: String,
    iv_mode: String,
    encrypt_init_sections: bool,
    on_encrypted: String,
    subtitles: String,
    /// The ordinal that the Multivariant Playlist names.
    session_key: Option<u32>,
    boundaries: Vec<BoundaryRow>,
    revoked: Vec<Revoked>,
    /// Of the playlist's origin.
    query_params: Vec<String>,
    /// Other origins that URIs may lead to.
    origins: Vec<Origin>,
    /// Variables of the stream's Multivariant Playlist.
    imported: BTreeMap<String, String>,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            url: "https://origin.example/live/ch1/720p.m3u8".into(),
            method: "AES-128".into(),
            iv_mode: "segment".into(),
            encrypt_init_sections: false,
            on_encrypted: "reject".into(),
            subtitles: "encrypt".into(),
            session_key: None,
            boundaries: vec![BoundaryRow { first: 0, ordinal: 0, epoch: 0, since: 1 }],
            revoked: Vec::new(),
            query_params: Vec::new(),
            origins: Vec::new(),
            imported: BTreeMap::new(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BoundaryRow {
    first: u64,
    ordinal: u32,
    #[serde(default)]
    epoch: u32,
    /// The number of the input by which it is known.
    #[serde(default = "one")]
    since: usize,
}

fn one() -> usize {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Revoked {
    ordinal: u32,
    successor: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Origin {
    name: String,
    mount: String,
    url: String,
}

impl Setting {
    fn mounts(&self) -> Mounts {
        let site = url::Url::parse(&self.url).unwrap().origin().ascii_serialization();
        let mount = |name: &str, path: &str, url: &str| {
            Mount::new(name.into(), path, vec![BaseUrl::parse(url).unwrap()], false).unwrap()
        };
        let mut main = mount("main", "/", &site);
        main.query_params.clone_from(&self.query_params);
        let others = self.origins.iter().map(|other| mount(&other.name, &other.mount, &other.url));
        Mounts::new(std::iter::once(main).chain(others).collect()).unwrap()
    }

    fn schedule(&self, number: usize) -> Schedule {
        let known = self.boundaries.iter().filter(|row| row.since <= number);
        let boundary = |row: &BoundaryRow| Boundary {
            epoch: row.epoch,
            ordinal: Ordinal(row.ordinal),
            first: MediaSequenceNumber(row.first),
            segments: 100,
        };
        Schedule::from_rows(0, known.map(boundary).collect())
    }

    fn imported(&self) -> Variables {
        let define =
            |(name, value): (&String, &String)| format!("#EXT-X-DEFINE:NAME=\"{name}\",VALUE=\"{value}\"\n");
        let text = format!("#EXTM3U\n{}", self.imported.iter().map(define).collect::<String>());
        Variables::importable(&Playlist::parse(text.as_bytes()).unwrap(), VariableSources::default()).unwrap()
    }

    /// Rewrites the scenario's input of this number.
    fn rewrite(&self, number: usize, input: &[u8]) -> Result<String, PlaylistError> {
        let link_keys: Vec<_> = (1..=ORDINALS).map(|n| LinkKey::from_bytes([n as u8; 32])).collect();
        let clear = LinkKey::from_bytes([0xdd; 32]);
        let method = KeyMethod::from_name(&self.method).expect("a method");
        let iv_mode = IvMode::from_name(&self.iv_mode).expect("an IV mode");
        let (mounts, imported, schedule) = (self.mounts(), self.imported(), self.schedule(number));
        let from = mounts.place_of(&self.url).unwrap();
        let surroundings = Surroundings {
            mounts: &mounts,
            from: &from,
            is_protected: &|_| true,
            on_encrypted: OnEncrypted::from_name(&self.on_encrypted)
                .expect("what becomes of encrypted input"),
            variables: VariableSources { query: from.query.as_deref(), imported: Some(&imported) },
            key_uri_base: "/api/hls/keys/",
            clear: (DekId::from_bytes([0xdd; 16]), &clear),
        };
        let playlist = Playlist::parse(input)?;
        if playlist.kind() == Kind::Multivariant {
            let session_key = self.session_key.map(|ordinal| SessionKey { id: key_id(ordinal), method });
            return rewrite_multivariant(&playlist, &surroundings, session_key);
        }
        let key_at = |msn| {
            let Ordinal(signer) = schedule.ordinal_at(msn)?;
            let successor = self.revoked.iter().find(|key| key.ordinal == signer).map(|key| key.successor);
            let in_force = successor.unwrap_or(signer);
            let link_of = |ordinal: u32| &link_keys[ordinal as usize];
            let cipher = CipherKey { id: key_id(in_force), method, iv_mode, link: link_of(in_force) };
            let signer = (key_id(signer), link_of(signer));
            Some(PeriodKey { signer, cipher, successor: successor.map(Ordinal) })
        };
        let rewrite = MediaRewrite {
            surroundings,
            rendition: &from.path,
            encrypt_init_sections: self.encrypt_init_sections,
            subtitles: Subtitles::from_name(&self.subtitles).expect("what becomes of subtitles"),
            key_at: &key_at,
        };
        rewrite_media(&playlist, &rewrite)
    }

    /// The ID of the key that a link signed by `signer` is encrypted under.
    fn cipher_of(&self, signer: &[u8; KeyId::LEN]) -> KeyId {
        let revoked = self.revoked.iter().find(|key| key_id(key.ordinal).as_bytes() == signer);
        revoked.map_or(KeyId::from_bytes(*signer), |key| key_id(key.successor))
    }
}

/// An ID that shows its ordinal to who reads the files.
fn key_id(ordinal: u32) -> KeyId {
    assert!(ordinal < ORDINALS);
    KeyId::from_bytes([ordinal as u8; 16])
}

struct Scenario {
    folder: PathBuf,
    name: String,
}

impl Scenario {
    fn all() -> Vec<Self> {
        Self::in_folder(&repository("tests/golden"))
    }

    fn in_folder(folder: &Path) -> Vec<Self> {
        let mut found: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .map(|folder| Self { name: folder.file_name().unwrap().to_string_lossy().into_owned(), folder })
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        assert!(!found.is_empty(), "there is no scenario in {}", folder.display());
        found
    }

    fn setting(&self) -> Setting {
        let text = self.read("schedule.toml").unwrap_or_else(|| panic!("{}: no schedule.toml", self.name));
        toml::from_str(std::str::from_utf8(&text).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// The inputs in the order in which the origin shows them, with the tails of their names.
    fn inputs(&self) -> Vec<(String, Vec<u8>)> {
        let tails = std::iter::once(String::new()).chain((2..).map(|number| format!("-{number}")));
        let inputs: Vec<_> = tails
            .map_while(|tail| self.read(&format!("input{tail}.m3u8")).map(|input| (tail, input)))
            .collect();
        assert!(!inputs.is_empty(), "{}: no input.m3u8", self.name);
        inputs
    }

    fn read(&self, file: &str) -> Option<Vec<u8>> {
        fs::read(self.folder.join(file)).ok()
    }

    /// Compares with the file, or writes it when asked to. What is wrong comes back.
    fn compare(&self, file: &str, actual: &str) -> Result<(), String> {
        if rewrites() {
            fs::write(self.folder.join(file), actual).unwrap();
            return Ok(());
        }
        let place = format!("{}/{file}", self.name);
        let Some(expected) = self.read(file) else {
            return Err(format!("{place} is missing; it would be\n{actual}"));
        };
        let expected = String::from_utf8_lossy(&expected);
        if expected == actual {
            Ok(())
        } else {
            Err(format!("{place} differs:\n{}", diff(&expected, actual)))
        }
    }

    /// Files that no input belongs to.
    fn strangers(&self, used: &BTreeSet<String>) -> Vec<String> {
        let files = fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().file_name());
        files.map(|name| name.to_string_lossy().into_owned()).filter(|name| !used.contains(name)).collect()
    }
}

#[expect(clippy::disallowed_methods, reason = "it sets a test, not the product")]
fn rewrites() -> bool {
    std::env::var_os("GOLDEN_REWRITE").is_some_and(|value| value == "1")
}

/// What a refusal says: where, of what, and why.
fn refusal(input: &[u8], error: &PlaylistError) -> String {
    let text = String::from_utf8_lossy(input);
    let line = text.lines().nth(error.line - 1).unwrap_or_default().trim_start_matches('\u{feff}');
    let tag = match line.strip_prefix('#') {
        Some(tag) => tag.split(':').next().unwrap_or_default(),
        None => "none",
    };
    format!("line: {}\ntag: {tag}\nreason: {}\n", error.line, error.problem)
}

#[test]
fn every_scenario_gives_what_was_read_against_the_specification() {
    let mut wrong = Vec::new();
    for scenario in Scenario::all() {
        let setting = scenario.setting();
        let mut used = BTreeSet::from(["schedule.toml".to_owned()]);
        for (number, (tail, input)) in (1..).zip(scenario.inputs()) {
            let (file, actual) = match setting.rewrite(number, &input) {
                Ok(output) => (format!("expected{tail}.m3u8"), output),
                Err(error) => (format!("expected{tail}.error"), refusal(&input, &error)),
            };
            wrong.extend(scenario.compare(&file, &actual).err());
            used.extend([format!("input{tail}.m3u8"), file]);
        }
        for stranger in scenario.strangers(&used) {
            match rewrites() && stranger.starts_with("expected") {
                true => fs::remove_file(scenario.folder.join(stranger)).unwrap(),
                false => wrong.push(format!("{}/{stranger} belongs to nothing", scenario.name)),
            }
        }
    }
    assert!(wrong.is_empty(), "{}\nGOLDEN_REWRITE=1 writes what is made now.", wrong.join("\n\n"));
}

#[test]
fn every_scenario_is_described() {
    let text = fs::read_to_string(repository("tests/golden/README.md")).unwrap();
    let missing: Vec<_> = Scenario::all()
        .into_iter()
        .map(|s| s.name)
        .filter(|name| !text.contains(&format!("`{name}`")))
        .collect();
    assert!(missing.is_empty(), "tests/golden/README.md does not say what to look at in {missing:?}");
}

/// A URI that a served playlist names, with what stands for it.
struct Named {
    uri: String,
    /// `None` for a URI line.
    tag: Option<String>,
    msn: u64,
    /// The attributes of the last EXT-X-KEY; `None` before the first, and behind METHOD=NONE.
    key: Option<String>,
}

/// The media that a served Media Playlist names, read as players read it.
fn named(text: &str) -> Vec<Named> {
    let (mut msn, mut key, mut found) = (0, None, Vec::new());
    for line in text.lines().map(str::trim_end).filter(|line| !line.is_empty()) {
        let (tag, value) = line.split_once(':').unwrap_or((line, ""));
        match tag {
            "#EXT-X-MEDIA-SEQUENCE" => msn = value.parse().unwrap(),
            "#EXT-X-SKIP" => msn += attribute(value, "SKIPPED-SEGMENTS").unwrap().parse::<u64>().unwrap(),
            "#EXT-X-KEY" => key = (value != "METHOD=NONE").then(|| value.to_owned()),
            "#EXT-X-MAP" | "#EXT-X-PART" | "#EXT-X-PRELOAD-HINT" => {
                let (uri, tag) = (attribute(value, "URI").unwrap(), Some(tag[1..].to_owned()));
                found.push(Named { uri, tag, msn, key: key.clone() });
            }
            _ if !line.starts_with('#') => {
                found.push(Named { uri: line.to_owned(), tag: None, msn, key: key.clone() });
                msn += 1;
            }
            _ => {}
        }
    }
    found
}

fn attribute(list: &str, name: &str) -> Option<String> {
    let at = list.find(&format!("{name}="))? + name.len() + 1;
    let rest = &list[at..];
    let value = match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => rest.split(',').next(),
    };
    value.map(str::to_owned)
}

/// The link in a URI, relative or not.
fn link_of(uri: &str) -> Option<keyshield::hls::Link> {
    let path = uri.split('?').next().unwrap();
    LinkedPath::parse(&format!("/x/{path}")).unwrap().map(|linked| linked.link)
}

/// A scenario's Media Playlists: as the origin shows them, and what the shield makes of them.
struct Made {
    name: String,
    setting: Setting,
    inputs: Vec<Vec<u8>>,
    outputs: Vec<String>,
}

/// Of all scenarios whose Media Playlists are not refused.
fn made() -> Vec<Made> {
    let is_media = |input: &[u8]| Playlist::parse(input).is_ok_and(|playlist| playlist.kind() == Kind::Media);
    let of = |scenario: Scenario| {
        let setting = scenario.setting();
        let inputs: Vec<_> = scenario.inputs().into_iter().map(|(_, input)| input).collect();
        let outputs = (1..).zip(&inputs).map(|(number, input)| setting.rewrite(number, input).ok()).collect();
        let outputs: Option<Vec<_>> = outputs;
        let outputs = outputs.filter(|_| inputs.iter().all(|input| is_media(input)))?;
        Some(Made { name: scenario.name, setting, inputs, outputs })
    };
    Scenario::all().into_iter().filter_map(of).collect()
}

#[test]
fn whatever_is_linked_stands_under_the_key_that_it_is_encrypted_under() {
    let mut checked = 0;
    for Made { name, setting, outputs, .. } in made() {
        for named in outputs.iter().flat_map(|output| named(output)) {
            let Some(link) = link_of(&named.uri) else { continue };
            // A part may be decrypted by the KEY before its hint; an init section is not before it is named.
            let is_hint = named.tag.as_deref() == Some("EXT-X-PRELOAD-HINT");
            if is_hint && !matches!(link.place, Place::LowLatency { .. }) {
                continue;
            }
            let key_uri = named.key.as_deref().and_then(|key| attribute(key, "URI"));
            let ours = key_uri.as_deref().and_then(|uri| uri.strip_prefix("/api/hls/keys/"));
            let expected = match link.place {
                Place::Segment(_) | Place::LowLatency { .. } | Place::IFrames | Place::Init => {
                    Some(setting.cipher_of(&link.signer).to_string())
                }
                Place::Clear | Place::OriginKey | Place::SessionData | Place::Steering => None,
            };
            assert_eq!(ours, expected.as_deref(), "{name}: {}", named.uri);
            // D22 §4.4.4.4: the IV of GCM stands in the segment; all others are written out.
            let iv = named.key.as_deref().and_then(|key| attribute(key, "IV"));
            let is_written = expected.is_some() && setting.method != "AES-256-GCM";
            assert_eq!(
                iv.map(|iv| iv.len()),
                is_written.then_some(34).or(iv_of_origin(&named, ours)),
                "{name}"
            );
            checked += 1;
        }
    }
    assert!(checked > 50, "only {checked} links were seen");
}

/// The length of an IV that is the origin's business.
fn iv_of_origin(named: &Named, ours: Option<&str>) -> Option<usize> {
    if ours.is_some() {
        return None;
    }
    attribute(named.key.as_deref()?, "IV").map(|iv| iv.len())
}

#[test]
fn a_reload_changes_no_path_and_keeps_what_was_hinted() {
    let mut hints = 0;
    for Made { name, setting, outputs, .. } in made() {
        for (number, pair) in (2..).zip(outputs.windows(2)) {
            // What begins anew begins with other paths.
            if setting.boundaries.iter().any(|row| row.since == number && row.epoch > 0) {
                continue;
            }
            let (before, after) = (named(&pair[0]), named(&pair[1]));
            let segments = |all: &[Named]| -> BTreeMap<u64, String> {
                all.iter().filter(|n| n.tag.is_none()).map(|n| (n.msn, n.uri.clone())).collect()
            };
            let after_uris = segments(&after);
            for (msn, uri) in segments(&before) {
                if let Some(now) = after_uris.get(&msn) {
                    assert_eq!(*now, uri, "{name}: Media Sequence Number {msn}");
                }
            }
            for hint in before.iter().filter(|n| n.tag.as_deref() == Some("EXT-X-PRELOAD-HINT")) {
                assert!(after.iter().any(|n| n.uri == hint.uri), "{name}: {} was hinted in vain", hint.uri);
                hints += 1;
            }
        }
    }
    assert!(hints > 1, "no hint was followed");
}

#[test]
fn m3u8_rs_reads_as_many_segments_as_before() {
    let segments = |text: &[u8]| m3u8_rs::parse_media_playlist_res(text).ok().map(|read| read.segments.len());
    let mut compared = 0;
    for Made { name, inputs, outputs, .. } in made() {
        for (input, output) in inputs.iter().zip(&outputs) {
            // It takes no byte order mark.
            let Some(before) = segments(input) else { continue };
            assert_eq!(segments(output.as_bytes()), Some(before), "{name}:\n{output}");
            compared += 1;
        }
    }
    assert!(compared > 40, "m3u8-rs reads only {compared} of the inputs");
}

/// The lines that differ, `-` expected and `+` actual, with one line around them.
fn diff(expected: &str, actual: &str) -> String {
    let (old, new): (Vec<_>, Vec<_>) =
        (expected.split_inclusive('\n').collect(), actual.split_inclusive('\n').collect());
    // Lengths of the longest common subsequences of the tails.
    let mut common = vec![vec![0_usize; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            common[i][j] = if old[i] == new[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push((' ', i + 1, old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && common[i + 1][j] >= common[i][j + 1]) {
            lines.push(('-', i + 1, old[i]));
            i += 1;
        } else {
            lines.push(('+', j + 1, new[j]));
            j += 1;
        }
    }
    let mut shown = String::new();
    for (at, (sign, number, line)) in lines.iter().enumerate() {
        let around = &lines[at.saturating_sub(1)..(at + 2).min(lines.len())];
        if around.iter().any(|(sign, ..)| *sign != ' ') {
            // Escaped, because line endings count.
            writeln!(shown, "{sign} {number:>4} {}", line.escape_debug()).unwrap();
        }
    }
    shown
}

#[test]
fn a_difference_is_shown_by_its_lines() {
    assert_eq!(
        diff("a\nb\nc\nd\ne\n", "a\nb\nx\r\nd\ne\n"),
        "     2 b\\n\n-    3 c\\n\n+    3 x\\r\\n\n     4 d\\n\n"
    );
    assert_eq!(diff("a\n", "a"), "-    1 a\\n\n+    1 a\n");
}

#[test]
fn no_scenarios_and_one_that_lacks_a_file_fail() {
    let dir = tempfile::tempdir().unwrap();
    let scenario = Scenario { folder: dir.path().to_owned(), name: "new".into() };
    let panics = |call: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).is_err();
    assert!(panics(&|| drop(Scenario::in_folder(dir.path()))), "no scenario");
    assert!(panics(&|| drop(scenario.setting())), "no schedule.toml");
    assert!(panics(&|| drop(scenario.inputs())), "no input.m3u8");
    if !rewrites() {
        assert!(scenario.compare("expected.m3u8", "#EXTM3U\n").unwrap_err().contains("is missing"));
    }
}
