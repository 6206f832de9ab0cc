//! Where paths of the shield lie at the origins, and which URIs may be followed.
//!
//! Origins are an allow-list: each is mounted at a path of the shield. A URI in a playlist is resolved as a
//! player would (RFC 3986 §5, through the `url` crate), and then it lies at one of the origins or it is
//! refused; nothing else is ever fetched. Deliberately absent: connections (see `shield::upstream`).

use thiserror::Error;
use url::Url;

/// One address of an origin: `scheme://host[:port][/base path]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    url: Url,
    /// The base path without its closing slash: empty for the root.
    path: String,
}

impl BaseUrl {
    /// # Errors
    /// Anything but an http or https URL with a host and no query, fragment or credentials.
    pub fn parse(text: &str) -> Result<Self, MountError> {
        let bad = |why| MountError::BadOriginUrl { url: text.to_owned(), why };
        let url = Url::parse(text).map_err(|_| bad("it is not an absolute URL"))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(bad("it must begin with http:// or https:// and name a host"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(bad("it must not have a query or a fragment"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(bad("it must not have a user name or a password"));
        }
        let path = url.path().trim_end_matches('/').to_owned();
        Ok(Self { url, path })
    }

    pub fn is_https(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// The host as it goes into DNS: an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        // `parse` refused URLs without a host.
        self.url.host_str().unwrap_or_default().trim_matches(['[', ']'])
    }

    pub fn port(&self) -> u16 {
        // http and https both have a known default.
        self.url.port_or_known_default().unwrap_or(80)
    }

    /// `host[:port]`, as the Host header wants it.
    pub fn authority(&self) -> &str {
        self.url.authority()
    }

    /// The path at the origin of `path` below this base.
    pub fn full_path(&self, path: &str) -> String {
        format!("{}{path}", self.path)
    }

    /// The path below this base, if `url` lies there.
    fn below(&self, url: &Url) -> Option<String> {
        let same_site = url.scheme() == self.url.scheme()
            && url.host() == self.url.host()
            && url.port_or_known_default() == self.url.port_or_known_default();
        let below = url.path().strip_prefix(self.path.as_str())?;
        (same_site && below.starts_with('/')).then(|| below.to_owned())
    }

    /// Whether the two name the same place or one lies below the other. http and https at their own ports are
    /// one place here: the same server is likely behind both.
    fn overlaps(&self, other: &Self) -> bool {
        let at_default = |base: &Self| base.url.port().is_none();
        let same_site = self.url.host() == other.url.host()
            && (self.port() == other.port() || (at_default(self) && at_default(other)));
        let within = |outer: &Self, inner: &Self| {
            inner
                .path
                .strip_prefix(outer.path.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        same_site && (within(self, other) || within(other, self))
    }
}

impl std::fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}{}", self.url.scheme(), self.authority(), self.path)
    }
}

/// An origin and the path of the shield at which it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub origin: String,
    /// Without its closing slash: empty for the root.
    prefix: String,
    /// Its addresses, in the order in which they are tried; never empty.
    bases: Vec<BaseUrl>,
    /// Whether paths that belong to no stream are passed through.
    pub pass_through: bool,
    /// Query parameters that choose what a playlist is: sent to the origin, and part of the playlist's name.
    /// All others (viewers' tokens, CMCD) stay here.
    pub query_params: Vec<String>,
}

impl Mount {
    /// # Errors
    /// A mount path that does not begin with a slash, or no address.
    pub fn new(
        origin: String,
        path: &str,
        bases: Vec<BaseUrl>,
        pass_through: bool,
    ) -> Result<Self, MountError> {
        if !path.starts_with('/') || normalized_path(path.trim_end_matches('/')).is_err() {
            return Err(MountError::BadMountPath { origin, path: path.to_owned() });
        }
        if bases.is_empty() {
            return Err(MountError::NoUrl { origin });
        }
        let prefix = path.trim_end_matches('/').to_owned();
        Ok(Self { origin, prefix, bases, pass_through, query_params: Vec::new() })
    }

    pub fn bases(&self) -> &[BaseUrl] {
        &self.bases
    }

    /// What of a playlist's query goes to the origin; `None` when nothing does.
    pub fn playlist_query(&self, query: &str) -> Option<String> {
        let kept: Vec<_> = query.split('&').filter(|part| self.takes(part)).collect();
        (!kept.is_empty()).then(|| kept.join("&"))
    }

    /// The first parameter of a query that would not go to the origin.
    pub fn unknown_param<'q>(&self, query: &'q str) -> Option<&'q str> {
        let unknown = query.split('&').find(|part| !part.is_empty() && !self.takes(part))?;
        unknown.split('=').next()
    }

    fn takes(&self, part: &str) -> bool {
        let name = part.split('=').next().unwrap_or_default();
        self.query_params.iter().any(|known| known == name)
    }

    /// The shield's path of a path at this origin.
    pub fn shield_path(&self, path: &str) -> String {
        format!("{}{path}", self.prefix)
    }
}

/// What is wrong with the list of origins, or why a URI leads to none of them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MountError {
    #[error("origin URL {url:?}: {why}")]
    BadOriginUrl { url: String, why: &'static str },
    #[error("origin {origin:?}: the mount path {path:?} must begin with a slash and be a plain path")]
    BadMountPath { origin: String, path: String },
    #[error("origin {origin:?} has no URL")]
    NoUrl { origin: String },
    #[error("origins {one:?} and {other:?} are both called that, or both mounted at {path:?}")]
    Twice { one: String, other: String, path: String },
    #[error(
        "origins {one:?} and {other:?} overlap at {url}: plaintext of one could be fetched through the other"
    )]
    Overlap { one: String, other: String, url: String },
    #[error("not a URI reference: {0}")]
    BadReference(String),
    #[error("{0} is not an allowed origin")]
    NotAllowed(String),
    #[error("the path {0}")]
    BadPath(&'static str),
}

/// A path at an origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<'a> {
    pub mount: &'a Mount,
    /// Below the mount: begins with a slash, has no query.
    pub path: String,
    pub query: Option<String>,
}

/// All origins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mounts(Vec<Mount>);

impl Mounts {
    /// # Errors
    /// Two origins with one name or mount path, or whose addresses overlap.
    pub fn new(mounts: Vec<Mount>) -> Result<Self, MountError> {
        for (at, one) in mounts.iter().enumerate() {
            for other in &mounts[at + 1..] {
                if one.origin == other.origin || one.prefix == other.prefix {
                    let (one, other, path) = (one.origin.clone(), other.origin.clone(), one.shield_path("/"));
                    return Err(MountError::Twice { one, other, path });
                }
                let shared = one.bases.iter().find(|a| other.bases.iter().any(|b| a.overlaps(b)));
                if let Some(shared) = shared {
                    return Err(MountError::Overlap {
                        one: one.origin.clone(),
                        other: other.origin.clone(),
                        url: shared.to_string(),
                    });
                }
            }
        }
        Ok(Self(mounts))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Mount> {
        self.0.iter()
    }

    pub fn by_origin(&self, origin: &str) -> Option<&Mount> {
        self.0.iter().find(|mount| mount.origin == origin)
    }

    /// The place that a path of the shield names: the longest mount path wins.
    pub fn locate<'m>(&'m self, shield_path: &str) -> Option<Place<'m>> {
        self.0
            .iter()
            .filter_map(|mount| {
                let below = shield_path.strip_prefix(mount.prefix.as_str())?;
                below.starts_with('/').then_some((mount, below))
            })
            .max_by_key(|(mount, _)| mount.prefix.len())
            .map(|(mount, below)| Place { mount, path: below.to_owned(), query: None })
    }

    /// The place that `reference` names, as seen from the playlist at `from`.
    ///
    /// # Errors
    /// [`MountError::BadReference`], or [`MountError::NotAllowed`] for a host, or a path above the base
    /// path, that no origin has.
    pub fn resolve<'m>(&'m self, from: &Place<'_>, reference: &str) -> Result<Place<'m>, MountError> {
        let base = &from.mount.bases[0];
        let bad = |error: url::ParseError| MountError::BadReference(error.to_string());
        let from = base.url.join(&base.full_path(&from.path)).map_err(bad)?;
        let url = from.join(reference).map_err(bad)?;
        self.find(&url).ok_or_else(|| MountError::NotAllowed(site(&url)))
    }

    /// The place that an absolute URL names.
    ///
    /// # Errors
    /// As [`Self::resolve`].
    pub fn place_of(&self, url: &str) -> Result<Place<'_>, MountError> {
        let url = Url::parse(url).map_err(|error| MountError::BadReference(error.to_string()))?;
        self.find(&url).ok_or_else(|| MountError::NotAllowed(site(&url)))
    }

    fn find(&self, url: &Url) -> Option<Place<'_>> {
        self.0
            .iter()
            .flat_map(|mount| mount.bases.iter().map(move |base| (mount, base)))
            .filter_map(|(mount, base)| base.below(url).map(|path| (mount, base, path)))
            .max_by_key(|(_, base, _)| base.path.len())
            .map(|(mount, _, path)| Place { mount, path, query: url.query().map(str::to_owned) })
    }
}

/// What of a refused URL may be said in an error: no query, which may hold a token.
fn site(url: &Url) -> String {
    match url.host_str() {
        Some(_) => format!("{}://{}{}", url.scheme(), url.authority(), url.path()),
        None => format!("a {}: URL", url.scheme()),
    }
}

/// The path in its one canonical spelling (RFC 3986 §6.2.2): what need not be encoded is not, all else is, with
/// upper-case hex digits. Without it every spelling of a path would be a playlist of its own, and a link that was made
/// for one spelling would be refused in another.
///
/// # Errors
/// A `%` that begins no encoding: it could be read as itself or as the start of one.
pub fn canonical_path(path: &str) -> Result<String, MountError> {
    let mut out = String::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        let byte = match byte {
            b'%' => {
                let digits = [bytes.next(), bytes.next()].map(|b| char::from(b.unwrap_or(b'x')).to_digit(16));
                let [Some(high), Some(low)] = digits else {
                    return Err(MountError::BadPath("has a percent sign that encodes nothing"));
                };
                // An encoded delimiter is another character than the delimiter itself (RFC 3986 §2.2).
                let decoded = (high * 16 + low) as u8;
                if !decoded.is_ascii_alphanumeric() && !b"-._~".contains(&decoded) {
                    out.push_str(&format!("%{decoded:02X}"));
                    continue;
                }
                decoded
            }
            byte => byte,
        };
        if byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/\\".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    Ok(out)
}

/// The path as an origin reads it that cuts path parameters off its components, as servlet containers do.
pub fn without_params(decoded: &str) -> String {
    let components: Vec<_> = decoded.split('/').map(|c| c.split(';').next().unwrap_or_default()).collect();
    components.join("/")
}

/// The path with its percent-encoding undone, for comparing it with a stream's prefix.
///
/// # Errors
/// A path that an origin may read as another one: dot segments, empty segments, encoded slashes,
/// backslashes, control characters. Such paths are refused before anything is compared.
pub fn normalized_path(path: &str) -> Result<String, MountError> {
    let decoded = percent_encoding::percent_decode_str(path)
        .decode_utf8()
        .map_err(|_| MountError::BadPath("is not UTF-8"))?;
    if decoded.matches('/').count() != path.matches('/').count() {
        return Err(MountError::BadPath("has an encoded slash"));
    }
    if decoded.contains('\\') || decoded.chars().any(char::is_control) {
        return Err(MountError::BadPath("has a backslash or a control character"));
    }
    // The component before the first slash is empty, the one behind the last may be.
    let mut inner = decoded.split('/').skip(1).peekable();
    while let Some(component) = inner.next() {
        if component == "." || component == ".." || (component.is_empty() && inner.peek().is_some()) {
            return Err(MountError::BadPath("has an empty or a dot component"));
        }
    }
    Ok(decoded.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(origin: &str, path: &str, url: &str) -> Mount {
        let bases = vec![BaseUrl::parse(url).unwrap()];
        Mount::new(origin.to_owned(), path, bases, false).unwrap()
    }

    fn two() -> Mounts {
        let main = mount("main", "/", "https://origin.example");
        let ads = mount("ads", "/ads", "http://ads.example:8080/pool/");
        Mounts::new(vec![main, ads]).unwrap()
    }

    fn resolved(reference: &str) -> Result<(String, String, Option<String>), MountError> {
        let mounts = two();
        let from = mounts.locate("/live/ch1/720p.m3u8").unwrap();
        mounts.resolve(&from, reference).map(|to| (to.mount.origin.clone(), to.path, to.query))
    }

    fn at(origin: &str, path: &str) -> Result<(String, String, Option<String>), MountError> {
        Ok((origin.to_owned(), path.to_owned(), None))
    }

    #[test]
    fn the_longest_mount_path_wins() {
        let mounts = two();
        let locate = |path| mounts.locate(path).map(|p| (p.mount.origin.as_str(), p.path));
        assert_eq!(locate("/live/a.m3u8"), Some(("main", "/live/a.m3u8".into())));
        assert_eq!(locate("/ads/a.m3u8"), Some(("ads", "/a.m3u8".into())));
        assert_eq!(locate("/adsense/a.m3u8"), Some(("main", "/adsense/a.m3u8".into())));
        assert_eq!(locate("no-slash"), None);
    }

    #[test]
    fn references_resolve_as_players_resolve_them() {
        assert_eq!(resolved("seg.ts"), at("main", "/live/ch1/seg.ts"));
        assert_eq!(resolved("../ch2/seg.ts"), at("main", "/live/ch2/seg.ts"));
        assert_eq!(resolved("/other/seg.ts"), at("main", "/other/seg.ts"));
        assert_eq!(resolved("https://origin.example:443/x/seg.ts"), at("main", "/x/seg.ts"));
        assert_eq!(resolved("http://ads.example:8080/pool/1.ts"), at("ads", "/1.ts"));
        let with_query = resolved("seg.ts?sig=a%2Fb").unwrap();
        assert_eq!(with_query.2.as_deref(), Some("sig=a%2Fb"));
    }

    #[test]
    fn nothing_outside_the_allow_list_is_followed() {
        for bad in [
            "http://origin.example/seg.ts",
            "https://evil.example/seg.ts",
            "//evil.example/seg.ts",
            "http://ads.example:8080/private/1.ts",
            "http://ads.example:8080/pool/../private/1.ts",
            "http://ads.example:8080/poolside/1.ts",
            "file:///etc/passwd",
            "data:text/plain,x",
            "https://origin.example@evil.example/seg.ts",
        ] {
            let refused = resolved(bad);
            assert!(matches!(refused, Err(MountError::NotAllowed(_))), "{bad}: {refused:?}");
        }
    }

    #[test]
    fn a_refusal_does_not_repeat_the_query() {
        let refused = resolved("https://evil.example/seg.ts?token=secret").unwrap_err();
        assert!(!refused.to_string().contains("secret"), "{refused}");
    }

    #[test]
    fn two_origins_cannot_share_a_place() {
        let one = mount("one", "/", "http://origin.example/live");
        let same = mount("two", "/b", "http://origin.example:80/live/");
        let below = mount("two", "/b", "http://origin.example/live/ch1");
        let beside = mount("two", "/b", "http://origin.example/vod");
        for other in [same, below] {
            let refused = Mounts::new(vec![one.clone(), other]).unwrap_err();
            assert!(matches!(refused, MountError::Overlap { .. }), "{refused}");
        }
        assert!(Mounts::new(vec![one, beside]).is_ok());
    }

    #[test]
    fn paths_that_could_be_read_two_ways_are_refused() {
        for bad in ["/a//b", "/a/../b", "/a/%2e%2E/b", "/a%2Fb", "/a\\b", "/a%5cb", "/a/.", "/a%00"] {
            assert!(normalized_path(bad).is_err(), "{bad}");
        }
        assert_eq!(normalized_path("/live/%63h1/").unwrap(), "/live/ch1/");
    }

    #[test]
    fn http_and_https_of_one_host_are_one_place() {
        let one = mount("one", "/", "http://origin.example");
        let other = mount("two", "/b", "https://origin.example");
        assert!(matches!(Mounts::new(vec![one.clone(), other]), Err(MountError::Overlap { .. })));
        let another_port = mount("two", "/b", "http://origin.example:8080");
        assert!(Mounts::new(vec![one, another_port]).is_ok());
    }

    #[test]
    fn a_path_has_one_canonical_spelling() {
        for (path, canonical) in [
            ("/live/%63h1/%37%320p.m3u8", "/live/ch1/720p.m3u8"),
            ("/a%c3%a4/x%20y", "/a%C3%A4/x%20y"),
            ("/ä%41 b|^", "/%C3%A4A%20b%7C%5E"),
            ("/a;b=c/%3b/%2561", "/a;b=c/%3B/%2561"),
        ] {
            let once = canonical_path(path).unwrap();
            assert_eq!(once, canonical);
            assert_eq!(canonical_path(&once).unwrap(), once, "it is its own canonical spelling");
        }
        for bad in ["/100%", "/%zz/", "/%4", "/%%36%31"] {
            assert!(canonical_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_listed_query_parameters_go_to_the_origin() {
        let mut mount = mount("main", "/", "http://origin.example");
        assert_eq!(mount.playlist_query("r=720&CMCD=x"), None);
        mount.query_params = vec!["r".into(), "n".into()];
        assert_eq!(mount.playlist_query("token=t&r=720&CMCD=x&n=").as_deref(), Some("r=720&n="));
        assert_eq!(mount.unknown_param("r=720&sig=x"), Some("sig"));
        assert_eq!(mount.unknown_param("r=720"), None);
    }

    #[test]
    fn an_origin_url_says_what_is_wrong_with_it() {
        for bad in ["origin.example", "ftp://a/", "http://a/?x", "http://u:p@a/"] {
            assert!(BaseUrl::parse(bad).is_err(), "{bad}");
        }
    }
}
