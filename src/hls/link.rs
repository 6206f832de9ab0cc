//! How a segment link is spelt, and read back.
//!
//! `{dir}/~{signer}.{place}[.{offset}-{length}][.k].{mac}/{file name}`: one path component before the file name, so
//! that relative resolution, file extensions and caches that drop queries keep working. The signer is the ID of a
//! content key (or, for what is served as the origin has it, of the DEK), the place is a Media Sequence Number (in
//! low-latency renditions with the rendition's tag behind it), `iframes`, `init`, `clear`, `key`, `data` or `steering`, `k` says that the
//! origin's own encryption is undone first, the MAC is base64url. An origin's own query, and the reference to its
//! key, travel behind it as one parameter each with a MAC of its own, in characters that no player re-encodes;
//! whatever else stands in the query (CMCD, a viewer's token) is not covered.
//!
//! Deliberately absent: whether a MAC is right. Only who holds the link key can say.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thiserror::Error;

use crate::keys::{
    ByteRange, Iv, KeyId, LinkKey, LinkMac, MediaSequenceNumber, Ordinal, Place, RenditionTag, Resource,
};

/// The query parameter that carries the origin's own query.
pub const ORIGIN_QUERY_PARAM: &str = "_oq";

/// The query parameter that carries the reference to the origin's key, and the IV with it.
const ORIGIN_KEY_PARAM: &str = "_ok";

/// What says in a link that the origin's own encryption is undone first.
const REKEYED: &str = "k";

/// The query parameter that names the ordinal of the key that has taken a revoked one's place: it makes another
/// cache entry of a path that stays what it was.
pub const SUCCESSOR_PARAM: &str = "r";

/// The component that proves that the shield wrote a URI.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    pub signer: [u8; KeyId::LEN],
    pub place: Place,
    pub range: Option<ByteRange>,
    pub is_rekeyed: bool,
    pub mac: LinkMac,
}

/// Why a path with a link cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LinkError {
    #[error("the segment link is malformed")]
    Malformed,
    #[error("the origin query behind the segment link is malformed or was changed")]
    BadQuery,
    #[error(
        "the reference to the origin's key behind the segment link (the parameter _ok) is missing, malformed or was \
         changed; a cache that drops queries may have lost it"
    )]
    BadOriginKey,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "~{}.", hex::encode(self.signer))?;
        match self.place {
            Place::Segment(msn) => write!(f, "{msn}")?,
            Place::LowLatency { msn, rendition } => write!(f, "{msn}-{}", hex::encode(rendition.0))?,
            Place::IFrames => f.write_str("iframes")?,
            Place::Init => f.write_str("init")?,
            Place::Clear => f.write_str("clear")?,
            Place::OriginKey => f.write_str("key")?,
            Place::SessionData => f.write_str("data")?,
            Place::Steering => f.write_str("steering")?,
        }
        if let Some(ByteRange { offset, length }) = self.range {
            write!(f, ".{offset}-{length}")?;
        }
        if self.is_rekeyed {
            write!(f, ".{REKEYED}")?;
        }
        write!(f, ".{}", URL_SAFE_NO_PAD.encode(self.mac.0))
    }
}

impl Link {
    /// The link to `resource`, signed.
    pub fn to_resource(resource: &Resource<'_>, link_key: &LinkKey) -> Self {
        Self {
            signer: *resource.signer,
            place: resource.place,
            range: resource.range,
            is_rekeyed: resource.is_rekeyed,
            mac: link_key.link_mac(resource),
        }
    }

    /// What the link leads to, if it stands before a file of this path.
    pub fn resource<'a>(&'a self, origin: &'a str, path: &'a str) -> Resource<'a> {
        Resource {
            signer: &self.signer,
            origin,
            path,
            place: self.place,
            range: self.range,
            is_rekeyed: self.is_rekeyed,
        }
    }

    fn parse(component: &str) -> Option<Self> {
        let mut parts = strip_tilde(component)?.split('.');
        let signer = *parts.next()?.parse::<KeyId>().ok()?.as_bytes();
        let place = parse_place(parts.next()?)?;
        let mac = URL_SAFE_NO_PAD.decode(parts.next_back()?).ok()?.try_into().ok().map(LinkMac)?;
        let mut between = parts.peekable();
        let range = match between.next_if(|part| *part != REKEYED) {
            Some(text) => Some(parse_range(text)?),
            None => None,
        };
        let is_rekeyed = between.next_if_eq(&REKEYED).is_some();
        between.next().is_none().then_some(Self { signer, place, range, is_rekeyed, mac })
    }
}

fn parse_place(text: &str) -> Option<Place> {
    Some(match text {
        "iframes" => Place::IFrames,
        "init" => Place::Init,
        "clear" => Place::Clear,
        "key" => Place::OriginKey,
        "data" => Place::SessionData,
        "steering" => Place::Steering,
        number => match number.split_once('-') {
            None => Place::Segment(MediaSequenceNumber(parse_number(number)?)),
            Some((number, tag)) => {
                let msn = MediaSequenceNumber(parse_number(number)?);
                let mut rendition = [0; RenditionTag::LEN];
                hex::decode_to_slice(tag, &mut rendition).ok()?;
                (hex::encode(rendition) == tag)
                    .then_some(Place::LowLatency { msn, rendition: RenditionTag(rendition) })?
            }
        },
    })
}

fn parse_range(text: &str) -> Option<ByteRange> {
    let (offset, length) = text.split_once('-')?;
    Some(ByteRange { offset: parse_number(offset)?, length: parse_number(length)? })
}

/// One spelling a number: `+7` and `007` would be other cache entries of what 7 names.
fn parse_number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
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

/// The key by which the origin has encrypted something: where it is, as a path of the shield with the origin's query,
/// and the IV.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OriginKey {
    pub reference: String,
    pub iv: [u8; 16],
}

/// The query parameter that carries an origin's own query, with its MAC.
pub(super) fn write_origin_query(query: &str, resource: &Resource<'_>, link_key: &LinkKey) -> String {
    let mac = URL_SAFE_NO_PAD.encode(link_key.query_mac(resource, query).0);
    format!("{ORIGIN_QUERY_PARAM}={}.{mac}", URL_SAFE_NO_PAD.encode(query))
}

/// The query parameter that carries the reference to an origin's key, with its MAC.
pub(super) fn write_origin_key(key: &OriginKey, resource: &Resource<'_>, link_key: &LinkKey) -> String {
    let mac = URL_SAFE_NO_PAD.encode(link_key.origin_key_mac(resource, &key.reference, Iv(key.iv)).0);
    let reference = URL_SAFE_NO_PAD.encode(&key.reference);
    format!("{ORIGIN_KEY_PARAM}={reference}.{}.{mac}", hex::encode(key.iv))
}

/// The value of a parameter that stands in a query at most once.
fn only_value<'q>(query: &'q str, param: &str) -> Result<Option<&'q str>, ()> {
    let mut values = query.split('&').filter_map(|part| part.strip_prefix(param)?.strip_prefix('='));
    let value = values.next();
    if values.next().is_some() { Err(()) } else { Ok(value) }
}

fn decode(text: &str) -> Option<String> {
    String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()
}

fn decode_mac(text: &str) -> Option<LinkMac> {
    URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok().map(LinkMac)
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
        let Some(value) = only_value(query, ORIGIN_QUERY_PARAM).map_err(|()| LinkError::BadQuery)? else {
            return Ok(None);
        };
        let read = || {
            let (query, mac) = value.split_once('.')?;
            let (query, mac) = (decode(query)?, decode_mac(mac)?);
            (link_key.query_mac(resource, &query) == mac).then_some(query)
        };
        read().ok_or(LinkError::BadQuery).map(Some)
    }

    /// The origin's key out of a request's query; `None` when the resource is not encrypted by its origin.
    ///
    /// # Errors
    /// [`LinkError::BadOriginKey`] when it is, and the query does not say how, as the shield wrote it.
    pub fn read_origin_key(
        query: &str,
        resource: &Resource<'_>,
        link_key: &LinkKey,
    ) -> Result<Option<OriginKey>, LinkError> {
        if !resource.is_rekeyed {
            return Ok(None);
        }
        let read = || {
            let mut parts = only_value(query, ORIGIN_KEY_PARAM).ok()??.splitn(3, '.');
            let reference = decode(parts.next()?)?;
            let mut iv = [0; 16];
            hex::decode_to_slice(parts.next()?, &mut iv).ok()?;
            let mac = decode_mac(parts.next()?)?;
            let key = OriginKey { reference, iv };
            (link_key.origin_key_mac(resource, &key.reference, Iv(iv)) == mac).then_some(key)
        };
        read().ok_or(LinkError::BadOriginKey).map(Some)
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
        Resource {
            signer: &SIGNER,
            origin: "main",
            path: "/live/ch1/seg_812.ts",
            place,
            range: None,
            is_rekeyed: false,
        }
    }

    fn key() -> LinkKey {
        LinkKey::from_bytes([7; 32])
    }

    #[test]
    fn a_link_reads_back_as_written() {
        let msn = MediaSequenceNumber(812);
        let low_latency = Place::LowLatency { msn, rendition: RenditionTag::of("/live/ch1/v.m3u8") };
        let places = [
            Place::Segment(msn),
            low_latency,
            Place::IFrames,
            Place::Init,
            Place::Clear,
            Place::OriginKey,
            Place::SessionData,
        ];
        let ranges = [None, Some(ByteRange { offset: 0, length: 7 })];
        let all = places.into_iter().flat_map(|place| ranges.map(|range| (place, range)));
        for (at, (place, range)) in all.enumerate() {
            let link =
                Link::to_resource(&Resource { range, is_rekeyed: at % 3 == 0, ..resource(place) }, &key());
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
            format!("~{id}.1-ABCDEF012345.{mac}"),
            format!("~{id}.1-abcdef.{mac}"),
            format!("~{id}.1.0-07.{mac}"),
            format!("~{id}.1.7.{mac}"),
            format!("~{id}.1.k.0-7.{mac}"),
            format!("~{id}.1.k.k.{mac}"),
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
    fn an_origins_key_is_bound_to_its_resource_and_must_be_there() {
        let rekeyed = Resource { is_rekeyed: true, ..resource(Place::Segment(MediaSequenceNumber(1))) };
        let other = Resource { path: "/live/ch1/seg_813.ts", ..rekeyed };
        let origin_key = OriginKey { reference: "/keys/1.bin?t=1".into(), iv: [5; 16] };
        let written = write_origin_key(&origin_key, &rekeyed, &key());
        let read = |query: &str, resource: &Resource<'_>| Link::read_origin_key(query, resource, &key());
        assert_eq!(read(&format!("{written}&CMCD=x"), &rekeyed), Ok(Some(origin_key)));
        assert_eq!(read(&written, &resource(Place::Init)), Ok(None), "nothing to undo");
        for bad in
            ["", "_ok=", "_ok=a.b.c", &format!("{written}&{written}"), &written.replace("0505", "0506")]
        {
            assert_eq!(read(bad, &rekeyed), Err(LinkError::BadOriginKey), "{bad}");
        }
        assert_eq!(read(&written, &other), Err(LinkError::BadOriginKey));
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
