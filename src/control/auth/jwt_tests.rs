//! Tokens that are right, and every way in which one can be wrong.
//!
//! Signed by the published sample keys of RFC 8037 appendix A (Ed25519) and RFC 7515 appendix A.3 (P-256).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::json;

use super::super::JwksSource;
use super::*;
use crate::clock::Clock;

const ED_SEED: &str = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
const ED_PUBLIC: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
const EC_PRIVATE: &str = "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI";
const EC_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
const EC_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";

fn bytes(text: &str) -> Vec<u8> {
    URL_SAFE_NO_PAD.decode(text).unwrap()
}

/// PKCS #8 (RFC 8410 §7).
fn ed_key() -> EncodingKey {
    let der = [hex::decode("302e020100300506032b657004220420").unwrap(), bytes(ED_SEED)].concat();
    EncodingKey::from_ed_der(&der)
}

/// PKCS #8 around RFC 5915.
fn ec_key() -> EncodingKey {
    let head = "308187020100301306072a8648ce3d020106082a8648ce3d030107046d306b0201010420";
    let der = [
        hex::decode(head).unwrap(),
        bytes(EC_PRIVATE),
        hex::decode("a14403420004").unwrap(),
        bytes(EC_X),
        bytes(EC_Y),
    ]
    .concat();
    EncodingKey::from_ec_der(&der)
}

fn now_secs() -> i64 {
    Clock::System.now().as_unix_millis() / 1_000
}

fn claims() -> Value {
    json!({
        "iss": "https://idp.example",
        "aud": ["keyshield", "other"],
        "sub": "alice",
        "exp": now_secs() + 300,
        "roles": ["operator", "unrelated"],
    })
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn without(name: &str) -> Value {
    let mut claims = claims();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn header(algorithm: Algorithm, kid: &str) -> Header {
    Header { kid: Some(kid.to_owned()), ..Header::new(algorithm) }
}

fn ed_token(claims: &Value) -> String {
    encode(&header(Algorithm::EdDSA, "ed"), claims, &ed_key()).unwrap()
}

fn verifier(dir: &tempfile::TempDir, roles_claim: &str) -> JwtVerifier {
    let path = dir.path().join("jwks.json");
    let set = json!({"keys": [
        {"kty": "OKP", "crv": "Ed25519", "x": ED_PUBLIC, "kid": "ed", "use": "sig"},
        {"kty": "EC", "crv": "P-256", "x": EC_X, "y": EC_Y, "kid": "ec", "alg": "ES256"},
    ]});
    std::fs::write(&path, set.to_string()).unwrap();
    JwtVerifier::new(JwtSettings {
        jwks: JwksSource::File(path),
        issuer: "https://idp.example".into(),
        audience: "keyshield".into(),
        roles_claim: roles_claim.into(),
    })
    .unwrap()
}

async fn verify(token: &str) -> Result<Identity, AuthError> {
    let dir = tempfile::tempdir().unwrap();
    verifier(&dir, "roles").verify(token).await
}

async fn check_refused(token: &str, why: &str) {
    let error = verify(token).await.expect_err(why);
    assert!(error.to_string().contains(why), "{error} should say {why:?}");
}

#[tokio::test]
async fn a_token_of_the_issuer_names_its_subject_and_roles() {
    let alice = Identity { actor: "alice".into(), roles: vec![Role::Operator] };
    assert_eq!(verify(&ed_token(&claims())).await, Ok(alice.clone()));
    let ec = encode(&header(Algorithm::ES256, "ec"), &claims(), &ec_key()).unwrap();
    assert_eq!(verify(&ec).await, Ok(alice));
}

#[tokio::test]
async fn a_claim_that_is_missing_or_wrong_is_refused_with_its_name() {
    for (claims, why) in [
        (without("exp"), "no exp"),
        (without("iss"), "no iss"),
        (without("aud"), "no aud"),
        (without("sub"), "(sub)"),
        (with("sub", json!("a\nb")), "(sub)"),
        (with("sub", json!("x".repeat(300))), "(sub)"),
        (with("iss", json!("https://evil.example")), "issuer"),
        (with("aud", json!("other")), "audience"),
        (with("exp", json!(now_secs() - LEEWAY_SECS as i64 - 5)), "expired"),
        (with("nbf", json!(now_secs() + LEEWAY_SECS as i64 + 60)), "not valid yet"),
    ] {
        check_refused(&ed_token(&claims), why).await;
    }
    for (name, value) in [("exp", now_secs() - 10), ("nbf", now_secs() + 10)] {
        assert!(verify(&ed_token(&with(name, json!(value)))).await.is_ok(), "clocks may be apart: {name}");
    }
}

#[tokio::test]
async fn the_algorithm_is_the_keys_and_not_the_tokens() {
    // The public key as an HMAC secret: the classic.
    let secret = EncodingKey::from_secret(&bytes(ED_PUBLIC));
    let hmac = encode(&header(Algorithm::HS256, "ed"), &claims(), &secret).unwrap();
    check_refused(&hmac, "algorithm").await;
    let payload = URL_SAFE_NO_PAD.encode(claims().to_string());
    for unsigned in [r#"{"alg":"none","kid":"ed"}"#, r#"{"alg":"NONE","kid":"ed"}"#, "{}"] {
        let token = format!("{}.{payload}.", URL_SAFE_NO_PAD.encode(unsigned));
        check_refused(&token, "no JWT that is taken here").await;
    }
    let other_key = encode(&header(Algorithm::EdDSA, "ec"), &claims(), &ed_key()).unwrap();
    check_refused(&other_key, "algorithm").await;
    let ps = URL_SAFE_NO_PAD.encode(r#"{"alg":"PS256","kid":"ed"}"#);
    check_refused(&format!("{ps}.{payload}.AAAA"), "algorithm").await;
}

#[tokio::test]
async fn a_token_that_was_changed_or_is_signed_by_another_key_is_refused() {
    let token = ed_token(&claims());
    let parts: Vec<_> = token.split('.').collect();
    let forged = URL_SAFE_NO_PAD.encode(with("roles", json!("admin")).to_string());
    check_refused(&format!("{}.{forged}.{}", parts[0], parts[2]), "signature").await;
    let unknown = encode(&header(Algorithm::EdDSA, "nobody"), &claims(), &ed_key()).unwrap();
    check_refused(&unknown, "does not publish").await;
    let unnamed = encode(&Header::new(Algorithm::EdDSA), &claims(), &ed_key()).unwrap();
    check_refused(&unnamed, "kid").await;
    let critical = Header { crit: Some(vec!["b64".into()]), ..header(Algorithm::EdDSA, "ed") };
    check_refused(&encode(&critical, &claims(), &ed_key()).unwrap(), "critical").await;
    check_refused("a.b.c", "no JWT").await;
}

#[tokio::test]
async fn roles_are_a_string_or_a_list_at_a_name_or_a_pointer() {
    let dir = tempfile::tempdir().unwrap();
    for (claim, claims, expected) in [
        ("roles", with("roles", json!("admin")), vec![Role::Admin]),
        ("roles", with("roles", json!("viewer security x")), vec![Role::Viewer, Role::Security]),
        ("roles", with("roles", json!(["auditor", 5, "Admin"])), vec![Role::Auditor]),
        ("roles", without("roles"), vec![]),
        ("https://k.example/roles", with("https://k.example/roles", json!(["admin"])), vec![Role::Admin]),
        ("/realm_access/roles", with("realm_access", json!({"roles": ["viewer"]})), vec![Role::Viewer]),
    ] {
        let identity = verifier(&dir, claim).verify(&ed_token(&claims)).await.unwrap();
        assert_eq!(identity.roles, expected, "{claim}: {claims}");
    }
}
