//! What the layers came to: every value, with the place that it came from. Secrets are masked.

use std::collections::BTreeMap;

use toml::{Table, Value};

use super::raw::RawConfig;
use super::schema::join;
use super::secrets::{masked_hash, masked_url, masked_webhook};
use super::{Config, Source};

/// A configuration with the origin of each of its values.
#[derive(Debug, Clone, PartialEq)]
pub struct Effective {
    pub config: Config,
    pub values: Vec<EffectiveValue>,
}

/// One value that holds, fit to be shown.
#[derive(Debug, Clone, PartialEq)]
pub struct EffectiveValue {
    /// `shield.listen`, `origins[0].name`
    pub key: String,
    pub value: Value,
    pub source: Source,
}

/// Every value, in the order of the raw types.
pub(super) fn values(raw: &RawConfig, sources: &BTreeMap<String, Source>) -> Vec<EffectiveValue> {
    // It was read from a table.
    let table = Table::try_from(raw).expect("the raw types can be written as TOML");
    let mut found = Vec::new();
    flatten("", Value::Table(table), &mut |key, value| {
        let source = sources.get(&key).cloned().unwrap_or(Source::Default);
        found.push(EffectiveValue { value: masked(&key, value), key, source });
    });
    found
}

/// Tables, and lists of tables, are taken apart.
fn flatten(path: &str, value: Value, found: &mut impl FnMut(String, Value)) {
    match value {
        Value::Table(table) => {
            for (name, value) in table {
                flatten(&join(path, &name), value, found);
            }
        }
        Value::Array(elements) if elements.first().is_some_and(Value::is_table) => {
            for (at, element) in elements.into_iter().enumerate() {
                flatten(&format!("{path}[{at}]"), element, found);
            }
        }
        value => found(path.to_owned(), value),
    }
}

/// Keys whose values are not shown.
const SECRETS: [&str; 6] = [
    "cdn.cloudflare_api_token",
    "cdn.custom_token",
    "cdn.edge_secret",
    "cdn.fastly_api_token",
    "kms.azure.client_secret",
    "kms.vault.token",
];

/// The value without what is secret in it.
pub(super) fn masked(key: &str, value: Value) -> Value {
    match value {
        Value::String(text) if key.ends_with(".sha256") => Value::String(masked_hash(&text)),
        Value::String(text) if SECRETS.contains(&key) && !text.is_empty() => Value::String("***".into()),
        Value::String(text) if key == "alerts.webhook_url" => Value::String(masked_webhook(&text)),
        Value::String(text) => Value::String(masked_url(&text)),
        Value::Array(elements) => {
            Value::Array(elements.into_iter().map(|element| masked(key, element)).collect())
        }
        Value::Table(table) => {
            let parts = table.into_iter().map(|(name, value)| {
                let value = masked(&join(key, &name), value);
                (name, value)
            });
            Value::Table(parts.collect())
        }
        value => value,
    }
}
