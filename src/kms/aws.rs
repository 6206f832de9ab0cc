//! AWS KMS, by its SDK.
//!
//! The context of a key goes along as encryption context, in words: CloudTrail shows it and policies can ask for it. What
//! was wrapped is stored with the ARN that KMS answers with and is opened under that, so that an alias may be pointed at
//! another key. The SDK's own attempts are off, because the [`super::Guard`] makes them; it resolves region and
//! credentials at the first call and not before, so that a node waits for them as it waits for the KMS.
//!
//! The SDK keeps requests and answers in buffers of its own, which are not zeroised.

mod arn;
mod errors;

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::{Region, SdkConfig};
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{DataKeySpec, KeyMetadata, KeyState, KeyUsageType};
use tokio::sync::OnceCell;
use zeroize::Zeroizing;

pub use self::arn::KeyArn;
pub(crate) use self::arn::{is_alias, is_key_id, is_label};
use super::{Cause, KeyDescription, Kms, KmsError, WrappedKey, named_by};
use crate::keys::{Context, DataEncryptionKey};
use crate::rest::aws::{self, quietly};

const PROVIDER: &str = "aws";

/// Where the key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsSettings {
    /// `None` for that of the key's ARN, or of the environment, the profile or the instance.
    pub region: Option<String>,
    /// An ID, an ARN, or `alias/…`.
    pub key: String,
    /// Instead of AWS's own for the region.
    pub endpoint: Option<String>,
}

/// One key of AWS KMS.
pub struct AwsKms {
    settings: AwsSettings,
    timeout: Duration,
    credentials: Option<SharedCredentialsProvider>,
    /// In the key's region; made at the first call.
    home: OnceCell<Home>,
}

struct Home {
    shared: SdkConfig,
    region: Region,
    client: Client,
}

impl fmt::Debug for AwsKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsKms").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl AwsKms {
    /// `timeout` is for connecting and for credentials; the [`super::Guard`] has one for the whole call.
    pub fn new(settings: AwsSettings, timeout: Duration) -> Self {
        Self { settings, timeout, credentials: None, home: OnceCell::new() }
    }

    /// Credentials instead of those that the SDK finds: environment, profile, web identity, container, instance.
    #[must_use]
    pub fn with_credentials(self, credentials: impl ProvideCredentials + 'static) -> Self {
        Self { credentials: Some(SharedCredentialsProvider::new(credentials)), ..self }
    }

    /// What errors call the key.
    pub fn key_name(&self) -> &str {
        &self.settings.key
    }

    fn failed(&self, key: &str, cause: Cause) -> KmsError {
        KmsError { provider: PROVIDER, key: key.to_owned(), cause }
    }

    /// What an answer without what was asked for is.
    fn incomplete(&self, operation: &str) -> KmsError {
        let why = format!("{operation}: an answer that is not KMS's; check kms.aws.endpoint");
        self.failed(&self.settings.key, Cause::Refused(why))
    }

    async fn home(&self) -> Result<&Home, KmsError> {
        self.home.get_or_try_init(|| self.settle()).await
    }

    async fn settle(&self) -> Result<Home, KmsError> {
        let mut loader = aws::loader(self.timeout);
        if let Some(credentials) = &self.credentials {
            loader = loader.credentials_provider(credentials.clone());
        }
        let of_the_key = self.settings.key.parse::<KeyArn>().ok().map(|arn| arn.region().to_owned());
        if let Some(region) = self.settings.region.clone().or(of_the_key) {
            loader = loader.region(Region::new(region));
        }
        let shared = loader.load().await;
        let Some(region) = shared.region().cloned() else {
            let why = "no region: give kms.aws.region, KMS_REGION or AWS_REGION";
            return Err(self.failed(&self.settings.key, Cause::Refused(why.into())));
        };
        let client = self.client(&shared, region.clone());
        Ok(Home { shared, region, client })
    }

    fn client(&self, shared: &SdkConfig, region: Region) -> Client {
        let mut config = aws_sdk_kms::config::Builder::from(shared).region(region);
        if let Some(endpoint) = &self.settings.endpoint {
            config = config.endpoint_url(endpoint);
        }
        Client::from_conf(config.build())
    }

    /// The key that wrapped, and a client where it is. A key of many regions is used in this shield's own, if that is the
    /// key that wraps here: the other region may be away.
    fn wrapped_by(&self, home: &Home, kek_id: &str) -> Result<(KeyArn, Client), KmsError> {
        let arn = named_by(PROVIDER, kek_id);
        let arn = arn.and_then(|arn| arn.parse::<KeyArn>().ok()).filter(|arn| arn.key_id().is_some());
        let arn = arn.ok_or_else(|| self.failed(kek_id, Cause::Foreign))?;
        let region = home.region.as_ref();
        if arn.region() == region {
            return Ok((arn, home.client.clone()));
        }
        let is_own = arn.key_id().is_some_and(|id| self.settings.key.ends_with(id));
        if let Some(here) = arn.in_region(region).filter(|_| is_own) {
            return Ok((here, home.client.clone()));
        }
        let client = self.client(&home.shared, Region::new(arn.region().to_owned()));
        Ok((arn, client))
    }

    /// The error of an operation on a key in a region.
    fn error<E>(&self, operation: &str, key: &str, region: &str, error: &SdkError<E>) -> KmsError
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let place = match &self.settings.endpoint {
            Some(endpoint) => format!("{endpoint} ({region})"),
            None => region.to_owned(),
        };
        self.failed(key, errors::cause(operation, key, &place, error))
    }

    /// How what was wrapped now names its key.
    fn kek_id(&self, operation: &str, answered: Option<String>) -> Result<String, KmsError> {
        let arn: Option<KeyArn> = answered.and_then(|arn| arn.parse().ok());
        let arn = arn.filter(|arn| arn.key_id().is_some()).ok_or_else(|| self.incomplete(operation))?;
        Ok(format!("{PROVIDER}:{arn}"))
    }

    fn key_of(&self, key: &str, plaintext: Option<Blob>) -> Result<DataEncryptionKey, KmsError> {
        let bytes = Zeroizing::new(plaintext.map(Blob::into_inner).unwrap_or_default());
        let fixed = <[u8; DataEncryptionKey::LEN]>::try_from(&bytes[..]);
        fixed.map(DataEncryptionKey::from_bytes).map_err(|_| {
            self.failed(key, Cause::Rejected("it holds no data encryption key of 256 bits".into()))
        })
    }

    /// Why a key that is there does not serve; `None` if it does.
    fn objection(&self, key: &KeyMetadata) -> Option<Cause> {
        let id = &self.settings.key;
        if key.key_usage().is_some_and(|usage| *usage != KeyUsageType::EncryptDecrypt)
            || key.key_spec().is_some_and(|spec| spec.as_str() != "SYMMETRIC_DEFAULT")
        {
            return Some(Cause::Refused("it is no symmetric key that encrypts and decrypts".into()));
        }
        match key.key_state()? {
            KeyState::Enabled => None,
            KeyState::Disabled => {
                Some(Cause::Refused(format!("it is disabled; run: aws kms enable-key --key-id {id}")))
            }
            KeyState::PendingDeletion => Some(Cause::Refused(format!(
                "it is pending deletion, and with it all it wrapped is lost; run: aws kms cancel-key-deletion \
                 --key-id {id}, and enable it"
            ))),
            KeyState::Creating | KeyState::Updating | KeyState::Unavailable => {
                let state = key.key_state().map_or("", KeyState::as_str);
                Some(Cause::Unavailable(format!("its state is {state}; check its key store")))
            }
            state => Some(Cause::Refused(format!("its state is {}", state.as_str()))),
        }
    }
}

fn encryption_context(context: &Context<'_>) -> HashMap<String, String> {
    let parts = context.named_parts().into_iter();
    parts.map(|(name, value)| (format!("keyshield:{name}"), value)).collect()
}

#[async_trait]
impl Kms for AwsKms {
    async fn generate_data_key(
        &self,
        context: &Context<'_>,
    ) -> Result<(DataEncryptionKey, WrappedKey), KmsError> {
        const OPERATION: &str = "GenerateDataKey";
        let (home, key) = (self.home().await?, &self.settings.key);
        let request = home.client.generate_data_key().key_id(key).key_spec(DataKeySpec::Aes256);
        let made = quietly(request.set_encryption_context(Some(encryption_context(context))).send()).await;
        let made = made.map_err(|error| self.error(OPERATION, key, home.region.as_ref(), &error))?;
        let plaintext = self.key_of(key, made.plaintext)?;
        let bytes = made.ciphertext_blob.ok_or_else(|| self.incomplete(OPERATION))?.into_inner();
        Ok((plaintext, WrappedKey { kek_id: self.kek_id(OPERATION, made.key_id)?, bytes }))
    }

    async fn wrap(&self, context: &Context<'_>, key: &DataEncryptionKey) -> Result<WrappedKey, KmsError> {
        const OPERATION: &str = "Encrypt";
        let home = self.home().await?;
        let request = home.client.encrypt().key_id(&self.settings.key).plaintext(Blob::new(key.expose()));
        let wrapped = quietly(request.set_encryption_context(Some(encryption_context(context))).send()).await;
        let wrapped = wrapped
            .map_err(|error| self.error(OPERATION, &self.settings.key, home.region.as_ref(), &error))?;
        let bytes = wrapped.ciphertext_blob.ok_or_else(|| self.incomplete(OPERATION))?.into_inner();
        Ok(WrappedKey { kek_id: self.kek_id(OPERATION, wrapped.key_id)?, bytes })
    }

    async fn unwrap(
        &self,
        context: &Context<'_>,
        wrapped: &WrappedKey,
    ) -> Result<DataEncryptionKey, KmsError> {
        let home = self.home().await?;
        let (arn, client) = self.wrapped_by(home, &wrapped.kek_id)?;
        let request = client.decrypt().key_id(arn.as_str()).ciphertext_blob(Blob::new(&wrapped.bytes[..]));
        let opened = quietly(request.set_encryption_context(Some(encryption_context(context))).send()).await;
        let opened = opened.map_err(|error| self.error("Decrypt", arn.as_str(), arn.region(), &error))?;
        self.key_of(arn.as_str(), opened.plaintext)
    }

    async fn describe(&self) -> Result<KeyDescription, KmsError> {
        const OPERATION: &str = "DescribeKey";
        let (home, key) = (self.home().await?, &self.settings.key);
        let described = home.client.describe_key().key_id(key).send().await;
        let described =
            described.map_err(|error| self.error(OPERATION, key, home.region.as_ref(), &error))?;
        let about = described.key_metadata.ok_or_else(|| self.incomplete(OPERATION))?;
        match self.objection(&about) {
            Some(cause) => Err(self.failed(key, cause)),
            None => Ok(KeyDescription { kek_id: self.kek_id(OPERATION, about.arn)?, version: None }),
        }
    }
}
