//! What Key Vault is called with: a token of Microsoft Entra, come by through Microsoft's own library.
//!
//! The library is given the client that calls the vault too, so that one file of certificate authorities serves both,
//! and makes one attempt: the guard makes the others.

use std::path::PathBuf;
use std::sync::Arc;

use azure_core::cloud::{CloudConfiguration, CustomConfiguration};
use azure_core::credentials::TokenCredential;
use azure_core::error::ErrorKind;
use azure_core::http::{ClientOptions, RetryOptions, Transport};
use azure_identity::{
    ClientAssertionCredentialOptions, ClientSecretCredential, ClientSecretCredentialOptions,
    ManagedIdentityCredential, ManagedIdentityCredentialOptions, UserAssignedId, WorkloadIdentityCredential,
    WorkloadIdentityCredentialOptions,
};
use reqwest::Client;
use reqwest::header::HeaderValue;

use super::super::{Cause, Secret};
use super::AzureSettings;
use crate::rest::said;

/// Who this shield is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AzureIdentity {
    /// An application with a secret.
    ClientSecret { tenant_id: String, client_id: String, secret: Secret },
    /// A pod: the file holds the token that its cluster gives it, and is read anew when that changes.
    Workload { tenant_id: String, client_id: String, token_file: PathBuf },
    /// A machine: the identity that Azure gives it, or that of this client ID among several.
    Managed { client_id: Option<String> },
}

/// Gives tokens, each until shortly before it expires.
pub(super) struct Tokens {
    credential: Arc<dyn TokenCredential>,
    scope: String,
}

impl Tokens {
    /// # Errors
    /// Settings that the library refuses.
    pub(super) fn new(settings: &AzureSettings, client: Client) -> Result<Self, Cause> {
        let cloud = settings.authority.as_ref().map(|host| {
            let mut custom = CustomConfiguration::default();
            custom.authority_host.clone_from(host);
            Arc::new(CloudConfiguration::from(custom))
        });
        let client_options = ClientOptions {
            retry: RetryOptions::none(),
            transport: Some(Transport::new(Arc::new(client))),
            cloud,
            ..ClientOptions::default()
        };
        let credential = match &settings.identity {
            AzureIdentity::ClientSecret { tenant_id, client_id, secret } => {
                let secret = secret.expose().to_owned().into();
                let options = ClientSecretCredentialOptions { client_options };
                ClientSecretCredential::new(tenant_id, client_id.clone(), secret, Some(options))
                    .map(|credential| credential as Arc<dyn TokenCredential>)
            }
            AzureIdentity::Workload { tenant_id, client_id, token_file } => {
                let options = WorkloadIdentityCredentialOptions {
                    credential_options: ClientAssertionCredentialOptions { client_options },
                    client_id: Some(client_id.clone()),
                    tenant_id: Some(tenant_id.clone()),
                    token_file_path: Some(token_file.clone()),
                };
                WorkloadIdentityCredential::new(Some(options)).map(|credential| credential as _)
            }
            AzureIdentity::Managed { client_id } => {
                let user_assigned_id = client_id.clone().map(UserAssignedId::ClientId);
                let options = ManagedIdentityCredentialOptions { user_assigned_id, client_options };
                ManagedIdentityCredential::new(Some(options)).map(|credential| credential as _)
            }
        };
        let credential = credential.map_err(|error| {
            Cause::Refused(format!("these credentials cannot be used: {}", said(&error.to_string())))
        })?;
        Ok(Self { credential, scope: format!("{}/.default", settings.resource.trim_end_matches('/')) })
    }

    /// The header that a call is authorised by.
    pub(super) async fn authorization(&self) -> Result<HeaderValue, Cause> {
        let token = self.credential.get_token(&[&self.scope], None).await.map_err(|error| {
            let why = format!("no token for {}: {}", self.scope, said(&error.to_string()));
            match is_transient(&error) {
                true => Cause::Unavailable(why),
                false => Cause::Refused(format!("{why}; check tenant, client and their credentials")),
            }
        })?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.token.secret()))
            .map_err(|_| Cause::Refused("the token is not one line of ASCII text".into()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The library wraps what happened into what it could not do.
fn is_transient(error: &azure_core::Error) -> bool {
    let is_passing = |error: &azure_core::Error| match error.kind() {
        ErrorKind::HttpResponse { status, .. } => {
            let status = u16::from(*status);
            status == 408 || status == 429 || status >= 500
        }
        ErrorKind::Io | ErrorKind::Connection => true,
        _ => false,
    };
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if error.downcast_ref().is_some_and(is_passing) {
            return true;
        }
        next = error.source();
    }
    false
}
