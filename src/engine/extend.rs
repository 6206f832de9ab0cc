//! Extending a schedule: the boundaries that a window calls for, stored before any playlist shows them.

use std::sync::Arc;
use std::time::Duration;

use super::load::renditions;
use super::stream::{Call, MAX_RENDITIONS, Rendition, Stream};
use super::worker::{Core, WorkerError};
use super::{ATTEMPTS, EngineError, Extend, RESET_INTERVAL};
use crate::keys::{Boundary, Edge, PlaylistWindow, Reason};
use crate::store::{BoundaryRow, RenditionRow};

impl Core {
    pub(super) async fn answer(&self, extend: Extend) {
        let Extend { stream, rendition, window, reply, _place } = extend;
        let extended = self.extend(&stream, &rendition, &window).await;
        if let Err(error) = &extended {
            tracing::error!(stream = %stream.settings.id, rendition, %error, "schedule not extended");
        }
        if let Some(reply) = reply {
            // Who asked may have gone away.
            let _ = reply.send(extended.map_err(|error| EngineError::Failed(error.to_string())));
        }
    }

    /// Stores the boundaries that a window calls for, and the keys that they name before them.
    async fn extend(
        &self,
        stream: &Arc<Stream>,
        rendition: &str,
        window: &PlaylistWindow,
    ) -> Result<(), WorkerError> {
        let _changing = stream.changing.lock().await;
        let extended = self.store_boundaries(stream, rendition, window).await;
        stream.settle(rendition);
        extended
    }

    async fn store_boundaries(
        &self,
        stream: &Stream,
        rendition: &str,
        window: &PlaylistWindow,
    ) -> Result<(), WorkerError> {
        let id = &stream.settings.id;
        let edge = Edge { first: window.first, end: window.end };
        for _ in 0..ATTEMPTS {
            let Some(Call { planned, have, .. }) = stream.propose(rendition, window) else { return Ok(()) };
            let Some(&(highest, reason)) = planned.last() else { return Ok(()) };
            if have == 0 && stream.known.read().renditions.len() >= MAX_RENDITIONS {
                return Err(WorkerError::TooManyRenditions { stream: id.to_string() });
            }
            let resets = planned.iter().any(|(_, reason)| *reason == Reason::Reset);
            if resets && self.resets_too_often(stream, rendition) {
                return Err(WorkerError::Flapping {
                    stream: id.to_string(),
                    rendition: rendition.to_owned(),
                });
            }
            self.make_keys_up_to(stream, highest.ordinal).await?;
            let row = |boundary| BoundaryRow { rendition: rendition.to_owned(), boundary, edge };
            let rows: Vec<_> = planned.iter().map(|&(boundary, reason)| (row(boundary), reason)).collect();
            let about = RenditionRow {
                rendition: rendition.to_owned(),
                ended: window.ended,
                keeps_all: window.keeps_all,
                longest_playlist: Duration::ZERO,
            };
            if self.store.add_boundaries(id, have, &rows, &about, self.now()).await? {
                let boundaries: Vec<_> = planned.iter().map(|(boundary, _)| *boundary).collect();
                self.know_boundaries(stream, rendition, window, &boundaries);
                if resets && let Some(own) = stream.known.write().renditions.get_mut(rendition) {
                    own.reset_at = Some(self.now());
                }
                return self.promote(stream, highest.ordinal, false, reason.name()).await;
            }
            // Another node was first: what it stored is the schedule.
            let stored = self.store.load(id).await?;
            self.take_schedules(stream, &stored.boundaries);
        }
        Err(WorkerError::Contended { stream: id.to_string(), rendition: rendition.to_owned() })
    }

    /// Whether a rendition's numbers jumped back a moment ago.
    fn resets_too_often(&self, stream: &Stream, rendition: &str) -> bool {
        let known = stream.known.read();
        let reset_at = known.renditions.get(rendition).and_then(|own| own.reset_at);
        reset_at.is_some_and(|at| self.now().since(at) < RESET_INTERVAL)
    }

    fn know_boundaries(&self, stream: &Stream, rendition: &str, window: &PlaylistWindow, more: &[Boundary]) {
        let mut known = stream.known.write();
        let edge = Edge { first: window.first, end: window.end };
        let own = known.renditions.entry(rendition.to_owned()).or_insert_with(|| Rendition {
            schedule: Arc::default(),
            edge,
            ended: window.ended,
            keeps_all: window.keeps_all,
            last_served_at: self.now(),
            longest_playlist: Duration::ZERO,
            stored: None,
            reset_at: None,
            pending: None,
        });
        own.schedule = Arc::new(own.schedule.extended(more));
        // Or the next request would take the same jump back for another one.
        own.see(window);
    }

    fn take_schedules(&self, stream: &Stream, rows: &[BoundaryRow]) {
        let mut known = stream.known.write();
        for (name, theirs) in renditions(rows, self.now()) {
            match known.renditions.get_mut(&name) {
                Some(own) => own.schedule = theirs.schedule,
                None => {
                    known.renditions.insert(name, theirs);
                }
            }
        }
    }
}
