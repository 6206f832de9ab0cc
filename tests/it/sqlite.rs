//! A look into a shield's database, and a hand in it, while no shield has it open.

use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{Connection, SqliteConnection};

/// What SQLite answers.
pub fn query(database: &Path, sql: &str) -> Vec<SqliteRow> {
    let sql = sqlx::AssertSqlSafe(sql.to_owned());
    let options = SqliteConnectOptions::new().filename(database);
    runtime().block_on(async {
        let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
        let rows = sqlx::query(sql).fetch_all(&mut connection).await.unwrap();
        connection.close().await.unwrap();
        rows
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}
