//! Keys that were taken back: who, when and why, and how far each CDN is with letting go of them.
//!
//! An incident is stored with the revocation itself (`apply`), so there is none without the other. It is kept until its
//! stream is erased.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::any::AnyRow;

use super::StoreError;
use super::open::{Store, Tx, bounded, commit, repeated};
use super::rows::{json, named, optional_time, parsed, time, unreadable, unsigned};
use crate::fault;
use crate::keys::{IncidentId, KeyId, Ordinal, StreamId, Timestamp};

/// Incidents that are worked on at once.
const MAX_OPEN: i64 = 1_000;

/// A revocation, and what became of it at the CDNs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncidentRow {
    pub id: IncidentId,
    pub stream: StreamId,
    pub reason: String,
    /// Who took the keys back.
    pub actor: String,
    pub revoked_at: Timestamp,
    /// Until then the shield itself answers under the revoked keys, for players that hold an older playlist.
    pub transition_until: Timestamp,
    pub successor: KeyId,
    pub keys: Vec<KeyId>,
    /// Paths at which segments under the keys were served: where to look whether caches have let go of them.
    pub paths: Vec<String>,
    /// When nothing was left to be done at any CDN.
    pub completed_at: Option<Timestamp>,
    pub cdns: Vec<IncidentCdnRow>,
}

/// An incident that is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewIncident {
    pub id: IncidentId,
    pub stream: StreamId,
    pub reason: String,
    pub actor: String,
    pub revoked_at: Timestamp,
    pub transition_until: Timestamp,
    /// It may be made in the same transaction.
    pub successor: Ordinal,
    pub keys: Vec<KeyId>,
    pub paths: Vec<String>,
    /// The CDNs that are to let go; without any, it is complete at once.
    pub cdns: Vec<String>,
}

/// How far a CDN is with letting go of revoked keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurgeState {
    Pending,
    /// It was told to, and is to be looked at.
    Purged,
    /// Its edge gives out neither the keys nor what was encrypted under them.
    Complete,
}

impl PurgeState {
    pub fn name(self) -> &'static str {
        match self {
            PurgeState::Pending => "pending",
            PurgeState::Purged => "purged",
            PurgeState::Complete => "complete",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [PurgeState::Pending, PurgeState::Purged, PurgeState::Complete].into_iter().find(|s| s.name() == name)
    }
}

/// What one CDN has done about an incident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncidentCdnRow {
    pub cdn: String,
    pub state: PurgeState,
    /// How often it was told to purge.
    pub purges: u32,
    /// When it was last told, and agreed.
    pub purged_at: Option<Timestamp>,
    /// Why it is no further.
    pub last_error: Option<String>,
    pub updated_at: Timestamp,
    pub completed_at: Option<Timestamp>,
}

impl IncidentCdnRow {
    fn read(row: &AnyRow) -> Result<Self, StoreError> {
        Ok(Self {
            cdn: row.try_get("cdn")?,
            state: named(row, "state", PurgeState::from_name)?,
            purges: unsigned(row, "purges")?,
            purged_at: optional_time(row, "purged_at")?,
            last_error: row.try_get("last_error")?,
            updated_at: time(row, "updated_at")?,
            completed_at: optional_time(row, "completed_at")?,
        })
    }
}

impl IncidentRow {
    fn read(row: &AnyRow) -> Result<Self, StoreError> {
        let list = |column: &'static str| -> Result<Vec<String>, StoreError> {
            let text: String = row.try_get(column)?;
            serde_json::from_str(&text).map_err(|_| unreadable(column, text))
        };
        let keys = list("key_ids")?.into_iter();
        let keys = keys.map(|key| key.parse().map_err(|_| unreadable("key_ids", key)));
        Ok(Self {
            id: parsed(row, "id")?,
            stream: parsed(row, "stream_id")?,
            reason: row.try_get("reason")?,
            actor: row.try_get("actor")?,
            revoked_at: time(row, "revoked_at")?,
            transition_until: time(row, "transition_until")?,
            successor: parsed(row, "successor_id")?,
            keys: keys.collect::<Result<_, _>>()?,
            paths: list("paths")?,
            completed_at: optional_time(row, "completed_at")?,
            cdns: Vec::new(),
        })
    }
}

impl Store {
    /// Incidents that are not complete at a CDN, the oldest first, a page of them: those of others hold up nobody.
    pub async fn open_incidents_at(&self, cdn: &str) -> Result<Vec<IncidentRow>, StoreError> {
        bounded(async {
            let sql = "SELECT * FROM incidents AS i
                       WHERE completed_at IS NULL
                         AND EXISTS (SELECT 1 FROM incident_cdns AS c
                                     WHERE c.incident_id = i.id AND c.cdn = $2 AND c.state <> 'complete')
                       ORDER BY id LIMIT $1";
            let rows = sqlx::query(sql).bind(MAX_OPEN).bind(cdn).fetch_all(&self.pool).await?;
            self.with_cdns(&rows).await
        })
        .await
    }

    /// How many incidents are not complete.
    pub async fn count_open_incidents(&self) -> Result<u64, StoreError> {
        bounded(async {
            let sql = "SELECT count(*) AS open FROM incidents WHERE completed_at IS NULL";
            let row = sqlx::query(sql).fetch_one(&self.pool).await?;
            Ok(u64::try_from(row.try_get::<i64, _>("open")?).unwrap_or_default())
        })
        .await
    }

    /// One incident.
    pub async fn incident(&self, id: IncidentId) -> Result<Option<IncidentRow>, StoreError> {
        bounded(async {
            let sql = "SELECT * FROM incidents WHERE id = $1";
            let row = sqlx::query(sql).bind(id.to_string()).fetch_optional(&self.pool).await?;
            Ok(self.with_cdns(&Vec::from_iter(row)).await?.pop())
        })
        .await
    }

    /// Incidents, the newest first, at most `limit` that are older than `before`.
    pub async fn incidents(
        &self,
        before: Option<IncidentId>,
        limit: u32,
    ) -> Result<Vec<IncidentRow>, StoreError> {
        bounded(async {
            let sql = "SELECT * FROM incidents WHERE id < $1 ORDER BY id DESC LIMIT $2";
            // Behind all IDs: these are hexadecimal.
            let before = before.map_or_else(|| "g".to_owned(), |id| id.to_string());
            let rows = sqlx::query(sql).bind(before).bind(i64::from(limit)).fetch_all(&self.pool).await?;
            self.with_cdns(&rows).await
        })
        .await
    }

    async fn with_cdns(&self, rows: &[AnyRow]) -> Result<Vec<IncidentRow>, StoreError> {
        let mut incidents = rows.iter().map(IncidentRow::read).collect::<Result<Vec<_>, _>>()?;
        if incidents.is_empty() {
            return Ok(incidents);
        }
        let ids = json(&incidents.iter().map(|incident| incident.id.to_string()).collect::<Vec<_>>());
        let sql = super::dialect::both!(
            self.dialect,
            "SELECT * FROM incident_cdns WHERE incident_id IN (" ids ") ORDER BY cdn"
        );
        let places: HashMap<_, _> =
            incidents.iter().enumerate().map(|(at, incident)| (incident.id, at)).collect();
        for row in sqlx::query(sql).bind(ids).fetch_all(&self.pool).await? {
            let of: IncidentId = parsed(&row, "incident_id")?;
            if let Some(at) = places.get(&of) {
                incidents[*at].cdns.push(IncidentCdnRow::read(&row)?);
            }
        }
        Ok(incidents)
    }

    /// Notes how far a CDN is with incidents, in the order of their IDs; one of which it is the last CDN is complete.
    /// Returns those.
    pub async fn note_purges(
        &self,
        rows: &[(IncidentId, IncidentCdnRow)],
    ) -> Result<Vec<IncidentId>, StoreError> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        repeated(|| async {
            let mut tx = self.begin().await?;
            let mut complete = Vec::new();
            for (id, row) in rows {
                if note_purge(&mut tx, *id, row).await? {
                    complete.push(*id);
                }
            }
            commit(tx, "purge: before the commit", "purge: noted").await?;
            Ok(complete)
        })
        .await
    }

    /// Stores an incident in the transaction of its revocation, if that took any key back. Returns whether it did.
    pub(super) async fn put_incident(&self, tx: &mut Tx, row: &NewIncident) -> Result<bool, StoreError> {
        let first = row.keys.first().map(KeyId::to_string).unwrap_or_default();
        let sql = "INSERT INTO incidents (id, stream_id, reason, actor, revoked_at, transition_until, successor_id,
                                          key_ids, paths, completed_at)
                   SELECT $1, $2, $3, $4, $5, $6,
                          (SELECT s.id FROM content_keys AS s WHERE s.stream_id = $2 AND s.ordinal = $7), $8, $9,
                          CAST($10 AS BIGINT)
                   WHERE EXISTS (SELECT 1 FROM content_keys AS k
                                 WHERE k.id = $11 AND k.compromised_at = $5 AND k.revoked_by = $4)";
        fault::point("incident: before");
        let query = sqlx::query(sql)
            .bind(row.id.to_string())
            .bind(row.stream.as_str())
            .bind(&row.reason)
            .bind(&row.actor)
            .bind(row.revoked_at.as_unix_millis())
            .bind(row.transition_until.as_unix_millis())
            .bind(i64::from(row.successor.0))
            .bind(json(&row.keys.iter().map(KeyId::to_string).collect::<Vec<_>>()))
            .bind(json(&row.paths))
            .bind(row.cdns.is_empty().then(|| row.revoked_at.as_unix_millis()))
            .bind(first);
        if query.execute(&mut **tx).await?.rows_affected() == 0 {
            return Ok(false);
        }
        for cdn in &row.cdns {
            let sql = "INSERT INTO incident_cdns (incident_id, cdn, state, purges, updated_at)
                       VALUES ($1, $2, $3, 0, $4)";
            let query = sqlx::query(sql)
                .bind(row.id.to_string())
                .bind(cdn)
                .bind(PurgeState::Pending.name())
                .bind(row.revoked_at.as_unix_millis());
            query.execute(&mut **tx).await?;
        }
        Ok(true)
    }
}

/// Returns whether the incident is complete by it.
async fn note_purge(tx: &mut Tx, id: IncidentId, row: &IncidentCdnRow) -> Result<bool, StoreError> {
    // One CDN after the other: two that complete at once would each see the other open, and nobody the last.
    let sql = "UPDATE incidents SET completed_at = completed_at WHERE id = $1";
    sqlx::query(sql).bind(id.to_string()).execute(&mut **tx).await?;
    // Only forward: what another node has completed stays so.
    let sql = "UPDATE incident_cdns
               SET state = $3, purges = $4, purged_at = $5, last_error = $6, updated_at = $7, completed_at = $8
               WHERE incident_id = $1 AND cdn = $2 AND state <> 'complete'";
    fault::point("purge: before it is noted");
    let query = sqlx::query(sql)
        .bind(id.to_string())
        .bind(&row.cdn)
        .bind(row.state.name())
        .bind(i64::from(row.purges))
        .bind(row.purged_at.map(Timestamp::as_unix_millis))
        .bind(&row.last_error)
        .bind(row.updated_at.as_unix_millis())
        .bind(row.completed_at.map(Timestamp::as_unix_millis));
    query.execute(&mut **tx).await?;
    if row.state != PurgeState::Complete {
        return Ok(false);
    }
    let sql = "UPDATE incidents SET completed_at = $2
               WHERE id = $1 AND completed_at IS NULL
                 AND NOT EXISTS (SELECT 1 FROM incident_cdns AS c
                                 WHERE c.incident_id = $1 AND c.state <> 'complete')";
    let query = sqlx::query(sql).bind(id.to_string()).bind(row.updated_at.as_unix_millis());
    Ok(query.execute(&mut **tx).await?.rows_affected() > 0)
}
