//! What Google Cloud's KMS is called with: headers that hold a token, come by through Google's own library.
//!
//! The library keeps a token fresh by itself until it is told for good that there is none; then it never asks again.
//! So it is begun anew after a failure and after a refusal, and reads its files again: whoever mends them need not start
//! this node again.

use std::path::{Path, PathBuf};

use google_cloud_auth::credentials::{
    AccessTokenCredentials, Builder, CacheableResource, CredentialsProvider, external_account, impersonated,
    service_account, user_account,
};
use http::{Extensions, HeaderMap};
use serde_json::Value;
use tokio::sync::Mutex;
use zeroize::Zeroizing;

use super::super::Cause;
use crate::rest::said;

/// What a token is for, and no more than that.
const SCOPE: &str = "https://www.googleapis.com/auth/cloudkms";

pub(super) struct Session {
    /// Application Default Credentials where there is none.
    file: Option<PathBuf>,
    held: Mutex<Option<AccessTokenCredentials>>,
}

impl Session {
    pub(super) fn new(file: Option<PathBuf>) -> Self {
        Self { file, held: Mutex::default() }
    }

    /// The headers that a call is authorised by.
    pub(super) async fn headers(&self) -> Result<HeaderMap, Cause> {
        let credentials = {
            let mut held = self.held.lock().await;
            match &*held {
                Some(credentials) => credentials.clone(),
                None => held.insert(self.begin()?).clone(),
            }
        };
        match credentials.headers(Extensions::new()).await {
            Ok(CacheableResource::New { data, .. }) => Ok(data),
            // Only for who shows what it has, which we do not.
            Ok(CacheableResource::NotModified) => {
                Err(Cause::Unavailable("the library for credentials gives no token".into()))
            }
            Err(error) => {
                self.forget().await;
                let why = format!("no token from {}: {}", self.source(), said(&chain(&error)));
                Err(match error.is_transient() {
                    true => Cause::Unavailable(why),
                    false => Cause::Refused(format!("{why}; check that the account and its key exist")),
                })
            }
        }
    }

    /// What was refused is not tried again.
    pub(super) async fn forget(&self) {
        *self.held.lock().await = None;
    }

    fn source(&self) -> String {
        match &self.file {
            Some(path) => path.display().to_string(),
            None => "the Application Default Credentials".to_owned(),
        }
    }

    fn begin(&self) -> Result<AccessTokenCredentials, Cause> {
        let bad = |why: &dyn std::fmt::Display| {
            Cause::Refused(format!("no credentials from {}: {}", self.source(), said(&why.to_string())))
        };
        let Some(path) = &self.file else {
            let built = Builder::default().with_scopes([SCOPE]).build_access_token_credentials();
            return built.map_err(|error| bad(&chain(&error)));
        };
        let json = read(path).map_err(|error| bad(&error))?;
        // The kinds that Application Default Credentials come in.
        let built = match json["type"].as_str() {
            Some("service_account") => service_account::Builder::new(json)
                .with_access_specifier(service_account::AccessSpecifier::from_scopes([SCOPE]))
                .build_access_token_credentials(),
            Some("authorized_user") => {
                user_account::Builder::new(json).with_scopes([SCOPE]).build_access_token_credentials()
            }
            Some("external_account") => {
                external_account::Builder::new(json).with_scopes([SCOPE]).build_access_token_credentials()
            }
            Some("impersonated_service_account") => {
                impersonated::Builder::new(json).with_scopes([SCOPE]).build_access_token_credentials()
            }
            _ => {
                return Err(bad(
                    &"its type is none of service_account, authorized_user, external_account and \
                      impersonated_service_account",
                ));
            }
        };
        built.map_err(|error| bad(&chain(&error)))
    }
}

/// A small file, once a session: not worth a thread.
fn read(path: &Path) -> Result<Value, String> {
    let text = Zeroizing::new(std::fs::read(path).map_err(|error| error.to_string())?);
    // The parser's own error may quote what it stumbled over.
    serde_json::from_slice(&text).map_err(|_| "it is not JSON".to_owned())
}

/// What the library says, and what it was told: the reason is in one or the other.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}
