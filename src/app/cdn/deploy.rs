//! `keyshield cdn deploy`: the code of the edge, brought to the vendors that take it by their API.
//!
//! Deliberately absent: routes, domains and cache rules, which are the operator's; and Cloudflare, whose own tool deploys
//! a worker with its routes and bindings (docs/cdn-cloudflare.md).

use anyhow::bail;

use super::{edge, find, key_path, secret_of};
use crate::cdn::{DeliveryMode, Fastly, FastlyEdgeCode, FastlySettings};
use crate::config::{CdnConfig, CdnVendor, Config};

/// Deploys; says what was done, and what is left to do.
///
/// # Errors
/// A kind whose code is deployed by other means, a CDN without an edge secret, what the vendor refuses.
pub(super) async fn deploy(
    config: &Config,
    name: &str,
    #[cfg_attr(not(feature = "cdn-cloudfront"), expect(unused_variables, reason = "CloudFront's"))]
    function: &str,
    needs_token: bool,
) -> anyhow::Result<String> {
    let cdn = find(config, name)?;
    match &cdn.vendor {
        CdnVendor::Fastly(settings) => fastly(config, cdn, settings, needs_token).await,
        #[cfg(feature = "cdn-cloudfront")]
        CdnVendor::CloudFront(settings) => {
            if settings.key_value_store_arn.is_empty() {
                bail!("CDN {name} has no key_value_store_arn: the function needs the store that it reads");
            }
            let front = super::cloudfront(config, cdn)?;
            let code = crate::cdn::CloudFrontEdgeCode {
                key_path: key_path(&config.key_uri_base),
                key_max_age: config.key_max_age,
                cors_origins: config.cors_origins.clone(),
                secret: secret_of(cdn)?,
                needs_token,
            };
            let what = match front.deploy(function, &code.text()).await? {
                true => "is published",
                false => "was there already",
            };
            Ok(format!(
                "the function {function} {what}; associate it with the cache behaviour of key URIs, at viewer-request\n"
            ))
        }
        CdnVendor::Cloudflare(_) => bail!("a worker is deployed by wrangler: see docs/cdn-cloudflare.md"),
        CdnVendor::Custom(_) => bail!("CDN {name} has its own edge: see docs/cdn-custom.md"),
    }
}

/// In pull mode, the rule alone that keeps out of caches what must not be there.
async fn fastly(
    config: &Config,
    cdn: &CdnConfig,
    settings: &FastlySettings,
    needs_token: bool,
) -> anyhow::Result<String> {
    let edge = edge(config, &cdn.edge_url, cdn.ca_file.clone(), cdn.mode)?;
    let fastly = Fastly::new(settings.clone(), cdn.mode, edge)?;
    let code = match cdn.mode {
        DeliveryMode::Pull => None,
        DeliveryMode::Push => Some(FastlyEdgeCode {
            key_path: key_path(&config.key_uri_base),
            key_max_age: config.key_max_age,
            cors_origins: config.cors_origins.clone(),
            secret: secret_of(cdn)?,
            needs_token,
        }),
    };
    let deployed = fastly.deploy(code.as_ref()).await?;
    let what = if deployed.is_new { "is active now" } else { "had all of it already" };
    let mut text = format!("version {} of service {} {what}\n", deployed.version, settings.service_id);
    if let Some(id) = deployed.dictionary_id.filter(|id| *id != settings.dictionary_id) {
        text.push_str(&format!(
            "keys belong into its dictionary: set dictionary_id = \"{id}\" in [cdns.fastly]\n"
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawConfig;

    #[tokio::test]
    async fn who_deploys_by_other_means_is_told_which() {
        let text = format!(
            "[cdn]\nedge_secret = \"{}\"\ncloudflare_api_token = \"t\"\n\
             [[cdns]]\nname = \"a\"\nkind = \"custom\"\nedge_url = \"https://a.example\"\n\
             [cdns.custom]\napi_url = \"https://api.example\"\n\
             [[cdns]]\nname = \"b\"\nkind = \"cloudflare\"\nedge_url = \"https://b.example\"\n\
             [cdns.cloudflare]\nzone_id = \"0a\"\n",
            "0f".repeat(32)
        );
        let raw: RawConfig = toml::from_str(&text).unwrap();
        let config = Config::checked(&raw).unwrap();
        for (name, part) in [("a", "docs/cdn-custom.md"), ("b", "wrangler"), ("c", "no CDN \"c\"")] {
            let error = deploy(&config, name, "f", false).await.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
