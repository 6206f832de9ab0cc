//! Keys: made, and taken through their states.
//!
//! What is to be written comes as [`Write`]s; all that are given together are one transaction, each stream's in
//! their order (`apply` carries them out). Each write leaves a key alone that is past it already, so that doing it
//! twice, or on two nodes, is doing it once.

use std::collections::HashMap;

use sqlx::Row;

use super::StoreError;
use super::dialect::both;
use super::open::{Store, bounded};
use super::rows::{DekRow, KeyRow, json, parsed, unsigned};
use crate::keys::{DekId, KeyId, Ordinal, Reason, StreamId, Timestamp};

/// One change of one stream's keys.
#[derive(Debug, Clone)]
pub struct Write {
    pub stream: StreamId,
    pub op: WriteOp,
}

/// What is to be done to a stream's keys.
#[derive(Debug, Clone)]
pub enum WriteOp {
    /// Stores a DEK, unless its version is taken.
    PutDek(DekRow),
    /// Stores pre-active keys, each unless its ordinal is taken.
    PutKeys(Vec<KeyRow>),
    /// Makes a pre-active key active, and those that wait before it. `actor`: who asked.
    Promote {
        upto: Ordinal,
        reason: Reason,
        actor: Option<String>,
        at: Timestamp,
    },
    /// Every rendition must go over to this active key.
    Force {
        ordinal: Ordinal,
    },
    Deactivate {
        ordinal: Ordinal,
        at: Timestamp,
    },
    /// Makes keys compromised, with the one that takes their place.
    Revoke {
        ordinals: Vec<Ordinal>,
        successor: Ordinal,
        reason: String,
        actor: String,
        at: Timestamp,
        transition_until: Timestamp,
    },
    /// Stores the incident of a revocation that stands before it, if that took any key back.
    PutIncident(Box<super::NewIncident>),
    /// Wipes a DEK's bytes for good; unless it is its stream's newest, or wraps a key that is not destroyed.
    ShredDek {
        dek: DekId,
    },
    /// Wipes a retired key's bytes for good, and the boundaries that name it; unless a playlist that names it
    /// was served after `unless_named_after`.
    Destroy {
        ordinal: Ordinal,
        at: Timestamp,
        unless_named_after: Timestamp,
    },
}

/// What became of a [`Write`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The DEK that is there now under the version that was to be stored: ours, or another node's.
    Dek(DekRow),
    /// The keys that are there now under the ordinals that were to be stored: ours, or another node's.
    Keys(Vec<KeyRow>),
    /// How many keys, or DEKs, were changed; none, where all were past it.
    Changed(u64),
}

impl Store {
    /// The highest version of each stream's DEKs, shredded ones too; streams that never had one are left out.
    pub async fn highest_deks(&self, streams: &[StreamId]) -> Result<HashMap<StreamId, u32>, StoreError> {
        let ids: Vec<_> = streams.iter().map(StreamId::as_str).collect();
        bounded(async {
            let sql = both!(
                self.dialect,
                "SELECT stream_id, max(version) AS version FROM deks WHERE stream_id IN (" ids ")
                 GROUP BY stream_id"
            );
            let rows = sqlx::query(sql).bind(json(&ids)).fetch_all(&self.pool).await?;
            rows.iter().map(|row| Ok((parsed(row, "stream_id")?, unsigned(row, "version")?))).collect()
        })
        .await
    }

    /// A stream's keys with the newest first, destroyed ones too, at most `limit` with ordinals below `before`.
    /// `promoted`: only those that were.
    pub async fn key_history(
        &self,
        stream: &StreamId,
        promoted: bool,
        before: Option<Ordinal>,
        limit: u32,
    ) -> Result<Vec<KeyRow>, StoreError> {
        bounded(async {
            let sql = "SELECT * FROM content_keys
                       WHERE stream_id = $1 AND ordinal < $2 AND (activated_at IS NOT NULL OR $3 = 0)
                       ORDER BY ordinal DESC LIMIT $4";
            let rows = sqlx::query(sql)
                .bind(stream.as_str())
                .bind(before.map_or(i64::MAX, |ordinal| i64::from(ordinal.0)))
                .bind(i64::from(promoted))
                .bind(i64::from(limit))
                .fetch_all(&self.pool)
                .await?;
            rows.iter().map(KeyRow::read).collect()
        })
        .await
    }
}

/// One key by its ID, whatever its state.
impl Store {
    /// The stream that a key belongs to; `None` for a key that was never stored, or is destroyed.
    pub async fn stream_of_key(&self, key: KeyId) -> Result<Option<StreamId>, StoreError> {
        bounded(async {
            let sql = "SELECT stream_id FROM content_keys WHERE id = $1 AND state <> 'destroyed'";
            let row = sqlx::query(sql).bind(key.to_string()).fetch_optional(&self.pool).await?;
            row.map(|row| {
                let id: String = row.try_get("stream_id")?;
                id.parse().map_err(|_| super::rows::unreadable("stream_id", id))
            })
            .transpose()
        })
        .await
    }
}
