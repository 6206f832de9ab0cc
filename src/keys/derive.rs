//! What a link key gives: the MAC of a segment link and the IV of a segment.
//!
//! Both are HMAC-SHA-256 over a label and the parts of the resource, each behind its length, so every node
//! computes the same bytes with no shared state, and no choice of path or number can make two different
//! resources look alike. Deliberately absent: how a link is spelt (that is `hls`).

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::ids::{KeyId, MediaSequenceNumber};
use super::secret::{DataEncryptionKey, LinkKey};

/// How the IV of a segment comes about. It is always written into the playlist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IvMode {
    /// A derived IV of its own for each segment, with an EXT-X-KEY of its own.
    #[default]
    Segment,
    /// One derived IV a content key, with one EXT-X-KEY a crypto period.
    Period,
    /// The Media Sequence Number, big endian (RFC 8216 §5.2).
    Sequence,
}

impl IvMode {
    const ALL: [IvMode; 3] = [IvMode::Segment, IvMode::Period, IvMode::Sequence];

    /// Its name in the configuration and the store.
    pub fn name(self) -> &'static str {
        match self {
            IvMode::Segment => "segment",
            IvMode::Period => "period",
            IvMode::Sequence => "sequence",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// An AES-CBC initialisation vector. Public: the playlist shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Iv(pub [u8; 16]);

impl Iv {
    /// The Media Sequence Number, big endian (RFC 8216 §5.2).
    pub fn of_sequence(msn: MediaSequenceNumber) -> Self {
        let mut iv = [0; 16];
        iv[8..].copy_from_slice(&msn.0.to_be_bytes());
        Self(iv)
    }

    /// As EXT-X-KEY wants it: `0x` and 32 hex digits. Players drop or refuse shorter ones.
    pub fn to_attribute(self) -> String {
        format!("0x{}", hex::encode_upper(self.0))
    }
}

/// Names a rendition of low-latency HLS in its links, by 48 bits of a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RenditionTag(pub [u8; RenditionTag::LEN]);

impl RenditionTag {
    pub const LEN: usize = 6;

    /// The tag of the rendition that is called so within its stream.
    pub fn of(rendition: &str) -> Self {
        let hash = Sha256::digest(rendition.as_bytes());
        Self(std::array::from_fn(|i| hash[i]))
    }
}

/// Where in its rendition a resource stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    Segment(MediaSequenceNumber),
    /// A segment of a rendition with Partial Segments, or one of its parts. A part has its parent's IV, and is
    /// published before its parent has a URI: so here the IV follows from rendition and number, not from the path.
    LowLatency {
        msn: MediaSequenceNumber,
        rendition: RenditionTag,
    },
    /// A whole file of which the entries of an I-frame playlist are ranges.
    IFrames,
    /// A Media Initialization Section that is encrypted.
    Init,
    /// What is served as the origin has it, as the policy says: a Media Initialization Section or subtitles in
    /// clear, a segment that the origin has encrypted already.
    Clear,
    /// A key of an origin that encrypts by itself, served as the origin has it.
    OriginKey,
    /// Session data, which may change at any time.
    SessionData,
    /// A steering manifest: fetched anew for whoever asks.
    Steering,
}

impl Place {
    /// Whether the stream's DEK signs its link, and no content key: nothing is encrypted.
    pub fn is_served_as_it_is(self) -> bool {
        matches!(self, Place::Clear | Place::OriginKey) || self.is_a_document()
    }

    /// Whether it is neither media nor a key.
    pub fn is_a_document(self) -> bool {
        matches!(self, Place::SessionData | Place::Steering)
    }
}

/// `length` bytes of a file from `offset` on. Never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    pub offset: u64,
    pub length: u64,
}

impl ByteRange {
    /// One past its last byte.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// One thing that can be fetched through a link: which key, which origin, which path, which place.
///
/// `signer` is the ID that the link names: a content key's, or the DEK's for what is served as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resource<'a> {
    pub signer: &'a [u8; KeyId::LEN],
    pub origin: &'a str,
    pub path: &'a str,
    pub place: Place,
    /// `None`: the whole file.
    pub range: Option<ByteRange>,
    /// The origin has encrypted it: it is decrypted first, by a key that the request names.
    pub is_rekeyed: bool,
}

/// A link's proof: HMAC-SHA-256 cut to 96 bits. Compared in constant time.
#[derive(Debug, Clone, Copy)]
pub struct LinkMac(pub [u8; LinkMac::LEN]);

impl LinkMac {
    pub const LEN: usize = 12;
}

impl PartialEq for LinkMac {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl LinkKey {
    /// The MAC that a segment link carries for `resource`.
    pub fn link_mac(&self, resource: &Resource<'_>) -> LinkMac {
        LinkMac(head(self.hmac("link", resource, b"")))
    }

    /// The MAC of an origin's own query that travels behind a link. It covers the resource too, so that a
    /// query cannot be moved to another segment.
    pub fn query_mac(&self, resource: &Resource<'_>, query: &str) -> LinkMac {
        LinkMac(head(self.hmac("query", resource, query.as_bytes())))
    }

    /// The IV of `resource` under `mode`.
    ///
    /// An init section has no Media Sequence Number, and a file of I-frames has several, so their IVs are derived
    /// where a mode would need one; the specification wants that of an init section written either way
    /// (draft-pantos-hls-rfc8216bis-22 §4.4.4.5).
    pub fn iv(&self, mode: IvMode, resource: &Resource<'_>) -> Iv {
        match (mode, resource.place) {
            (IvMode::Sequence, Place::Segment(msn) | Place::LowLatency { msn, .. }) => Iv::of_sequence(msn),
            (IvMode::Period, Place::Segment(_) | Place::LowLatency { .. } | Place::IFrames) => {
                let mut mac = self.keyed("iv of a period");
                part(&mut mac, resource.signer);
                Iv(head(mac))
            }
            (IvMode::Segment, Place::LowLatency { msn, rendition }) => {
                let mut mac = self.keyed("iv of a low-latency segment");
                part(&mut mac, resource.signer);
                part(&mut mac, resource.origin.as_bytes());
                part(&mut mac, &rendition.0);
                part(&mut mac, &msn.0.to_be_bytes());
                Iv(head(mac))
            }
            _ => Iv(head(self.hmac("iv", resource, b""))),
        }
    }

    /// The IV of AES-256-GCM, which stands at the beginning of the segment. It covers the plaintext too: the same
    /// IV must never be used for two plaintexts, and an origin may serve other bytes at the same path.
    pub fn gcm_iv(&self, resource: &Resource<'_>, plaintext: &[u8]) -> Iv {
        Iv(head(self.hmac("iv of GCM", resource, &Sha256::digest(plaintext))))
    }

    /// The MAC of the reference to an origin's key, and the IV with it, that travel behind a link.
    pub fn origin_key_mac(&self, resource: &Resource<'_>, reference: &str, iv: Iv) -> LinkMac {
        LinkMac(head(self.hmac("origin key", resource, &[&iv.0, reference.as_bytes()].concat())))
    }

    fn keyed(&self, label: &str) -> Hmac<Sha256> {
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(self.expose())
            // HMAC takes a key of any length (RFC 2104 §2).
            .expect("HMAC takes a key of any length");
        part(&mut mac, label.as_bytes());
        mac
    }

    fn hmac(&self, label: &str, resource: &Resource<'_>, extra: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.keyed(label);
        part(&mut mac, resource.signer);
        part(&mut mac, resource.origin.as_bytes());
        part(&mut mac, resource.path.as_bytes());
        match resource.place {
            Place::Segment(msn) => part(&mut mac, &msn.0.to_be_bytes()),
            Place::LowLatency { msn, rendition } => {
                part(&mut mac, &[&msn.0.to_be_bytes()[..], &rendition.0].concat());
            }
            Place::IFrames => part(&mut mac, b"iframes"),
            Place::Init => part(&mut mac, b"init"),
            Place::Clear => part(&mut mac, b"clear"),
            Place::OriginKey => part(&mut mac, b"key"),
            Place::SessionData => part(&mut mac, b"data"),
            Place::Steering => part(&mut mac, b"steering"),
        }
        part(&mut mac, extra);
        // Parts that are there or not, behind those that are always there: no two resources look alike.
        if let Some(range) = resource.range {
            part(&mut mac, &[range.offset.to_be_bytes(), range.length.to_be_bytes()].concat());
        }
        if resource.is_rekeyed {
            part(&mut mac, b"rekeyed");
        }
        mac
    }
}

impl DataEncryptionKey {
    /// The link key for init sections that are served in clear.
    ///
    /// Such a section belongs to no crypto period, and its URI should not change when one ends; so its links
    /// are signed by a key that lives as long as the stream's DEK.
    pub fn clear_init_link_key(&self) -> LinkKey {
        let mac = LinkKey::from_bytes(*self.expose()).keyed("link key of clear init sections");
        LinkKey::from_bytes(mac.finalize().into_bytes().into())
    }
}

fn part(mac: &mut Hmac<Sha256>, bytes: &[u8]) {
    mac.update(&(bytes.len() as u32).to_be_bytes());
    mac.update(bytes);
}

/// The first `N` bytes of the MAC (truncation as RFC 2104 §5 allows).
fn head<const N: usize>(mac: Hmac<Sha256>) -> [u8; N] {
    let full = mac.finalize().into_bytes();
    std::array::from_fn(|i| full[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNER: [u8; 16] = [1; 16];

    fn key() -> LinkKey {
        LinkKey::from_bytes([7; 32])
    }

    fn resource(origin: &'static str, path: &'static str, place: Place) -> Resource<'static> {
        Resource { signer: &SIGNER, origin, path, place, range: None, is_rekeyed: false }
    }

    fn low_latency(msn: u64, rendition: &str) -> Place {
        Place::LowLatency { msn: MediaSequenceNumber(msn), rendition: RenditionTag::of(rendition) }
    }

    fn segment(msn: u64) -> Place {
        Place::Segment(MediaSequenceNumber(msn))
    }

    #[test]
    fn every_part_of_a_resource_changes_its_mac_and_its_iv() {
        let base = resource("a", "/live/1.ts", segment(1));
        let others = [
            resource("b", "/live/1.ts", segment(1)),
            resource("a", "/live/2.ts", segment(1)),
            resource("a", "/live/1.ts", segment(2)),
            resource("a", "/live/1.ts", Place::Init),
            resource("a", "/live/1.ts", Place::Clear),
            resource("a", "/live/1.ts", Place::OriginKey),
            resource("a", "/live/1.ts", Place::IFrames),
            resource("a", "/live/1.ts", low_latency(1, "v.m3u8")),
            resource("a", "/live/1.ts", low_latency(1, "w.m3u8")),
            resource("a/", "live/1.ts", segment(1)),
            Resource { signer: &[2; 16], ..base },
            Resource { range: Some(ByteRange { offset: 0, length: 1 }), ..base },
            Resource { range: Some(ByteRange { offset: 1, length: 0 }), ..base },
            Resource { is_rekeyed: true, ..base },
        ];
        for other in others {
            assert_ne!(key().link_mac(&base), key().link_mac(&other), "{other:?}");
            assert_ne!(key().iv(IvMode::Segment, &base), key().iv(IvMode::Segment, &other));
        }
    }

    #[test]
    fn a_query_is_bound_to_its_segment() {
        let (one, two) = (resource("a", "/1.ts", segment(1)), resource("a", "/2.ts", segment(2)));
        assert_eq!(key().query_mac(&one, "sig=x"), key().query_mac(&one, "sig=x"));
        assert_ne!(key().query_mac(&one, "sig=x"), key().query_mac(&one, "sig=y"));
        assert_ne!(key().query_mac(&one, "sig=x"), key().query_mac(&two, "sig=x"));
        assert_ne!(key().query_mac(&one, ""), key().link_mac(&one));
    }

    #[test]
    fn sequence_mode_gives_the_msn_big_endian() {
        let iv = key().iv(IvMode::Sequence, &resource("a", "/1.ts", segment(0x0102)));
        assert_eq!(iv.to_attribute(), "0x00000000000000000000000000000102");
    }

    #[test]
    fn period_mode_gives_one_iv_a_key() {
        let one = key().iv(IvMode::Period, &resource("a", "/1.ts", segment(1)));
        let two = key().iv(IvMode::Period, &resource("a", "/2.ts", segment(2)));
        assert_eq!(one, two);
        let other_key = Resource { signer: &[2; 16], ..resource("a", "/1.ts", segment(1)) };
        assert_ne!(one, key().iv(IvMode::Period, &other_key));
    }

    #[test]
    fn a_part_has_the_iv_of_its_parent_and_no_other_rendition_has_it() {
        let iv = |path, place| key().iv(IvMode::Segment, &resource("a", path, place));
        let parent = iv("/7.m4s", low_latency(7, "v.m3u8"));
        assert_eq!(iv("/7.1.m4s", low_latency(7, "v.m3u8")), parent);
        assert_ne!(iv("/7.m4s", low_latency(8, "v.m3u8")), parent);
        assert_ne!(iv("/7.m4s", low_latency(7, "w.m3u8")), parent);
    }

    #[test]
    fn the_iv_of_gcm_is_another_one_for_another_plaintext() {
        let base = resource("a", "/1.ts", segment(1));
        assert_eq!(key().gcm_iv(&base, b"one"), key().gcm_iv(&base, b"one"));
        assert_ne!(key().gcm_iv(&base, b"one"), key().gcm_iv(&base, b"two"));
        assert_ne!(key().gcm_iv(&base, b"one"), key().gcm_iv(&resource("a", "/2.ts", segment(1)), b"one"));
    }

    #[test]
    fn an_init_section_has_a_derived_iv_in_every_mode() {
        let init = resource("a", "/init.mp4", Place::Init);
        let derived = key().iv(IvMode::Segment, &init);
        assert_eq!(key().iv(IvMode::Sequence, &init), derived);
        assert_eq!(key().iv(IvMode::Period, &init), derived);
    }

    #[test]
    fn the_derivation_is_pinned() {
        // Links and IVs of published playlists depend on it: a change here breaks running streams.
        let base = resource("main", "/live/ch1/seg_812.ts", segment(812));
        assert_eq!(hex::encode(key().link_mac(&base).0), "b65037a4b22d2d545e66d092");
        assert_eq!(key().iv(IvMode::Segment, &base).to_attribute(), "0x0CB7BF4EA145F25EA3B869B584B549E1");
    }
}
