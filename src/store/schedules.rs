//! Boundaries, and what nodes tell one another of the playlists that they served.

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Row};

use super::StoreError;
use super::dialect::both;
use super::open::{Store, Tx, bounded, commit, repeated};
use super::rows::{BoundaryRow, RenditionRow, json};
use crate::fault;
use crate::keys::{MediaSequenceNumber, Ordinal, Reason, StreamId, Timestamp};

/// What a node served of late.
#[derive(Debug, Clone, Default)]
pub struct Served {
    pub renditions: Vec<(StreamId, RenditionRow)>,
    /// Retired keys that playlists named, and when last.
    pub keys: Vec<(StreamId, Ordinal, Timestamp)>,
}

/// MSNs go into signed columns; the few beyond cannot come from a real packager.
fn signed(msn: MediaSequenceNumber) -> i64 {
    i64::try_from(msn.0).unwrap_or(i64::MAX)
}

fn millis(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// A rendition, as it goes through JSON.
fn rendition_row(stream: &StreamId, row: &RenditionRow) -> Value {
    json!({
        "stream": stream.as_str(),
        "rendition": row.rendition,
        "ended": i64::from(row.ended),
        "keeps_all": i64::from(row.keeps_all),
        "target_millis": millis(row.target_duration),
        "longest_millis": millis(row.longest_playlist),
        "epoch": row.epoch,
        "edge_first": signed(row.edge.first),
        "edge_end": signed(row.edge.end),
        "served_at": row.last_served_at.as_unix_millis(),
    })
}

impl Store {
    /// Adds boundaries behind those that a rendition has, and what a restart must know of it. Their numbers go on
    /// from the first row's. `None` when another got there first, or the rows before are not there any more: then
    /// nothing is added, and the caller reads what is there. Otherwise the stream's new revision.
    pub async fn add_boundaries(
        &self,
        stream: &StreamId,
        rows: &[(BoundaryRow, Reason)],
        about: &RenditionRow,
        now: Timestamp,
    ) -> Result<Option<i64>, StoreError> {
        repeated(|| async {
            let Some((first, _)) = rows.first() else { return Ok(None) };
            let (mut tx, rev) = self.begin_change(stream).await?;
            if !goes_on(&mut tx, stream, first).await? {
                tx.rollback().await?;
                return Ok(None);
            }
            fault::point("add boundaries: before the rendition");
            self.put_renditions(&mut tx, &[rendition_row(stream, about)]).await?;
            for (row, reason) in rows {
                fault::point("add a boundary: before");
                let added = sqlx::query(
                    "INSERT INTO boundaries (stream_id, rendition, seq, epoch, ordinal, first_msn, segments,
                                             reason, edge_first, edge_end, created_at)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ON CONFLICT DO NOTHING",
                )
                .bind(stream.as_str())
                .bind(&row.rendition)
                .bind(i64::try_from(row.seq).unwrap_or(i64::MAX))
                .bind(i64::from(row.boundary.epoch))
                .bind(i64::from(row.boundary.ordinal.0))
                .bind(signed(row.boundary.first))
                .bind(i64::from(row.boundary.segments))
                .bind(reason.name())
                .bind(signed(row.edge.first))
                .bind(signed(row.edge.end))
                .bind(now.as_unix_millis())
                .execute(&mut *tx)
                .await?;
                if added.rows_affected() == 0 {
                    tx.rollback().await?;
                    return Ok(None);
                }
            }
            commit(tx, "add boundaries: before the commit", "add boundaries: committed").await?;
            Ok(Some(rev))
        })
        .await
    }

    /// Tells the other nodes what was served. No stream counts as changed by it: only who sweeps reads it.
    pub async fn report(&self, served: &Served) -> Result<(), StoreError> {
        if served.renditions.is_empty() && served.keys.is_empty() {
            return Ok(());
        }
        repeated(|| async {
            let mut tx = self.begin().await?;
            if !served.renditions.is_empty() {
                let row = |(id, row): &(StreamId, RenditionRow)| rendition_row(id, row);
                let rows: Vec<_> = served.renditions.iter().map(row).collect();
                fault::point("report: before the renditions");
                self.put_renditions(&mut tx, &rows).await?;
            }
            if !served.keys.is_empty() {
                let row = |(id, ordinal, at): &(StreamId, Ordinal, Timestamp)| {
                    json!({ "stream": id.as_str(), "n": ordinal.0, "at": at.as_unix_millis() })
                };
                let rows: Vec<_> = served.keys.iter().map(row).collect();
                // Whoever tells of several locks them in this order.
                if let Some(lock) = self.dialect.lock_keys() {
                    sqlx::query(AssertSqlSafe(lock)).bind(json(&rows)).execute(&mut *tx).await?;
                }
                fault::point("report: before the keys");
                let sql = format!(
                    "UPDATE content_keys AS k SET last_named_at = r.at FROM {}
                     WHERE k.stream_id = r.stream AND k.ordinal = r.n AND k.state <> 'destroyed'
                       AND (k.last_named_at IS NULL OR k.last_named_at < r.at)",
                    self.dialect.rows(&[("stream", "text"), ("n", "bigint"), ("at", "bigint")]),
                );
                sqlx::query(AssertSqlSafe(sql)).bind(json(&rows)).execute(&mut *tx).await?;
            }
            commit(tx, "report: before the commit", "report: committed").await
        })
        .await
    }

    /// What nodes reported since `since_db`, and the time to ask from next.
    pub async fn reports_since(&self, since_db: i64) -> Result<(Served, i64), StoreError> {
        bounded(async {
            let now = self.now_db().await?;
            let sql = "SELECT * FROM renditions WHERE reported_at_db >= $1";
            let rows = sqlx::query(sql).bind(since_db).fetch_all(&self.pool).await?;
            let mut served = Served::default();
            for row in &rows {
                served.renditions.push((super::rows::parsed(row, "stream_id")?, RenditionRow::read(row)?));
            }
            let sql = "SELECT stream_id, ordinal, last_named_at FROM content_keys
                       WHERE state IN ('deactivated', 'compromised') AND last_named_at IS NOT NULL";
            for row in &sqlx::query(sql).fetch_all(&self.pool).await? {
                let at: i64 = row.try_get("last_named_at")?;
                served.keys.push((
                    super::rows::parsed(row, "stream_id")?,
                    Ordinal(super::rows::unsigned(row, "ordinal")?),
                    Timestamp::from_unix_millis(at),
                ));
            }
            // A report that is being committed now bears an earlier time.
            Ok((served, now - super::fleet::COMMIT_SLACK_MILLIS))
        })
        .await
    }

    /// Forgets sliding renditions that nobody asked for since `unless_served_after`.
    pub async fn forget_renditions(&self, unless_served_after: Timestamp) -> Result<u64, StoreError> {
        repeated(|| async {
            let mut tx = self.begin().await?;
            let at = unless_served_after.as_unix_millis();
            let sql = "DELETE FROM boundaries WHERE EXISTS (
                           SELECT 1 FROM renditions r WHERE r.stream_id = boundaries.stream_id
                              AND r.rendition = boundaries.rendition AND r.keeps_all = 0
                              AND r.last_served_at < $1)";
            fault::point("forget: before the boundaries");
            sqlx::query(sql).bind(at).execute(&mut *tx).await?;
            fault::point("forget: before the renditions");
            let sql = "DELETE FROM renditions WHERE keeps_all = 0 AND last_served_at < $1";
            let forgotten = sqlx::query(sql).bind(at).execute(&mut *tx).await?.rows_affected();
            commit(tx, "forget: before the commit", "forget: committed").await?;
            Ok(forgotten)
        })
        .await
    }

    /// Takes renditions in. The longest length and the newest window and time stay, whatever the order in which
    /// nodes report. Streams that are gone are left out. All nodes take them in one order, so that none waits for
    /// another in a circle.
    async fn put_renditions(&self, tx: &mut Tx, renditions: &[Value]) -> Result<(), StoreError> {
        let newer = "(excluded.epoch, excluded.edge_end) >= (renditions.epoch, renditions.edge_end)";
        let of_newer =
            |column| format!("CASE WHEN {newer} THEN excluded.{column} ELSE renditions.{column} END");
        let greatest = |column| {
            format!(
                "CASE WHEN excluded.{column} > renditions.{column} THEN excluded.{column} ELSE renditions.{column} END"
            )
        };
        let sql = format!(
            "INSERT INTO renditions (stream_id, rendition, ended, keeps_all, target_millis, longest_millis,
                                     epoch, edge_first, edge_end, last_served_at, reported_at_db)
             SELECT r.stream, r.rendition, r.ended, r.keeps_all, r.target_millis, r.longest_millis, r.epoch,
                    r.edge_first, r.edge_end, r.served_at, {now} FROM {rows}
             WHERE EXISTS (SELECT 1 FROM streams s WHERE s.id = r.stream AND s.state <> 'deleted')
             ORDER BY r.stream, r.rendition
             ON CONFLICT (stream_id, rendition) DO UPDATE SET
                ended = {ended}, keeps_all = {keeps_all}, edge_first = {edge_first}, edge_end = {edge_end},
                epoch = {epoch}, target_millis = excluded.target_millis, longest_millis = {longest_millis},
                last_served_at = {last_served_at}, reported_at_db = excluded.reported_at_db",
            now = both!(self.dialect, now),
            rows = self.dialect.rows(&[
                ("stream", "text"),
                ("rendition", "text"),
                ("ended", "bigint"),
                ("keeps_all", "bigint"),
                ("target_millis", "bigint"),
                ("longest_millis", "bigint"),
                ("epoch", "bigint"),
                ("edge_first", "bigint"),
                ("edge_end", "bigint"),
                ("served_at", "bigint"),
            ]),
            ended = of_newer("ended"),
            keeps_all = of_newer("keeps_all"),
            edge_first = of_newer("edge_first"),
            edge_end = of_newer("edge_end"),
            epoch = greatest("epoch"),
            longest_millis = greatest("longest_millis"),
            last_served_at = greatest("last_served_at"),
        );
        sqlx::query(AssertSqlSafe(sql)).bind(json(&renditions)).execute(&mut **tx).await?;
        Ok(())
    }
}

/// Whether the rows before `first` are the ones that its planner knew.
async fn goes_on(tx: &mut Tx, stream: &StreamId, first: &BoundaryRow) -> Result<bool, StoreError> {
    let sql = "SELECT COALESCE(max(seq), -1) AS seq FROM boundaries WHERE stream_id = $1 AND rendition = $2";
    let row = sqlx::query(sql).bind(stream.as_str()).bind(&first.rendition).fetch_one(&mut **tx).await?;
    let last: i64 = row.try_get("seq")?;
    Ok(i64::try_from(first.seq).is_ok_and(|seq| seq == last + 1))
}
