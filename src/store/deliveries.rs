//! What CDNs have of keys, and how the CDNs are.
//!
//! The node that delivers writes; others read, to answer operators. A row outlives its key, and its stream's erasure,
//! until the key is out of the edge's store. Deliberately absent: what is to be delivered (`engine::delivery`).

use serde_json::json;
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};

use super::StoreError;
use super::open::{Store, bounded, commit, repeated};
use super::rows::{self, named, optional_time, parsed, time, unsigned};
use crate::fault;
use crate::keys::{KeyId, Ordinal, StreamId, Timestamp};

/// How far the delivery of a key to a CDN is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryState {
    /// It is on its way: the CDN may have it, or not.
    Sending,
    /// The CDN has taken it; its edge has not shown it yet.
    Stored,
    /// The edge has shown its check value.
    Verified,
}

impl DeliveryState {
    pub fn name(self) -> &'static str {
        match self {
            DeliveryState::Sending => "sending",
            DeliveryState::Stored => "stored",
            DeliveryState::Verified => "verified",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        let all = [DeliveryState::Sending, DeliveryState::Stored, DeliveryState::Verified];
        all.into_iter().find(|state| state.name() == name)
    }
}

/// What one CDN has of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryRow {
    pub cdn: String,
    pub key: KeyId,
    pub stream: StreamId,
    pub ordinal: Ordinal,
    pub state: DeliveryState,
    /// Why it is no further.
    pub last_error: Option<String>,
    pub updated_at: Timestamp,
}

/// How a CDN is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CdnStateRow {
    pub name: String,
    /// `None` while it does what it is asked.
    pub failing_since: Option<Timestamp>,
    /// Calls that failed in a row.
    pub failures: u32,
    pub last_error: Option<String>,
    pub updated_at: Timestamp,
}

impl DeliveryRow {
    fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            cdn: row.try_get("cdn")?,
            key: parsed(row, "key_id")?,
            stream: parsed(row, "stream_id")?,
            ordinal: Ordinal(unsigned(row, "ordinal")?),
            state: named(row, "state", DeliveryState::from_name)?,
            last_error: row.try_get("last_error")?,
            updated_at: time(row, "updated_at")?,
        })
    }
}

impl Store {
    /// What a CDN has, in the order of key IDs, at most `limit` behind `after`.
    pub async fn deliveries(
        &self,
        cdn: &str,
        after: Option<KeyId>,
        limit: u32,
    ) -> Result<Vec<DeliveryRow>, StoreError> {
        bounded(async {
            let sql = "SELECT * FROM deliveries WHERE cdn = $1 AND key_id > $2 ORDER BY key_id LIMIT $3";
            let after = after.map(|key| key.to_string()).unwrap_or_default();
            let query = sqlx::query(sql).bind(cdn).bind(after).bind(i64::from(limit));
            query.fetch_all(&self.pool).await?.iter().map(DeliveryRow::read).collect()
        })
        .await
    }

    /// What all CDNs have of a key.
    pub async fn deliveries_of(&self, key: KeyId) -> Result<Vec<DeliveryRow>, StoreError> {
        bounded(async {
            let sql = "SELECT * FROM deliveries WHERE key_id = $1 ORDER BY cdn";
            let rows = sqlx::query(sql).bind(key.to_string()).fetch_all(&self.pool).await?;
            rows.iter().map(DeliveryRow::read).collect()
        })
        .await
    }

    /// How many keys each CDN has in each state.
    pub async fn count_deliveries(&self) -> Result<Vec<(String, DeliveryState, u64)>, StoreError> {
        bounded(async {
            let sql = "SELECT cdn, state, count(*) AS keys FROM deliveries GROUP BY cdn, state";
            let read = |row: &AnyRow| {
                let state = named(row, "state", DeliveryState::from_name)?;
                Ok((row.try_get("cdn")?, state, unsigned(row, "keys")?))
            };
            sqlx::query(sql).fetch_all(&self.pool).await?.iter().map(read).collect()
        })
        .await
    }

    /// Notes what CDNs have; a row takes the place of an earlier one.
    pub async fn put_deliveries(&self, deliveries: &[DeliveryRow]) -> Result<(), StoreError> {
        if deliveries.is_empty() {
            return Ok(());
        }
        let list: Vec<_> = deliveries
            .iter()
            .map(|row| {
                json!({
                    "cdn": row.cdn, "key": row.key.to_string(), "stream": row.stream.as_str(),
                    "n": row.ordinal.0, "state": row.state.name(), "error": row.last_error,
                    "at": row.updated_at.as_unix_millis(),
                })
            })
            .collect();
        let from = self.dialect.rows(&[
            ("cdn", "text"),
            ("key", "text"),
            ("stream", "text"),
            ("n", "bigint"),
            ("state", "text"),
            ("error", "text"),
            ("at", "bigint"),
        ]);
        let sql = format!(
            "INSERT INTO deliveries (cdn, key_id, stream_id, ordinal, state, last_error, updated_at)
             SELECT r.cdn, r.key, r.stream, r.n, r.state, r.error, r.at FROM {from} WHERE TRUE
             ON CONFLICT (cdn, key_id) DO UPDATE SET state = excluded.state, last_error = excluded.last_error,
                                                     updated_at = excluded.updated_at"
        );
        let list = rows::json(&list);
        repeated(|| async {
            fault::point("deliveries: before");
            sqlx::query(AssertSqlSafe(sql.as_str())).bind(&list).execute(&self.pool).await?;
            fault::point("deliveries: noted");
            Ok(())
        })
        .await
    }

    /// Forgets what a CDN had of keys: they are out of its store.
    pub async fn drop_deliveries(&self, cdn: &str, keys: &[KeyId]) -> Result<(), StoreError> {
        if keys.is_empty() {
            return Ok(());
        }
        let keys = rows::json(&keys.iter().map(KeyId::to_string).collect::<Vec<_>>());
        let sql = super::dialect::both!(
            self.dialect,
            "DELETE FROM deliveries WHERE key_id IN (" ids ") AND cdn = $2"
        );
        repeated(|| async {
            fault::point("drop deliveries: before");
            sqlx::query(sql).bind(&keys).bind(cdn).execute(&self.pool).await?;
            fault::point("drop deliveries: dropped");
            Ok(())
        })
        .await
    }

    /// Takes all keys of a CDN for still to be sent, if they were sealed under another secret than this one; whether they
    /// were. Their rows stay: what is not wanted any more is to be taken out, under whatever secret it lies there.
    pub async fn seal_under(&self, cdn: &str, fingerprint: &str, now: Timestamp) -> Result<bool, StoreError> {
        repeated(|| async {
            let mut tx = self.begin().await?;
            let sql = "INSERT INTO cdns (name, failures, sealed_under, updated_at) VALUES ($1, 0, $2, $3)
                       ON CONFLICT (name) DO UPDATE SET sealed_under = excluded.sealed_under
                       WHERE cdns.sealed_under IS NULL OR cdns.sealed_under <> excluded.sealed_under";
            let query = sqlx::query(sql).bind(cdn).bind(fingerprint).bind(now.as_unix_millis());
            let is_new = query.execute(&mut *tx).await?.rows_affected() > 0;
            if is_new {
                let sql = "UPDATE deliveries SET state = 'sending' WHERE cdn = $1";
                sqlx::query(sql).bind(cdn).execute(&mut *tx).await?;
            }
            commit(tx, "seal under: before the commit", "seal under: noted").await?;
            Ok(is_new)
        })
        .await
    }

    /// Notes how a CDN is.
    pub async fn put_cdn_state(&self, state: &CdnStateRow) -> Result<(), StoreError> {
        repeated(|| async {
            let sql = "INSERT INTO cdns (name, failing_since, failures, last_error, updated_at)
                       VALUES ($1, $2, $3, $4, $5)
                       ON CONFLICT (name) DO UPDATE SET failing_since = excluded.failing_since,
                           failures = excluded.failures, last_error = excluded.last_error,
                           updated_at = excluded.updated_at";
            let query = sqlx::query(sql)
                .bind(&state.name)
                .bind(state.failing_since.map(Timestamp::as_unix_millis))
                .bind(i64::from(state.failures))
                .bind(&state.last_error)
                .bind(state.updated_at.as_unix_millis());
            query.execute(&self.pool).await?;
            Ok(())
        })
        .await
    }

    /// How all CDNs are that were ever delivered to.
    pub async fn cdn_states(&self) -> Result<Vec<CdnStateRow>, StoreError> {
        bounded(async {
            let read = |row: &AnyRow| {
                Ok(CdnStateRow {
                    name: row.try_get("name")?,
                    failing_since: optional_time(row, "failing_since")?,
                    failures: unsigned(row, "failures")?,
                    last_error: row.try_get("last_error")?,
                    updated_at: time(row, "updated_at")?,
                })
            };
            sqlx::query("SELECT * FROM cdns ORDER BY name")
                .fetch_all(&self.pool)
                .await?
                .iter()
                .map(read)
                .collect()
        })
        .await
    }
}
