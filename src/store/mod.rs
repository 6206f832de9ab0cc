//! What must survive the process: streams, wrapped keys, boundaries.
//!
//! Every method is one transaction, and doing it twice is doing it once. The store holds no secret that it
//! could read: keys come to it wrapped. Deliberately absent: what the rows mean together (`engine`).

mod rows;
mod sqlite;

pub use rows::{BoundaryRow, DekRow, KeyRow, RenditionRow, StoredStream};
pub use sqlite::Store;

use thiserror::Error;

/// Why the store could not do what it was asked.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("cannot open the database {path}: {source}")]
    Open { path: String, source: sqlx::Error },
    #[error("cannot bring the database to this version's schema: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    #[error("the database refused: {0}")]
    Query(#[from] sqlx::Error),
    #[error("the database holds {what} {value:?}, which this version cannot read")]
    Unreadable { what: &'static str, value: String },
}
