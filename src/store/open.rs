//! Opening a database, and what every transaction has in common.

use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sqlx::any::{Any, AnyConnectOptions, AnyPoolOptions};
use sqlx::pool::PoolConnection;
use sqlx::{AnyPool, Connection, Executor, Row, Transaction};

use super::StoreError;
use super::dialect::{Dialect, both};
use crate::fault;
use crate::keys::StreamId;

/// How long anything may take, so that a database that hangs is one that is away.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a transaction is tried that the database undoes for another's sake.
const ATTEMPTS: u32 = 3;
/// Connections that are kept for what tells whether the database is there, and who may sweep: however much is to be
/// stored, it does not wait behind that.
const VITAL_CONNECTIONS: u32 = 2;
/// How long to wait for a connection.
const ACQUIRE: Duration = Duration::from_secs(2);

/// Where the database is.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// A file of this machine, made if it is not there.
    Sqlite(PathBuf),
    /// `postgres://user:password@host/database`.
    Postgres(String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Sqlite(path) => write!(f, "{}", path.display()),
            // Without its password, which may stand among the parameters too.
            Location::Postgres(url) => {
                let (scheme, rest) = url.split_once("://").unwrap_or(("postgres", ""));
                let (place, parameters) = rest.split_once('?').unwrap_or((rest, ""));
                match place.rsplit_once('@') {
                    Some((_, place)) => write!(f, "{scheme}://{place}"),
                    // It may be a password that nobody encoded.
                    None if parameters.contains('@') => write!(f, "{scheme}://…"),
                    None => write!(f, "{scheme}://{place}"),
                }
            }
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A handle on the database; clones share it.
#[derive(Debug, Clone)]
pub struct Store {
    pub(super) pool: AnyPool,
    /// For `fleet` alone.
    vital_pool: AnyPool,
    writers: usize,
    pub(super) dialect: Dialect,
    pub(super) location: Location,
}

pub(super) type Tx = Transaction<'static, Any>;

impl Store {
    /// Opens the database and brings it to this version's schema. It has at least three connections, whatever
    /// `max_connections` says.
    ///
    /// # Errors
    /// [`StoreError::Open`] when it cannot be opened, [`StoreError::Migrate`] when its schema is newer than this
    /// version or was changed by hand.
    pub async fn open(location: &Location, max_connections: u32) -> Result<Self, StoreError> {
        sqlx::any::install_default_drivers();
        let failed = |source| StoreError::Open { database: location.to_string(), source };
        let (dialect, url) = match location {
            Location::Sqlite(path) => (Dialect::Sqlite, sqlite_url(path)),
            Location::Postgres(url) => (Dialect::Postgres, url.clone()),
        };
        let options = AnyConnectOptions::from_str(&url).map_err(failed)?;
        // `secure_delete`: what is deleted is overwritten on disk too; with `empty_the_log`, a destroyed key leaves no
        // copy in the database's files.
        // `synchronous`: what a playlist has shown must survive the loss of power, not only of the process.
        let set_up = dialect.pick(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
             PRAGMA secure_delete = ON; PRAGMA busy_timeout = 4000;",
            "SET statement_timeout = '4s'; SET idle_in_transaction_session_timeout = '10s';",
        );
        let pool = |connections: u32| {
            AnyPoolOptions::new()
                .max_connections(connections)
                .acquire_timeout(ACQUIRE)
                .after_connect(move |connection, _| {
                    Box::pin(async move { connection.execute(set_up).await.map(|_| ()) })
                })
                // The pool itself waits without end for what was given up to be over, with the connection's place taken.
                .after_release(|connection, _| {
                    Box::pin(async move {
                        let answered = tokio::time::timeout(ACQUIRE, connection.ping()).await;
                        answered.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map(|()| true)
                    })
                })
        };
        let connections = max_connections.saturating_sub(VITAL_CONNECTIONS).max(1);
        let vital_pool = pool(VITAL_CONNECTIONS).connect_lazy_with(options.clone());
        let pool = pool(connections).connect_with(options).await.map_err(failed)?;
        let migrator = match dialect {
            Dialect::Sqlite => sqlx::migrate!("src/store/migrations/sqlite"),
            Dialect::Postgres => sqlx::migrate!("src/store/migrations/postgres"),
        };
        fault::point("migrate: before");
        migrator.run(&pool).await?;
        fault::point("migrate: done");
        let writers = match dialect {
            // It has one at a time, and those that wait for it do not queue up but try again and again.
            Dialect::Sqlite => 1,
            // One is left to whoever sweeps or operates.
            Dialect::Postgres => connections.saturating_sub(1).max(1) as usize,
        };
        Ok(Self { pool, vital_pool, writers, dialect, location: location.clone() })
    }

    /// Waits until every connection is closed.
    pub async fn close(&self) {
        self.pool.close().await;
        self.vital_pool.close().await;
    }

    /// How many transactions it is worth having under way at once: more would wait for a connection, and be given up.
    pub fn writers(&self) -> usize {
        self.writers
    }

    /// A connection that little else waits for: one that is not to be had means that the database is away.
    pub(super) async fn vital(&self) -> Result<PoolConnection<Any>, StoreError> {
        self.vital_pool.acquire().await.map_err(|error| match error {
            sqlx::Error::PoolTimedOut => StoreError::Unreachable(ACQUIRE),
            error => error.into(),
        })
    }

    /// Empties SQLite's write-ahead log, in which what was overwritten in the database lives on as it was. A failure
    /// takes nothing back that was done: the next one, or the end of the process, does it.
    pub async fn empty_the_log(&self) {
        if self.dialect == Dialect::Postgres {
            return;
        }
        let emptied = tokio::time::timeout(PATIENCE, async {
            let row = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(&self.pool).await?;
            // Its first column: whether somebody was in the way.
            Ok::<_, sqlx::Error>(row.try_get::<i64, _>(0)? == 0)
        });
        match emptied.await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) | Err(_) => {
                tracing::warn!(
                    "the database's -wal file is in use and keeps what was destroyed until the next time"
                );
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "the database's -wal file keeps what was destroyed until the next time");
            }
        }
    }

    pub(super) async fn begin(&self) -> Result<Tx, StoreError> {
        Ok(self.pool.begin().await?)
    }

    /// Begins what changes a stream: whoever changes it too waits until this is over, and every node hears of
    /// it. Returns the stream's new revision with the transaction.
    pub(super) async fn begin_change(&self, stream: &StreamId) -> Result<(Tx, i64), StoreError> {
        let mut tx = self.begin().await?;
        let rev = self.touch(&mut tx, stream).await?.ok_or(StoreError::NoStream)?;
        self.tell(&mut tx).await?;
        Ok((tx, rev))
    }

    /// Notes that a stream changes; `None` when it is not there. The first statement of its transaction, so that
    /// SQLite need not turn a reader into a writer.
    pub(super) async fn touch(&self, tx: &mut Tx, stream: &StreamId) -> Result<Option<i64>, StoreError> {
        let sql = both!(
            self.dialect,
            "UPDATE streams SET rev = rev + 1, changed_at_db = " now
            " WHERE id = $1 AND state <> 'deleted' RETURNING rev"
        );
        let row = sqlx::query(sql).bind(stream.as_str()).fetch_optional(&mut **tx).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    /// Wakes the nodes that listen, once the transaction is committed.
    pub(super) async fn tell(&self, tx: &mut Tx) -> Result<(), StoreError> {
        if self.dialect == Dialect::Postgres {
            (&mut **tx).execute("NOTIFY keyshield").await?;
        }
        Ok(())
    }
}

/// Commits, with a place to be killed at before and behind.
pub(super) async fn commit(tx: Tx, before: &'static str, behind: &'static str) -> Result<(), StoreError> {
    fault::point(before);
    tx.commit().await.map_err(|error| match super::is_undone(&error) {
        true => StoreError::Query(error),
        false => StoreError::Unanswered(error),
    })?;
    fault::point(behind);
    Ok(())
}

/// As [`bounded`], and once more where the database has undone the transaction for the sake of another that waited for
/// it: as a whole, so that doing it again is doing it once.
pub(super) async fn repeated<T, F>(work: impl Fn() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    bounded(async {
        let started = Instant::now();
        for _ in 1..ATTEMPTS {
            match work().await {
                Err(StoreError::Query(error)) if super::is_undone(&error) => {
                    tracing::debug!(%error, "the database has undone a transaction for another's sake");
                    // Not in step with the other one: what a wait took, to the microsecond, is as good as a die.
                    let jitter = started.elapsed().subsec_micros() % 64;
                    tokio::time::sleep(Duration::from_millis(5 + u64::from(jitter))).await;
                }
                done => return done,
            }
        }
        work().await
    })
    .await
}

/// What takes longer than [`PATIENCE`] is given up.
pub(super) async fn bounded<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or(Err(StoreError::TimedOut(PATIENCE)))
}

fn sqlite_url(path: &std::path::Path) -> String {
    const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_');
    format!("sqlite://{}?mode=rwc", utf8_percent_encode(&path.to_string_lossy(), PLAIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_named_without_its_password() {
        let check = |url: &str, name| assert_eq!(format!("{:?}", Location::Postgres(url.into())), name);
        check("postgres://keyshield:p@ss@db.example/keys?sslmode=require", "postgres://db.example/keys");
        check("postgres://db.example/keys?user=keyshield&password=pass", "postgres://db.example/keys");
        check("postgres://keyshield:p?ss@db.example/keys", "postgres://…");
    }

    #[test]
    fn both_databases_have_the_same_tables() {
        let check = |sqlite: &str, postgres: &str| assert_eq!(sqlite.replace("BLOB  ", "BYTEA "), postgres);
        check(
            include_str!("migrations/sqlite/0001_streams_and_keys.sql"),
            include_str!("migrations/postgres/0001_streams_and_keys.sql"),
        );
        check(
            include_str!("migrations/sqlite/0002_deliveries_and_incidents.sql"),
            include_str!("migrations/postgres/0002_deliveries_and_incidents.sql"),
        );
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_opened_names_its_path() {
        let location = Location::Sqlite("/nonexistent/a dir/test.db".into());
        let error = Store::open(&location, 1).await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/a dir/test.db"), "{error}");
    }
}
