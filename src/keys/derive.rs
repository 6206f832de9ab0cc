//! What a link key gives: the MAC of a segment link and the IV of a segment.
//!
//! Both are HMAC-SHA-256 over a label and the parts of the resource, each behind its length, so every node
//! computes the same bytes with no shared state, and no choice of path or number can make two different
//! resources look alike. Deliberately absent: how a link is spelt (that is `hls`).

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
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
    /// As EXT-X-KEY wants it: `0x` and 32 hex digits. Players drop or refuse shorter ones.
    pub fn to_attribute(self) -> String {
        format!("0x{}", hex::encode_upper(self.0))
    }
}

/// Where in its rendition a resource stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    Segment(MediaSequenceNumber),
    /// A Media Initialization Section that is encrypted.
    Init,
    /// A Media Initialization Section that is served in clear, as the policy says.
    ClearInit,
}

/// One thing that can be fetched through a link: which key, which origin, which path, which place.
///
/// `signer` is the ID that the link names: a content key's, or for [`Place::ClearInit`] the DEK's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resource<'a> {
    pub signer: &'a [u8; KeyId::LEN],
    pub origin: &'a str,
    pub path: &'a str,
    pub place: Place,
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
    /// An init section has no Media Sequence Number, so its IV is derived in every mode; the specification
    /// wants it written either way (draft-pantos-hls-rfc8216bis-22 §4.4.4.5).
    pub fn iv(&self, mode: IvMode, resource: &Resource<'_>) -> Iv {
        match (mode, resource.place) {
            (IvMode::Sequence, Place::Segment(msn)) => {
                let mut iv = [0; 16];
                iv[8..].copy_from_slice(&msn.0.to_be_bytes());
                Iv(iv)
            }
            (IvMode::Period, Place::Segment(_)) => {
                let mut mac = self.keyed("iv of a period");
                part(&mut mac, resource.signer);
                Iv(head(mac))
            }
            _ => Iv(head(self.hmac("iv", resource, b""))),
        }
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
            Place::Init => part(&mut mac, b"init"),
            Place::ClearInit => part(&mut mac, b"clear"),
        }
        part(&mut mac, extra);
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
        Resource { signer: &SIGNER, origin, path, place }
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
            resource("a", "/live/1.ts", Place::ClearInit),
            resource("a/", "live/1.ts", segment(1)),
            Resource { signer: &[2; 16], ..base },
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
