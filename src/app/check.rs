//! `keyshield check`: is the configuration right, and what does it come to?

use std::fmt::Write;

use serde_json::json;

use super::cdn::lacks_dictionary;
use crate::config::{
    Config, Effective, EffectiveValue, Environment, JwksSource, KmsConfig, endpoint_name, masked_url,
};

/// Longer lines do not push the column of sources to the right.
const LONGEST_ALIGNED: usize = 60;

/// What the configuration comes to: a summary, then every value with the place that it came from.
pub fn check(effective: &Effective, environment: &Environment) -> String {
    let mut out = summary(&effective.config);
    for name in environment.ignored(&effective.config.kms) {
        // Writing to memory does not fail.
        let _ = writeln!(out, "note: {name} is set, but not honoured by this version or with this KMS");
    }
    for cdn in effective.config.cdns.iter().filter(|cdn| lacks_dictionary(cdn)) {
        let _ =
            writeln!(out, "note: CDN {} has no dictionary_id yet: `keyshield cdn deploy` says it", cdn.name);
    }
    out.push_str("the configuration is right\n\n");
    out.push_str(&values(&effective.values));
    out
}

/// The same for programs.
pub fn check_json(effective: &Effective) -> anyhow::Result<String> {
    let values = effective.values.iter().map(|EffectiveValue { key, value, source }| {
        Ok(json!({ "key": key, "value": serde_json::to_value(value)?, "source": source.to_string() }))
    });
    let values = values.collect::<Result<Vec<_>, serde_json::Error>>()?;
    Ok(format!("{}\n", serde_json::to_string_pretty(&json!({ "valid": true, "values": values }))?))
}

/// A line for each value, sources below one another.
fn values(values: &[EffectiveValue]) -> String {
    let lines: Vec<_> = values.iter().map(|value| format!("{} = {}", value.key, value.value)).collect();
    let lengths = lines.iter().map(|line| line.chars().count());
    let width = lengths.filter(|length| *length <= LONGEST_ALIGNED).max().unwrap_or(0);
    let sources = values.iter().map(|value| &value.source);
    lines.iter().zip(sources).map(|(line, source)| format!("{line:width$}   # {source}\n")).collect()
}

/// Listeners, access, origins, streams with their rules.
fn summary(config: &Config) -> String {
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        // Writing to memory does not fail.
        let _ = writeln!(out, "{text}");
    };
    line(format_args!("players     {}", config.listen));
    line(format_args!("operators   {}", config.control_listen));
    line(format_args!("database    {}", config.database));
    match &config.kms.wraps {
        KmsConfig::Local { master_key_file } => {
            line(format_args!("master key  {}", master_key_file.display()));
        }
        #[cfg(feature = "kms-aws")]
        KmsConfig::Aws(aws) => {
            let settings = &aws.settings;
            let region = settings.region.as_deref().unwrap_or("the region that AWS's own settings name");
            let at = settings.endpoint.as_ref().map(|endpoint| format!(" at {endpoint}")).unwrap_or_default();
            line(format_args!("KMS         aws, key {} in {region}{at}", settings.key));
        }
        #[cfg(feature = "kms-azure")]
        KmsConfig::Azure(azure) => line(format_args!("KMS         azure, {}", azure.settings.key_name())),
        #[cfg(feature = "kms-gcp")]
        KmsConfig::Gcp(gcp) => {
            let (name, at) = (gcp.settings.key_name(), &gcp.settings.endpoint);
            line(format_args!("KMS         gcp, {name} at {at}"));
        }
        #[cfg(feature = "kms-vault")]
        KmsConfig::Vault(vault) => {
            let settings = &vault.settings;
            let at = format_args!("{}/{} at {}", settings.mount, settings.key, settings.address);
            line(format_args!("KMS         vault, key {at}"));
        }
    }
    for kms in &config.kms.also {
        line(format_args!("held too    {}", kms.provider()));
    }
    for cdn in &config.cdns {
        let (kind, mode) = (cdn.vendor.kind(), cdn.mode.name());
        line(format_args!("CDN         {}: {kind}, {mode}, players at {}", cdn.name, cdn.edge_url));
    }
    for url in &config.cdn.endpoints {
        line(format_args!(
            "CDN         {}: known by its address alone, players at {url}",
            endpoint_name(url)
        ));
    }
    for token in &config.tokens {
        line(format_args!("token       {}: {}", token.name, token.role.name()));
    }
    if let Some(jwt) = &config.jwt {
        let keys = match &jwt.jwks {
            JwksSource::File(path) => path.display().to_string(),
            JwksSource::Url(url) => masked_url(url),
        };
        line(format_args!("tokens of   {} for {}, keys in {keys}", jwt.issuer, jwt.audience));
    }
    for mount in config.mounts.iter() {
        let urls: Vec<_> = mount.bases().iter().map(ToString::to_string).collect();
        let mode = if mount.pass_through { ", the rest passed through in clear" } else { "" };
        line(format_args!(
            "origin      {} at {}: {}{mode}",
            mount.origin,
            mount.shield_path("/"),
            urls.join(", ")
        ));
    }
    for stream in &config.streams {
        let policy = &stream.policy;
        let time = match policy.rotation_interval {
            Some(interval) => format!("every {} min or ", interval.as_secs_f64() / 60.0),
            None => "every ".to_owned(),
        };
        line(format_args!(
            "stream      {} at {}: {}, a new key {time}{} segments, {} made ahead",
            stream.id,
            stream.playlist_path,
            policy.key_method.name(),
            policy.segments_per_key,
            policy.pre_generate_keys,
        ));
    }
    out
}
