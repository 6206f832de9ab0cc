//! Items of an edge dictionary: a key ID and its sealed key. Changed in batches, without a new version of the service.
//!
//! What Fastly answers to the deletion of an item that is not there is not documented, and an `update` of one fails
//! the whole batch. So when a batch of deletions is refused, the dictionary is read and only what is there is deleted:
//! reading is not counted against the limit of writes.

use std::collections::HashSet;
use std::fmt::Display;

use http::Method;
use serde::{Deserialize, Serialize};

use super::api::Api;
use crate::cdn::{CdnError, CdnFault};
use crate::keys::{KeyId, SealedKey};
use crate::rest::{Secret, with_json};

/// The most items in one batch, by Fastly's documentation.
pub(super) const ITEMS_PER_BATCH: usize = 1_000;
/// The most characters of a value, likewise.
const MAX_VALUE_LEN: usize = 8_000;
/// Items of a page that is read: sealed keys with what Fastly says about each are then well within an answer's bound.
const PAGE_ITEMS: usize = 50;
/// 20,000 items: a dictionary of twenty times the size that Fastly gives by default.
const MAX_PAGES: usize = 400;

#[derive(Serialize)]
struct Batch<'a> {
    items: Vec<Change<'a>>,
}

#[derive(Serialize)]
struct Change<'a> {
    op: &'static str,
    item_key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    item_value: Option<&'a str>,
}

#[derive(Deserialize)]
struct Item {
    item_key: String,
}

impl Api {
    pub(super) async fn upsert_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        if let Some(key) = keys.iter().find(|key| key.text.len() > MAX_VALUE_LEN) {
            let what = format!("key {} is sealed in more than {MAX_VALUE_LEN} characters", key.key);
            return Err(CdnError::new(CdnFault::Invalid, what));
        }
        let changes = keys.iter().map(|key| Change {
            op: "upsert",
            item_key: key.key.to_string(),
            item_value: Some(&key.text),
        });
        let dictionary = &self.settings().dictionary_id;
        let doing = format!("storing {} keys", keys.len());
        self.change(&doing, dictionary, changes.collect()).await.map_err(with_limits)
    }

    /// Whether they are there or not.
    pub(super) async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        let dictionary = &self.settings().dictionary_id;
        let doing = format!("deleting {} keys", keys.len());
        match self.change(&doing, dictionary, deletions(keys)).await {
            Err(error) if matches!(error.fault, CdnFault::Invalid | CdnFault::NotFound) => {
                let there = self.which_are_there(keys).await?;
                match there.is_empty() {
                    true => Ok(()),
                    // All of them were there: it is something else that is wrong.
                    false if there.len() == keys.len() => Err(error),
                    false => self.change(&doing, dictionary, deletions(&there)).await,
                }
            }
            outcome => outcome,
        }
    }

    /// Writes what the code at the edge is given.
    pub(super) async fn write_secrets(
        &self,
        dictionary: &str,
        items: &[(&str, Option<Secret>)],
    ) -> Result<(), CdnError> {
        let doing = "giving the code at the edge its secrets";
        let changes = items.iter().filter_map(|(name, value)| {
            let item_value = Some(value.as_ref()?.expose());
            Some(Change { op: "upsert", item_key: (*name).to_owned(), item_value })
        });
        self.change(doing, dictionary, changes.collect()).await.map_err(|error| silent(error, items))
    }

    /// Takes away what it is no longer given.
    pub(super) async fn delete_secrets(
        &self,
        dictionary: &str,
        items: &[(&str, Option<Secret>)],
    ) -> Result<(), CdnError> {
        let doing = "taking a secret from the code at the edge";
        for (name, _) in items.iter().filter(|(_, value)| value.is_none()) {
            let path = format!("dictionary/{dictionary}/item/{name}");
            match self.call(doing, self.of_service(Method::DELETE, &path)).await {
                Err(error) if error.fault != CdnFault::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether the dictionary is one of the service's.
    pub(super) async fn find_dictionary(&self) -> Result<(), CdnError> {
        self.page(1, 1).await.map(|_| ())
    }

    async fn change(&self, doing: &str, dictionary: &str, changes: Vec<Change<'_>>) -> Result<(), CdnError> {
        let request = self.of_service(Method::PATCH, &format!("dictionary/{dictionary}/items"));
        self.call(doing, with_json(request, &Batch { items: changes })).await.map(|_| ())
    }

    async fn which_are_there(&self, keys: &[KeyId]) -> Result<Vec<KeyId>, CdnError> {
        let mut there = HashSet::new();
        for number in 1..=MAX_PAGES {
            let items = self.page(number, PAGE_ITEMS).await?;
            there.extend(items.iter().filter_map(|item| item.item_key.parse::<KeyId>().ok()));
            if items.len() < PAGE_ITEMS {
                break;
            }
        }
        Ok(keys.iter().copied().filter(|key| there.contains(key)).collect())
    }

    async fn page(&self, number: usize, items: usize) -> Result<Vec<Item>, CdnError> {
        let dictionary = &self.settings().dictionary_id;
        let path = format!("dictionary/{dictionary}/items?page={number}&per_page={items}");
        let doing = format!("reading the dictionary {dictionary}");
        let answer = self.call(&doing, self.of_service(Method::GET, &path)).await?;
        answer.json().ok_or_else(|| unreadable(doing))
    }
}

fn deletions(keys: &[KeyId]) -> Vec<Change<'static>> {
    keys.iter().map(|key| Change { op: "delete", item_key: key.to_string(), item_value: None }).collect()
}

/// Which limit it is that was overrun Fastly says in words that may change.
fn with_limits(mut error: CdnError) -> CdnError {
    if error.fault == CdnFault::Invalid {
        error.what.push_str(
            "; a dictionary holds 1,000 items until Fastly's support raises it, values of 8,000 characters, \
             and takes batches of 1,000",
        );
    }
    error
}

/// An error that quotes what it is about would show a secret.
fn silent(mut error: CdnError, items: &[(&str, Option<Secret>)]) -> CdnError {
    if items.iter().flat_map(|(_, value)| value).any(|secret| error.what.contains(secret.expose())) {
        error.what = "Fastly did not take the secrets of the code at the edge".to_owned();
    }
    error
}

pub(super) fn unreadable(doing: impl Display) -> CdnError {
    CdnError::new(
        CdnFault::Invalid,
        format!("{doing}: this is not how Fastly answers; is it the right address?"),
    )
}
