//! What all who call AWS by its SDK share: a slim HTTP client, no attempts of the SDK's own, credentials from where the
//! SDK finds them, and the words for those that it does not find.
//!
//! Attempts are the caller's, who knows what they cost. Region and credentials are resolved at the first call and not
//! before, so that a node waits for them as it waits for the service. Deliberately absent: any one service.

use std::error::Error;
use std::time::Duration;

use aws_config::identity::IdentityCache;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{AppName, BehaviorVersion, ConfigLoader};
use aws_credential_types::provider::error::CredentialsError;
use aws_smithy_http_client::tls;
use tracing::instrument::WithSubscriber;
use tracing::subscriber::NoSubscriber;

use super::{deepest, said};

/// What to look at when there are no credentials.
const CHECK: &str = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the role of this pod, task or \
    instance";

/// `timeout` is for connecting and for credentials; who calls has one for the whole call.
pub(crate) fn loader(timeout: Duration) -> ConfigLoader {
    let ring = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
    let http = aws_smithy_http_client::Builder::new().tls_provider(ring).build_https();
    // A little less than a call has, so that an error can say that it was the credentials.
    let identities = IdentityCache::lazy().load_timeout(timeout.mul_f64(0.8)).build();
    let loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http)
        .identity_cache(identities)
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(timeout).build());
    match AppName::new("keyshield") {
        Ok(name) => loader.app_name(name),
        Err(_) => loader,
    }
}

/// Makes a call with nothing logged: at some levels the SDK logs what it sends.
pub(crate) async fn quietly<T>(sent: impl Future<Output = T>) -> T {
    sent.with_subscriber(NoSubscriber::new()).await
}

/// Why there are no credentials.
pub(crate) struct NoCredentials {
    /// A service or an endpoint that gives credentials may answer a moment later; where there is none, nobody does.
    pub may_come: bool,
    pub why: String,
}

/// What in an error is about credentials, if anything is.
pub(crate) fn no_credentials(error: &(dyn Error + 'static)) -> Option<NoCredentials> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(credentials) = error.downcast_ref::<CredentialsError>() {
            return Some(of(credentials));
        }
        next = error.source();
    }
    None
}

fn of(error: &CredentialsError) -> NoCredentials {
    let (top, bottom) = (said(&error.to_string()), deepest(error));
    let why = if top == bottom { top } else { format!("{top}: {bottom}") };
    match error {
        CredentialsError::ProviderError(_) | CredentialsError::ProviderTimedOut(_) => {
            NoCredentials { may_come: true, why: format!("no credentials yet: {why}; {CHECK}") }
        }
        _ => NoCredentials { may_come: false, why: format!("no credentials: {why}; {CHECK}") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_that_may_come_are_told_from_those_that_are_not_there() {
        let none = no_credentials(&CredentialsError::not_loaded("nothing in the chain")).unwrap();
        assert!(!none.may_come && none.why.contains("AWS_ACCESS_KEY_ID"), "{}", none.why);
        let away = no_credentials(&CredentialsError::provider_error("STS is away")).unwrap();
        assert!(away.may_come && away.why.contains("STS is away"), "{}", away.why);
        assert!(no_credentials(&std::fmt::Error).is_none());
    }
}
