//! What each vendor needs to be told.

use super::super::ConfigError;
#[cfg(feature = "cdn-cloudfront")]
use super::super::checks::{YEAR_SECS, secs};
use super::super::checks::{between, entry, field, private_url};
#[cfg(feature = "cdn-cloudfront")]
use super::super::raw::RawCloudFront;
use super::super::raw::{RawCloudflare, RawCustom, RawFastly};
use super::{CdnVendor, Entry, KINDS};
#[cfg(feature = "cdn-cloudfront")]
use crate::cdn::{CloudFrontSettings, SignerSettings};
use crate::cdn::{CloudflareSettings, CustomSettings, DeliveryMode, FastlySettings};

impl Entry<'_> {
    pub(super) fn vendor(&self, mode: DeliveryMode) -> Result<CdnVendor, ConfigError> {
        match self.raw.kind.as_str() {
            #[cfg(feature = "cdn-cloudfront")]
            "cloudfront" => {
                self.cloudfront(self.table(self.raw.cloudfront.as_ref())?, mode).map(CdnVendor::CloudFront)
            }
            "cloudflare" => {
                self.cloudflare(self.table(self.raw.cloudflare.as_ref())?, mode).map(CdnVendor::Cloudflare)
            }
            "fastly" => self.fastly(self.table(self.raw.fastly.as_ref())?).map(CdnVendor::Fastly),
            "custom" => self.custom(self.table(self.raw.custom.as_ref())?).map(CdnVendor::Custom),
            known if KINDS.contains(&known) => {
                let why = format!("this build is without it: build with the feature cdn-{known}");
                Err(field(&self.at("kind"), known, &why))
            }
            other => {
                let why = format!("must be one of: {}", KINDS.join(", "));
                Err(field(&self.at("kind"), other, &why))
            }
        }
    }

    fn table<'t, T>(&self, given: Option<&'t T>) -> Result<&'t T, ConfigError> {
        let kind = &self.raw.kind;
        given.ok_or_else(|| entry(&self.at(kind), &format!("must be given: a table [cdns.{kind}]")))
    }

    fn cloudflare(&self, raw: &RawCloudflare, mode: DeliveryMode) -> Result<CloudflareSettings, ConfigError> {
        let Some(token) = self.token(&self.rules.cloudflare_api_token) else {
            let why = "must be given, or the variable CLOUDFLARE_API_TOKEN: an API token of Cloudflare";
            return Err(entry(&self.at("token_file"), why));
        };
        let namespace_id = self.stored_in("cloudflare.namespace_id", &raw.namespace_id, mode)?;
        // Workers KV is the account's, purging the zone's.
        let account_id = match (mode, raw.account_id.as_str()) {
            (DeliveryMode::Pull, "") => String::new(),
            (_, id) => self.id("cloudflare.account_id", id)?,
        };
        let purges = between(&self.at("cloudflare.purges_per_minute"), raw.purges_per_minute, 1..=60_000)?;
        Ok(CloudflareSettings {
            api_url: self.api_url("cloudflare.api_url", &raw.api_url)?,
            account_id,
            namespace_id,
            zone_id: self.id("cloudflare.zone_id", &raw.zone_id)?,
            purges_per_minute: purges,
            token,
            timeout: self.timeout,
        })
    }

    fn fastly(&self, raw: &RawFastly) -> Result<FastlySettings, ConfigError> {
        let Some(token) = self.token(&self.rules.fastly_api_token) else {
            let why = "must be given, or the variable FASTLY_API_TOKEN: an API token of Fastly";
            return Err(entry(&self.at("token_file"), why));
        };
        Ok(FastlySettings {
            api_url: self.api_url("fastly.api_url", &raw.api_url)?,
            service_id: self.id("fastly.service_id", &raw.service_id)?,
            // Push mode needs one, and `keyshield cdn deploy`, which makes it, needs this configuration.
            dictionary_id: match raw.dictionary_id.as_str() {
                "" => String::new(),
                id => self.id("fastly.dictionary_id", id)?,
            },
            token,
            timeout: self.timeout,
        })
    }

    fn custom(&self, raw: &RawCustom) -> Result<CustomSettings, ConfigError> {
        Ok(CustomSettings {
            api_url: self.api_url("custom.api_url", &raw.api_url)?,
            token: self.token(&self.rules.custom_token),
            ca_file: self.ca_file(),
            timeout: self.timeout,
        })
    }

    #[cfg(feature = "cdn-cloudfront")]
    fn cloudfront(&self, raw: &RawCloudFront, mode: DeliveryMode) -> Result<CloudFrontSettings, ConfigError> {
        if !self.raw.token_file.is_empty() {
            let why = "must be left out: credentials of AWS are those that its SDK finds";
            return Err(entry(&self.at("token_file"), why));
        }
        let endpoint = |name: &str, url: &str| match url {
            "" => Ok(None),
            url => self.api_url(name, url).map(Some),
        };
        Ok(CloudFrontSettings {
            distribution_id: self.id("cloudfront.distribution_id", &raw.distribution_id)?,
            key_value_store_arn: self.store_arn(&raw.key_value_store_arn, mode)?,
            has_cache_tags: raw.has_cache_tags,
            endpoint: endpoint("cloudfront.endpoint", &raw.endpoint)?,
            key_value_store_endpoint: endpoint(
                "cloudfront.key_value_store_endpoint",
                &raw.key_value_store_endpoint,
            )?,
            signer: self.signer(raw)?,
            timeout: self.timeout,
        })
    }

    /// `arn:aws:cloudfront::111122223333:key-value-store/8b2f…`
    #[cfg(feature = "cdn-cloudfront")]
    fn store_arn(&self, text: &str, mode: DeliveryMode) -> Result<String, ConfigError> {
        let parts: Vec<_> = text.splitn(6, ':').collect();
        let is_arn = matches!(parts[..], ["arn", _, "cloudfront", "", account, resource]
            if !account.is_empty()
                && resource.strip_prefix("key-value-store/").is_some_and(|id| !id.is_empty())
                && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":/-".contains(&byte)));
        match (text, mode) {
            ("", DeliveryMode::Pull) => Ok(String::new()),
            _ if is_arn => Ok(text.to_owned()),
            _ => {
                let why = "must be the ARN of a KeyValueStore, arn:aws:cloudfront::ACCOUNT:key-value-store/ID; \
                           pull mode needs none";
                Err(field(&self.at("cloudfront.key_value_store_arn"), text, why))
            }
        }
    }

    #[cfg(feature = "cdn-cloudfront")]
    fn signer(&self, raw: &RawCloudFront) -> Result<Option<SignerSettings>, ConfigError> {
        let life = secs(
            &self.at("cloudfront.signer_longest_life_secs"),
            raw.signer_longest_life_secs,
            60..=YEAR_SECS,
        )?;
        match (raw.signer_key_group_id.as_str(), raw.signer_directory.as_str()) {
            ("", "") => Ok(None),
            ("", _) => {
                let why = "must be given with signer_directory, or neither";
                Err(entry(&self.at("cloudfront.signer_key_group_id"), why))
            }
            (_, "") => {
                let why = "must be given with signer_key_group_id, or neither";
                Err(entry(&self.at("cloudfront.signer_directory"), why))
            }
            (group, directory) => Ok(Some(SignerSettings {
                // It is of letters, digits and dashes, as UUIDs are.
                key_group_id: self.dashed_id("cloudfront.signer_key_group_id", group)?,
                directory: directory.into(),
                longest_life: life,
            })),
        }
    }

    /// What push mode stores keys in; pull mode needs none.
    fn stored_in(&self, name: &str, id: &str, mode: DeliveryMode) -> Result<String, ConfigError> {
        match (mode, id) {
            (DeliveryMode::Pull, "") => Ok(String::new()),
            (DeliveryMode::Push, "") => {
                Err(entry(&self.at(name), "must be given in push mode: keys are stored there"))
            }
            (_, id) => self.id(name, id),
        }
    }

    /// It goes into a URL's path as it is.
    fn id(&self, name: &str, text: &str) -> Result<String, ConfigError> {
        match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            true => Ok(text.to_owned()),
            false => Err(field(&self.at(name), text, "must be an ID of letters and digits")),
        }
    }

    #[cfg(feature = "cdn-cloudfront")]
    fn dashed_id(&self, name: &str, text: &str) -> Result<String, ConfigError> {
        match text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            true => Ok(text.to_owned()),
            false => Err(field(&self.at(name), text, "must be an ID of letters, digits and -")),
        }
    }

    /// Where keys and tokens are sent to.
    fn api_url(&self, name: &str, text: &str) -> Result<String, ConfigError> {
        private_url(&self.at(name), text).map(|url| url.trim_end_matches('/').to_owned())
    }
}
