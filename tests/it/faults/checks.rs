//! What must hold of a shield that was killed, now that it runs again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::media::{RENDITIONS, clear};
use super::session::{Call, Died, PRE_GENERATED_KEYS, Published, Session, State, decrypt};
use crate::harness::pause;
use crate::sqlite::query;

/// How long sweeping may take to begin and to make the keys that are to wait: on a fleet's store, the lease of who
/// was killed has to run out.
const KEYS_WITHIN: Duration = Duration::from_secs(8);
/// After so many playlists a rotation by hand must have been shown.
const ROTATED_WITHIN: u32 = 5;

impl Session {
    /// Checks everything. Nothing may kill the shield any more.
    pub fn check_after_all(&mut self) {
        if self.has_ended() {
            self.restart();
        }
        if self.check().is_err() {
            panic!("it died again: {}", self.shield().logged());
        }
    }

    /// Checks everything, and repeats the call that was not answered.
    fn check(&mut self) -> Result<(), Died> {
        let ids: Vec<_> = self.memory.streams.keys().copied().collect();
        for id in &ids {
            // Whether a call that ends or begins the stream was done is not known: both would be right.
            let is_open = matches!(
                self.memory.pending,
                Some((of, Call::Initialize(_) | Call::Stop | Call::Delete | Call::Erase)) if of == *id
            );
            if !is_open {
                self.check_stream(id)?;
            }
        }
        if let Some((id, call)) = self.memory.pending {
            self.repeat(id, call)?;
            for id in self.memory.streams.keys().copied().collect::<Vec<_>>() {
                self.check_stream(id)?;
            }
        }
        for id in self.running() {
            self.check_condemned(id)?;
            self.check_keys(id)?;
            self.check_refusal(id)?;
        }
        self.check_rewrapped()?;
        self.check_rotation()?;
        self.check_cdn()
    }

    /// What was left of a re-wrap is done by the next one, and then nothing is under the old key.
    fn check_rewrapped(&mut self) -> Result<(), Died> {
        let Some(key) = self.memory.rewrapped else { return Ok(()) };
        self.rewrap()?;
        let database = self.shield().dir().join("keyshield.db");
        let left = format!("SELECT 1 FROM deks WHERE kek_id <> '{key}' AND length(wrapped) > 0");
        assert!(query(&database, &left).is_empty(), "data encryption keys are under the old key");
        Ok(())
    }

    /// It succeeds, or finds that there is nothing left to do.
    fn repeat(&mut self, id: &'static str, call: Call) -> Result<(), Died> {
        let (status, body) = self.ask(id, call)?;
        let is_done_already = matches!((call, status), (Call::Delete, 404));
        assert!((200..300).contains(&status) || is_done_already, "{call:?} of {id} again: {status} {body}");
        self.done(id, call, &body);
        Ok(())
    }

    fn check_stream(&mut self, id: &'static str) -> Result<(), Died> {
        let gone = self.memory.streams[id].gone.clone();
        for key in gone {
            let answer = self.get(&key)?;
            assert_eq!(answer.status, 404, "{id}: {key} is of a stream that was ended, or destroyed");
        }
        let state = self.memory.streams[id].state;
        let (status, stream) = self.control("GET", id, Value::Null)?;
        match state {
            State::Running => {
                assert_eq!((status, &stream["state"]), (200, &Value::from("running")), "{id}");
                if let Some(expected) = self.memory.streams[id].segments_per_key
                    && !matches!(self.memory.pending, Some((of, Call::Update(_))) if of == id)
                {
                    assert_eq!(stream["config"]["segmentsPerKey"], expected, "{id}: as it was updated");
                }
                self.play(id)?;
                self.check_published(id)
            }
            State::Stopped => {
                assert_eq!((status, &stream["state"]), (200, &Value::from("stopped")), "{id}");
                self.check_not_served(id)
            }
            State::Deleted | State::Erased => {
                assert_eq!(status, 404, "{id}: {stream}");
                let (status, history) = self.control("GET", &format!("{id}/keys?limit=1000"), Value::Null)?;
                if state == State::Erased {
                    assert_eq!(status, 404, "{id}: nothing is left of what was erased: {history}");
                } else {
                    let keys = history["keys"].as_array().expect("the history of its keys stays");
                    assert!(keys.iter().all(|key| key["state"] == "destroyed"), "{id}: {history}");
                }
                self.check_not_served(id)
            }
        }
    }

    fn check_not_served(&mut self, id: &'static str) -> Result<(), Died> {
        let stream = self.memory.streams[id].clone();
        for rendition in RENDITIONS {
            let path = format!("/{}/{rendition}.m3u8", stream.folder);
            assert_eq!(self.get(&path)?.status, 404, "{path} of a stream that is {:?}", stream.state);
        }
        for segment in stream.published.values().filter_map(|seen| seen.last()) {
            assert_ne!(self.get(&segment.target)?.status, 200, "{segment:?} of a stream that was ended");
            assert_ne!(self.get(&segment.key_path)?.status, 200, "{segment:?} of a stream that was ended");
        }
        Ok(())
    }

    /// Whatever was published can be had as it was: its key may be revoked, its bytes may then be another's.
    fn check_published(&mut self, id: &'static str) -> Result<(), Died> {
        let stream = self.memory.streams[id].clone();
        let revoking = self.memory.pending == Some((id, Call::Revoke));
        let mut keys: BTreeMap<&str, u16> = BTreeMap::new();
        for versions in stream.published.values() {
            for segment in versions {
                let status = match keys.get(segment.key_path.as_str()) {
                    Some(status) => *status,
                    None => {
                        let answer = self.get(&segment.key_path)?;
                        let before = self.memory.keys.get(&segment.key_path);
                        let is_the_same =
                            answer.status != 200 || before.is_none_or(|key| answer.body == *key);
                        assert!(is_the_same, "{id}: {} has other bytes", segment.key_path);
                        keys.insert(&segment.key_path, answer.status);
                        answer.status
                    }
                };
                match (stream.revoked.contains(&segment.key_path), status) {
                    (false, 200) => self.check_bytes(segment)?,
                    (true, 410) => self.check_rekeyed(segment, versions)?,
                    (false, 410) if revoking => self.check_rekeyed(segment, versions)?,
                    (_, status) => panic!("{id}: {segment:?}: its key is {status}; {stream:#?}"),
                }
            }
        }
        if revoking {
            let refused =
                keys.iter().filter(|(path, status)| **status == 410 && !stream.revoked.contains(**path));
            let served = keys.values().filter(|status| **status == 200).count();
            // One successor at most is served beside those that were taken back.
            assert!(refused.count() == 0 || served <= 1, "{id}: a revocation was done by half: {keys:?}");
        }
        Ok(())
    }

    /// A segment whose key was revoked: under that key for those who have it, or under what took its place.
    fn check_rekeyed(&mut self, segment: &Published, versions: &[Published]) -> Result<(), Died> {
        let served = self.get(&segment.target)?;
        let clear = clear(&segment.clear_path);
        assert_eq!((served.status, served.body.len()), (200, clear.len() / 16 * 16 + 16), "{segment:?}");
        assert_ne!(served.body[..64], clear[..64], "{segment:?}");
        let is_under = |version: &Published| {
            let key = self.memory.keys.get(&version.key_path);
            let decrypted = key.and_then(|key| decrypt(served.body.clone(), key, &version.iv));
            decrypted.as_deref() == Some(&clear[..])
        };
        // What had left the window before it was re-keyed was never published under the successor.
        let is_rekeyed = versions.len() > 1;
        assert!(!is_rekeyed || versions.iter().any(is_under), "{segment:?} of {versions:?}");
        Ok(())
    }

    /// A stream's keys: one behind the other, in states that follow from one another, and enough of them waiting.
    fn check_keys(&mut self, id: &'static str) -> Result<(), Died> {
        let started = Instant::now();
        loop {
            let (status, body) = self.control("GET", &format!("{id}/keys?limit=1000"), Value::Null)?;
            assert_eq!(status, 200, "{id}: {body}");
            let mut keys = body["keys"].as_array().expect("keys").clone();
            keys.reverse();
            let states: Vec<_> = keys.iter().map(|key| key["state"].as_str().expect("a state")).collect();
            for (expected, key) in keys.iter().enumerate() {
                assert_eq!(key["ordinal"], expected, "{id}: {body}");
                let was_promoted = !key["activatedAt"].is_null();
                let is_legal = match states[expected] {
                    "pre-active" => !was_promoted,
                    "active" | "deactivated" => was_promoted,
                    "compromised" | "destroyed" => true,
                    _ => false,
                };
                assert!(is_legal, "{id}: {key}");
            }
            let head = keys.iter().rposition(|key| !key["activatedAt"].is_null());
            let head = head.unwrap_or_else(|| panic!("{id}: no key was ever promoted: {body}"));
            let waiting = states[head..].iter().filter(|state| **state == "pre-active").count();
            let none_is_passed_over = !states[..head].contains(&"pre-active");
            if waiting >= PRE_GENERATED_KEYS && none_is_passed_over && states.contains(&"active") {
                let by_hand = |rotated: &String| {
                    keys.iter().any(|key| key["keyId"] == **rotated && key["activatedFor"] == "manual")
                };
                let rotated = &self.memory.streams[id].rotated;
                assert!(rotated.iter().all(by_hand), "{id}: {rotated:?} in {body}");
                return Ok(());
            }
            assert!(started.elapsed() < KEYS_WITHIN, "{id}: {states:?}\n{}", self.shield().logged());
            pause(Duration::from_millis(20));
        }
    }

    /// Keys whose time is over are destroyed, in the database too, and what was published under them is gone.
    pub fn check_condemned(&mut self, id: &'static str) -> Result<(), Died> {
        let started = Instant::now();
        for segment in self.memory.streams[id].condemned.clone() {
            while self.get(&segment.key_path)?.status != 404 {
                assert!(started.elapsed() < KEYS_WITHIN, "{id}: not destroyed: {segment:?}");
                pause(Duration::from_millis(20));
            }
            assert_eq!(self.get(&segment.target)?.status, 410, "{id}: {segment:?}");
            let key = segment.key_path.rsplit('/').next().unwrap_or_default();
            let database = self.shield().dir().join("keyshield.db");
            let left = format!("SELECT 1 FROM content_keys WHERE id = '{key}' AND length(wrapped) > 0");
            assert!(query(&database, &left).is_empty(), "{id}: {key} is destroyed, and its bytes are there");
        }
        Ok(())
    }

    /// Without a link there is no segment, and no clear one in particular.
    fn check_refusal(&mut self, id: &'static str) -> Result<(), Died> {
        for rendition in RENDITIONS {
            let path = format!("/{}/{rendition}/{}.ts", self.memory.streams[id].folder, self.media.first());
            let answer = self.get(&path)?;
            assert_eq!(answer.status, 403, "{path}");
            assert!(!answer.body.starts_with(&clear(&path)[..16]), "{path} is in clear");
        }
        Ok(())
    }

    /// Every stream that runs can be rotated, and its playlists then come to name the new key, or one that was promoted
    /// after it: time may be faster than whoever looks.
    fn check_rotation(&mut self) -> Result<(), Died> {
        let running = self.running();
        for id in &running {
            self.act(id, Call::Rotate)?;
        }
        for _ in 0..ROTATED_WITHIN {
            let mut are_shown = true;
            for id in &running {
                let new = self.keys_since_rotation(id)?;
                let published = &self.memory.streams[id].published;
                are_shown &= RENDITIONS.iter().all(|rendition| {
                    let mut shown = published.range((*rendition, 0)..=(*rendition, u64::MAX));
                    shown.any(|(_, seen)| seen.iter().any(|segment| new.contains(&segment.key_path)))
                });
            }
            if are_shown {
                return Ok(());
            }
            self.go_on(2)?;
        }
        panic!("a rotation is not shown: {:#?}\n{}", self.memory.streams, self.shield().logged());
    }

    /// The paths of the key that the last rotation by hand promoted, and of those behind it.
    fn keys_since_rotation(&mut self, id: &'static str) -> Result<Vec<String>, Died> {
        let (status, body) = self.control("GET", &format!("{id}/rotations?limit=1000"), Value::Null)?;
        assert_eq!(status, 200, "{id}: {body}");
        let rotated = self.memory.streams[id].rotated.last().expect("it was rotated");
        let rotations = body["rotations"].as_array().expect("rotations");
        let ids = || rotations.iter().map(|key| key["keyId"].as_str().expect("an ID"));
        let at = ids().position(|key| key == rotated).expect("the newest are first");
        Ok(ids().take(at + 1).map(|key| format!("/api/hls/keys/{key}")).collect())
    }
}
