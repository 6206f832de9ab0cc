//! URIs into links.

use super::encrypted::Encryption;
use super::error::Problem;
use super::link::{Link, LinkedPath, OriginKey, SUCCESSOR_PARAM, write_origin_key, write_origin_query};
use super::media::PeriodKey;
use super::mounts::{Mounts, Place as OriginPath, canonical_path};
use super::variables::VariableSources;
use crate::keys::{
    ByteRange, DekId, Iv, KeyId, KeyMethod, LinkKey, MediaSequenceNumber, OnEncrypted, Place, Resource,
};

/// What a URI leads to, besides the URI.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'p> {
    pub(super) place: Place,
    pub(super) range: Option<ByteRange>,
    pub(super) encryption: Encryption<'p>,
    /// The Media Sequence Number, where it has one.
    pub(super) msn: Option<MediaSequenceNumber>,
}

impl Target<'_> {
    /// The whole of a file, as the origin has it.
    pub(super) fn as_it_is(place: Place) -> Self {
        Self { place, range: None, encryption: Encryption::Clear, msn: None }
    }
}

/// What the rewriting of any playlist depends on besides its text.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    pub mounts: &'a Mounts,
    /// Where the playlist itself lies.
    pub from: &'a OriginPath<'a>,
    /// Whether a place belongs to a stream, so that the shield would never pass its plaintext through.
    pub is_protected: &'a dyn Fn(&OriginPath<'_>) -> bool,
    pub on_encrypted: OnEncrypted,
    pub variables: VariableSources<'a>,
    /// What stands before the key ID in key URIs, such as `/api/hls/keys/`.
    pub key_uri_base: &'a str,
    /// Signs the links of what is served as the origin has it.
    pub clear: (DekId, &'a LinkKey),
}

impl Surroundings<'_> {
    /// The URI of something encrypted with its link, and its IV where the method has one to be written.
    pub(super) fn keyed(
        &self,
        uri: &str,
        target: &Target<'_>,
        encryption_key: Option<&str>,
        key: &PeriodKey<'_>,
    ) -> Result<(Option<Iv>, String), Problem> {
        let ((signer, link), cipher) = (key.signer, key.cipher);
        let (source, mut linked) = self.linked(uri, target, encryption_key, signer.as_bytes(), link)?;
        if let Some(ordinal) = key.successor {
            add_param(&mut linked, &format!("{SUCCESSOR_PARAM}={ordinal}"));
        }
        // D22 §4.4.4.4: with GCM the IV stands in the segment, and must not stand here.
        let iv = (cipher.method != KeyMethod::Aes256Gcm)
            .then(|| cipher.link.iv(cipher.iv_mode, &source.resource(cipher.id.as_bytes(), target)));
        Ok((iv, linked))
    }

    /// The URI of something that is served as the origin has it, or only decrypted, with its link.
    pub(super) fn clear(
        &self,
        uri: &str,
        target: &Target<'_>,
        encryption_key: Option<&str>,
    ) -> Result<String, Problem> {
        let (dek, link) = self.clear;
        Ok(self.linked(uri, target, encryption_key, dek.as_bytes(), link)?.1)
    }

    /// The URI with its link, and where it leads.
    fn linked(
        &self,
        uri: &str,
        target: &Target<'_>,
        encryption_key: Option<&str>,
        signer: &[u8; KeyId::LEN],
        link_key: &LinkKey,
    ) -> Result<(Source, String), Problem> {
        let bad = |why: String| Problem::BadUri { uri: shown(uri), why };
        // What is served as it is has no plaintext to protect, wherever it lies.
        let to = match target.place.is_served_as_it_is() {
            true => self.allowed(uri)?,
            false => self.protected(uri)?,
        };
        if to.path.ends_with('/') {
            return Err(bad("it names a directory".into()));
        }
        // The request may come in another spelling than the playlist's.
        let path = canonical_path(&to.path).map_err(|error| bad(error.to_string()))?;
        let source = Source { origin: to.mount.origin.clone(), path };
        let resource = source.resource(signer, target);
        let link = Link::to_resource(&resource, link_key);
        let reference = uri.split(['?', '#']).next().unwrap_or_default();
        let mut linked = if is_relative(reference) && is_plain(reference) {
            LinkedPath::insert(reference, &link)
        } else {
            LinkedPath::insert(&to.mount.shield_path(&to.path), &link)
        };
        if let Some(query) = &to.query {
            add_param(&mut linked, &write_origin_query(query, &resource, link_key));
        }
        if let (Encryption::Rekeyed { iv, .. }, Some(key_uri)) = (target.encryption, encryption_key) {
            let reference = self.reference(key_uri)?;
            let iv = Encryption::iv_of(iv, target.msn)?;
            add_param(&mut linked, &write_origin_key(&OriginKey { reference, iv }, &resource, link_key));
        }
        Ok((source, linked))
    }

    /// Where a URI leads, if that is an allowed origin.
    fn allowed(&self, uri: &str) -> Result<OriginPath<'_>, Problem> {
        let bad = |why: String| Problem::BadUri { uri: shown(uri), why };
        self.mounts.resolve(self.from, uri).map_err(|error| bad(error.to_string()))
    }

    /// As [`Self::allowed`], if the shield does not pass through what is there.
    fn protected(&self, uri: &str) -> Result<OriginPath<'_>, Problem> {
        let to = self.allowed(uri)?;
        if to.mount.pass_through && !(self.is_protected)(&to) {
            let why = "it lies outside every stream at an origin with pass_through = true, where its plaintext could \
                       be fetched; widen a stream's path_prefix or turn pass_through off"
                .into();
            return Err(Problem::BadUri { uri: shown(uri), why });
        }
        Ok(to)
    }

    /// A URI as a path of the shield, with its query.
    fn reference(&self, uri: &str) -> Result<String, Problem> {
        let to = self.protected(uri)?;
        let bad = |why: String| Problem::BadUri { uri: shown(uri), why };
        let path = canonical_path(&to.path).map_err(|error| bad(error.to_string()))?;
        let path = to.mount.shield_path(&path);
        Ok(match to.query {
            Some(query) => format!("{path}?{query}"),
            None => path,
        })
    }

    /// Whether a URI leads to an allowed origin. Licence servers and `skd:` URIs do not.
    pub(super) fn leads_to_an_origin(&self, uri: &str) -> bool {
        self.mounts.resolve(self.from, uri).is_ok()
    }
}

/// Where a linked URI leads: what its IV is derived from.
struct Source {
    origin: String,
    path: String,
}

impl Source {
    fn resource<'s>(&'s self, signer: &'s [u8; KeyId::LEN], target: &Target<'_>) -> Resource<'s> {
        Resource {
            signer,
            origin: &self.origin,
            path: &self.path,
            place: target.place,
            range: target.range,
            is_rekeyed: matches!(target.encryption, Encryption::Rekeyed { .. }),
        }
    }
}

fn add_param(uri: &mut String, param: &str) {
    uri.push(if uri.contains('?') { '&' } else { '?' });
    uri.push_str(param);
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
