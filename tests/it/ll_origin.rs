//! A Low-Latency HLS origin whose every byte is known: two renditions in parts of 0.32 s, three of them a segment.
//!
//! It does what draft-pantos-hls-rfc8216bis asks of a server (section 6.2.5): blocks reloads until the playlist has
//! what was asked for, answers `_HLS_skip` with a delta update, refuses what is too far ahead, gives up after three
//! Target Durations, and sends a hinted part while it is made. A thread a connection carries that: a few hundred
//! that wait cost little, and every one of them wakes up at the moment itself.
//!
//! Deliberately absent: discontinuities, gaps and date ranges, which parts have nothing to do with.

use std::sync::Arc;
use std::time::Duration;

use keyshield::clock::Clock;
use keyshield::keys::Timestamp;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use url::Url;

use crate::harness::SOON;
use crate::ll_encoder::Encoder;
use crate::ll_media::{FIRST_MSN, Media, PART, PARTS, Place, RENDITIONS};
use crate::origin::{Answer, Framing, Gate, Origin, Seen};

/// Whole segments in a playlist.
pub const WINDOW: u64 = 12;
/// So many of the last segments have their parts listed: what an old one is made of interests nobody any more.
const SEGMENTS_WITH_PARTS: u64 = 4;
pub const TARGET_DURATION: Duration = Duration::from_secs(1);
/// Six Target Durations, the least that is allowed.
const SKIP_UNTIL: Duration = Duration::from_secs(6);
/// How long a reload is blocked at most.
const BLOCK_LIMIT: Duration = TARGET_DURATION.saturating_mul(3);
/// Parts that may be asked for beyond the last one: three seconds of them.
const ADVANCE_PARTS: usize = 9;
/// Media beyond a test's duration: for programs that start.
const SPARE: Duration = Duration::from_secs(20);

pub const MASTER: &str = "/live/master.m3u8";

/// How playlists name parts.
#[derive(Clone, Copy, PartialEq)]
pub enum Parts {
    /// Each is a file.
    Files,
    /// Each is a byte range of its segment's file.
    Ranges,
}

/// A running origin. It goes on by itself, unless [`Encoder::stop`] says otherwise.
pub struct LlOrigin {
    pub media: Arc<Media>,
    pub encoder: Arc<Encoder>,
    origin: Origin,
}

impl LlOrigin {
    /// One whose media last for `duration` and a little longer.
    pub fn start(duration: Duration, parts: Parts) -> Self {
        let window = usize::try_from(WINDOW * PARTS).unwrap();
        let history = PART * u32::try_from(window).unwrap();
        let media = Arc::new(Media::make(history + duration + SPARE));
        // The segment after the last one must be known too: ranges of it may be asked for.
        let encoder = Arc::new(Encoder::start(window, media.len() - 2 * PARTS as usize));
        let started = Clock::System.now().minus(history);
        let server = Server { media: Arc::clone(&media), encoder: Arc::clone(&encoder), parts, started };
        Self { media, encoder, origin: Origin::start(move |request| server.answer(request)) }
    }

    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.origin.url())
    }

    /// The path of a Media Playlist.
    pub fn playlist_path(rendition: usize) -> String {
        format!("/live/{}.m3u8", RENDITIONS[rendition])
    }

    /// The path of a part that is a file.
    pub fn part_path(rendition: usize, place: Place) -> String {
        format!("/live/{}/{}.{}.m4s", RENDITIONS[rendition], place.msn, place.part)
    }

    /// The last part that is there.
    pub fn last(&self) -> Place {
        Place::after(self.encoder.made() - 1)
    }

    /// How often a target was asked for, whatever the order of the parameters in its query.
    pub fn count(&self, target: &str) -> usize {
        let parts = |target: &str| {
            let mut parts: Vec<_> = target.split(['?', '&']).map(str::to_owned).collect();
            parts[1..].sort();
            parts
        };
        let wanted = parts(target);
        self.origin.targets().iter().filter(|target| parts(target) == wanted).count()
    }
}

/// What answers requests.
struct Server {
    media: Arc<Media>,
    encoder: Arc<Encoder>,
    parts: Parts,
    /// When the first of the media were made.
    started: Timestamp,
}

impl Server {
    fn answer(&self, request: &Seen) -> Answer {
        // Players on pages of another origin ask too.
        self.find(request).unwrap_or_else(Answer::status).header("Access-Control-Allow-Origin", "*")
    }

    fn find(&self, request: &Seen) -> Result<Answer, u16> {
        let url = Url::parse("http://origin").unwrap().join(&request.target).map_err(|_| 400_u16)?;
        if url.path() == MASTER {
            return Ok(Answer::ok(MULTIVARIANT).header("Content-Type", "application/vnd.apple.mpegurl"));
        }
        let path = url.path().strip_prefix("/live/").ok_or(404_u16)?;
        let rendition_named = |name: &str| RENDITIONS.iter().position(|r| *r == name).ok_or(404_u16);
        if let Some(name) = path.strip_suffix(".m3u8") {
            let playlist = self.reload(rendition_named(name)?, &Reload::from(&url)?)?;
            return Ok(Answer::ok(playlist).header("Content-Type", "application/vnd.apple.mpegurl"));
        }
        let (name, file) = path.split_once('/').ok_or(404_u16)?;
        let answer = self.file(rendition_named(name)?, file, request.headers.get("range"))?;
        Ok(answer.header("Content-Type", format!("{name}/mp4")))
    }

    fn reload(&self, rendition: usize, reload: &Reload) -> Result<String, u16> {
        if let Some(wanted) = reload.waits_for()? {
            let last = Place::after(self.encoder.made() - 1);
            if wanted.msn > last.msn + 2 || wanted.index() > last.index() + ADVANCE_PARTS {
                return Err(400);
            }
            if !self.encoder.wait_for(wanted, BLOCK_LIMIT) {
                return Err(503);
            }
        }
        Ok(self.playlist(rendition, self.encoder.made(), reload.skips))
    }

    /// A Media Playlist as it stands when so many parts were made.
    fn playlist(&self, rendition: usize, made: usize, skips: bool) -> String {
        let name = RENDITIONS[rendition];
        let next = Place::after(made);
        let first = next.msn - WINDOW;
        let (part, segment) = (PART.as_secs_f64(), (PART * PARTS as u32).as_secs_f64());
        let mut text = format!(
            "#EXTM3U\n#EXT-X-VERSION:9\n#EXT-X-TARGETDURATION:{}\n#EXT-X-SERVER-CONTROL:CAN-BLOCK-RELOAD=YES,\
             PART-HOLD-BACK={:.2},CAN-SKIP-UNTIL={:.1}\n#EXT-X-PART-INF:PART-TARGET={part:.2}\n\
             #EXT-X-MEDIA-SEQUENCE:{first}\n",
            TARGET_DURATION.as_secs(),
            4.0 * part,
            SKIP_UNTIL.as_secs_f64(),
        );
        // What is skipped lies before the skip boundary, and its tags with it: EXT-X-MAP among them.
        let after_first = (SKIP_UNTIL.as_secs_f64() / segment).ceil() as u64;
        let skipped = if skips { WINDOW - after_first } else { 0 };
        if skips {
            text.push_str(&format!("#EXT-X-SKIP:SKIPPED-SEGMENTS={skipped}\n"));
        } else {
            text.push_str(&format!("#EXT-X-MAP:URI=\"{name}/init.mp4\"\n"));
        }
        for msn in first + skipped..=next.msn {
            let parts = if msn == next.msn { next.part } else { PARTS };
            if parts > 0 {
                text.push_str(&format!("#EXT-X-PROGRAM-DATE-TIME:{}\n", self.date_of(msn)));
            }
            if msn + SEGMENTS_WITH_PARTS > next.msn {
                let lines = (0..parts).map(|part| self.part_line(rendition, Place { msn, part }));
                text.extend(lines);
            }
            if msn < next.msn {
                text.push_str(&format!("#EXTINF:{segment:.2},\n{name}/{msn}.m4s\n"));
            }
        }
        text + &self.hint_line(rendition, next) + &report_line(1 - rendition, Place::after(made - 1))
    }

    fn part_line(&self, rendition: usize, place: Place) -> String {
        let (name, Place { msn, part }) = (RENDITIONS[rendition], place);
        let uri = match self.parts {
            Parts::Files => format!("URI=\"{name}/{msn}.{part}.m4s\""),
            Parts::Ranges => {
                let length = self.media.part(rendition, place).len();
                let offset = self.media.offset(rendition, place);
                format!("URI=\"{name}/{msn}.m4s\",BYTERANGE=\"{length}@{offset}\"")
            }
        };
        // All sound is independent; of video, what a key frame begins.
        let independent = if name == "audio" || part == 0 { ",INDEPENDENT=YES" } else { "" };
        format!("#EXT-X-PART:DURATION={:.2},{uri}{independent}\n", PART.as_secs_f64())
    }

    fn hint_line(&self, rendition: usize, next: Place) -> String {
        let (name, Place { msn, part }) = (RENDITIONS[rendition], next);
        match self.parts {
            Parts::Files => format!("#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"{name}/{msn}.{part}.m4s\"\n"),
            // Nobody knows how long it will be.
            Parts::Ranges => format!(
                "#EXT-X-PRELOAD-HINT:TYPE=PART,URI=\"{name}/{msn}.m4s\",BYTERANGE-START={}\n",
                self.media.offset(rendition, next)
            ),
        }
    }

    fn date_of(&self, msn: u64) -> String {
        let since = PART * u32::try_from((msn - FIRST_MSN) * PARTS).unwrap();
        let nanos = i128::from(self.started.plus(since).as_unix_millis()) * 1_000_000;
        OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap().format(&Rfc3339).unwrap()
    }

    fn file(&self, rendition: usize, file: &str, range: Option<&String>) -> Result<Answer, u16> {
        if file == "init.mp4" {
            return Ok(Answer::ok(self.media.init(rendition)));
        }
        let mut numbers = file.strip_suffix(".m4s").ok_or(404_u16)?.split('.').map(str::parse::<u64>);
        let mut number = || numbers.next().transpose().map_err(|_| 404_u16);
        let (msn, part) = (number()?.ok_or(404_u16)?, number()?);
        if msn < FIRST_MSN {
            return Err(404);
        }
        match (part, range) {
            (Some(part), _) if part < PARTS => self.part(rendition, Place { msn, part }),
            (Some(_), _) => Err(404),
            (None, Some(range)) => self.range(rendition, msn, range),
            (None, None) if msn < Place::after(self.encoder.made()).msn => {
                Ok(Answer::ok(self.media.segment(rendition, msn)))
            }
            (None, None) => Err(404),
        }
    }

    /// A part that is there, or the next one as it is made: its first half as soon as there is one.
    fn part(&self, rendition: usize, place: Place) -> Result<Answer, u16> {
        let made = self.encoder.made();
        // A part ahead: a playlist may have been loaded while the part before was hinted still.
        if place.index() > made + 1 || !self.encoder.wait_for_half(place, BLOCK_LIMIT) {
            return Err(404);
        }
        let part = self.media.part(rendition, place);
        if place.index() < self.encoder.made() {
            return Ok(Answer::ok(part));
        }
        let encoder = Arc::clone(&self.encoder);
        let rest = Gate::after(move || assert!(encoder.wait_for(place, SOON), "{place:?} was never made"));
        let gate = Some((part.len() / 2, rest));
        Ok(Answer { framing: Framing::Chunked, gate, ..Answer::ok(part) })
    }

    /// A range of a segment, which may be a part that is not there yet. One without an end goes as far as the
    /// segment does, or as the part does that it begins with if the segment is still being made.
    fn range(&self, rendition: usize, msn: u64, range: &str) -> Result<Answer, u16> {
        let (start, end) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).ok_or(416_u16)?;
        let start: usize = start.parse().map_err(|_| 416_u16)?;
        let next = Place::after(self.encoder.made());
        if msn > next.msn {
            return Err(404);
        }
        let segment = self.media.segment(rendition, msn);
        let end_of =
            |place: &Place| self.media.offset(rendition, *place) + self.media.part(rendition, *place).len();
        let mut parts = (0..PARTS).map(|part| Place { msn, part });
        let (last, end) = if end.is_empty() && msn < next.msn {
            (Place { msn, part: PARTS - 1 }, segment.len())
        } else if end.is_empty() {
            let part = parts.find(|place| start < end_of(place)).ok_or(416_u16)?;
            (part, end_of(&part))
        } else {
            let end = end.parse::<usize>().map_err(|_| 416_u16)? + 1;
            (parts.find(|place| end <= end_of(place)).ok_or(416_u16)?, end)
        };
        if last.index() > next.index() || !self.encoder.wait_for(last, BLOCK_LIMIT) {
            return Err(404);
        }
        let total = if msn < next.msn { segment.len().to_string() } else { "*".to_owned() };
        let answer = Answer { status: 206, ..Answer::ok(segment.get(start..end).ok_or(416_u16)?) };
        Ok(answer.header("Content-Range", format!("bytes {start}-{}/{total}", end - 1)))
    }
}

fn report_line(rendition: usize, last: Place) -> String {
    let (name, Place { msn, part }) = (RENDITIONS[rendition], last);
    format!("#EXT-X-RENDITION-REPORT:URI=\"{name}.m3u8\",LAST-MSN={msn},LAST-PART={part}\n")
}

/// What a reload asks for by its query.
struct Reload {
    msn: Option<u64>,
    part: Option<u64>,
    skips: bool,
}

impl Reload {
    fn from(url: &Url) -> Result<Self, u16> {
        let value = |name| url.query_pairs().find(|(n, _)| n == name).map(|(_, value)| value.into_owned());
        let number = |name| value(name).map(|value| value.parse().map_err(|_| 400_u16)).transpose();
        let skips = value("_HLS_skip").is_some_and(|skip| skip == "YES" || skip == "v2");
        Ok(Self { msn: number("_HLS_msn")?, part: number("_HLS_part")?, skips })
    }

    /// The part until which the playlist waits.
    fn waits_for(&self) -> Result<Option<Place>, u16> {
        match (self.msn, self.part) {
            (None, Some(_)) => Err(400),
            (None, None) => Ok(None),
            (Some(msn), None) => Ok(Some(Place { msn: msn.max(FIRST_MSN), part: PARTS - 1 })),
            // A part beyond the last one of its segment is the first one of the next.
            (Some(msn), Some(part)) if part >= PARTS => {
                Ok(Some(Place { msn: msn.max(FIRST_MSN) + 1, part: 0 }))
            }
            (Some(msn), Some(part)) => Ok(Some(Place { msn: msn.max(FIRST_MSN), part })),
        }
    }
}

const MULTIVARIANT: &str = "#EXTM3U\n#EXT-X-VERSION:6\n#EXT-X-INDEPENDENT-SEGMENTS\n\
    #EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID=\"tone\",NAME=\"tone\",DEFAULT=YES,AUTOSELECT=YES,URI=\"audio.m3u8\"\n\
    #EXT-X-STREAM-INF:BANDWIDTH=260000,CODECS=\"avc1.42c00a,mp4a.40.2\",RESOLUTION=128x72,AUDIO=\"tone\"\n\
    video.m3u8\n";
