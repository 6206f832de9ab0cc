//! A transit key of Vault or OpenBao.

use std::path::PathBuf;

use super::super::ConfigError;
use super::super::checks::{between, entry, field, private_url, secs};
use super::super::raw::RawVault;
use crate::kms::{Limits, Login, Secret, VaultSettings};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultConfig {
    pub settings: VaultSettings,
    pub limits: Limits,
}

pub(super) fn vault(raw: &RawVault) -> Result<VaultConfig, ConfigError> {
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
    use super::super::{KmsConfig, keyring};
    use super::*;
    use crate::config::raw::RawKms;

    fn raw(change: impl FnOnce(&mut RawVault)) -> RawKms {
        let mut raw = RawKms { provider: "vault".into(), ..RawKms::default() };
        raw.vault.token = "s.secret".into();
        change(&mut raw.vault);
        raw
    }

    fn kms(raw: &RawKms) -> Result<KmsConfig, ConfigError> {
        keyring(raw).map(|keyring| keyring.wraps)
    }

    fn refused(change: impl FnOnce(&mut RawVault), named: &str) {
        let error = kms(&raw(change)).unwrap_err().to_string();
        assert!(error.starts_with(named) && !error.contains("s.secret"), "{error}");
    }

    #[test]
    fn a_token_is_taken_and_not_shown() {
        let raw = raw(|_| {});
        let Ok(KmsConfig::Vault(vault)) = kms(&raw) else { panic!("it is Vault") };
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
        let role = kms(&raw(|vault| {
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
}
