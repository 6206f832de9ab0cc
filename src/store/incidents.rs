//! Keys that were taken back: who, when and why, and how far each CDN is with letting go of them.
//!
//! An incident is stored with the revocation itself (`apply`), so there is none without the other. It is kept until its
//! stream is erased.

use serde_json::{Value, json};
use sqlx::any::AnyRow;
use sqlx::{AssertSqlSafe, Row};

use super::StoreError;
use super::open::{Store, Tx, bounded, commit, repeated};
use super::rows::{self, named, optional_time, parsed, time, unreadable, unsigned};
use crate::fault;
use crate::keys::{IncidentId, KeyId, Ordinal, StreamId, Timestamp};

/// Incidents that are worked on at once, for each CDN.
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
    /// Nobody works on it: the configuration has no such CDN any more.
    Abandoned,
}

impl PurgeState {
    /// Whether something is left to be done.
    pub fn is_open(self) -> bool {
        matches!(self, PurgeState::Pending | PurgeState::Purged)
    }

    pub fn name(self) -> &'static str {
        match self {
            PurgeState::Pending => "pending",
            PurgeState::Purged => "purged",
            PurgeState::Complete => "complete",
            PurgeState::Abandoned => "abandoned",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        let all = [PurgeState::Pending, PurgeState::Purged, PurgeState::Complete, PurgeState::Abandoned];
        all.into_iter().find(|state| state.name() == name)
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

/// The columns of what is noted.
const NOTED: [(&str, &str); 8] = [
    ("incident", "text"),
    ("cdn", "text"),
    ("state", "text"),
    ("purges", "bigint"),
    ("purged_at", "bigint"),
    ("error", "text"),
    ("at", "bigint"),
    ("done", "bigint"),
];

impl IncidentCdnRow {
    /// In the columns [`NOTED`].
    fn to_json(&self, id: IncidentId) -> Value {
        json!({
            "incident": id.to_string(), "cdn": self.cdn, "state": self.state.name(), "purges": self.purges,
            "purged_at": self.purged_at.map(Timestamp::as_unix_millis), "error": self.last_error,
            "at": self.updated_at.as_unix_millis(), "done": self.completed_at.map(Timestamp::as_unix_millis),
        })
    }

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
    /// Incidents with which a CDN is not done, the oldest first. What others are not done with is not among them: a CDN
    /// that stays away, or was given up, hides nothing from the rest.
    pub async fn open_incidents(&self, cdn: &str) -> Result<Vec<IncidentRow>, StoreError> {
        bounded(async {
            let sql = "SELECT i.* FROM incidents AS i JOIN incident_cdns AS c ON c.incident_id = i.id
                       WHERE i.completed_at IS NULL AND c.cdn = $1 AND c.state NOT IN ('complete', 'abandoned')
                       ORDER BY i.id LIMIT $2";
            let rows = sqlx::query(sql).bind(cdn).bind(MAX_OPEN).fetch_all(&self.pool).await?;
            self.with_cdns(&rows).await
        })
        .await
    }

    /// Of incidents from before a time, what is open at CDNs that are not among these.
    pub async fn open_elsewhere(
        &self,
        cdns: &[&str],
        before: Timestamp,
    ) -> Result<Vec<(IncidentId, IncidentCdnRow)>, StoreError> {
        bounded(async {
            let sql = super::dialect::both!(
                self.dialect,
                "SELECT c.* FROM incidents AS i JOIN incident_cdns AS c ON c.incident_id = i.id
                 WHERE i.completed_at IS NULL AND c.state NOT IN ('complete', 'abandoned')
                   AND i.revoked_at <= $2 AND c.cdn NOT IN (" ids ")
                 ORDER BY i.id LIMIT $3"
            );
            let query = sqlx::query(sql).bind(rows::json(&cdns)).bind(before.as_unix_millis()).bind(MAX_OPEN);
            let read = |row: &AnyRow| Ok((parsed(row, "incident_id")?, IncidentCdnRow::read(row)?));
            query.fetch_all(&self.pool).await?.iter().map(read).collect()
        })
        .await
    }

    /// How many incidents are not complete.
    pub async fn count_open_incidents(&self) -> Result<u64, StoreError> {
        bounded(async {
            let sql = "SELECT count(*) AS open FROM incidents WHERE completed_at IS NULL";
            unsigned(&sqlx::query(sql).fetch_one(&self.pool).await?, "open")
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
        let ids = rows::json(&incidents.iter().map(|incident| incident.id.to_string()).collect::<Vec<_>>());
        let sql = super::dialect::both!(
            self.dialect,
            "SELECT * FROM incident_cdns WHERE incident_id IN (" ids ") ORDER BY cdn"
        );
        for row in sqlx::query(sql).bind(ids).fetch_all(&self.pool).await? {
            let of: IncidentId = parsed(&row, "incident_id")?;
            if let Some(incident) = incidents.iter_mut().find(|incident| incident.id == of) {
                incident.cdns.push(IncidentCdnRow::read(&row)?);
            }
        }
        Ok(incidents)
    }

    /// Notes how far CDNs are with incidents. Returns those that are complete by it: no CDN of theirs is left.
    pub async fn note_purges(
        &self,
        noted: &[(IncidentId, IncidentCdnRow)],
    ) -> Result<Vec<IncidentId>, StoreError> {
        if noted.is_empty() {
            return Ok(Vec::new());
        }
        let ids = rows::json(&noted.iter().map(|(id, _)| id.to_string()).collect::<Vec<_>>());
        let list: Vec<_> = noted.iter().map(|(id, row)| row.to_json(*id)).collect();
        let list = rows::json(&list);
        let from = self.dialect.rows(&NOTED);
        repeated(|| async {
            let mut tx = self.begin().await?;
            // Held against each other: of two CDNs that end at once, one must see that it is the last.
            let hold = super::dialect::both!(
                self.dialect,
                "UPDATE incidents SET completed_at = completed_at WHERE id IN (" ids ")"
            );
            fault::point("purge: before it is noted");
            sqlx::query(hold).bind(&ids).execute(&mut *tx).await?;
            // Only forward: what another node has completed stays so.
            let note = format!(
                "UPDATE incident_cdns AS c
                 SET state = r.state, purges = r.purges, purged_at = r.purged_at, last_error = r.error,
                     updated_at = r.at, completed_at = r.done
                 FROM {from} WHERE c.incident_id = r.incident AND c.cdn = r.cdn AND c.state <> 'complete'"
            );
            sqlx::query(AssertSqlSafe(note)).bind(&list).execute(&mut *tx).await?;
            let complete = format!(
                "UPDATE incidents AS i SET completed_at = r.at FROM {from}
                 WHERE i.id = r.incident AND i.completed_at IS NULL
                   AND NOT EXISTS (SELECT 1 FROM incident_cdns AS c
                                   WHERE c.incident_id = i.id AND c.state NOT IN ('complete', 'abandoned'))
                 RETURNING id"
            );
            let complete = sqlx::query(AssertSqlSafe(complete)).bind(&list).fetch_all(&mut *tx).await?;
            let complete = complete.iter().map(|row| parsed(row, "id")).collect::<Result<_, _>>()?;
            commit(tx, "purge: before the commit", "purge: noted").await?;
            Ok(complete)
        })
        .await
    }

    /// Stores an incident in the transaction of its revocation, if that took any key back. Returns whether it did.
    pub(super) async fn put_incident(&self, tx: &mut Tx, row: &NewIncident) -> Result<bool, StoreError> {
        // Any of them: another node may have taken some back a moment before.
        let sql = super::dialect::both!(
            self.dialect,
            "INSERT INTO incidents (key_ids, id, stream_id, reason, actor, revoked_at, transition_until, successor_id,
                                    paths, completed_at)
             SELECT $1, $2, $3, $4, $5, $6, $7,
                    (SELECT s.id FROM content_keys AS s WHERE s.stream_id = $3 AND s.ordinal = $8), $9,
                    CAST($10 AS BIGINT)
             WHERE EXISTS (SELECT 1 FROM content_keys AS k
                           WHERE k.id IN (" ids ") AND k.compromised_at = $6 AND k.revoked_by = $5)"
        );
        fault::point("incident: before");
        let query = sqlx::query(sql)
            .bind(rows::json(&row.keys.iter().map(KeyId::to_string).collect::<Vec<_>>()))
            .bind(row.id.to_string())
            .bind(row.stream.as_str())
            .bind(&row.reason)
            .bind(&row.actor)
            .bind(row.revoked_at.as_unix_millis())
            .bind(row.transition_until.as_unix_millis())
            .bind(i64::from(row.successor.0))
            .bind(rows::json(&row.paths))
            .bind(row.cdns.is_empty().then(|| row.revoked_at.as_unix_millis()));
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
