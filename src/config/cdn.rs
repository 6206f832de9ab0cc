//! The CDNs before the shield, and how this node gets at each.
//!
//! An entry is of one kind, and has that vendor's table and no other. What push mode alone needs (a store at the edge,
//! and the secret under which keys lie in it) may be missing in pull mode. Files that hold a secret are only named here:
//! they are read by whoever needs what is in them.

mod vendors;

use std::path::PathBuf;
use std::time::Duration;

use url::Url;

use super::ConfigError;
use super::checks::{between, entry, field, millis, private_url};
use super::raw::{RawCdn, RawCdnRules};
use super::secrets::masked_url;
use crate::cdn::{CloudflareSettings, CustomSettings, DeliveryMode, FastlySettings};
use crate::keys::EdgeSecret;
use crate::rest::{Credential, Secret};

/// The kinds that there are, as they are configured; `cloudfront` is a feature, `cdn-cloudfront`.
const KINDS: [&str; 4] = ["cloudfront", "cloudflare", "fastly", "custom"];
/// Every key goes to each of them.
const MAX_CDNS: usize = 16;
/// It is part of metrics, and of what is stored about deliveries.
const MAX_NAME_LEN: usize = 64;

/// What holds for all CDNs, and those of which only an address is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CdnRules {
    /// The longest time of one call.
    pub sync_timeout: Duration,
    /// Failed tries in a row after which a CDN counts as degraded.
    pub retry_attempts: u32,
    pub endpoints: Vec<Url>,
}

/// One CDN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CdnConfig {
    pub name: String,
    pub mode: DeliveryMode,
    /// Where players reach it.
    pub edge_url: Url,
    /// Of certificate authorities, those that alone are trusted; `None` for the system's.
    pub ca_file: Option<PathBuf>,
    /// What seals keys for it: an edge secret as text. In push mode there is one.
    pub secret: Option<Credential>,
    pub vendor: CdnVendor,
}

/// Whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CdnVendor {
    #[cfg(feature = "cdn-cloudfront")]
    CloudFront(crate::cdn::CloudFrontSettings),
    Cloudflare(CloudflareSettings),
    Fastly(FastlySettings),
    Custom(CustomSettings),
}

impl CdnVendor {
    /// As `kind` names it.
    pub fn kind(&self) -> &'static str {
        match self {
            #[cfg(feature = "cdn-cloudfront")]
            CdnVendor::CloudFront(_) => "cloudfront",
            CdnVendor::Cloudflare(_) => "cloudflare",
            CdnVendor::Fastly(_) => "fastly",
            CdnVendor::Custom(_) => "custom",
        }
    }
}

/// What a CDN is called of which only the address is known: its host, with the port and the path if there are any.
pub fn endpoint_name(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}{port}{}", url.host_str().unwrap_or_default(), url.path().trim_end_matches('/'))
}

pub(super) fn rules(raw: &RawCdnRules) -> Result<CdnRules, ConfigError> {
    if !raw.edge_secret.is_empty() {
        // The error says what a secret looks like, and not what was given.
        let secret = raw.edge_secret.parse::<EdgeSecret>();
        secret.map_err(|error| entry("cdn.edge_secret", &error.to_string()))?;
    }
    Ok(CdnRules {
        sync_timeout: millis("cdn.sync_timeout_millis", raw.sync_timeout_millis, 1..=600_000)?,
        retry_attempts: between("cdn.retry_attempts", raw.retry_attempts, 1..=100)?,
        endpoints: raw.endpoints.iter().map(|text| endpoint(text)).collect::<Result<_, _>>()?,
    })
}

/// The guide's are hosts alone.
fn endpoint(text: &str) -> Result<Url, ConfigError> {
    let url = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    edge_url("cdn.endpoints", &url)
}

/// Where players reach a CDN, and the shield asks it what it has.
fn edge_url(name: &str, text: &str) -> Result<Url, ConfigError> {
    let bad = |why| field(name, masked_url(text), why);
    private_url(name, text)?;
    let url = Url::parse(text).map_err(|_| bad("must be an absolute URL"))?;
    match (url.query(), url.fragment()) {
        (None, None) => Ok(url),
        _ => Err(bad("must not have a query or a fragment")),
    }
}

pub(super) fn cdns(raw: &[RawCdn], rules: &RawCdnRules) -> Result<Vec<CdnConfig>, ConfigError> {
    let checked = self::rules(rules)?;
    if raw.len() + checked.endpoints.len() > MAX_CDNS {
        let why = format!("there may be {MAX_CDNS} at most, those of cdn.endpoints included");
        return Err(entry("cdns", &why));
    }
    let mut names = Vec::new();
    for name in checked.endpoints.iter().map(endpoint_name) {
        refuse_twice("cdn.endpoints", &name, &names)?;
        names.push(name);
    }
    let mut cdns = Vec::with_capacity(raw.len());
    for (at, raw) in raw.iter().enumerate() {
        let entry = Entry { place: format!("cdns[{at}]"), raw, rules, timeout: checked.sync_timeout };
        let cdn = entry.checked()?;
        refuse_twice(&entry.at("name"), &cdn.name, &names)?;
        names.push(cdn.name.clone());
        cdns.push(cdn);
    }
    Ok(cdns)
}

fn refuse_twice(field_name: &str, name: &str, names: &[String]) -> Result<(), ConfigError> {
    match names.iter().any(|other| other == name) {
        true => Err(field(field_name, name, "is there already: each CDN has a name of its own")),
        false => Ok(()),
    }
}

/// An entry of `[[cdns]]`, and where it stands.
struct Entry<'r> {
    place: String,
    raw: &'r RawCdn,
    rules: &'r RawCdnRules,
    timeout: Duration,
}

impl Entry<'_> {
    /// A key of this entry.
    fn at(&self, name: &str) -> String {
        format!("{}.{name}", self.place)
    }

    fn checked(&self) -> Result<CdnConfig, ConfigError> {
        let raw = self.raw;
        let is_of_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if raw.name.is_empty() || raw.name.len() > MAX_NAME_LEN || !raw.name.bytes().all(is_of_name) {
            let why = format!("must be 1 to {MAX_NAME_LEN} letters, digits, -, _ and .");
            return Err(field(&self.at("name"), &raw.name, &why));
        }
        let Some(mode) = DeliveryMode::from_name(&raw.mode) else {
            return Err(field(&self.at("mode"), &raw.mode, "must be \"pull\" or \"push\""));
        };
        self.refuse_other_tables()?;
        Ok(CdnConfig {
            name: raw.name.clone(),
            mode,
            edge_url: edge_url(&self.at("edge_url"), &raw.edge_url)?,
            ca_file: self.ca_file(),
            vendor: self.vendor(mode)?,
            secret: self.secret(mode)?,
        })
    }

    fn ca_file(&self) -> Option<PathBuf> {
        Some(PathBuf::from(&self.raw.ca_file)).filter(|path| !path.as_os_str().is_empty())
    }

    /// A table of another kind is a slip: it would never be looked at.
    fn refuse_other_tables(&self) -> Result<(), ConfigError> {
        let raw = self.raw;
        let given = [
            ("cloudfront", raw.cloudfront.is_some()),
            ("cloudflare", raw.cloudflare.is_some()),
            ("fastly", raw.fastly.is_some()),
            ("custom", raw.custom.is_some()),
        ];
        match given.iter().find(|(kind, is_given)| *is_given && *kind != raw.kind) {
            Some((kind, _)) if KINDS.contains(&raw.kind.as_str()) => {
                let why = format!(
                    "belongs to a CDN of kind {kind:?}, and {:?} is of kind {:?}",
                    raw.name, raw.kind
                );
                Err(entry(&self.at(kind), &why))
            }
            _ => Ok(()),
        }
    }

    fn secret(&self, mode: DeliveryMode) -> Result<Option<Credential>, ConfigError> {
        match (self.raw.edge_secret_file.as_str(), self.rules.edge_secret.as_str(), mode) {
            ("", "", DeliveryMode::Push) => {
                let why = "must be given in push mode, or cdn.edge_secret: 64 hexadecimal digits, such as \
                           `openssl rand -hex 32` prints";
                Err(entry(&self.at("edge_secret_file"), why))
            }
            ("", "", DeliveryMode::Pull) => Ok(None),
            ("", text, _) => Ok(Some(Credential::Text(Secret::new(text.to_owned())))),
            (file, _, _) => Ok(Some(Credential::File(file.into()))),
        }
    }

    /// The token of an API: the entry's own file goes before the one for all of its kind.
    fn token(&self, for_all: &str) -> Option<Credential> {
        match (self.raw.token_file.as_str(), for_all) {
            ("", "") => None,
            ("", text) => Some(Credential::Text(Secret::new(text.to_owned()))),
            (file, _) => Some(Credential::File(file.into())),
        }
    }
}

#[cfg(test)]
#[path = "cdn/tests.rs"]
mod tests;
