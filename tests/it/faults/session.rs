//! One shield under test, what was asked of it, and what it published: enough to know, after it was killed and
//! started again, what must still hold.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use aes::Aes128;
use aes::cipher::block_padding::Pkcs7;
use aes::cipher::{BlockModeDecrypt, KeyIvInit};
use serde_json::{Value, json};
use tempfile::TempDir;
use url::Url;

use super::media::{Media, NAME, RENDITIONS, clear};
use crate::cdn::caches::AgentHandle;
use crate::control_api::tokens;
use crate::harness::{Answer, Running, Segment, agent, pause, segments, try_ask_by, wait_for};
use crate::origin::Origin;
use crate::wire::Wire;

/// A little longer than the shield takes a playlist of this target duration for fresh.
const FRESHNESS: Duration = Duration::from_millis(260);
/// Of every stream.
pub const PRE_GENERATED_KEYS: usize = 2;
pub const SEGMENTS_PER_KEY: u32 = 3;

/// The process is gone.
#[derive(Debug)]
pub struct Died;

/// What an operator asks of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// With so many segments per key.
    Initialize(u32),
    Update(u32),
    Rotate,
    RotateDek,
    Revoke,
    Stop,
    Delete,
    Erase,
}

/// Where a stream's last answered call left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Running,
    Stopped,
    Deleted,
    Erased,
}

/// A segment as a playlist named it. Without the shield's address, which changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub path: String,
    /// With its query.
    pub target: String,
    pub key_path: String,
    pub iv: String,
    /// The origin's path.
    pub clear_path: String,
}

/// What is known of a stream.
#[derive(Debug, Clone)]
pub struct Stream {
    pub folder: &'static str,
    pub state: State,
    /// By rendition and Media Sequence Number; more than once where it was re-keyed.
    pub published: BTreeMap<(&'static str, u64), Vec<Published>>,
    /// Paths of keys that were taken back.
    pub revoked: BTreeSet<String>,
    /// Paths of keys that must be gone.
    pub gone: BTreeSet<String>,
    /// What was published under keys whose time is over.
    pub condemned: Vec<Published>,
    /// IDs of the keys that were rotated to by hand.
    pub rotated: Vec<String>,
    /// As an update made it.
    pub segments_per_key: Option<u32>,
}

impl Stream {
    pub fn new(folder: &'static str) -> Self {
        Self {
            folder,
            state: State::Running,
            published: BTreeMap::new(),
            revoked: BTreeSet::new(),
            gone: BTreeSet::new(),
            condemned: Vec::new(),
            rotated: Vec::new(),
            segments_per_key: None,
        }
    }

    /// Nothing of what was published is to be had any more.
    pub fn end(&mut self, state: State) {
        self.state = state;
        let published = std::mem::take(&mut self.published).into_values().flatten();
        self.gone.extend(published.map(|segment| segment.key_path));
    }
}

/// What outlives the shield.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    pub first: u64,
    pub streams: BTreeMap<&'static str, Stream>,
    /// The bytes of keys, by their paths, as they were first had.
    pub keys: BTreeMap<String, Vec<u8>>,
    /// The KMS's key that all data encryption keys are to be under in the end.
    pub rewrapped: Option<&'static str>,
    /// The call that was not answered.
    pub pending: Option<(&'static str, Call)>,
}

/// A shield, its origin, and what is known of them.
pub struct Session {
    pub memory: Memory,
    pub media: Media,
    _origin: Origin,
    config: String,
    agent: ureq::Agent,
    shield: Option<Running>,
    /// Between the shield and its database.
    pub wire: Option<Wire>,
    /// Before the shield, for keys alone.
    pub cdn: Option<AgentHandle>,
}

impl Session {
    /// Starts a shield on the state in `dir`. `{dir}` in the configuration is that folder.
    pub fn start(dir: TempDir, memory: Memory, config: &str, environment: &[(&str, &str)]) -> Self {
        let (media, origin) = Media::start(memory.first);
        let config = format!(
            "{}\n[kms]\nmaster_key_file = \"{{dir}}/keyshield.master\"\n[keys]\nsweep_interval_millis = 50\n\
             [[origins]]\nname = \"main\"\nurls = [\"{}\", \"{NAME}\"]\n{}",
            config,
            origin.url(),
            tokens()
        );
        let config = config.replace("{dir}", &dir.path().display().to_string());
        let shield = Some(Running::launch(dir, &config, environment));
        Self { memory, media, _origin: origin, config, agent: agent(), shield, wire: None, cdn: None }
    }

    pub fn shield(&self) -> &Running {
        self.shield.as_ref().expect("it is there but for a restart")
    }

    pub fn wire(&self) -> &Wire {
        self.wire.as_ref().expect("its scenario has one")
    }

    pub fn wait_until_ready(&mut self) -> Result<(), Died> {
        wait_for("a shield that is ready, or dead", || {
            let ended = self.shield.as_mut().and_then(Running::ended);
            ended.map(|_| Err(Died)).or_else(|| self.shield().is_ready().then_some(Ok(())))
        })
    }

    pub fn has_ended(&mut self) -> bool {
        self.shield.as_mut().expect("it is there").ended().is_some()
    }

    /// Starts it again where it died, and this time nothing kills it.
    pub fn restart(&mut self) {
        let mut dead = self.shield.take().expect("it is there");
        let ended = dead.ended().expect("it has ended");
        assert!(ended.success() || ended.signal() == Some(6), "{ended:?}: {}", dead.logged());
        if let Some(wire) = &self.wire {
            wire.mend();
        }
        // Connections to the old one are of no use.
        self.agent = agent();
        // The origin has gone on meanwhile: what was decided and lost would now be decided otherwise.
        self.media.advance(1);
        self.shield = Some(Running::launch(dead.kill(), &self.config, &[]));
        if self.wait_until_ready().is_err() {
            panic!("it does not start again: {}", self.shield().logged());
        }
    }

    /// Ends the shield in good order.
    pub fn end(&mut self) -> Result<(), Died> {
        let shield = self.shield.as_mut().expect("it is there");
        if shield.ended().is_none() {
            // It may die before it hears of it.
            let _ = Command::new("kill").args(["-TERM", &shield.id().to_string()]).status();
        }
        let ended = wait_for("the end", || shield.ended());
        if ended.success() { Ok(()) } else { Err(Died) }
    }

    /// Kills the shield; its folder and what is known of it can be copied and gone on with.
    pub fn into_state(mut self) -> (TempDir, Memory) {
        let dir = self.shield.take().expect("it is there").kill();
        self.memory.first = self.media.first();
        (dir, self.memory)
    }

    /// A call failed: the process must be gone.
    fn died(&mut self, what: &str, error: &dyn std::fmt::Display) -> Died {
        let shield = self.shield.as_mut().expect("it is there");
        // Its sockets are closed a moment before it is seen to be gone.
        for _ in 0..100 {
            if shield.ended().is_some() {
                return Died;
            }
            pause(Duration::from_millis(20));
        }
        panic!("{what}: {error}, and the shield lives: {}", shield.logged());
    }

    pub fn get(&mut self, target: &str) -> Result<Answer, Died> {
        let url = self.shield().at(target);
        try_ask_by(&self.agent, "GET", &url, &[]).map_err(|error| self.died(target, &error))
    }

    /// Status and body of a call about streams.
    pub fn control(&mut self, method: &str, path: &str, body: Value) -> Result<(u16, Value), Died> {
        self.call(method, &format!("streams/{path}"), body)
    }

    /// Puts all data encryption keys under the key that wraps now.
    pub fn rewrap(&mut self) -> Result<(), Died> {
        let (status, body) = self.call("POST", "kms/rewrap", json!({"to": "local"}))?;
        assert_eq!(status, 202, "{body}");
        let job = wait_for("the end of the re-wrap", || match self.call("GET", "kms/rewrap", Value::Null) {
            Ok((_, mut body)) => {
                let job = body["rewrap"].take();
                (job["state"] != "running").then_some(Ok(job))
            }
            Err(Died) => Some(Err(Died)),
        })?;
        assert!(job["state"] == "done" && job["failed"] == 0, "{job}");
        Ok(())
    }

    /// Status and body of a call of the control API.
    pub fn call(&mut self, method: &str, path: &str, body: Value) -> Result<(u16, Value), Died> {
        let url = format!("{}/api/hls/{path}", self.shield().control);
        let request = ureq::http::Request::builder().method(method).uri(&url);
        let request = request.header("authorization", "Bearer ks_admin");
        let text = if body.is_null() { String::new() } else { body.to_string() };
        let request = if text.is_empty() {
            self.agent.run(request.body(()).unwrap())
        } else {
            self.agent.run(request.header("content-type", "application/json").body(text).unwrap())
        };
        let read = request
            .and_then(|mut response| Ok((response.status().as_u16(), response.body_mut().read_to_string()?)));
        let (status, text) = read.map_err(|error| self.died(path, &error))?;
        let body = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() };
        Ok((status, body))
    }

    /// Asks for something, and remembers it when it is answered.
    pub fn act(&mut self, stream: &'static str, call: Call) -> Result<(), Died> {
        self.memory.pending = Some((stream, call));
        let (status, body) = self.ask(stream, call)?;
        assert!((200..300).contains(&status), "{call:?} of {stream}: {status} {body}");
        self.done(stream, call, &body);
        Ok(())
    }

    pub fn ask(&mut self, stream: &str, call: Call) -> Result<(u16, Value), Died> {
        let (method, verb, body) = match call {
            Call::Initialize(segments_per_key) => {
                let url = format!("{NAME}/{stream}/index.m3u8");
                let config = json!({"segmentsPerKey": segments_per_key});
                ("POST", "/initialize", json!({"playlistUrl": url, "config": config}))
            }
            Call::Update(segments_per_key) => {
                ("PATCH", "", json!({"config": {"segmentsPerKey": segments_per_key}}))
            }
            Call::Rotate => ("POST", "/rotate", Value::Null),
            Call::RotateDek => ("POST", "/rotate-dek", Value::Null),
            Call::Revoke => ("POST", "/emergency-revoke", json!({"reason": "leaked"})),
            Call::Stop => ("POST", "/stop", Value::Null),
            Call::Delete => ("DELETE", "", Value::Null),
            Call::Erase => ("POST", "/erase", json!({"confirm": stream})),
        };
        self.control(method, &format!("{stream}{verb}"), body)
    }

    /// Remembers what a call came to.
    pub fn done(&mut self, id: &'static str, call: Call, body: &Value) {
        self.memory.pending = None;
        let stream = self.memory.streams.entry(id).or_insert_with(|| Stream::new(id));
        let key_id = |key: &Value| key["keyId"].as_str().expect("a key").to_owned();
        match call {
            Call::Initialize(_) => stream.state = State::Running,
            Call::Update(segments_per_key) => stream.segments_per_key = Some(segments_per_key),
            Call::Rotate => stream.rotated.push(key_id(&body["key"])),
            // Nothing that shows: new keys are stored under another one.
            Call::RotateDek => assert!(body["version"].as_u64().is_some_and(|version| version > 1), "{body}"),
            Call::Revoke => {
                let revoked = body["revokedKeys"].as_array().expect("keys").iter();
                stream.revoked.extend(revoked.map(|key| format!("/api/hls/keys/{}", key_id(key))));
                // All that players have, whichever call it was that took them.
                let published = stream.published.values().flatten();
                let successor = key_id(&body["successorKey"]);
                stream
                    .revoked
                    .extend(published.map(|s| s.key_path.clone()).filter(|path| !path.ends_with(&successor)));
            }
            Call::Stop => stream.state = State::Stopped,
            Call::Delete => {
                stream.end(State::Deleted);
                stream.segments_per_key = None;
            }
            Call::Erase => {
                stream.end(State::Erased);
                stream.rotated.clear();
            }
        }
    }

    /// The origin goes on, and all streams that run are played.
    pub fn go_on(&mut self, by: u64) -> Result<(), Died> {
        self.media.advance(by);
        pause(FRESHNESS);
        self.play_all()
    }

    pub fn play_all(&mut self) -> Result<(), Died> {
        for stream in self.running() {
            self.play(stream)?;
        }
        Ok(())
    }

    pub fn running(&self) -> Vec<&'static str> {
        let running = self.memory.streams.iter().filter(|(_, stream)| stream.state == State::Running);
        running.map(|(id, _)| *id).collect()
    }

    /// Fetches a stream's playlists, and what is new in them.
    pub fn play(&mut self, id: &'static str) -> Result<(), Died> {
        RENDITIONS.iter().try_for_each(|rendition| self.play_rendition(id, rendition))
    }

    /// Waits for a playlist that is as the origin's: while the store is away, there may be an older one first.
    fn play_rendition(&mut self, id: &'static str, rendition: &'static str) -> Result<(), Died> {
        let first = self.media.first();
        let segments = wait_for("a playlist that goes on", || match self.playlist(id, rendition) {
            Ok(segments) => (segments.first()?.msn == first).then_some(Ok(segments)),
            Err(Died) => Some(Err(Died)),
        })?;
        // All of them are published, whatever becomes of the shield while they are fetched.
        let new: Vec<_> = segments.iter().filter_map(|segment| self.see(id, rendition, segment)).collect();
        new.iter().try_for_each(|segment| self.check_bytes(segment))
    }

    fn playlist(&mut self, id: &'static str, rendition: &str) -> Result<Vec<Segment>, Died> {
        let path = format!("/{}/{rendition}.m3u8", self.memory.streams[id].folder);
        let answer = self.get(&path)?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, 200, "{path}: {text}\n{}", self.shield().logged());
        Ok(segments(&self.shield().at(&path), &text))
    }

    /// Remembers a segment that a playlist names, and gives it if it is new, or its key is.
    fn see(&mut self, id: &'static str, rendition: &'static str, segment: &Segment) -> Option<Published> {
        let place = (rendition, segment.msn);
        let (key_path, iv) = (target(&segment.key_url), segment.iv.clone());
        let (path, target) = (path(&segment.url), target(&segment.url));
        let stream = &self.memory.streams[id];
        if let Some(before) = stream.published.get(&place).and_then(|seen| seen.last()) {
            assert_eq!(before.path, path, "{id} {place:?}: a published path");
            if before.key_path == key_path {
                assert_eq!((&before.target, &before.iv), (&target, &iv), "{id} {place:?}");
                return None;
            }
            let may_be_revoked = self.memory.pending == Some((id, Call::Revoke));
            let is_revoked = stream.revoked.contains(&before.key_path) || may_be_revoked;
            assert!(is_revoked, "{id} {place:?}: was {before:?}, and is under {key_path}");
            assert!(target.contains("r="), "{target}");
        }
        assert!(!stream.revoked.contains(&key_path), "{id} {place:?}: under the revoked {key_path}");
        let clear_path = format!("/{}/{rendition}/{}.ts", self.memory.streams[id].folder, segment.msn);
        let published = Published { path, target, key_path, iv, clear_path };
        let stream = self.memory.streams.get_mut(id).expect("it is played");
        stream.published.entry(place).or_default().push(published.clone());
        Some(published)
    }

    /// A key as it was first had; had now, if it was not yet.
    fn key(&mut self, path: &str) -> Result<Vec<u8>, Died> {
        if let Some(key) = self.memory.keys.get(path) {
            return Ok(key.clone());
        }
        let answer = self.get(path)?;
        assert_eq!((answer.status, answer.body.len()), (200, 16), "{path}");
        self.memory.keys.insert(path.to_owned(), answer.body.clone());
        Ok(answer.body)
    }

    /// Fetches a segment and compares it, decrypted, with the origin's.
    pub fn check_bytes(&mut self, segment: &Published) -> Result<(), Died> {
        let key = self.key(&segment.key_path)?;
        let served = self.get(&segment.target)?;
        assert_eq!(served.status, 200, "{segment:?}\n{}", self.shield().logged());
        let clear = clear(&segment.clear_path);
        assert_ne!(served.body[..64], clear[..64], "{} is in clear", segment.target);
        let decrypted = decrypt(served.body, &key, &segment.iv);
        assert!(
            decrypted.as_deref() == Some(&clear[..]),
            "{segment:?} does not decrypt to the origin's bytes"
        );
        Ok(())
    }
}

fn path(url: &str) -> String {
    Url::parse(url).unwrap().path().to_owned()
}

fn target(url: &str) -> String {
    let url = Url::parse(url).unwrap();
    url[url::Position::BeforePath..].to_owned()
}

/// `None` for what was not encrypted so.
pub fn decrypt(mut bytes: Vec<u8>, key: &[u8], iv: &str) -> Option<Vec<u8>> {
    let iv: [u8; 16] = hex::decode(iv).unwrap().try_into().unwrap();
    let key: [u8; 16] = key.try_into().unwrap();
    let decryptor = cbc::Decryptor::<Aes128>::new(&key.into(), &iv.into());
    decryptor.decrypt_padded::<Pkcs7>(&mut bytes).ok().map(<[u8]>::to_vec)
}
