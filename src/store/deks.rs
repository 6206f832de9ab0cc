//! Data encryption keys of all streams: read page by page, and put under another key of the KMS one by one.
//!
//! A wrapping takes the place of the one that was read, and of no other: what was shredded or re-wrapped meanwhile stays
//! as it is. Deliberately absent: new ones, which come with their streams (`apply`).

use super::StoreError;
use super::open::{Store, bounded, commit, repeated};
use super::rows::{DekRow, parsed};
use crate::fault;
use crate::keys::{DekVersion, StreamId};

/// A wrapped key and the stream that it is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDek {
    pub stream: StreamId,
    pub row: DekRow,
}

/// Where the next page begins: behind this stream's key of this version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DekCursor {
    stream: String,
    version: i64,
}

impl StoredDek {
    /// Behind this one.
    pub fn cursor(&self) -> DekCursor {
        let DekVersion(version) = self.row.version;
        DekCursor { stream: self.stream.to_string(), version: version.into() }
    }
}

/// What became of a wrapping that was to take another's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    Done,
    /// The key is wrapped otherwise than it was read: another was faster.
    Changed,
    /// The key is shredded, or its stream is gone.
    Gone,
}

impl Store {
    /// The keys of streams that are not deleted, at most `limit` of them.
    pub async fn deks_after(&self, after: &DekCursor, limit: u32) -> Result<Vec<StoredDek>, StoreError> {
        bounded(async {
            let sql = "SELECT d.* FROM deks d JOIN streams s ON s.id = d.stream_id
                       WHERE length(d.wrapped) > 0 AND s.state <> 'deleted'
                         AND (d.stream_id > $1 OR (d.stream_id = $1 AND d.version > $2))
                       ORDER BY d.stream_id, d.version LIMIT $3";
            let query = sqlx::query(sql).bind(&after.stream).bind(after.version).bind(i64::from(limit));
            let rows = query.fetch_all(&self.pool).await?;
            let read = |row| {
                let stream = parsed(row, "stream_id")?;
                Ok::<_, StoreError>(StoredDek { stream, row: DekRow::read(row)? })
            };
            rows.iter().map(read).collect()
        })
        .await
    }

    /// How many keys [`Self::deks_after`] gives from the beginning.
    pub async fn count_deks(&self) -> Result<u64, StoreError> {
        bounded(async {
            let sql = "SELECT count(*) AS deks FROM deks d JOIN streams s ON s.id = d.stream_id
                       WHERE length(d.wrapped) > 0 AND s.state <> 'deleted'";
            super::rows::unsigned(&sqlx::query(sql).fetch_one(&self.pool).await?, "deks")
        })
        .await
    }

    /// Puts a key under another wrapping, unless it is not wrapped any more as it was read.
    pub async fn replace_dek(
        &self,
        read: &StoredDek,
        kek_id: &str,
        wrapped: &[u8],
    ) -> Result<Replaced, StoreError> {
        let (stream, row) = (&read.stream, &read.row);
        repeated(|| async {
            let mut tx = self.begin().await?;
            fault::point("re-wrap: before");
            if self.touch(&mut tx, stream).await?.is_none() {
                return Ok(Replaced::Gone);
            }
            let sql = "UPDATE deks SET kek_id = $3, wrapped = $4
                       WHERE id = $1 AND stream_id = $2 AND kek_id = $5 AND wrapped = $6";
            let replaced = sqlx::query(sql)
                .bind(row.id.to_string())
                .bind(stream.as_str())
                .bind(kek_id)
                .bind(wrapped)
                .bind(&row.kek_id)
                .bind(&row.wrapped)
                .execute(&mut *tx)
                .await?;
            if replaced.rows_affected() == 0 {
                // The stream did not change, and nobody need read it again.
                tx.rollback().await?;
                let sql = "SELECT 1 AS there FROM deks WHERE id = $1 AND length(wrapped) > 0";
                let there = sqlx::query(sql).bind(row.id.to_string()).fetch_optional(&self.pool).await?;
                return Ok(if there.is_some() { Replaced::Changed } else { Replaced::Gone });
            }
            self.tell(&mut tx).await?;
            commit(tx, "re-wrap: before the commit", "re-wrap: committed").await?;
            Ok(Replaced::Done)
        })
        .await
    }
}
