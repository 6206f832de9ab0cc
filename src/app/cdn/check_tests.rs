//! What `keyshield cdn check` says of CDNs in every state, without one.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::*;
use crate::cdn::{Cdn, CdnLimits, Rate};
use crate::keys::{SealedKey, open_at_edge};

/// A CDN that does as it is told. Keys that it stores show after it was asked so many times.
#[derive(Debug, Default)]
struct Fake {
    health: Option<CdnFault>,
    route: Option<CdnFault>,
    put: Option<CdnFault>,
    delete: Option<CdnFault>,
    purge: Option<CdnFault>,
    /// Questions before a change shows; `None` for never.
    shows_after: Option<u32>,
    never_forgets: bool,
    /// What it opens keys under.
    secret: Option<EdgeSecret>,
    tags: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    keys: BTreeMap<String, CheckValue>,
    questions: u32,
    deleted: Vec<KeyId>,
    purged: Vec<Purge>,
}

fn fails(fault: Option<CdnFault>) -> Result<(), CdnError> {
    fault.map_or(Ok(()), |fault| Err(CdnError::new(fault, format!("said {fault}"))))
}

#[async_trait]
impl Cdn for Fake {
    fn limits(&self) -> CdnLimits {
        let rate = Rate { calls: 1, per: Duration::from_secs(1) };
        CdnLimits {
            keys_per_call: 1,
            tags_per_purge: self.tags,
            urls_per_purge: 1,
            writes: rate,
            purges: rate,
            settles_within: Duration::from_secs(60),
        }
    }

    async fn put_keys(&self, keys: &[SealedKey]) -> Result<(), CdnError> {
        let secret = self.secret.clone().unwrap_or_else(secret);
        for sealed in keys {
            let value = match open_at_edge(&secret, sealed) {
                Ok((stream, _)) => {
                    assert_eq!(stream.as_str(), "keyshield-check");
                    CheckValue::of(sealed.key, &throw_away().content)
                }
                Err(_) => "00".repeat(8).parse().unwrap(),
            };
            let mut state = self.state.lock();
            state.keys.insert(sealed.key.to_string(), value);
            state.questions = 0;
        }
        fails(self.put)
    }

    async fn delete_keys(&self, keys: &[KeyId]) -> Result<(), CdnError> {
        let mut state = self.state.lock();
        state.deleted.extend(keys);
        if !self.never_forgets {
            state.keys.retain(|stored, _| !keys.iter().any(|key| key.to_string() == *stored));
        }
        fails(self.delete)
    }

    async fn verify(&self, key: KeyId) -> Result<KeySeen, CdnError> {
        fails(self.route)?;
        let mut state = self.state.lock();
        state.questions += 1;
        let shows = self.shows_after.is_some_and(|after| state.questions > after);
        Ok(match state.keys.get(&key.to_string()) {
            Some(value) if shows => KeySeen::Has(*value),
            _ => KeySeen::Missing,
        })
    }

    async fn has_cached(&self, _path: &str, _key: KeyId) -> Result<bool, CdnError> {
        Ok(false)
    }

    async fn purge(&self, purge: &Purge) -> Result<(), CdnError> {
        self.state.lock().purged.push(purge.clone());
        fails(self.purge)
    }

    async fn health(&self) -> Result<(), CdnError> {
        fails(self.health)
    }
}

fn secret() -> EdgeSecret {
    "0f".repeat(32).parse().unwrap()
}

fn throw_away() -> ThrowAway {
    ThrowAway {
        key: KeyId::from_bytes([1; 16]),
        unknown: KeyId::from_bytes([2; 16]),
        content: ContentSecrets::from_random(KeyMethod::Aes128, &[3; 64]).content,
        nonce: [4; EDGE_NONCE_LEN],
    }
}

fn good() -> Fake {
    Fake { shows_after: Some(3), tags: 1, ..Fake::default() }
}

/// The steps by their names, and the CDN afterwards.
async fn checked(
    fake: Fake,
    kind: &'static str,
    mode: DeliveryMode,
) -> (BTreeMap<&'static str, Outcome>, Arc<Fake>) {
    let fake = Arc::new(fake);
    let secret = (mode == DeliveryMode::Push).then(secret);
    let cdn = NamedCdn {
        name: "a".into(),
        kind,
        mode,
        edge: String::new(),
        secret,
        cdn: Arc::<Fake>::clone(&fake),
    };
    let (_stop, stopped) = watch::channel(false);
    let waiting = Waiting {
        poll: Duration::from_secs(1),
        beyond: Duration::from_secs(30),
        stopped,
        tell: &|line| assert!(line.starts_with("a: waiting"), "{line}"),
    };
    let steps = check(&cdn, &throw_away(), &waiting).await;
    (steps.into_iter().map(|step| (step.name, step.outcome)).collect(), fake)
}

async fn push(fake: Fake) -> (BTreeMap<&'static str, Outcome>, Arc<Fake>) {
    checked(fake, "custom", DeliveryMode::Push).await
}

fn failed(outcome: &Outcome, part: &str) {
    let Outcome::Failed { why, cure } = outcome else { panic!("{outcome:?}") };
    assert!(format!("{why} → {cure}").contains(part), "{why} → {cure}");
}

fn skipped(outcome: &Outcome, part: &str) {
    assert!(matches!(outcome, Outcome::Skipped(why) if why.contains(part)), "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn a_cdn_that_is_right_passes_every_step_and_keeps_nothing() {
    let (steps, fake) = push(good()).await;
    let names =
        ["health", "route", "store", "read back", "check value", "delete", "gone", "purge tag", "purge path"];
    assert_eq!(steps.len(), names.len());
    for name in names {
        assert!(matches!(steps[name], Outcome::Ok(_)), "{name}: {:?}", steps[name]);
    }
    let state = fake.state.lock();
    assert!(state.keys.is_empty());
    let purged: Vec<_> = state.purged.iter().map(|purge| (&purge.tags[..], &purge.paths[..])).collect();
    let (tag, path) = (["keyshield-check".to_owned()], ["/keyshield-check".to_owned()]);
    assert_eq!(purged, [(&tag[..], &[][..]), (&[][..], &path[..])]);
}

#[tokio::test(start_paused = true)]
async fn in_pull_mode_nothing_is_stored_and_the_shield_must_miss_a_key_that_is_not_there() {
    let (steps, fake) = checked(good(), "fastly", DeliveryMode::Pull).await;
    assert_eq!(steps.keys().copied().collect::<Vec<_>>(), ["health", "purge path", "purge tag", "route"]);
    assert!(steps.values().all(|outcome| matches!(outcome, Outcome::Ok(_))), "{steps:?}");
    assert!(fake.state.lock().deleted.is_empty());
    let elsewhere = Fake { route: Some(CdnFault::Mismatch), ..good() };
    let (steps, _) = checked(elsewhere, "fastly", DeliveryMode::Pull).await;
    failed(&steps["route"], "to the shield as it is");
    let away = Fake { route: Some(CdnFault::Away), ..good() };
    failed(&checked(away, "fastly", DeliveryMode::Pull).await.0["route"], "is the shield running");
}

#[tokio::test(start_paused = true)]
async fn without_the_api_there_is_nothing_to_store_and_the_cure_is_the_vendors() {
    for (kind, part) in [
        ("cloudflare", "Workers KV"),
        ("cloudfront", "cloudfront:CreateInvalidation"),
        ("fastly", "purge_select"),
        ("custom", "cdn.custom_token"),
    ] {
        let refused = Fake { health: Some(CdnFault::Refused), ..good() };
        let (steps, fake) = checked(refused, kind, DeliveryMode::Push).await;
        failed(&steps["health"], part);
        skipped(&steps["store"], "API");
        skipped(&steps["purge tag"], "API");
        assert!(fake.state.lock().deleted.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn the_key_is_deleted_whatever_failed() {
    for fake in [
        Fake { put: Some(CdnFault::Away), ..good() },
        Fake { route: Some(CdnFault::Mismatch), ..good() },
        Fake { shows_after: None, ..good() },
        Fake { secret: Some("11".repeat(32).parse().unwrap()), ..good() },
    ] {
        let (steps, fake) = push(fake).await;
        assert!(steps.values().any(|outcome| matches!(outcome, Outcome::Failed { .. })), "{steps:?}");
        assert_eq!(fake.state.lock().deleted, [KeyId::from_bytes([1; 16])]);
        assert!(matches!(steps["delete"], Outcome::Ok(_)), "{steps:?}");
    }
    let (steps, _) = push(Fake { delete: Some(CdnFault::Refused), ..good() }).await;
    failed(&steps["delete"], "by hand");
    skipped(&steps["gone"], "not deleted");
}

#[tokio::test(start_paused = true)]
async fn an_edge_without_the_code_is_found_before_anybody_waits() {
    let begun = Instant::now();
    let (steps, _) = push(Fake { route: Some(CdnFault::Mismatch), ..good() }).await;
    failed(&steps["route"], "deploy it there");
    skipped(&steps["read back"], "see route");
    assert_eq!(begun.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_never_shows_is_waited_for_as_long_as_the_vendor_says_and_a_little_more() {
    let begun = Instant::now();
    let (steps, _) = push(Fake { shows_after: None, ..good() }).await;
    failed(&steps["read back"], "after 90 s");
    skipped(&steps["check value"], "not read back");
    skipped(&steps["gone"], "not read back");
    assert_eq!(begun.elapsed(), Duration::from_secs(90));
}

#[tokio::test(start_paused = true)]
async fn an_edge_with_another_secret_is_found_by_the_check_value() {
    let (steps, _) = push(Fake { secret: Some("11".repeat(32).parse().unwrap()), ..good() }).await;
    failed(&steps["check value"], "keyshield cdn secrets");
    assert!(matches!(steps["gone"], Outcome::Ok(_)), "{steps:?}");
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_goes_on_giving_a_deleted_key_out_is_found() {
    let (steps, _) = push(Fake { never_forgets: true, ..good() }).await;
    failed(&steps["gone"], "still gives the deleted key out");
}

#[tokio::test(start_paused = true)]
async fn whoever_stops_it_still_has_the_key_deleted() {
    let fake = Arc::new(Fake { shows_after: None, ..good() });
    let cdn = NamedCdn {
        edge: String::new(),
        name: "a".into(),
        kind: "custom",
        mode: DeliveryMode::Push,
        secret: Some(secret()),
        cdn: Arc::<Fake>::clone(&fake),
    };
    let (_stop, stopped) = watch::channel(true);
    let waiting = Waiting { poll: Duration::from_secs(1), beyond: Duration::ZERO, stopped, tell: &|_| {} };
    let steps = check(&cdn, &throw_away(), &waiting).await;
    assert!(steps.iter().any(|step| step.name == "read back" && step.outcome == Outcome::Stopped));
    assert_eq!(fake.state.lock().deleted.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn purges_that_a_cdn_does_not_know_are_left_out_and_said() {
    let (steps, _) = checked(Fake { tags: 0, ..good() }, "cloudfront", DeliveryMode::Pull).await;
    skipped(&steps["purge tag"], "has_cache_tags");
    let refused = Fake { purge: Some(CdnFault::Invalid), ..good() };
    failed(
        &checked(refused, "cloudfront", DeliveryMode::Pull).await.0["purge tag"],
        "cache tag configuration",
    );
    let (steps, fake) = checked(good(), "plain", DeliveryMode::Pull).await;
    skipped(&steps["health"], "no API");
    skipped(&steps["purge tag"], "its age alone");
    assert!(fake.state.lock().purged.is_empty());
}
