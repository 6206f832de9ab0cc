//! Whether CloudFront lets the shield do its work, and in which words it says that it does not.

use std::collections::BTreeSet;

use keyshield::cdn::{Cdn, CdnError, CdnFault, CloudFrontSettings, DeliveryMode};
use serde_json::{Value, json};

use super::wires::{Wire, connector, run, signer_settings};
use crate::harness::{free_port, repository};

fn health(settings: CloudFrontSettings, mode: DeliveryMode) -> Result<(), CdnError> {
    run(connector(settings, mode).health())
}

#[test]
fn a_distribution_that_does_its_work_is_healthy_and_one_that_cannot_says_why() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let on = |id: &str| CloudFrontSettings {
        distribution_id: id.into(),
        key_value_store_arn: arn.clone(),
        ..wire.settings()
    };
    let whole = wire.make_distribution(true, json!({"TagHeader": "Cache-Tag", "Function": true}));
    health(on(&whole), DeliveryMode::Push).unwrap();
    health(on(&whole), DeliveryMode::Pull).unwrap();

    let bare = wire.make_distribution(true, json!({}));
    let error = health(on(&bare), DeliveryMode::Pull).unwrap_err();
    assert!(error.what.contains("CacheTagConfig"), "{error}");
    let without_tags = CloudFrontSettings { has_cache_tags: false, ..on(&bare) };
    health(without_tags.clone(), DeliveryMode::Pull).unwrap();
    let error = health(without_tags, DeliveryMode::Push).unwrap_err();
    assert!(error.what.contains("viewer-request"), "{error}");

    let disabled = wire.make_distribution(false, json!({}));
    let error = health(on(&disabled), DeliveryMode::Pull).unwrap_err();
    assert!(error.what.contains("is disabled"), "{error}");

    let error = health(on("ENOBODY"), DeliveryMode::Pull).unwrap_err();
    assert_eq!(error.fault, CdnFault::NotFound);
    assert!(error.what.contains("distribution ENOBODY"), "{error}");

    let nowhere = "arn:aws:cloudfront::000000000000:key-value-store/nobody";
    let elsewhere = CloudFrontSettings { key_value_store_arn: nowhere.into(), ..on(&whole) };
    let error = health(elsewhere, DeliveryMode::Push).unwrap_err();
    assert!(error.fault == CdnFault::NotFound && error.what.contains(nowhere), "{error}");
}

#[test]
fn what_is_denied_is_said_by_the_permission_that_is_missing() {
    let wire = Wire::stub();
    wire.tell(&json!({"failures": {"get_distribution": [[403, "AccessDenied", false]]}}));
    let error = health(wire.settings(), DeliveryMode::Pull).unwrap_err();
    assert_eq!(error.fault, CdnFault::Refused);
    for part in ["cloudfront:GetDistribution", "distribution EDISTRIBUTION", "request-of-the-stub"] {
        assert!(error.what.contains(part), "{error}");
    }
    let group = CloudFrontSettings { signer: Some(signer_settings(&wire, "GNOBODY")), ..wire.settings() };
    let error = health(group, DeliveryMode::Pull).unwrap_err();
    assert!(error.fault == CdnFault::NotFound && error.what.contains("key group GNOBODY"), "{error}");
}

#[test]
fn nobody_who_answers_is_away() {
    let wire = Wire::stub();
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let settings = CloudFrontSettings { endpoint: Some(nobody), ..wire.settings() };
    let error = health(settings, DeliveryMode::Pull).unwrap_err();
    assert!(error.fault == CdnFault::Away && error.is_passing(), "{error}");
    assert!(!error.what.contains("secret-of-the-tests"), "{error}");
}

/// The policy that the documentation tells to paste.
fn documented_actions() -> BTreeSet<String> {
    let page = std::fs::read_to_string(repository("docs/cdn-cloudfront.md")).unwrap();
    let (_, rest) = page.split_once("```json\n").expect("a policy");
    let policy: Value = serde_json::from_str(rest.split_once("```").expect("its end").0).unwrap();
    let statements = policy["Statement"].as_array().unwrap().iter();
    let actions = statements.flat_map(|statement| statement["Action"].as_array().unwrap().clone());
    actions.map(|action| action.as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_documented_policy_allows_what_the_connector_calls_and_nothing_else() {
    let mut called = BTreeSet::new();
    for file in std::fs::read_dir(repository("src/cdn/cloudfront")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let (code, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
        let quoted = code.split('"').skip(1).step_by(2);
        called.extend(quoted.filter(|text| text.starts_with("cloudfront")).filter_map(|text| {
            let (service, action) = text.split_once(':')?;
            (!action.is_empty() && !action.contains(' ')).then(|| format!("{service}:{action}"))
        }));
    }
    assert!(called.len() > 10, "{called:?}");
    assert_eq!(documented_actions(), called);
}
