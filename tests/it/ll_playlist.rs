//! Reading low-latency playlists as a player does, and following them by blocking reloads.
//!
//! Written apart from the shield's own reading, and strict: what must not be (a KEY between the parts of one
//! segment, a segment under another key than its parts) ends the test.

use std::collections::BTreeMap;

use url::Url;

use crate::harness::{Answer, agent, try_ask_by};
use crate::ll_media::Place;

/// What a playlist says of a Partial Segment or a Media Segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Absolute.
    pub url: String,
    /// As in BYTERANGE.
    pub range: Option<String>,
    pub key: Option<Key>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Absolute.
    pub url: String,
    /// 32 hex digits.
    pub iv: String,
}

/// A Media Playlist.
#[derive(Debug, Clone, Default)]
pub struct Playlist {
    pub text: String,
    pub first_msn: u64,
    /// By EXT-X-SKIP.
    pub skipped: u64,
    pub segments: BTreeMap<u64, Link>,
    pub parts: BTreeMap<Place, Link>,
    /// Absolute URL of the part that comes next.
    pub hint: Option<String>,
}

impl Playlist {
    pub fn parse(url: &str, text: &str) -> Self {
        let base = Url::parse(url).unwrap();
        let absolute = |uri: &str| base.join(uri).unwrap().to_string();
        let mut playlist = Self { text: text.to_owned(), ..Self::default() };
        let (mut key, mut place) = (None, Place { msn: 0, part: 0 });
        for line in text.lines() {
            if let Some(first) = line.strip_prefix("#EXT-X-MEDIA-SEQUENCE:") {
                playlist.first_msn = first.parse().unwrap();
                place.msn = playlist.first_msn;
            } else if line.starts_with("#EXT-X-SKIP:") {
                playlist.skipped = attribute(line, "SKIPPED-SEGMENTS").unwrap().parse().unwrap();
                place.msn += playlist.skipped;
            } else if line.starts_with("#EXT-X-KEY:METHOD=NONE") {
                key = None;
            } else if line.starts_with("#EXT-X-KEY:") {
                assert_eq!(place.part, 0, "a KEY after the first part of {place:?}:\n{text}");
                let iv = attribute(line, "IV").expect("an IV");
                let iv = iv.strip_prefix("0x").expect("hex").to_owned();
                assert_eq!(iv.len(), 32, "{line}");
                key = Some(Key { url: absolute(&attribute(line, "URI").unwrap()), iv });
            } else if line.starts_with("#EXT-X-PART:") {
                let url = absolute(&attribute(line, "URI").unwrap());
                let link = Link { url, range: attribute(line, "BYTERANGE"), key: key.clone() };
                playlist.parts.insert(place, link);
                place.part += 1;
            } else if line.starts_with("#EXT-X-PRELOAD-HINT:TYPE=PART") {
                playlist.hint = attribute(line, "URI").map(|uri| absolute(&uri));
            } else if !line.is_empty() && !line.starts_with('#') {
                let link = Link { url: absolute(line), range: None, key: key.clone() };
                playlist.segments.insert(place.msn, link);
                place = Place { msn: place.msn + 1, part: 0 };
            }
        }
        playlist
    }

    /// The last part.
    pub fn last(&self) -> Place {
        *self.parts.last_key_value().unwrap_or_else(|| panic!("no parts in {}", self.text)).0
    }

    /// Its lines that begin with a tag.
    pub fn lines(&self, tag: &str) -> Vec<&str> {
        self.text.lines().filter(|line| line.starts_with(tag)).collect()
    }
}

/// An attribute's value, without its quotes.
pub fn attribute(line: &str, name: &str) -> Option<String> {
    // The name stands behind the tag's colon or another attribute's comma.
    let at = [':', ','].iter().find_map(|before| line.find(&format!("{before}{name}=")))?;
    let value = &line[at + name.len() + 2..];
    let value = match value.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => value.split(',').next(),
    };
    value.map(str::to_owned)
}

/// A player of one rendition: it holds the playlist that it got last.
pub struct Follower {
    pub url: String,
    pub playlist: Playlist,
    agent: ureq::Agent,
}

impl Follower {
    pub fn start(url: &str) -> Self {
        let mut follower = Self { url: url.to_owned(), playlist: Playlist::default(), agent: agent() };
        follower.playlist = follower.parse(&follower.ask(""));
        follower
    }

    /// Waits until there is a part more, as a player does.
    pub fn next(&mut self) -> &Playlist {
        let wanted = self.playlist.last().next();
        let answer = self.ask(&blocking(wanted));
        self.playlist = self.parse(&answer);
        assert!(self.playlist.last() >= wanted, "{wanted:?} is not in\n{}", self.playlist.text);
        &self.playlist
    }

    /// Waits until the part at a place is what comes next, and says where it will be.
    pub fn until_hint_at(&mut self, place: Place) -> String {
        while self.playlist.last().next() < place {
            self.next();
        }
        assert_eq!(self.playlist.last().next(), place);
        self.playlist.hint.clone().unwrap_or_else(|| panic!("no hint in\n{}", self.playlist.text))
    }

    /// Asks with a query (with its question mark), whatever the answer.
    pub fn ask(&self, query: &str) -> Answer {
        let url = format!("{}{query}", self.url);
        try_ask_by(&self.agent, "GET", &url, &[]).unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    pub fn parse(&self, answer: &Answer) -> Playlist {
        assert_eq!(answer.status, 200, "{}: {}", self.url, String::from_utf8_lossy(&answer.body));
        Playlist::parse(&self.url, &answer.text())
    }
}

/// The query of a reload that waits for a part.
pub fn blocking(place: Place) -> String {
    format!("?_HLS_msn={}&_HLS_part={}", place.msn, place.part)
}

#[test]
fn parts_belong_to_the_segment_that_comes_after_them() {
    let text = "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:1000\n#EXT-X-SKIP:SKIPPED-SEGMENTS=2\n\
        #EXT-X-KEY:METHOD=AES-128,URI=\"/k\",IV=0x000102030405060708090a0b0c0d0e0f\n\
        #EXT-X-PART:DURATION=0.32,URI=\"a.0\",BYTERANGE=\"5@0\"\n#EXTINF:0.96,\na\n\
        #EXT-X-PART:DURATION=0.32,URI=\"b.0\"\n#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"b.1\"\n";
    let playlist = Playlist::parse("http://o/live/v.m3u8", text);
    let places = |msn, part| Place { msn, part };
    assert_eq!(playlist.parts.keys().copied().collect::<Vec<_>>(), [places(1_002, 0), places(1_003, 0)]);
    assert_eq!(playlist.parts[&places(1_002, 0)].range.as_deref(), Some("5@0"));
    assert_eq!(playlist.segments[&1_002].key, playlist.parts[&places(1_003, 0)].key);
    assert_eq!(playlist.segments[&1_002].key.as_ref().unwrap().url, "http://o/k");
    assert_eq!(playlist.hint.as_deref(), Some("http://o/live/b.1"));
    assert_eq!(playlist.last().next(), places(1_003, 1));
}
