//! Who wraps the data encryption keys, and how this node gets at it.
//!
//! One provider wraps, others may be held besides it, so that keys can go over from one to another. What belongs to a
//! provider that is neither is not looked at: a file may describe several.

use std::path::PathBuf;

use super::ConfigError;
use super::checks::{between, entry, field, private_url, secs};
use super::raw::{RawKms, RawVault};
use crate::kms::{Limits, Login, Secret, VaultSettings};

/// The providers that there are, as they are configured.
pub(super) const PROVIDERS: [&str; 2] = ["local", "vault"];

/// Who wraps new keys, and who is held besides, each once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyringConfig {
    pub wraps: KmsConfig,
    pub also: Vec<KmsConfig>,
}

impl KeyringConfig {
    /// All that are held; the one that wraps is the first.
    pub fn held(&self) -> impl Iterator<Item = &KmsConfig> {
        std::iter::once(&self.wraps).chain(&self.also)
    }
}

/// One provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KmsConfig {
    Local { master_key_file: PathBuf },
    Vault(VaultConfig),
}

impl KmsConfig {
    /// As `kms.provider` and `kms.also` name it, and the IDs of its keys begin.
    pub fn provider(&self) -> &'static str {
        match self {
            KmsConfig::Local { .. } => "local",
            KmsConfig::Vault(_) => "vault",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultConfig {
    pub settings: VaultSettings,
    pub limits: Limits,
}

pub(super) fn keyring(raw: &RawKms) -> Result<KeyringConfig, ConfigError> {
    let wraps = kms("kms.provider", &raw.provider, raw)?;
    let mut also = Vec::with_capacity(raw.also.len());
    for (at, name) in raw.also.iter().enumerate() {
        if *name == raw.provider || raw.also[..at].contains(name) {
            let why = "is held already: kms.provider and kms.also name each provider once";
            return Err(field("kms.also", name, why));
        }
        also.push(kms("kms.also", name, raw)?);
    }
    Ok(KeyringConfig { wraps, also })
}

/// A provider by its name, which `named_by` gives.
fn kms(named_by: &str, name: &str, raw: &RawKms) -> Result<KmsConfig, ConfigError> {
    match name {
        "local" => Ok(KmsConfig::Local { master_key_file: raw.master_key_file.clone() }),
        "vault" => vault(&raw.vault).map(KmsConfig::Vault),
        other => {
            let why = format!("this version wraps keys by one of: {}", PROVIDERS.join(", "));
            Err(field(named_by, other, &why))
        }
    }
}

fn vault(raw: &RawVault) -> Result<VaultConfig, ConfigError> {
    let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    let settings = VaultSettings {
        // The token goes there.
        address: private_url("kms.vault.address", &raw.address)?,
        mount: path("kms.vault.mount", &raw.mount)?,
        key: path("kms.vault.key", &raw.key)?,
        namespace: given(&raw.namespace),
        login: login(raw)?,
        ca_file: given(&raw.ca_file).map(PathBuf::from),
    };
    if settings.key.contains('/') {
        return Err(field("kms.vault.key", &raw.key, "must be the key's name alone"));
    }
    let limits = Limits {
        timeout: secs("kms.vault.timeout_secs", raw.timeout_secs, 1..=60)?,
        max_concurrent: between("kms.vault.max_concurrent", raw.max_concurrent, 1..=1_024)?,
    };
    Ok(VaultConfig { settings, limits })
}

fn login(raw: &RawVault) -> Result<Login, ConfigError> {
    let required = |name: &str, value: &str| match value {
        "" => Err(entry(&format!("kms.vault.{name}"), "must be given")),
        path => Ok(PathBuf::from(path)),
    };
    let ways = [&raw.token, &raw.token_file, &raw.approle_role_id, &raw.kubernetes_role];
    match ways.map(|way| !way.is_empty()) {
        [true, false, false, false] => Ok(Login::Token(Secret::new(raw.token.clone()))),
        [false, true, false, false] => Ok(Login::TokenFile(raw.token_file.clone().into())),
        [false, false, true, false] => Ok(Login::AppRole {
            role_id: raw.approle_role_id.clone(),
            secret_id_file: required("approle_secret_id_file", &raw.approle_secret_id_file)?,
        }),
        [false, false, false, true] => Ok(Login::Kubernetes {
            role: raw.kubernetes_role.clone(),
            jwt_file: required("kubernetes_jwt_file", &raw.kubernetes_jwt_file)?,
        }),
        _ => Err(entry(
            "kms.vault",
            "exactly one of token, token_file, approle_role_id and kubernetes_role must be given",
        )),
    }
}

/// A name that goes into a URL's path as it is.
fn path(name: &str, text: &str) -> Result<String, ConfigError> {
    let is_part = |part: &str| {
        part.bytes().any(|byte| byte != b'.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    match text.split('/').all(is_part) {
        true => Ok(text.to_owned()),
        false => Err(field(name, text, "must be of letters, digits, -, _ and .")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(change: impl FnOnce(&mut RawVault)) -> RawKms {
        let mut raw = RawKms { provider: "vault".into(), ..RawKms::default() };
        raw.vault.token = "s.secret".into();
        change(&mut raw.vault);
        raw
    }

    fn wraps(raw: &RawKms) -> Result<KmsConfig, ConfigError> {
        keyring(raw).map(|keyring| keyring.wraps)
    }

    fn refused(change: impl FnOnce(&mut RawVault), named: &str) {
        let error = wraps(&raw(change)).unwrap_err().to_string();
        assert!(error.starts_with(named) && !error.contains("s.secret"), "{error}");
    }

    #[test]
    fn a_token_is_taken_and_not_shown() {
        let raw = raw(|_| {});
        let KmsConfig::Vault(vault) = wraps(&raw).unwrap() else { panic!("it is Vault") };
        assert_eq!((vault.settings.mount.as_str(), vault.settings.key.as_str()), ("transit", "keyshield"));
        let shown = format!("{vault:?} {raw:?}");
        assert!(!shown.contains("s.secret"), "{shown}");
    }

    #[test]
    fn there_is_one_way_to_log_in() {
        refused(|vault| vault.token.clear(), "kms.vault: exactly one of");
        refused(|vault| vault.token_file = "t".into(), "kms.vault: exactly one of");
        let approle = |vault: &mut RawVault| {
            vault.token.clear();
            vault.approle_role_id = "r".into();
        };
        refused(approle, "kms.vault.approle_secret_id_file");
        let role = wraps(&raw(|vault| {
            vault.token.clear();
            vault.kubernetes_role = "r".into();
        }));
        let Ok(KmsConfig::Vault(vault)) = role else { panic!("{role:?}") };
        assert!(matches!(vault.settings.login, Login::Kubernetes { .. }));
    }

    #[test]
    fn what_goes_into_a_request_is_checked() {
        refused(|vault| vault.address = "http://vault.example".into(), "kms.vault.address");
        refused(|vault| vault.key = "a/b".into(), "kms.vault.key");
        refused(|vault| vault.key = "..".into(), "kms.vault.key");
        refused(|vault| vault.mount = "a?b".into(), "kms.vault.mount");
        refused(|vault| vault.timeout_secs = 0, "kms.vault.timeout_secs");
        refused(|vault| vault.max_concurrent = 0, "kms.vault.max_concurrent");
    }

    #[test]
    fn a_provider_that_is_not_chosen_is_not_looked_at() {
        let mut raw = raw(|vault| vault.address = "nowhere".into());
        raw.provider = "local".into();
        assert!(matches!(wraps(&raw), Ok(KmsConfig::Local { .. })));
        raw.provider = "abacus".into();
        let error = wraps(&raw).unwrap_err().to_string();
        assert!(error.contains("kms.provider") && error.contains("local, vault"), "{error}");
    }

    #[test]
    fn others_are_held_besides_the_one_that_wraps_each_once_and_checked() {
        let with = |also: &[&str], change: fn(&mut RawVault)| {
            let mut raw = raw(change);
            raw.provider = "local".into();
            raw.also = also.iter().map(ToString::to_string).collect();
            keyring(&raw)
        };
        let held = with(&["vault"], |_| {}).unwrap();
        assert!(
            matches!(held.wraps, KmsConfig::Local { .. }) && matches!(held.also[..], [KmsConfig::Vault(_)])
        );
        assert_eq!(held.held().count(), 2);
        let refused = |also: &[&str], change, why: &str| {
            let error = with(also, change).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        refused(&["local"], |_| {}, "kms.also = \"local\"");
        refused(&["vault", "vault"], |_| {}, "each provider once");
        refused(&["abacus"], |_| {}, "kms.also");
        refused(&["vault"], |vault| vault.token.clear(), "exactly one of");
    }
}
