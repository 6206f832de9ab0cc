//! Where the engine's streams are kept, and the renditions that are served of them.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::OnceLock;

use keyshield::keys::Timestamp;
use keyshield::store::Location;
use sqlx::{AnyConnection, Connection, Executor};

use crate::postgres::Postgres;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// No engine and no store: facts alone.
    Pure,
    Sqlite,
    Postgres,
}

impl Place {
    const ALL: [(&str, Place); 3] =
        [("pure", Place::Pure), ("sqlite", Place::Sqlite), ("postgres", Place::Postgres)];
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, place)| place).ok_or_else(|| "pure, sqlite or postgres".to_owned())
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL.into_iter().find(|(_, place)| place == self).map(|(name, _)| name);
        f.write_str(name.unwrap_or_default())
    }
}

/// The databases. PostgreSQL, with its own settings, is started when it is first asked for.
#[derive(Default)]
pub struct Places {
    postgres: OnceLock<Postgres>,
}

impl Places {
    /// An empty database.
    pub fn make(&self, place: Place, dir: &Path) -> Location {
        match place {
            Place::Postgres => {
                let server = self.postgres.get_or_init(|| Postgres::start(&[]));
                Location::Postgres(server.database())
            }
            Place::Pure | Place::Sqlite => Location::Sqlite(dir.join("keyshield.db")),
        }
    }
}

/// Gives every stream three renditions under its first key, as if players had asked for them at `now`.
///
/// Not through the engine, which stores them one by one as players come: what is measured begins after that.
pub async fn serve_renditions(location: &Location, now: Timestamp) -> anyhow::Result<()> {
    let url = match location {
        Location::Sqlite(path) => format!("sqlite://{}", path.display()),
        Location::Postgres(url) => url.clone(),
    };
    let mut connection = AnyConnection::connect(&url).await?;
    let now = now.as_unix_millis();
    for path in ["360p.m3u8", "720p.m3u8", "1080p.m3u8"] {
        let boundaries = format!(
            "INSERT INTO boundaries (stream_id, rendition, seq, epoch, ordinal, first_msn, segments, reason,
                                     edge_first, edge_end, created_at)
             SELECT id, prefix || '{path}', 0, 0, 0, 100, 100, 'start', 100, 106, {now} FROM streams"
        );
        let renditions = format!(
            "INSERT INTO renditions (stream_id, rendition, ended, keeps_all, target_millis, longest_millis, epoch,
                                     edge_first, edge_end, last_served_at, reported_at_db)
             SELECT id, prefix || '{path}', 0, 0, 6000, 36000, 0, 100, 106, {now}, 0 FROM streams"
        );
        connection.execute(sqlx::AssertSqlSafe(boundaries)).await?;
        connection.execute(sqlx::AssertSqlSafe(renditions)).await?;
    }
    if let Location::Postgres(_) = location {
        // Its own housekeeping would count the new rows within a minute.
        connection.execute("ANALYZE").await?;
    }
    connection.close().await?;
    Ok(())
}
