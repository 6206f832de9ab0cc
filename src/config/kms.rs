//! Who wraps the data encryption keys, and how this node gets at it.
//!
//! What belongs to a provider that is not chosen is not looked at: a file may describe several.

use std::path::PathBuf;
use std::time::Duration;

use super::ConfigError;
use super::checks::{YEAR_SECS, between, entry, field, private_url, secs};
use super::raw::{RawKms, RawVault};
use crate::kms::{Limits, Login, Secret, VaultSettings};

/// The providers that there are, as they are configured.
pub(super) const PROVIDERS: [&str; 2] = ["local", "vault"];

/// Who wraps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KmsConfig {
    Local { master_key_file: PathBuf },
    Vault(VaultConfig),
}

/// How data encryption keys are kept and renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DekConfig {
    /// So many are unwrapped in memory at most.
    pub max_unwrapped: usize,
    pub unwrapped_ttl: Duration,
    /// `None`: never by time.
    pub rotate_after: Option<Duration>,
}

pub(super) fn deks(raw: &RawKms) -> Result<DekConfig, ConfigError> {
    let days = between("kms.dek_rotation_days", raw.dek_rotation_days, 0..=3_660)?;
    Ok(DekConfig {
        max_unwrapped: between("kms.max_unwrapped", raw.max_unwrapped, 100..=10_000_000)?,
        unwrapped_ttl: secs("kms.unwrapped_ttl_secs", raw.unwrapped_ttl_secs, 1..=YEAR_SECS)?,
        rotate_after: (days > 0).then(|| Duration::from_secs(days * 86_400)),
    })
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaultConfig {
    pub settings: VaultSettings,
    pub limits: Limits,
}

pub(super) fn kms(raw: &RawKms) -> Result<KmsConfig, ConfigError> {
    match raw.provider.as_str() {
        "local" => Ok(KmsConfig::Local { master_key_file: raw.master_key_file.clone() }),
        "vault" => vault(&raw.vault).map(KmsConfig::Vault),
        other => {
            let why = format!("this version wraps keys by one of: {}", PROVIDERS.join(", "));
            Err(field("kms.provider", other, &why))
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

    fn refused(change: impl FnOnce(&mut RawVault), named: &str) {
        let error = kms(&raw(change)).unwrap_err().to_string();
        assert!(error.starts_with(named) && !error.contains("s.secret"), "{error}");
    }

    #[test]
    fn a_token_is_taken_and_not_shown() {
        let raw = raw(|_| {});
        let KmsConfig::Vault(vault) = kms(&raw).unwrap() else { panic!("it is Vault") };
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

    #[test]
    fn how_keys_are_kept_has_its_bounds() {
        let default = deks(&RawKms::default()).unwrap();
        assert_eq!(default.rotate_after, Some(Duration::from_secs(90 * 86_400)));
        let never = deks(&RawKms { dek_rotation_days: 0, ..RawKms::default() }).unwrap();
        assert_eq!(never.rotate_after, None);
        for (raw, named) in [
            (RawKms { max_unwrapped: 10, ..RawKms::default() }, "kms.max_unwrapped"),
            (RawKms { unwrapped_ttl_secs: 0, ..RawKms::default() }, "kms.unwrapped_ttl_secs"),
            (RawKms { dek_rotation_days: 99_999, ..RawKms::default() }, "kms.dek_rotation_days"),
        ] {
            let error = deks(&raw).unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }

    #[test]
    fn a_provider_that_is_not_chosen_is_not_looked_at() {
        let mut raw = raw(|vault| vault.address = "nowhere".into());
        raw.provider = "local".into();
        assert!(matches!(kms(&raw), Ok(KmsConfig::Local { .. })));
        raw.provider = "abacus".into();
        let error = kms(&raw).unwrap_err().to_string();
        assert!(error.contains("kms.provider") && error.contains("local, vault"), "{error}");
    }
}
