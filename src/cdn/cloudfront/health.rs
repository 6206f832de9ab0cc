//! Whether CloudFront lets this shield do its work. Changes nothing.
//!
//! Invalidating cannot be tried without paying for it; `keyshield cdn check` does.

use aws_sdk_cloudfront::types::{DistributionConfig, EventType, FunctionAssociations};

use super::super::{CdnError, CdnFault, DeliveryMode};
use super::CloudFront;
use super::errors::Call;

const GET_DISTRIBUTION: &str = "cloudfront:GetDistribution";
/// The header of the shield's tags.
const TAG_HEADER: &str = "cache-tag";

impl CloudFront {
    pub(super) async fn check_health(&self) -> Result<(), CdnError> {
        let config = self.distribution().await?.config;
        self.check_distribution(&config)?;
        if self.mode == DeliveryMode::Push {
            self.check_function(&config)?;
            self.store_version().await?;
        }
        match self.key_group() {
            Some(group) => group.check().await,
            None => Ok(()),
        }
    }

    pub(super) async fn distribution(&self) -> Result<Distribution, CdnError> {
        let id = &self.settings.distribution_id;
        let resource = format!("distribution {id}");
        let call = Call::new(GET_DISTRIBUTION, &resource);
        let got = self.clients().await.control.get_distribution().id(id).send().await;
        let found = got.map_err(|error| call.failed(&error))?.distribution;
        let found = found.ok_or_else(|| call.incomplete())?;
        let config = found.distribution_config.ok_or_else(|| call.incomplete())?;
        Ok(Distribution { is_deployed: found.status.eq_ignore_ascii_case("Deployed"), config })
    }

    fn check_distribution(&self, config: &DistributionConfig) -> Result<(), CdnError> {
        let id = &self.settings.distribution_id;
        if !config.enabled {
            return Err(CdnError::new(
                CdnFault::Invalid,
                format!("distribution {id} is disabled: enable it"),
            ));
        }
        let header = config.cache_tag_config.as_ref().map(|tags| tags.header_name.as_str());
        if self.settings.has_cache_tags && !header.is_some_and(|name| name.eq_ignore_ascii_case(TAG_HEADER)) {
            let has = header.map_or("none".to_owned(), |name| format!("{name:?}"));
            let what = format!(
                "distribution {id} reads cache tags from the header {has}; set its CacheTagConfig to Cache-Tag, or \
                 has_cache_tags = false"
            );
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        Ok(())
    }

    /// Whether some cache behaviour calls a function before the cache; which, is its operator's.
    fn check_function(&self, config: &DistributionConfig) -> Result<(), CdnError> {
        let others = config.cache_behaviors.as_ref().map(|all| all.items()).unwrap_or_default();
        let others = others.iter().map(|behaviour| behaviour.function_associations.as_ref());
        let default = config.default_cache_behavior.as_ref();
        let mut all = others.chain([default.and_then(|default| default.function_associations.as_ref())]);
        if all.any(|functions| functions.is_some_and(is_called)) {
            return Ok(());
        }
        let what = format!(
            "no cache behaviour of distribution {} calls a function at viewer-request; associate that of \
             edge/cloudfront/function.js with the behaviour of the key path",
            self.settings.distribution_id
        );
        Err(CdnError::new(CdnFault::Invalid, what))
    }
}

pub(super) struct Distribution {
    pub(super) is_deployed: bool,
    pub(super) config: DistributionConfig,
}

fn is_called(functions: &FunctionAssociations) -> bool {
    functions.items().iter().any(|function| function.event_type == EventType::ViewerRequest)
}
