//! The calls of Cloudflare's API that the shield makes, each read to its envelope.
//!
//! Every answer is `{"success": …, "errors": […], "result": …}`. A call that says 200 and `success` may still have left
//! pairs out, which it names: that is an error here, because nobody else would look.

use reqwest::{Client, RequestBuilder};
use serde::{Deserialize, Serialize};
use url::Url;

use super::errors::{self, ApiError};
use super::{CloudflareSettings, KEYS_PER_CALL};
use crate::cdn::{CdnError, CdnFault};
use crate::rest::{self, Answer};

/// What a call is for: it decides what an error advises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    StoringKeys,
    DeletingKeys,
    Purging,
    CheckingToken,
    ReadingNamespace,
    ReadingZone,
}

/// Around every answer.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope {
    pub(super) success: bool,
    #[serde(default)]
    pub(super) errors: Vec<ApiError>,
    #[serde(default)]
    pub(super) result: Option<serde_json::Value>,
}

/// What a bulk call left out.
#[derive(Debug, Deserialize)]
struct Bulk {
    #[serde(default)]
    unsuccessful_keys: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Api {
    settings: CloudflareSettings,
    client: Client,
}

impl Api {
    pub(super) fn new(settings: CloudflareSettings, has_store: bool) -> Result<Self, CdnError> {
        let invalid = |what: String| Err(CdnError::new(CdnFault::Invalid, what));
        let is_url = Url::parse(&settings.api_url).is_ok_and(|url| url.has_host());
        if !is_url {
            return invalid(format!("api_url {:?} is no URL", settings.api_url));
        }
        for (name, id, is_needed) in [
            ("zone_id", &settings.zone_id, true),
            ("account_id", &settings.account_id, has_store),
            ("namespace_id", &settings.namespace_id, has_store),
        ] {
            let is_id = id.bytes().all(|b| b.is_ascii_alphanumeric());
            if !is_id || (is_needed && id.is_empty()) {
                return invalid(format!(
                    "{name} {id:?} is no ID of Cloudflare's, which are 32 hexadecimal digits; names do not serve"
                ));
            }
        }
        let client =
            rest::client(None, settings.timeout).map_err(|why| CdnError::new(CdnFault::Invalid, why))?;
        Ok(Self { settings, client })
    }

    /// A path below the zone.
    pub(super) fn zone(&self, path: &str) -> String {
        format!("/zones/{}{path}", self.settings.zone_id)
    }

    /// A path below the KV namespace.
    pub(super) fn namespace(&self, path: &str) -> String {
        let CloudflareSettings { account_id, namespace_id, .. } = &self.settings;
        format!("/accounts/{account_id}/storage/kv/namespaces/{namespace_id}{path}")
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.settings.api_url.trim_end_matches('/'))
    }

    pub(super) async fn get(&self, path: &str, doing: Doing) -> Result<Envelope, CdnError> {
        self.call(self.client.get(self.url(path)), doing).await
    }

    pub(super) async fn post(
        &self,
        path: &str,
        doing: Doing,
        body: &impl Serialize,
    ) -> Result<Envelope, CdnError> {
        self.call(rest::with_json(self.client.post(self.url(path)), body), doing).await
    }

    /// One pair, at most once a second for the same name.
    pub(super) async fn put_value(&self, name: &str, value: &str) -> Result<(), CdnError> {
        let path = self.namespace(&format!("/values/{}", name.replace(':', "%3A")));
        let request = self.client.put(self.url(&path)).header(http::header::CONTENT_TYPE, "text/plain");
        self.call(request.body(value.to_owned()), Doing::StoringKeys).await?;
        Ok(())
    }

    pub(super) async fn put_pairs(&self, pairs: &[impl Serialize]) -> Result<(), CdnError> {
        debug_assert!(pairs.len() <= KEYS_PER_CALL);
        let request = rest::with_json(self.client.put(self.url(&self.namespace("/bulk"))), &pairs);
        let answer = self.call(request, Doing::StoringKeys).await?;
        all_of(pairs.len(), answer, Doing::StoringKeys)
    }

    /// Names that are not there are no error. (The older form, DELETE with a body, is not passed on by every proxy.)
    pub(super) async fn delete_pairs(&self, names: &[String]) -> Result<(), CdnError> {
        debug_assert!(names.len() <= KEYS_PER_CALL);
        let answer = self.post(&self.namespace("/bulk/delete"), Doing::DeletingKeys, &names).await?;
        all_of(names.len(), answer, Doing::DeletingKeys)
    }

    /// Whether the token is one, and in force. A user's token and an account's are asked for at different places.
    pub(super) async fn check_token(&self) -> Result<(), CdnError> {
        let of_user = self.get("/user/tokens/verify", Doing::CheckingToken).await;
        let answer = match of_user {
            Err(error) if error.fault == CdnFault::Refused && !self.settings.account_id.is_empty() => {
                let path = format!("/accounts/{}/tokens/verify", self.settings.account_id);
                self.get(&path, Doing::CheckingToken).await?
            }
            answer => answer?,
        };
        let status = answer.result.as_ref().and_then(|result| result["status"].as_str());
        match status {
            Some("active") => Ok(()),
            status => {
                let status = status.unwrap_or("of no known status");
                Err(CdnError::new(CdnFault::Refused, format!("the API token is {status}; make a new one")))
            }
        }
    }

    /// The token is read anew for every call, so that it can be changed while the shield runs.
    async fn call(&self, request: RequestBuilder, doing: Doing) -> Result<Envelope, CdnError> {
        let token = self.settings.token.read();
        let token = token.map_err(|why| CdnError::new(CdnFault::Refused, format!("the API token: {why}")))?;
        let request = request.bearer_auth(token.expose()).timeout(self.settings.timeout);
        let answer = rest::send(request, &self.settings.api_url).await?;
        opened(&answer, doing)
    }
}

fn opened(answer: &Answer, doing: Doing) -> Result<Envelope, CdnError> {
    let text = || String::from_utf8_lossy(answer.body()).into_owned();
    match answer.json::<Envelope>() {
        Some(envelope) if answer.status.is_success() && envelope.success => Ok(envelope),
        Some(envelope) => Err(errors::of(doing, answer.status, &answer.headers, &envelope.errors)),
        None if answer.status.is_success() => {
            let what = format!("{doing}: what answers is not Cloudflare's API; is api_url right?");
            Err(CdnError::new(CdnFault::Invalid, what))
        }
        None => Err(errors::of_text(doing, answer.status, &answer.headers, &text())),
    }
}

/// Whether a bulk call did all that it was given.
fn all_of(given: usize, answer: Envelope, doing: Doing) -> Result<(), CdnError> {
    let bulk = answer.result.and_then(|result| serde_json::from_value::<Bulk>(result).ok());
    let left = bulk.map_or(0, |bulk| bulk.unsuccessful_keys.len());
    if left == 0 {
        return Ok(());
    }
    let what = format!("{doing}: Cloudflare left out {left} of {given}, which are to be sent again");
    Err(CdnError::new(CdnFault::Away, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(text: &str) -> Envelope {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_bulk_call_that_left_pairs_out_is_to_be_made_again() {
        let answer = envelope(
            r#"{"success": true, "errors": [], "result": {"successful_key_count": 1, "unsuccessful_keys": ["key:a"]}}"#,
        );
        let error = all_of(2, answer, Doing::StoringKeys).unwrap_err();
        assert!(error.is_passing() && error.to_string().contains("1 of 2"), "{error}");
    }

    #[test]
    fn a_bulk_call_that_names_nothing_did_all() {
        for result in ["null", "{}", r#"{"successful_key_count": 2, "unsuccessful_keys": []}"#] {
            let answer = envelope(&format!(r#"{{"success": true, "errors": [], "result": {result}}}"#));
            assert_eq!(all_of(2, answer, Doing::DeletingKeys), Ok(()), "{result}");
        }
    }
}
