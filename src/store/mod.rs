//! What must survive the process, and what nodes tell one another: streams, wrapped keys, boundaries,
//! what CDNs have, incidents.
//!
//! One [`Store`] over SQLite (one file, one process) and PostgreSQL (a fleet): the same tables and, but for a few
//! words, the same statements. Every method is one transaction, and doing it twice is doing it once. The store
//! holds no secret that it could read: keys come to it wrapped. Deliberately absent: what the rows mean together
//! (`engine`).

mod apply;
mod deks;
mod deliveries;
mod dialect;
mod fleet;
mod incidents;
mod keys;
mod open;
mod rows;
mod schedules;
mod streams;

pub use deks::{DekCursor, Replaced, StoredDek};
pub use deliveries::{CdnStateRow, DeliveryRow, DeliveryState};
pub use fleet::{Changes, Lease, News};
pub use incidents::{IncidentCdnRow, IncidentRow, NewIncident, PurgeState};
pub use keys::{Applied, Write, WriteOp};
pub use open::{Location, Store};
pub use rows::{
    BoundaryRow, CdnRow, DekRow, KeyLife, KeyRow, RenditionRow, StoredStream, StreamRow, StreamState,
};
pub use schedules::Served;
pub use streams::{Registered, Removed};

use thiserror::Error;

/// Why the store could not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("cannot open the database {database}: {source}")]
    Open { database: String, source: sqlx::Error },
    #[error("cannot bring the database to this version's schema: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    #[error("the database refused: {0}")]
    Query(#[from] sqlx::Error),
    #[error("the database could not be reached within {0:?}")]
    Unreachable(std::time::Duration),
    #[error("the database did not answer within {0:?}")]
    TimedOut(std::time::Duration),
    #[error("the database did not say whether it stored the change: {0}")]
    Unanswered(sqlx::Error),
    #[error("the stream is not there any more")]
    NoStream,
    #[error("the database holds {what} {value:?}, which this version cannot read")]
    Unreadable { what: &'static str, value: String },
}

/// Whether a transaction was undone as a whole because another waited for it: PostgreSQL's deadlock, and what databases
/// that speak its protocol call a serialization failure.
fn is_undone(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| ["40P01", "40001"].contains(&&*code))
}

impl StoreError {
    /// Whether the change may have been stored all the same.
    pub fn may_be_stored(&self) -> bool {
        matches!(self, StoreError::TimedOut(_) | StoreError::Unanswered(_))
    }

    /// Whether the database is out of reach, rather than at odds with what was asked.
    pub fn is_away(&self) -> bool {
        use sqlx::Error::{Io, PoolClosed, Protocol, Tls, WorkerCrashed};
        match self {
            StoreError::TimedOut(_)
            | StoreError::Unanswered(_)
            | StoreError::Unreachable(_)
            | StoreError::Open { .. } => true,
            StoreError::Query(Io(_) | Tls(_) | Protocol(_) | PoolClosed | WorkerCrashed) => true,
            // PostgreSQL's classes of a server that is starting, stopping, cutting connections off or not letting
            // us in, and of one that only reads, as a standby does until it is promoted (appendix A).
            StoreError::Query(sqlx::Error::Database(error)) => error.code().is_some_and(|code| {
                ["08", "28", "3D", "53", "57", "58"]
                    .iter()
                    .any(|class| code.len() == 5 && code.starts_with(class))
                    || code == "25006"
            }),
            _ => false,
        }
    }

    /// Whether it would have had to wait for others for too long: for a connection, or for SQLite's one writer. Nothing
    /// was stored.
    pub fn is_busy(&self) -> bool {
        match self {
            StoreError::Query(sqlx::Error::PoolTimedOut) => true,
            // SQLite's "busy" and "locked".
            StoreError::Query(sqlx::Error::Database(error)) => {
                error.code().is_some_and(|code| ["5", "6", "517"].contains(&&*code))
            }
            _ => false,
        }
    }
}
