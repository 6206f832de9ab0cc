//! A Media Playlist, line for line.
//!
//! Lines are gathered until the URI that they belong to, because some of what stands before it (its KEY) follows from
//! it, and some of what is done to it (nothing, for a gap) follows from them. What EXT-X-KEY is in force is kept as
//! players keep it, and a KEY is written whenever what comes next needs another one.

mod low_latency;

use std::ops::Range;

use quick_m3u8::tag::IntoInnerTag;
use quick_m3u8::tag::hls::{Key, Method};

use super::{MediaRewrite, PeriodKey};
use crate::hls::attributes::{Attributes, Edits, tag_name};
use crate::hls::byte_range::LastRange;
use crate::hls::encrypted::Encryption;
use crate::hls::error::{PlaylistError, Problem};
use crate::hls::linker::{Surroundings, Target};
use crate::hls::playlist::{Content, Line, MediaFacts, Playlist, decimal, value_text};
use crate::hls::variables::Variables;
use crate::hls::version;
use crate::keys::{ByteRange, Iv, KeyId, KeyMethod, MediaSequenceNumber, Place, RenditionTag, Subtitles};

/// What EXT-X-KEY is in force for the lines that follow.
#[derive(Debug, Clone, Copy, PartialEq)]
enum InForce {
    /// No KEY yet, or METHOD=NONE: what follows is clear.
    Nothing,
    /// Players differ in what they carry over EXT-X-SKIP.
    Unknown,
    Ours {
        id: KeyId,
        iv: Option<Iv>,
    },
    /// The origin's own.
    Origins,
}

/// A line with its number, from 1.
type Numbered<'p> = (usize, &'p Line<'p>);

pub(super) struct Writer<'p, 'r, 'a> {
    playlist: &'p Playlist<'p>,
    rewrite: &'r MediaRewrite<'a>,
    around: &'r Surroundings<'a>,
    /// The line ending of what is added.
    ending: &'p str,
    /// Where a version that is too low for an IV stands in `out`, or where the one that is missing goes, and what
    /// goes behind it.
    low_version: Option<(Range<usize>, &'p str)>,
    has_written_iv: bool,
    is_i_frames_only: bool,
    /// Ranges of the present segment go into its link.
    links_ranges: bool,
    /// An EXT-X-MAP has been seen.
    has_map: bool,
    /// In low-latency playlists.
    rendition: Option<RenditionTag>,
    /// The segments are subtitles, and stay in clear.
    leaves_clear: bool,
    variables: Variables,
    msn: MediaSequenceNumber,
    encryption: Encryption<'p>,
    /// Segments were skipped, and the KEY of the origin that stood among them may go on.
    is_encryption_unknown: bool,
    last_range: LastRange<'p>,
    last_part_range: LastRange<'p>,
    /// A part of the playlist is a byte range.
    has_part_ranges: bool,
    in_force: InForce,
    out: String,
}

impl<'p, 'r, 'a> Writer<'p, 'r, 'a> {
    pub(super) fn new(playlist: &'p Playlist<'p>, rewrite: &'r MediaRewrite<'a>, facts: &MediaFacts) -> Self {
        let ending = playlist.lines.first().map_or("\n", |line| line.ending);
        Self {
            playlist,
            rewrite,
            around: &rewrite.surroundings,
            ending: if ending.is_empty() { "\n" } else { ending },
            low_version: None,
            has_written_iv: false,
            is_i_frames_only: facts.is_i_frames_only,
            links_ranges: !facts.is_i_frames_only,
            has_map: false,
            rendition: facts.is_low_latency.then(|| RenditionTag::of(rewrite.rendition)),
            leaves_clear: rewrite.subtitles == Subtitles::Clear && is_web_vtt(playlist),
            variables: Variables::default(),
            msn: facts.media_sequence,
            encryption: Encryption::Clear,
            is_encryption_unknown: false,
            last_range: LastRange::default(),
            last_part_range: LastRange::default(),
            has_part_ranges: false,
            in_force: InForce::Nothing,
            out: String::with_capacity(playlist.lines.len() * 96),
        }
    }

    pub(super) fn run(mut self) -> Result<String, PlaylistError> {
        if self.playlist.byte_order_mark {
            self.out.push('\u{feff}');
        }
        // Lines since the last segment: they belong to the next one.
        let mut pending: Vec<Numbered<'p>> = Vec::new();
        for (number, line) in (1..).zip(&self.playlist.lines) {
            self.define(line).map_err(|problem| problem.at(number))?;
            match (line.content, line.tag_name()) {
                (Content::Uri, _) => {
                    self.segment(std::mem::take(&mut pending), (number, line))?;
                    self.msn = self.msn.plus(1);
                }
                (_, Some("-X-SKIP")) => {
                    self.rest(std::mem::take(&mut pending))?;
                    self.skip(line).map_err(|problem| problem.at(number))?;
                }
                _ => pending.push((number, line)),
            }
            if number == 1 && !has_version(self.playlist) {
                self.rest(std::mem::take(&mut pending))?;
                self.low_version = Some((self.out.len()..self.out.len(), self.ending));
            }
        }
        self.rest(pending)?;
        self.raise_version();
        Ok(self.out)
    }

    /// Takes in what a line defines, and refuses what refers to something that is not defined.
    fn define(&mut self, line: &Line<'p>) -> Result<(), Problem> {
        match line.content {
            Content::Tag(tag) if tag.name() == "-X-DEFINE" => {
                self.variables.define(tag, self.around.variables)
            }
            _ => self.variables.check(line),
        }
    }

    /// A segment, with the lines that belong to it.
    fn segment(
        &mut self,
        lines: Vec<Numbered<'p>>,
        (number, uri): Numbered<'p>,
    ) -> Result<(), PlaylistError> {
        let named = |name: &str| lines.iter().rposition(|(_, line)| line.tag_name() == Some(name));
        // D22 §4.4.4.7: nobody fetches a gap's segment, so there is nothing to link or to decrypt.
        let is_gap = named("-X-GAP").is_some();
        // What an EXT-X-MAP or EXT-X-KEY in between puts in force is not what the segment needs.
        let settled = named("-X-MAP").max(named("-X-KEY"));
        let encryption = self.encryption_behind(&lines)?;
        self.links_ranges = !self.is_i_frames_only || self.seals_i_frames_apart(encryption);
        // Of a gap too: what follows it within a file follows its range.
        let range = self.range_of(&lines, uri.text)?;
        let ready = if is_gap {
            None
        } else {
            let has_map = self.has_map || named("-X-MAP").is_some();
            let target =
                self.target(encryption, range, has_map).and_then(|target| self.ready(uri.text, &target));
            Some(target.map_err(|problem| problem.at(number))?)
        };
        for (at, (number, line)) in lines.iter().enumerate() {
            let is_inf = line.tag_name() == Some("INF");
            if let Some(ready) = ready.as_ref().filter(|_| is_inf && settled.is_none_or(|last| last < at)) {
                self.put_in_force(ready);
            }
            self.tag_line((*number, line))?;
        }
        match ready {
            Some(ready) => {
                self.put_in_force(&ready);
                self.out.push_str(&ready.uri);
                self.out.push_str(uri.ending);
            }
            None => self.copy(uri),
        }
        Ok(())
    }

    /// Lines without a segment behind them: the playlist's head and tail.
    fn rest(&mut self, lines: Vec<Numbered<'p>>) -> Result<(), PlaylistError> {
        lines.into_iter().try_for_each(|line| self.tag_line(line))
    }

    fn tag_line(&mut self, (number, line): Numbered<'p>) -> Result<(), PlaylistError> {
        match line.tag_name() {
            Some("-X-MAP") => self.map(line),
            Some("-X-KEY") => self.origins_key(line),
            Some("-X-VERSION") => self.version(line),
            // The range is in the link.
            Some("-X-BYTERANGE") if self.links_ranges => Ok(()),
            Some("-X-PART") => self.part(line),
            Some("-X-PRELOAD-HINT") => self.hint(line),
            Some("-X-RENDITION-REPORT") => self.report(line),
            _ => {
                self.copy(line);
                Ok(())
            }
        }
        .map_err(|problem| problem.at(number))
    }

    /// How the origin has encrypted what stands behind these lines.
    fn encryption_behind(&self, lines: &[Numbered<'p>]) -> Result<Encryption<'p>, PlaylistError> {
        let key = lines.iter().rev().find(|(_, line)| line.tag_name() == Some("-X-KEY"));
        let Some((number, Line { content: Content::Tag(tag), .. })) = key else {
            return self
                .known_encryption()
                .map_err(|problem| problem.at(lines.first().map_or(1, |(number, _)| *number)));
        };
        let behind = Attributes::of(*tag).and_then(|key| Encryption::behind(&key, self.around.on_encrypted));
        behind.map_err(|problem| problem.at(*number))
    }

    /// Whether the ranges of an I-frame playlist are segments of their own. Into CBC players reach by ranges (D22
    /// §6.3.6), but of what is sealed by AES-256-GCM nothing can be opened but the whole.
    fn seals_i_frames_apart(&self, encryption: Encryption<'_>) -> bool {
        let key = (self.rewrite.key_at)(self.msn);
        encryption != Encryption::Kept && key.is_some_and(|key| key.cipher.method == KeyMethod::Aes256Gcm)
    }

    /// What the present segment's URI leads to.
    fn target(
        &self,
        encryption: Encryption<'p>,
        range: Option<ByteRange>,
        has_map: bool,
    ) -> Result<Target<'p>, Problem> {
        if !self.is_i_frames_only {
            return Ok(Target { place: self.place(), range, encryption, msn: Some(self.msn) });
        }
        if range.is_none() {
            // One file has one IV, whatever the numbers of its entries.
            return Ok(Target { place: Place::IFrames, range, encryption, msn: None });
        }
        if matches!(encryption, Encryption::Rekeyed { .. }) {
            let why = "I-frames within one file, for a stream under AES-256-GCM".into();
            return Err(Problem::NotRekeyable { why });
        }
        if !has_map {
            // D22 §4.4.3.6: then the head of the file is needed to read its frames, and it cannot be sealed apart.
            let why =
                "AES-256-GCM cannot encrypt ranges of files whose initialization no EXT-X-MAP names".into();
            return Err(Problem::BadTag { tag: "EXT-X-I-FRAMES-ONLY".into(), why });
        }
        Ok(Target { place: Place::Segment(self.msn), range, encryption, msn: Some(self.msn) })
    }

    fn known_encryption(&self) -> Result<Encryption<'p>, Problem> {
        if self.is_encryption_unknown { Err(Problem::UnknownEncryption) } else { Ok(self.encryption) }
    }

    /// The range that the last EXT-X-BYTERANGE of these lines says, where it goes into the link. Those of an I-frame
    /// playlist stay: they lie in a file that is encrypted whole (D22 §6.3.6).
    fn range_of(&mut self, lines: &[Numbered<'p>], uri: &'p str) -> Result<Option<ByteRange>, PlaylistError> {
        let tag = lines.iter().rev().find(|(_, line)| line.tag_name() == Some("-X-BYTERANGE"));
        match tag {
            Some((number, Line { content: Content::Tag(tag), .. })) if self.links_ranges => {
                let range = self.last_range.read((&tag_name(tag), value_text(tag)), uri, None);
                range.map(Some).map_err(|problem| problem.at(*number))
            }
            _ => {
                self.last_range.forget();
                Ok(None)
            }
        }
    }

    /// The place of the present segment, and of its parts.
    fn place(&self) -> Place {
        match self.rendition {
            _ if self.is_i_frames_only => Place::IFrames,
            Some(rendition) => Place::LowLatency { msn: self.msn, rendition },
            None => Place::Segment(self.msn),
        }
    }

    /// A link, and what must be in force where it stands.
    fn ready(&self, uri: &str, target: &Target<'p>) -> Result<Ready<'a>, Problem> {
        let uri = self.variables.substitute(uri)?;
        let key_uri = self.key_uri(target.encryption)?;
        if target.encryption == Encryption::Kept {
            let target = Target { place: Place::Clear, ..*target };
            return Ok(Ready { uri: self.around.clear(&uri, &target, None)?, needs: Needs::Origins });
        }
        if self.leaves_clear || target.place == Place::Clear {
            let target = Target { place: Place::Clear, ..*target };
            return Ok(Ready {
                uri: self.around.clear(&uri, &target, key_uri.as_deref())?,
                needs: Needs::Nothing,
            });
        }
        let key = self.key_of(target)?;
        let (iv, uri) = self.around.keyed(&uri, target, key_uri.as_deref(), &key)?;
        Ok(Ready { uri, needs: Needs::Key(key, iv) })
    }

    /// The content key of a target. An init section behind the last segment is that of the next one, which may not
    /// have a key yet.
    fn key_of(&self, target: &Target<'_>) -> Result<PeriodKey<'a>, Problem> {
        let key_at = self.rewrite.key_at;
        match target.place {
            Place::Init => {
                key_at(self.msn).or_else(|| key_at(self.msn.minus(1))).ok_or(Problem::NoKeyForInit)
            }
            _ => key_at(self.msn).ok_or(Problem::NoKey { msn: self.msn.0 }),
        }
    }

    fn key_uri(&self, encryption: Encryption<'p>) -> Result<Option<String>, Problem> {
        match encryption {
            Encryption::Rekeyed { uri, .. } => Ok(Some(self.variables.substitute(uri)?.into_owned())),
            Encryption::Clear | Encryption::Kept => Ok(None),
        }
    }

    /// Writes the EXT-X-KEY that is called for, if another one is in force.
    fn put_in_force(&mut self, ready: &Ready<'_>) {
        match &ready.needs {
            Needs::Origins => {}
            Needs::Nothing => self.clear(),
            Needs::Key(key, iv) => {
                let wanted = InForce::Ours { id: key.cipher.id, iv: *iv };
                if self.in_force == wanted {
                    return;
                }
                // A KEY replaces those of the same KEYFORMAT only (D22 §4.4.4.4), and the origin's may have another.
                if self.in_force == InForce::Origins {
                    self.clear();
                }
                let line = self.key_line(key, *iv);
                self.line(&line);
                self.has_written_iv |= iv.is_some();
                self.in_force = wanted;
            }
        }
    }

    /// Ends whatever KEY may be in force.
    fn clear(&mut self) {
        if self.in_force != InForce::Nothing {
            let none = Key::builder().with_method(Method::None).finish();
            self.line(&String::from_utf8_lossy(none.into_inner().value()));
            self.in_force = InForce::Nothing;
        }
    }

    fn key_line(&self, key: &PeriodKey<'_>, iv: Option<Iv>) -> String {
        let uri = format!("{}{}", self.around.key_uri_base, key.cipher.id);
        let tag = Key::builder().with_method(key.cipher.method.name()).with_uri(uri);
        let tag = match iv {
            Some(iv) => tag.with_iv(iv.to_attribute()).finish(),
            None => tag.finish(),
        };
        String::from_utf8_lossy(tag.into_inner().value()).into_owned()
    }

    /// An init section: linked, and under a KEY of its own or under none.
    fn map(&mut self, line: &'p Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let attributes = Attributes::of(tag)?;
        let uri = attributes.required("URI")?;
        let range = match attributes.quoted("BYTERANGE") {
            // D22 §4.4.4.5; without an offset it is the head of the file.
            Some(text) => Some(LastRange::default().read((&tag_name(&tag), text), uri, Some(0))?),
            None => None,
        };
        self.has_map = true;
        let place = if self.rewrite.encrypt_init_sections { Place::Init } else { Place::Clear };
        let target = Target { place, range, encryption: self.known_encryption()?, msn: None };
        let ready = self.ready(uri, &target)?;
        self.put_in_force(&ready);
        let mut edits = Edits::of(line.text);
        edits.replace(uri, ready.uri);
        edits.remove(&attributes, "BYTERANGE");
        self.edited(edits, line);
        Ok(())
    }

    /// An EXT-X-KEY of the origin. What is in force is ours to say, but for what is left as the origin encrypted it.
    fn origins_key(&mut self, line: &'p Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let attributes = Attributes::of(tag)?;
        let behind = Encryption::behind(&attributes, self.around.on_encrypted)?;
        if behind == Encryption::Kept {
            if self.encryption != Encryption::Kept {
                self.clear();
            }
            let mut edits = Edits::of(line.text);
            if let Some(uri) = attributes.quoted("URI") {
                let plain = self.variables.substitute(uri)?;
                // Elsewhere it is somebody else's: a licence server's, or a scheme of a DRM.
                if self.around.leads_to_an_origin(&plain) {
                    let target =
                        Target { place: Place::OriginKey, range: None, encryption: behind, msn: None };
                    edits.replace(uri, self.around.clear(&plain, &target, None)?);
                }
            }
            self.edited(edits, line);
            self.in_force = InForce::Origins;
        }
        self.encryption = behind;
        self.is_encryption_unknown = false;
        Ok(())
    }

    fn version(&mut self, line: &Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let start = self.out.len();
        self.copy(line);
        if decimal(&tag)? < version::WITH_IV {
            self.low_version = Some((start..start + line.text.len(), ""));
        }
        Ok(())
    }

    /// Only now is it known whether an IV was written: one of GCM is not, nor is that of clear subtitles.
    fn raise_version(&mut self) {
        if let Some((place, ending)) = self.low_version.take().filter(|_| self.has_written_iv) {
            self.out.replace_range(place, &(version::line_for(self.playlist) + ending));
        }
    }

    fn line(&mut self, text: &str) {
        self.out.push_str(text);
        self.out.push_str(self.ending);
    }

    fn copy(&mut self, line: &Line<'_>) {
        self.out.push_str(line.text);
        self.out.push_str(line.ending);
    }

    fn edited(&mut self, edits: Edits<'_>, line: &Line<'_>) {
        self.out.push_str(&edits.apply());
        self.out.push_str(line.ending);
    }
}

/// A link, and the EXT-X-KEY under which it must stand.
struct Ready<'a> {
    uri: String,
    needs: Needs<'a>,
}

enum Needs<'a> {
    Key(PeriodKey<'a>, Option<Iv>),
    /// No KEY, or METHOD=NONE.
    Nothing,
    /// Those that the origin has written.
    Origins,
}

fn has_version(playlist: &Playlist<'_>) -> bool {
    playlist.lines.iter().any(|line| line.tag_name() == Some("-X-VERSION"))
}

/// Whether all segments are WebVTT (D22 §3.1.4), by the ends of their paths.
fn is_web_vtt(playlist: &Playlist<'_>) -> bool {
    let mut uris = playlist.lines.iter().filter(|line| line.content == Content::Uri).peekable();
    let is_web_vtt = |line: &Line<'_>| {
        let path = line.text.split(['?', '#']).next().unwrap_or_default().to_ascii_lowercase();
        path.ends_with(".vtt") || path.ends_with(".webvtt")
    };
    uris.peek().is_some() && uris.all(is_web_vtt)
}
