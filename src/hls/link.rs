//! How a segment link is spelt, and read back.
//!
//! `{dir}/~{signer}.{place}.{mac}/{file name}`: one path component before the file name, so that relative
//! resolution, file extensions and caches that drop queries keep working. The signer is the ID of a content
//! key (or, for an init section that is served in clear, of the DEK), the place is a Media Sequence Number,
//! `init` or `clear`, the MAC is base64url. An origin's own query travels behind it as one parameter with a
//! MAC of its own, in characters that no player re-encodes; whatever else stands in the query (CMCD, a
//! viewer's token) is not covered.
//!
//! Deliberately absent: whether a MAC is right. Only who holds the link key can say.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thiserror::Error;

use crate::keys::{KeyId, LinkKey, LinkMac, MediaSequenceNumber, Ordinal, Place, Resource};

/// The query parameter that carries the origin's own query.
pub const ORIGIN_QUERY_PARAM: &str = "_oq";

/// The query parameter that names the ordinal of the key that has taken a revoked one's place: it makes another
/// cache entry of a path that stays what it was.
pub const SUCCESSOR_PARAM: &str = "r";

/// The component that proves that the shield wrote a URI.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    pub signer: [u8; KeyId::LEN],
    pub place: Place,
    pub mac: LinkMac,
}

/// Why a path with a link cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LinkError {
    #[error("the segment link is malformed")]
    Malformed,
    #[error("the origin query behind the segment link is malformed or was changed")]
    BadQuery,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "~{}.", hex::encode(self.signer))?;
        match self.place {
            Place::Segment(msn) => write!(f, "{msn}")?,
            Place::Init => f.write_str("init")?,
            Place::ClearInit => f.write_str("clear")?,
        }
        write!(f, ".{}", URL_SAFE_NO_PAD.encode(self.mac.0))
    }
}

impl Link {
    /// The link to `resource`, signed.
    pub fn to_resource(resource: &Resource<'_>, link_key: &LinkKey) -> Self {
        Self { signer: *resource.signer, place: resource.place, mac: link_key.link_mac(resource) }
    }

    fn parse(component: &str) -> Option<Self> {
        let (signer, rest) = strip_tilde(component)?.split_once('.')?;
        let (place, mac) = rest.split_once('.')?;
        let place = match place {
            "init" => Place::Init,
            "clear" => Place::ClearInit,
            number => {
                let msn: u64 = number.parse().ok()?;
                // One spelling a number: `+7` and `007` would be other cache entries of segment 7.
                (msn.to_string() == number).then_some(Place::Segment(MediaSequenceNumber(msn)))?
            }
        };
        let mac = URL_SAFE_NO_PAD.decode(mac).ok()?.try_into().ok().map(LinkMac)?;
        Some(Self { signer: *signer.parse::<KeyId>().ok()?.as_bytes(), place, mac })
    }
}

/// Some clients write the tilde percent-encoded; RFC 3986 §2.3 makes the two spellings one.
fn strip_tilde(component: &str) -> Option<&str> {
    ["~", "%7E", "%7e"].into_iter().find_map(|tilde| component.strip_prefix(tilde))
}

/// A request path taken apart: the link, and the path that it stands in.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkedPath {
    pub link: Link,
    /// The path without the link's component.
    pub path: String,
}

impl LinkedPath {
    /// Takes a path apart; `None` when it has no link (a directory such as `~bob` is none).
    ///
    /// # Errors
    /// [`LinkError::Malformed`] when it has one that the shield cannot have written.
    pub fn parse(path: &str) -> Result<Option<Self>, LinkError> {
        let Some((before, file)) = path.rsplit_once('/') else { return Ok(None) };
        let Some((dir, component)) = before.rsplit_once('/') else { return Ok(None) };
        let Some(id) = strip_tilde(component).and_then(|rest| rest.split('.').next()) else {
            return Ok(None);
        };
        if id.parse::<KeyId>().is_err() {
            return Ok(None);
        }
        let link = Link::parse(component).ok_or(LinkError::Malformed)?;
        Ok(Some(Self { link, path: format!("{dir}/{file}") }))
    }

    /// Puts `link` before the last component of a path or relative reference.
    pub fn insert(reference: &str, link: &Link) -> String {
        match reference.rsplit_once('/') {
            Some((dir, file)) => format!("{dir}/{link}/{file}"),
            None => format!("{link}/{reference}"),
        }
    }
}

/// The query parameter that carries an origin's own query, with its MAC.
pub(super) fn write_origin_query(query: &str, resource: &Resource<'_>, link_key: &LinkKey) -> String {
    let mac = URL_SAFE_NO_PAD.encode(link_key.query_mac(resource, query).0);
    format!("{ORIGIN_QUERY_PARAM}={}.{mac}", URL_SAFE_NO_PAD.encode(query))
}

impl Link {
    /// The origin's own query out of a request's query; `None` when it carries none.
    ///
    /// # Errors
    /// [`LinkError::BadQuery`] when it was not written by the shield for this resource.
    pub fn read_origin_query(
        query: &str,
        resource: &Resource<'_>,
        link_key: &LinkKey,
    ) -> Result<Option<String>, LinkError> {
        let mut values =
            query.split('&').filter_map(|part| part.strip_prefix(ORIGIN_QUERY_PARAM)?.strip_prefix('='));
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(LinkError::BadQuery);
        }
        let decode = |text| URL_SAFE_NO_PAD.decode(text).map_err(|_| LinkError::BadQuery);
        let (query, mac) = value.split_once('.').ok_or(LinkError::BadQuery)?;
        let query = String::from_utf8(decode(query)?).map_err(|_| LinkError::BadQuery)?;
        let mac: [u8; LinkMac::LEN] = decode(mac)?.try_into().map_err(|_| LinkError::BadQuery)?;
        if link_key.query_mac(resource, &query) != LinkMac(mac) {
            return Err(LinkError::BadQuery);
        }
        Ok(Some(query))
    }
}

/// The ordinal that a request's query names as a revoked key's successor. What is no ordinal names none.
pub fn read_successor(query: &str) -> Option<Ordinal> {
    let value = query.split('&').find_map(|part| part.strip_prefix(SUCCESSOR_PARAM)?.strip_prefix('='))?;
    value.parse().ok().map(Ordinal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNER: [u8; 16] = [0xab; 16];

    fn resource(place: Place) -> Resource<'static> {
        Resource { signer: &SIGNER, origin: "main", path: "/live/ch1/seg_812.ts", place }
    }

    fn key() -> LinkKey {
        LinkKey::from_bytes([7; 32])
    }

    #[test]
    fn a_link_reads_back_as_written() {
        for place in [Place::Segment(MediaSequenceNumber(812)), Place::Init, Place::ClearInit] {
            let link = Link::to_resource(&resource(place), &key());
            let path = LinkedPath::insert("/live/ch1/seg_812.ts", &link);
            let read = LinkedPath::parse(&path).unwrap().unwrap();
            assert_eq!(read, LinkedPath { link, path: "/live/ch1/seg_812.ts".into() });
            assert_eq!(LinkedPath::parse(&path.replace('~', "%7E")).unwrap(), Some(read));
        }
    }

    #[test]
    fn a_link_keeps_a_relative_reference_relative() {
        let link = Link::to_resource(&resource(Place::Init), &key());
        assert_eq!(LinkedPath::insert("seg.ts", &link), format!("{link}/seg.ts"));
        assert_eq!(LinkedPath::insert("../v/seg.ts", &link), format!("../v/{link}/seg.ts"));
    }

    #[test]
    fn an_ordinary_path_has_no_link() {
        for path in ["/live/seg.ts", "/~bob/seg.ts", "seg.ts", "/", "/~abc.1.x/seg.ts"] {
            assert_eq!(LinkedPath::parse(path), Ok(None), "{path}");
        }
    }

    #[test]
    fn what_the_shield_cannot_have_written_is_malformed() {
        let id = "ab".repeat(16);
        let mac = "AAAAAAAAAAAAAAAA";
        for bad in [
            format!("~{id}"),
            format!("~{id}.1"),
            format!("~{id}.+1.{mac}"),
            format!("~{id}.01.{mac}"),
            format!("~{id}.-1.{mac}"),
            format!("~{id}.99999999999999999999.{mac}"),
            format!("~{id}.1.AAAA"),
            format!("~{id}.1.{mac}.x"),
            format!("~{id}.other.{mac}"),
        ] {
            let parsed = LinkedPath::parse(&format!("/live/{bad}/seg.ts"));
            assert_eq!(parsed, Err(LinkError::Malformed), "{bad}");
        }
    }

    #[test]
    fn an_origin_query_survives_what_players_put_around_it() {
        let place = Place::Segment(MediaSequenceNumber(812));
        let written = write_origin_query("sig=a/b+c&e=1", &resource(place), &key());
        for query in [
            written.clone(),
            format!("{written}&CMCD=bl%3D1000"),
            format!("token=x&{written}&CMCD=bl%3D1000"),
        ] {
            let read = Link::read_origin_query(&query, &resource(place), &key());
            assert_eq!(read.unwrap().as_deref(), Some("sig=a/b+c&e=1"));
        }
        assert_eq!(Link::read_origin_query("CMCD=x", &resource(place), &key()), Ok(None));
    }

    #[test]
    fn a_changed_moved_or_doubled_origin_query_is_refused() {
        let place = Place::Segment(MediaSequenceNumber(812));
        let written = write_origin_query("sig=a", &resource(place), &key());
        let other = write_origin_query("sig=b", &resource(Place::Init), &key());
        for query in [other.clone(), format!("{written}&{other}"), "_oq=x".into(), "_oq=.".into()] {
            let read = Link::read_origin_query(&query, &resource(place), &key());
            assert_eq!(read, Err(LinkError::BadQuery), "{query}");
        }
    }
}
