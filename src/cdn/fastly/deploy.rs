//! Bringing the code of the edge into a Fastly service: clone the active version, change its snippets, let Fastly
//! validate it, activate it.
//!
//! A version that is active cannot be changed, and one that Fastly finds wrong is never activated: until the very last
//! call, viewers have what they had. A draft that was found wrong stays, so that it can be looked at. Deliberately
//! absent: whatever else the service has (backends, domains, other snippets) is cloned and left as it is.

use http::Method;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::api::Api;
use super::code::{FastlyEdgeCode, KEYS, SECRETS, Snippet, caching_rule};
use super::dictionary::unreadable;
use crate::cdn::{CdnError, CdnFault};

/// A service with years of versions, or with large snippets of its own.
const MAX_LIST_BYTES: usize = 8 << 20;

/// What a deployment came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FastlyDeployed {
    /// The active version.
    pub version: u64,
    /// Whether it was made now; otherwise all was there, and only the secrets were written again.
    pub is_new: bool,
    /// The dictionary that keys belong into: the setting `dictionary_id`. None in pull mode.
    pub dictionary_id: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Version {
    number: u64,
    #[serde(default)]
    active: Option<bool>,
}

#[derive(Debug, Deserialize)]
struct Present {
    name: String,
    #[serde(rename = "type")]
    place: String,
    #[serde(default)]
    content: Option<String>,
    /// A number, or a number as text.
    #[serde(default)]
    priority: serde_json::Value,
    #[serde(default)]
    dynamic: serde_json::Value,
}

#[derive(Debug, Deserialize)]
struct Dictionary {
    id: String,
    name: String,
    #[serde(default)]
    write_only: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Validated {
    status: String,
    msg: Option<String>,
    errors: Vec<String>,
}

/// IDs of the two dictionaries.
#[derive(Debug, Default)]
struct Stores {
    keys: Option<String>,
    secrets: Option<String>,
}

impl Stores {
    fn found(dictionaries: &[Dictionary]) -> Self {
        let find = |name: &str| dictionaries.iter().find(|one| one.name == name).map(|one| one.id.clone());
        Self { keys: find(KEYS), secrets: find(SECRETS) }
    }

    fn are_all(&self) -> bool {
        self.keys.is_some() && self.secrets.is_some()
    }
}

impl Present {
    fn is_dynamic(&self) -> bool {
        plain(&self.dynamic) == "1"
    }

    fn is(&self, snippet: &Snippet) -> bool {
        let content = self.content.as_deref().unwrap_or_default().trim_end();
        self.place == snippet.place && plain(&self.priority) == snippet.priority && content == snippet.content
    }
}

fn plain(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl Api {
    /// See [`super::Fastly::deploy`].
    pub(super) async fn deploy(&self, code: Option<&FastlyEdgeCode>) -> Result<FastlyDeployed, CdnError> {
        let snippets = code.map_or_else(|| Ok(vec![caching_rule()]), FastlyEdgeCode::snippets)?;
        let active = self.active_version().await?;
        let present: Vec<Present> = self.list(&format!("version/{active}/snippet")).await?;
        let dictionaries = match code {
            Some(_) => self.list(&format!("version/{active}/dictionary")).await?,
            None => Vec::new(),
        };
        self.check(&present, &dictionaries)?;
        let mut stores = Stores::found(&dictionaries);
        self.check_keys(code, &stores)?;
        if is_all(&present, &snippets) && (code.is_none() || stores.are_all()) {
            self.give(code, &stores).await?;
            self.take(code, &stores).await?;
            return Ok(FastlyDeployed { version: active, is_new: false, dictionary_id: stores.keys });
        }
        let version = self.clone_version(active).await?;
        if code.is_some() {
            stores.keys = Some(self.dictionary(version, KEYS, false, stores.keys).await?);
            stores.secrets = Some(self.dictionary(version, SECRETS, true, stores.secrets).await?);
        }
        self.set_snippets(version, &present, &snippets).await?;
        self.validate(version, active).await?;
        // Items are of no version: not before the code is known to be right.
        self.give(code, &stores).await?;
        let activate = self.of_service(Method::PUT, &format!("version/{version}/activate"));
        self.call(&format!("activating version {version}"), activate).await?;
        // What the code before this one needed: not before that is gone.
        self.take(code, &stores).await?;
        Ok(FastlyDeployed { version, is_new: true, dictionary_id: stores.keys })
    }

    async fn give(&self, code: Option<&FastlyEdgeCode>, stores: &Stores) -> Result<(), CdnError> {
        match (code, &stores.secrets) {
            (Some(code), Some(id)) => self.write_secrets(id, &code.secrets()).await,
            _ => Ok(()),
        }
    }

    async fn take(&self, code: Option<&FastlyEdgeCode>, stores: &Stores) -> Result<(), CdnError> {
        match (code, &stores.secrets) {
            (Some(code), Some(id)) => self.delete_secrets(id, &code.secrets()).await,
            _ => Ok(()),
        }
    }

    /// What stands in the way, said before anything is changed.
    fn check(&self, present: &[Present], dictionaries: &[Dictionary]) -> Result<(), CdnError> {
        let invalid = |what: String| Err(CdnError::new(CdnFault::Invalid, what));
        if let Some(dynamic) =
            present.iter().find(|one| one.name.starts_with("keyshield_") && one.is_dynamic())
        {
            let name = &dynamic.name;
            return invalid(format!("the service has a dynamic snippet {name}; delete it, and deploy again"));
        }
        if dictionaries.iter().any(|one| one.name == SECRETS && !one.write_only) {
            return invalid(format!(
                "the dictionary {SECRETS} of the service is not private: its items can be read; delete it on a new \
                 version, and deploy again"
            ));
        }
        Ok(())
    }

    /// Whether the code will read where the shield writes.
    fn check_keys(&self, code: Option<&FastlyEdgeCode>, stores: &Stores) -> Result<(), CdnError> {
        let named = &self.settings().dictionary_id;
        let what = match &stores.keys {
            _ if code.is_none() || named.is_empty() => return Ok(()),
            Some(id) if id == named => return Ok(()),
            Some(id) => {
                format!(
                    "the dictionary {KEYS} of the service has the ID {id}, and the configuration names {named}"
                )
            }
            None => format!(
                "the configuration names the dictionary {named}, and the active version has none of the name {KEYS}; \
                 leave dictionary_id empty, deploy, and set the ID that this prints"
            ),
        };
        Err(CdnError::new(CdnFault::Invalid, what))
    }

    async fn active_version(&self) -> Result<u64, CdnError> {
        let versions: Vec<Version> = self.list("version").await?;
        let active = versions.iter().find(|version| version.active == Some(true));
        active.map(|version| version.number).ok_or_else(|| {
            let what = "the service has no active version; give it a domain and the shield as its backend, \
                activate that, and deploy again";
            CdnError::new(CdnFault::NotFound, what)
        })
    }

    async fn clone_version(&self, number: u64) -> Result<u64, CdnError> {
        let doing = format!("cloning version {number}");
        let request = self.of_service(Method::PUT, &format!("version/{number}/clone"));
        let cloned = self.call(&doing, request).await?.json::<Version>();
        cloned.map(|version| version.number).ok_or_else(|| unreadable(doing))
    }

    /// The ID of the dictionary, made where it is missing.
    async fn dictionary(
        &self,
        version: u64,
        name: &str,
        is_private: bool,
        found: Option<String>,
    ) -> Result<String, CdnError> {
        if let Some(id) = found {
            return Ok(id);
        }
        let doing = format!("making the dictionary {name} on version {version}");
        let private = if is_private { "true" } else { "false" };
        let path = format!("version/{version}/dictionary");
        let fields = [("name", name), ("write_only", private)];
        let made = self.call(&doing, form(self.of_service(Method::POST, &path), &fields)).await?;
        made.json::<Dictionary>().map(|made| made.id).ok_or_else(|| unreadable(doing))
    }

    async fn set_snippets(
        &self,
        version: u64,
        present: &[Present],
        snippets: &[Snippet],
    ) -> Result<(), CdnError> {
        for snippet in snippets {
            let Snippet { name, place, priority, content } = snippet;
            let doing = format!("setting the snippet {name} of version {version}");
            let all = format!("version/{version}/snippet");
            let mut fields = vec![("type", *place), ("priority", *priority), ("content", content)];
            let request = match present.iter().find(|one| one.name == *name) {
                Some(same) if same.is(snippet) => continue,
                Some(_) => self.of_service(Method::PUT, &format!("{all}/{name}")),
                None => {
                    fields.extend([("name", *name), ("dynamic", "0")]);
                    self.of_service(Method::POST, &all)
                }
            };
            self.call(&doing, form(request, &fields)).await?;
        }
        for old in ours(present).filter(|one| snippets.iter().all(|snippet| snippet.name != one.name)) {
            let request = self.of_service(Method::DELETE, &format!("version/{version}/snippet/{}", old.name));
            self.call(&format!("taking away the snippet {}", old.name), request).await?;
        }
        Ok(())
    }

    async fn validate(&self, version: u64, active: u64) -> Result<(), CdnError> {
        let doing = format!("validating version {version}");
        let request = self.of_service(Method::GET, &format!("version/{version}/validate"));
        let answer = self.call_for_much(&doing, request, MAX_LIST_BYTES).await?;
        let validated: Validated = answer.json().ok_or_else(|| unreadable(&doing))?;
        if validated.status == "ok" {
            return Ok(());
        }
        let said = validated.msg.into_iter().chain(validated.errors).collect::<Vec<_>>().join("; ");
        let said = crate::rest::said(&said);
        let what = format!("{doing}: {said}; version {active} stays active, and {version} stays as a draft");
        Err(CdnError::new(CdnFault::Invalid, what))
    }

    async fn list<T: DeserializeOwned>(&self, path: &str) -> Result<T, CdnError> {
        let doing = format!("reading {path} of the service");
        let answer = self.call_for_much(&doing, self.of_service(Method::GET, path), MAX_LIST_BYTES).await?;
        answer.json().ok_or_else(|| unreadable(doing))
    }
}

fn ours(present: &[Present]) -> impl Iterator<Item = &Present> {
    present.iter().filter(|one| one.name.starts_with("keyshield_"))
}

fn is_all(present: &[Present], snippets: &[Snippet]) -> bool {
    let is_there = |snippet: &Snippet| present.iter().any(|one| one.name == snippet.name && one.is(snippet));
    ours(present).count() == snippets.len() && snippets.iter().all(is_there)
}

/// The form of the vendor's documentation: `application/x-www-form-urlencoded`.
fn form(request: reqwest::RequestBuilder, fields: &[(&str, &str)]) -> reqwest::RequestBuilder {
    let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(fields).finish();
    request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
}
