//! Making content keys, and wrapping them.

use super::stream::{Dek, Known, Stream};
use super::worker::{Core, WorkerError};
use crate::entropy;
use crate::fault;
use crate::keys::{CONTENT_SECRET_LEN, ContentSecrets, Context, KeyId, NONCE_LEN, Ordinal, seal};
use crate::store::{Applied, KeyLife, KeyRow, Write, WriteOp};

impl Core {
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
