//! What a shield does while it is killed: operators' calls, a configuration that changed, keys that are destroyed, a
//! database that is away for a moment, a CDN that is kept in step.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use sqlx::Row;
use tempfile::TempDir;

use super::cdn;
use super::media::NAME;
use super::session::{Call, Died, Memory, PRE_GENERATED_KEYS, Published, SEGMENTS_PER_KEY, Session, Stream};
use crate::harness::wait_for;
use crate::postgres::Postgres;
use crate::sqlite::query;
use crate::wire::Wire;

/// Where a shield begins, and what is asked of it.
pub struct Scenario {
    pub name: &'static str,
    /// How the names of the points begin at which it is killed: those for whose sake it is there.
    pub points: &'static [&'static str],
    config: String,
    begin: Begin,
    /// With a CDN before the shield.
    has_cdn: bool,
    drive: fn(&mut Session) -> Result<(), Died>,
}

enum Begin {
    /// With nothing.
    Empty,
    /// With an empty database of a server.
    Postgres(Arc<Postgres>),
    /// As with [`Self::Postgres`], over a wire.
    Wired(Arc<Postgres>),
    /// With a copy of what an earlier one left.
    Copy(TempDir),
}

const SQLITE: &str = "[store]\ndatabase = \"{dir}/keyshield.db\"\n";

impl Scenario {
    /// A shield that is being started.
    pub fn start(&self, memory: &Memory, environment: &[(&str, &str)]) -> Session {
        let fleet =
            |url| format!("[store]\ndatabase = \"{url}\"\npoll_interval_millis = 200\nlease_secs = 2\n");
        let (mut dir, mut wire) = (None, None);
        let store = match &self.begin {
            Begin::Empty => SQLITE.to_owned(),
            Begin::Postgres(postgres) => fleet(postgres.database()),
            Begin::Wired(postgres) => {
                let wire = wire.insert(Wire::to(postgres.address()));
                fleet(postgres.database_at(wire.address))
            }
            Begin::Copy(prepared) => {
                dir = Some(copy(prepared.path()));
                SQLITE.to_owned()
            }
        };
        let dir = dir.unwrap_or_else(|| tempfile::tempdir().unwrap());
        let (cdn, of_cdn) = self.has_cdn.then(cdn::start).unzip();
        let config = store + &self.config + &of_cdn.unwrap_or_default();
        let mut session = Session::start(dir, memory.clone(), &config, environment);
        session.wire = wire;
        session.cdn = cdn;
        session
    }

    pub fn drive(&self, session: &mut Session) -> Result<(), Died> {
        session.wait_until_ready()?;
        (self.drive)(session)
    }
}

/// From nothing to streams that run, one of them with a key that was taken back.
pub fn begun() -> (Scenario, Memory) {
    let config = config(&[LIVE]);
    let scenario =
        Scenario { name: "begun", points: ALL, config, begin: Begin::Empty, has_cdn: false, drive: begin };
    (scenario, memory(&["live"]))
}

/// From there to a shield that is stopped in good order.
pub fn ended() -> (Scenario, Memory) {
    let config = config(&[LIVE]);
    let (dir, memory) = prepare(&config, memory(&["live"]), begin);
    (
        Scenario { name: "ended", points: ALL, config, begin: Begin::Copy(dir), has_cdn: false, drive: end },
        memory,
    )
}

/// Both, on a fleet's store.
pub fn on_postgres(postgres: Arc<Postgres>) -> (Scenario, Memory) {
    let config = config(&[LIVE]);
    let drive = |session: &mut Session| begin(session).and_then(|()| end(session));
    let begin = Begin::Postgres(postgres);
    (Scenario { name: "PostgreSQL", points: ALL, config, begin, has_cdn: false, drive }, memory(&["live"]))
}

const ALL: &[&str] = &[""];
const LIVE: (&str, &str, &str) = ("live", "live", "");

fn begin(session: &mut Session) -> Result<(), Died> {
    session.play_all()?;
    session.act("own", Call::Initialize(SEGMENTS_PER_KEY))?;
    session.go_on(2)?;
    session.act("live", Call::Rotate)?;
    session.act("live", Call::RotateDek)?;
    session.go_on(3)?;
    session.act("live", Call::Revoke)?;
    session.play_all()
}

fn end(session: &mut Session) -> Result<(), Died> {
    session.act("own", Call::Update(SEGMENTS_PER_KEY + 1))?;
    session.act("own", Call::Rotate)?;
    session.go_on(2)?;
    session.act("own", Call::Stop)?;
    // By the call that began it: what was changed since stays.
    session.act("own", Call::Initialize(SEGMENTS_PER_KEY))?;
    session.play("own")?;
    session.act("own", Call::Delete)?;
    session.act("own", Call::Initialize(SEGMENTS_PER_KEY))?;
    session.go_on(3)?;
    session.act("own", Call::Erase)?;
    session.end()
}

/// The configuration has other rules for one stream, and another place for another one.
pub fn redeclared() -> (Scenario, Memory) {
    let before = config(&[LIVE, ("moved", "moved", "")]);
    let (dir, mut memory) = prepare(&before, memory(&["live", "moved"]), |session| {
        session.play_all()?;
        session.act("own", Call::Initialize(SEGMENTS_PER_KEY))?;
        session.go_on(2)
    });
    let moved = memory.streams.get_mut("moved").expect("it was declared");
    moved.end(super::session::State::Running);
    moved.folder = "elsewhere";
    let live = memory.streams.get_mut("live").expect("it was declared");
    live.segments_per_key = Some(SEGMENTS_PER_KEY + 2);
    let rules = format!("rotation_interval_minutes = 0.02\nsegments_per_key = {}\n", SEGMENTS_PER_KEY + 2);
    // More keys within a playlist than are made ahead.
    let dense = ("dense", "dense", "segments_per_key = 1\n");
    memory.streams.insert("dense", Stream::new("dense"));
    let config = config(&[("live", "live", &rules), ("moved", "elsewhere", ""), dense]);
    let drive = |session: &mut Session| {
        session.play_all()?;
        (0..4).try_for_each(|_| session.go_on(2))
    };
    let points = &["declare", "register", "delete", "update", "make", "extend", "apply", "sweep"];
    (Scenario { name: "redeclared", points, config, begin: Begin::Copy(dir), has_cdn: false, drive }, memory)
}

/// Keys whose time is over.
pub fn destroyed() -> (Scenario, Memory) {
    let config = config(&[LIVE]);
    let (dir, mut memory) = prepare(&config, memory(&["live"]), |session| {
        session.play_all()?;
        // Its keys are among those whose time is over.
        session.act("live", Call::RotateDek)?;
        session.go_on(3)?;
        session.act("live", Call::Revoke)?;
        (0..4).try_for_each(|_| session.go_on(3))?;
        wait_for("keys that are not in use any more", || {
            match session.control("GET", "live/keys", Value::Null) {
                Ok((_, body)) => {
                    let retired =
                        |key: &Value| key["state"] == "deactivated" || key["state"] == "compromised";
                    let count =
                        body["keys"].as_array().expect("keys").iter().filter(|key| retired(key)).count();
                    (count >= 3).then_some(Ok(()))
                }
                Err(Died) => Some(Err(Died)),
            }
        })
    });
    let condemned = grow_old(dir.path());
    assert!(condemned.len() >= 3, "{condemned:?}");
    let live = memory.streams.get_mut("live").expect("it was declared");
    let is_condemned =
        |segment: &Published| condemned.iter().any(|id| segment.key_path.ends_with(id.as_str()));
    let published = live.published.values().flatten();
    live.condemned = published.filter(|segment| is_condemned(segment)).cloned().collect();
    live.published.retain(|_, versions| !versions.iter().any(is_condemned));
    assert!(!live.published.is_empty() && !live.condemned.is_empty());
    let drive = |session: &mut Session| {
        session.play_all()?;
        session.check_condemned("live")?;
        session.go_on(1)
    };
    let points = &["destroy", "shred", "apply", "sweep", "report"];
    (Scenario { name: "destroyed", points, config, begin: Begin::Copy(dir), has_cdn: false, drive }, memory)
}

/// The master key is rolled, and what it wraps follows it.
pub fn rewrapped() -> (Scenario, Memory) {
    let config = config(&[LIVE, ("other", "other", "")]);
    let (dir, mut memory) = prepare(&config, memory(&["live", "other"]), |session| {
        session.play_all()?;
        session.act("own", Call::Initialize(SEGMENTS_PER_KEY))?;
        session.go_on(2)
    });
    let file = dir.path().join("keyshield.master");
    let old = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("rolled:{}\n{old}", "5a".repeat(32))).unwrap();
    memory.rewrapped = Some("local:rolled");
    let drive = |session: &mut Session| {
        session.play_all()?;
        session.rewrap()?;
        session.go_on(2)
    };
    (
        Scenario {
            name: "re-wrapped",
            points: &["re-wrap"],
            config,
            begin: Begin::Copy(dir),
            has_cdn: false,
            drive,
        },
        memory,
    )
}

/// The store is away for a while, the count calls for keys meanwhile, and the store is back.
pub fn store_away(postgres: Arc<Postgres>) -> (Scenario, Memory) {
    let config = config(&[LIVE]);
    let drive = |session: &mut Session| {
        session.play_all()?;
        session.go_on(1)?;
        session.wire().cut();
        // Beyond the boundary that is known ahead, and the one behind it.
        session.media.advance(u64::from(SEGMENTS_PER_KEY) + 2);
        session.play_all()?;
        session.wire().mend();
        (0..6).try_for_each(|_| session.go_on(1))
    };
    let (name, points) = ("store away", &["what waits"]);
    (
        Scenario { name, points, config, begin: Begin::Wired(postgres), has_cdn: false, drive },
        memory(&["live"]),
    )
}

/// A CDN gets the keys of streams that begin, and lets go of those that are taken back, and of a stream that ends.
pub fn delivered() -> (Scenario, Memory) {
    let config = config(&[LIVE]);
    let drive = |session: &mut Session| {
        session.play_all()?;
        session.wait_until_delivered()?;
        session.act("own", Call::Initialize(SEGMENTS_PER_KEY))?;
        session.play("own")?;
        session.wait_until_delivered()?;
        session.act("live", Call::Revoke)?;
        session.play_all()?;
        session.act("own", Call::Delete)?;
        session.wait_until_let_go().map(drop)
    };
    let points = &["deliver", "purge", "incident", "drop deliveries", "seal under"];
    let scenario = Scenario { name: "delivered", points, config, begin: Begin::Empty, has_cdn: true, drive };
    (scenario, memory(&["live"]))
}

fn memory(declared: &[&'static str]) -> Memory {
    let streams = declared.iter().map(|id| (*id, Stream::new(id)));
    Memory { first: 100, streams: streams.collect(), ..Memory::default() }
}

/// A configuration of streams: each with its folder and rules of its own.
fn config(streams: &[(&str, &str, &str)]) -> String {
    let mut config = format!(
        "[policy]\nsegments_per_key = {SEGMENTS_PER_KEY}\npre_generate_keys = {PRE_GENERATED_KEYS}\n\
         lead_segments = 1\nrotation_interval_minutes = 0\n"
    );
    for (id, folder, rules) in streams {
        let url = format!("{NAME}/{folder}/index.m3u8");
        config.push_str(&format!("[[streams]]\nid = \"{id}\"\nplaylist_url = \"{url}\"\n"));
        config.push_str(&format!("[streams.policy]\n{rules}"));
    }
    config
}

/// What a shield leaves that was killed after it had done something.
fn prepare(
    config: &str,
    memory: Memory,
    act: impl FnOnce(&mut Session) -> Result<(), Died>,
) -> (TempDir, Memory) {
    let dir = tempfile::tempdir().unwrap();
    let mut session = Session::start(dir, memory, &(SQLITE.to_owned() + config), &[]);
    session.wait_until_ready().and_then(|()| act(&mut session)).expect("nothing kills it");
    session.into_state()
}

/// A copy of the files of a shield that has ended.
fn copy(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// Makes an hour pass for the keys that are not in use any more, and gives their IDs.
fn grow_old(dir: &Path) -> Vec<String> {
    let retired = "WHERE state IN ('deactivated', 'compromised')";
    let database = dir.join("keyshield.db");
    let sql = format!(
        "UPDATE content_keys SET created_at = created_at - 3600000, activated_at = activated_at - 3600000,
            deactivated_at = deactivated_at - 3600000, compromised_at = compromised_at - 3600000,
            transition_until = transition_until - 3600000, last_named_at = last_named_at - 3600000 {retired}"
    );
    query(&database, &sql);
    let rows = query(&database, &format!("SELECT id FROM content_keys {retired}"));
    rows.iter().map(|row| row.get("id")).collect()
}
