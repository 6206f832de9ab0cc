//! Taking in what the store has: unwrapping keys, and putting what other nodes did to what this one knows.
//!
//! Keys only go forward in their lives and schedules only grow, so taking the same in twice, or an older state
//! after a newer one, changes nothing. A key that cannot be opened keeps nothing else from being taken in: that another
//! one was revoked must be heard while the KMS is away.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering as Atomic;

use super::deks::InHand;
use super::live::{ClearInitSigner, LiveKey, Revoked};
use super::stream::{Dek, Known, KnownKey, Rendition, Stream, UNREAD};
use super::worker::{Core, WorkerError};
use crate::keys::{
    ContentSecrets, Context, DataEncryptionKey, DekId, KeyState, Ordinal, Schedule, Timestamp, open,
};
use crate::store::{BoundaryRow, DekRow, KeyRow, StoredStream, StreamRow, StreamState};

impl Core {
    /// Takes a stream in as the store has it; one that is new becomes known, one that was deleted is forgotten.
    /// `hand`: its DEKs, as far as [`Self::missing`] asks for them.
    ///
    /// # Errors
    /// The first DEK or key that does not unwrap. All else is taken in; the stream keeps its revision, so that it is
    /// read again.
    pub(super) fn take_in(&self, stored: &StoredStream, hand: &InHand) -> Result<(), WorkerError> {
        let id = &stored.stream.id;
        let known = self.shared.directory.read().get(id).cloned();
        if stored.stream.state == StreamState::Deleted {
            self.forget(id);
            return Ok(());
        }
        let known = known.filter(|stream| stream.known.read().row.incarnation == stored.stream.incarnation);
        if let Some(stream) = known {
            return self.merge(&stream, stored, hand);
        }
        // Known before its keys are, and in place of what it was before: nothing of it may be passed through, even
        // if it cannot be read. Until it is, it has a revision that the store never has.
        self.warn_of_no_lead(&stored.stream);
        let stream = Arc::new(Stream::new(StreamRow { rev: UNREAD, ..stored.stream.clone() }));
        // Nobody else has it yet, so this does not fail.
        let _changing = stream.changing.try_lock();
        let before = self.shared.directory.write().insert(Arc::clone(&stream));
        if let Some(before) = before {
            self.drop_stream(&before);
        }
        self.note_streams();
        self.merge(&stream, stored, hand)
    }

    /// Warns of a stream whose key changes this node may hear of too late. It is no error: one node may be all there is.
    pub(super) fn warn_of_no_lead(&self, row: &StreamRow) {
        if row.policy.lead_segments == 0 && !self.is_alone() {
            tracing::warn!(
                stream = %row.id,
                "lead_segments is 0 on a store that several nodes may share: what time or an operator asks for changes \
                 segments that another node has published already; make it 1 or more"
            );
        }
    }

    /// Drops a stream with all its keys from memory.
    pub(super) fn forget(&self, id: &crate::keys::StreamId) {
        let removed = self.shared.directory.write().remove(id);
        if let Some(stream) = removed {
            self.drop_stream(&stream);
            self.note_streams();
        }
    }

    fn drop_stream(&self, stream: &Stream) {
        stream.serving.store(false, Atomic::Release);
        let known = stream.known.read();
        let mut keys = self.shared.keys.write();
        known.keys.values().for_each(|key| drop(keys.remove(&key.live.id)));
        let mut signers = self.shared.clear_inits.write();
        for dek in known.deks.values() {
            signers.remove(&dek.row.id);
            self.deks.let_go(dek.row.id);
        }
    }

    fn note_streams(&self) {
        let count = self.shared.directory.read().len();
        self.shared.metrics.streams.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Takes the stream's DEKs in, but for those that are not to be had.
    fn take_deks(&self, stream: &Stream, stored: &StoredStream, hand: &InHand) -> Result<(), WorkerError> {
        let mut failed = None;
        for row in &stored.deks {
            if stream.known.read().deks.contains_key(&row.version) {
                // Under another KEK, perhaps.
                if let Some(dek) = stream.known.write().deks.get_mut(&row.version) {
                    dek.row = row.clone();
                }
                continue;
            }
            match self.dek_in(stream, hand, row.id) {
                Ok(key) => self.know_dek(stream, row.clone(), &key),
                Err(error) => drop(failed.get_or_insert(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// A DEK that is in hand, or unwrapped.
    fn dek_in(&self, stream: &Stream, hand: &InHand, id: DekId) -> Result<DataEncryptionKey, WorkerError> {
        match hand.get(&id) {
            Some(key) => Ok(key.clone()?),
            None => {
                let not_unwrapped = || WorkerError::NotUnwrapped { stream: stream.id.to_string() };
                self.deks.held(id).ok_or_else(not_unwrapped)
            }
        }
    }

    pub(super) fn know_dek(&self, stream: &Stream, row: DekRow, key: &DataEncryptionKey) {
        let signer = Arc::new(ClearInitSigner {
            stream: stream.id.clone(),
            dek: row.id,
            link: key.clear_init_link_key(),
            serving: Arc::clone(&stream.serving),
        });
        self.shared.clear_inits.write().insert(row.id, Arc::clone(&signer));
        stream.known.write().deks.insert(row.version, Dek { row, signer });
    }

    /// Drops a DEK: it is shredded.
    pub(super) fn drop_dek(&self, known: &mut Known, id: DekId) {
        known.deks.retain(|_, dek| dek.row.id != id);
        self.shared.clear_inits.write().remove(&id);
        self.deks.let_go(id);
    }

    fn merge(&self, stream: &Stream, stored: &StoredStream, hand: &InHand) -> Result<(), WorkerError> {
        let is_current = stored.stream.rev >= stream.known.read().row.rev;
        let mut failed = self.take_deks(stream, stored, hand).err();
        for row in &stored.keys {
            // What an older state of the store still has, and this node has not, was destroyed since.
            let is_past = |known: &Known| row.ordinal < known.next && !known.is_there(row.ordinal);
            if (is_current || !is_past(&stream.known.read()))
                && let Err(error) = self.take_key(stream, row, hand)
            {
                failed.get_or_insert(error);
            }
        }
        let mut known = stream.known.write();
        known.next = known.next.max(stored.next_ordinal);
        if is_current {
            stream.serving.store(stored.stream.state == StreamState::Running, Atomic::Release);
            let rev = if failed.is_none() { stored.stream.rev } else { known.row.rev };
            known.row = StreamRow { rev, ..stored.stream.clone() };
            let is_kept =
                |ordinal: &Ordinal| stored.keys.binary_search_by_key(ordinal, |k| k.ordinal).is_ok();
            let gone: Vec<_> = known.keys.keys().copied().filter(|ordinal| !is_kept(ordinal)).collect();
            for ordinal in gone {
                self.drop_key(&mut known, ordinal);
            }
            known.unopened.retain(is_kept);
            let is_shredded = |dek: &&Dek| stored.deks.iter().all(|row| row.id != dek.row.id);
            let shredded: Vec<_> = known.deks.values().filter(is_shredded).map(|dek| dek.row.id).collect();
            for id in shredded {
                self.drop_dek(&mut known, id);
            }
        }
        known.take_schedules(&stored.boundaries, is_current);
        for row in &stored.renditions {
            if let Some(own) = known.renditions.get_mut(&row.rendition) {
                own.hear(row);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Takes a key in, or what has become of it.
    ///
    /// # Errors
    /// A key that does not open: it is known to be there.
    pub(super) fn take_key(&self, stream: &Stream, row: &KeyRow, hand: &InHand) -> Result<(), WorkerError> {
        if row.life.state == KeyState::Destroyed {
            let mut known = stream.known.write();
            known.next = known.next.max(row.ordinal.next());
            self.drop_key(&mut known, row.ordinal);
            return Ok(());
        }
        let is_known = stream.known.read().keys.contains_key(&row.ordinal);
        if !is_known {
            let opened = self.open_key(stream, row, hand);
            let mut known = stream.known.write();
            known.next = known.next.max(row.ordinal.next());
            match opened {
                Ok(live) => {
                    let live = Arc::new(live);
                    known.unopened.remove(&row.ordinal);
                    let key = KnownKey { life: row.life.clone(), dek: row.dek, live: Arc::clone(&live) };
                    known.keys.insert(row.ordinal, key);
                    self.shared.keys.write().insert(row.id, live);
                }
                Err(error) => {
                    known.unopened.insert(row.ordinal);
                    return Err(error);
                }
            }
        }
        let mut known = stream.known.write();
        if let Some(key) = known.keys.get_mut(&row.ordinal) {
            key.live.named_at(row.life.last_named_at.unwrap_or(row.life.created_at));
            if row.life.state >= key.life.state {
                let forced = key.life.forced || row.life.forced;
                key.life = crate::store::KeyLife { forced, ..row.life.clone() };
            }
            if let (Some(successor), Some(transition_until)) = (row.life.successor, row.life.transition_until)
            {
                key.live.revoke(Revoked { successor, transition_until });
            }
        }
        Ok(())
    }

    fn open_key(&self, stream: &Stream, row: &KeyRow, hand: &InHand) -> Result<LiveKey, WorkerError> {
        let name = || stream.id.to_string();
        let version = stream.known.read().dek_of(row.dek).map(|dek| dek.row.version);
        let version = match (version, hand.get(&row.dek)) {
            (Some(version), _) => version,
            // Its DEK is stored, and could not be had.
            (None, Some(Err(error))) => return Err(error.clone().into()),
            (None, _) => return Err(WorkerError::NoDek { stream: name() }),
        };
        let dek = self.dek_in(stream, hand, row.dek)?;
        let context = Context::Content { stream: &stream.id, key: row.id, ordinal: row.ordinal, version };
        let plaintext = open(dek.expose(), &context, &row.wrapped).map_err(|source| WorkerError::Unwrap {
            stream: name(),
            key: row.id,
            source,
        })?;
        let secrets = ContentSecrets::from_plaintext(row.method, &plaintext)
            .map_err(|source| WorkerError::Secret { stream: name(), key: row.id, source })?;
        let last_named_at = row.life.last_named_at.unwrap_or(row.life.created_at);
        Ok(LiveKey::new(&stream.id, row, secrets, Arc::clone(&stream.serving), last_named_at))
    }

    /// Drops a key's secrets: it is destroyed.
    pub(super) fn drop_key(&self, known: &mut Known, ordinal: Ordinal) {
        if let Some(key) = known.keys.remove(&ordinal) {
            key.live.destroy();
            self.shared.keys.write().remove(&key.live.id);
        }
        known.unopened.remove(&ordinal);
        let Known { keys, unopened, next, renditions, .. } = known;
        let is_gone = |ordinal: Ordinal| {
            ordinal < *next && !keys.contains_key(&ordinal) && !unopened.contains(&ordinal)
        };
        for rendition in renditions.values_mut() {
            if rendition.schedule.boundaries().first().is_some_and(|first| is_gone(first.ordinal)) {
                rendition.schedule = Arc::new(rendition.schedule.without(is_gone));
            }
        }
    }
}

impl Known {
    /// Takes schedules in, which come by rendition and in order. `all`: what does not come is not there.
    fn take_schedules(&mut self, rows: &[BoundaryRow], all: bool) {
        if all {
            // In a set: databases have orders of their own for text, in which nothing can be looked up here.
            let came: BTreeSet<&str> = rows.iter().map(|row| row.rendition.as_str()).collect();
            self.renditions.retain(|name, own| own.stored == 0 || came.contains(name.as_str()));
        }
        for rows in rows.chunk_by(|a, b| a.rendition == b.rendition) {
            // `chunk_by` gives no empty chunks.
            let (Some(first), Some(last)) = (rows.first(), rows.last()) else { continue };
            self.take_schedule(first, rows, last);
        }
    }

    fn take_schedule(&mut self, first: &BoundaryRow, rows: &[BoundaryRow], last: &BoundaryRow) {
        let stored = last.seq + 1;
        let boundaries: Vec<_> = rows.iter().map(|row| row.boundary).collect();
        let Some(own) = self.renditions.get_mut(&last.rendition) else {
            let theirs = Schedule::from_rows(first.seq, boundaries);
            // When it was last served, its row says.
            let rendition = Rendition::new(theirs, stored, last.edge, Timestamp::from_unix_millis(0));
            self.renditions.insert(last.rendition.clone(), rendition);
            return;
        };
        if stored <= own.stored {
            return;
        }
        let tail = own.unstored().to_vec();
        let agrees = tail
            .iter()
            .zip(rows.iter().skip_while(|row| row.seq < own.stored))
            .all(|(a, b)| *a == b.boundary);
        if !agrees {
            tracing::warn!(
                rendition = last.rendition,
                "another node went over to other keys while the store was away; its decision stands"
            );
        }
        if last.boundary.epoch > own.epoch() {
            own.edge = last.edge;
        }
        let theirs = Schedule::from_rows(first.seq, boundaries);
        // What was decided here while the store was away, and goes on where theirs ends, stays to be stored.
        let more = if agrees { tail.get(stored - own.stored..).unwrap_or_default() } else { &[][..] };
        own.schedule = Arc::new(theirs.extended(more));
        own.stored = stored;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{Boundary, Edge, MediaSequenceNumber};

    #[test]
    fn a_rendition_stays_known_in_whatever_order_its_database_sorts() {
        let row = |rendition: &str| BoundaryRow {
            rendition: rendition.into(),
            seq: 0,
            boundary: Boundary {
                epoch: 0,
                ordinal: Ordinal::FIRST,
                first: MediaSequenceNumber(0),
                segments: 100,
            },
            edge: Edge { first: MediaSequenceNumber(0), end: MediaSequenceNumber(6) },
        };
        // As PostgreSQL sorts in English: letters before their case, and punctuation hardly at all.
        let rows = ["/live/audio.m3u8", "/live/Video.m3u8", "/live/video_1.m3u8"].map(row);
        let stream = Stream::new(StreamRow::for_tests("ch1", "main", "/live/"));
        let mut known = stream.known.write();
        known.take_schedules(&rows, true);
        let served = Timestamp::from_unix_millis(1_000);
        known.renditions.values_mut().for_each(|own| own.last_served_at = served);
        known.take_schedules(&rows, true);
        assert_eq!(known.renditions.len(), 3);
        assert!(known.renditions.values().all(|own| own.last_served_at == served));
    }
}
