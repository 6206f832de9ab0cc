//! A playlist as its lines: every byte kept, each line told apart, the facts that matter pulled out.
//!
//! quick-m3u8 reads the tags. Its reader is driven a line at a time here, so that each line's own ending
//! (LF, CRLF, none) survives. What kind of playlist it is follows from its tags, never from its name.

use quick_m3u8::custom_parsing::tag;
use quick_m3u8::tag::UnknownTag;

use super::attributes::{Attributes, tag_name};
use super::error::{PlaylistError, Problem};
use crate::keys::{MediaSequenceNumber, PlaylistWindow};

/// More segments than this in one playlist are refused: about 23 days of 20-second segments.
pub(super) const MAX_SEGMENTS: usize = 100_000;

const HEADER: &str = "#EXTM3U";
const BYTE_ORDER_MARK: char = '\u{feff}';

/// What a line is (D22 §4.1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Content<'a> {
    Tag(UnknownTag<'a>),
    Uri,
    /// A comment or a blank line.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Line<'a> {
    pub(super) text: &'a str,
    pub(super) ending: &'a str,
    pub(super) content: Content<'a>,
}

impl<'a> Line<'a> {
    /// The tag's name without `#EXT`, such as `-X-KEY`.
    pub(super) fn tag_name(&self) -> Option<&'a str> {
        match self.content {
            Content::Tag(tag) => Some(tag.name()),
            _ => None,
        }
    }
}

/// The two kinds of playlist (D22 §4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Multivariant,
    Media,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Multivariant => "Multivariant Playlist",
            Kind::Media => "Media Playlist",
        }
    }
}

/// What a Media Playlist says of itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MediaFacts {
    pub media_sequence: MediaSequenceNumber,
    /// Those that the playlist names; EXT-X-SKIP leaves some out.
    pub segments: usize,
    /// Those that EXT-X-SKIP stands for, before the first that is named (D22 §4.4.5.2).
    pub skipped: u64,
    /// Parts, or a hint at one, of a segment that is not there yet.
    pub has_open_segment: bool,
    /// EXT-X-PART-INF stands in it, or parts do (D22 §4.4.3.7).
    pub is_low_latency: bool,
    /// EXT-X-I-FRAMES-ONLY.
    pub is_i_frames_only: bool,
    /// PART-TARGET of EXT-X-PART-INF in seconds; 0 when it is missing.
    pub part_target_secs: f64,
    /// EXT-X-SERVER-CONTROL says that delivery directives are heeded (D22 §4.4.3.8).
    pub takes_directives: bool,
    /// EXT-X-DEFINE imports from the Multivariant Playlist.
    pub imports_variables: bool,
    /// EXT-X-TARGETDURATION in seconds; 0 when it is missing.
    pub target_duration_secs: u64,
    /// The sum of the EXTINF durations, in seconds.
    pub duration_secs: f64,
    /// EXT-X-ENDLIST stands in it, or its type is VOD: nothing will be appended.
    pub ended: bool,
    /// EXT-X-PLAYLIST-TYPE: `VOD` or `EVENT`.
    pub playlist_type: Option<String>,
}

impl MediaFacts {
    /// The segments that the playlist shows, as the schedule sees them: one of which only parts are there needs its
    /// key too.
    pub fn window(&self) -> PlaylistWindow {
        let segments = self.skipped + self.segments as u64 + u64::from(self.has_open_segment);
        PlaylistWindow {
            first: self.media_sequence,
            end: self.media_sequence.plus(segments),
            ended: self.ended,
            // D22 §4.4.3.5: from an EVENT nothing is removed.
            keeps_all: self.ended || self.playlist_type.as_deref() == Some("EVENT"),
        }
    }
}

/// A playlist, read but not changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Playlist<'a> {
    pub(super) byte_order_mark: bool,
    pub(super) lines: Vec<Line<'a>>,
    kind: Kind,
}

/// Whether a body that begins with `head` can be a playlist: `#EXTM3U`, after an optional byte order mark.
pub fn looks_like_a_playlist(head: &[u8]) -> bool {
    head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).starts_with(HEADER.as_bytes())
}

impl<'a> Playlist<'a> {
    /// Reads a playlist.
    ///
    /// # Errors
    /// No `#EXTM3U` on the first line, tags of both kinds, a malformed tag line, or more than 100,000 segments.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, PlaylistError> {
        let text = std::str::from_utf8(bytes).map_err(|_| Problem::NotUtf8.at(1))?;
        let (byte_order_mark, text) = match text.strip_prefix(BYTE_ORDER_MARK) {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let lines = text.split_inclusive('\n').enumerate().map(read_line).collect::<Result<Vec<_>, _>>()?;
        if lines.first().is_none_or(|line| line.text.trim_end() != HEADER) {
            return Err(Problem::NoHeader.at(1));
        }
        let kind = kind_of(&lines)?;
        Ok(Self { byte_order_mark, lines, kind })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What a Media Playlist says of itself; a Multivariant Playlist has no segments.
    ///
    /// # Errors
    /// A number that is none, or too many segments.
    pub fn media_facts(&self) -> Result<MediaFacts, PlaylistError> {
        let mut facts = MediaFacts::default();
        let mut has_duration = false;
        for (at, line) in self.lines.iter().enumerate() {
            let tag = match line.content {
                Content::Tag(tag) => tag,
                Content::Uri if self.kind == Kind::Media => {
                    // D22 §4.4.4.1. Players do not count a URI without one, so that its number, and every one
                    // behind it, would be another for them than for us.
                    if !std::mem::take(&mut has_duration) {
                        return Err(Problem::NoDuration.at(at + 1));
                    }
                    facts.segments += 1;
                    facts.has_open_segment = false;
                    if facts.segments > MAX_SEGMENTS {
                        return Err(Problem::TooManySegments { limit: MAX_SEGMENTS }.at(at + 1));
                    }
                    continue;
                }
                _ => continue,
            };
            let number = || decimal(&tag).map_err(|problem| problem.at(at + 1));
            match tag.name() {
                "-X-MEDIA-SEQUENCE" => {
                    facts.media_sequence = media_sequence(&tag).map_err(|problem| problem.at(at + 1))?;
                }
                "-X-TARGETDURATION" => facts.target_duration_secs = number()?,
                "-X-ENDLIST" => facts.ended = true,
                "-X-I-FRAMES-ONLY" => facts.is_i_frames_only = true,
                "-X-PART-INF" => {
                    facts.is_low_latency = true;
                    facts.part_target_secs = part_target(&tag);
                }
                "-X-SERVER-CONTROL" => {
                    let control = Attributes::of(tag).map_err(|problem| problem.at(at + 1))?;
                    facts.takes_directives =
                        control.unquoted("CAN-BLOCK-RELOAD") == Some("YES") || control.has("CAN-SKIP-UNTIL");
                }
                "-X-PART" => {
                    facts.is_low_latency = true;
                    facts.has_open_segment = true;
                }
                "-X-PRELOAD-HINT" => {
                    let attributes = Attributes::of(tag).map_err(|problem| problem.at(at + 1))?;
                    facts.has_open_segment |= attributes.unquoted("TYPE") == Some("PART");
                }
                "-X-SKIP" => {
                    if facts.segments > 0 {
                        let why = "a segment stands before it".to_owned();
                        return Err(Problem::BadTag { tag: tag_name(&tag), why }.at(at + 1));
                    }
                    facts.skipped = skipped(tag).map_err(|problem| problem.at(at + 1))?;
                }
                "-X-DEFINE" => {
                    let attributes = Attributes::of(tag).map_err(|problem| problem.at(at + 1))?;
                    facts.imports_variables |= attributes.has("IMPORT");
                }
                "-X-PLAYLIST-TYPE" => {
                    let value = value_text(&tag);
                    facts.ended |= value == "VOD";
                    facts.playlist_type = Some(value.to_owned());
                }
                "INF" => {
                    has_duration = true;
                    let inf = tag.value().map(|v| v.try_as_decimal_floating_point_with_title());
                    // Players bear an EXTINF without a proper number; it only counts for the length here.
                    facts.duration_secs += inf.and_then(Result::ok).map_or(0.0, |(secs, _)| secs);
                }
                _ => {}
            }
        }
        // An estimate from above: of what is left out, not even the durations are there.
        facts.duration_secs += facts.skipped as f64 * facts.target_duration_secs as f64;
        Ok(facts)
    }

    /// The URIs of the playlists that a Multivariant Playlist names: variants, then renditions.
    pub fn child_uris(&self) -> Vec<&'a str> {
        let mut uris: Vec<_> = match self.kind {
            Kind::Media => return Vec::new(),
            Kind::Multivariant => self.lines.iter().filter(|l| l.content == Content::Uri),
        }
        .map(|line| line.text)
        .collect();
        for line in &self.lines {
            if let Content::Tag(tag) = line.content
                && tag.name() == "-X-MEDIA"
                && let Ok(attributes) = Attributes::of(tag)
            {
                uris.extend(attributes.quoted("URI"));
            }
        }
        uris
    }

    /// The methods and key URIs of its EXT-X-KEY tags, each once, in order.
    pub fn key_tags(&self) -> Vec<(String, Option<String>)> {
        let mut keys = Vec::new();
        for line in &self.lines {
            if let Content::Tag(tag) = line.content
                && tag.name() == "-X-KEY"
                && let Ok(attributes) = Attributes::of(tag)
            {
                let method = attributes.unquoted("METHOD").unwrap_or("?").to_owned();
                let key = (method, attributes.quoted("URI").map(str::to_owned));
                if !keys.contains(&key) {
                    keys.push(key);
                }
            }
        }
        keys
    }
}

fn read_line((at, raw): (usize, &str)) -> Result<Line<'_>, PlaylistError> {
    let text = raw.strip_suffix('\n').unwrap_or(raw);
    let text = text.strip_suffix('\r').unwrap_or(text);
    let ending = &raw[text.len()..];
    let content = if text.starts_with("#EXT") {
        let parsed = tag::parse(text).map_err(|error| {
            Problem::BadTag { tag: text.chars().take(40).collect(), why: error.to_string() }.at(at + 1)
        })?;
        Content::Tag(parsed.parsed)
    } else if text.trim().is_empty() || text.starts_with('#') {
        Content::Other
    } else {
        Content::Uri
    };
    Ok(Line { text, ending, content })
}

/// D22 §4.4: a playlist has tags of one kind; a client must fail to parse one that has both.
fn kind_of(lines: &[Line<'_>]) -> Result<Kind, PlaylistError> {
    let mut kind = None;
    for (at, line) in lines.iter().enumerate() {
        let (of, tag) = match line.tag_name() {
            Some("-X-STREAM-INF") => (Kind::Multivariant, "EXT-X-STREAM-INF"),
            Some("-X-MEDIA") => (Kind::Multivariant, "EXT-X-MEDIA"),
            Some("-X-I-FRAME-STREAM-INF") => (Kind::Multivariant, "EXT-X-I-FRAME-STREAM-INF"),
            Some("-X-SESSION-DATA") => (Kind::Multivariant, "EXT-X-SESSION-DATA"),
            Some("-X-SESSION-KEY") => (Kind::Multivariant, "EXT-X-SESSION-KEY"),
            Some("-X-CONTENT-STEERING") => (Kind::Multivariant, "EXT-X-CONTENT-STEERING"),
            Some("INF") => (Kind::Media, "EXTINF"),
            Some("-X-TARGETDURATION") => (Kind::Media, "EXT-X-TARGETDURATION"),
            Some("-X-MEDIA-SEQUENCE") => (Kind::Media, "EXT-X-MEDIA-SEQUENCE"),
            Some("-X-KEY") => (Kind::Media, "EXT-X-KEY"),
            Some("-X-MAP") => (Kind::Media, "EXT-X-MAP"),
            Some("-X-BYTERANGE") => (Kind::Media, "EXT-X-BYTERANGE"),
            Some("-X-I-FRAMES-ONLY") => (Kind::Media, "EXT-X-I-FRAMES-ONLY"),
            Some("-X-PART-INF") => (Kind::Media, "EXT-X-PART-INF"),
            Some("-X-PART") => (Kind::Media, "EXT-X-PART"),
            Some("-X-SKIP") => (Kind::Media, "EXT-X-SKIP"),
            _ => continue,
        };
        match kind {
            None => kind = Some(of),
            Some(known) if known != of => {
                return Err(Problem::WrongPlaylist { tag, playlist: known.name() }.at(at + 1));
            }
            Some(_) => {}
        }
    }
    Ok(kind.unwrap_or(Kind::Media))
}

/// Numbers up to 2^62 leave room for whatever is added to them; a packager at 1,000 segments a second gets
/// there in 146 million years.
fn media_sequence(tag: &UnknownTag<'_>) -> Result<MediaSequenceNumber, Problem> {
    let number = decimal(tag)?;
    if number > 1 << 62 {
        let why = format!("{number} is beyond 2^62");
        return Err(Problem::BadTag { tag: tag_name(tag), why });
    }
    Ok(MediaSequenceNumber(number))
}

fn skipped(tag: UnknownTag<'_>) -> Result<u64, Problem> {
    let attributes = Attributes::of(tag)?;
    let number = attributes.decimal("SKIPPED-SEGMENTS")?;
    let number = number.ok_or_else(|| attributes.bad("it has no SKIPPED-SEGMENTS".into()))?;
    if number > MAX_SEGMENTS as u64 {
        return Err(attributes.bad(format!("more than {MAX_SEGMENTS} segments")));
    }
    Ok(number)
}

/// It only says how long a playlist is fresh: what is no number counts as none.
fn part_target(tag: &UnknownTag<'_>) -> f64 {
    let secs = Attributes::of(*tag).ok().and_then(|list| list.unquoted("PART-TARGET")?.parse::<f64>().ok());
    secs.filter(|secs| secs.is_finite() && *secs > 0.0).unwrap_or(0.0)
}

pub(super) fn value_text<'a>(tag: &UnknownTag<'a>) -> &'a str {
    // The whole playlist was checked to be UTF-8.
    tag.value().and_then(|value| std::str::from_utf8(value.0).ok()).unwrap_or("").trim()
}

pub(super) fn decimal(tag: &UnknownTag<'_>) -> Result<u64, Problem> {
    let text = value_text(tag);
    text.parse().map_err(|_| Problem::BadTag {
        tag: tag_name(tag),
        why: format!("{text:?} is not a decimal integer"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> (usize, Problem) {
        let error = Playlist::parse(text.as_bytes())
            .and_then(|playlist| playlist.media_facts())
            .expect_err("this playlist is wrong");
        (error.line, error.problem)
    }

    #[test]
    fn every_byte_is_kept_whatever_the_line_endings() {
        let text = "#EXTM3U\r\n\r\n# a comment\n#EXT-X-TARGETDURATION:4\r\n#EXTINF:4,\nseg.ts";
        let playlist = Playlist::parse(text.as_bytes()).unwrap();
        let again: String = playlist.lines.iter().flat_map(|line| [line.text, line.ending]).collect();
        assert_eq!(again, text);
    }

    #[test]
    fn the_kind_follows_from_the_tags() {
        let kind = |text: &str| Playlist::parse(text.as_bytes()).unwrap().kind();
        assert_eq!(kind("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8\n"), Kind::Multivariant);
        assert_eq!(kind("#EXTM3U\n#EXTINF:4,\na.m3u8\n"), Kind::Media);
    }

    #[test]
    fn a_playlist_of_both_kinds_is_refused_with_its_line() {
        let both = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8\n";
        let expected = Problem::WrongPlaylist { tag: "EXT-X-STREAM-INF", playlist: "Media Playlist" };
        assert_eq!(problem(both), (3, expected));
    }

    #[test]
    fn what_is_not_a_playlist_is_told_from_its_first_bytes() {
        assert!(looks_like_a_playlist(b"#EXTM3U\n"));
        assert!(looks_like_a_playlist(b"\xef\xbb\xbf#EXTM3U\r\n"));
        assert!(!looks_like_a_playlist(b"\x47\x40\x00\x10"));
        assert_eq!(problem("<html>"), (1, Problem::NoHeader));
        assert_eq!(problem(""), (1, Problem::NoHeader));
        assert_eq!(problem("#EXTM3U8\n"), (1, Problem::NoHeader));
    }

    #[test]
    fn facts_of_a_live_playlist() {
        let text = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXT-X-MEDIA-SEQUENCE:812\n\
                    #EXTINF:3.5,\na.ts\n#EXTINF:4,title\nb.ts\n";
        let facts = Playlist::parse(text.as_bytes()).unwrap().media_facts().unwrap();
        assert_eq!(facts.media_sequence, MediaSequenceNumber(812));
        assert_eq!(facts.segments, 2);
        assert_eq!(facts.target_duration_secs, 4);
        assert!((facts.duration_secs - 7.5).abs() < 1e-9);
        assert!(!facts.ended);
    }

    #[test]
    fn endlist_and_vod_both_say_that_nothing_follows() {
        for tag in ["#EXT-X-ENDLIST", "#EXT-X-PLAYLIST-TYPE:VOD"] {
            let text = format!("#EXTM3U\n#EXT-X-TARGETDURATION:4\n{tag}\n");
            assert!(Playlist::parse(text.as_bytes()).unwrap().media_facts().unwrap().ended);
        }
    }

    #[test]
    fn a_uri_without_a_duration_would_be_counted_differently_by_players() {
        let text = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\nb.ts\n";
        assert_eq!(problem(text), (5, Problem::NoDuration));
        let blank = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\na.ts\n   \n\t\n#EXTINF:4,\nb.ts\n";
        assert_eq!(Playlist::parse(blank.as_bytes()).unwrap().media_facts().unwrap().segments, 2);
    }

    #[test]
    fn a_media_sequence_that_is_no_number_names_its_line() {
        for number in ["-1", "x", "18446744073709551615", "99999999999999999999"] {
            let (line, problem) = problem(&format!("#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:{number}\n"));
            assert_eq!(line, 2);
            assert!(problem.to_string().contains("EXT-X-MEDIA-SEQUENCE"), "{problem}");
        }
    }
}
