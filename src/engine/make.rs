//! Making content keys, and wrapping them.

use super::deks::InHand;
use super::stream::{Known, Stream};
use super::worker::{Core, WorkerError};
use crate::entropy;
use crate::fault;
use crate::keys::{
    CONTENT_SECRET_LEN, ContentSecrets, Context, DataEncryptionKey, KeyId, NONCE_LEN, Ordinal, seal,
};
use crate::store::{Applied, DekRow, KeyLife, KeyRow, Write, WriteOp};

impl Core {
    /// The newest DEK of a stream, where it is in hand or unwrapped: without it no key is made.
    pub(super) fn making_dek(&self, known: &Known, hand: &InHand) -> Option<DataEncryptionKey> {
        let id = known.dek()?.row.id;
        hand.get(&id).and_then(|key| key.clone().ok()).or_else(|| self.deks.held(id))
    }

    /// Drafts of the keys that are missing up to `highest`. Asks no KMS.
    ///
    /// # Errors
    /// [`WorkerError::NoKeyToBeHad`] where one is missing and the DEK is not unwrapped.
    pub(super) fn draft_keys(
        &self,
        known: &Known,
        highest: Ordinal,
        hand: &InHand,
    ) -> Result<Vec<KeyRow>, WorkerError> {
        if highest < known.next {
            return Ok(Vec::new());
        }
        let (Some(dek), Some(key)) = (known.dek(), self.making_dek(known, hand)) else {
            return Err(self.no_key_to_be_had(known));
        };
        let ordinals = (known.next.0..=highest.0).map(Ordinal);
        Ok(ordinals.map(|ordinal| self.draft_key(known, &dek.row, &key, ordinal)).collect())
    }

    pub(super) fn no_key_to_be_had(&self, known: &Known) -> WorkerError {
        let why =
            self.shared.troubles.kms().unwrap_or_else(|| "its data encryption key is not unwrapped".into());
        WorkerError::NoKeyToBeHad { stream: known.row.id.to_string(), why }
    }

    /// Makes the keys that are missing up to `highest`.
    pub(super) async fn make_keys_up_to(
        &self,
        stream: &Stream,
        highest: Ordinal,
        hand: &InHand,
    ) -> Result<(), WorkerError> {
        let drafts = self.draft_keys(&stream.known.read(), highest, hand)?;
        if drafts.is_empty() {
            return Ok(());
        }
        let write = Write { stream: stream.id.clone(), op: WriteOp::PutKeys(drafts) };
        let (applied, revs) = self.store.apply(std::slice::from_ref(&write)).await?;
        fault::point("make: stored, not known");
        if let Some(Applied::Keys(rows)) = applied.first() {
            for row in rows {
                self.take_key(stream, row, hand)?;
            }
        }
        self.note_revs(&revs);
        Ok(())
    }

    fn draft_key(&self, known: &Known, dek: &DekRow, key: &DataEncryptionKey, ordinal: Ordinal) -> KeyRow {
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
            wrapped: seal(key.expose(), nonce, &context, &secrets.to_plaintext()),
            life: KeyLife::pre_active(self.now()),
        }
    }
}
