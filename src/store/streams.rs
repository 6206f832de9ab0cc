//! Streams: begun, changed, ended, and read as a whole.

use std::collections::HashSet;

use serde_json::json;
use sqlx::{AssertSqlSafe, Row};

use super::StoreError;
use super::dialect::both;
use super::open::{Store, Tx, bounded, commit, repeated};
use super::rows::{
    BoundaryRow, DekRow, KeyRow, RenditionRow, StoredStream, StreamRow, StreamState, json, policy_to_json,
    unreadable,
};
use crate::fault;
use crate::keys::{Ordinal, StreamId, Timestamp};

/// What [`Store::register`] found or made.
#[derive(Debug, Clone, PartialEq)]
pub enum Registered {
    Created(StreamRow),
    /// A stream of this ID is there.
    Exists(StreamRow),
    /// Another stream owns the prefix.
    PrefixTaken(StreamId),
}

/// What an erasure removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    pub deks: u64,
    pub keys: u64,
    pub renditions: u64,
}

impl Store {
    /// Makes a stream, unless its ID or its prefix is taken. A deleted one begins anew.
    pub async fn register(&self, stream: &StreamRow) -> Result<Registered, StoreError> {
        bounded(async {
            fault::point("register: before");
            let mut tx = self.begin().await?;
            let sql = both!(
                self.dialect,
                "INSERT INTO streams (id, playlist_url, playlist_path, origin, prefix, cdn, policy, state,
                                      created_at, updated_at, rev, changed_at_db, incarnation, request)
                 SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $9, 1, " now ", 1, $10
                 WHERE NOT EXISTS (SELECT 1 FROM streams WHERE origin = $4 AND prefix = $5 AND id <> $1
                                                           AND state <> 'deleted')
                 ON CONFLICT (id) DO UPDATE SET playlist_url = excluded.playlist_url,
                    playlist_path = excluded.playlist_path, origin = excluded.origin,
                    prefix = excluded.prefix, cdn = excluded.cdn, policy = excluded.policy,
                    request = excluded.request,
                    state = excluded.state, created_at = excluded.created_at,
                    updated_at = excluded.updated_at, rev = streams.rev + 1,
                    changed_at_db = excluded.changed_at_db, incarnation = streams.incarnation + 1
                 WHERE streams.state = 'deleted'"
            );
            let made = sqlx::query(sql)
                .bind(stream.id.as_str())
                .bind(&stream.playlist_url)
                .bind(&stream.playlist_path)
                .bind(&stream.origin)
                .bind(&stream.prefix)
                .bind(json(&stream.cdn))
                .bind(policy_to_json(&stream.policy))
                .bind(stream.state.name())
                .bind(stream.created_at.as_unix_millis())
                .bind(request_to_json(stream))
                .execute(&mut *tx)
                .await;
            let made = match made {
                Ok(made) => made.rows_affected() > 0,
                // Another node took the prefix between our look and our insert.
                Err(sqlx::Error::Database(error)) if error.is_unique_violation() => {
                    tx.rollback().await?;
                    tx = self.begin().await?;
                    false
                }
                Err(error) => return Err(error.into()),
            };
            let there = read_stream(&mut tx, &stream.id).await?;
            let registered = match there {
                Some(row) if made => Registered::Created(row),
                Some(row) if row.state != StreamState::Deleted => Registered::Exists(row),
                _ => {
                    let sql =
                        "SELECT id FROM streams WHERE origin = $1 AND prefix = $2 AND state <> 'deleted'";
                    let query = sqlx::query(sql).bind(&stream.origin).bind(&stream.prefix);
                    let row = query.fetch_one(&mut *tx).await?;
                    Registered::PrefixTaken(super::rows::parsed(&row, "id")?)
                }
            };
            self.tell(&mut tx).await?;
            commit(tx, "register: before the commit", "register: committed").await?;
            Ok(registered)
        })
        .await
    }

    /// Makes those of the streams whose IDs and prefixes nobody has, nor had, and says which those are.
    pub async fn register_new(&self, streams: &[StreamRow]) -> Result<HashSet<StreamId>, StoreError> {
        let row = |stream: &StreamRow| {
            json!({
                "id": stream.id.as_str(),
                "playlist_url": stream.playlist_url,
                "playlist_path": stream.playlist_path,
                "origin": stream.origin,
                "prefix": stream.prefix,
                "cdn": json(&stream.cdn),
                "policy": policy_to_json(&stream.policy),
                "request": request_to_json(stream),
                "state": stream.state.name(),
                "at": stream.created_at.as_unix_millis(),
            })
        };
        let list = json(&streams.iter().map(row).collect::<Vec<_>>());
        repeated(|| async {
            let mut tx = self.begin().await?;
            let sql = format!(
                "INSERT INTO streams (id, playlist_url, playlist_path, origin, prefix, cdn, policy, request, state,
                                      created_at, updated_at, rev, changed_at_db, incarnation)
                 SELECT r.id, r.playlist_url, r.playlist_path, r.origin, r.prefix, r.cdn, r.policy, r.request,
                        r.state, r.at, r.at, 1, {now}, 1
                 FROM {rows} WHERE TRUE ORDER BY r.id ON CONFLICT DO NOTHING RETURNING id",
                now = both!(self.dialect, now),
                rows = self.dialect.rows(&[
                    ("id", "text"),
                    ("playlist_url", "text"),
                    ("playlist_path", "text"),
                    ("origin", "text"),
                    ("prefix", "text"),
                    ("cdn", "text"),
                    ("policy", "text"),
                    ("request", "text"),
                    ("state", "text"),
                    ("at", "bigint"),
                ]),
            );
            let rows = sqlx::query(AssertSqlSafe(sql)).bind(&list).fetch_all(&mut *tx).await?;
            self.tell(&mut tx).await?;
            commit(tx, "register many: before the commit", "register many: committed").await?;
            rows.iter().map(|row| super::rows::parsed(row, "id")).collect()
        })
        .await
    }

    /// Stores what `change` makes of a stream, which nobody else changes meanwhile; its origin and prefix stay.
    /// `None` when `change` does.
    ///
    /// # Errors
    /// [`StoreError::NoStream`] when it is gone.
    pub async fn update_stream(
        &self,
        id: &StreamId,
        now: Timestamp,
        change: impl FnOnce(StreamRow) -> Option<StreamRow>,
    ) -> Result<Option<StreamRow>, StoreError> {
        bounded(async {
            let (mut tx, _) = self.begin_change(id).await?;
            let there = read_stream(&mut tx, id).await?.ok_or(StoreError::NoStream)?;
            let Some(stream) = change(there) else {
                tx.rollback().await?;
                return Ok(None);
            };
            fault::point("update: before");
            sqlx::query(
                "UPDATE streams SET playlist_url = $2, playlist_path = $3, cdn = $4, policy = $5, state = $6,
                                    updated_at = $7, request = $8
                 WHERE id = $1",
            )
            .bind(id.as_str())
            .bind(&stream.playlist_url)
            .bind(&stream.playlist_path)
            .bind(json(&stream.cdn))
            .bind(policy_to_json(&stream.policy))
            .bind(stream.state.name())
            .bind(now.as_unix_millis())
            .bind(request_to_json(&stream))
            .execute(&mut *tx)
            .await?;
            let row = read_stream(&mut tx, id).await?.ok_or(StoreError::NoStream)?;
            commit(tx, "update: before the commit", "update: committed").await?;
            Ok(Some(row))
        })
        .await
    }

    /// Ends a stream: its keys' bytes and its schedule go, the history of its keys stays. `false` when it had
    /// ended before.
    pub async fn delete_stream(&self, id: &StreamId, now: Timestamp) -> Result<bool, StoreError> {
        let deleted = repeated(|| async {
            let mut tx = self.begin().await?;
            if self.touch(&mut tx, id).await?.is_none() {
                return Ok(false);
            }
            let (now, wiped) = (now.as_unix_millis(), Vec::<u8>::new());
            let destroyed = "UPDATE content_keys SET state = 'destroyed', destroyed_at = $2, wrapped = $3
                             WHERE stream_id = $1 AND state <> 'destroyed'";
            fault::point("delete: before the keys");
            sqlx::query(destroyed).bind(id.as_str()).bind(now).bind(&wiped).execute(&mut *tx).await?;
            let shredded = "UPDATE deks SET wrapped = $2 WHERE stream_id = $1";
            fault::point("delete: before the DEKs");
            sqlx::query(shredded).bind(id.as_str()).bind(&wiped).execute(&mut *tx).await?;
            let ended = "UPDATE streams SET state = 'deleted', updated_at = $2, playlist_url = '',
                                            playlist_path = '', prefix = '', origin = '', request = NULL
                         WHERE id = $1";
            fault::point("delete: before the stream");
            sqlx::query(ended).bind(id.as_str()).bind(now).execute(&mut *tx).await?;
            for sql in
                ["DELETE FROM boundaries WHERE stream_id = $1", "DELETE FROM renditions WHERE stream_id = $1"]
            {
                fault::point("delete: before the schedule");
                sqlx::query(sql).bind(id.as_str()).execute(&mut *tx).await?;
            }
            self.tell(&mut tx).await?;
            commit(tx, "delete: before the commit", "delete: committed").await?;
            Ok(true)
        })
        .await;
        if deleted.is_ok() {
            self.empty_the_log().await;
        }
        deleted
    }

    /// Removes every row about a stream but for its ID, which tells other nodes that it is gone. `None` when
    /// there is no such stream, deleted or not.
    pub async fn erase_stream(&self, id: &StreamId, now: Timestamp) -> Result<Option<Removed>, StoreError> {
        let erased = repeated(|| async {
            let mut tx = self.begin().await?;
            let sql = both!(
                self.dialect,
                "UPDATE streams SET rev = rev + 1, changed_at_db = " now ", state = 'deleted', playlist_url = '',
                    playlist_path = '', origin = '', prefix = '', cdn = $3, request = NULL, created_at = $2,
                    updated_at = $2
                 WHERE id = $1"
            );
            fault::point("erase: before the stream");
            let nothing = json(&super::rows::CdnRow::default());
            let query = sqlx::query(sql).bind(id.as_str()).bind(now.as_unix_millis()).bind(nothing);
            if query.execute(&mut *tx).await?.rows_affected() == 0 {
                return Ok(None);
            }
            let mut counts = [0; 6];
            let statements = [
                "DELETE FROM boundaries WHERE stream_id = $1",
                "DELETE FROM renditions WHERE stream_id = $1",
                "DELETE FROM content_keys WHERE stream_id = $1",
                "DELETE FROM deks WHERE stream_id = $1",
                "DELETE FROM incident_cdns WHERE incident_id IN (SELECT id FROM incidents WHERE stream_id = $1)",
                "DELETE FROM incidents WHERE stream_id = $1",
            ];
            for (sql, count) in statements.into_iter().zip(&mut counts) {
                fault::point("erase: before its rows");
                *count = sqlx::query(sql).bind(id.as_str()).execute(&mut *tx).await?.rows_affected();
            }
            self.tell(&mut tx).await?;
            commit(tx, "erase: before the commit", "erase: committed").await?;
            let [_, renditions, keys, deks, ..] = counts;
            Ok(Some(Removed { deks, keys, renditions }))
        })
        .await;
        if erased.is_ok() {
            self.empty_the_log().await;
        }
        erased
    }

    /// The IDs of streams that are not deleted, in their order, at most `limit` behind `after`.
    pub async fn stream_ids(&self, after: &str, limit: u32) -> Result<Vec<StreamId>, StoreError> {
        bounded(async {
            let sql = "SELECT id FROM streams WHERE id > $1 AND state <> 'deleted' ORDER BY id LIMIT $2";
            let rows = sqlx::query(sql).bind(after).bind(i64::from(limit)).fetch_all(&self.pool).await?;
            rows.iter().map(|row| super::rows::parsed(row, "id")).collect()
        })
        .await
    }

    /// All that a node must know of streams, in the order of their IDs; those that are not there are left out,
    /// and of a deleted one there is its row alone.
    ///
    /// Each stream is at least as new as its `rev` says: what changes while this reads is read again later.
    pub async fn load(&self, ids: &[StreamId]) -> Result<Vec<StoredStream>, StoreError> {
        let names: Vec<_> = ids.iter().map(StreamId::as_str).collect();
        let names = json(&names);
        bounded(async {
            let mut tx = self.begin().await?;
            let read = async |tx: &mut Tx, sql| sqlx::query(sql).bind(&names).fetch_all(&mut **tx).await;
            let d = self.dialect;
            // Keys last: a boundary that is read must find the key that it names.
            let streams =
                read(&mut tx, both!(d, "SELECT * FROM streams WHERE id IN (" ids ") ORDER BY id")).await?;
            let boundaries = both!(
                d,
                "SELECT * FROM boundaries WHERE stream_id IN (" ids ") ORDER BY stream_id, rendition, seq"
            );
            let boundaries = read(&mut tx, boundaries).await?;
            let renditions = both!(d, "SELECT * FROM renditions WHERE stream_id IN (" ids ")");
            let renditions = read(&mut tx, renditions).await?;
            // Before the keys: one that is made in between must not look like one that was made and is gone.
            let highest = both!(
                d,
                "SELECT s.id AS stream_id,
                        (SELECT max(k.ordinal) FROM content_keys k WHERE k.stream_id = s.id) AS highest
                 FROM streams s WHERE s.id IN (" ids ")"
            );
            let highest = read(&mut tx, highest).await?;
            let keys = both!(
                d,
                "SELECT * FROM content_keys WHERE stream_id IN (" ids ") AND state <> 'destroyed'
                 ORDER BY stream_id, ordinal"
            );
            let keys = read(&mut tx, keys).await?;
            let deks = both!(
                d,
                "SELECT * FROM deks WHERE stream_id IN (" ids ") AND length(wrapped) > 0
                 ORDER BY stream_id, version"
            );
            let deks = read(&mut tx, deks).await?;
            tx.commit().await?;

            let mut loaded = std::collections::BTreeMap::new();
            for row in &streams {
                let stream = StreamRow::read(row)?;
                let empty = StoredStream {
                    stream: stream.clone(),
                    deks: Vec::new(),
                    keys: Vec::new(),
                    next_ordinal: Ordinal::FIRST,
                    boundaries: Vec::new(),
                    renditions: Vec::new(),
                };
                loaded.insert(stream.id.as_str().to_owned(), empty);
            }
            macro_rules! share_out {
                ($rows:ident, $field:ident, $read:expr) => {
                    for row in &$rows {
                        let id: String = row.try_get("stream_id")?;
                        if let Some(stream) = loaded.get_mut(&id) {
                            stream.$field.push($read(row)?);
                        }
                    }
                };
            }
            share_out!(deks, deks, DekRow::read);
            share_out!(keys, keys, KeyRow::read);
            share_out!(boundaries, boundaries, BoundaryRow::read);
            share_out!(renditions, renditions, RenditionRow::read);
            for row in &highest {
                let id: String = row.try_get("stream_id")?;
                let Some(highest) = row.try_get::<Option<i64>, _>("highest")? else { continue };
                let highest = u32::try_from(highest).map_err(|_| unreadable("ordinal", highest))?;
                if let Some(stream) = loaded.get_mut(&id) {
                    stream.next_ordinal = Ordinal(highest).next();
                }
            }
            Ok(loaded.into_values().collect())
        })
        .await
    }
}

fn request_to_json(stream: &StreamRow) -> Option<String> {
    stream.request.as_ref().map(json)
}

async fn read_stream(tx: &mut Tx, id: &StreamId) -> Result<Option<StreamRow>, StoreError> {
    let row = sqlx::query("SELECT * FROM streams WHERE id = $1")
        .bind(id.as_str())
        .fetch_optional(&mut **tx)
        .await?;
    row.as_ref().map(StreamRow::read).transpose()
}
