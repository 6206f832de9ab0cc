//! Extending a schedule: the boundaries that a window calls for, stored before any playlist shows them.
//!
//! While the store is away, a rendition goes on under the keys that are in memory: what the count asks for is
//! arithmetic, so every node that is cut off decides the same, and it is stored when the store is back. All else
//! waits for the store (docs/design/009). While the KMS is away and no key is left, the last one goes on (`keys::plan`). One that is too busy is done without in the same way, and not taken for away.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::deks::InHand;
use super::stream::{Call, MAX_RENDITIONS, Rendition, Shown, Stream};
use super::worker::{Core, WorkerError};
use super::{ATTEMPTS, EngineError, Extend, RESET_INTERVAL};
use crate::fault;
use crate::keys::{Boundary, Edge, Reason, Schedule};
use crate::store::{BoundaryRow, RenditionRow};

impl Core {
    pub(super) async fn answer(&self, extend: Extend) {
        let Extend { stream, rendition, shown, reply, _place } = extend;
        // Before anything is held: the KMS may be asked.
        let hand = match self.calls_for_new_keys(&stream, &rendition, &shown) {
            true => self.newest_dek(&stream).await,
            false => InHand::new(),
        };
        let extended = {
            let _changing = stream.changing.lock().await;
            // Taken last: whoever has a turn waits for the store alone. Nobody closes it.
            let _turn = self.turns.acquire().await;
            let extended = self.extend(&stream, &rendition, &shown, &hand).await;
            stream.settle(&rendition);
            extended
        };
        if let Err(error) = &extended {
            tracing::error!(stream = %stream.id, rendition, %error, "schedule not extended");
        }
        if let Some(reply) = reply {
            // Who asked may have gone away.
            let _ = reply.send(extended.map_err(|error| EngineError::Failed(error.to_string())));
        }
    }

    /// Whether a window calls for keys that are not made yet.
    fn calls_for_new_keys(&self, stream: &Stream, rendition: &str, shown: &Shown) -> bool {
        let Some(call) = stream.call(rendition, &shown.window, self.now()) else { return false };
        let next = stream.known.read().next;
        call.planned.iter().any(|(boundary, _)| boundary.ordinal >= next)
    }

    /// Stores the boundaries that a window calls for, and the keys that they name before them.
    async fn extend(
        &self,
        stream: &Arc<Stream>,
        rendition: &str,
        shown: &Shown,
        hand: &InHand,
    ) -> Result<(), WorkerError> {
        let mut refreshed = false;
        for _ in 0..ATTEMPTS {
            let can_make = self.making_dek(&stream.known.read(), hand).is_some();
            let call = stream.propose(rendition, &shown.window, self.now(), can_make);
            let Some(call) = call else { return Ok(()) };
            let Some(&(highest, reason)) = call.planned.last() else { return Ok(()) };
            self.refuse(stream, rendition, &call)?;
            if self.is_store_away() {
                return self.decide_alone(stream, rendition, shown, &call, false);
            }
            // A new epoch is for renditions that nobody holds a playlist of: another node may know better.
            let begins_anew = call.have > 0 && reason == Reason::Start;
            if begins_anew && !refreshed && !self.is_alone() {
                self.refresh(stream).await?;
                refreshed = true;
                continue;
            }
            match self.store_boundaries(stream, rendition, shown, &call, hand).await {
                Ok(true) => {
                    fault::point("extend: boundaries known, none promoted");
                    match self.promote(stream, highest.ordinal, reason).await {
                        // All that the window needs is stored; the promotion is the next sweep's.
                        Err(WorkerError::Store(error)) if error.is_away() || error.is_busy() => {
                            self.note_if_away(&error);
                            tracing::warn!(%error, "the store is away or busy, before a promotion");
                        }
                        promoted => promoted?,
                    }
                    fault::point("extend: promoted");
                    return Ok(());
                }
                // Another node was first: what it stored is the schedule.
                Ok(false) => self.refresh(stream).await?,
                Err(WorkerError::Unanswered(error)) => {
                    self.note_store(false);
                    tracing::warn!(%error, "the store may have the boundaries or not: they hold");
                    return self.decide_alone(stream, rendition, shown, &call, true);
                }
                Err(WorkerError::Store(error)) if error.is_away() || error.is_busy() => {
                    self.note_if_away(&error);
                    tracing::warn!(%error, "the store is away or busy");
                    return self.decide_alone(stream, rendition, shown, &call, false);
                }
                Err(error) => return Err(error),
            }
        }
        Err(WorkerError::Contended { stream: stream.id.to_string(), rendition: rendition.to_owned() })
    }

    fn refuse(&self, stream: &Stream, rendition: &str, call: &Call) -> Result<(), WorkerError> {
        let (id, rendition) = (stream.id.to_string(), rendition.to_owned());
        let known = stream.known.read();
        if call.have == 0 && known.renditions.len() >= MAX_RENDITIONS {
            return Err(WorkerError::TooManyRenditions { stream: id });
        }
        let resets = call.planned.iter().any(|(_, reason)| *reason == Reason::Reset);
        let reset_at = known.renditions.get(&rendition).and_then(|own| own.reset_at);
        if resets && reset_at.is_some_and(|at| self.now().since(at) < RESET_INTERVAL) {
            return Err(WorkerError::Flapping { stream: id, rendition });
        }
        Ok(())
    }

    /// Stores what was planned, behind what is not stored yet; `false` when another node was first.
    async fn store_boundaries(
        &self,
        stream: &Stream,
        rendition: &str,
        shown: &Shown,
        call: &Call,
        hand: &InHand,
    ) -> Result<bool, WorkerError> {
        let Some((highest, _)) = call.planned.last() else { return Ok(true) };
        self.make_keys_up_to(stream, highest.ordinal, hand).await?;
        fault::point("extend: keys there, no boundaries");
        let unstored = self.unstored_rows(stream, rendition);
        let edge = Edge { first: shown.window.first, end: shown.window.end };
        let row = |(seq, &(boundary, reason)): (usize, &(Boundary, Reason))| {
            (BoundaryRow { rendition: rendition.to_owned(), seq, boundary, edge }, reason)
        };
        let rows: Vec<_> = unstored.into_iter().chain((call.have..).zip(&call.planned).map(row)).collect();
        let about = RenditionRow {
            rendition: rendition.to_owned(),
            ended: shown.window.ended,
            keeps_all: shown.window.keeps_all,
            target_duration: shown.target_duration,
            longest_playlist: Duration::ZERO,
            epoch: highest.epoch,
            edge,
            last_served_at: self.now(),
        };
        let added = self.store.add_boundaries(&stream.id, &rows, &about, self.now()).await;
        let Some(rev) = added.map_err(|error| match error.may_be_stored() {
            true => WorkerError::Unanswered(error),
            false => error.into(),
        })?
        else {
            return Ok(false);
        };
        fault::point("extend: boundaries stored, not known");
        self.note_revs(&[(stream.id.clone(), rev)]);
        self.know_boundaries(stream, rendition, shown, call);
        if let Some(own) = stream.known.write().renditions.get_mut(rendition) {
            own.stored = own.schedule.len();
        }
        Ok(true)
    }

    /// What was decided while the store was away, as rows.
    fn unstored_rows(&self, stream: &Stream, rendition: &str) -> Vec<(BoundaryRow, Reason)> {
        let known = stream.known.read();
        let Some(own) = known.renditions.get(rendition) else { return Vec::new() };
        let row = |(seq, boundary): (usize, &Boundary)| {
            let row =
                BoundaryRow { rendition: rendition.to_owned(), seq, boundary: *boundary, edge: own.edge };
            (row, Reason::Count)
        };
        (own.stored..).zip(own.unstored()).map(row).collect()
    }

    /// Goes on without the store, as far as the count and the keys in memory go. `may_be_stored`: what was planned
    /// is likely in the store, where others find it; so it holds here too, whatever asked for it.
    fn decide_alone(
        &self,
        stream: &Stream,
        rendition: &str,
        shown: &Shown,
        call: &Call,
        may_be_stored: bool,
    ) -> Result<(), WorkerError> {
        let known = stream.known.read();
        let may_go_on = |(boundary, reason): &&(Boundary, Reason)| {
            (*reason == Reason::Count || may_be_stored) && known.keys.contains_key(&boundary.ordinal)
        };
        let planned: Vec<_> = call.planned.iter().take_while(may_go_on).copied().collect();
        let is_known = known.renditions.contains_key(rendition);
        drop(known);
        let begins = |(_, reason): &(Boundary, Reason)| matches!(reason, Reason::Start | Reason::Reset);
        if !is_known || call.planned.iter().any(begins) {
            return Err(WorkerError::Away { stream: stream.id.to_string(), rendition: rendition.to_owned() });
        }
        if planned.is_empty() {
            // What time or an operator asked for lies ahead, and waits. Where the count asks and no key is left,
            // the last one stays in use: its period then ends where the next key can be had.
            return Ok(());
        }
        tracing::warn!(stream = %stream.id, rendition, "without the store, keys change by count alone");
        self.know_boundaries(stream, rendition, shown, &Call { planned, ..call.clone() });
        self.decided_alone.store(true, Ordering::Release);
        Ok(())
    }

    fn know_boundaries(&self, stream: &Stream, rendition: &str, shown: &Shown, call: &Call) {
        let more: Vec<_> = call.planned.iter().map(|(boundary, _)| *boundary).collect();
        let edge = Edge { first: shown.window.first, end: shown.window.end };
        let now = self.now();
        let mut known = stream.known.write();
        let own = known
            .renditions
            .entry(rendition.to_owned())
            .or_insert_with(|| Rendition::new(Schedule::default(), 0, edge, now));
        own.schedule = Arc::new(own.schedule.extended(&more));
        // Or the next request would take the same jump back for another one.
        own.see(&shown.window);
        if call.planned.iter().any(|(_, reason)| *reason == Reason::Reset) {
            own.reset_at = Some(now);
        }
    }

    /// Stores what was decided while the store was away.
    ///
    /// # Errors
    /// The first stream's of which it could not be stored; the others' was.
    pub(super) async fn store_what_waits(&self) -> Result<(), WorkerError> {
        let streams: Vec<_> = self.shared.directory.read().iter().cloned().collect();
        let mut failed = None;
        for stream in streams {
            let names: Vec<String> = {
                let known = stream.known.read();
                let waiting = known.renditions.iter().filter(|(_, own)| !own.unstored().is_empty());
                waiting.map(|(name, _)| name.clone()).collect()
            };
            if !names.is_empty()
                && let Err(error) = self.store_what_waits_of(&stream, names).await
            {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn store_what_waits_of(&self, stream: &Arc<Stream>, names: Vec<String>) -> Result<(), WorkerError> {
        let _changing = stream.changing.lock().await;
        for name in names {
            let rows = self.unstored_rows(stream, &name);
            let Some(about) = stream.known.read().renditions.get(&name).map(|own| own.row(&name)) else {
                continue;
            };
            if rows.is_empty() {
                continue;
            }
            fault::point("what waits: before");
            match self.store.add_boundaries(&stream.id, &rows, &about, self.now()).await? {
                Some(rev) => {
                    fault::point("what waits: stored, not known");
                    self.note_revs(&[(stream.id.clone(), rev)]);
                    if let Some(own) = stream.known.write().renditions.get_mut(&name) {
                        own.stored += rows.len();
                    }
                }
                // Another node was first; mostly with the same.
                None => self.refresh(stream).await?,
            }
        }
        Ok(())
    }
}
