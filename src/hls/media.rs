//! A Media Playlist as the shield publishes it: keys named, segments linked, all else as it was.
//!
//! Each segment gets an EXT-X-KEY before its EXTINF and a link in its URI. Init sections stand in clear by
//! default: before the first KEY, and later between a KEY of METHOD=NONE and the next one, because a KEY
//! applies to every EXT-X-MAP behind it (D22 §4.4.4.4). When they are to be encrypted, each has a KEY with
//! an IV of its own before it (D22 §4.4.4.5 wants the IV written).
//!
//! What cannot be rewritten rightly is refused with its line: byte ranges, parts, I-frame playlists,
//! variables and playlists that are encrypted already. A refusal is a clean error; a guess would be ciphertext
//! that no player can decrypt, or plaintext that slips by.

use quick_m3u8::tag::IntoInnerTag;
use quick_m3u8::tag::hls::{Key, Method, Version};

use super::attributes::Attributes;
use super::error::{PlaylistError, Problem};
use super::link::{Link, LinkedPath, SUCCESSOR_PARAM, write_origin_query};
use super::mounts::{Mounts, Place as OriginPath, canonical_path};
use super::playlist::{Content, Line, Playlist, decimal};
use crate::keys::{
    DekId, Iv, IvMode, KeyId, KeyMethod, LinkKey, MediaSequenceNumber, Ordinal, Place, Resource,
};

/// An EXT-X-KEY with an IV needs at least this version (D22 §8).
const VERSION_WITH_IV: u64 = 2;

/// The content key that covers a segment, as far as a playlist shows it.
#[derive(Debug, Clone, Copy)]
pub struct PeriodKey<'a> {
    /// Whose ID and link key the links of the period bear, for good: a published path never changes.
    pub signer: (KeyId, &'a LinkKey),
    /// What the period's segments are encrypted under now.
    pub cipher: CipherKey<'a>,
    /// The ordinal of `cipher` where it took the place of a revoked signer.
    pub successor: Option<Ordinal>,
}

/// A content key that a playlist names.
#[derive(Debug, Clone, Copy)]
pub struct CipherKey<'a> {
    pub id: KeyId,
    pub method: KeyMethod,
    pub iv_mode: IvMode,
    pub link: &'a LinkKey,
}

/// Everything besides its text that a Media Playlist's rewriting depends on.
pub struct MediaRewrite<'a> {
    pub mounts: &'a Mounts,
    /// Where the playlist itself lies.
    pub from: &'a OriginPath<'a>,
    /// Whether a place belongs to a stream, so that the shield would never pass its plaintext through.
    pub is_protected: &'a dyn Fn(&OriginPath<'_>) -> bool,
    pub encrypt_init_sections: bool,
    /// What stands before the key ID in key URIs, such as `/api/hls/keys/`.
    pub key_uri_base: &'a str,
    /// Signs the links of init sections that are served in clear.
    pub clear_init: (DekId, &'a LinkKey),
    /// The key that covers a segment; `None` refuses the playlist.
    pub key_at: &'a dyn Fn(MediaSequenceNumber) -> Option<PeriodKey<'a>>,
}

/// Rewrites a Media Playlist.
///
/// # Errors
/// The first line that cannot be rewritten rightly.
pub fn rewrite_media(playlist: &Playlist<'_>, rewrite: &MediaRewrite<'_>) -> Result<String, PlaylistError> {
    let facts = playlist.media_facts()?;
    let mut writer = Writer {
        rewrite,
        ending: playlist.lines.first().map_or("\n", |line| line.ending),
        out: String::with_capacity(playlist.lines.len() * 96),
        in_force: InForce::Nothing,
    };
    if writer.ending.is_empty() {
        writer.ending = "\n";
    }
    if playlist.byte_order_mark {
        writer.out.push('\u{feff}');
    }
    let needs_version = !has_version(playlist) && facts.segments > 0;
    let mut msn = facts.media_sequence;
    // Lines since the last segment: they belong to the next one.
    let mut pending: Vec<(usize, &Line<'_>)> = Vec::new();
    for (number, line) in (1..).zip(&playlist.lines) {
        if line.content == Content::Uri {
            writer.segment(msn, &mut pending, (number, line))?;
            msn = msn.plus(1);
            continue;
        }
        refuse_unsupported(line).map_err(|problem| problem.at(number))?;
        pending.push((number, line));
        if number == 1 && needs_version {
            writer.flush(None, &mut pending)?;
            writer.line(&version_line());
        }
    }
    // An init section behind the last segment is that of the next one, which may not have a key yet.
    let next = (rewrite.key_at)(msn).or_else(|| (rewrite.key_at)(msn.minus(1)));
    writer.flush(next.as_ref(), &mut pending)?;
    Ok(writer.out)
}

/// What EXT-X-KEY is in force for the lines that follow.
#[derive(Debug, Clone, Copy, PartialEq)]
enum InForce {
    /// No KEY yet, or METHOD=NONE: what follows is clear.
    Nothing,
    /// The KEY of an init section.
    Init,
    Period(KeyId),
}

struct Writer<'p, 'r, 'a> {
    rewrite: &'r MediaRewrite<'a>,
    ending: &'p str,
    out: String,
    in_force: InForce,
}

impl Writer<'_, '_, '_> {
    fn line(&mut self, text: &str) {
        self.out.push_str(text);
        self.out.push_str(self.ending);
    }

    fn copy(&mut self, line: &Line<'_>) {
        self.out.push_str(line.text);
        self.out.push_str(line.ending);
    }

    /// Writes lines without a segment of their own to encrypt: the playlist's head and tail, and what stands
    /// before a gap. `key` is for an init section among them.
    fn flush(
        &mut self,
        key: Option<&PeriodKey<'_>>,
        pending: &mut Vec<(usize, &Line<'_>)>,
    ) -> Result<(), PlaylistError> {
        for (number, line) in pending.drain(..) {
            self.tag_line(key, number, line)?;
        }
        Ok(())
    }

    fn tag_line(
        &mut self,
        key: Option<&PeriodKey<'_>>,
        number: usize,
        line: &Line<'_>,
    ) -> Result<(), PlaylistError> {
        match line.tag_name() {
            Some("-X-MAP") => self.map(key, number, line),
            // Only METHOD=NONE gets here: what is in force is ours to say.
            Some("-X-KEY") => Ok(()),
            Some("-X-VERSION") => self.version(number, line),
            _ => {
                self.copy(line);
                Ok(())
            }
        }
    }

    fn segment(
        &mut self,
        msn: MediaSequenceNumber,
        pending: &mut Vec<(usize, &Line<'_>)>,
        (number, uri): (usize, &Line<'_>),
    ) -> Result<(), PlaylistError> {
        let key = (self.rewrite.key_at)(msn).ok_or_else(|| Problem::NoKey { msn: msn.0 }.at(number))?;
        // D22 §4.4.4.7: nobody fetches a gap's segment, so there is nothing to link or to decrypt.
        if pending.iter().any(|(_, line)| line.tag_name() == Some("-X-GAP")) {
            self.flush(Some(&key), pending)?;
            self.copy(uri);
            return Ok(());
        }
        let keyed = self.keyed(uri.text, Place::Segment(msn), &key);
        let (iv, linked) = keyed.map_err(|problem| problem.at(number))?;

        // The KEY goes before EXTINF, and behind the last MAP, which must not fall under it.
        let after_map = pending.iter().rposition(|(_, line)| line.tag_name() == Some("-X-MAP"));
        let before_inf = pending.iter().position(|(_, line)| line.tag_name() == Some("INF"));
        let key_goes_to = after_map.map_or(0, |map| map + 1).max(before_inf.unwrap_or(pending.len()));
        let mut behind = pending.split_off(key_goes_to);
        self.flush(Some(&key), pending)?;
        self.key(&key, iv);
        self.flush(Some(&key), &mut behind)?;
        self.out.push_str(&linked);
        self.out.push_str(uri.ending);
        Ok(())
    }

    /// The EXT-X-KEY of a segment, where one is called for: always, or once a period.
    fn key(&mut self, key: &PeriodKey<'_>, iv: Iv) {
        let now = InForce::Period(key.cipher.id);
        if key.cipher.iv_mode == IvMode::Period && self.in_force == now {
            return;
        }
        self.in_force = now;
        let line = self.key_line(key, iv);
        self.line(&line);
    }

    fn key_line(&self, key: &PeriodKey<'_>, iv: Iv) -> String {
        let key = Key::builder()
            .with_method(key.cipher.method.name())
            .with_uri(format!("{}{}", self.rewrite.key_uri_base, key.cipher.id))
            .with_iv(iv.to_attribute())
            .finish();
        String::from_utf8_lossy(key.into_inner().value()).into_owned()
    }

    /// An init section: linked, and under a KEY of its own or under none.
    fn map(
        &mut self,
        key: Option<&PeriodKey<'_>>,
        number: usize,
        line: &Line<'_>,
    ) -> Result<(), PlaylistError> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        let attributes = Attributes::of(tag).map_err(|problem| problem.at(number))?;
        let missing = || Problem::BadTag { tag: attributes.tag_name(), why: "it has no URI".into() };
        let uri = attributes.quoted("URI").ok_or_else(|| missing().at(number))?;
        let linked = if self.rewrite.encrypt_init_sections {
            self.encrypted_map(key, uri)
        } else {
            self.clear_map(uri)
        };
        let linked = linked.map_err(|problem| problem.at(number))?;
        self.out.push_str(&Attributes::splice(line.text, uri, &linked));
        self.out.push_str(line.ending);
        Ok(())
    }

    fn encrypted_map(&mut self, key: Option<&PeriodKey<'_>>, uri: &str) -> Result<String, Problem> {
        let key = key.ok_or(Problem::NoKeyForInit)?;
        let (iv, linked) = self.keyed(uri, Place::Init, key)?;
        let key_line = self.key_line(key, iv);
        self.line(&key_line);
        // The next segment's IV is another one, so its KEY must be written in every mode.
        self.in_force = InForce::Init;
        Ok(linked)
    }

    fn clear_map(&mut self, uri: &str) -> Result<String, Problem> {
        if self.in_force != InForce::Nothing {
            let none = Key::builder().with_method(Method::None).finish();
            self.line(&String::from_utf8_lossy(none.into_inner().value()));
            self.in_force = InForce::Nothing;
        }
        let (dek, link) = self.rewrite.clear_init;
        Ok(self.linked(uri, Place::ClearInit, dek.as_bytes(), link)?.1)
    }

    /// The URI of something encrypted with its link, and its IV.
    fn keyed(&self, uri: &str, place: Place, key: &PeriodKey<'_>) -> Result<(Iv, String), Problem> {
        let ((signer, link), cipher) = (key.signer, key.cipher);
        let (source, mut linked) = self.linked(uri, place, signer.as_bytes(), link)?;
        if let Some(ordinal) = key.successor {
            let joint = if linked.contains('?') { '&' } else { '?' };
            linked.push_str(&format!("{joint}{SUCCESSOR_PARAM}={ordinal}"));
        }
        Ok((cipher.link.iv(cipher.iv_mode, &source.resource(cipher.id.as_bytes(), place)), linked))
    }

    /// The URI with its link, and where it leads.
    fn linked(
        &self,
        uri: &str,
        place: Place,
        signer: &[u8; KeyId::LEN],
        link_key: &LinkKey,
    ) -> Result<(Source, String), Problem> {
        let bad = |why: String| Problem::BadUri { uri: shown(uri), why };
        let rewrite = self.rewrite;
        let to = rewrite.mounts.resolve(rewrite.from, uri).map_err(|error| bad(error.to_string()))?;
        if to.mount.pass_through && !(rewrite.is_protected)(&to) {
            return Err(bad(
                "it lies outside every stream at an origin with pass_through = true, where its plaintext could be \
                 fetched; widen a stream's path_prefix or turn pass_through off"
                    .into(),
            ));
        }
        if to.path.ends_with('/') {
            return Err(bad("it names a directory".into()));
        }
        // The request may come in another spelling than the playlist's.
        let path = canonical_path(&to.path).map_err(|error| bad(error.to_string()))?;
        let resource = Resource { signer, origin: &to.mount.origin, path: &path, place };
        let link = Link::to_resource(&resource, link_key);
        let reference = uri.split(['?', '#']).next().unwrap_or_default();
        let mut linked = if is_relative(reference) && is_plain(reference) {
            LinkedPath::insert(reference, &link)
        } else {
            LinkedPath::insert(&to.mount.shield_path(&to.path), &link)
        };
        if let Some(query) = &to.query {
            linked.push('?');
            linked.push_str(&write_origin_query(query, &resource, link_key));
        }
        Ok((Source { origin: to.mount.origin.clone(), path }, linked))
    }

    fn version(&mut self, number: usize, line: &Line<'_>) -> Result<(), PlaylistError> {
        let Content::Tag(tag) = line.content else { return Ok(()) };
        if decimal(&tag).map_err(|problem| problem.at(number))? >= VERSION_WITH_IV {
            self.copy(line);
        } else {
            self.out.push_str(&version_line());
            self.out.push_str(line.ending);
        }
        Ok(())
    }
}

/// Where a linked URI leads: what its IV is derived from.
struct Source {
    origin: String,
    path: String,
}

impl Source {
    fn resource<'a>(&'a self, signer: &'a [u8; KeyId::LEN], place: Place) -> Resource<'a> {
        Resource { signer, origin: &self.origin, path: &self.path, place }
    }
}

fn has_version(playlist: &Playlist<'_>) -> bool {
    playlist.lines.iter().any(|line| line.tag_name() == Some("-X-VERSION"))
}

fn version_line() -> String {
    String::from_utf8_lossy(Version::new(VERSION_WITH_IV).into_inner().value()).into_owned()
}

/// A reference without a scheme, an authority or a leading slash.
fn is_relative(reference: &str) -> bool {
    let first = reference.split('/').next().unwrap_or_default();
    !reference.is_empty() && !reference.starts_with('/') && !first.contains(':')
}

/// Whether every player asks for the reference as it stands, without encoding any of it.
fn is_plain(reference: &str) -> bool {
    reference.bytes().all(|b| b.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&b))
}

/// What of a refused URI an error may repeat: no query, which may hold a token.
fn shown(uri: &str) -> String {
    uri.split(['?', '#']).next().unwrap_or_default().chars().take(200).collect()
}

fn refuse_unsupported(line: &Line<'_>) -> Result<(), Problem> {
    let Content::Tag(tag) = line.content else { return Ok(()) };
    let unsupported = |tag| Err(Problem::Unsupported { tag });
    match tag.name() {
        "-X-BYTERANGE" => unsupported("EXT-X-BYTERANGE"),
        "-X-I-FRAMES-ONLY" => unsupported("EXT-X-I-FRAMES-ONLY"),
        "-X-PART" => unsupported("EXT-X-PART"),
        "-X-PRELOAD-HINT" => unsupported("EXT-X-PRELOAD-HINT"),
        "-X-SKIP" => unsupported("EXT-X-SKIP"),
        "-X-DEFINE" => unsupported("EXT-X-DEFINE"),
        "-X-MAP" if Attributes::of(tag)?.has("BYTERANGE") => unsupported("EXT-X-MAP with BYTERANGE"),
        "-X-KEY" => match Attributes::of(tag)?.unquoted("METHOD") {
            Some("NONE") => Ok(()),
            method => Err(Problem::AlreadyEncrypted { method: method.unwrap_or("missing").to_owned() }),
        },
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
