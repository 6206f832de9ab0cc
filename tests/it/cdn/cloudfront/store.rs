//! Keys in a KeyValueStore, on ministack, which refuses whoever names an old version.

use std::sync::Arc;

use keyshield::cdn::{Cdn, CdnFault, CloudFront, DeliveryMode};
use keyshield::keys::{KeyId, SealedKey};
use parking_lot::Mutex;
use serde_json::json;

use super::wires::{Wire, connector, edge, run};
use crate::harness::agent;
use crate::origin::{Answer, Origin};

fn key(n: u16) -> KeyId {
    let mut bytes = [0xab; 16];
    bytes[..2].copy_from_slice(&n.to_be_bytes());
    KeyId::from_bytes(bytes)
}

fn sealed(n: u16) -> SealedKey {
    SealedKey { key: key(n), text: format!("1:hmac:ch1:{n}") }
}

fn pushing(wire: &Wire, arn: &str) -> CloudFront {
    connector(wire.settings_on(arn), DeliveryMode::Push)
}

#[test]
fn keys_are_stored_in_batches_and_deleted_whether_they_are_there_or_not() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let cdn = pushing(&wire, &arn);
    let all: Vec<_> = (0..120).map(sealed).collect();
    run(async {
        assert_eq!(cdn.limits().keys_per_call, 50);
        for keys in all.chunks(cdn.limits().keys_per_call) {
            cdn.put_keys(keys).await.unwrap();
        }
        assert_eq!(wire.stored(&arn, "")["ItemCount"], 120);
        assert_eq!(wire.stored(&arn, &format!("/keys/{}", key(7)))["Value"], sealed(7).text);
        cdn.put_keys(&all[..50]).await.unwrap();
        assert_eq!(wire.stored(&arn, "")["ItemCount"], 120, "twice is once");

        let gone: Vec<_> = (100..140).map(key).collect();
        cdn.delete_keys(&gone).await.unwrap();
        cdn.delete_keys(&gone).await.unwrap();
        assert_eq!(wire.stored(&arn, "")["ItemCount"], 100);
    });
}

#[test]
fn writers_take_turns_and_lose_nothing() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let nodes = [Arc::new(pushing(&wire, &arn)), Arc::new(pushing(&wire, &arn))];
    run(async {
        let mut writers = tokio::task::JoinSet::new();
        for n in 0..12_u16 {
            let node = Arc::clone(&nodes[usize::from(n % 2)]);
            writers.spawn(async move { node.put_keys(&[sealed(n)]).await });
        }
        for outcome in writers.join_all().await {
            outcome.unwrap();
        }
    });
    assert_eq!(wire.stored(&arn, "")["ItemCount"], 12);
}

/// A way to ministack on which UpdateKeys fails by a script, and then goes through.
fn behind(wire: &Wire, failures: Vec<Answer>) -> Origin {
    let (far, failures) = (wire.url.clone(), Mutex::new(failures.into_iter()));
    Origin::start(move |seen| {
        if seen.target.ends_with("/keys")
            && let Some(failure) = failures.lock().next()
        {
            return failure;
        }
        let url = format!("{far}{}", seen.target);
        let method = if seen.body.is_empty() { "GET" } else { "POST" };
        let mut request = ureq::http::Request::builder().method(method).uri(url);
        for name in ["authorization", "content-type", "if-match"] {
            if let Some(value) = seen.headers.get(name) {
                request = request.header(name, value);
            }
        }
        let mut response = agent().run(request.body(&seen.body[..]).unwrap()).unwrap();
        let tag = response.headers().get("etag").map(|tag| tag.to_str().unwrap().to_owned());
        let body = response.body_mut().read_to_vec().unwrap();
        let answer = Answer { status: response.status().as_u16(), ..Answer::ok(body) };
        let answer = answer.header("Content-Type", "application/json");
        match tag {
            Some(tag) => answer.header("ETag", tag),
            None => answer,
        }
    })
}

fn failure(status: u16, code: &str) -> Answer {
    let body = json!({"Message": "it says so"}).to_string();
    let answer = Answer { status, ..Answer::ok(body) }.header("Content-Type", "application/json");
    answer.header("x-amzn-ErrorType", code).header("x-amzn-RequestId", "7c3b5a1e-request")
}

fn updates(way: &Origin) -> usize {
    way.targets().iter().filter(|target| target.ends_with("/keys")).count()
}

#[test]
fn a_store_that_refuses_what_is_not_there_is_asked_for_what_is() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    // ministack deletes in UpdateKeys what is not there; its DeleteKey, and perhaps AWS's UpdateKeys, refuse.
    let way = behind(&wire, vec![failure(404, "ResourceNotFoundException")]);
    let mut settings = wire.settings_on(&arn);
    run(async {
        connector(settings.clone(), DeliveryMode::Push).put_keys(&[sealed(1), sealed(2)]).await.unwrap();
        settings.key_value_store_endpoint = Some(way.url());
        let cdn = connector(settings, DeliveryMode::Push);
        cdn.delete_keys(&[key(1), key(9)]).await.unwrap();
        assert_eq!(wire.stored(&arn, "")["ItemCount"], 1);
        assert_eq!(updates(&way), 2);
    });
}

#[test]
fn another_writers_version_is_read_anew_and_not_for_ever() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let conflict = || failure(409, "ConflictException");
    run(async {
        let way = behind(&wire, vec![conflict(), conflict()]);
        let mut settings = wire.settings_on(&arn);
        settings.key_value_store_endpoint = Some(way.url());
        connector(settings.clone(), DeliveryMode::Push).put_keys(&[sealed(1)]).await.unwrap();
        assert_eq!(updates(&way), 3);

        let way = behind(&wire, vec![failure(400, "ThrottlingException")]);
        settings.key_value_store_endpoint = Some(way.url());
        let error = connector(settings.clone(), DeliveryMode::Push).put_keys(&[sealed(1)]).await.unwrap_err();
        assert_eq!(error.fault, CdnFault::RateLimited, "{error}");

        let way = behind(&wire, vec![failure(403, "AccessDeniedException")]);
        settings.key_value_store_endpoint = Some(way.url());
        let error = connector(settings, DeliveryMode::Push).put_keys(&[sealed(1)]).await.unwrap_err();
        assert_eq!(error.fault, CdnFault::Refused);
        for part in ["cloudfront-keyvaluestore:UpdateKeys", &arn, "IAM policy", "7c3b5a1e-request"] {
            assert!(error.what.contains(part), "{error}");
        }
        assert_eq!(updates(&way), 1);
    });
}

#[test]
fn writes_are_signed_for_all_regions_and_in_pull_mode_there_are_none() {
    let wire = Wire::ministack();
    let arn = wire.make_store("keys");
    let way = behind(&wire, Vec::new());
    let mut settings = wire.settings_on(&arn);
    settings.key_value_store_endpoint = Some(way.url());
    run(async {
        let pull = connector(settings.clone(), DeliveryMode::Pull);
        pull.put_keys(&[sealed(1)]).await.unwrap();
        pull.delete_keys(&[key(1)]).await.unwrap();
        assert!(way.targets().is_empty());
        connector(settings, DeliveryMode::Push).put_keys(&[sealed(1)]).await.unwrap();
    });
    let asked = way.asked(&way.targets()[1]);
    assert!(asked[0].headers["authorization"].starts_with("AWS4-ECDSA-P256-SHA256 "), "SigV4A");
    assert_eq!(asked[0].headers["x-amz-region-set"], "*");
}

#[test]
fn a_store_that_is_not_there_and_an_arn_that_is_none_say_so() {
    let wire = Wire::ministack();
    let arn = "arn:aws:cloudfront::000000000000:key-value-store/nobody";
    let error = run(pushing(&wire, arn).put_keys(&[sealed(1)])).unwrap_err();
    assert_eq!(error.fault, CdnFault::NotFound, "{error}");
    assert!(error.what.contains(arn), "{error}");
    let nobody = edge("http://127.0.0.1:9", true);
    let error = CloudFront::new(wire.settings_on("keys"), DeliveryMode::Push, nobody).unwrap_err();
    assert!(error.what.contains("key_value_store_arn"), "{error}");
    let long = SealedKey { key: key(1), text: "x".repeat(1_025) };
    let error = run(pushing(&wire, arn).put_keys(&[long])).unwrap_err();
    assert!(error.what.contains("at most 1 KB"), "{error}");
}
