//! What the layers say together, before it is checked.
//!
//! These types are also where the names of all keys come from: see `schema`. Texts that hold a secret are left
//! out of `Debug`.

mod cdn;

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::secrets::{masked_hash, masked_url, masked_webhook};
#[cfg(feature = "cdn-cloudfront")]
pub use cdn::RawCloudFront;
pub use cdn::{RawCdn, RawCdnRules, RawCloudflare, RawCustom, RawFastly};

use crate::keys::{KeyMethod, Policy};

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    pub shield: RawShield,
    pub control: RawControl,
    pub log: RawLog,
    pub store: RawStore,
    pub kms: RawKms,
    pub alerts: RawAlerts,
    pub cdn: RawCdnRules,
    pub cdns: Vec<RawCdn>,
    pub keys: RawKeys,
    pub playlists: RawPlaylists,
    pub segments: RawSegments,
    pub upstream: RawUpstream,
    pub policy: RawPolicy,
    pub origins: Vec<RawOrigin>,
    pub streams: Vec<RawStream>,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            shield: RawShield::default(),
            control: RawControl::default(),
            log: RawLog::default(),
            store: RawStore::default(),
            kms: RawKms::default(),
            alerts: RawAlerts::default(),
            cdn: RawCdnRules::default(),
            cdns: Vec::new(),
            keys: RawKeys::default(),
            playlists: RawPlaylists::default(),
            segments: RawSegments::default(),
            upstream: RawUpstream::default(),
            policy: RawPolicy::guide(),
            origins: Vec::new(),
            streams: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawShield {
    pub listen: String,
    pub threads: usize,
    pub cors_origins: Vec<String>,
    pub shutdown_grace_secs: u64,
}

impl Default for RawShield {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:8080".into(),
            threads: 0,
            cors_origins: vec!["*".into()],
            shutdown_grace_secs: 5,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawControl {
    pub listen: String,
    pub tokens: Vec<RawToken>,
    pub jwt: Option<RawJwt>,
}

impl Default for RawControl {
    fn default() -> Self {
        Self { listen: "127.0.0.1:8081".into(), tokens: Vec::new(), jwt: None }
    }
}

#[derive(Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawToken {
    pub name: String,
    pub role: String,
    pub sha256: String,
}

impl fmt::Debug for RawToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, role, sha256 } = self;
        f.debug_struct("RawToken")
            .field("name", name)
            .field("role", role)
            .field("sha256", &masked_hash(sha256))
            .finish()
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawJwt {
    pub jwks_file: Option<String>,
    pub jwks_url: Option<String>,
    pub issuer: String,
    pub audience: String,
    pub roles_claim: String,
}

impl Default for RawJwt {
    fn default() -> Self {
        Self {
            jwks_file: None,
            jwks_url: None,
            issuer: String::new(),
            audience: String::new(),
            roles_claim: "roles".into(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawLog {
    pub format: String,
    pub filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self {
            format: "human".into(),
            filter: "info,pingora_core=warn,pingora_core::connectors=off,pingora_proxy=warn".into(),
        }
    }
}

#[derive(Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawStore {
    pub database: String,
    pub max_connections: u32,
    pub poll_interval_millis: u64,
    pub lease_secs: u64,
}

impl Default for RawStore {
    fn default() -> Self {
        Self {
            database: "keyshield.db".into(),
            max_connections: 8,
            poll_interval_millis: 1_000,
            lease_secs: 10,
        }
    }
}

impl fmt::Debug for RawStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { database, max_connections, poll_interval_millis, lease_secs } = self;
        f.debug_struct("RawStore")
            .field("database", &masked_url(database))
            .field("max_connections", max_connections)
            .field("poll_interval_millis", poll_interval_millis)
            .field("lease_secs", lease_secs)
            .finish()
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawKms {
    pub provider: String,
    pub also: Vec<String>,
    pub master_key_file: PathBuf,
    pub max_unwrapped: usize,
    pub unwrapped_ttl_secs: u64,
    pub dek_rotation_days: u64,
    pub aws: RawAws,
    pub azure: RawAzure,
    pub gcp: RawGcp,
    pub vault: RawVault,
}

impl Default for RawKms {
    fn default() -> Self {
        Self {
            provider: "local".into(),
            also: Vec::new(),
            master_key_file: "keyshield.master".into(),
            max_unwrapped: 20_000,
            unwrapped_ttl_secs: 3_600,
            dek_rotation_days: 90,
            aws: RawAws::default(),
            azure: RawAzure::default(),
            gcp: RawGcp::default(),
            vault: RawVault::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawAws {
    pub region: String,
    pub key: String,
    pub endpoint: String,
    pub timeout_secs: u64,
    pub max_concurrent: usize,
}

impl Default for RawAws {
    fn default() -> Self {
        Self {
            region: String::new(),
            key: "alias/keyshield".into(),
            endpoint: String::new(),
            timeout_secs: 5,
            max_concurrent: 16,
        }
    }
}

#[derive(Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawAzure {
    pub vault: String,
    pub key: String,
    pub tenant_id: String,
    pub client_id: String,
    pub client_secret: String,
    pub federated_token_file: String,
    pub authority_host: String,
    pub resource: String,
    pub ca_file: String,
    pub timeout_secs: u64,
    pub max_concurrent: usize,
}

impl Default for RawAzure {
    fn default() -> Self {
        Self {
            vault: String::new(),
            key: "keyshield".into(),
            tenant_id: String::new(),
            client_id: String::new(),
            client_secret: String::new(),
            federated_token_file: String::new(),
            authority_host: String::new(),
            resource: String::new(),
            ca_file: String::new(),
            timeout_secs: 5,
            max_concurrent: 16,
        }
    }
}

impl fmt::Debug for RawAzure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // All but the secret.
        f.debug_struct("RawAzure")
            .field("vault", &self.vault)
            .field("key", &self.key)
            .field("tenant_id", &self.tenant_id)
            .field("client_id", &self.client_id)
            .field("federated_token_file", &self.federated_token_file)
            .field("authority_host", &self.authority_host)
            .field("resource", &self.resource)
            .field("ca_file", &self.ca_file)
            .field("timeout_secs", &self.timeout_secs)
            .field("max_concurrent", &self.max_concurrent)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawGcp {
    pub project: String,
    pub location: String,
    pub key_ring: String,
    pub key: String,
    pub endpoint: String,
    pub credentials_file: String,
    pub timeout_secs: u64,
    pub max_concurrent: usize,
}

impl Default for RawGcp {
    fn default() -> Self {
        Self {
            project: String::new(),
            location: "global".into(),
            key_ring: "keyshield".into(),
            key: "keyshield".into(),
            endpoint: "https://cloudkms.googleapis.com".into(),
            credentials_file: String::new(),
            timeout_secs: 5,
            max_concurrent: 16,
        }
    }
}

#[derive(Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawVault {
    pub address: String,
    pub mount: String,
    pub key: String,
    pub namespace: String,
    pub token: String,
    pub token_file: String,
    pub approle_role_id: String,
    pub approle_secret_id_file: String,
    pub kubernetes_role: String,
    pub kubernetes_jwt_file: String,
    pub ca_file: String,
    pub timeout_secs: u64,
    pub max_concurrent: usize,
}

impl Default for RawVault {
    fn default() -> Self {
        Self {
            address: "https://127.0.0.1:8200".into(),
            mount: "transit".into(),
            key: "keyshield".into(),
            namespace: String::new(),
            token: String::new(),
            token_file: String::new(),
            approle_role_id: String::new(),
            approle_secret_id_file: String::new(),
            kubernetes_role: String::new(),
            kubernetes_jwt_file: "/var/run/secrets/kubernetes.io/serviceaccount/token".into(),
            ca_file: String::new(),
            timeout_secs: 5,
            max_concurrent: 16,
        }
    }
}

impl fmt::Debug for RawVault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // All but the token.
        f.debug_struct("RawVault")
            .field("address", &self.address)
            .field("mount", &self.mount)
            .field("key", &self.key)
            .field("namespace", &self.namespace)
            .field("token_file", &self.token_file)
            .field("approle_role_id", &self.approle_role_id)
            .field("approle_secret_id_file", &self.approle_secret_id_file)
            .field("kubernetes_role", &self.kubernetes_role)
            .field("kubernetes_jwt_file", &self.kubernetes_jwt_file)
            .field("ca_file", &self.ca_file)
            .field("timeout_secs", &self.timeout_secs)
            .field("max_concurrent", &self.max_concurrent)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawAlerts {
    pub webhook_url: String,
}

impl fmt::Debug for RawAlerts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawAlerts").field("webhook_url", &masked_webhook(&self.webhook_url)).finish()
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawKeys {
    pub uri_base: String,
    pub max_age_secs: u64,
    pub sweep_interval_millis: u64,
}

impl Default for RawKeys {
    fn default() -> Self {
        Self { uri_base: "/api/hls/keys/".into(), max_age_secs: 300, sweep_interval_millis: 1_000 }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawPlaylists {
    pub max_bytes: usize,
    pub cache_bytes: u64,
    pub timeout_secs: u64,
    pub stale_if_error_secs: u64,
}

impl Default for RawPlaylists {
    fn default() -> Self {
        Self { max_bytes: 8 << 20, cache_bytes: 256 << 20, timeout_secs: 15, stale_if_error_secs: 60 }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawSegments {
    pub max_bytes: u64,
    pub cache_bytes: u64,
    pub max_filling: usize,
    pub timeout_secs: u64,
    pub max_age_secs: u64,
}

impl Default for RawSegments {
    fn default() -> Self {
        Self {
            max_bytes: 256 << 20,
            cache_bytes: 1 << 30,
            max_filling: 512,
            timeout_secs: 120,
            max_age_secs: 7 * 86_400,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawUpstream {
    pub connect_timeout_secs: u64,
    pub read_timeout_secs: u64,
    pub idle_timeout_secs: u64,
    pub pool_size: usize,
    pub ca_file: String,
}

impl Default for RawUpstream {
    fn default() -> Self {
        Self {
            connect_timeout_secs: 3,
            read_timeout_secs: 10,
            idle_timeout_secs: 60,
            pool_size: 256,
            ca_file: String::new(),
        }
    }
}

/// A stream's rules, as far as they are given.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawPolicy {
    pub key_method: Option<String>,
    pub rotation_interval_minutes: Option<f64>,
    pub segments_per_key: Option<u32>,
    pub pre_generate_keys: Option<u32>,
    pub grace_period_secs: Option<u64>,
    pub lead_segments: Option<u32>,
    pub cdn_ttl_secs: Option<u64>,
    pub iv_mode: Option<String>,
    pub encrypt_init_sections: Option<bool>,
    pub on_encrypted: Option<String>,
    pub subtitles: Option<String>,
    pub session_keys: Option<bool>,
    pub sync_policy: Option<String>,
    pub emergency_rotation_enabled: Option<bool>,
    pub revocation_transition_target_durations: Option<u32>,
}

impl RawPolicy {
    /// The guide's defaults, every field given.
    pub fn guide() -> Self {
        let policy = Policy::default();
        let minutes = policy.rotation_interval.unwrap_or_default().as_secs_f64() / 60.0;
        Self {
            key_method: Some(policy.key_method.name().into()),
            rotation_interval_minutes: Some(minutes),
            segments_per_key: Some(policy.segments_per_key),
            pre_generate_keys: Some(policy.pre_generate_keys),
            grace_period_secs: Some(policy.grace_period.as_secs()),
            lead_segments: Some(policy.lead_segments),
            cdn_ttl_secs: Some(policy.cdn_ttl.as_secs()),
            iv_mode: Some(policy.iv_mode.name().into()),
            encrypt_init_sections: Some(policy.encrypt_init_sections),
            on_encrypted: Some(policy.on_encrypted.name().into()),
            subtitles: Some(policy.subtitles.name().into()),
            session_keys: Some(policy.session_keys),
            sync_policy: Some(policy.sync_policy.name().into()),
            emergency_rotation_enabled: Some(policy.emergency_rotation),
            revocation_transition_target_durations: Some(policy.revocation_transition),
        }
    }

    /// Takes the IV mode out where the method has none. For one that nobody gave; a given one is refused.
    pub(super) fn drop_idle_iv_mode(&mut self) {
        let method = self.key_method.as_deref().and_then(KeyMethod::from_name);
        if method.is_some_and(|method| !method.has_iv_mode()) {
            self.iv_mode = None;
        }
    }

    /// This policy where it says something, and `defaults` where it does not.
    pub fn over(&self, defaults: &Self) -> Self {
        Self {
            key_method: self.key_method.clone().or_else(|| defaults.key_method.clone()),
            rotation_interval_minutes: self.rotation_interval_minutes.or(defaults.rotation_interval_minutes),
            segments_per_key: self.segments_per_key.or(defaults.segments_per_key),
            pre_generate_keys: self.pre_generate_keys.or(defaults.pre_generate_keys),
            grace_period_secs: self.grace_period_secs.or(defaults.grace_period_secs),
            lead_segments: self.lead_segments.or(defaults.lead_segments),
            cdn_ttl_secs: self.cdn_ttl_secs.or(defaults.cdn_ttl_secs),
            iv_mode: self.iv_mode.clone().or_else(|| defaults.iv_mode.clone()),
            encrypt_init_sections: self.encrypt_init_sections.or(defaults.encrypt_init_sections),
            on_encrypted: self.on_encrypted.clone().or_else(|| defaults.on_encrypted.clone()),
            subtitles: self.subtitles.clone().or_else(|| defaults.subtitles.clone()),
            session_keys: self.session_keys.or(defaults.session_keys),
            sync_policy: self.sync_policy.clone().or_else(|| defaults.sync_policy.clone()),
            emergency_rotation_enabled: self
                .emergency_rotation_enabled
                .or(defaults.emergency_rotation_enabled),
            revocation_transition_target_durations: self
                .revocation_transition_target_durations
                .or(defaults.revocation_transition_target_durations),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawOrigin {
    pub name: String,
    pub mount: String,
    pub urls: Vec<String>,
    pub pass_through: bool,
    pub query_params: Vec<String>,
}

impl Default for RawOrigin {
    fn default() -> Self {
        Self {
            name: String::new(),
            mount: "/".into(),
            urls: Vec::new(),
            pass_through: false,
            query_params: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawStream {
    pub id: String,
    pub playlist_url: String,
    pub path_prefix: Option<String>,
    pub policy: RawPolicy,
}
