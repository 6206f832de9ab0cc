//! A key of Google Cloud KMS.

use std::path::PathBuf;

use super::super::ConfigError;
use super::super::checks::{between, entry, field, private_url, secs};
use super::super::raw::RawGcp;
use crate::kms::{GcpSettings, Limits};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcpConfig {
    pub settings: GcpSettings,
    pub limits: Limits,
}

pub(super) fn gcp(raw: &RawGcp) -> Result<GcpConfig, ConfigError> {
    if raw.project.is_empty() {
        return Err(entry("kms.gcp.project", "must be given, here or as GOOGLE_CLOUD_PROJECT"));
    }
    // A project may belong to a domain: example.com:video.
    part("kms.gcp.project", &raw.project.replacen(':', ".", 1))?;
    let settings = GcpSettings {
        // The token goes there, and keys.
        endpoint: private_url("kms.gcp.endpoint", &raw.endpoint)?,
        project: raw.project.clone(),
        location: part("kms.gcp.location", &raw.location)?,
        key_ring: part("kms.gcp.key_ring", &raw.key_ring)?,
        key: part("kms.gcp.key", &raw.key)?,
        credentials_file: (!raw.credentials_file.is_empty()).then(|| PathBuf::from(&raw.credentials_file)),
    };
    let limits = Limits {
        timeout: secs("kms.gcp.timeout_secs", raw.timeout_secs, 1..=60)?,
        max_concurrent: between("kms.gcp.max_concurrent", raw.max_concurrent, 1..=1_024)?,
    };
    Ok(GcpConfig { settings, limits })
}

/// A name that goes into a URL's path as it is.
fn part(name: &str, text: &str) -> Result<String, ConfigError> {
    let is_plain = text.bytes().any(|byte| byte.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    match is_plain {
        true => Ok(text.to_owned()),
        false => Err(field(name, text, "must be the name alone, of letters, digits, - and _")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(change: impl FnOnce(&mut RawGcp)) -> RawGcp {
        let mut raw = RawGcp { project: "example.com:video".into(), ..RawGcp::default() };
        change(&mut raw);
        raw
    }

    fn refused(change: impl FnOnce(&mut RawGcp), named: &str) {
        let error = gcp(&raw(change)).unwrap_err().to_string();
        assert!(error.starts_with(named), "{error}");
    }

    #[test]
    fn a_key_is_named_by_its_parts() {
        let config = gcp(&raw(|_| {})).unwrap();
        let name = "projects/example.com:video/locations/global/keyRings/keyshield/cryptoKeys/keyshield";
        assert_eq!(config.settings.key_name(), name);
    }

    #[test]
    fn what_goes_into_a_request_is_checked() {
        refused(|gcp| gcp.project.clear(), "kms.gcp.project: must be given, here or as GOOGLE_CLOUD_PROJECT");
        refused(|gcp| gcp.project = "a/b".into(), "kms.gcp.project");
        refused(|gcp| gcp.location = "..".into(), "kms.gcp.location");
        refused(|gcp| gcp.key_ring = "r?x".into(), "kms.gcp.key_ring");
        refused(|gcp| gcp.key = "projects/p/locations/l".into(), "kms.gcp.key");
        refused(|gcp| gcp.endpoint = "http://kms.example".into(), "kms.gcp.endpoint");
        refused(|gcp| gcp.timeout_secs = 0, "kms.gcp.timeout_secs");
        refused(|gcp| gcp.max_concurrent = 0, "kms.gcp.max_concurrent");
    }
}
