//! Objects out of caches. Neither moto nor ministack lets an invalidation take its time or refuses one, nor knows what a
//! tag is; the stub does. ministack takes the same calls.

use std::time::Duration;

use keyshield::cdn::{Cdn, CdnFault, CloudFrontSettings, DeliveryMode, Patience, Purge};
use serde_json::{Value, json};

use super::wires::{Wire, connector, run};

fn tags(tags: &[&str]) -> Purge {
    Purge { tags: tags.iter().map(|&tag| tag.into()).collect(), ..Purge::default() }
}

fn paths(paths: &[&str], prefixes: &[&str]) -> Purge {
    let texts = |all: &[&str]| all.iter().map(|&one| one.into()).collect();
    Purge { paths: texts(paths), prefixes: texts(prefixes), ..Purge::default() }
}

const QUICK: Patience = Patience {
    first_pause: Duration::from_millis(5),
    longest_pause: Duration::from_millis(20),
    at_most: Duration::from_secs(5),
};

/// The paths of all invalidations that were made.
fn made(wire: &Wire) -> Vec<Vec<String>> {
    let told = wire.tell(&json!({}));
    let all = told["invalidations"].as_object().unwrap().values().cloned();
    all.map(|one| serde_json::from_value(one["paths"].clone()).unwrap()).collect()
}

fn calls(told: &Value, name: &str) -> usize {
    told["calls"].as_array().unwrap().iter().filter(|call| *call == name).count()
}

#[test]
fn a_purge_by_tag_is_over_when_cloudfront_says_so() {
    let wire = Wire::stub();
    wire.tell(&json!({"polls": 3}));
    let cdn = connector(wire.settings(), DeliveryMode::Pull).with_patience(QUICK);
    run(cdn.purge(&tags(&["keyshield-key-ab", "keyshield-stream-ch1"]))).unwrap();
    assert_eq!(made(&wire), [["#keyshield-key-ab", "#keyshield-stream-ch1"]]);
    assert_eq!(calls(&wire.tell(&json!({})), "get_invalidation"), 4);
    run(cdn.purge(&Purge::default())).unwrap();
    assert_eq!(made(&wire).len(), 1, "nothing costs nothing");
}

#[test]
fn without_tags_paths_go_as_cloudfront_takes_them() {
    let wire = Wire::stub();
    wire.tell(&json!({"tag_header": null}));
    let settings = CloudFrontSettings { has_cache_tags: false, ..wire.settings() };
    let cdn = connector(settings, DeliveryMode::Pull).with_patience(QUICK);
    assert_eq!(cdn.limits().tags_per_purge, 0);
    let links = paths(&["/live/ch1/720p/~ab.12.cd/seg_12.ts", "/api/hls/keys/ab"], &["/live/ch2/"]);
    run(cdn.purge(&links)).unwrap();
    assert_eq!(made(&wire), [["/live/ch1/720p/*", "/live/ch2/*", "/api/hls/keys/ab"]]);
}

#[test]
fn too_many_at_once_are_for_later_and_a_denial_names_its_permission() {
    let wire = Wire::stub();
    wire.tell(&json!({"polls": 1_000}));
    let settings = CloudFrontSettings { has_cache_tags: false, ..wire.settings() };
    let impatient = Patience { at_most: Duration::ZERO, ..QUICK };
    let cdn = connector(settings, DeliveryMode::Pull).with_patience(impatient);
    let prefixes: Vec<_> = (0..15).map(|n| format!("/live/ch{n:02}/")).collect();
    let prefixes: Vec<_> = prefixes.iter().map(String::as_str).collect();
    let error = run(cdn.purge(&paths(&[], &prefixes))).unwrap_err();
    assert!(error.fault == CdnFault::Away && error.is_passing(), "{error}");
    let told = wire.tell(&json!({}));
    let id = told["invalidations"].as_object().unwrap().keys().next().unwrap();
    assert!(
        error.what.contains(&format!("invalidation {id} ")) && error.what.contains("InProgress"),
        "{error}"
    );

    let error = run(cdn.purge(&paths(&[], &["/live/ch15/"]))).unwrap_err();
    assert_eq!(error.fault, CdnFault::RateLimited, "{error}");
    wire.tell(&json!({"failures": {"create_invalidation": [[403, "AccessDenied", false]]}}));
    let error = run(cdn.purge(&paths(&["/a"], &[]))).unwrap_err();
    assert!(error.what.contains("does not allow cloudfront:CreateInvalidation"), "{error}");
}

#[test]
fn looking_that_fails_for_a_while_does_not_fail_a_purge() {
    let wire = Wire::stub();
    let busy = json!([503, "ServiceUnavailable", false]);
    wire.tell(&json!({"polls": 1, "failures": {"get_invalidation": [busy, busy]}}));
    let cdn = connector(wire.settings(), DeliveryMode::Pull).with_patience(QUICK);
    run(cdn.purge(&tags(&["a"]))).unwrap();
    wire.tell(&json!({"failures": {"get_invalidation": [[403, "AccessDenied", false]]}}));
    let error = run(cdn.purge(&tags(&["b"]))).unwrap_err();
    assert!(error.what.contains("cloudfront:GetInvalidation"), "{error}");
}

#[test]
fn the_same_calls_are_taken_by_a_second_server_and_by_awss_own_client() {
    let ministack = Wire::ministack();
    let id = ministack.make_distribution(true, json!({"TagHeader": "Cache-Tag"}));
    let settings = CloudFrontSettings { distribution_id: id.clone(), ..ministack.settings() };
    run(connector(settings, DeliveryMode::Pull).purge(&tags(&["keyshield-key-ab"]))).unwrap();
    let listed = ministack.by_aws("list_invalidations", json!({"DistributionId": id}));
    assert_eq!(listed["InvalidationList"]["Quantity"], 1, "{listed}");

    let stub = Wire::stub();
    let batch = |paths: &[&str]| {
        let paths = json!({"Quantity": paths.len(), "Items": paths});
        json!({"DistributionId": "EDISTRIBUTION", "InvalidationBatch": {"Paths": paths, "CallerReference": "r"}})
    };
    let made = stub.by_aws("create_invalidation", batch(&["#a", "/b/*"]));
    let id = made["Invalidation"]["Id"].as_str().unwrap();
    let got = stub.by_aws("get_invalidation", json!({"DistributionId": "EDISTRIBUTION", "Id": id}));
    assert_eq!(got["Invalidation"]["Status"], "Completed");
    assert_eq!(got["Invalidation"]["InvalidationBatch"]["Paths"]["Items"], json!(["#a", "/b/*"]));
    let refused = stub.by_aws("create_invalidation", batch(&["/a/~b"]));
    assert_eq!(refused["error"], "InvalidArgument", "as CloudFront does");
    let got = stub.by_aws("get_distribution", json!({"Id": "EDISTRIBUTION"}));
    assert_eq!(got["Distribution"]["DistributionConfig"]["CacheTagConfig"]["HeaderName"], "Cache-Tag");
}
