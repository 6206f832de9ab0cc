//! What makes several nodes one shield: leases, who is up, and hearing of changes.
//!
//! All of it has connections of its own: that a node has much to store must not look like a store that is away.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgListener;

use super::StoreError;
use super::dialect::both;
use super::open::{Location, Store, bounded};
use crate::fault;
use crate::keys::StreamId;

/// A transaction may bear a time this much earlier than the moment at which others can see it: it is committed
/// within `open::PATIENCE`.
pub(super) const COMMIT_SLACK_MILLIS: i64 = 10_000;

/// Streams that changed, and where to go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// With the revision of each. May name one again that is known already.
    pub streams: Vec<(StreamId, i64)>,
    pub next: i64,
}

/// What [`Store::hold_lease`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    Held,
    /// Another has it, and for so long unless it renews it.
    Taken {
        expires_in: Duration,
    },
}

/// Wakes when something may have changed.
pub enum News {
    /// The database tells.
    Listener(Box<PgListener>),
    /// It does not; whoever waits polls.
    None,
}

impl News {
    /// Returns when another node has changed something, as soon as the database tells; never, where it does not.
    ///
    /// # Errors
    /// A connection that is lost and cannot be had again at once.
    pub async fn next(&mut self) -> Result<(), StoreError> {
        match self {
            News::Listener(listener) => {
                // `None`: the connection was lost and is to be made anew; something may have been missed.
                listener.try_recv().await?;
                Ok(())
            }
            News::None => std::future::pending().await,
        }
    }
}

impl Store {
    /// The database's own time, in milliseconds since 1970.
    pub(super) async fn now_db(&self) -> Result<i64, StoreError> {
        let sql = both!(self.dialect, "SELECT " now " AS now_db");
        Ok(sqlx::query(sql).fetch_one(&mut *self.vital().await?).await?.try_get("now_db")?)
    }

    /// The streams that changed since `since`, which is 0 or an earlier answer's `next`.
    pub async fn changes(&self, since: i64) -> Result<Changes, StoreError> {
        bounded(async {
            let now = self.now_db().await?;
            let sql = "SELECT id, rev FROM streams WHERE changed_at_db >= $1";
            let rows = sqlx::query(sql).bind(since).fetch_all(&mut *self.vital().await?).await?;
            let read = |row| Ok::<_, StoreError>((super::rows::parsed(row, "id")?, row.try_get("rev")?));
            Ok(Changes {
                streams: rows.iter().map(read).collect::<Result<_, _>>()?,
                next: now - COMMIT_SLACK_MILLIS,
            })
        })
        .await
    }

    /// Begins to listen for changes.
    pub async fn news(&self) -> Result<News, StoreError> {
        match &self.location {
            Location::Sqlite(_) => Ok(News::None),
            Location::Postgres(url) => {
                bounded(async {
                    let mut listener = PgListener::connect(url).await?;
                    listener.listen("keyshield").await?;
                    Ok(News::Listener(Box::new(listener)))
                })
                .await
            }
        }
    }

    /// Takes a lease, or holds it for longer, unless another has it.
    pub async fn hold_lease(&self, name: &str, holder: &str, length: Duration) -> Result<Lease, StoreError> {
        bounded(async {
            let sql = both!(
                self.dialect,
                "INSERT INTO leases (name, holder, expires_at_db) VALUES ($1, $2, " now " + $3)
                 ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires_at_db = excluded.expires_at_db
                 WHERE leases.holder = excluded.holder OR leases.expires_at_db <= " now
            );
            let length = i64::try_from(length.as_millis()).unwrap_or(i64::MAX);
            fault::point("lease: before");
            let mut connection = self.vital().await?;
            let held = sqlx::query(sql).bind(name).bind(holder).bind(length).execute(&mut *connection).await?;
            fault::point("lease: held");
            if held.rows_affected() > 0 {
                return Ok(Lease::Held);
            }
            let sql = both!(self.dialect, "SELECT expires_at_db - " now " AS millis FROM leases WHERE name = $1");
            let row = sqlx::query(sql).bind(name).fetch_optional(&mut *connection).await?;
            // It may have been given up in between.
            let millis = row.map(|row| row.try_get::<i64, _>("millis")).transpose()?.unwrap_or_default();
            Ok(Lease::Taken { expires_in: Duration::from_millis(u64::try_from(millis).unwrap_or_default()) })
        })
        .await
    }

    /// Who holds a lease now.
    pub async fn lease_holder(&self, name: &str) -> Result<Option<String>, StoreError> {
        bounded(async {
            let sql = both!(
                self.dialect,
                "SELECT holder FROM leases WHERE name = $1 AND expires_at_db > " now
            );
            let row = sqlx::query(sql).bind(name).fetch_optional(&mut *self.vital().await?).await?;
            Ok(row.map(|row| row.try_get("holder")).transpose()?)
        })
        .await
    }

    /// Gives a lease up, if it is still the holder's.
    pub async fn give_up_lease(&self, name: &str, holder: &str) -> Result<(), StoreError> {
        bounded(async {
            let sql = "DELETE FROM leases WHERE name = $1 AND holder = $2";
            sqlx::query(sql).bind(name).bind(holder).execute(&mut *self.vital().await?).await?;
            Ok(())
        })
        .await
    }

    /// Notes that a node is up.
    pub async fn beat(&self, node: &str) -> Result<(), StoreError> {
        bounded(async {
            let sql = both!(
                self.dialect,
                "INSERT INTO nodes (id, seen_at_db) VALUES ($1, " now ")
                 ON CONFLICT (id) DO UPDATE SET seen_at_db = excluded.seen_at_db"
            );
            fault::point("beat: before");
            sqlx::query(sql).bind(node).execute(&mut *self.vital().await?).await?;
            fault::point("beat: noted");
            Ok(())
        })
        .await
    }

    /// Whether a node was heard of within `dead_after`, but not within `silent_after`: it may be serving without
    /// being able to say so. Those that are dead are forgotten.
    pub async fn is_a_node_missing(
        &self,
        silent_after: Duration,
        dead_after: Duration,
    ) -> Result<bool, StoreError> {
        bounded(async {
            let now = self.now_db().await?;
            let before = |age: Duration| now - i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
            let sql = "DELETE FROM nodes WHERE seen_at_db < $1";
            fault::point("dead nodes: before");
            sqlx::query(sql).bind(before(dead_after)).execute(&mut *self.vital().await?).await?;
            fault::point("dead nodes: forgotten");
            let sql = "SELECT count(*) AS missing FROM nodes WHERE seen_at_db < $1";
            let row =
                sqlx::query(sql).bind(before(silent_after)).fetch_one(&mut *self.vital().await?).await?;
            Ok(row.try_get::<i64, _>("missing")? > 0)
        })
        .await
    }

    /// Says that a node ends, and gives up what it holds.
    pub async fn leave(&self, node: &str) -> Result<(), StoreError> {
        bounded(async {
            fault::point("leave: before");
            sqlx::query("DELETE FROM nodes WHERE id = $1")
                .bind(node)
                .execute(&mut *self.vital().await?)
                .await?;
            fault::point("leave: before the leases");
            sqlx::query("DELETE FROM leases WHERE holder = $1")
                .bind(node)
                .execute(&mut *self.vital().await?)
                .await?;
            fault::point("leave: left");
            Ok(())
        })
        .await
    }

    /// Forgets every lease and node: for a database that this process alone can have open.
    pub async fn forget_nodes(&self) -> Result<(), StoreError> {
        bounded(async {
            fault::point("forget nodes: before");
            sqlx::query("DELETE FROM nodes").execute(&mut *self.vital().await?).await?;
            fault::point("forget nodes: before the leases");
            sqlx::query("DELETE FROM leases").execute(&mut *self.vital().await?).await?;
            fault::point("forget nodes: forgotten");
            Ok(())
        })
        .await
    }
}
