//! Streams of the configuration: there when the node is ready, and as it says.
//!
//! A configuration may name a hundred thousand, so they begin many at a time. Deliberately absent: streams that the
//! configuration does not name any more; they are ended by whoever wants them ended.

use std::sync::Arc;

use super::StreamSpec;
use super::compare::differing_field;
use super::stream::Stream;
use super::supply::Versions;
use super::worker::{Core, LOAD_AT_ONCE, WorkerError};
use crate::fault;
use crate::keys::StreamId;
use crate::store::{Registered, StreamRow};

impl Core {
    /// Makes sure that streams are there, and as they are described.
    pub(super) async fn declare(&self, mut specs: Vec<StreamSpec>) -> Result<(), WorkerError> {
        specs.retain(|spec| !self.is_as_said(spec));
        specs.sort_by(|a, b| a.id.cmp(&b.id));
        for specs in specs.chunks(LOAD_AT_ONCE as usize) {
            let rows: Vec<_> = specs.iter().map(|spec| self.row(spec)).collect();
            let made = self.store.register_new(&rows).await?;
            for (spec, row) in specs.iter().zip(rows).filter(|(spec, _)| !made.contains(&spec.id)) {
                self.settle_as_said(spec, row).await?;
            }
            fault::point("declare: registered, not begun");
            let ids: Vec<_> = specs.iter().map(|spec| spec.id.clone()).collect();
            if let Err(error) = self.begin(&ids).await {
                // The others are served; the next sweep tries these again.
                tracing::error!(first = %ids[0], streams = ids.len(), %error, "streams could not begin");
            }
        }
        Ok(())
    }

    fn is_as_said(&self, spec: &StreamSpec) -> bool {
        self.shared.directory.read().get(&spec.id).is_some_and(|stream| {
            let known = stream.known.read();
            differing_field(spec, &known.row).is_none() && known.marks().is_some()
        })
    }

    /// Brings a stream that may be there already to what is said of it.
    async fn settle_as_said(&self, spec: &StreamSpec, row: StreamRow) -> Result<(), WorkerError> {
        match self.store.register(&row).await? {
            Registered::PrefixTaken(owner) => {
                let (stream, prefix) = (spec.id.clone(), spec.prefix.clone());
                return Err(WorkerError::PrefixTaken { stream, prefix, owner });
            }
            Registered::Exists(there) if (&there.origin, &there.prefix) != (&spec.origin, &spec.prefix) => {
                // Other paths are another stream: nothing of the old one fits.
                tracing::warn!(stream = %spec.id, "the stream has moved: it begins anew");
                self.store.delete_stream(&spec.id, self.now()).await?;
                fault::point("declare: moved away, not there yet");
                self.store.register(&row).await?;
            }
            Registered::Exists(there) if differing_field(spec, &there).is_some() => {
                let as_said = |there: StreamRow| Some(StreamRow { state: there.state, ..row });
                self.store.update_stream(&spec.id, self.now(), as_said).await?;
            }
            Registered::Exists(_) | Registered::Created(_) => {}
        }
        Ok(())
    }

    /// Takes registered streams in, and sees to their keys. `ids` are in their order.
    ///
    /// # Errors
    /// The first of what went wrong; the other streams have begun, or do so in the next sweep.
    pub(super) async fn begin(&self, ids: &[StreamId]) -> Result<(), WorkerError> {
        let loaded = self.reload(ids).await;
        let streams: Vec<Arc<Stream>> = {
            let directory = self.shared.directory.read();
            ids.iter().filter_map(|id| directory.get(id).cloned()).collect()
        };
        // One that could not be read may have a key that does not unwrap, and must not get another for that.
        let is_without = |stream: &&Arc<Stream>| {
            let known = stream.known.read();
            known.is_read() && known.deks.is_empty()
        };
        let without = streams.iter().filter(is_without);
        let without: Versions = without.map(|stream| (stream.id.clone(), 0)).collect();
        let (drafts, mut failed) = self.draft_deks(&without).await?;
        if !drafts.is_empty() {
            let changing = all_changing(&streams).await;
            let are_ours = self.store_deks(&streams, drafts).await?;
            drop(changing);
            if !are_ours && let Err(error) = self.reload(ids).await {
                failed.get_or_insert(error);
            }
        }
        // That of a stream which another node has begun, too.
        for stream in streams.iter().filter(|stream| stream.known.read().is_without_keys()) {
            self.newest_dek(stream).await;
        }
        let _changing = all_changing(&streams).await;
        let is_new = |stream: &&Arc<Stream>| {
            let known = stream.known.read();
            known.is_without_keys()
        };
        let new: Vec<_> = streams.iter().filter(is_new).cloned().collect();
        self.sweep_now(&new).await?;
        loaded.and(failed.map_or(Ok(()), Err))
    }
}

/// Nobody else changes these streams meanwhile. All who hold several take them in this order.
pub(super) async fn all_changing(streams: &[Arc<Stream>]) -> Vec<tokio::sync::MutexGuard<'_, ()>> {
    let mut changing = Vec::with_capacity(streams.len());
    for stream in streams {
        changing.push(stream.changing.lock().await);
    }
    changing
}
