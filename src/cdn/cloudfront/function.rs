//! The code at the edge: `edge/cloudfront/function.js` with its keys filled in, and the way it goes live.
//!
//! Its keys are derived ones and stand in the code, not in the store: see there for why. So the code is a secret, is sent
//! without a word in the log, and is compared with what is live before anything is changed.

use std::time::Duration;

use aws_sdk_cloudfront::error::ProvideErrorMetadata;
use aws_sdk_cloudfront::primitives::Blob;
use aws_sdk_cloudfront::types::{
    FunctionConfig, FunctionRuntime, FunctionStage, KeyValueStoreAssociation, KeyValueStoreAssociations,
};
use zeroize::Zeroizing;

use super::super::{CdnError, CdnFault};
use super::CloudFront;
use super::errors::Call;
use crate::keys::EdgeSecret;
use crate::rest::aws::quietly;

const SOURCE: &str = include_str!("../../../edge/cloudfront/function.js");

/// The longest function, in bytes (Quotas on CloudFront Functions).
const MAX_FUNCTION: usize = 10 << 10;

const GET: &str = "cloudfront:GetFunction";
const DESCRIBE: &str = "cloudfront:DescribeFunction";
const CREATE: &str = "cloudfront:CreateFunction";
const UPDATE: &str = "cloudfront:UpdateFunction";
const PUBLISH: &str = "cloudfront:PublishFunction";

/// What is filled in.
#[derive(Debug, Clone)]
pub struct CloudFrontEdgeCode {
    /// What stands before key IDs: `/api/hls/keys/`.
    pub key_path: String,
    /// For how long players may keep a key.
    pub key_max_age: Duration,
    /// Whose scripts may read answers; `*` for all.
    pub cors_origins: Vec<String>,
    pub secret: EdgeSecret,
    /// Whether keys are given to viewers with a token only.
    pub needs_token: bool,
}

impl CloudFrontEdgeCode {
    /// The function, which is a secret then.
    pub fn text(&self) -> Zeroizing<String> {
        let token = if self.needs_token { self.secret.token_key() } else { Zeroizing::default() };
        let (max_age, origins) = (self.key_max_age.as_secs().to_string(), self.cors_origins.join(","));
        let mut code = Zeroizing::new(SOURCE.to_owned());
        for (placeholder, value) in [
            ("__ENCRYPTION_KEY__", self.secret.encryption_key().as_str()),
            ("__MAC_KEY__", self.secret.mac_key().as_str()),
            ("__TOKEN_KEY__", token.as_str()),
            ("__KEY_PATH__", &self.key_path),
            ("__MAX_AGE__", &max_age),
            ("__CORS_ORIGINS__", &origins),
        ] {
            // Each stands between quotes.
            code = Zeroizing::new(code.replace(placeholder, &value.replace(['\'', '\\', '\n'], "")));
        }
        code
    }
}

impl CloudFront {
    /// Makes the code of a function what is given, associates it with the KeyValueStore, and publishes it; nothing, if it
    /// is live already. Says whether anything was changed.
    ///
    /// # Errors
    /// What CloudFront refuses, and code that is too long.
    pub async fn deploy(&self, function: &str, code: &str) -> Result<bool, CdnError> {
        if code.len() > MAX_FUNCTION {
            let what = format!("the function has {} bytes; CloudFront takes {MAX_FUNCTION}", code.len());
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        if self.is_live(function, code).await? {
            return Ok(false);
        }
        match self.version_of(function, FunctionStage::Development).await? {
            None => self.create_function(function, code).await?,
            Some((version, _)) => self.update_function(function, code, version).await?,
        }
        // UpdateFunction's own answer names it in a header (`ETtag`) that not everybody sends.
        let version =
            self.version_of(function, FunctionStage::Development).await?.and_then(|(version, _)| version);
        let resource = format!("function {function}");
        let request = self.clients().await.control.publish_function().name(function).set_if_match(version);
        request.send().await.map_err(|error| Call::new(PUBLISH, &resource).failed(&error))?;
        Ok(true)
    }

    async fn is_live(&self, function: &str, code: &str) -> Result<bool, CdnError> {
        let Some((_, stores)) = self.version_of(function, FunctionStage::Live).await? else {
            return Ok(false);
        };
        let resource = format!("function {function}");
        let request = self.clients().await.control.get_function().name(function);
        let got = quietly(request.stage(FunctionStage::Live).send()).await;
        let got = got.map_err(|error| Call::new(GET, &resource).failed(&error))?;
        let is_same = got.function_code.is_some_and(|live| live.as_ref() == code.as_bytes());
        Ok(is_same && stores == [self.settings.key_value_store_arn.as_str()])
    }

    /// A function's version and the stores that it reads; `None` if it is not there at this stage.
    async fn version_of(
        &self,
        function: &str,
        stage: FunctionStage,
    ) -> Result<Option<(Option<String>, Vec<String>)>, CdnError> {
        let resource = format!("function {function}");
        let request = self.clients().await.control.describe_function().name(function).stage(stage);
        let described = match request.send().await {
            Ok(described) => described,
            Err(error) if error.code() == Some("NoSuchFunctionExists") => return Ok(None),
            Err(error) => return Err(Call::new(DESCRIBE, &resource).failed(&error)),
        };
        let config = described.function_summary.and_then(|summary| summary.function_config);
        let stores = config.and_then(|config| config.key_value_store_associations);
        let stores =
            stores.map(|all| all.items().iter().map(|one| one.key_value_store_arn.clone()).collect());
        Ok(Some((described.e_tag, stores.unwrap_or_default())))
    }

    async fn create_function(&self, function: &str, code: &str) -> Result<(), CdnError> {
        let resource = format!("function {function}");
        let call = Call::new(CREATE, &resource);
        let request = self.clients().await.control.create_function().name(function);
        let request = request.function_config(self.function_config(&call)?);
        let made = quietly(request.function_code(Blob::new(code)).send()).await;
        made.map(drop).map_err(|error| call.failed(&error))
    }

    async fn update_function(
        &self,
        function: &str,
        code: &str,
        version: Option<String>,
    ) -> Result<(), CdnError> {
        let resource = format!("function {function}");
        let call = Call::new(UPDATE, &resource);
        let request = self.clients().await.control.update_function().name(function).set_if_match(version);
        let request = request.function_config(self.function_config(&call)?);
        let made = quietly(request.function_code(Blob::new(code)).send()).await;
        made.map(drop).map_err(|error| call.failed(&error))
    }

    fn function_config(&self, call: &Call<'_>) -> Result<FunctionConfig, CdnError> {
        let store = KeyValueStoreAssociation::builder();
        let store = store.key_value_store_arn(&self.settings.key_value_store_arn).build();
        let stores = KeyValueStoreAssociations::builder().quantity(1);
        let stores = stores.items(store.map_err(|_| call.incomplete())?).build();
        FunctionConfig::builder()
            .comment("keyshield: gives keys out of the KeyValueStore")
            .runtime(FunctionRuntime::CloudfrontJs20)
            .key_value_store_associations(stores.map_err(|_| call.incomplete())?)
            .build()
            .map_err(|_| call.incomplete())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_has_its_keys_and_the_secret_has_not_left() {
        let text = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
        let secret: EdgeSecret = text.parse().unwrap();
        for needs_token in [true, false] {
            let code = CloudFrontEdgeCode {
                key_path: "/api/hls/keys/".into(),
                key_max_age: Duration::from_secs(300),
                cors_origins: vec!["*".into()],
                secret: secret.clone(),
                needs_token,
            };
            let code = code.text();
            assert!(code.len() < MAX_FUNCTION, "{} bytes", code.len());
            assert!(!code.contains("__") && !code.contains(text));
            assert!(code.contains(secret.mac_key().as_str()) && code.contains("['/api/hls/keys/', "));
            assert_eq!(code.contains(secret.token_key().as_str()), needs_token);
        }
    }
}
