//! `keyshield cdn check`: one CDN, tried end to end with a throw-away key.
//!
//! What a shield does with a CDN, in its order: ask the API, ask the edge, store, read back as a player would, delete,
//! purge. A step that needs one that failed is skipped, so that what is shown is what is wrong and not what follows from
//! it. The throw-away key is deleted whatever happened, for nobody would ever delete it later.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::cures::{cure, edge_cure};
use crate::cdn::{CdnError, CdnFault, DeliveryMode, KeySeen, NamedCdn, Purge};
use crate::entropy::random;
use crate::keys::{
    CheckValue, ContentKey, ContentSecrets, EDGE_NONCE_LEN, EdgeSecret, KeyId, KeyMethod, StreamId,
    seal_for_edge,
};

/// Whose keys and objects they are said to be. No stream of that name need be there.
const STREAM: &str = "keyshield-check";

/// What came of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Ok(String),
    Failed {
        why: String,
        cure: String,
    },
    Skipped(String),
    /// Whoever asked wants no more.
    Stopped,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub name: &'static str,
    pub outcome: Outcome,
}

impl Step {
    pub(super) fn failed(name: &'static str, why: impl ToString, cure: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Failed { why: why.to_string(), cure: cure.into() } }
    }

    fn ok(name: &'static str, what: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Ok(what.into()) }
    }

    fn skipped(name: &'static str, why: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Skipped(why.into()) }
    }

    fn is_ok(&self) -> bool {
        matches!(self.outcome, Outcome::Ok(_))
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self.outcome, Outcome::Failed { .. })
    }
}

/// A key that no segment was ever encrypted under.
#[derive(Debug)]
pub(super) struct ThrowAway {
    key: KeyId,
    /// Asked for and never stored. Not the same as the other: edges keep in mind that a key was not there.
    unknown: KeyId,
    content: ContentKey,
    nonce: [u8; EDGE_NONCE_LEN],
}

impl ThrowAway {
    pub(super) fn new() -> Self {
        Self {
            key: KeyId::from_bytes(*random()),
            unknown: KeyId::from_bytes(*random()),
            content: ContentSecrets::from_random(KeyMethod::Aes128, &random()).content,
            nonce: *random(),
        }
    }
}

/// How the edge is waited for.
pub(super) struct Waiting<'w> {
    pub poll: Duration,
    /// Beyond what the vendor says that changes take.
    pub beyond: Duration,
    /// Becomes true when whoever asked wants no more.
    pub stopped: watch::Receiver<bool>,
    /// Hears what is waited for.
    pub tell: &'w (dyn Fn(&str) + Sync),
}

/// All steps of one CDN.
pub(super) async fn check(cdn: &NamedCdn, with: &ThrowAway, waiting: &Waiting<'_>) -> Vec<Step> {
    let health = health(cdn).await;
    let route = route(cdn, with.unknown).await;
    let (api_answers, edge_answers) = (!health.has_failed(), route.is_ok());
    let mut steps = vec![health, route];
    if let (DeliveryMode::Push, Some(secret)) = (cdn.mode, &cdn.secret) {
        steps.extend(match api_answers {
            true => push(cdn, secret, with, edge_answers, waiting).await,
            false => {
                skip(&["store", "read back", "check value", "delete", "gone"], "the API must answer first")
            }
        });
    }
    steps.extend(match api_answers {
        true => purges(cdn).await,
        false => skip(&["purge tag", "purge path"], "the API must answer first"),
    });
    steps
}

fn skip(names: &[&'static str], why: &str) -> Vec<Step> {
    names.iter().map(|name| Step::skipped(name, why)).collect()
}

fn by_the_api(cdn: &NamedCdn, name: &'static str, done: Result<(), CdnError>, what: &str) -> Step {
    match done {
        Ok(()) => Step::ok(name, what),
        Err(error) => Step::failed(name, &error, cure(cdn.kind, &error)),
    }
}

/// Whether the credential is taken, may do what is needed, and what is configured is there.
async fn health(cdn: &NamedCdn) -> Step {
    if is_plain(cdn) {
        return Step::skipped("health", "only its address is known: there is no API to ask");
    }
    by_the_api(cdn, "health", cdn.cdn.health().await, "the API answers and lets this shield do its work")
}

/// Whether questions about keys come to who should answer them: a key that nobody has is said to be missing by the
/// shield, or the code at the edge.
async fn route(cdn: &NamedCdn, unknown: KeyId) -> Step {
    const NAME: &str = "route";
    match cdn.cdn.verify(unknown).await {
        Ok(KeySeen::Missing) => match cdn.mode {
            DeliveryMode::Pull => {
                Step::ok(NAME, "a key that is not there is missed by the shield, through the CDN")
            }
            DeliveryMode::Push => {
                Step::ok(NAME, "a key that is not there is missed at the edge, or by the shield behind it")
            }
        },
        Ok(KeySeen::Has(_) | KeySeen::Gone) => {
            let why = format!("the edge claims to know key {unknown}, which was never there");
            let cure = "does the CDN rewrite key URIs, or answer them all from one cached object? The path must be \
                        its cache key";
            Step::failed(NAME, why, cure)
        }
        Err(error) => Step::failed(NAME, &error, edge_cure(cdn.mode, &error)),
    }
}

async fn push(
    cdn: &NamedCdn,
    secret: &EdgeSecret,
    with: &ThrowAway,
    edge_answers: bool,
    waiting: &Waiting<'_>,
) -> Vec<Step> {
    // It is a constant that is one.
    let Ok(stream) = STREAM.parse::<StreamId>() else { return Vec::new() };
    let sealed = seal_for_edge(secret, cdn.cdn.cipher(), (&stream, with.key), &with.content, &with.nonce);
    let stored = cdn.cdn.put_keys(&[sealed]).await;
    let stored = by_the_api(cdn, "store", stored, &format!("key {} is accepted", with.key));
    let seen = match (stored.is_ok(), edge_answers) {
        (true, true) => Ok(read_back(cdn, with.key, waiting).await),
        (false, _) => Err("it was not stored"),
        (_, false) => Err("the edge does not answer as it should: see route"),
    };
    let was_there = matches!(&seen, Ok((_, Some(_))));
    let mut steps = vec![stored];
    match seen {
        Ok((read, Some(value))) => steps.extend([read, compare(value, with)]),
        Ok((read, None)) => steps.extend([read, Step::skipped("check value", "it was not read back")]),
        Err(why) => steps.extend(skip(&["read back", "check value"], why)),
    }
    // A call that failed may have done its work, so this one goes out in any case.
    let deleted = cdn.cdn.delete_keys(&[with.key]).await;
    let mut deleted = by_the_api(cdn, "delete", deleted, "the key is taken out of the store");
    if let Outcome::Failed { cure, .. } = &mut deleted.outcome {
        cure.push_str(&format!("; delete key {} by hand, it protects nothing", with.key));
    }
    let gone = match (was_there, deleted.is_ok()) {
        (true, true) => gone(cdn, with.key, waiting).await,
        (false, _) => Step::skipped("gone", "it was not read back"),
        (_, false) => Step::skipped("gone", "it was not deleted"),
    };
    steps.extend([deleted, gone]);
    steps
}

async fn read_back(cdn: &NamedCdn, key: KeyId, waiting: &Waiting<'_>) -> (Step, Option<CheckValue>) {
    const NAME: &str = "read back";
    let is_there = |seen: KeySeen| matches!(seen, KeySeen::Has(_));
    match waiting.until(cdn, key, "waiting for the key at the edge", is_there).await {
        Waited::Seen(KeySeen::Has(value), after) => {
            (Step::ok(NAME, format!("the edge has it after {} s", after.as_secs())), Some(value))
        }
        Waited::Late(KeySeen::Gone, after) => {
            let why = format!("after {} s the edge says that the key was taken back", after.as_secs());
            let cure = "does a key URI come to the code at the edge, and not to the shield?";
            (Step::failed(NAME, why, cure), None)
        }
        Waited::Late(_, after) => {
            let why = format!("after {} s the edge still does not have the key", after.as_secs());
            let cure = "is the code at the edge on the route of key URIs, bound to the store that the configuration \
                        names, and given what `keyshield cdn secrets` prints for this CDN?";
            (Step::failed(NAME, why, cure), None)
        }
        Waited::Failed(error) => (Step::failed(NAME, &error, edge_cure(cdn.mode, &error)), None),
        // Of what is waited for, nothing else is seen.
        Waited::Stopped | Waited::Seen(..) => (Step { name: NAME, outcome: Outcome::Stopped }, None),
    }
}

fn compare(value: CheckValue, with: &ThrowAway) -> Step {
    const NAME: &str = "check value";
    if value == CheckValue::of(with.key, &with.content) {
        return Step::ok(NAME, "the edge opens the key to what was sealed");
    }
    let cure =
        "give the edge what `keyshield cdn secrets` prints for this CDN, and deploy its code of this version";
    Step::failed(NAME, "the edge gives out another key than was stored", cure)
}

async fn gone(cdn: &NamedCdn, key: KeyId, waiting: &Waiting<'_>) -> Step {
    const NAME: &str = "gone";
    let is_gone = |seen: KeySeen| matches!(seen, KeySeen::Missing | KeySeen::Gone);
    match waiting.until(cdn, key, "waiting for the key to be gone", is_gone).await {
        Waited::Seen(_, after) => {
            Step::ok(NAME, format!("the edge has it no more after {} s", after.as_secs()))
        }
        Waited::Late(_, after) => {
            let why = format!("after {} s the edge still gives the deleted key out", after.as_secs());
            let cure = "does a cache stand before the code at the edge, or does the store take longer than its vendor \
                        says? A revoked key would live as long";
            Step::failed(NAME, why, cure)
        }
        Waited::Failed(error) => Step::failed(NAME, &error, edge_cure(cdn.mode, &error)),
        Waited::Stopped => Step { name: NAME, outcome: Outcome::Stopped },
    }
}

async fn purges(cdn: &NamedCdn) -> Vec<Step> {
    if is_plain(cdn) {
        let why = "only its address is known: what it has cached goes by its age alone";
        return skip(&["purge tag", "purge path"], why);
    }
    // After health, which may have found out what this one can.
    let limits = cdn.cdn.limits();
    let tag = match limits.tags_per_purge {
        0 if cdn.kind == "cloudfront" => {
            let why = "paths are purged: tags need a cache tag configuration of the distribution, and then \
                       has_cache_tags = true";
            Step::skipped("purge tag", why)
        }
        0 => Step::skipped("purge tag", "this CDN purges by path alone"),
        _ => {
            let purge = Purge { tags: vec![STREAM.to_owned()], ..Purge::default() };
            by_the_api(cdn, "purge tag", cdn.cdn.purge(&purge).await, "a purge by tag is accepted")
        }
    };
    let path = match limits.urls_per_purge {
        0 => Step::skipped("purge path", "this CDN purges by tag alone"),
        _ => {
            let purge = Purge { paths: vec![format!("/{STREAM}")], ..Purge::default() };
            by_the_api(cdn, "purge path", cdn.cdn.purge(&purge).await, "a purge by path is accepted")
        }
    };
    vec![tag, path]
}

fn is_plain(cdn: &NamedCdn) -> bool {
    cdn.kind == "plain"
}

/// How waiting for the edge ended.
enum Waited {
    Seen(KeySeen, Duration),
    /// It answered to the last, and not what was waited for.
    Late(KeySeen, Duration),
    Failed(CdnError),
    Stopped,
}

impl Waiting<'_> {
    /// Asks the edge until it says what is waited for, or has had its time.
    async fn until(&self, cdn: &NamedCdn, key: KeyId, what: &str, is_it: impl Fn(KeySeen) -> bool) -> Waited {
        let longest = cdn.cdn.limits().settles_within.saturating_add(self.beyond);
        let begun = Instant::now();
        let mut stopped = self.stopped.clone();
        loop {
            let answer = cdn.cdn.verify(key).await;
            let after = begun.elapsed();
            match answer {
                Ok(seen) if is_it(seen) => return Waited::Seen(seen, after),
                Ok(seen) if after >= longest => return Waited::Late(seen, after),
                Err(error) if after >= longest || !may_change(&error) => return Waited::Failed(error),
                Ok(_) | Err(_) => {}
            }
            let (secs, most) = (after.as_secs(), longest.as_secs());
            (self.tell)(&format!("{}: {what}, {secs} s of at most {most} s", cdn.name));
            tokio::select! {
                () = tokio::time::sleep(self.poll) => {}
                () = async {
                    // Nobody may be left who could stop it.
                    if stopped.wait_for(|stopped| *stopped).await.is_err() {
                        std::future::pending::<()>().await;
                    }
                } => return Waited::Stopped,
            }
        }
    }
}

/// What is away may come back while this waits. What is refused, or answered by somebody else, stays so.
fn may_change(error: &CdnError) -> bool {
    error.is_passing() && error.fault != CdnFault::Mismatch
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
