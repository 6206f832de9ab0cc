//! What Cloudflare's errors mean, and what is to be done about them.
//!
//! An error is a number and a sentence in English. The number decides where it is known, the HTTP status elsewhere: a
//! token that may not do something is a 403 on one path, a 401 on another and a 400 on a third. How long to wait is said
//! by `Retry-After`, and by `Ratelimit` and `Ratelimit-Policy` (an early form of the IETF's draft), in lists of
//! `"name";r=calls left;t=seconds until there are more` and `"name";q=calls;w=in seconds`.

use std::fmt;
use std::time::Duration;

use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::api::Doing;
use crate::cdn::{CdnError, CdnFault};
use crate::rest::said;

/// One error of an answer.
#[derive(Debug, Deserialize)]
pub(super) struct ApiError {
    code: u32,
    #[serde(default)]
    message: String,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Doing::StoringKeys => "storing keys in Workers KV",
            Doing::DeletingKeys => "deleting keys from Workers KV",
            Doing::Purging => "purging caches",
            Doing::CheckingToken => "checking the API token",
            Doing::ReadingNamespace => "reading the KV namespace",
            Doing::ReadingZone => "reading the zone",
        })
    }
}

impl Doing {
    /// As Cloudflare's page on tokens names it.
    fn permission(self) -> Option<&'static str> {
        match self {
            Doing::StoringKeys | Doing::DeletingKeys | Doing::ReadingNamespace => {
                Some("\"Account, Workers KV Storage, Edit\" on this account")
            }
            Doing::Purging => Some("\"Zone, Cache Purge, Purge\" on this zone"),
            Doing::ReadingZone => Some("\"Zone, Zone, Read\" on this zone"),
            Doing::CheckingToken => None,
        }
    }

    /// The setting that names what was not found.
    fn settings(self) -> &'static str {
        match self {
            Doing::Purging | Doing::ReadingZone => "zone_id",
            Doing::CheckingToken => "account_id",
            _ => "account_id and namespace_id",
        }
    }
}

/// Of an answer that is an envelope.
pub(super) fn of(doing: Doing, status: StatusCode, headers: &HeaderMap, errors: &[ApiError]) -> CdnError {
    let fault = errors.iter().find_map(|error| fault_of(doing, error.code));
    let all: Vec<_> = errors.iter().map(|error| format!("{} (code {})", error.message, error.code)).collect();
    made(doing, status, headers, fault, &said(&all.join("; ")))
}

/// Of an answer that is not, such as one of a proxy in between.
pub(super) fn of_text(doing: Doing, status: StatusCode, headers: &HeaderMap, text: &str) -> CdnError {
    made(doing, status, headers, None, &said(text))
}

fn made(
    doing: Doing,
    status: StatusCode,
    headers: &HeaderMap,
    fault: Option<CdnFault>,
    said: &str,
) -> CdnError {
    let by_status = CdnError::of_status(&doing.to_string(), status, headers, said);
    // A number that is not known, in an answer that says 200 and no success, is not for trying again.
    let of_status = if status.is_success() { CdnFault::Invalid } else { by_status.fault };
    let fault = match status {
        StatusCode::TOO_MANY_REQUESTS => CdnFault::RateLimited,
        status if status.is_server_error() => CdnFault::Away,
        _ => fault.unwrap_or(of_status),
    };
    let retry_after = match fault {
        CdnFault::RateLimited => by_status.retry_after.or_else(|| told_by_quota(headers)),
        _ => by_status.retry_after,
    };
    CdnError { fault, what: by_status.what + &advice(doing, fault), retry_after }
}

fn fault_of(doing: Doing, code: u32) -> Option<CdnFault> {
    let in_store = matches!(doing, Doing::StoringKeys | Doing::DeletingKeys | Doing::ReadingNamespace);
    match code {
        // Of the token: malformed (6003 and its reasons, 9106, 9107), unknown (1000, 1001), or not allowed to do this.
        1000 | 1001 | 6003 | 6103 | 6111 | 9103 | 9106 | 9107 | 9109 | 10000 => Some(CdnFault::Refused),
        // No such path, which is to say an ID in it is wrong.
        7000 | 7003 => Some(CdnFault::NotFound),
        // Numbers are given anew in each product: these are those of KV.
        10011 | 10013 if in_store => Some(CdnFault::NotFound),
        // What a plan has of KV in a day, or of purges in a minute; 971 is said of the whole API.
        10048 if in_store => Some(CdnFault::RateLimited),
        971 | 1134 => Some(CdnFault::RateLimited),
        _ => None,
    }
}

fn advice(doing: Doing, fault: CdnFault) -> String {
    match (fault, doing.permission()) {
        (CdnFault::Refused, Some(permission)) => {
            format!(". Give the API token the permission {permission}, or make one that has it")
        }
        (CdnFault::Refused, None) => {
            ". Is the API token whole, not revoked, not expired, and used from an address that it allows?"
                .into()
        }
        (CdnFault::NotFound, _) => format!(". Look at {}", doing.settings()),
        (CdnFault::RateLimited, _) if doing == Doing::Purging => {
            ". Set purges_per_minute to what the plan has; it counts for all zones of the account".into()
        }
        _ => String::new(),
    }
}

/// The longest wait that the quotas name: until those that are used up have calls again, or else, where none says so,
/// for the longest of their windows.
fn told_by_quota(headers: &HeaderMap) -> Option<Duration> {
    let lists = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).map(str::to_owned).collect()
    };
    let used_up = |item: &&String| parameter(item, "r") == Some(0);
    let until_more = lists("ratelimit").iter().filter(used_up).filter_map(|item| parameter(item, "t")).max();
    let window = || lists("ratelimit-policy").iter().filter_map(|item| parameter(item, "w")).max();
    until_more.or_else(window).map(Duration::from_secs)
}

/// A whole number of an item such as `"default";r=50;t=30`.
fn parameter(item: &str, name: &str) -> Option<u64> {
    let mut parameters = item.split(';').skip(1).filter_map(|part| part.trim().split_once('='));
    parameters.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(doing: Doing, status: u16, code: u32, headers: &[(&'static str, &str)]) -> CdnError {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        let errors = [ApiError { code, message: "said".into() }];
        of(doing, StatusCode::from_u16(status).unwrap(), &map, &errors)
    }

    #[track_caller]
    fn check(doing: Doing, (status, code): (u16, u32), fault: CdnFault, words: &str) {
        let error = error(doing, status, code, &[]);
        assert_eq!(error.fault, fault, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.to_string().contains(&code.to_string()), "{error}");
    }

    #[test]
    fn an_error_says_which_permission_is_missing() {
        use CdnFault::Refused;
        check(Doing::StoringKeys, (403, 10000), Refused, "Workers KV Storage, Edit");
        check(Doing::DeletingKeys, (401, 9109), Refused, "Workers KV Storage, Edit");
        check(Doing::Purging, (401, 10000), Refused, "Cache Purge, Purge");
        check(Doing::ReadingZone, (403, 9109), Refused, "Zone, Read");
        // What is malformed is a 400, and nothing is to be tried again all the same.
        check(Doing::CheckingToken, (400, 6003), Refused, "whole");
        check(Doing::CheckingToken, (401, 1000), Refused, "expired");
    }

    #[test]
    fn an_error_says_which_setting_names_nothing() {
        use CdnFault::NotFound;
        check(Doing::StoringKeys, (404, 10013), NotFound, "namespace_id");
        check(Doing::ReadingNamespace, (404, 7003), NotFound, "namespace_id");
        check(Doing::Purging, (400, 7003), NotFound, "zone_id");
        // The same number of another product says something else.
        check(Doing::Purging, (400, 10013), CdnFault::Invalid, "400");
    }

    #[test]
    fn what_passes_is_told_from_what_does_not() {
        for (status, code, passes) in
            [(500, 10000, true), (502, 1, true), (429, 10000, true), (400, 1092, false), (200, 1, false)]
        {
            let error = error(Doing::Purging, status, code, &[]);
            assert_eq!(error.is_passing(), passes, "{error}");
        }
        check(Doing::Purging, (400, 1134), CdnFault::RateLimited, "purges_per_minute");
        check(Doing::StoringKeys, (400, 10048), CdnFault::RateLimited, "KV");
    }

    #[test]
    fn a_wait_is_read_from_whichever_header_names_it() {
        let wait = |headers: &[(&'static str, &str)]| error(Doing::Purging, 429, 1134, headers).retry_after;
        let quotas = ("ratelimit", "\"default\";r=0;t=30, \"burst\";r=7;t=90");
        let policy = ("ratelimit-policy", "\"default\";q=1200;w=300, \"burst\";q=100;w=60");
        let secs = |secs| Some(Duration::from_secs(secs));
        assert_eq!(wait(&[("retry-after", "17"), quotas, policy]), secs(17));
        assert_eq!(wait(&[quotas, policy]), secs(30));
        assert_eq!(wait(&[policy]), secs(300));
        assert_eq!(wait(&[("ratelimit", "nonsense;r;t=, ;;")]), None);
        assert_eq!(wait(&[]), None);
    }

    #[test]
    fn what_is_no_envelope_is_told_in_one_line() {
        let text = "<html>\n<h1>Bad gateway</h1>";
        let error = of_text(Doing::Purging, StatusCode::BAD_GATEWAY, &HeaderMap::new(), text);
        assert_eq!(error.fault, CdnFault::Away);
        assert_eq!(error.to_string(), "purging caches: 502 <html> <h1>Bad gateway</h1>");
    }
}
