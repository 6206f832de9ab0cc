//! The embedded store: one SQLite file in WAL mode.
//!
//! `synchronous = FULL`, because a boundary or a key that a playlist has shown must survive the loss of power,
//! not only of the process.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Sqlite, Transaction};

use super::StoreError;
use super::rows::{BoundaryRow, DekRow, KeyRow, RenditionRow, StoredStream};
use crate::keys::{KeyId, KeyState, MediaSequenceNumber, Ordinal, Reason, StreamId, Timestamp};

/// `content_keys.activated_for` of a key that every rendition must go over to.
pub(super) const FORCED: &str = "promotion";

/// MSNs go into signed columns; the few beyond cannot come from a real packager.
fn signed(msn: MediaSequenceNumber) -> i64 {
    i64::try_from(msn.0).unwrap_or(i64::MAX)
}

/// A handle on the database; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
}

impl Store {
    /// Opens the file, making it if it is not there, and brings it to this version's schema.
    ///
    /// # Errors
    /// [`StoreError::Open`] when the file cannot be opened, [`StoreError::Migrate`] when its schema is newer
    /// than this version or was changed by hand.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            // What is deleted or overwritten is overwritten on disk too: a destroyed key leaves no copy.
            .pragma("secure_delete", "ON")
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(options)
            .await
            .map_err(|source| StoreError::Open { path: path.display().to_string(), source })?;
        sqlx::migrate!("src/store/migrations").run(&pool).await?;
        Ok(Self { pool })
    }

    /// Registers a stream, if it is not.
    pub async fn ensure_stream(&self, stream: &StreamId, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query("INSERT INTO streams (id, created_at) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(stream.as_str())
            .bind(now.as_unix_millis())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// All that is kept of a stream, as of one moment.
    pub async fn load(&self, stream: &StreamId) -> Result<StoredStream, StoreError> {
        let mut tx = self.pool.begin().await?;
        let mut read =
            async |sql: &'static str| sqlx::query(sql).bind(stream.as_str()).fetch_all(&mut *tx).await;
        let deks = read("SELECT * FROM deks WHERE stream_id = ? ORDER BY version").await?;
        let keys = read("SELECT * FROM content_keys WHERE stream_id = ? ORDER BY ordinal").await?;
        let boundaries = read("SELECT * FROM boundaries WHERE stream_id = ? ORDER BY rendition, seq").await?;
        let renditions = read("SELECT * FROM renditions WHERE stream_id = ?").await?;
        tx.commit().await?;
        Ok(StoredStream {
            renditions: renditions.iter().map(RenditionRow::read).collect::<Result<_, _>>()?,
            deks: deks.iter().map(DekRow::read).collect::<Result<_, _>>()?,
            keys: keys.iter().map(KeyRow::read).collect::<Result<_, _>>()?,
            boundaries: boundaries.iter().map(BoundaryRow::read).collect::<Result<_, _>>()?,
        })
    }

    /// Stores a DEK, unless its version is taken; returns the one that is there.
    pub async fn put_dek(&self, stream: &StreamId, dek: &DekRow) -> Result<DekRow, StoreError> {
        let mut tx = self.pool.begin().await?;
        sqlx::query(
            "INSERT INTO deks (id, stream_id, version, kek_id, wrapped, created_at)
             VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(dek.id.to_string())
        .bind(stream.as_str())
        .bind(dek.version.0)
        .bind(&dek.kek_id)
        .bind(&dek.wrapped)
        .bind(dek.created_at.as_unix_millis())
        .execute(&mut *tx)
        .await?;
        let row = sqlx::query("SELECT * FROM deks WHERE stream_id = ? AND version = ?")
            .bind(stream.as_str())
            .bind(dek.version.0)
            .fetch_one(&mut *tx)
            .await?;
        tx.commit().await?;
        DekRow::read(&row)
    }

    /// Stores content keys, each unless its ordinal is taken; returns the ones that are there.
    pub async fn put_keys(&self, stream: &StreamId, keys: &[KeyRow]) -> Result<Vec<KeyRow>, StoreError> {
        let mut tx = self.pool.begin().await?;
        let mut stored = Vec::with_capacity(keys.len());
        for key in keys {
            sqlx::query(
                "INSERT INTO content_keys (id, stream_id, ordinal, dek_id, method, iv_mode, wrapped, state,
                                           created_at)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            )
            .bind(key.id.to_string())
            .bind(stream.as_str())
            .bind(key.ordinal.0)
            .bind(key.dek.to_string())
            .bind(key.method.name())
            .bind(key.iv_mode.name())
            .bind(&key.wrapped)
            .bind(KeyState::PreActive.name())
            .bind(key.created_at.as_unix_millis())
            .execute(&mut *tx)
            .await?;
            let row = sqlx::query("SELECT * FROM content_keys WHERE stream_id = ? AND ordinal = ?")
                .bind(stream.as_str())
                .bind(key.ordinal.0)
                .fetch_one(&mut *tx)
                .await?;
            stored.push(KeyRow::read(&row)?);
        }
        tx.commit().await?;
        Ok(stored)
    }

    /// Makes a key active that waits for it. `forced` says that every rendition must go over to it.
    pub async fn promote(
        &self,
        stream: &StreamId,
        ordinal: Ordinal,
        now: Timestamp,
        forced: bool,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE content_keys SET state = 'active', activated_at = ?, activated_for = ?
             WHERE stream_id = ? AND ordinal <= ? AND state = 'pre-active'",
        )
        .bind(now.as_unix_millis())
        .bind(if forced { FORCED } else { Reason::Count.name() })
        .bind(stream.as_str())
        .bind(ordinal.0)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Says that every rendition must go over to an active key.
    pub async fn force(&self, stream: &StreamId, ordinal: Ordinal) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE content_keys SET activated_for = ? WHERE stream_id = ? AND ordinal = ? AND state = 'active'",
        )
        .bind(FORCED)
        .bind(stream.as_str())
        .bind(ordinal.0)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Stores what a restart must know of renditions.
    pub async fn put_renditions(&self, stream: &StreamId, rows: &[RenditionRow]) -> Result<(), StoreError> {
        let mut tx = self.pool.begin().await?;
        for row in rows {
            put_rendition(&mut tx, stream, row).await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// Makes an active key deactivated.
    pub async fn deactivate(
        &self,
        stream: &StreamId,
        ordinal: Ordinal,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE content_keys SET state = 'deactivated', deactivated_at = ?
             WHERE stream_id = ? AND ordinal = ? AND state = 'active'",
        )
        .bind(now.as_unix_millis())
        .bind(stream.as_str())
        .bind(ordinal.0)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Wipes a key's wrapped bytes for good.
    pub async fn destroy(&self, key: KeyId, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE content_keys SET state = 'destroyed', destroyed_at = ?, wrapped = x''
             WHERE id = ? AND state <> 'destroyed'",
        )
        .bind(now.as_unix_millis())
        .bind(key.to_string())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Adds boundaries behind the `have` that a rendition has, and what a restart must know of it. `false` when another got there first: then
    /// nothing is added, and the caller reads what is there.
    pub async fn add_boundaries(
        &self,
        stream: &StreamId,
        have: usize,
        rows: &[(BoundaryRow, Reason)],
        about: &RenditionRow,
        now: Timestamp,
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        put_rendition(&mut tx, stream, about).await?;
        for (seq, (row, reason)) in (have..).zip(rows) {
            let added = sqlx::query(
                "INSERT INTO boundaries (stream_id, rendition, seq, epoch, ordinal, first_msn, reason,
                                         edge_first, edge_end, created_at)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            )
            .bind(stream.as_str())
            .bind(&row.rendition)
            .bind(i64::try_from(seq).unwrap_or(i64::MAX))
            .bind(row.boundary.epoch)
            .bind(row.boundary.ordinal.0)
            .bind(signed(row.boundary.first))
            .bind(reason.name())
            .bind(signed(row.edge.first))
            .bind(signed(row.edge.end))
            .bind(now.as_unix_millis())
            .execute(&mut *tx)
            .await?;
            if added.rows_affected() == 0 {
                tx.rollback().await?;
                return Ok(false);
            }
        }
        tx.commit().await?;
        Ok(true)
    }

    /// Waits until every connection is closed and the write-ahead log is in the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// The longest length that was ever stored stays.
async fn put_rendition(
    tx: &mut Transaction<'_, Sqlite>,
    stream: &StreamId,
    row: &RenditionRow,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO renditions (stream_id, rendition, ended, keeps_all, longest_playlist_millis)
         VALUES (?, ?, ?, ?, ?)
         ON CONFLICT (stream_id, rendition) DO UPDATE SET ended = excluded.ended,
            keeps_all = excluded.keeps_all,
            longest_playlist_millis = max(renditions.longest_playlist_millis, excluded.longest_playlist_millis)",
    )
    .bind(stream.as_str())
    .bind(&row.rendition)
    .bind(row.ended)
    .bind(row.keeps_all)
    .bind(i64::try_from(row.longest_playlist.as_millis()).unwrap_or(i64::MAX))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{Boundary, DekId, DekVersion, Edge, IvMode, KeyMethod};

    const NOW: Timestamp = Timestamp::from_unix_millis(1_700_000_000_000);

    async fn store() -> (Store, StreamId, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("test.db")).await.unwrap();
        let stream: StreamId = "ch1".parse().unwrap();
        store.ensure_stream(&stream, NOW).await.unwrap();
        store.ensure_stream(&stream, NOW).await.unwrap();
        store.put_dek(&stream, &dek(1)).await.unwrap();
        (store, stream, dir)
    }

    fn dek(n: u8) -> DekRow {
        DekRow {
            id: DekId::from_bytes([n; 16]),
            version: DekVersion(1),
            kek_id: "local:a".into(),
            wrapped: vec![n; 60],
            created_at: NOW,
        }
    }

    fn key(n: u8, ordinal: u32) -> KeyRow {
        KeyRow {
            id: KeyId::from_bytes([n; 16]),
            ordinal: Ordinal(ordinal),
            dek: DekId::from_bytes([1; 16]),
            method: KeyMethod::Aes128,
            iv_mode: IvMode::Segment,
            wrapped: vec![n; 76],
            state: KeyState::PreActive,
            created_at: NOW,
            activated_at: None,
            forced: false,
            deactivated_at: None,
        }
    }

    fn boundary(ordinal: u32, first: u64) -> (BoundaryRow, Reason) {
        let msn = MediaSequenceNumber;
        let row = BoundaryRow {
            rendition: "/live/720p.m3u8".into(),
            boundary: Boundary { epoch: 0, ordinal: Ordinal(ordinal), first: msn(first) },
            edge: Edge { first: msn(first), end: msn(first + 8) },
        };
        (row, Reason::Count)
    }

    #[tokio::test]
    async fn who_comes_second_gets_what_the_first_stored() {
        let (store, stream, _dir) = store().await;
        assert_eq!(store.put_dek(&stream, &dek(2)).await.unwrap(), dek(1));
        assert_eq!(store.put_keys(&stream, &[key(5, 0)]).await.unwrap(), [key(5, 0)]);
        let both = store.put_keys(&stream, &[key(6, 0), key(7, 1)]).await.unwrap();
        assert_eq!(both, [key(5, 0), key(7, 1)]);
    }

    #[tokio::test]
    async fn a_boundary_is_added_behind_the_known_ones_or_not_at_all() {
        let (store, stream, _dir) = store().await;
        let about = RenditionRow {
            rendition: "/live/720p.m3u8".into(),
            ended: false,
            keeps_all: false,
            longest_playlist: Duration::ZERO,
        };
        let two = [boundary(0, 100), boundary(1, 200)];
        assert!(store.add_boundaries(&stream, 0, &two, &about, NOW).await.unwrap());
        // Another node that knows only the first one plans otherwise, and loses as a whole.
        let late = [boundary(3, 150), boundary(4, 250)];
        assert!(!store.add_boundaries(&stream, 1, &late, &about, NOW).await.unwrap());
        let loaded = store.load(&stream).await.unwrap();
        assert_eq!(loaded.boundaries, two.map(|(row, _)| row));
    }

    #[tokio::test]
    async fn a_key_goes_through_its_states_once() {
        let (store, stream, _dir) = store().await;
        store.put_keys(&stream, &[key(5, 0)]).await.unwrap();
        let later = NOW.plus(Duration::from_secs(9));
        let stored = || async { store.load(&stream).await.unwrap().keys.remove(0) };

        store.deactivate(&stream, Ordinal(0), NOW).await.unwrap();
        assert_eq!(stored().await.state, KeyState::PreActive, "it was not active");
        store.promote(&stream, Ordinal(0), NOW, true).await.unwrap();
        store.promote(&stream, Ordinal(0), later, false).await.unwrap();
        let active = stored().await;
        assert_eq!((active.state, active.activated_at, active.forced), (KeyState::Active, Some(NOW), true));
        store.deactivate(&stream, Ordinal(0), later).await.unwrap();
        assert_eq!(stored().await.deactivated_at, Some(later));
        store.destroy(active.id, later).await.unwrap();
        let destroyed = stored().await;
        assert_eq!((destroyed.state, destroyed.wrapped.len()), (KeyState::Destroyed, 0));
    }

    #[tokio::test]
    async fn what_was_stored_is_there_after_opening_again() {
        let (store, stream, dir) = store().await;
        store.put_keys(&stream, &[key(5, 0)]).await.unwrap();
        let mut rendition = RenditionRow {
            rendition: "/live/720p.m3u8".into(),
            ended: false,
            keeps_all: true,
            longest_playlist: Duration::from_secs(48),
        };
        store.put_renditions(&stream, std::slice::from_ref(&rendition)).await.unwrap();
        rendition.ended = true;
        store.put_renditions(&stream, std::slice::from_ref(&rendition)).await.unwrap();
        assert_eq!(store.load(&stream).await.unwrap().renditions, [rendition]);
        let before = store.load(&stream).await.unwrap();
        store.close().await;
        let again = Store::open(&dir.path().join("test.db")).await.unwrap();
        assert_eq!(again.load(&stream).await.unwrap(), before);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_opened_names_its_path() {
        let error = Store::open(Path::new("/nonexistent/dir/test.db")).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/dir/test.db"), "{error}");
    }
}
