//! What the layers say about CDNs. The tables of vendors are there only where they were given: an entry is of one kind.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::super::secrets::masked_url;

/// `[cdn]`
#[derive(Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCdnRules {
    pub sync_timeout_millis: u64,
    pub retry_attempts: u32,
    pub endpoints: Vec<String>,
    pub edge_secret: String,
    pub cloudflare_api_token: String,
    pub fastly_api_token: String,
    pub custom_token: String,
}

impl Default for RawCdnRules {
    fn default() -> Self {
        Self {
            sync_timeout_millis: 30_000,
            retry_attempts: 3,
            endpoints: Vec::new(),
            edge_secret: String::new(),
            cloudflare_api_token: String::new(),
            fastly_api_token: String::new(),
            custom_token: String::new(),
        }
    }
}

impl fmt::Debug for RawCdnRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // All but the secret and the tokens.
        f.debug_struct("RawCdnRules")
            .field("sync_timeout_millis", &self.sync_timeout_millis)
            .field("retry_attempts", &self.retry_attempts)
            .field("endpoints", &self.endpoints.iter().map(|url| masked_url(url)).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

/// `[[cdns]]`
#[derive(Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCdn {
    pub name: String,
    pub kind: String,
    pub mode: String,
    pub edge_url: String,
    pub edge_secret_file: String,
    pub token_file: String,
    pub ca_file: String,
    pub cloudflare: Option<RawCloudflare>,
    pub cloudfront: Option<RawCloudFront>,
    pub fastly: Option<RawFastly>,
    pub custom: Option<RawCustom>,
}

impl Default for RawCdn {
    fn default() -> Self {
        Self {
            name: String::new(),
            kind: String::new(),
            mode: "pull".into(),
            edge_url: String::new(),
            edge_secret_file: String::new(),
            token_file: String::new(),
            ca_file: String::new(),
            cloudflare: None,
            cloudfront: None,
            fastly: None,
            custom: None,
        }
    }
}

impl RawCdn {
    /// Every table given, for the schema.
    pub(in super::super) fn everything() -> Self {
        Self {
            cloudflare: Some(RawCloudflare::default()),
            cloudfront: Some(RawCloudFront::default()),
            fastly: Some(RawFastly::default()),
            custom: Some(RawCustom::default()),
            ..Self::default()
        }
    }
}

impl fmt::Debug for RawCdn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawCdn")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("mode", &self.mode)
            .field("edge_url", &masked_url(&self.edge_url))
            .field("edge_secret_file", &self.edge_secret_file)
            .field("token_file", &self.token_file)
            .field("ca_file", &self.ca_file)
            .field("cloudflare", &self.cloudflare)
            .field("cloudfront", &self.cloudfront)
            .field("fastly", &self.fastly)
            .field("custom", &self.custom)
            .finish()
    }
}

/// `[cdns.cloudflare]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCloudflare {
    pub account_id: String,
    pub namespace_id: String,
    pub zone_id: String,
    pub purges_per_minute: u32,
    pub api_url: String,
}

impl Default for RawCloudflare {
    fn default() -> Self {
        Self {
            account_id: String::new(),
            namespace_id: String::new(),
            zone_id: String::new(),
            purges_per_minute: 5,
            api_url: "https://api.cloudflare.com/client/v4".into(),
        }
    }
}

/// `[cdns.cloudfront]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCloudFront {
    pub distribution_id: String,
    pub key_value_store_arn: String,
    pub has_cache_tags: bool,
    pub endpoint: String,
    pub key_value_store_endpoint: String,
    pub signer_key_group_id: String,
    pub signer_directory: String,
    pub signer_longest_life_secs: u64,
}

impl Default for RawCloudFront {
    fn default() -> Self {
        Self {
            distribution_id: String::new(),
            key_value_store_arn: String::new(),
            has_cache_tags: false,
            endpoint: String::new(),
            key_value_store_endpoint: String::new(),
            signer_key_group_id: String::new(),
            signer_directory: String::new(),
            signer_longest_life_secs: 86_400,
        }
    }
}

/// `[cdns.fastly]`
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawFastly {
    pub service_id: String,
    pub dictionary_id: String,
    pub api_url: String,
}

impl Default for RawFastly {
    fn default() -> Self {
        Self {
            service_id: String::new(),
            dictionary_id: String::new(),
            api_url: "https://api.fastly.com".into(),
        }
    }
}

/// `[cdns.custom]`
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCustom {
    pub api_url: String,
}
