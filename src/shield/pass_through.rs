//! Paths that belong to no stream, at origins that say `pass_through = true`: the proxy's own way.

use http::header::{HOST, UPGRADE};
use pingora::http::RequestHeader;
use pingora::upstreams::peer::HttpPeer;

use super::upstream::{OriginError, Upstream};
use crate::hls::{BaseUrl, Mount, OriginPath};

/// Where a passed-through request goes, once it was routed.
#[derive(Debug, Clone)]
pub(super) struct PassThrough {
    mount: Mount,
    path: String,
    query: Option<String>,
    /// Which of the origin's addresses is asked.
    attempt: usize,
}

impl PassThrough {
    pub(super) fn to(place: &OriginPath<'_>) -> Self {
        Self { mount: place.mount.clone(), path: place.path.clone(), query: place.query.clone(), attempt: 0 }
    }

    fn base(&self) -> &BaseUrl {
        // `attempt` stays below the number of addresses, of which `Mount` has at least one.
        &self.mount.bases()[self.attempt]
    }

    /// Goes over to the next address; `false` when there is none.
    pub(super) fn try_next(&mut self) -> bool {
        let more = self.attempt + 1 < self.mount.bases().len();
        self.attempt += usize::from(more);
        more
    }

    pub(super) async fn peer(&self, upstream: &Upstream) -> Result<HttpPeer, OriginError> {
        upstream.peer(&self.mount, self.base()).await
    }

    /// Makes the request what the origin expects: its own path and host.
    pub(super) fn rewrite(&self, request: &mut RequestHeader) -> pingora::Result<()> {
        let path = self.base().full_path(&self.path);
        let target = match &self.query {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        request.set_raw_path(target.as_bytes())?;
        // A tunnel would end what the shield can answer for.
        request.remove_header(&UPGRADE);
        request.insert_header(HOST, self.base().authority())
    }
}
