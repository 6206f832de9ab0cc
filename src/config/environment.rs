//! The guide's environment variables, which go over the file.
//!
//! Taken as a value, so that tests set variables without touching the process's own.

use super::{ConfigError, RawConfig};

/// Variables of the guide that this version cannot honour. Silence would be taken for success.
const NOT_YET: [&str; 6] = [
    "KMS_REGION",
    "KMS_KEY_RING",
    "CDN_ENDPOINTS",
    "CDN_SYNC_TIMEOUT",
    "CDN_RETRY_ATTEMPTS",
    "EMERGENCY_ROTATION_ENABLED",
];

/// What the environment says, as far as it concerns the shield.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    variables: Vec<(&'static str, String)>,
}

const KNOWN: [&str; 6] = [
    "KMS_PROVIDER",
    "DEFAULT_ROTATION_INTERVAL",
    "MAX_SEGMENTS_PER_KEY",
    "PRE_GENERATE_KEYS",
    "KEY_GRACE_PERIOD",
    "AUDIT_LOGGING_ENABLED",
];

impl Environment {
    /// The process's own.
    #[expect(clippy::disallowed_methods, reason = "this is the place that reads it")]
    pub fn of_process() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    pub fn from_lookup(look_up: impl Fn(&str) -> Option<String>) -> Self {
        let named = KNOWN.into_iter().chain(NOT_YET);
        Self { variables: named.filter_map(|name| Some((name, look_up(name)?))).collect() }
    }

    /// Puts the variables over what the file says.
    ///
    /// # Errors
    /// A variable whose value is not what it should be.
    pub fn apply(&self, raw: &mut RawConfig) -> Result<(), ConfigError> {
        for (name, value) in &self.variables {
            let bad =
                |why: &str| ConfigError::Environment { name, value: value.clone(), why: why.to_owned() };
            match *name {
                "KMS_PROVIDER" if !value.eq_ignore_ascii_case("local") => {
                    return Err(bad("this version wraps keys under a local master key file only: local"));
                }
                "DEFAULT_ROTATION_INTERVAL" => {
                    let minutes = value.parse().map_err(|_| bad("must be a number of minutes"))?;
                    raw.policy.rotation_interval_minutes = Some(minutes);
                }
                "MAX_SEGMENTS_PER_KEY" => {
                    let count = value.parse().map_err(|_| bad("must be a number of segments"))?;
                    raw.policy.segments_per_key = Some(count);
                }
                "PRE_GENERATE_KEYS" => {
                    let count = value.parse().map_err(|_| bad("must be a number of keys"))?;
                    raw.policy.pre_generate_keys = Some(count);
                }
                "KEY_GRACE_PERIOD" => {
                    let secs = value.parse().map_err(|_| bad("must be a number of seconds"))?;
                    raw.policy.grace_period_secs = Some(secs);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Variables that are set and not honoured by this version.
    pub fn ignored(&self) -> Vec<&'static str> {
        let not_yet = |name: &&str| NOT_YET.contains(name) || *name == "AUDIT_LOGGING_ENABLED";
        self.variables.iter().map(|(name, _)| *name).filter(not_yet).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(variables: &[(&str, &str)]) -> Result<RawConfig, String> {
        let look_up =
            |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        let mut raw = RawConfig::default();
        Environment::from_lookup(look_up).apply(&mut raw).map_err(|error| error.to_string())?;
        Ok(raw)
    }

    #[test]
    fn the_guides_variables_go_over_the_file() {
        let raw = apply(&[
            ("DEFAULT_ROTATION_INTERVAL", "15"),
            ("MAX_SEGMENTS_PER_KEY", "50"),
            ("PRE_GENERATE_KEYS", "5"),
            ("KEY_GRACE_PERIOD", "120"),
            ("KMS_PROVIDER", "local"),
        ])
        .unwrap();
        assert_eq!(raw.policy.rotation_interval_minutes, Some(15.0));
        assert_eq!(raw.policy.segments_per_key, Some(50));
        assert_eq!(raw.policy.pre_generate_keys, Some(5));
        assert_eq!(raw.policy.grace_period_secs, Some(120));
    }

    #[test]
    fn a_bad_value_names_its_variable() {
        for (name, value) in
            [("DEFAULT_ROTATION_INTERVAL", "soon"), ("MAX_SEGMENTS_PER_KEY", "-5"), ("KMS_PROVIDER", "AWS")]
        {
            let error = apply(&[(name, value)]).unwrap_err();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
    }

    #[test]
    fn what_is_not_honoured_yet_is_said() {
        let set = |name: &str| ["CDN_ENDPOINTS", "PRE_GENERATE_KEYS"].contains(&name).then(|| "3".to_owned());
        assert_eq!(Environment::from_lookup(set).ignored(), ["CDN_ENDPOINTS"]);
    }
}
