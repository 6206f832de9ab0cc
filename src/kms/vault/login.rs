//! The token by which Vault is called: come by, renewed before it expires, and come by anew when it is refused.
//!
//! A token is looked at when it is used, not by a task of its own: the engine asks after the key every few seconds.

use std::path::Path;
use std::time::Duration;

use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{Answer, Cause, KmsError, Login, Secret, VaultKms};

/// A token that is in use.
struct Held {
    token: Secret,
    /// When two thirds of its time are over; `None` for one that does not expire.
    renew_at: Option<Instant>,
    is_renewable: bool,
}

/// One token for all calls. Whoever finds it missing logs in, and the others wait for that.
pub(super) struct Session {
    login: Login,
    held: Mutex<Option<Held>>,
}

#[derive(Deserialize)]
struct LoggedIn {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    lease_duration: u64,
    renewable: bool,
}

#[derive(Deserialize)]
struct LookedUp {
    ttl: u64,
    renewable: bool,
}

impl Session {
    pub(super) fn new(login: Login) -> Self {
        Self { login, held: Mutex::default() }
    }

    /// The token to call with.
    pub(super) async fn token(&self, kms: &VaultKms) -> Result<Secret, KmsError> {
        let mut held = self.held.lock().await;
        let next = match held.take() {
            None => self.log_in(kms).await?,
            Some(now) if now.renew_at.is_none_or(|at| Instant::now() < at) => now,
            Some(old) => self.renew(kms, old).await?,
        };
        Ok(held.insert(next).token.clone())
    }

    /// Forgets a token that was refused, unless another is in its place already. `false` when logging in anew can give
    /// no other.
    pub(super) async fn forget(&self, refused: &Secret) -> bool {
        let mut held = self.held.lock().await;
        if held.as_ref().is_some_and(|held| held.token == *refused) {
            *held = None;
        }
        !matches!(self.login, Login::Token(_))
    }

    async fn log_in(&self, kms: &VaultKms) -> Result<Held, KmsError> {
        match &self.login {
            Login::Token(token) => look_up(kms, token.clone()).await,
            Login::TokenFile(path) => look_up(kms, read(kms, "token_file", path)?).await,
            Login::AppRole { role_id, secret_id_file } => {
                let secret_id = read(kms, "approle_secret_id_file", secret_id_file)?;
                let body = json!({ "role_id": role_id, "secret_id": secret_id.expose() });
                log_in_at(kms, "auth/approle/login", &body).await
            }
            Login::Kubernetes { role, jwt_file } => {
                let jwt = read(kms, "kubernetes_jwt_file", jwt_file)?;
                let body = json!({ "role": role, "jwt": jwt.expose() });
                log_in_at(kms, "auth/kubernetes/login", &body).await
            }
        }
    }

    /// A token that cannot be renewed is come by anew.
    async fn renew(&self, kms: &VaultKms, old: Held) -> Result<Held, KmsError> {
        if old.is_renewable {
            let path = "auth/token/renew-self";
            let answer = kms.send(Method::POST, path, Some(&json!({})), Some(&old.token)).await;
            let auth = answer.ok().filter(|answer| answer.status.is_success()).and_then(logged_in);
            if let Some(renewed) = auth {
                tracing::debug!(ttl_secs = renewed.lease_duration, "the token of the KMS is renewed");
                return Ok(Held { token: old.token, ..held(renewed) });
            }
        }
        self.log_in(kms).await
    }
}

fn held(auth: Auth) -> Held {
    Held {
        token: Secret::new(auth.client_token),
        renew_at: renew_at(auth.lease_duration),
        is_renewable: auth.renewable,
    }
}

fn renew_at(ttl_secs: u64) -> Option<Instant> {
    (ttl_secs > 0).then(|| Instant::now() + Duration::from_secs(ttl_secs) * 2 / 3)
}

fn logged_in(answer: Answer) -> Option<Auth> {
    serde_json::from_slice::<LoggedIn>(&answer.body).ok().map(|body| body.auth)
}

async fn log_in_at(kms: &VaultKms, path: &str, body: &Value) -> Result<Held, KmsError> {
    let answer = kms.send(Method::POST, path, Some(body), None).await?;
    if !answer.status.is_success() {
        return Err(kms.failed(match answer.cause(path, &kms.settings) {
            Cause::Unavailable(why) => Cause::Unavailable(why),
            _ => Cause::Refused(format!(
                "{path}: the login was refused ({}); check the role and its secret",
                answer.status
            )),
        }));
    }
    let no_token = || kms.failed(Cause::Refused(format!("{path}: the login gives no token")));
    let auth = logged_in(answer).ok_or_else(no_token)?;
    tracing::info!(path, ttl_secs = auth.lease_duration, "logged in to the KMS");
    Ok(held(auth))
}

/// When a given token expires. One that may not look itself up is used as it is.
async fn look_up(kms: &VaultKms, token: Secret) -> Result<Held, KmsError> {
    let path = "auth/token/lookup-self";
    let answer = kms.send(Method::GET, path, None, Some(&token)).await?;
    if let Cause::Unavailable(why) = answer.cause(path, &kms.settings)
        && !answer.status.is_success()
    {
        return Err(kms.failed(Cause::Unavailable(why)));
    }
    let about: Option<LookedUp> = kms.data(path, answer).ok();
    let (ttl, is_renewable) = about.map_or((0, false), |about| (about.ttl, about.renewable));
    Ok(Held { token, renew_at: renew_at(ttl), is_renewable })
}

/// A small file, once a login: not worth a thread.
fn read(kms: &VaultKms, name: &str, path: &Path) -> Result<Secret, KmsError> {
    let bad = |why: &dyn std::fmt::Display| {
        kms.failed(Cause::Refused(format!("kms.vault.{name} {}: {why}", path.display())))
    };
    let text = Zeroizing::new(std::fs::read_to_string(path).map_err(|error| bad(&error))?);
    match text.trim() {
        "" => Err(bad(&"the file is empty")),
        text => Ok(Secret::new(text.to_owned())),
    }
}
