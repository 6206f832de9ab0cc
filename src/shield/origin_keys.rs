//! Keys of origins that encrypt by themselves, for streams that are encrypted anew.
//!
//! A key is fetched once, for all segments that it decrypts, and kept for a moment: an origin that changes a key changes
//! its URI. Deliberately absent: headers and cookies by which an origin may want to know who asks.

use std::sync::Arc;
use std::time::Duration;

use moka::future::Cache;
use zeroize::Zeroizing;

use super::upstream::{OriginError, OriginRequest, Upstream};
use crate::hls::Mounts;

const KEYS_KEPT: u64 = 10_000;
const KEY_TTL: Duration = Duration::from_secs(300);
const KEY_LEN: usize = 16;

type KeyBytes = Arc<Zeroizing<[u8; KEY_LEN]>>;

/// Origins' keys by their places. Clones share them.
#[derive(Clone)]
pub(super) struct OriginKeys {
    kept: Cache<String, KeyBytes>,
}

impl OriginKeys {
    pub(super) fn new() -> Self {
        Self { kept: Cache::builder().max_capacity(KEYS_KEPT).time_to_live(KEY_TTL).build() }
    }

    /// The key at a place, which is a path of the shield with the origin's query. Who asks meanwhile waits for the same
    /// answer.
    ///
    /// # Errors
    /// [`OriginError`] when the origin does not give it, or gives what is no key of AES-128.
    pub(super) async fn get(
        &self,
        upstream: &Upstream,
        mounts: &Mounts,
        reference: &str,
    ) -> Result<KeyBytes, OriginError> {
        let fetched = self.kept.try_get_with(reference.to_owned(), fetch(upstream, mounts, reference)).await;
        fetched.map_err(|error: Arc<OriginError>| (*error).clone())
    }
}

async fn fetch(upstream: &Upstream, mounts: &Mounts, reference: &str) -> Result<KeyBytes, OriginError> {
    let (path, query) = match reference.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (reference, None),
    };
    let undecryptable =
        |origin: &str, why: String| OriginError::Undecryptable { origin: origin.to_owned(), why };
    let place = mounts.locate(path).ok_or_else(|| undecryptable("of the key", "it is not allowed".into()))?;
    let request = OriginRequest { query, ..OriginRequest::to(place.mount, &place.path) };
    let mut response = upstream.fetch(request).await?.ok()?.framed()?;
    let body = Zeroizing::new(response.body(KEY_LEN).await?.to_vec());
    let key: [u8; KEY_LEN] = body[..].try_into().map_err(|_| {
        undecryptable(&place.mount.origin, format!("its key has {} bytes and not {KEY_LEN}", body.len()))
    })?;
    Ok(Arc::new(Zeroizing::new(key)))
}
