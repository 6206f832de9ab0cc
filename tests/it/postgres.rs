//! A PostgreSQL cluster of the tests' own, from Debian's binaries: started when the first test asks for it, shared
//! by all that run meanwhile, gone with the last of them.
//!
//! Nothing that a test stores is worth keeping, so nothing is synced to disk; a bench, which wants to know what that
//! costs, has it as in production. Deliberately absent: passwords and sockets; it listens on loopback, on a port that
//! nobody else is given.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tempfile::TempDir;

use crate::daemon::{Daemon, as_user};
use crate::machine::free_port;

/// Settings for what need not survive: the loss of power may take it.
const THROW_AWAY: &[&str] =
    &["max_connections=200", "shared_buffers=16MB", "fsync=off", "full_page_writes=off"];

/// A running cluster.
pub struct Postgres {
    // Before the folder: fields are dropped in order.
    _server: Daemon,
    _dir: TempDir,
    programs: PathBuf,
    port: u16,
    databases: AtomicU32,
}

impl Postgres {
    /// The cluster of this process, started if none is running.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Postgres>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock();
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Self::start(THROW_AWAY));
            *shared = Arc::downgrade(&started);
            started
        })
    }

    /// A cluster with settings of one's own over PostgreSQL's.
    pub fn start(settings: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("postgres").tempdir().unwrap();
        let (programs, port) = (programs(), free_port());
        let program = |name: &str| programs.join(name).display().to_string();
        let (initdb, postgres, pg_isready) = (program("initdb"), program("postgres"), program("pg_isready"));
        let data = dir.path().join("data").display().to_string();
        // PostgreSQL refuses to be root.
        let as_postgres = as_user(dir.path(), ["postgres", "postgres"]);
        let as_postgres: Vec<&str> = as_postgres.iter().map(String::as_str).collect();

        let make = [&initdb, "-D", &data, "-U", "postgres", "-A", "trust", "--no-sync", "--locale=C.UTF-8"];
        // Text is sorted as most installations sort it, which is not by its bytes.
        let sorting = ["--locale-provider=icu", "--icu-locale=en-US"];
        run(&[&as_postgres[..], &make[..], &sorting[..]].concat());
        let port_option = format!("port={port}");
        let mut serve = [&as_postgres[..], &[&postgres, "-D", &data]].concat();
        let reached = [&port_option, "listen_addresses=127.0.0.1", "unix_socket_directories="];
        for option in reached.iter().chain(settings) {
            serve.extend(["-c", option]);
        }
        let server = Daemon::start(&serve, "QUIT", dir.path().join("server.log"));
        let port_text = port.to_string();
        server.wait_until(|| {
            Command::new(&pg_isready)
                .args(["-q", "-h", "127.0.0.1", "-p", &port_text])
                .status()
                .is_ok_and(|status| status.success())
        });
        Self { _server: server, _dir: dir, programs, port, databases: AtomicU32::new(0) }
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Makes an empty database and gives its URL.
    pub fn database(&self) -> String {
        self.database_at(self.address())
    }

    /// As [`Self::database`], with the URL by which it is reached through a proxy at `address`.
    pub fn database_at(&self, address: SocketAddr) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        url(address, &name)
    }

    /// What `psql` answers to a statement in one of the databases.
    pub fn sql(&self, database: &str, statement: &str) -> String {
        let psql = self.programs.join("psql").display().to_string();
        let database = url(self.address(), database);
        run(&[&psql, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", &database, "-c", statement])
    }
}

fn url(address: SocketAddr, database: &str) -> String {
    format!("postgres://postgres@{address}/{database}")
}

/// Where the newest of the installed versions has its programs.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let folders = versions.map(|version| version.unwrap().path());
    let version = |folder: &PathBuf| folder.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = folders.filter(|folder| folder.join("bin/initdb").exists()).max_by_key(version);
    newest.expect("scripts/bootstrap.sh test installs PostgreSQL").join("bin")
}

/// Runs a command to its end, which must be good, and gives what it printed.
fn run(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).current_dir("/").output();
    let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

#[test]
fn each_database_is_empty_and_on_its_own() {
    let postgres = Postgres::shared();
    let (one, other) = (postgres.database(), postgres.database());
    assert_ne!(one, other);
    let name = |url: &str| url.rsplit('/').next().unwrap().to_owned();
    postgres.sql(&name(&one), "CREATE TABLE t (n int); INSERT INTO t VALUES (7)");
    assert_eq!(postgres.sql(&name(&one), "SELECT n FROM t"), "7");
    assert_eq!(postgres.sql(&name(&other), "SELECT count(*) FROM pg_tables WHERE tablename = 't'"), "0");
}

#[test]
fn the_cluster_ends_with_its_last_user() {
    let postgres = Postgres::start(THROW_AWAY);
    let address = postgres.address();
    assert!(std::net::TcpStream::connect(address).is_ok());
    drop(postgres);
    assert!(std::net::TcpStream::connect(address).is_err());
}
