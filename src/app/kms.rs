//! Which KMS wraps: the choice between those that are built in.

use std::sync::Arc;

use crate::config::KmsConfig;
use crate::kms::{Kms, LocalKms};

/// A provider; `wraps`: for new keys, and not only held besides.
///
/// # Errors
/// A master key file that cannot be used, or a file of authorities that cannot. That nobody answers is no error here.
pub(super) fn kms(config: &KmsConfig, wraps: bool) -> anyhow::Result<Arc<dyn Kms>> {
    match config {
        KmsConfig::Local { master_key_file } if wraps => Ok(Arc::new(LocalKms::open(master_key_file)?)),
        KmsConfig::Local { master_key_file } => Ok(Arc::new(LocalKms::read(master_key_file)?)),
        #[cfg(feature = "kms-aws")]
        KmsConfig::Aws(aws) => {
            let kms = crate::kms::AwsKms::new(aws.settings.clone(), aws.limits.timeout);
            let key = kms.key_name().to_owned();
            Ok(Arc::new(crate::kms::Guard::new(kms, "aws", key, aws.limits)))
        }
        #[cfg(feature = "kms-azure")]
        KmsConfig::Azure(azure) => {
            let kms = crate::kms::AzureKms::new(azure.settings.clone(), azure.limits.timeout)?;
            let key = kms.key_name();
            Ok(Arc::new(crate::kms::Guard::new(kms, "azure", key, azure.limits)))
        }
        #[cfg(feature = "kms-gcp")]
        KmsConfig::Gcp(gcp) => {
            let kms = crate::kms::GcpKms::new(gcp.settings.clone(), gcp.limits.timeout)?;
            let key = kms.key_name().to_owned();
            Ok(Arc::new(crate::kms::Guard::new(kms, "gcp", key, gcp.limits)))
        }
        #[cfg(feature = "kms-vault")]
        KmsConfig::Vault(vault) => {
            let kms = crate::kms::VaultKms::new(vault.settings.clone(), vault.limits.timeout)?;
            let key = kms.key_name();
            Ok(Arc::new(crate::kms::Guard::new(kms, "vault", key, vault.limits)))
        }
    }
}
