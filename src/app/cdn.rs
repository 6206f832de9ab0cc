//! The CDNs that the configuration names, each by its vendor's connector, and the commands that work on them.

mod args;
mod check;
mod cures;
mod deploy;
mod report;
mod run;
mod secrets;
#[cfg(feature = "cdn-cloudfront")]
mod signer;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use url::Url;

pub use self::args::{CdnCommand, CdnTarget, SignedWhat, TokenFor};
pub use self::run::{Printed, run};
use crate::cdn::{
    Cdn, CdnError, Cloudflare, CustomCdn, DeliveryMode, Edge, EdgeSettings, Fastly, NamedCdn, PlainCdn,
};
use crate::config::{CdnConfig, CdnVendor, Config, endpoint_name};
use crate::keys::EdgeSecret;

/// Those of `[[cdns]]`, then those of which only an address is known.
///
/// # Errors
/// A file of authorities or of an edge secret that cannot be used. That nobody answers is no error here.
pub(super) fn cdns(config: &Config) -> anyhow::Result<Vec<NamedCdn>> {
    let of_vendors = config.cdns.iter().map(|cdn| connect(config, cdn));
    of_vendors.chain(config.cdn.endpoints.iter().map(|url| plain(config, url))).collect()
}

/// One of `[[cdns]]`.
fn connect(config: &Config, cdn: &CdnConfig) -> anyhow::Result<NamedCdn> {
    let context = || format!("CDN {}", cdn.name);
    if lacks_dictionary(cdn) {
        let what = "there is no dictionary_id: run `keyshield cdn deploy`, which makes the dictionary and says its ID";
        return Err(anyhow!(what)).with_context(context);
    }
    Ok(NamedCdn {
        name: cdn.name.clone(),
        kind: cdn.vendor.kind(),
        mode: cdn.mode,
        edge: cdn.edge_url.to_string(),
        secret: edge_secret(cdn).with_context(context)?,
        cdn: connector(config, cdn).with_context(context)?,
    })
}

/// One of which only the address is known.
fn plain(config: &Config, url: &Url) -> anyhow::Result<NamedCdn> {
    let name = endpoint_name(url);
    let edge = edge(config, url, None, DeliveryMode::Pull).with_context(|| format!("CDN {name}"))?;
    let cdn = Arc::new(PlainCdn::new(edge, config.key_max_age));
    let (mode, edge) = (DeliveryMode::Pull, url.to_string());
    Ok(NamedCdn { name, kind: "plain", mode, edge, secret: None, cdn })
}

/// Whether keys are to be pushed to a service of Fastly's to which nothing was deployed yet.
pub(super) fn lacks_dictionary(cdn: &CdnConfig) -> bool {
    let is_missing = matches!(&cdn.vendor, CdnVendor::Fastly(settings) if settings.dictionary_id.is_empty());
    is_missing && cdn.mode == DeliveryMode::Push
}

/// The entry of a name.
fn find<'c>(config: &'c Config, name: &str) -> anyhow::Result<&'c CdnConfig> {
    if config.cdn.endpoints.iter().any(|url| endpoint_name(url) == name) {
        return Err(anyhow!("of CDN {name} only the address is known: give it an entry in [[cdns]]"));
    }
    config.cdns.iter().find(|cdn| cdn.name == name).ok_or_else(|| unknown(config, name))
}

fn unknown(config: &Config, name: &str) -> anyhow::Error {
    let of_vendors = config.cdns.iter().map(|cdn| cdn.name.clone());
    let names: Vec<_> = of_vendors.chain(config.cdn.endpoints.iter().map(endpoint_name)).collect();
    match names.is_empty() {
        true => anyhow!("there is no CDN {name:?}: none is configured"),
        false => anyhow!("there is no CDN {name:?}: configured are {}", names.join(", ")),
    }
}

/// The secret under which keys lie at this CDN's edge, if it has one.
///
/// # Errors
/// A file that cannot be read or holds something else.
fn edge_secret(cdn: &CdnConfig) -> anyhow::Result<Option<EdgeSecret>> {
    let Some(credential) = &cdn.secret else { return Ok(None) };
    let text = credential.read().map_err(anyhow::Error::msg).context("edge_secret_file")?;
    let secret = text.expose().parse::<EdgeSecret>().context("edge_secret_file")?;
    Ok(Some(secret))
}

/// That secret, for what cannot go without.
fn secret_of(cdn: &CdnConfig) -> anyhow::Result<EdgeSecret> {
    let name = &cdn.name;
    let secret = edge_secret(cdn).with_context(|| format!("CDN {name}"))?;
    secret.ok_or_else(|| {
        anyhow!("CDN {name} has no edge secret: give its entry an edge_secret_file, or set cdn.edge_secret")
    })
}

fn connector(config: &Config, cdn: &CdnConfig) -> Result<Arc<dyn Cdn>, CdnError> {
    let edge = edge(config, &cdn.edge_url, cdn.ca_file.clone(), cdn.mode)?;
    Ok(match cdn.vendor.clone() {
        #[cfg(feature = "cdn-cloudfront")]
        CdnVendor::CloudFront(settings) => Arc::new(crate::cdn::CloudFront::new(settings, cdn.mode, edge)?),
        CdnVendor::Cloudflare(settings) => Arc::new(Cloudflare::new(settings, cdn.mode, edge)?),
        CdnVendor::Fastly(settings) => Arc::new(Fastly::new(settings, cdn.mode, edge)?),
        CdnVendor::Custom(settings) => Arc::new(CustomCdn::new(settings, cdn.mode, edge)?),
    })
}

/// The distribution itself, for what other CDNs have nothing of.
#[cfg(feature = "cdn-cloudfront")]
fn cloudfront(config: &Config, cdn: &CdnConfig) -> anyhow::Result<crate::cdn::CloudFront> {
    let CdnVendor::CloudFront(settings) = &cdn.vendor else {
        return Err(anyhow!("CDN {} is of kind {:?}: this is CloudFront's", cdn.name, cdn.vendor.kind()));
    };
    let edge = edge(config, &cdn.edge_url, cdn.ca_file.clone(), cdn.mode)?;
    Ok(crate::cdn::CloudFront::new(settings.clone(), cdn.mode, edge)?)
}

fn edge(config: &Config, url: &Url, ca_file: Option<PathBuf>, mode: DeliveryMode) -> Result<Edge, CdnError> {
    Edge::new(EdgeSettings {
        url: url.clone(),
        key_path: key_path(&config.key_uri_base),
        is_store: mode == DeliveryMode::Push,
        ca_file,
        timeout: config.cdn.sync_timeout,
    })
}

/// What of key URIs stands behind the host: they may name one CDN, and each is asked at its own.
pub(super) fn key_path(uri_base: &str) -> String {
    match Url::parse(uri_base) {
        Ok(url) => url.path().to_owned(),
        Err(_) => uri_base.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawConfig;

    fn built(text: &str) -> anyhow::Result<Vec<NamedCdn>> {
        let raw: RawConfig = toml::from_str(text)?;
        cdns(&Config::checked(&raw)?)
    }

    const CUSTOM: &str = "name = \"a\"\nkind = \"custom\"\nedge_url = \"https://cdn.example\"\n";
    const API: &str = "[cdns.custom]\napi_url = \"https://api.example\"\n";

    #[test]
    fn every_entry_and_every_address_becomes_a_cdn() {
        let text = format!("[cdn]\nendpoints = [\"cdn1.example.com\"]\n[[cdns]]\n{CUSTOM}{API}");
        let cdns = built(&text).unwrap();
        let shown: Vec<_> = cdns.iter().map(|cdn| (cdn.name.as_str(), cdn.kind, cdn.mode.name())).collect();
        assert_eq!(shown, [("a", "custom", "pull"), ("cdn1.example.com", "plain", "pull")]);
        assert!(built("").unwrap().is_empty());
    }

    #[test]
    fn a_secret_is_read_from_its_file_and_a_bad_one_names_the_cdn() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("edge.secret");
        let text = format!("[[cdns]]\n{CUSTOM}mode = \"push\"\nedge_secret_file = {file:?}\n{API}");
        let error = format!("{:#}", built(&text).unwrap_err());
        assert!(error.starts_with("CDN a: edge_secret_file: cannot read"), "{error}");
        std::fs::write(&file, "sesame\n").unwrap();
        let error = format!("{:#}", built(&text).unwrap_err());
        assert!(error.contains("64 hexadecimal digits") && !error.contains("sesame"), "{error}");
        std::fs::write(&file, format!("{}\n", "0f".repeat(32))).unwrap();
        assert_eq!(built(&text).unwrap()[0].secret, "0f".repeat(32).parse().ok());
    }

    #[test]
    fn a_service_without_a_dictionary_cannot_be_pushed_to_and_is_told_how_to_get_one() {
        let text = format!(
            "[cdn]\nedge_secret = \"{}\"\nfastly_api_token = \"t\"\n\
             [[cdns]]\nname = \"a\"\nkind = \"fastly\"\nmode = \"push\"\nedge_url = \"https://cdn.example\"\n\
             [cdns.fastly]\nservice_id = \"SU1Z\"\n",
            "0f".repeat(32)
        );
        let error = format!("{:#}", built(&text).unwrap_err());
        assert!(error.starts_with("CDN a: ") && error.contains("keyshield cdn deploy"), "{error}");
        assert!(built(&format!("{text}dictionary_id = \"3vjT\"\n")).is_ok());
    }

    #[test]
    fn of_key_uris_that_name_a_host_the_path_is_asked_for() {
        assert_eq!(key_path("/api/hls/keys/"), "/api/hls/keys/");
        assert_eq!(key_path("https://cdn.example/k/"), "/k/");
    }
}
