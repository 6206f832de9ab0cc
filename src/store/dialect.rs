//! The few words in which SQLite and PostgreSQL differ.

/// The database behind a [`super::Store`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    /// The statement for this database.
    pub(super) fn pick(self, sqlite: &'static str, postgres: &'static str) -> &'static str {
        match self {
            Dialect::Sqlite => sqlite,
            Dialect::Postgres => postgres,
        }
    }

    /// A table `r` of what stands in the JSON list `$1`; a column's type is `text` or `bigint`.
    pub(super) fn rows(self, columns: &[(&str, &str)]) -> String {
        let list = |column: &dyn Fn(&(&str, &str)) -> String| {
            columns.iter().map(column).collect::<Vec<_>>().join(", ")
        };
        match self {
            Dialect::Sqlite => {
                let columns = list(&|(name, _)| format!("json_extract(value, '$.{name}') AS {name}"));
                format!("(SELECT {columns} FROM json_each($1)) AS r")
            }
            Dialect::Postgres => {
                let columns = list(&|(name, kind)| format!("{name} {kind}"));
                format!("json_to_recordset(CAST($1 AS json)) AS r ({columns})")
            }
        }
    }

    /// The bytes that a column's hex digits stand for.
    pub(super) fn unhex(self, column: &str) -> String {
        match self {
            Dialect::Sqlite => format!("unhex({column})"),
            Dialect::Postgres => format!("decode({column}, 'hex')"),
        }
    }

    /// Locks the keys that stand in the JSON list `$1` by stream and ordinal in one order, where a writer does not lock
    /// everything.
    pub(super) fn lock_keys(self) -> Option<String> {
        let rows = self.rows(&[("stream", "text"), ("n", "bigint")]);
        let sql = || {
            format!(
                "SELECT k.id FROM content_keys AS k JOIN {rows} ON k.stream_id = r.stream AND k.ordinal = r.n
                 ORDER BY k.stream_id, k.ordinal FOR NO KEY UPDATE OF k"
            )
        };
        (self == Dialect::Postgres).then(sql)
    }

    /// Locks the streams of the JSON list `$1` in the order of their IDs, where a writer does not lock everything.
    pub(super) fn lock_streams(self) -> Option<&'static str> {
        match self {
            Dialect::Sqlite => None,
            Dialect::Postgres => Some(
                "SELECT id FROM streams WHERE id IN (SELECT json_array_elements_text(CAST($1 AS json)))
                 ORDER BY id FOR NO KEY UPDATE",
            ),
        }
    }
}

/// A statement in both dialects, from one text: `{now}` is the database's time in milliseconds, `{ids}` the
/// members of the JSON list `$1`.
macro_rules! both {
    ($dialect:expr, $($part:tt)+) => {
        $dialect.pick(
            $crate::store::dialect::expand!(
                "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
                "SELECT value FROM json_each($1)",
                $($part)+
            ),
            $crate::store::dialect::expand!(
                "CAST(extract(epoch FROM clock_timestamp()) * 1000 AS BIGINT)",
                "SELECT json_array_elements_text(CAST($1 AS json))",
                $($part)+
            ),
        )
    };
}

/// Puts literals together, with `now` and `ids` in their places.
macro_rules! expand {
    (@ [$($done:tt)*] $now:literal, $ids:literal,) => { concat!($($done)*) };
    (@ [$($done:tt)*] $now:literal, $ids:literal, now $($rest:tt)*) => {
        $crate::store::dialect::expand!(@ [$($done)* $now,] $now, $ids, $($rest)*)
    };
    (@ [$($done:tt)*] $now:literal, $ids:literal, ids $($rest:tt)*) => {
        $crate::store::dialect::expand!(@ [$($done)* $ids,] $now, $ids, $($rest)*)
    };
    (@ [$($done:tt)*] $now:literal, $ids:literal, $text:literal $($rest:tt)*) => {
        $crate::store::dialect::expand!(@ [$($done)* $text,] $now, $ids, $($rest)*)
    };
    ($now:literal, $ids:literal, $($part:tt)+) => {
        $crate::store::dialect::expand!(@ [] $now, $ids, $($part)+)
    };
}

pub(super) use {both, expand};
