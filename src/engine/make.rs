//! Making keys: whatever wraps.

use std::sync::Arc;

use super::stream::{Dek, Known, Stream};
use super::worker::{Core, WorkerError};
use crate::entropy;
use crate::fault;
use crate::keys::{
    CONTENT_SECRET_LEN, ContentSecrets, Context, DataEncryptionKey, DekId, DekVersion, KeyId, NONCE_LEN,
    Ordinal, StreamId, seal,
};
use crate::store::{Applied, DekRow, KeyLife, KeyRow, Write, WriteOp};

impl Core {
    /// Makes the data encryption keys of streams that have none: the one call of the KMS to wrap in a stream's life.
    pub(super) async fn ensure_deks(&self, streams: &[Arc<Stream>]) -> Result<(), WorkerError> {
        let without = |streams: &[Arc<Stream>]| -> Vec<_> {
            streams.iter().filter(|stream| stream.known.read().deks.is_empty()).cloned().collect()
        };
        let mut new = without(streams);
        if new.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = new.iter().map(|stream| stream.id.clone()).collect();
        // Shredded ones keep their versions.
        let highest = self.store.highest_deks(&ids).await?;
        // Asked for behind the versions: another node's is either found here, or has the version that we try.
        if !self.is_alone() && !highest.is_empty() {
            let had: Vec<_> = ids.into_iter().filter(|id| highest.contains_key(id)).collect();
            for stored in self.store.load(&had).await? {
                self.take_in(&stored)?;
            }
            new = without(&new);
        }
        let draft = |stream: &Arc<Stream>| {
            let version = DekVersion(highest.get(&stream.id).map_or(1, |highest| highest + 1));
            Write { stream: stream.id.clone(), op: WriteOp::PutDek(self.draft_dek(&stream.id, version)) }
        };
        let writes: Vec<_> = new.iter().map(draft).collect();
        fault::point("DEK: wrapped, not stored");
        let (applied, revs) = self.store.apply(&writes).await?;
        fault::point("DEK: stored, not known");
        for (stream, applied) in new.iter().zip(&applied) {
            // Where another node was first, the key is its, and not ours.
            if let Applied::Dek(there) = applied {
                self.know_dek(stream, self.unwrap_dek(stream, there)?);
            }
        }
        self.note_revs(&revs);
        Ok(())
    }

    fn draft_dek(&self, stream: &StreamId, version: DekVersion) -> DekRow {
        let id = DekId::from_bytes(*entropy::random());
        let key = DataEncryptionKey::from_bytes(*entropy::random());
        self.shared.metrics.kms_calls.with_label_values(&["wrap"]).inc();
        DekRow {
            id,
            version,
            kek_id: self.kms.kek_id(),
            wrapped: self.kms.wrap(&Context::Dek { stream, dek: id, version }, &key),
            created_at: self.now(),
        }
    }

    pub(super) fn unwrap_dek(&self, stream: &Stream, row: &DekRow) -> Result<Dek, WorkerError> {
        let context = Context::Dek { stream: &stream.id, dek: row.id, version: row.version };
        self.shared.metrics.kms_calls.with_label_values(&["unwrap"]).inc();
        let key = self.kms.unwrap(&row.kek_id, &context, &row.wrapped)?;
        Ok(Dek { id: row.id, version: row.version, key })
    }

    /// Drafts of the keys that are missing up to `highest`. Needs no KMS: the DEK is in memory.
    pub(super) fn draft_keys(&self, known: &Known, highest: Ordinal) -> Result<Vec<KeyRow>, WorkerError> {
        let no_dek = || WorkerError::NoDek { stream: known.row.id.to_string() };
        let dek = known.dek().ok_or_else(no_dek)?;
        Ok((known.next.0..=highest.0).map(|ordinal| self.draft_key(known, dek, Ordinal(ordinal))).collect())
    }

    /// Makes the keys that are missing up to `highest`.
    pub(super) async fn make_keys_up_to(&self, stream: &Stream, highest: Ordinal) -> Result<(), WorkerError> {
        let drafts = self.draft_keys(&stream.known.read(), highest)?;
        if drafts.is_empty() {
            return Ok(());
        }
        let write = Write { stream: stream.id.clone(), op: WriteOp::PutKeys(drafts) };
        let (applied, revs) = self.store.apply(std::slice::from_ref(&write)).await?;
        fault::point("make: stored, not known");
        if let Some(Applied::Keys(rows)) = applied.first() {
            for row in rows {
                self.take_key(stream, row)?;
            }
        }
        self.note_revs(&revs);
        Ok(())
    }

    fn draft_key(&self, known: &Known, dek: &Dek, ordinal: Ordinal) -> KeyRow {
        let (stream, policy) = (&known.row.id, &known.row.policy);
        let id = KeyId::from_bytes(*entropy::random());
        let secrets =
            ContentSecrets::from_random(policy.key_method, &entropy::random::<CONTENT_SECRET_LEN>());
        let context = Context::Content { stream, key: id, ordinal, version: dek.version };
        let nonce = *entropy::random::<NONCE_LEN>();
        KeyRow {
            id,
            ordinal,
            dek: dek.id,
            method: policy.key_method,
            iv_mode: policy.iv_mode,
            wrapped: seal(dek.key.expose(), nonce, &context, &secrets.to_plaintext()),
            life: KeyLife::pre_active(self.now()),
        }
    }
}
