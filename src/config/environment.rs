//! The environment: `KEYSHIELD_SECTION_KEY` for every key, the guide's variables, and those by which clouds say who and
//! where a program is.
//!
//! Taken as a value, so that tests set variables without touching the process's own.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::kms::PROVIDERS;
use super::layers::{Given, Source};
use super::schema::{self, Key, nearest};
use super::{ConfigError, KeyringConfig};
use crate::fault;

const PREFIX: &str = "KEYSHIELD_";

/// What a variable of the guide means here.
#[derive(Debug, Clone, Copy)]
enum Meaning {
    Sets(&'static str),
    KmsProvider,
    /// Sets a key of each provider that has its like: which one is chosen, another layer may say.
    OfProviders(&'static [&'static str]),
    /// This version cannot honour it. Silence would be taken for success.
    NotYet,
}

const GUIDE: [(&str, Meaning); 12] = [
    ("DEFAULT_ROTATION_INTERVAL", Meaning::Sets("policy.rotation_interval_minutes")),
    ("MAX_SEGMENTS_PER_KEY", Meaning::Sets("policy.segments_per_key")),
    ("PRE_GENERATE_KEYS", Meaning::Sets("policy.pre_generate_keys")),
    ("KEY_GRACE_PERIOD", Meaning::Sets("policy.grace_period_secs")),
    ("EMERGENCY_ROTATION_ENABLED", Meaning::Sets("policy.emergency_rotation_enabled")),
    ("KMS_PROVIDER", Meaning::KmsProvider),
    ("KMS_REGION", Meaning::OfProviders(&["kms.aws.region", "kms.gcp.location"])),
    (
        "KMS_KEY_RING",
        Meaning::OfProviders(&["kms.aws.key", "kms.azure.vault", "kms.gcp.key_ring", "kms.vault.key"]),
    ),
    ("CDN_ENDPOINTS", Meaning::Sets("cdn.endpoints")),
    ("CDN_SYNC_TIMEOUT", Meaning::Sets("cdn.sync_timeout_millis")),
    ("CDN_RETRY_ATTEMPTS", Meaning::Sets("cdn.retry_attempts")),
    ("AUDIT_LOGGING_ENABLED", Meaning::NotYet),
];

/// What clouds, CDNs and their tools set for every program, so that it is taken where it is needed and not missed elsewhere.
const OF_CLOUDS: [(&str, Meaning); 8] = [
    ("AZURE_AUTHORITY_HOST", Meaning::Sets("kms.azure.authority_host")),
    ("AZURE_CLIENT_ID", Meaning::Sets("kms.azure.client_id")),
    ("AZURE_CLIENT_SECRET", Meaning::Sets("kms.azure.client_secret")),
    ("AZURE_FEDERATED_TOKEN_FILE", Meaning::Sets("kms.azure.federated_token_file")),
    ("AZURE_TENANT_ID", Meaning::Sets("kms.azure.tenant_id")),
    ("CLOUDFLARE_API_TOKEN", Meaning::Sets("cdn.cloudflare_api_token")),
    ("FASTLY_API_TOKEN", Meaning::Sets("cdn.fastly_api_token")),
    ("GOOGLE_CLOUD_PROJECT", Meaning::Sets("kms.gcp.project")),
];

/// Variables of our name that are no keys: the command line and the tests read them.
const NO_KEYS: [&str; 4] =
    ["KEYSHIELD_DEMO_TOKEN", "KEYSHIELD_TOKEN", "KEYSHIELD_CONTROL", "KEYSHIELD_CORPUS"];

/// What the environment says, as far as it concerns the shield.
#[derive(Clone, Default)]
pub struct Environment {
    variables: BTreeMap<String, OsString>,
}

impl Environment {
    /// The process's own.
    #[expect(clippy::disallowed_methods, reason = "this is the place that reads it")]
    pub fn of_process() -> Self {
        Self::of(std::env::vars_os())
    }

    pub fn of(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let named = variables.into_iter().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        Self { variables: named.filter(|(name, value)| concerns_us(name, value)).collect() }
    }

    /// Variables that are set and not honoured, by this version or with this KMS.
    pub fn ignored(&self, kms: &KeyringConfig) -> Vec<&'static str> {
        let sections: Vec<_> = kms.held().map(|kms| format!("kms.{}.", kms.provider())).collect();
        let is_held = |path: &&str| sections.iter().any(|section| path.starts_with(section));
        let is_ignored = |meaning: Meaning| match meaning {
            Meaning::NotYet => true,
            Meaning::OfProviders(paths) => !paths.iter().any(is_held),
            Meaning::Sets(_) | Meaning::KmsProvider => false,
        };
        let ignored = |(name, meaning): (&'static str, Meaning)| {
            (is_ignored(meaning) && self.variables.contains_key(name)).then_some(name)
        };
        GUIDE.into_iter().filter_map(ignored).collect()
    }

    /// The values that it gives to keys.
    pub(super) fn given(&self) -> Result<Vec<Given>, ConfigError> {
        let mut given = Vec::new();
        for (name, value) in &self.variables {
            let bad = |why: &str| {
                let value = value.to_string_lossy().into_owned();
                ConfigError::Environment { name: name.clone(), value, why: why.to_owned() }
            };
            let guide = GUIDE.into_iter().chain(OF_CLOUDS).find(|(known, _)| known == name);
            let source = Source::Variable(name.clone());
            // Not shown: it may be the URL of a database.
            let text = |key: &Key| {
                let (given_by, why) = (source.clone(), "must be Unicode".to_owned());
                value.to_str().ok_or(ConfigError::Kind { given_by, key: key.path.clone(), why })
            };
            let key = match guide {
                Some((_, Meaning::Sets(path))) => schema::get().key(path),
                Some((_, Meaning::NotYet)) => continue,
                Some((_, Meaning::OfProviders(paths))) => {
                    for key in paths.iter().filter_map(|path| schema::get().key(path)) {
                        given.push(Given::parse(key, text(key)?, source.clone())?);
                    }
                    continue;
                }
                Some((_, Meaning::KmsProvider)) => {
                    let Some(provider) = PROVIDERS.iter().find(|name| value.eq_ignore_ascii_case(name))
                    else {
                        let known = PROVIDERS.join(", ");
                        return Err(bad(&format!("this version wraps keys by one of: {known}")));
                    };
                    let Some(key) = schema::get().key("kms.provider") else { return Err(unknown(name)) };
                    given.push(Given::parse(key, provider, source)?);
                    continue;
                }
                None => schema::get().keys().iter().find(|key| key.variable() == *name),
            };
            let Some(key) = key else { return Err(unknown(name)) };
            given.push(Given::parse(key, text(key)?, source.clone())?);
        }
        Ok(given)
    }
}

fn unknown(name: &str) -> ConfigError {
    let variables: Vec<_> = schema::get().keys().iter().map(Key::variable).collect();
    // What all have in common makes none of them a likely slip.
    let own = |name: &str| name.trim_start_matches(PREFIX).to_owned();
    let known: Vec<_> = variables.iter().map(|variable| own(variable)).collect();
    let hint = match nearest(&own(name), known.iter().map(String::as_str)) {
        Some(near) => format!("; did you mean {PREFIX}{near}?"),
        None => format!("; a key such as shield.listen is called {PREFIX}SHIELD_LISTEN"),
    };
    ConfigError::UnknownVariable { name: name.to_owned(), hint }
}

fn concerns_us(name: &str, value: &OsString) -> bool {
    if GUIDE.iter().chain(&OF_CLOUDS).any(|(known, _)| *known == name) {
        return true;
    }
    name.starts_with(PREFIX) && !is_no_key(name) && !is_service_link(name, value)
}

fn is_no_key(name: &str) -> bool {
    NO_KEYS.contains(&name) || fault::VARIABLES.contains(&name)
}

/// Whether Kubernetes set it: every container is told of a Service called `keyshield` or `keyshield-…` by variables
/// such as `KEYSHIELD_SERVICE_HOST` and `KEYSHIELD_PORT_8080_TCP_ADDR`. Taken for slips of ours they would keep the
/// shield from starting next to its own Service.
fn is_service_link(name: &str, value: &OsString) -> bool {
    let protocol = |tail: &str| {
        let tail = tail.trim_start_matches(|c: char| c.is_ascii_digit());
        ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| tail.starts_with(protocol))
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.split("_PORT_").skip(1).any(protocol)
        || (name.ends_with("_PORT") && value.to_string_lossy().contains("://"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::of(variables.iter().map(|(name, value)| (name.into(), value.into())))
    }

    /// (key, value) of what is given, or the error.
    fn given(variables: &[(&str, &str)]) -> Result<Vec<(&'static str, String)>, String> {
        let given = environment(variables).given().map_err(|error| error.to_string())?;
        Ok(given.into_iter().map(|given| (given.key.path.as_str(), given.value.to_string())).collect())
    }

    fn check(name: &str, value: &str, expected: (&'static str, &str)) {
        check_all(name, value, &[expected]);
    }

    fn check_all(name: &str, value: &str, expected: &[(&'static str, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        assert_eq!(given(&[(name, value)]).unwrap(), expected, "{name}={value}");
    }

    #[test]
    fn the_guides_variables_set_their_keys() {
        check("DEFAULT_ROTATION_INTERVAL", "15", ("policy.rotation_interval_minutes", "15.0"));
        check("MAX_SEGMENTS_PER_KEY", "50", ("policy.segments_per_key", "50"));
        check("PRE_GENERATE_KEYS", "5", ("policy.pre_generate_keys", "5"));
        check("KEY_GRACE_PERIOD", "120", ("policy.grace_period_secs", "120"));
        check("EMERGENCY_ROTATION_ENABLED", "false", ("policy.emergency_rotation_enabled", "false"));
        check("KMS_PROVIDER", "Local", ("kms.provider", "\"local\""));
        check("KMS_PROVIDER", "VAULT", ("kms.provider", "\"vault\""));
        check("KMS_PROVIDER", "AWS", ("kms.provider", "\"aws\""));
        check("KMS_PROVIDER", "Azure", ("kms.provider", "\"azure\""));
        check("KMS_PROVIDER", "GCP", ("kms.provider", "\"gcp\""));
        let cdns = "[\"cdn1.example.com\", \"cdn2.example.com\"]";
        check("CDN_ENDPOINTS", "cdn1.example.com,cdn2.example.com", ("cdn.endpoints", cdns));
        check("CDN_SYNC_TIMEOUT", "5000", ("cdn.sync_timeout_millis", "5000"));
        check("CDN_RETRY_ATTEMPTS", "5", ("cdn.retry_attempts", "5"));
        let region = "\"us-east-1\"";
        check_all("KMS_REGION", "us-east-1", &[("kms.aws.region", region), ("kms.gcp.location", region)]);
        let key = "\"video-keys\"";
        let keys =
            ["kms.aws.key", "kms.azure.vault", "kms.gcp.key_ring", "kms.vault.key"].map(|path| (path, key));
        check_all("KMS_KEY_RING", "video-keys", &keys);
    }

    #[test]
    fn what_clouds_say_of_a_program_is_taken() {
        check("GOOGLE_CLOUD_PROJECT", "video", ("kms.gcp.project", "\"video\""));
        check("AZURE_CLIENT_SECRET", "sesame", ("kms.azure.client_secret", "\"sesame\""));
        check("CLOUDFLARE_API_TOKEN", "sesame", ("cdn.cloudflare_api_token", "\"sesame\""));
        check("FASTLY_API_TOKEN", "sesame", ("cdn.fastly_api_token", "\"sesame\""));
        assert_eq!(given(&[("GOOGLE_CLOUD_REGION", "a"), ("AZURE_HTTP_USER_AGENT", "b")]).unwrap(), []);
    }

    #[test]
    fn every_key_of_the_guides_exists() {
        for (name, meaning) in GUIDE.into_iter().chain(OF_CLOUDS) {
            let paths = match &meaning {
                Meaning::Sets(path) => std::slice::from_ref(path),
                Meaning::OfProviders(paths) => paths,
                Meaning::KmsProvider | Meaning::NotYet => &[],
            };
            for path in paths {
                assert!(schema::get().key(path).is_some(), "{name}: {path}");
            }
        }
    }

    #[test]
    fn every_key_has_a_variable_of_its_own() {
        let variables: std::collections::BTreeSet<_> =
            schema::get().keys().iter().map(Key::variable).collect();
        assert_eq!(variables.len(), schema::get().keys().len());
        for variable in &variables {
            assert!(concerns_us(variable, &"tcp://10.0.0.1:80".into()), "{variable}");
        }
    }

    #[test]
    fn values_are_read_as_their_keys_kind() {
        check("KEYSHIELD_SHIELD_LISTEN", "[::]:80", ("shield.listen", "\"[::]:80\""));
        check("KEYSHIELD_LOG_FORMAT", "\"json\"", ("log.format", "\"json\""));
        check("KEYSHIELD_STORE_DATABASE", "1", ("store.database", "\"1\""));
        check("KEYSHIELD_POLICY_SEGMENTS_PER_KEY", "50", ("policy.segments_per_key", "50"));
        check("KEYSHIELD_POLICY_ENCRYPT_INIT_SECTIONS", "true", ("policy.encrypt_init_sections", "true"));
        check("KEYSHIELD_CONTROL_JWT_ISSUER", "https://id", ("control.jwt.issuer", "\"https://id\""));
    }

    #[test]
    fn lists_are_toml_or_json_or_texts_between_commas() {
        let cors = "KEYSHIELD_SHIELD_CORS_ORIGINS";
        let two = ("shield.cors_origins", "[\"https://a\", \"https://b\"]");
        check(cors, "https://a, https://b", two);
        check(cors, "[\"https://a\", \"https://b\"]", two);
        check(cors, "", ("shield.cors_origins", "[]"));
        let origin = ("origins", "[{ name = \"a\", urls = [\"http://o\"] }]");
        check("KEYSHIELD_ORIGINS", "[{name = \"a\", urls = [\"http://o\"]}]", origin);
        check("KEYSHIELD_ORIGINS", "[{\"name\": \"a\", \"urls\": [\"http://o\"]}]", origin);
    }

    #[test]
    fn a_bad_value_names_its_variable_and_its_key() {
        for (name, value, key) in [
            ("DEFAULT_ROTATION_INTERVAL", "soon", "policy.rotation_interval_minutes must be a number"),
            ("MAX_SEGMENTS_PER_KEY", "5.5", "policy.segments_per_key must be a whole number"),
            (
                "EMERGENCY_ROTATION_ENABLED",
                "maybe",
                "policy.emergency_rotation_enabled must be true or false",
            ),
            ("KMS_PROVIDER", "abacus", "local, aws, azure, gcp"),
        ] {
            let error = given(&[(name, value)]).unwrap_err();
            assert!(error.contains(name) && error.contains(value) && error.contains(key), "{error}");
        }
        let error = given(&[("KEYSHIELD_CONTROL_TOKENS", "[{sha256 = \"abcd\"")]).unwrap_err();
        assert!(error.contains("control.tokens must be a list") && !error.contains("abcd"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }

    #[test]
    fn an_unknown_variable_is_told_the_one_that_was_meant() {
        assert_eq!(
            given(&[("KEYSHIELD_SHEILD_LISTEN", "")]),
            Err(
                "unknown environment variable KEYSHIELD_SHEILD_LISTEN; did you mean KEYSHIELD_SHIELD_LISTEN?"
                    .into()
            )
        );
        let error = given(&[("KEYSHIELD_X", "")]).unwrap_err();
        assert!(error.contains("KEYSHIELD_X") && error.contains("shield.listen"), "{error}");
    }

    #[test]
    fn variables_of_the_command_line_and_of_kubernetes_are_no_keys() {
        for name in NO_KEYS {
            assert_eq!(given(&[(name, "x")]), Ok(Vec::new()), "{name}");
        }
        for (name, value) in [
            ("KEYSHIELD_SERVICE_HOST", "10.0.0.1"),
            ("KEYSHIELD_SERVICE_PORT", "8080"),
            ("KEYSHIELD_SERVICE_PORT_HTTP", "8080"),
            ("KEYSHIELD_PORT", "tcp://10.0.0.1:8080"),
            ("KEYSHIELD_CONTROL_PORT_8081_TCP", "tcp://10.0.0.1:8081"),
            ("KEYSHIELD_PORT_8080_TCP_PROTO", "tcp"),
        ] {
            assert_eq!(given(&[(name, value)]), Ok(Vec::new()), "{name}");
        }
        assert!(given(&[("KEYSHIELD_PORT", "8080")]).is_err());
    }

    #[test]
    fn what_is_not_honoured_yet_is_said() {
        let set =
            environment(&[("AUDIT_LOGGING_ENABLED", "a"), ("PRE_GENERATE_KEYS", "3"), ("KMS_REGION", "b")]);
        let wraps = crate::config::KmsConfig::Local { master_key_file: "keyshield.master".into() };
        let local = KeyringConfig { wraps, also: Vec::new() };
        assert_eq!(set.ignored(&local), ["KMS_REGION", "AUDIT_LOGGING_ENABLED"]);
        assert_eq!(environment(&[("KMS_KEY_RING", "a")]).ignored(&local), ["KMS_KEY_RING"]);
        #[cfg(feature = "kms-vault")]
        {
            let mut raw = crate::config::raw::RawKms { provider: "vault".into(), ..Default::default() };
            raw.vault.token = "t".into();
            let set = environment(&[("KMS_KEY_RING", "a"), ("KMS_REGION", "b")]);
            assert_eq!(set.ignored(&crate::config::kms::keyring(&raw).unwrap()), ["KMS_REGION"]);
        }
    }
}
