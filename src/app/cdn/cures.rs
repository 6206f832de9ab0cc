//! What to do about a CDN's trouble, in words for whoever has to do it.

use crate::cdn::{CdnError, CdnFault, DeliveryMode};

/// About a call of a vendor's API.
pub(super) fn cure(kind: &str, error: &CdnError) -> String {
    let text = match error.fault {
        CdnFault::Away => {
            "is the address of the API right, and reachable from here? Otherwise wait for the vendor"
        }
        CdnFault::RateLimited => return too_many(error),
        CdnFault::Refused => permission(kind),
        CdnFault::NotFound => match kind {
            "cloudflare" => {
                "are account_id, namespace_id and zone_id right, and of the account that the token is for?"
            }
            "cloudfront" => {
                "are distribution_id and key_value_store_arn right, and of the account that the credentials are for?"
            }
            "fastly" => "are service_id and dictionary_id right, and of the account that the token is for?",
            _ => "is api_url right, and does the agent there answer the API of docs/custom-cdn.openapi.yaml?",
        },
        CdnFault::Invalid => match kind {
            "cloudfront" => {
                "see what was said; of a tag: does the distribution have a cache tag configuration \
                 (otherwise has_cache_tags = false)?"
            }
            _ => "see what was said, and compare [[cdns]] with docs/cdn.md",
        },
        CdnFault::Mismatch => "see what was said",
    };
    text.to_owned()
}

/// What the credential of a kind must be allowed.
fn permission(kind: &str) -> &'static str {
    match kind {
        "cloudflare" => {
            "the API token must be valid and have Zone: Zone (Read) and Zone: Cache Purge (Purge), and in push mode \
             Account: Workers KV Storage (Edit)"
        }
        "cloudfront" => {
            "the credentials must be valid and allow cloudfront:GetDistribution, cloudfront:CreateInvalidation and \
             cloudfront:GetInvalidation, in push mode cloudfront-keyvaluestore:DescribeKeyValueStore and \
             cloudfront-keyvaluestore:UpdateKeys, and with a signer cloudfront:GetKeyGroup"
        }
        "fastly" => {
            "the API token must be valid, be for this service and have the scope purge_select, and in push mode global"
        }
        _ => "the agent takes another token: see token_file and cdn.custom_token",
    }
}

/// About a question to the edge.
pub(super) fn edge_cure(mode: DeliveryMode, error: &CdnError) -> String {
    let text = match (error.fault, mode) {
        (CdnFault::Away, DeliveryMode::Pull) => {
            "is edge_url right, is the shield running, and does the CDN reach it as its origin?"
        }
        (CdnFault::Away, DeliveryMode::Push) => {
            "is edge_url right, and does the code at the edge run without an error? See the vendor's logs"
        }
        (CdnFault::RateLimited, _) => return too_many(error),
        (CdnFault::Refused, _) => {
            "does a firewall, a bot check or a rule for signed URLs stand before key URIs? Let …/check through, or \
             configure the signer"
        }
        (CdnFault::Mismatch, DeliveryMode::Pull) => {
            "send the path of keys to the shield as it is, with its answer's headers, and cache what the shield says \
             may be cached"
        }
        (CdnFault::Mismatch, DeliveryMode::Push) => {
            "the code at the edge must answer for the whole path of keys: deploy it there (docs/cdn.md)"
        }
        (CdnFault::NotFound | CdnFault::Invalid, _) => "is edge_url where players reach this CDN?",
    };
    text.to_owned()
}

fn too_many(error: &CdnError) -> String {
    match error.retry_after {
        Some(after) => format!("wait {} s and try again", after.as_secs()),
        None => "wait a while and try again".to_owned(),
    }
}
