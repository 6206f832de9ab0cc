//! The SDK's clients of CloudFront's two APIs.
//!
//! Both are global and have one region to sign for. KeyValueStore puts the account before the host of its endpoint; where
//! one is configured, it is taken as it is written, so that it may be a loopback address or a private endpoint.

use aws_config::timeout::TimeoutConfig;
use aws_config::{Region, SdkConfig};
use aws_credential_types::provider::SharedCredentialsProvider;
use aws_sdk_cloudfrontkeyvaluestore::config::endpoint::{
    DefaultResolver, EndpointFuture, Params, ResolveEndpoint,
};

use super::CloudFrontSettings;
use crate::rest::aws;

/// Where CloudFront's API is signed for, wherever the caller is.
const REGION: Region = Region::from_static("us-east-1");

pub(super) struct Clients {
    pub(super) control: aws_sdk_cloudfront::Client,
    pub(super) store: aws_sdk_cloudfrontkeyvaluestore::Client,
}

impl Clients {
    pub(super) async fn settle(
        settings: &CloudFrontSettings,
        credentials: Option<SharedCredentialsProvider>,
    ) -> Self {
        let loader = || aws::loader(settings.timeout);
        let shared = match credentials {
            Some(credentials) => loader().credentials_provider(credentials).region(REGION).load().await,
            // STS is asked for credentials in the region of this machine, as SigV4A wants it; where none is known, there.
            None => match loader().load().await {
                shared if shared.region().is_some() => shared,
                _ => loader().region(REGION).load().await,
            },
        };
        Self { control: control(settings, &shared), store: store(settings, &shared) }
    }
}

fn times(settings: &CloudFrontSettings) -> TimeoutConfig {
    TimeoutConfig::builder().connect_timeout(settings.timeout).operation_timeout(settings.timeout).build()
}

fn control(settings: &CloudFrontSettings, shared: &SdkConfig) -> aws_sdk_cloudfront::Client {
    let config = aws_sdk_cloudfront::config::Builder::from(shared).region(REGION);
    let mut config = config.timeout_config(times(settings));
    if let Some(endpoint) = &settings.endpoint {
        config = config.endpoint_url(endpoint);
    }
    aws_sdk_cloudfront::Client::from_conf(config.build())
}

fn store(settings: &CloudFrontSettings, shared: &SdkConfig) -> aws_sdk_cloudfrontkeyvaluestore::Client {
    let config = aws_sdk_cloudfrontkeyvaluestore::config::Builder::from(shared).region(REGION);
    let mut config = config.timeout_config(times(settings));
    if let Some(endpoint) = &settings.key_value_store_endpoint {
        config = config.endpoint_resolver(Literal(endpoint.clone()));
    }
    aws_sdk_cloudfrontkeyvaluestore::Client::from_conf(config.build())
}

/// What the SDK would do, but at this URL.
#[derive(Debug)]
struct Literal(String);

impl ResolveEndpoint for Literal {
    fn resolve_endpoint<'a>(&'a self, params: &'a Params) -> EndpointFuture<'a> {
        EndpointFuture::new(async move {
            // For the account's checks of the ARN and the kind of signature.
            let resolved = ResolveEndpoint::resolve_endpoint(&DefaultResolver::new(), params).await?;
            Ok(resolved.into_builder().url(self.0.trim_end_matches('/').to_owned()).build())
        })
    }
}
