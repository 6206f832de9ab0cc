//! The tags of Low-Latency HLS: parts, hints, reports and what a delta update leaves out.
//!
//! Apart from `writer.rs` only for its length; what is in force, and which place a part has, is kept there.

use super::{InForce, Writer};
use crate::hls::attributes::{Attributes, Edits, tag_name};
use crate::hls::byte_range::LastRange;
use crate::hls::error::Problem;
use crate::hls::linker::Target;
use crate::hls::multivariant::playlist_uri;
use crate::hls::playlist::{Content, Line};
use crate::keys::{OnEncrypted, Place};

impl<'p> Writer<'p, '_, '_> {
    /// D22 §4.4.5.2: the segments that are left out count; of what applied to them, nothing is known.
    pub(super) fn skip(&mut self, line: &Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let skipped = Attributes::of(tag)?.decimal("SKIPPED-SEGMENTS")?.unwrap_or_default();
        self.msn = self.msn.plus(skipped);
        self.in_force = InForce::Unknown;
        // Under `reject` the whole playlist, which players have seen before, had no KEY.
        self.is_encryption_unknown = self.around.on_encrypted != OnEncrypted::Reject;
        self.last_range.forget();
        self.copy(line);
        Ok(())
    }

    /// A Partial Segment: its parent's KEY and IV, a chain of its own. The specification says of parts that their
    /// KEY stands before the first of them (D22 §4.4.4.9); that each is a chain is how players read it.
    pub(super) fn part(&mut self, line: &'p Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let attributes = Attributes::of(tag)?;
        let uri = attributes.required("URI")?;
        let range = match attributes.quoted("BYTERANGE") {
            Some(text) => {
                self.has_part_ranges = true;
                Some(self.last_part_range.read((&tag_name(&tag), text), uri, Some(0))?)
            }
            None => None,
        };
        let target =
            Target { place: self.place(), range, encryption: self.known_encryption()?, msn: Some(self.msn) };
        let ready = self.ready(uri, &target);
        let mut edits = Edits::of(line.text);
        if attributes.unquoted("GAP") == Some("YES") {
            // Nobody fetches it, so its URI may lead anywhere; but the KEY of its parent stands before all parts.
            if let Ok(ready) = ready {
                self.put_in_force(&ready);
            }
        } else {
            let ready = ready?;
            self.put_in_force(&ready);
            edits.replace(uri, ready.uri);
        }
        edits.remove(&attributes, "BYTERANGE");
        self.edited(edits, line);
        Ok(())
    }

    /// A hint at a part or an init section that is not there yet: the link that it will have (D22 §4.4.5.3 wants the
    /// URIs to match). One that begins within a file and does not say where it ends has no link: the range of the
    /// part that follows is not known yet. Such a hint is left out; players wait for the playlist instead.
    pub(super) fn hint(&mut self, line: &'p Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let attributes = Attributes::of(tag)?;
        let uri = attributes.required("URI")?;
        let place = match attributes.unquoted("TYPE") {
            Some("PART") => self.place(),
            Some("MAP") if self.rewrite.encrypt_init_sections => Place::Init,
            Some("MAP") => Place::Clear,
            _ => {
                self.copy(line);
                return Ok(());
            }
        };
        let (start, length) =
            (attributes.decimal("BYTERANGE-START")?, attributes.decimal("BYTERANGE-LENGTH")?);
        let range = match (start, length) {
            (_, Some(length)) => {
                let text = format!("{length}@{}", start.unwrap_or_default());
                Some(LastRange::default().read((&tag_name(&tag), &text), uri, None)?)
            }
            (None, None) if !self.has_part_ranges => None,
            (_, None) => return Ok(()),
        };
        let msn = (place == self.place()).then_some(self.msn);
        let target = Target { place, range, encryption: self.known_encryption()?, msn };
        let ready = self.ready(uri, &target)?;
        // Shaka Player decrypts a hinted part by the KEY before the hint, which would be that of the segment before it
        // where the part begins one.
        if msn.is_some() {
            self.put_in_force(&ready);
        }
        let mut edits = Edits::of(line.text);
        edits.replace(uri, ready.uri);
        edits.remove(&attributes, "BYTERANGE-START");
        edits.remove(&attributes, "BYTERANGE-LENGTH");
        self.edited(edits, line);
        Ok(())
    }

    /// Another rendition's playlist (D22 §4.4.5.4).
    pub(super) fn report(&mut self, line: &'p Line<'p>) -> Result<(), Problem> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let attributes = Attributes::of(tag)?;
        let mut edits = Edits::of(line.text);
        if let Some(uri) = attributes.quoted("URI") {
            let plain = self.variables.substitute(uri)?;
            let mapped = playlist_uri(&plain, self.around)?;
            if let Some(by) = mapped.or_else(|| (plain != uri).then(|| plain.into_owned())) {
                edits.replace(uri, by);
            }
        }
        self.edited(edits, line);
        Ok(())
    }
}
