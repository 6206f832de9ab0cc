//! Carrying [`Write`]s out: a few statements, for however many streams.
//!
//! A statement costs a round trip to the database, whatever it does. So the first writes of all streams are carried
//! out together, kind by kind, then the second ones, and so on: each stream's stay in their order, and what one
//! stream's do is nothing to another's. Rows go over as a JSON list.

use std::collections::{HashMap, HashSet};
use std::mem::discriminant;

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Row};

use super::StoreError;
use super::dialect::{Dialect, both};
use super::keys::{Applied, Write, WriteOp};
use super::open::{Store, Tx, commit, repeated};
use super::rows::{self, DekRow, KeyRow, parsed};
use crate::fault;
use crate::keys::{KeyState, Reason, StreamId, Timestamp};

/// Streams that were changed, in their order, with the new revision of each.
type Revs = Vec<(StreamId, i64)>;

impl Store {
    /// Carries writes out, all or none; those of one stream stand together. Streams that are gone are left out: their
    /// place says that nothing was changed. Returns what became of each, and the new revision of each stream.
    pub async fn apply(&self, writes: &[Write]) -> Result<(Vec<Applied>, Revs), StoreError> {
        if writes.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let done = repeated(|| async {
            let mut tx = self.begin().await?;
            let revs = self.touch_all(&mut tx, writes).await?;
            let mut applied = vec![Applied::Changed(0); writes.len()];
            for round in rounds(writes, &revs) {
                let of_round: Vec<_> = round.iter().map(|at| &writes[*at]).collect();
                let done = self.carry_out(&mut tx, &of_round).await?;
                round.iter().zip(done).for_each(|(at, done)| applied[*at] = done);
            }
            self.tell(&mut tx).await?;
            commit(tx, "apply: before the commit", "apply: committed").await?;
            Ok((applied, revs))
        })
        .await;
        let destroys = |write: &Write| matches!(write.op, WriteOp::Destroy { .. } | WriteOp::ShredDek { .. });
        if done.is_ok() && writes.iter().any(destroys) {
            self.empty_the_log().await;
        }
        done
    }

    /// As [`Store::touch`], for those streams of the writes that are there.
    async fn touch_all(&self, tx: &mut Tx, writes: &[Write]) -> Result<Revs, StoreError> {
        let mut streams: Vec<_> = writes.iter().map(|write| write.stream.as_str()).collect();
        streams.sort_unstable();
        streams.dedup();
        let ids = rows::json(&streams);
        // Whoever changes several locks them in this order.
        if let Some(lock) = self.dialect.lock_streams().filter(|_| streams.len() > 1) {
            sqlx::query(lock).bind(&ids).execute(&mut **tx).await?;
        }
        let sql = both!(
            self.dialect,
            "UPDATE streams SET rev = rev + 1, changed_at_db = " now
            " WHERE id IN (" ids ") AND state <> 'deleted' RETURNING id, rev"
        );
        let touched = sqlx::query(sql).bind(&ids).fetch_all(&mut **tx).await?;
        let rev = |row| Ok::<_, StoreError>((parsed(row, "id")?, row.try_get("rev")?));
        let mut revs = touched.iter().map(rev).collect::<Result<Revs, _>>()?;
        revs.sort_unstable();
        Ok(revs)
    }

    /// Carries out writes of one kind, each of another stream.
    async fn carry_out(&self, tx: &mut Tx, writes: &[&Write]) -> Result<Vec<Applied>, StoreError> {
        match writes {
            [Write { op: WriteOp::PutDek(_), .. }, ..] => self.put_deks(tx, writes).await,
            [Write { op: WriteOp::PutKeys(_), .. }, ..] => self.put_keys(tx, writes).await,
            [Write { op: WriteOp::ShredDek { .. }, .. }, ..] => self.shred_deks(tx, writes).await,
            [Write { op: WriteOp::PutIncident(_), .. }, ..] => self.put_incidents(tx, writes).await,
            _ => self.change_keys(tx, writes).await,
        }
    }

    async fn put_deks(&self, tx: &mut Tx, writes: &[&Write]) -> Result<Vec<Applied>, StoreError> {
        let mut list = Vec::with_capacity(writes.len());
        for write in writes {
            let WriteOp::PutDek(dek) = &write.op else { continue };
            list.push(json!({
                "id": dek.id.to_string(),
                "stream": write.stream.as_str(),
                "n": dek.version.0,
                "kek_id": dek.kek_id,
                "wrapped": hex::encode(&dek.wrapped),
                "at": dek.created_at.as_unix_millis(),
            }));
        }
        let list = rows::json(&list);
        let rows = self.dialect.rows(&[
            ("id", "text"),
            ("stream", "text"),
            ("n", "bigint"),
            ("kek_id", "text"),
            ("wrapped", "text"),
            ("at", "bigint"),
        ]);
        fault::point("put a DEK: before");
        let sql = format!(
            "INSERT INTO deks (id, stream_id, version, kek_id, wrapped, created_at)
             SELECT r.id, r.stream, r.n, r.kek_id, {}, r.at FROM {rows} WHERE TRUE ON CONFLICT DO NOTHING",
            self.dialect.unhex("r.wrapped"),
        );
        sqlx::query(AssertSqlSafe(sql)).bind(&list).execute(&mut **tx).await?;
        let sql =
            format!("SELECT d.* FROM {rows} JOIN deks AS d ON d.stream_id = r.stream AND d.version = r.n");
        let mut there = HashMap::new();
        for row in sqlx::query(AssertSqlSafe(sql)).bind(&list).fetch_all(&mut **tx).await? {
            there.insert(row.try_get::<String, _>("stream_id")?, DekRow::read(&row)?);
        }
        let taken =
            |write: &&Write| there.remove(write.stream.as_str()).map(Applied::Dek).ok_or_else(missing);
        writes.iter().map(taken).collect()
    }

    async fn put_keys(&self, tx: &mut Tx, writes: &[&Write]) -> Result<Vec<Applied>, StoreError> {
        let mut list = Vec::new();
        for (write, key) in writes.iter().flat_map(|write| keys_of(write).iter().map(move |key| (write, key)))
        {
            list.push(json!({
                "id": key.id.to_string(),
                "stream": write.stream.as_str(),
                "n": key.ordinal.0,
                "dek": key.dek.to_string(),
                "method": key.method.name(),
                "iv_mode": key.iv_mode.name(),
                "wrapped": hex::encode(&key.wrapped),
                "at": key.life.created_at.as_unix_millis(),
            }));
        }
        let (wanted, list) = (list.len(), rows::json(&list));
        let rows = self.dialect.rows(&[
            ("id", "text"),
            ("stream", "text"),
            ("n", "bigint"),
            ("dek", "text"),
            ("method", "text"),
            ("iv_mode", "text"),
            ("wrapped", "text"),
            ("at", "bigint"),
        ]);
        fault::point("put keys: before");
        // Not under a DEK that was shredded: its stream was deleted, and has begun anew before this node heard of it.
        let sql = format!(
            "INSERT INTO content_keys (id, stream_id, ordinal, dek_id, method, iv_mode, wrapped, state, forced,
                                       created_at)
             SELECT r.id, r.stream, r.n, r.dek, r.method, r.iv_mode, {}, '{}', 0, r.at FROM {rows}
             WHERE EXISTS (SELECT 1 FROM deks AS d WHERE d.id = r.dek AND length(d.wrapped) > 0)
             ON CONFLICT DO NOTHING RETURNING id",
            self.dialect.unhex("r.wrapped"),
            KeyState::PreActive.name(),
        );
        let mut made = HashSet::with_capacity(wanted);
        for row in sqlx::query(AssertSqlSafe(sql)).bind(&list).fetch_all(&mut **tx).await? {
            made.insert(row.try_get::<String, _>("id")?);
        }
        let mut others = HashMap::new();
        if made.len() < wanted {
            let sql = format!(
                "SELECT k.* FROM {rows} JOIN content_keys AS k ON k.stream_id = r.stream AND k.ordinal = r.n"
            );
            for row in sqlx::query(AssertSqlSafe(sql)).bind(&list).fetch_all(&mut **tx).await? {
                let key = KeyRow::read(&row)?;
                others.insert((row.try_get::<String, _>("stream_id")?, key.ordinal), key);
            }
        }
        let there = |stream: &StreamId, key: &KeyRow| {
            let ours = made.contains(&key.id.to_string()).then(|| key.clone());
            ours.or_else(|| others.get(&(stream.to_string(), key.ordinal)).cloned()).ok_or_else(missing)
        };
        let taken = |write: &&Write| {
            let keys = keys_of(write).iter().map(|key| there(&write.stream, key));
            keys.collect::<Result<_, _>>().map(Applied::Keys)
        };
        writes.iter().map(taken).collect()
    }

    async fn shred_deks(&self, tx: &mut Tx, writes: &[&Write]) -> Result<Vec<Applied>, StoreError> {
        let id = |write: &&Write| match &write.op {
            WriteOp::ShredDek { dek } => Some(dek.to_string()),
            _ => None,
        };
        let ids: Vec<_> = writes.iter().filter_map(id).collect();
        fault::point("shred a DEK: before");
        // Nobody puts a key under it meanwhile: the stream's row is held.
        let sql = both!(
            self.dialect,
            "UPDATE deks SET wrapped = $2
             WHERE id IN (" ids ") AND length(wrapped) > 0
               AND version < (SELECT max(n.version) FROM deks AS n WHERE n.stream_id = deks.stream_id)
               AND NOT EXISTS (SELECT 1 FROM content_keys AS k
                               WHERE k.stream_id = deks.stream_id AND k.dek_id = deks.id AND k.state <> 'destroyed')
             RETURNING id"
        );
        let mut shredded = HashSet::new();
        for row in sqlx::query(sql).bind(rows::json(&ids)).bind(Vec::<u8>::new()).fetch_all(&mut **tx).await?
        {
            shredded.insert(row.try_get::<String, _>("id")?);
        }
        let is_shredded = |write: &&Write| id(write).is_some_and(|id| shredded.contains(&id));
        Ok(writes.iter().map(|write| Applied::Changed(u64::from(is_shredded(write)))).collect())
    }

    async fn put_incidents(&self, tx: &mut Tx, writes: &[&Write]) -> Result<Vec<Applied>, StoreError> {
        let mut applied = Vec::with_capacity(writes.len());
        for write in writes {
            let WriteOp::PutIncident(incident) = &write.op else { continue };
            applied.push(Applied::Changed(u64::from(self.put_incident(tx, incident).await?)));
        }
        Ok(applied)
    }

    async fn change_keys(&self, tx: &mut Tx, writes: &[&Write]) -> Result<Vec<Applied>, StoreError> {
        let Some(first) = writes.first() else { return Ok(Vec::new()) };
        let Change { point, set, which } = Change::of(&first.op, self.dialect);
        let list: Vec<_> = writes.iter().flat_map(|write| changed(&write.stream, &write.op)).collect();
        // What is destroyed is looked for in no index of those that are kept.
        let sql = format!(
            "UPDATE content_keys AS k SET {set} FROM {rows}
             WHERE k.stream_id = r.stream AND k.state <> 'destroyed' AND {which} RETURNING stream_id",
            rows = self.dialect.rows(&CHANGED),
        );
        fault::point(point);
        let query = sqlx::query(AssertSqlSafe(sql)).bind(rows::json(&list));
        let mut counts: HashMap<String, u64> = HashMap::new();
        for row in query.fetch_all(&mut **tx).await? {
            *counts.entry(row.try_get("stream_id")?).or_default() += 1;
        }
        if matches!(first.op, WriteOp::Destroy { .. }) && !counts.is_empty() {
            self.drop_boundaries(tx, &counts.keys().collect::<Vec<_>>()).await?;
        }
        let count = |write: &&Write| counts.get(write.stream.as_str()).copied().unwrap_or_default();
        Ok(writes.iter().map(|write| Applied::Changed(count(write))).collect())
    }

    /// Removes the boundaries of destroyed keys, from the front alone, and never the last, from which numbers are
    /// counted on.
    async fn drop_boundaries(&self, tx: &mut Tx, streams: &[&String]) -> Result<(), StoreError> {
        fault::point("destroy: before the boundaries");
        let sql = both!(
            self.dialect,
            "DELETE FROM boundaries
             WHERE stream_id IN (" ids ")
               AND EXISTS (SELECT 1 FROM content_keys k
                           WHERE k.stream_id = boundaries.stream_id AND k.ordinal = boundaries.ordinal
                             AND k.state = 'destroyed')
               AND NOT EXISTS (SELECT 1 FROM boundaries b
                               JOIN content_keys k ON k.stream_id = b.stream_id AND k.ordinal = b.ordinal
                               WHERE b.stream_id = boundaries.stream_id AND b.rendition = boundaries.rendition
                                 AND b.seq < boundaries.seq AND k.state <> 'destroyed')
               AND seq < (SELECT max(l.seq) FROM boundaries l
                          WHERE l.stream_id = boundaries.stream_id AND l.rendition = boundaries.rendition)"
        );
        sqlx::query(sql).bind(rows::json(&streams)).execute(&mut **tx).await?;
        Ok(())
    }
}

/// The places of the writes that are carried out together: of one kind, each of another stream that is there.
fn rounds(writes: &[Write], revs: &Revs) -> Vec<Vec<usize>> {
    let mut rounds: Vec<(usize, Vec<usize>)> = Vec::new();
    let mut nth = 0;
    for (at, write) in writes.iter().enumerate() {
        nth = if at > 0 && writes[at - 1].stream == write.stream { nth + 1 } else { 0 };
        if revs.binary_search_by(|(stream, _)| stream.cmp(&write.stream)).is_err() {
            continue;
        }
        let kind = discriminant(&write.op);
        let fits = |(of, round): &&mut (usize, Vec<usize>)| {
            *of == nth && round.first().is_some_and(|first| discriminant(&writes[*first].op) == kind)
        };
        match rounds.iter_mut().find(fits) {
            Some((_, round)) => round.push(at),
            None => rounds.push((nth, vec![at])),
        }
    }
    rounds.sort_by_key(|(nth, _)| *nth);
    rounds.into_iter().map(|(_, round)| round).collect()
}

fn keys_of(write: &Write) -> &[KeyRow] {
    match &write.op {
        WriteOp::PutKeys(keys) => keys,
        _ => &[],
    }
}

/// A row that was written a moment ago, or stood in the way, is not there.
fn missing() -> StoreError {
    StoreError::Query(sqlx::Error::RowNotFound)
}

/// How a kind of write changes a key `k` by a row `r` of [`CHANGED`].
struct Change {
    /// Where a test kills the process.
    point: &'static str,
    set: String,
    which: String,
}

/// The columns of all kinds; each fills in what it needs.
const CHANGED: [(&str, &str); 8] = [
    ("stream", "text"),
    ("n", "bigint"),
    ("at", "bigint"),
    ("reason", "text"),
    ("actor", "text"),
    ("forced", "bigint"),
    ("successor", "bigint"),
    ("until", "bigint"),
];

impl Change {
    fn of(op: &WriteOp, dialect: Dialect) -> Self {
        // A key that is past it is left alone.
        let from = |to: KeyState| {
            let names: Vec<_> = to.reached_from().map(|state| format!("'{}'", state.name())).collect();
            format!("k.state IN ({})", names.join(", "))
        };
        let one = |from: String| format!("k.ordinal = r.n AND {from}");
        let (point, set, which) = match op {
            WriteOp::Promote { .. } => (
                "promote: before",
                "state = 'active', activated_at = r.at, activated_for = r.reason, activated_by = r.actor,
                 forced = r.forced"
                    .to_owned(),
                format!("k.ordinal <= r.n AND {}", from(KeyState::Active)),
            ),
            WriteOp::Deactivate { .. } => (
                "deactivate: before",
                "state = 'deactivated', deactivated_at = r.at".to_owned(),
                one(from(KeyState::Deactivated)),
            ),
            WriteOp::Revoke { .. } => (
                "revoke: before",
                "state = 'compromised', compromised_at = r.at, successor = r.successor,
                 revoked_for = r.reason, revoked_by = r.actor, transition_until = r.until"
                    .to_owned(),
                one(from(KeyState::Compromised)),
            ),
            WriteOp::Destroy { .. } => (
                "destroy: before",
                format!("state = 'destroyed', destroyed_at = r.at, wrapped = {}", dialect.unhex("''")),
                one("k.state IN ('deactivated', 'compromised')
                     AND (k.last_named_at IS NULL OR k.last_named_at <= r.until)"
                    .to_owned()),
            ),
            // Those that put something in do not come here.
            WriteOp::Force { .. }
            | WriteOp::PutDek(_)
            | WriteOp::PutKeys(_)
            | WriteOp::PutIncident(_)
            | WriteOp::ShredDek { .. } => {
                ("force: before", "forced = 1".to_owned(), one("k.state = 'active'".to_owned()))
            }
        };
        Self { point, set, which }
    }
}

/// What a write says of keys, in the columns [`CHANGED`].
fn changed(stream: &StreamId, op: &WriteOp) -> Vec<Value> {
    let (stream, millis) = (stream.as_str(), Timestamp::as_unix_millis);
    match op {
        WriteOp::PutDek(_) | WriteOp::PutKeys(_) | WriteOp::PutIncident(_) | WriteOp::ShredDek { .. } => {
            Vec::new()
        }
        WriteOp::Promote { upto, reason, actor, at } => vec![json!({
            "stream": stream, "n": upto.0, "at": millis(*at), "reason": reason.name(), "actor": actor,
            "forced": i64::from(Reason::is_forced(reason.name())),
        })],
        WriteOp::Force { ordinal } => vec![json!({ "stream": stream, "n": ordinal.0 })],
        WriteOp::Deactivate { ordinal, at } => {
            vec![json!({ "stream": stream, "n": ordinal.0, "at": millis(*at) })]
        }
        WriteOp::Revoke { ordinals, successor, reason, actor, at, transition_until } => {
            let row = |ordinal: &crate::keys::Ordinal| {
                json!({
                    "stream": stream, "n": ordinal.0, "at": millis(*at), "reason": reason, "actor": actor,
                    "successor": successor.0, "until": millis(*transition_until),
                })
            };
            ordinals.iter().map(row).collect()
        }
        WriteOp::Destroy { ordinal, at, unless_named_after } => vec![json!({
            "stream": stream, "n": ordinal.0, "at": millis(*at), "until": millis(*unless_named_after),
        })],
    }
}
