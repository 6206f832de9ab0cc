//! Who wraps the data encryption keys, and how this node gets at it.
//!
//! One provider wraps, others may be held besides it, so that keys can go over from one to another. What belongs to a
//! provider that is neither is not looked at: a file may describe several. Its keys are known even where the provider is
//! not built in, so that one file serves every build.

#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(feature = "kms-azure")]
mod azure;
#[cfg(feature = "kms-gcp")]
mod gcp;
#[cfg(feature = "kms-vault")]
mod vault;

use std::path::PathBuf;
use std::time::Duration;

use super::ConfigError;
use super::checks::{YEAR_SECS, between, field, secs};
use super::raw::RawKms;
#[cfg(feature = "kms-aws")]
pub use aws::AwsConfig;
#[cfg(feature = "kms-azure")]
pub use azure::AzureConfig;
#[cfg(feature = "kms-gcp")]
pub use gcp::GcpConfig;
#[cfg(feature = "kms-vault")]
pub use vault::VaultConfig;

/// The providers that there are, as they are configured; each but the first is a feature, `kms-…`.
pub(super) const PROVIDERS: [&str; 5] = ["local", "aws", "azure", "gcp", "vault"];

/// Who wraps new keys, and who is held besides, each once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyringConfig {
    pub wraps: KmsConfig,
    pub also: Vec<KmsConfig>,
}

impl KeyringConfig {
    /// All that are held; the one that wraps is the first.
    pub fn held(&self) -> impl Iterator<Item = &KmsConfig> {
        std::iter::once(&self.wraps).chain(&self.also)
    }
}

/// One provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KmsConfig {
    Local {
        master_key_file: PathBuf,
    },
    #[cfg(feature = "kms-aws")]
    Aws(AwsConfig),
    #[cfg(feature = "kms-azure")]
    Azure(AzureConfig),
    #[cfg(feature = "kms-gcp")]
    Gcp(GcpConfig),
    #[cfg(feature = "kms-vault")]
    Vault(VaultConfig),
}

impl KmsConfig {
    /// As `kms.provider` and `kms.also` name it, its own section is called, and the IDs of its keys begin.
    pub fn provider(&self) -> &'static str {
        match self {
            KmsConfig::Local { .. } => "local",
            #[cfg(feature = "kms-aws")]
            KmsConfig::Aws(_) => "aws",
            #[cfg(feature = "kms-azure")]
            KmsConfig::Azure(_) => "azure",
            #[cfg(feature = "kms-gcp")]
            KmsConfig::Gcp(_) => "gcp",
            #[cfg(feature = "kms-vault")]
            KmsConfig::Vault(_) => "vault",
        }
    }
}

/// How data encryption keys are kept and renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DekConfig {
    /// So many are unwrapped in memory at most.
    pub max_unwrapped: usize,
    pub unwrapped_ttl: Duration,
    /// `None`: never by time.
    pub rotate_after: Option<Duration>,
}

pub(super) fn deks(raw: &RawKms) -> Result<DekConfig, ConfigError> {
    let days = between("kms.dek_rotation_days", raw.dek_rotation_days, 0..=3_660)?;
    Ok(DekConfig {
        max_unwrapped: between("kms.max_unwrapped", raw.max_unwrapped, 100..=10_000_000)?,
        unwrapped_ttl: secs("kms.unwrapped_ttl_secs", raw.unwrapped_ttl_secs, 1..=YEAR_SECS)?,
        rotate_after: (days > 0).then(|| Duration::from_secs(days * 86_400)),
    })
}

pub(super) fn keyring(raw: &RawKms) -> Result<KeyringConfig, ConfigError> {
    let wraps = kms("kms.provider", &raw.provider, raw)?;
    let mut also = Vec::with_capacity(raw.also.len());
    for (at, name) in raw.also.iter().enumerate() {
        if *name == raw.provider || raw.also[..at].contains(name) {
            let why = "is held already: kms.provider and kms.also name each provider once";
            return Err(field("kms.also", name, why));
        }
        also.push(kms("kms.also", name, raw)?);
    }
    Ok(KeyringConfig { wraps, also })
}

/// A provider by its name, which `named_by` gives.
fn kms(named_by: &str, name: &str, raw: &RawKms) -> Result<KmsConfig, ConfigError> {
    match name {
        "local" => Ok(KmsConfig::Local { master_key_file: raw.master_key_file.clone() }),
        #[cfg(feature = "kms-aws")]
        "aws" => aws::aws(&raw.aws).map(KmsConfig::Aws),
        #[cfg(feature = "kms-azure")]
        "azure" => azure::azure(&raw.azure).map(KmsConfig::Azure),
        #[cfg(feature = "kms-gcp")]
        "gcp" => gcp::gcp(&raw.gcp).map(KmsConfig::Gcp),
        #[cfg(feature = "kms-vault")]
        "vault" => vault::vault(&raw.vault).map(KmsConfig::Vault),
        known if PROVIDERS.contains(&known) => {
            let why = format!("this build is without it: build with the feature kms-{known}");
            Err(field(named_by, known, &why))
        }
        other => {
            let why = format!("this version wraps keys by one of: {}", PROVIDERS.join(", "));
            Err(field(named_by, other, &why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wraps(raw: &RawKms) -> Result<KmsConfig, ConfigError> {
        keyring(raw).map(|keyring| keyring.wraps)
    }

    #[test]
    fn how_keys_are_kept_has_its_bounds() {
        let default = deks(&RawKms::default()).unwrap();
        assert_eq!(default.rotate_after, Some(Duration::from_secs(90 * 86_400)));
        let never = deks(&RawKms { dek_rotation_days: 0, ..RawKms::default() }).unwrap();
        assert_eq!(never.rotate_after, None);
        for (raw, named) in [
            (RawKms { max_unwrapped: 10, ..RawKms::default() }, "kms.max_unwrapped"),
            (RawKms { unwrapped_ttl_secs: 0, ..RawKms::default() }, "kms.unwrapped_ttl_secs"),
            (RawKms { dek_rotation_days: 99_999, ..RawKms::default() }, "kms.dek_rotation_days"),
        ] {
            let error = deks(&raw).unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }

    #[test]
    fn a_provider_that_is_not_chosen_is_not_looked_at() {
        let mut raw = RawKms::default();
        raw.vault.address = "nowhere".into();
        raw.aws.endpoint = "nowhere".into();
        assert!(matches!(wraps(&raw), Ok(KmsConfig::Local { .. })));
        raw.provider = "abacus".into();
        let error = wraps(&raw).unwrap_err().to_string();
        assert!(error.contains("kms.provider") && error.contains(&PROVIDERS.join(", ")), "{error}");
    }

    #[test]
    fn a_provider_that_is_not_built_in_names_its_feature() {
        let built = [
            ("aws", cfg!(feature = "kms-aws")),
            ("azure", cfg!(feature = "kms-azure")),
            ("gcp", cfg!(feature = "kms-gcp")),
            ("vault", cfg!(feature = "kms-vault")),
        ];
        for (provider, is_built_in) in built {
            let mut raw = RawKms { provider: provider.into(), ..RawKms::default() };
            raw.vault.token = "t".into();
            raw.azure.vault = "video".into();
            raw.gcp.project = "video".into();
            match wraps(&raw) {
                Ok(kms) => assert!(is_built_in && kms.provider() == provider),
                Err(error) => {
                    let feature = format!("kms-{provider}");
                    assert!(!is_built_in && error.to_string().contains(&feature), "{error}");
                }
            }
        }
    }

    #[cfg(feature = "kms-vault")]
    #[test]
    fn others_are_held_besides_the_one_that_wraps_each_once_and_checked() {
        let with = |also: &[&str], token: &str| {
            let mut raw = RawKms::default();
            raw.vault.token = token.into();
            raw.also = also.iter().map(ToString::to_string).collect();
            keyring(&raw)
        };
        let held = with(&["vault"], "t").unwrap();
        assert!(
            matches!(held.wraps, KmsConfig::Local { .. }) && matches!(held.also[..], [KmsConfig::Vault(_)])
        );
        assert_eq!(held.held().count(), 2);
        let refused = |also: &[&str], token, why: &str| {
            let error = with(also, token).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&["local"], "t", "kms.also = \"local\"");
        refused(&["vault", "vault"], "t", "each provider once");
        refused(&["abacus"], "t", "kms.also");
        refused(&["vault"], "", "exactly one of");
    }
}
