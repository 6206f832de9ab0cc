//! Loading a stream, and making its keys: whatever wraps or unwraps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::stream::{ClearInitSigner, KeyLife, Known, LiveKey, Rendition, Stream};
use super::worker::{Core, Dek, WorkerError};
use crate::entropy;
use crate::keys::{
    CONTENT_SECRET_LEN, ContentSecrets, Context, DataEncryptionKey, DekId, DekVersion, KeyId, KeyState,
    NONCE_LEN, Ordinal, Schedule, Timestamp, open, seal,
};
use crate::kms::LocalKms;
use crate::store::{BoundaryRow, DekRow, KeyRow, StoredStream};

impl Core {
    pub(super) async fn load_stream(&mut self, stream: &Stream, kms: &LocalKms) -> Result<(), WorkerError> {
        let id = &stream.settings.id;
        let now = self.now();
        self.store.ensure_stream(id, now).await?;
        let mut stored = self.store.load(id).await?;
        if stored.deks.is_empty() {
            stored.deks.push(self.make_dek(stream, kms).await?);
        }
        let mut deks = Vec::with_capacity(stored.deks.len());
        for row in &stored.deks {
            let context = Context::Dek { stream: id, dek: row.id, version: row.version };
            let key = kms.unwrap(&row.kek_id, &context, &row.wrapped)?;
            deks.push(Dek { id: row.id, version: row.version, key });
        }
        let known = self.unwrap_all(stream, &stored, &deks, now)?;
        *stream.known.write() = known;
        // `stored.deks` is never empty here.
        if let Some(newest) = deks.pop() {
            self.deks.insert(id.to_string(), newest);
        }
        tracing::info!(stream = %id, keys = stored.keys.len(), boundaries = stored.boundaries.len(), "stream loaded");
        Ok(())
    }

    async fn make_dek(&self, stream: &Stream, kms: &LocalKms) -> Result<DekRow, WorkerError> {
        let id = &stream.settings.id;
        let (dek, version) = (DekId::from_bytes(*entropy::random()), DekVersion(1));
        let key = DataEncryptionKey::from_bytes(*entropy::random());
        let row = DekRow {
            id: dek,
            version,
            kek_id: kms.kek_id(),
            wrapped: kms.wrap(&Context::Dek { stream: id, dek, version }, &key),
            created_at: self.now(),
        };
        Ok(self.store.put_dek(id, &row).await?)
    }

    fn unwrap_all(
        &self,
        stream: &Stream,
        stored: &StoredStream,
        deks: &[Dek],
        now: Timestamp,
    ) -> Result<Known, WorkerError> {
        let settings = &stream.settings;
        let mut known = Known::default();
        for row in &stored.keys {
            known.lives.insert(row.ordinal, life(row));
            if row.state == KeyState::Destroyed {
                continue;
            }
            let no_dek = || WorkerError::NoDek { stream: settings.id.to_string() };
            let dek = deks.iter().find(|dek| dek.id == row.dek).ok_or_else(no_dek)?;
            let live = Arc::new(unwrap_key(stream, row, dek, now)?);
            self.shared.keys.write().insert(row.id, Arc::clone(&live));
            known.live_keys.insert(row.ordinal, live);
        }
        for dek in deks {
            let link = dek.key.clear_init_link_key();
            let signer = Arc::new(ClearInitSigner { stream: settings.id.clone(), dek: dek.id, link });
            self.shared.clear_inits.write().insert(dek.id, Arc::clone(&signer));
            known.clear_init = Some(signer);
        }
        known.renditions = renditions(&stored.boundaries, now);
        for row in &stored.renditions {
            if let Some(own) = known.renditions.get_mut(&row.rendition) {
                own.ended = row.ended;
                own.keeps_all = row.keeps_all;
                own.longest_playlist = row.longest_playlist;
                own.stored = Some(row.clone());
            }
        }
        Ok(known)
    }

    /// Makes the keys that are missing up to `highest`. Needs no KMS: the DEK is in memory.
    pub(super) async fn make_keys_up_to(&self, stream: &Stream, highest: Ordinal) -> Result<(), WorkerError> {
        let next = stream.known.read().lives.keys().next_back().map_or(0, |last| last.0 + 1);
        if next > highest.0 {
            return Ok(());
        }
        let settings = &stream.settings;
        let dek = self.deks.get(settings.id.as_str());
        let dek = dek.ok_or_else(|| WorkerError::NoDek { stream: settings.id.to_string() })?;
        let drafts: Vec<_> = (next..=highest.0).map(|o| self.draft_key(stream, dek, Ordinal(o))).collect();
        let stored = self.store.put_keys(&settings.id, &drafts).await?;
        for row in stored {
            // Where another node was first, the key is its, and not our draft.
            let live = Arc::new(unwrap_key(stream, &row, dek, self.now())?);
            self.shared.keys.write().insert(live.id, Arc::clone(&live));
            let mut known = stream.known.write();
            known.lives.insert(row.ordinal, life(&row));
            known.live_keys.insert(row.ordinal, live);
        }
        Ok(())
    }

    fn draft_key(&self, stream: &Stream, dek: &Dek, ordinal: Ordinal) -> KeyRow {
        let settings = &stream.settings;
        let method = settings.policy.key_method;
        let id = KeyId::from_bytes(*entropy::random());
        let secrets = ContentSecrets::from_random(method, &entropy::random::<CONTENT_SECRET_LEN>());
        let context = Context::Content { stream: &settings.id, key: id, ordinal, version: dek.version };
        let nonce = *entropy::random::<NONCE_LEN>();
        KeyRow {
            id,
            ordinal,
            dek: dek.id,
            method,
            iv_mode: settings.policy.iv_mode,
            wrapped: seal(dek.key.expose(), nonce, &context, &secrets.to_plaintext()),
            state: KeyState::PreActive,
            created_at: self.now(),
            activated_at: None,
            forced: false,
            deactivated_at: None,
        }
    }
}

fn life(row: &KeyRow) -> KeyLife {
    KeyLife {
        state: row.state,
        activated_at: row.activated_at,
        forced: row.forced,
        deactivated_at: row.deactivated_at,
    }
}

fn unwrap_key(stream: &Stream, row: &KeyRow, dek: &Dek, now: Timestamp) -> Result<LiveKey, WorkerError> {
    let settings = &stream.settings;
    let name = || settings.id.to_string();
    let context =
        Context::Content { stream: &settings.id, key: row.id, ordinal: row.ordinal, version: dek.version };
    let plaintext = open(dek.key.expose(), &context, &row.wrapped).map_err(|source| WorkerError::Unwrap {
        stream: name(),
        key: row.id,
        source,
    })?;
    let secrets = ContentSecrets::from_plaintext(row.method, &plaintext)
        .map_err(|source| WorkerError::Secret { stream: name(), key: row.id, source })?;
    Ok(LiveKey::new(&settings.id, row, secrets, now))
}

/// Schedules out of rows, which come by rendition and in order.
pub(super) fn renditions(rows: &[BoundaryRow], now: Timestamp) -> BTreeMap<String, Rendition> {
    let mut renditions = BTreeMap::new();
    for rows in rows.chunk_by(|a, b| a.rendition == b.rendition) {
        // `chunk_by` gives no empty chunks.
        let Some(last) = rows.last() else { continue };
        let boundaries = rows.iter().map(|row| row.boundary).collect();
        let rendition = Rendition {
            schedule: Arc::new(Schedule::from_rows(boundaries)),
            edge: last.edge,
            ended: false,
            keeps_all: false,
            last_served_at: now,
            longest_playlist: Duration::ZERO,
            stored: None,
            reset_at: None,
            pending: None,
        };
        renditions.insert(last.rendition.clone(), rendition);
    }
    renditions
}
