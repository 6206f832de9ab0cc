//! Every key that there is: its path, what it holds, and what it is called in the environment.
//!
//! Made from the raw types by writing one of them out with everything given, so that a key that is added there is
//! known here, to the environment and to the flags. Values come as texts or as TOML; both are judged here.

use std::sync::LazyLock;

use toml::{Table, Value};

use super::raw::{
    RawCdn, RawCdnRules, RawConfig, RawControl, RawJwt, RawKms, RawOrigin, RawPolicy, RawStream, RawToken,
};

/// The configuration with everything given once: tables hold all their keys, lists hold one element.
fn everything() -> RawConfig {
    let text = String::new;
    RawConfig {
        control: RawControl {
            tokens: vec![RawToken::default()],
            jwt: Some(RawJwt { jwks_file: Some(text()), jwks_url: Some(text()), ..RawJwt::default() }),
            ..RawControl::default()
        },
        cdn: RawCdnRules { endpoints: vec![text()], ..RawCdnRules::default() },
        cdns: vec![RawCdn::everything()],
        kms: RawKms { also: vec![text()], ..RawKms::default() },
        policy: RawPolicy::guide(),
        origins: vec![RawOrigin { urls: vec![text()], query_params: vec![text()], ..RawOrigin::default() }],
        streams: vec![RawStream {
            path_prefix: Some(text()),
            policy: RawPolicy::guide(),
            ..RawStream::default()
        }],
        ..RawConfig::default()
    }
}

/// A key with a value of its own: `shield.listen`, `origins`, `control.jwt.issuer`.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) path: String,
    /// An example of what it holds.
    holds: Value,
}

/// What is wrong with a value that was given, and where in it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Misfit {
    pub(super) key: String,
    pub(super) fault: Fault,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// There is no such key; what may have been meant.
    Unknown { hint: String },
    /// What it must be.
    Kind { why: String },
}

#[derive(Debug)]
pub(super) struct Schema {
    root: Value,
    keys: Vec<Key>,
}

pub(super) fn get() -> &'static Schema {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        // It holds texts, numbers, lists and tables: what TOML holds.
        let root = Value::try_from(everything()).expect("the raw types can be written as TOML");
        let mut keys = Vec::new();
        collect("", &root, &mut keys);
        Schema { root, keys }
    });
    &SCHEMA
}

fn collect(path: &str, holds: &Value, keys: &mut Vec<Key>) {
    match holds {
        Value::Table(table) => {
            table.iter().for_each(|(name, value)| collect(&join(path, name), value, keys));
        }
        _ => keys.push(Key { path: path.to_owned(), holds: holds.clone() }),
    }
}

/// The path of a table's key.
pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

impl Schema {
    /// In the order of the raw types.
    pub(super) fn keys(&self) -> &[Key] {
        &self.keys
    }

    pub(super) fn key(&self, path: &str) -> Option<&Key> {
        self.keys.iter().find(|key| key.path == path)
    }

    /// Everything in a document that is not as it should be.
    pub(super) fn misfits(&self, document: &Table) -> Vec<Misfit> {
        let mut found = Vec::new();
        misfits_of_table(self.root.as_table().unwrap_or(document), document, "", &mut found);
        found
    }
}

impl Key {
    /// `KEYSHIELD_SHIELD_LISTEN` for `shield.listen`.
    pub(super) fn variable(&self) -> String {
        format!("KEYSHIELD_{}", self.path.replace('.', "_").to_uppercase())
    }

    /// The value that a text from the environment or the command line means.
    ///
    /// # Errors
    /// What it must be.
    pub(super) fn parse(&self, text: &str) -> Result<Value, String> {
        let not = |what: &str| format!("must be {what}, not {text:?}");
        let kind = noun(&self.holds);
        match &self.holds {
            Value::String(_) => Ok(Value::String(unquoted(text))),
            Value::Integer(_) => text.parse().map(Value::Integer).map_err(|_| not(kind)),
            Value::Float(_) => text.parse().map(Value::Float).map_err(|_| not(kind)),
            Value::Boolean(_) => text.parse().map(Value::Boolean).map_err(|_| not(kind)),
            Value::Array(elements) => list(elements, text.trim()),
            Value::Table(_) | Value::Datetime(_) => Err(not(kind)),
        }
    }

    /// Everything in a value that is not as it should be.
    pub(super) fn misfits(&self, value: &Value) -> Vec<Misfit> {
        let mut found = Vec::new();
        misfits(&self.holds, value, &self.path, &mut found);
        found
    }
}

/// Texts need no quotes outside of lists; whoever writes them anyway means the same.
fn unquoted(text: &str) -> String {
    match text.parse() {
        Ok(Value::String(inner)) if text.starts_with('"') => inner,
        _ => text.to_owned(),
    }
}

fn list(elements: &[Value], text: &str) -> Result<Value, String> {
    let plain = matches!(elements, [Value::String(_), ..]);
    if plain && !text.starts_with('[') {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        return Ok(Value::Array(parts.map(|part| Value::String(part.to_owned())).collect()));
    }
    // JSON is what a tool writes.
    let value = text.parse::<Value>().or_else(|error| serde_json::from_str(text).map_err(|_| error));
    // The text is not shown: a list of tokens holds hashes.
    value.map_err(|error| format!("must be a list as in TOML or JSON: {}", error.message()))
}

/// What a value is, for people.
fn noun(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

fn misfits(holds: &Value, given: &Value, path: &str, found: &mut Vec<Misfit>) {
    let mut wrong = |why: String| found.push(Misfit { key: path.to_owned(), fault: Fault::Kind { why } });
    match (holds, given) {
        (Value::Table(known), Value::Table(given)) => misfits_of_table(known, given, path, found),
        (Value::Array(elements), Value::Array(given)) => {
            let elements = elements.first().into_iter().cycle();
            for (at, (holds, given)) in elements.zip(given).enumerate() {
                misfits(holds, given, &format!("{path}[{at}]"), found);
            }
        }
        (Value::Integer(_), Value::Integer(number)) if *number < 0 => wrong("must not be negative".into()),
        // A number may be written without its point.
        (Value::Float(_), Value::Integer(_)) => {}
        _ if holds.same_type(given) => {}
        _ => wrong(format!("must be {}, not {}", noun(holds), noun(given))),
    }
}

fn misfits_of_table(known: &Table, given: &Table, path: &str, found: &mut Vec<Misfit>) {
    for (name, value) in given {
        let key = join(path, name);
        match known.get(name) {
            Some(holds) => misfits(holds, value, &key, found),
            None => found.push(Misfit { key, fault: Fault::Unknown { hint: hint(known, path, name) } }),
        }
    }
}

/// What an unknown key may have been meant to be: a key of its table, one of that name in another section, or any
/// of those that its table has.
fn hint(known: &Table, path: &str, name: &str) -> String {
    if let Some(near) = nearest(name, known.keys().map(String::as_str)) {
        return format!("; did you mean {}?", join(path, near));
    }
    let named = |key: &&Key| key.path.rsplit('.').next() == Some(name);
    if let Some(key) = get().keys().iter().find(named) {
        return format!("; did you mean {}?", key.path);
    }
    let names: Vec<_> = known.keys().map(String::as_str).collect();
    format!("; known here: {}", names.join(", "))
}

/// The known name that `wanted` is most likely a slip of.
pub(super) fn nearest<'a>(wanted: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let near = known.map(|name| (strsim::damerau_levenshtein(wanted, name), name));
    // A third of the letters may be wrong: beyond that, names of quite other things match.
    let near = near.filter(|(distance, name)| distance * 3 <= wanted.len().max(name.len()));
    near.min_by_key(|(distance, _)| *distance).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields that serde knows for the table at `path`, from what it says about one that it does not know.
    fn fields(path: &str) -> Vec<String> {
        let text = format!("{path}\nno_such_key = 1\n");
        let error = toml::from_str::<RawConfig>(&text).unwrap_err().message().to_owned();
        let names: Vec<_> = error.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        assert_eq!(names[0], "no_such_key", "{error}");
        names[1..].to_vec()
    }

    fn names(value: &Value) -> Vec<String> {
        value.as_table().unwrap().keys().cloned().collect()
    }

    #[test]
    fn the_schema_has_every_field_of_the_raw_types() {
        let root = &get().root;
        assert_eq!(names(root), fields(""));
        for (section, value) in root.as_table().unwrap() {
            let (header, value) = match value {
                Value::Array(elements) => (format!("[[{section}]]"), &elements[0]),
                value => (format!("[{section}]"), value),
            };
            assert_eq!(names(value), fields(&header), "{header}");
        }
        let control = &root["control"];
        assert_eq!(names(&control["tokens"][0]), fields("[[control.tokens]]"));
        assert_eq!(names(&control["jwt"]), fields("[control.jwt]"));
        for kind in ["cloudflare", "cloudfront", "fastly", "custom"] {
            let header = format!("[[cdns]]\n[cdns.{kind}]");
            assert_eq!(names(&root["cdns"][0][kind]), fields(&header), "{header}");
        }
        assert_eq!(names(&root["streams"][0]["policy"]), fields("[[streams]]\n[streams.policy]"));
    }

    #[test]
    fn every_list_has_an_element_to_judge_others_by() {
        fn check(path: &str, value: &Value) {
            match value {
                Value::Array(elements) => {
                    assert!(!elements.is_empty(), "{path}");
                    elements.iter().for_each(|element| check(path, element));
                }
                Value::Table(table) => table.iter().for_each(|(name, value)| check(&join(path, name), value)),
                _ => {}
            }
        }
        check("", &get().root);
    }

    #[test]
    fn keys_are_what_has_a_value_of_its_own() {
        for path in
            ["shield.listen", "shield.cors_origins", "origins", "control.tokens", "control.jwt.issuer"]
        {
            assert!(get().key(path).is_some(), "{path}");
        }
        for path in ["shield", "control.jwt", "origins[0].name", "origins.name", ""] {
            assert!(get().key(path).is_none(), "{path}");
        }
    }

    #[test]
    fn the_nearest_name_is_near() {
        let names = || ["listen", "threads", "cors_origins"].into_iter();
        assert_eq!(nearest("lisen", names()), Some("listen"));
        assert_eq!(nearest("thraeds", names()), Some("threads"));
        assert_eq!(nearest("cors_origin", names()), Some("cors_origins"));
        assert_eq!(nearest("workers", names()), None);
    }
}
