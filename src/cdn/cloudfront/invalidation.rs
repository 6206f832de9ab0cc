//! Objects out of CloudFront's caches: by tag where the distribution has tags, by path where it has none.
//!
//! Each tag and each path is paid for beyond the first 1,000 a month, so nothing is invalidated on routine rotation
//! (paths of segments and keys are new ones then). CloudFront refuses a path with `~`, which every segment link has, and
//! reportedly finds nothing under `%7E`: such a path becomes a wildcard that ends before it.

use std::collections::BTreeSet;
use std::time::Duration;

use aws_sdk_cloudfront::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_cloudfront::types::{InvalidationBatch, Paths};
use tokio::time::{Instant, sleep};

use super::super::{CdnError, CdnFault, Purge};
use super::CloudFront;
use super::errors::Call;
use crate::entropy;

const CREATE: &str = "cloudfront:CreateInvalidation";
const GET: &str = "cloudfront:GetInvalidation";

/// Paths with a wildcard that may be in progress for a distribution (Quotas on invalidations).
const WILDCARDS_AT_ONCE: usize = 15;
/// How often it is sent when there is no answer; CloudFront knows it again by its reference.
const ATTEMPTS: u32 = 3;

/// How long an invalidation is waited for, and how often it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    pub first_pause: Duration,
    /// Each pause is half as long again as the one before, and at most this.
    pub longest_pause: Duration,
    /// After which it is given up.
    pub at_most: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            first_pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(15),
            at_most: Duration::from_secs(600),
        }
    }
}

impl CloudFront {
    /// Returns when CloudFront says that it is completed.
    pub(super) async fn invalidate(&self, purge: &Purge) -> Result<(), CdnError> {
        for batch in batches(items(purge, self.settings.has_cache_tags)?) {
            let id = self.create_invalidation(&batch).await?;
            self.await_invalidation(&id).await?;
        }
        Ok(())
    }

    async fn create_invalidation(&self, items: &[String]) -> Result<String, CdnError> {
        let distribution = &self.settings.distribution_id;
        let resource = format!("distribution {distribution}");
        let call = Call::new(CREATE, &resource);
        let quantity = i32::try_from(items.len()).map_err(|_| call.incomplete())?;
        let paths = Paths::builder().quantity(quantity).set_items(Some(items.to_vec())).build();
        let batch = InvalidationBatch::builder()
            .paths(paths.map_err(|_| call.incomplete())?)
            .caller_reference(format!("keyshield-{}", hex::encode(*entropy::random::<16>())))
            .build()
            .map_err(|_| call.incomplete())?;
        let mut attempt = 1;
        loop {
            let request = self.clients().await.control.create_invalidation().distribution_id(distribution);
            match request.invalidation_batch(batch.clone()).send().await {
                Ok(created) => {
                    let id = created.invalidation.map(|made| made.id).filter(|id| !id.is_empty());
                    return id.ok_or_else(|| call.incomplete());
                }
                Err(error) if is_unanswered(&error) && attempt < ATTEMPTS => attempt += 1,
                Err(error) => return Err(call.failed(&error)),
            }
        }
    }

    async fn await_invalidation(&self, id: &str) -> Result<(), CdnError> {
        let distribution = &self.settings.distribution_id;
        let resource = format!("invalidation {id} of distribution {distribution}");
        let (started, mut pause) = (Instant::now(), self.patience.first_pause);
        loop {
            let request = self.clients().await.control.get_invalidation();
            let state = match request.distribution_id(distribution).id(id).send().await {
                Ok(got) => got.invalidation.map_or_else(String::new, |made| made.status),
                Err(error) => {
                    let error = Call::new(GET, &resource).failed(&error);
                    // It goes on whether it is looked at or not.
                    if !error.is_passing() {
                        return Err(error);
                    }
                    error.what
                }
            };
            if state.eq_ignore_ascii_case("Completed") {
                return Ok(());
            }
            if started.elapsed() >= self.patience.at_most {
                let waited = self.patience.at_most.as_secs();
                let what = format!("{resource} is not completed after {waited} s: {state}");
                return Err(CdnError::new(CdnFault::Away, what));
            }
            sleep(pause).await;
            pause = pause.mul_f64(1.5).min(self.patience.longest_pause);
        }
    }
}

fn is_unanswered<E: ProvideErrorMetadata>(error: &SdkError<E>) -> bool {
    matches!(error, SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) | SdkError::ResponseError(_))
}

/// What CloudFront is told, each once.
fn items(purge: &Purge, has_cache_tags: bool) -> Result<Vec<String>, CdnError> {
    if has_cache_tags && !purge.tags.is_empty() {
        let tags: BTreeSet<_> = purge.tags.iter().map(|tag| format!("#{tag}")).collect();
        return Ok(tags.into_iter().collect());
    }
    let paths: BTreeSet<_> = purge.paths.iter().map(|path| item_of(path, false)).collect();
    let prefixes = purge.prefixes.iter().map(|prefix| item_of(prefix, true));
    let all: BTreeSet<_> = paths.into_iter().chain(prefixes).collect();
    if all.is_empty() && !purge.tags.is_empty() {
        let what =
            "the distribution has no cache tags (CacheTagConfig), and what is to go is named by tags alone";
        return Err(CdnError::new(CdnFault::Invalid, what));
    }
    let wildcards: Vec<String> =
        all.iter().filter_map(|item| item.strip_suffix('*')).map(Into::into).collect();
    let is_covered = |item: &String| {
        let plain = item.trim_end_matches('*');
        wildcards
            .iter()
            .any(|wildcard| plain.starts_with(wildcard.as_str()) && item[..] != format!("{wildcard}*"))
    };
    Ok(all.iter().filter(|item| !is_covered(item)).cloned().collect())
}

/// One after the other: with no more wildcards each than may be in progress.
fn batches(items: Vec<String>) -> Vec<Vec<String>> {
    let (wildcards, mut plain): (Vec<_>, Vec<_>) = items.into_iter().partition(|item| item.ends_with('*'));
    let mut batches: Vec<_> = wildcards.chunks(WILDCARDS_AT_ONCE).map(<[String]>::to_vec).collect();
    match batches.first_mut() {
        Some(first) => first.append(&mut plain),
        None if plain.is_empty() => {}
        None => batches.push(plain),
    }
    batches
}

/// A path or a prefix as CloudFront takes it.
fn item_of(path: &str, is_prefix: bool) -> String {
    match path.split_once('~') {
        Some((before, _)) => format!("{before}*"),
        None if is_prefix => format!("{path}*"),
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(of: &[&str]) -> Vec<String> {
        of.iter().map(|&text| text.to_owned()).collect()
    }

    fn purge(tags: &[&str], paths: &[&str], prefixes: &[&str]) -> Purge {
        Purge { tags: texts(tags), paths: texts(paths), prefixes: texts(prefixes) }
    }

    #[test]
    fn tags_are_marked_and_paths_beside_them_are_not_paid_for() {
        let both =
            purge(&["keyshield-key-ab", "keyshield-key-ab", "keyshield-stream-ch1"], &["/a"], &["/b/"]);
        assert_eq!(items(&both, true).unwrap(), texts(&["#keyshield-key-ab", "#keyshield-stream-ch1"]));
        assert_eq!(items(&both, false).unwrap(), texts(&["/a", "/b/*"]));
    }

    #[test]
    fn a_path_with_a_tilde_becomes_a_wildcard_that_ends_before_it() {
        let links = purge(&[], &["/live/ch1/720p/~ab.1.cd/s.ts", "/live/ch1/720p/~ef.2.gh/t.ts", "/x"], &[]);
        assert_eq!(items(&links, false).unwrap(), texts(&["/live/ch1/720p/*", "/x"]));
    }

    #[test]
    fn what_a_wildcard_covers_is_named_once() {
        let covered = purge(&[], &["/live/ch1/a.m3u8", "/other"], &["/live/ch1/", "/live/ch1/720p/"]);
        assert_eq!(items(&covered, false).unwrap(), texts(&["/live/ch1/*", "/other"]));
    }

    #[test]
    fn no_more_wildcards_are_in_progress_than_may_be() {
        let prefixes: Vec<_> = (0..31).map(|n| format!("/ch{n:02}/")).collect();
        let all = Purge { prefixes, paths: texts(&["/a", "/b"]), ..Purge::default() };
        let batches = batches(items(&all, false).unwrap());
        assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [17, 15, 1]);
        assert_eq!(super::batches(texts(&["/a"])), [texts(&["/a"])]);
        assert!(super::batches(Vec::new()).is_empty());
    }

    #[test]
    fn tags_without_cache_tags_are_refused_in_words() {
        let error = items(&purge(&["t"], &[], &[]), false).unwrap_err();
        assert_eq!(error.fault, CdnFault::Invalid);
        assert!(error.what.contains("CacheTagConfig"), "{error}");
        assert!(items(&Purge::default(), true).unwrap().is_empty());
    }
}
