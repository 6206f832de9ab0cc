//! Where the state is kept: an SQLite file, or PostgreSQL.

use std::fmt;
use std::path::PathBuf;

use url::Url;

use super::ConfigError;
use super::checks::field;
use super::secrets::masked_url;

/// Where the state is kept. Neither `Display` nor `Debug` shows a password.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    Sqlite(PathBuf),
    /// A `postgres://` or `postgresql://` URL.
    Postgres(String),
}

impl Database {
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        let bad = |why| field("store.database", masked_url(text), why);
        match text.split_once("://") {
            None if text.is_empty() => Err(bad("must be the path of an SQLite file or a postgres:// URL")),
            None => Ok(Self::Sqlite(text.into())),
            Some(("postgres" | "postgresql", _)) => match Url::parse(text) {
                Ok(_) => Ok(Self::Postgres(text.to_owned())),
                Err(_) => {
                    Err(bad("is not a URL; characters such as / # ? in a password are written %2F %23 %3F"))
                }
            },
            Some(_) => Err(bad("must be the path of an SQLite file or begin with postgres://")),
        }
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "{}", path.display()),
            Self::Postgres(url) => f.write_str(&masked_url(url)),
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => f.debug_tuple("Sqlite").field(path).finish(),
            Self::Postgres(url) => f.debug_tuple("Postgres").field(&masked_url(url)).finish(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_a_path_or_a_postgres_url() {
        assert_eq!(Database::parse("a/b.db").unwrap(), Database::Sqlite("a/b.db".into()));
        for url in ["postgres://u:secret@db/keys", "postgresql:///keys?host=/run/postgresql&password=secret"]
        {
            let database = Database::parse(url).unwrap();
            assert_eq!(database, Database::Postgres(url.into()));
            assert!(!format!("{database} {database:?}").contains("secret"));
        }
    }

    #[test]
    fn a_wrong_database_is_named_without_its_password() {
        for text in ["", "mysql://u:secret@db/keys", "sqlite://keys.db", "postgres://u:sec/secret@db/keys"] {
            let error = Database::parse(text).unwrap_err().to_string();
            assert!(error.contains("store.database") && !error.contains("secret"), "{error}");
        }
    }
}
