//! A key of Azure Key Vault or Managed HSM.

use std::path::PathBuf;

use url::Url;

use super::super::ConfigError;
use super::super::checks::{between, entry, field, secs};
use super::super::raw::RawAzure;
use crate::kms::{AzureIdentity, AzureSettings, Limits, Secret};

/// The domains of vaults, and who gives tokens for them. A token is for the domain.
const CLOUDS: [(&str, &str); 6] = [
    ("vault.azure.net", "https://login.microsoftonline.com"),
    ("managedhsm.azure.net", "https://login.microsoftonline.com"),
    ("vault.azure.cn", "https://login.chinacloudapi.cn"),
    ("managedhsm.azure.cn", "https://login.chinacloudapi.cn"),
    ("vault.usgovcloudapi.net", "https://login.microsoftonline.us"),
    ("managedhsm.usgovcloudapi.net", "https://login.microsoftonline.us"),
];

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AzureConfig {
    pub settings: AzureSettings,
    pub limits: Limits,
}

pub(super) fn azure(raw: &RawAzure) -> Result<AzureConfig, ConfigError> {
    let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let vault = vault(&raw.vault)?;
    if raw.key.is_empty() || !raw.key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        let why = "must be the key's name alone, of letters, digits and -: the newest version wraps";
        return Err(field("kms.azure.key", &raw.key, why));
    }
    let host = vault.host_str().unwrap_or_default();
    let cloud = CLOUDS.iter().find(|(domain, _)| host.ends_with(&format!(".{domain}")));
    let resource = match (given(&raw.resource), cloud) {
        (Some(resource), _) => https("kms.azure.resource", &resource).map(|_| resource)?,
        (None, Some((domain, _))) => format!("https://{domain}"),
        (None, None) => {
            let why = "must be given for a vault of this domain, such as https://vault.azure.net";
            return Err(entry("kms.azure.resource", why));
        }
    };
    let authority = match given(&raw.authority_host) {
        Some(host) => Some(https("kms.azure.authority_host", &host)?.to_string()),
        None => cloud.map(|(_, authority)| (*authority).to_owned()),
    };
    let settings = AzureSettings {
        key: raw.key.clone(),
        resource,
        identity: identity(raw)?,
        authority,
        ca_file: given(&raw.ca_file).map(PathBuf::from),
        vault,
    };
    let limits = Limits {
        timeout: secs("kms.azure.timeout_secs", raw.timeout_secs, 1..=60)?,
        max_concurrent: between("kms.azure.max_concurrent", raw.max_concurrent, 1..=1_024)?,
    };
    Ok(AzureConfig { settings, limits })
}

/// A secret goes before a token file: the file is there for every program of a pod.
fn identity(raw: &RawAzure) -> Result<AzureIdentity, ConfigError> {
    let id = |name: &str, text: &str| {
        let is_id = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        match !text.is_empty() && text.bytes().all(is_id) {
            true => Ok(text.to_owned()),
            false => {
                let why = "must be an ID, here or as AZURE_TENANT_ID and AZURE_CLIENT_ID";
                Err(field(&format!("kms.azure.{name}"), text, why))
            }
        }
    };
    if !raw.client_secret.is_empty() {
        let (tenant_id, client_id) = (id("tenant_id", &raw.tenant_id)?, id("client_id", &raw.client_id)?);
        let secret = Secret::new(raw.client_secret.clone());
        return Ok(AzureIdentity::ClientSecret { tenant_id, client_id, secret });
    }
    if !raw.federated_token_file.is_empty() {
        let (tenant_id, client_id) = (id("tenant_id", &raw.tenant_id)?, id("client_id", &raw.client_id)?);
        let token_file = PathBuf::from(&raw.federated_token_file);
        return Ok(AzureIdentity::Workload { tenant_id, client_id, token_file });
    }
    let client_id = match raw.client_id.as_str() {
        "" => None,
        text => Some(id("client_id", text)?),
    };
    Ok(AzureIdentity::Managed { client_id })
}

/// A vault's URL, of which its name is enough in Azure's public cloud.
fn vault(text: &str) -> Result<Url, ConfigError> {
    let is_name = (3..=24).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    let url = match is_name {
        true => https("kms.azure.vault", &format!("https://{text}.vault.azure.net"))?,
        false => https("kms.azure.vault", text)?,
    };
    Ok(url)
}

/// A host alone, to which tokens and keys may go.
fn https(name: &str, text: &str) -> Result<Url, ConfigError> {
    let bad = || field(name, text, "must be https:// and a host, with nothing behind it");
    let url = Url::parse(text).map_err(|_| bad())?;
    let is_host = url.scheme() == "https"
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none()
        && url.username().is_empty()
        && url.password().is_none();
    if is_host { Ok(url) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(change: impl FnOnce(&mut RawAzure)) -> RawAzure {
        let mut raw = RawAzure { vault: "video".into(), ..RawAzure::default() };
        change(&mut raw);
        raw
    }

    fn settings(change: impl FnOnce(&mut RawAzure)) -> AzureSettings {
        azure(&raw(change)).unwrap().settings
    }

    fn refused(change: impl FnOnce(&mut RawAzure), named: &str) {
        let error = azure(&raw(change)).unwrap_err().to_string();
        assert!(error.starts_with(named) && !error.contains("sesame"), "{error}");
    }

    #[test]
    fn a_vault_is_named_or_addressed_and_its_domain_says_who_gives_tokens() {
        let named = settings(|_| {});
        assert_eq!(named.key_name(), "https://video.vault.azure.net/keys/keyshield");
        assert_eq!(named.resource, "https://vault.azure.net");
        let american = settings(|azure| azure.vault = "https://v.managedhsm.usgovcloudapi.net/".into());
        assert_eq!(american.resource, "https://managedhsm.usgovcloudapi.net");
        assert_eq!(american.authority.as_deref(), Some("https://login.microsoftonline.us"));
        refused(|azure| azure.vault = "https://vault.example".into(), "kms.azure.resource");
        let elsewhere = settings(|azure| {
            azure.vault = "https://vault.example".into();
            azure.resource = "https://kms.example".into();
            azure.authority_host = "https://login.example".into();
        });
        assert_eq!(elsewhere.authority.as_deref(), Some("https://login.example/"));
    }

    #[test]
    fn an_identity_is_a_secret_a_token_file_or_the_machines() {
        assert_eq!(settings(|_| {}).identity, AzureIdentity::Managed { client_id: None });
        let pod = |azure: &mut RawAzure| {
            azure.tenant_id = "t-1".into();
            azure.client_id = "c-1".into();
            azure.federated_token_file = "/var/run/token".into();
        };
        assert!(matches!(settings(pod).identity, AzureIdentity::Workload { .. }));
        let application = |azure: &mut RawAzure| {
            pod(azure);
            azure.client_secret = "sesame".into();
        };
        assert!(matches!(settings(application).identity, AzureIdentity::ClientSecret { .. }));
        let shown = format!("{:?} {:?}", settings(application), raw(application));
        assert!(!shown.contains("sesame"), "{shown}");
        refused(
            |azure| {
                application(azure);
                azure.tenant_id.clear();
            },
            "kms.azure.tenant_id",
        );
    }

    #[test]
    fn what_goes_into_a_request_is_checked() {
        refused(|azure| azure.vault.clear(), "kms.azure.vault");
        refused(|azure| azure.vault = "http://video.vault.azure.net".into(), "kms.azure.vault");
        refused(|azure| azure.vault = "https://video.vault.azure.net/keys/k".into(), "kms.azure.vault");
        refused(|azure| azure.key = "k/0f3c".into(), "kms.azure.key");
        refused(|azure| azure.authority_host = "http://login.example".into(), "kms.azure.authority_host");
        refused(|azure| azure.timeout_secs = 0, "kms.azure.timeout_secs");
        refused(|azure| azure.max_concurrent = 0, "kms.azure.max_concurrent");
    }
}
