//! Defaults < file < environment < flags: one table, and for each value in it the layer that gave it.
//!
//! Each layer replaces single keys; a list is one value and is replaced whole. What two names within one layer say
//! about one key must agree: no order among them would be the expected one.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::effective::{self, Effective, masked};
use super::environment::Environment;
use super::file::ConfigFile;
use super::raw::RawConfig;
use super::schema::{self, Fault, Key, Misfit, join, nearest};
use super::{Config, ConfigError};

/// What gave a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    Default,
    File {
        path: PathBuf,
        line: usize,
    },
    /// By its name.
    Variable(String),
    /// By its name, dashes included.
    Flag(&'static str),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line } => write!(f, "file {}, line {line}", path.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// A key's value from the command line.
#[derive(Clone)]
pub struct Setting {
    /// By its name, dashes included.
    pub flag: &'static str,
    /// Such as `shield.listen`.
    pub key: String,
    /// As in the environment.
    pub value: String,
}

/// A value for a key, from the environment or the command line.
pub(super) struct Given {
    pub(super) key: &'static Key,
    pub(super) value: Value,
    pub(super) source: Source,
}

impl Given {
    pub(super) fn parse(key: &'static Key, text: &str, source: Source) -> Result<Self, ConfigError> {
        match key.parse(text) {
            Ok(value) => Ok(Self { key, value, source }),
            Err(why) => Err(ConfigError::Kind { given_by: source, key: key.path.clone(), why }),
        }
    }
}

/// The layers so far, the last one uppermost.
pub struct Layers {
    values: Table,
    sources: BTreeMap<String, Source>,
}

impl Layers {
    /// The lowest layer.
    pub fn over(defaults: &RawConfig) -> Self {
        // Numbers beyond those of TOML are the only ones that could not be written; no default is that large.
        let values = Table::try_from(defaults).expect("the defaults can be written as TOML");
        Self { values, sources: BTreeMap::new() }
    }

    /// # Errors
    /// The first thing in the file that is no TOML, no key or not of its key's kind.
    pub fn file(&mut self, path: &Path) -> Result<(), ConfigError> {
        let file = ConfigFile::read(path)?;
        self.put_file(path, &file);
        Ok(())
    }

    fn put_file(&mut self, path: &Path, file: &ConfigFile) {
        let source = |key: &str| Source::File { path: path.to_owned(), line: file.line(key) };
        self.put_table("", &file.values, &source);
    }

    /// # Errors
    /// The first variable that is unknown, or whose value makes no sense; two that disagree.
    pub fn environment(&mut self, environment: &Environment) -> Result<(), ConfigError> {
        self.put_given(environment.given()?)
    }

    /// # Errors
    /// The first setting whose key is unknown, or whose value makes no sense; two that disagree.
    pub fn flags(&mut self, settings: &[Setting]) -> Result<(), ConfigError> {
        let given = settings.iter().map(|Setting { flag, key, value }| {
            let source = Source::Flag(flag);
            match schema::get().key(key) {
                Some(key) => Given::parse(key, value, source),
                None => {
                    let near = nearest(key, schema::get().keys().iter().map(|key| key.path.as_str()));
                    let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                    Err(ConfigError::Unknown { given_by: source, key: key.clone(), hint })
                }
            }
        });
        self.put_given(given.collect::<Result<_, _>>()?)
    }

    /// The checked whole.
    ///
    /// # Errors
    /// The first value that makes no sense.
    pub fn finish(self) -> Result<Effective, ConfigError> {
        let mut raw: RawConfig = serde_path_to_error::deserialize(Value::Table(self.values.clone()))
            .map_err(|error| {
                let key = error.path().to_string();
                let why = error.inner().message().replace('\n', ", ");
                ConfigError::Entry { field: key, why }.at(|key| self.source_of(key))
            })?;
        if !self.sources.contains_key("policy.iv_mode") {
            raw.policy.drop_idle_iv_mode();
        }
        let config = Config::checked(&raw).map_err(|error| error.at(|key| self.source_of(key)))?;
        Ok(Effective { config, values: effective::values(&raw, &self.sources) })
    }

    /// What gave a key, or else what it is part of.
    fn source_of(&self, key: &str) -> Source {
        let mut path = key;
        loop {
            if let Some(source) = self.sources.get(path) {
                return source.clone();
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return Source::Default,
            }
        }
    }

    fn put_given(&mut self, given: Vec<Given>) -> Result<(), ConfigError> {
        for (at, one) in given.iter().enumerate() {
            if let Some(Misfit { key, fault }) = one.key.misfits(&one.value).into_iter().next() {
                let given_by = one.source.clone();
                return Err(match fault {
                    Fault::Unknown { hint } => ConfigError::Unknown { given_by, key, hint },
                    Fault::Kind { why } => ConfigError::Kind { given_by, key, why },
                });
            }
            let differs = |other: &&Given| other.key.path == one.key.path && other.value != one.value;
            if let Some(other) = given[at + 1..].iter().find(differs) {
                let shown = |given: &Given| masked(&given.key.path, given.value.clone()).to_string();
                return Err(ConfigError::Disagree {
                    key: one.key.path.clone(),
                    one: one.source.clone(),
                    one_value: shown(one),
                    other: other.source.clone(),
                    other_value: shown(other),
                });
            }
        }
        for Given { key, value, source } in given {
            self.put(&key.path, value, &|_| source.clone());
        }
        Ok(())
    }

    fn put_table(&mut self, path: &str, table: &Table, source: &dyn Fn(&str) -> Source) {
        for (name, value) in table {
            let path = join(path, name);
            match value {
                Value::Table(table) => {
                    // Even an empty one is there: [control.jwt] asks for what belongs into it.
                    table_at(&mut self.values, &path);
                    self.sources.insert(path.clone(), source(&path));
                    self.put_table(&path, table, source);
                }
                value => self.put(&path, value.clone(), source),
            }
        }
    }

    fn put(&mut self, path: &str, value: Value, source: &dyn Fn(&str) -> Source) {
        let elements = format!("{path}[");
        self.sources.retain(|key, _| !key.starts_with(&elements));
        self.sources.insert(path.to_owned(), source(path));
        self.record(path, &value, source);
        let (table, name) = match path.rsplit_once('.') {
            Some((section, name)) => {
                self.sources.entry(section.to_owned()).or_insert_with(|| source(section));
                (table_at(&mut self.values, section), name)
            }
            None => (&mut self.values, path),
        };
        table.insert(name.to_owned(), value);
    }

    /// Notes what gave the parts of a value.
    fn record(&mut self, path: &str, value: &Value, source: &dyn Fn(&str) -> Source) {
        let mut part = |path: String, value: &Value| {
            self.sources.insert(path.clone(), source(&path));
            self.record(&path, value, source);
        };
        match value {
            Value::Table(table) => table.iter().for_each(|(name, value)| part(join(path, name), value)),
            Value::Array(elements) => {
                (0..).zip(elements).for_each(|(at, value): (usize, _)| part(format!("{path}[{at}]"), value));
            }
            _ => {}
        }
    }
}

/// The table of a path, made where it is not there yet.
fn table_at<'t>(root: &'t mut Table, path: &str) -> &'t mut Table {
    path.split('.').fold(root, |table, name| {
        let entry = table.entry(name).or_insert_with(|| Value::Table(Table::new()));
        // Every layer was checked against the schema: a section is a table in all of them.
        entry.as_table_mut().expect("sections are tables")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "[shield]\nlisten = \"127.0.0.1:1\"\nthreads = 2\n[log]\nformat = \"json\"\n";
    const ORIGINS: &str = "[[origins]]\nname = \"a\"\nurls = [\"http://a.example\"]\n\
                           [[origins]]\nname = \"b\"\nmount = \"/b\"\nurls = [\"http://b.example\"]\n";

    fn setting(flag: &'static str, key: &str, value: &str) -> Setting {
        Setting { flag, key: key.into(), value: value.into() }
    }

    fn load(file: &str, variables: &[(&str, &str)], settings: &[Setting]) -> Result<Effective, String> {
        let load = || {
            let mut layers = Layers::over(&RawConfig::default());
            let path = Path::new("k.toml");
            layers.put_file(path, &ConfigFile::parse(path, file)?);
            let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
            layers.environment(&Environment::of(variables))?;
            layers.flags(settings)?;
            layers.finish()
        };
        load().map_err(|error: ConfigError| error.to_string())
    }

    /// `value   # source` of a key.
    fn shown(effective: &Effective, key: &str) -> String {
        let value = effective.values.iter().find(|value| value.key == key).expect(key);
        format!("{}   # {}", value.value, value.source)
    }

    #[test]
    fn each_layer_goes_over_the_one_below_and_is_named() {
        let variables = [("KEYSHIELD_SHIELD_LISTEN", "127.0.0.1:2"), ("KEYSHIELD_LOG_FILTER", "debug")];
        let flags = [setting("--listen", "shield.listen", "127.0.0.1:3")];
        for (variables, settings, listen) in [
            (&[][..], &[][..], "\"127.0.0.1:1\"   # file k.toml, line 2"),
            (&variables, &[], "\"127.0.0.1:2\"   # environment variable KEYSHIELD_SHIELD_LISTEN"),
            (&variables, &flags, "\"127.0.0.1:3\"   # flag --listen"),
        ] {
            let effective = load(FILE, variables, settings).unwrap();
            assert_eq!(shown(&effective, "shield.listen"), listen);
            assert!(listen.contains(&effective.config.listen.to_string()));
            assert_eq!(shown(&effective, "shield.threads"), "2   # file k.toml, line 3");
            assert_eq!(shown(&effective, "control.listen"), "\"127.0.0.1:8081\"   # default");
        }
    }

    #[test]
    fn every_key_can_be_set_by_its_variable_and_by_set() {
        let everything = load(ORIGINS, &[], &[]).unwrap();
        let shown = |key: &Key| {
            let value = everything.values.iter().find(|value| value.key == key.path)?;
            Some((key.variable(), key.path.clone(), value.value.to_string()))
        };
        let keys: Vec<_> = schema::get().keys().iter().filter_map(shown).collect();
        assert!(keys.len() > 40);
        let variables: Vec<_> = keys.iter().map(|(name, _, value)| (name.as_str(), value.as_str())).collect();
        let settings: Vec<_> = keys.iter().map(|(_, key, value)| setting("--set", key, value)).collect();
        let by_variable = load(ORIGINS, &variables, &[]).unwrap();
        let by_set = load(ORIGINS, &[], &settings).unwrap();
        assert_eq!(by_variable.config, everything.config);
        assert_eq!(by_set.config, everything.config);
        for (variable, key, _) in &keys {
            let source = |of: &Effective| of.values.iter().find(|v| v.key == *key).unwrap().source.clone();
            assert_eq!(source(&by_variable), Source::Variable(variable.clone()), "{key}");
            assert_eq!(source(&by_set), Source::Flag("--set"), "{key}");
        }
    }

    #[test]
    fn a_list_is_replaced_whole() {
        let effective = load(ORIGINS, &[], &[]).unwrap();
        assert_eq!(shown(&effective, "origins[1].mount"), "\"/b\"   # file k.toml, line 6");
        assert_eq!(shown(&effective, "origins[0].mount"), "\"/\"   # default");
        let origins = [("KEYSHIELD_ORIGINS", "[{name = \"c\", urls = [\"http://c.example\"]}]")];
        let effective = load(ORIGINS, &origins, &[]).unwrap();
        assert_eq!(shown(&effective, "origins[0].name"), "\"c\"   # environment variable KEYSHIELD_ORIGINS");
        assert_eq!(shown(&effective, "origins[0].mount"), "\"/\"   # default");
        assert!(!effective.values.iter().any(|value| value.key.starts_with("origins[1]")));
    }

    #[test]
    fn the_guides_variables_go_over_the_file() {
        let file = "[policy]\nsegments_per_key = 10\nemergency_rotation_enabled = true\n";
        let variables = [("MAX_SEGMENTS_PER_KEY", "50"), ("EMERGENCY_ROTATION_ENABLED", "false")];
        let effective = load(file, &variables, &[]).unwrap();
        assert_eq!(
            shown(&effective, "policy.segments_per_key"),
            "50   # environment variable MAX_SEGMENTS_PER_KEY"
        );
        assert!(shown(&effective, "policy.emergency_rotation_enabled").starts_with("false   #"));
    }

    #[test]
    fn an_iv_mode_that_nobody_gave_is_not_there_for_a_method_without_one() {
        let gcm = "[policy]\nkey_method = \"AES-256-GCM\"\n";
        let effective = load(gcm, &[], &[]).unwrap();
        assert!(!effective.values.iter().any(|value| value.key == "policy.iv_mode"));
        let given = [("KEYSHIELD_POLICY_IV_MODE", "segment")];
        let error = load(gcm, &given, &[]).unwrap_err();
        let expected = "policy.iv_mode = \"segment\": must be left out with AES-256-GCM, whose segments carry their \
                        own IVs (environment variable KEYSHIELD_POLICY_IV_MODE)";
        assert_eq!(error, expected);
    }

    #[test]
    fn two_names_for_one_key_must_agree() {
        let (guide, own) =
            (("DEFAULT_ROTATION_INTERVAL", "15"), "KEYSHIELD_POLICY_ROTATION_INTERVAL_MINUTES");
        assert!(load("", &[guide, (own, "15.0")], &[]).is_ok());
        let error = load("", &[guide, (own, "20")], &[]).unwrap_err();
        for part in [guide.0, own, "policy.rotation_interval_minutes", "15.0", "20.0"] {
            assert!(error.contains(part), "{error}");
        }
        let settings = [
            setting("--set", "store.database", "postgres://u:secret1@db/a"),
            setting("--database", "store.database", "postgres://u:secret2@db/a"),
        ];
        let error = load("", &[], &settings).unwrap_err();
        assert!(error.contains("flag --set and flag --database disagree on store.database"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn secrets_are_masked() {
        let hash = "0123456789abcdef".repeat(4);
        let tokens = format!("[{{name = \"ci\", role = \"viewer\", sha256 = \"{hash}\"}}]");
        let variables = [
            ("KEYSHIELD_CONTROL_TOKENS", tokens.as_str()),
            ("KEYSHIELD_STORE_DATABASE", "postgres://user:sesame@db.example/keys"),
            ("KMS_PROVIDER", "Vault"),
            ("KEYSHIELD_KMS_VAULT_TOKEN", "s.sesame"),
            ("AZURE_CLIENT_SECRET", "open.sesame"),
            ("KEYSHIELD_CDN_EDGE_SECRET", hash.as_str()),
            ("CLOUDFLARE_API_TOKEN", "cf.sesame"),
            ("FASTLY_API_TOKEN", "fastly.sesame"),
            ("KEYSHIELD_CDN_CUSTOM_TOKEN", "custom.sesame"),
        ];
        let effective = load("", &variables, &[]).unwrap();
        assert!(shown(&effective, "store.database").starts_with("\"postgres://user:***@db.example/keys\""));
        assert!(shown(&effective, "kms.vault.token").starts_with("\"***\""));
        assert!(shown(&effective, "kms.azure.client_secret").starts_with("\"***\""));
        for key in ["edge_secret", "cloudflare_api_token", "fastly_api_token", "custom_token"] {
            assert!(shown(&effective, &format!("cdn.{key}")).starts_with("\"***\""), "{key}");
        }
        assert!(shown(&effective, "control.tokens[0].sha256").starts_with("\"01234567…\""));
        let debug = format!("{effective:?}");
        assert!(!debug.contains("sesame") && !debug.contains(&hash), "{debug}");
    }

    #[test]
    fn what_makes_no_sense_names_the_layer_that_said_it() {
        let check = |file, variables: &[(&str, &str)], settings: &[Setting], expected: &str| {
            assert_eq!(load(file, variables, settings).err().as_deref(), Some(expected));
        };
        check(
            "\n[store]\nlease_secs = 1\n",
            &[],
            &[],
            "store.lease_secs = \"1\": must be between 2 and 300 (file k.toml, line 3)",
        );
        check(
            "",
            &[("MAX_SEGMENTS_PER_KEY", "0")],
            &[],
            "policy.segments_per_key: must be between 1 and 1000000 (environment variable MAX_SEGMENTS_PER_KEY)",
        );
        check(
            "[store]\nmax_connections = 4294967296\n",
            &[],
            &[],
            "store.max_connections: invalid value: integer `4294967296`, expected u32 (file k.toml, line 2)",
        );
        check(
            "",
            &[],
            &[setting("--listen", "shield.listen", "here")],
            "shield.listen = \"here\": must be IP:PORT, such as 127.0.0.1:8080 or [::]:8080 (flag --listen)",
        );
        check(
            "[control]\nlisten = \"127.0.0.1:1\"\n",
            &[("KEYSHIELD_CONTROL_JWT_JWKS_FILE", "jwks.json")],
            &[],
            "control.jwt.issuer: must be given (environment variable KEYSHIELD_CONTROL_JWT_JWKS_FILE)",
        );
        check(
            "[control.jwt]\n",
            &[],
            &[],
            "control.jwt: exactly one of jwks_file and jwks_url must be given (file k.toml, line 1)",
        );
        check(
            "[[streams]]\nid = \"ch1\"\nplaylist_url = \"http://a.example/a.m3u8\"\n\
             [streams.policy]\niv_mode = \"x\"\n[[origins]]\nname = \"a\"\nurls = [\"http://a.example\"]\n",
            &[],
            &[],
            "streams[0].policy.iv_mode = \"x\": stream ch1: must be \"segment\", \"period\" or \"sequence\" \
             (file k.toml, line 5)",
        );
    }

    #[test]
    fn unknown_keys_in_the_environment_and_in_flags_are_errors() {
        let origins = [("KEYSHIELD_ORIGINS", "[{name = \"a\", url = [\"http://a.example\"]}]")];
        assert_eq!(
            load("", &origins, &[]).unwrap_err(),
            "environment variable KEYSHIELD_ORIGINS: unknown key origins[0].url; did you mean origins[0].urls?"
        );
        assert_eq!(
            load("", &[], &[setting("--set", "store.databse", "a.db")]).unwrap_err(),
            "flag --set: unknown key store.databse; did you mean store.database?"
        );
        let error = load("", &[("KEYSHIELD_STREAMS", "[{id = 1}]")], &[]).unwrap_err();
        assert!(error.contains("streams[0].id must be a text, not a whole number"), "{error}");
    }

    #[test]
    fn nothing_at_all_is_no_configuration() {
        let load = |variables: &[(&str, &str)]| {
            let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
            Config::load(None, &Environment::of(variables), &[]).map_err(|error| error.to_string())
        };
        assert!(load(&[]).unwrap_err().contains("--config FILE"));
        assert!(load(&[("KEYSHIELD_ORIGINS", "[{name = \"a\", urls = [\"http://a.example\"]}]")]).is_ok());
    }
}
