//! Who wraps the data encryption keys, and how this node gets at it.
//!
//! What belongs to a provider that is not chosen is not looked at: a file may describe several. Its keys are known even
//! where the provider is not built in, so that one file serves every build.

#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(feature = "kms-vault")]
mod vault;

use std::path::PathBuf;

use super::ConfigError;
use super::checks::field;
use super::raw::RawKms;
#[cfg(feature = "kms-aws")]
pub use aws::AwsConfig;
#[cfg(feature = "kms-vault")]
pub use vault::VaultConfig;

/// The providers that there are, as they are configured; each but the first is a feature, `kms-…`.
pub(super) const PROVIDERS: [&str; 3] = ["local", "aws", "vault"];

/// Who wraps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KmsConfig {
    Local {
        master_key_file: PathBuf,
    },
    #[cfg(feature = "kms-aws")]
    Aws(AwsConfig),
    #[cfg(feature = "kms-vault")]
    Vault(VaultConfig),
}

impl KmsConfig {
    /// As in `kms.provider`, and as the provider's own section is called.
    pub(super) fn provider(&self) -> &'static str {
        match self {
            KmsConfig::Local { .. } => "local",
            #[cfg(feature = "kms-aws")]
            KmsConfig::Aws(_) => "aws",
            #[cfg(feature = "kms-vault")]
            KmsConfig::Vault(_) => "vault",
        }
    }
}

pub(super) fn kms(raw: &RawKms) -> Result<KmsConfig, ConfigError> {
    match raw.provider.as_str() {
        "local" => Ok(KmsConfig::Local { master_key_file: raw.master_key_file.clone() }),
        #[cfg(feature = "kms-aws")]
        "aws" => aws::aws(&raw.aws).map(KmsConfig::Aws),
        #[cfg(feature = "kms-vault")]
        "vault" => vault::vault(&raw.vault).map(KmsConfig::Vault),
        known if PROVIDERS.contains(&known) => {
            let why = format!("this build is without it: build with the feature kms-{known}");
            Err(field("kms.provider", known, &why))
        }
        other => {
            let why = format!("this version wraps keys by one of: {}", PROVIDERS.join(", "));
            Err(field("kms.provider", other, &why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_that_is_not_chosen_is_not_looked_at() {
        let mut raw = RawKms::default();
        raw.vault.address = "nowhere".into();
        raw.aws.endpoint = "nowhere".into();
        assert!(matches!(kms(&raw), Ok(KmsConfig::Local { .. })));
        raw.provider = "abacus".into();
        let error = kms(&raw).unwrap_err().to_string();
        assert!(error.contains("kms.provider") && error.contains("local, aws, vault"), "{error}");
    }

    #[test]
    fn a_provider_that_is_not_built_in_names_its_feature() {
        let built = [("aws", cfg!(feature = "kms-aws")), ("vault", cfg!(feature = "kms-vault"))];
        for (provider, is_built_in) in built {
            let mut raw = RawKms { provider: provider.into(), ..RawKms::default() };
            raw.vault.token = "t".into();
            match kms(&raw) {
                Ok(kms) => assert!(is_built_in && kms.provider() == provider),
                Err(error) => {
                    let feature = format!("kms-{provider}");
                    assert!(!is_built_in && error.to_string().contains(&feature), "{error}");
                }
            }
        }
    }
}
