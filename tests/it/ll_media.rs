//! What a low-latency encoder made: fMP4 of two renditions, cut into Partial Segments, known to the last byte.
//!
//! ffmpeg writes one file a rendition, a fragment every 0.32 s, and the file is cut at its fragments. That is the
//! shortest round time that frames of 1024 samples at 48 kHz and pictures at 25 a second both come out even at, so
//! that every part is as long as its playlist says and sound and pictures stay together. A segment is nothing but
//! its parts, one after the other. Nothing is repeated, for time must go on: as much is made as a test will last.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// One of video and one of sound.
pub const RENDITIONS: [&str; 2] = ["video", "audio"];
/// How long a part is: 8 pictures, or 15 frames of sound.
pub const PART: Duration = Duration::from_millis(320);
/// Parts of a segment.
pub const PARTS: u64 = 3;
pub const FIRST_MSN: u64 = 1_000;

/// A part's place: that of the segment it belongs to, and its place there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub msn: u64,
    pub part: u64,
}

impl Place {
    /// The place of the part before which so many were made.
    pub fn after(made: usize) -> Self {
        let made = made as u64;
        Self { msn: FIRST_MSN + made / PARTS, part: made % PARTS }
    }

    /// How many were made before it.
    pub fn index(self) -> usize {
        usize::try_from((self.msn - FIRST_MSN) * PARTS + self.part).unwrap()
    }

    pub fn next(self) -> Self {
        Self::after(self.index() + 1)
    }
}

/// The parts of all renditions.
pub struct Media {
    renditions: [Rendition; 2],
}

struct Rendition {
    init: Vec<u8>,
    parts: Vec<Vec<u8>>,
}

impl Media {
    pub fn make(duration: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        encode(dir.path(), duration);
        let renditions = RENDITIONS.map(|name| {
            let file = std::fs::read(dir.path().join(format!("{name}.mp4"))).unwrap();
            Rendition::cut(&file)
        });
        Self { renditions }
    }

    /// How many parts there are of each rendition.
    pub fn len(&self) -> usize {
        self.renditions.iter().map(|rendition| rendition.parts.len()).min().expect("two renditions")
    }

    pub fn init(&self, rendition: usize) -> &[u8] {
        &self.renditions[rendition].init
    }

    pub fn part(&self, rendition: usize, place: Place) -> &[u8] {
        &self.renditions[rendition].parts[place.index()]
    }

    pub fn segment(&self, rendition: usize, msn: u64) -> Vec<u8> {
        (0..PARTS).flat_map(|part| self.part(rendition, Place { msn, part })).copied().collect()
    }

    /// Where a part begins within its segment.
    pub fn offset(&self, rendition: usize, place: Place) -> usize {
        (0..place.part).map(|part| self.part(rendition, Place { part, ..place }).len()).sum()
    }
}

impl Rendition {
    /// Cuts a file of fragments: what stands before the first of them initializes, and each is a part. The last
    /// one may be short.
    fn cut(file: &[u8]) -> Self {
        let mut starts: Vec<_> = boxes(file).filter(|(_, kind)| kind == b"moof").map(|(at, _)| at).collect();
        let init = file[..starts[0]].to_vec();
        let end = boxes(file).find(|(_, kind)| kind == b"mfra").map_or(file.len(), |(at, _)| at);
        starts.push(end);
        let mut parts: Vec<_> = starts.windows(2).map(|ends| file[ends[0]..ends[1]].to_vec()).collect();
        parts.pop();
        Self { init, parts }
    }
}

/// The boxes of an ISO base media file: where each starts, and its type.
fn boxes(file: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let header = file.get(at..at + 8)?;
        let start = at;
        at += u32::from_be_bytes(header[..4].try_into().unwrap()) as usize;
        Some((start, &header[4..]))
    })
}

/// Has ffmpeg make 3 to 9 kB a part: enough to arrive in pieces.
fn encode(dir: &Path, duration: Duration) {
    let secs = duration.as_secs().to_string();
    let mut command = Command::new("ffmpeg");
    command.current_dir(dir).args(["-hide_banner", "-nostdin", "-v", "error"]);
    for source in ["testsrc2=size=128x72:rate=25", "sine=sample_rate=48000"] {
        command.args(["-t", &secs, "-f", "lavfi", "-i", source]);
    }
    let gop = PARTS * 8;
    let h264 = format!(
        "-map 0:v -c:v libx264 -preset ultrafast -tune zerolatency -pix_fmt yuv420p -b:v 120k -g {gop} \
         -keyint_min {gop} -sc_threshold 0"
    );
    for (name, coding) in RENDITIONS.into_iter().zip([&h264, "-map 1:a -c:a aac -b:a 64k"]) {
        command.args(coding.split_whitespace());
        command.args("-f mp4 -movflags +empty_moov+default_base_moof".split(' '));
        command.args(["-frag_duration", &PART.as_micros().to_string(), &format!("{name}.mp4")]);
    }
    let output = command.output().expect("ffmpeg is installed");
    assert!(output.status.success(), "ffmpeg: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_file_is_cut_into_parts_of_one_length_and_nothing_is_lost() {
    let media = Media::make(Duration::from_secs(4));
    assert_eq!(media.len(), 12, "12.5 parts of 0.32 s, the last of them short");
    for rendition in 0..RENDITIONS.len() {
        assert_eq!(&media.init(rendition)[4..8], b"ftyp");
        for index in 0..media.len() {
            let part = media.part(rendition, Place::after(index));
            let kinds: Vec<_> = boxes(part).map(|(_, kind)| kind).collect();
            assert_eq!(kinds, [b"moof", b"mdat"], "part {index} of {}", RENDITIONS[rendition]);
        }
        let third = Place { msn: FIRST_MSN + 1, part: 2 };
        let segment = media.segment(rendition, third.msn);
        assert_eq!(&segment[media.offset(rendition, third)..], media.part(rendition, third));
    }
}
