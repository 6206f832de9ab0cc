//! Checks of single values. Each error names the key and the rule.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use url::{Host, Url};

use super::ConfigError;
use super::raw::RawOrigin;
use crate::hls::{BaseUrl, Mount};
use crate::telemetry::check_log_filter;

pub(super) const YEAR_SECS: u64 = 366 * 86_400;

pub(super) fn field(field: &str, value: impl ToString, why: &str) -> ConfigError {
    ConfigError::Field { field: field.to_owned(), value: value.to_string(), why: why.to_owned() }
}

pub(super) fn entry(field: &str, why: &str) -> ConfigError {
    ConfigError::Entry { field: field.to_owned(), why: why.to_owned() }
}

pub(super) fn address(name: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| field(name, text, "must be IP:PORT, such as 127.0.0.1:8080 or [::]:8080"))
}

pub(super) fn between<N: Copy + PartialOrd + ToString>(
    name: &str,
    value: N,
    range: RangeInclusive<N>,
) -> Result<N, ConfigError> {
    let why = || format!("must be between {} and {}", range.start().to_string(), range.end().to_string());
    if range.contains(&value) { Ok(value) } else { Err(field(name, value, &why())) }
}

pub(super) fn secs(name: &str, value: u64, range: RangeInclusive<u64>) -> Result<Duration, ConfigError> {
    between(name, value, range).map(Duration::from_secs)
}

pub(super) fn millis(name: &str, value: u64, range: RangeInclusive<u64>) -> Result<Duration, ConfigError> {
    between(name, value, range).map(Duration::from_millis)
}

pub(super) fn log_filter(filter: &str) -> Result<String, ConfigError> {
    let checked = check_log_filter(filter).map(|()| filter.to_owned());
    checked.map_err(|why| field("log.filter", filter, &why))
}

/// A URL on whose way nobody reads or changes anything: https, or http on loopback.
/// Where something is sent that only its receiver should have.
pub(super) fn private_url(name: &str, text: &str) -> Result<String, ConfigError> {
    private(name, text, |why| field(name, text, why))
}

/// As [`private_url`], where the URL itself is a secret.
pub(super) fn secret_url(name: &str, text: &str) -> Result<String, ConfigError> {
    private(name, text, |why| entry(name, why))
}

fn private(name: &str, text: &str, bad: impl Fn(&str) -> ConfigError) -> Result<String, ConfigError> {
    let url = Url::parse(text).map_err(|_| bad("must be an absolute URL"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(entry(name, "must not have a user name or a password"));
    }
    let loopback = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => Ok(text.to_owned()),
        "http" if loopback => Ok(text.to_owned()),
        _ => Err(bad("must begin with https://; http:// is for loopback alone")),
    }
}

/// What stands before the key ID: a path of the shield, or an absolute URL of a CDN in front of it.
pub(super) fn key_uri_base(text: &str) -> Result<String, ConfigError> {
    let legal = text.starts_with('/') || BaseUrl::parse(text).is_ok();
    let plain = text.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    if !legal || !plain {
        let why = "must be a path such as /api/hls/keys/ or an absolute http(s) URL";
        return Err(field("keys.uri_base", text, why));
    }
    Ok(format!("{}/", text.trim_end_matches('/')))
}

pub(super) fn mount(raw: &RawOrigin) -> Result<Mount, ConfigError> {
    let bases = raw.urls.iter().map(|url| BaseUrl::parse(url)).collect::<Result<Vec<_>, _>>()?;
    let mut mount = Mount::new(raw.name.clone(), &raw.mount, bases, raw.pass_through)?;
    mount.query_params.clone_from(&raw.query_params);
    Ok(mount)
}
