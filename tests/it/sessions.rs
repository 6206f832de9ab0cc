//! Live sessions of the demo, looked at from outside: bytes, restarts, secrets.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use keyshield::keys::{Context, StreamId, open};
use keyshield::kms::{Kms, LocalKms, WrappedKey};
use keyshield::store::{Location, Store};

use crate::harness::{Keys, Running, Segment, fetch_segments, free_port, get, openssl_decrypt, pause};

const RENDITIONS: [&str; 3] = ["360p", "180p", "audio"];

/// Every segment that was published, by rendition and Media Sequence Number.
#[derive(Default)]
struct Session {
    published: BTreeMap<(&'static str, u64), Segment>,
    keys: Keys,
    decrypted: usize,
}

impl Session {
    /// Plays for a while: every new segment is fetched, decrypted by openssl and compared with the origin's.
    fn watch(&mut self, demo: &Running, time: Duration) {
        let started = Instant::now();
        while started.elapsed() < time {
            for rendition in RENDITIONS {
                for segment in self.newly_published(demo, rendition) {
                    self.check_bytes(demo, rendition, &segment);
                }
            }
            pause(Duration::from_millis(500));
        }
    }

    /// What a playlist shows for the first time. What it showed before must be the same still.
    fn newly_published(&mut self, demo: &Running, rendition: &'static str) -> Vec<Segment> {
        let url = demo.at(&format!("/demo/{rendition}/live.m3u8"));
        let mut new = Vec::new();
        for segment in fetch_segments(&url) {
            match self.published.get(&(rendition, segment.msn)) {
                Some(known) => assert_eq!(path_and_key(known), path_and_key(&segment), "a published segment"),
                None => {
                    self.published.insert((rendition, segment.msn), segment.clone());
                    new.push(segment);
                }
            }
        }
        new
    }

    fn check_bytes(&mut self, demo: &Running, rendition: &str, segment: &Segment) {
        let served = get(&segment.url);
        assert_eq!(served.status, 200, "{segment:?}");
        let key = self.keys.get(&segment.key_url);
        let clear = get(&format!("{}/demo/{rendition}/{}", demo.origin, segment.name));
        assert_eq!(clear.status, 200, "{segment:?}");
        assert_ne!(served.body[..64], clear.body[..64], "it must be encrypted");
        assert!(openssl_decrypt(&served.body, &key, &segment.iv) == clear.body, "{segment:?}");
        self.decrypted += 1;
    }

    fn keys_of(&self, rendition: &str) -> usize {
        let mut keys: Vec<_> =
            self.published.iter().filter(|((r, _), _)| *r == rendition).map(|(_, s)| &s.key_url).collect();
        keys.dedup();
        keys.len()
    }
}

/// What must not change: everything but the port.
fn path_and_key(segment: &Segment) -> (String, String, &str) {
    let path = |url: &str| url::Url::parse(url).unwrap().path().to_owned();
    (path(&segment.url), path(&segment.key_url), &segment.iv)
}

#[test]
fn every_segment_of_a_live_minute_decrypts_to_the_origins_bytes() {
    let demo = Running::demo();
    let mut session = Session::default();
    session.watch(&demo, Duration::from_secs(60));
    // 60 s of 2 s segments, and the window that was there at the start.
    for rendition in RENDITIONS {
        let segments = session.published.keys().filter(|(r, _)| *r == rendition).count();
        assert!(segments >= 34, "{rendition}: {segments} segments");
        assert!(session.keys_of(rendition) >= 6, "{rendition}: {} keys", session.keys_of(rendition));
    }
    // Renditions with one numbering change their key at one number.
    for ((rendition, msn), segment) in &session.published {
        let video = session.published.get(&("360p", *msn));
        assert!(video.is_none_or(|video| video.key_url == segment.key_url), "{rendition} {msn}");
    }
    println!("{} segments under {} keys decrypted", session.decrypted, session.keys.0.len());
    no_secret_is_readable(&demo, &session.keys);
}

#[test]
fn time_alone_changes_the_key_too() {
    // Every 4.8 seconds, and never by count.
    let environment = [("DEFAULT_ROTATION_INTERVAL", "0.08"), ("MAX_SEGMENTS_PER_KEY", "1000000")];
    let demo = Running::demo_with(tempfile::tempdir().unwrap(), free_port(), &environment);
    let (mut session, started) = (Session::default(), Instant::now());
    session.watch(&demo, Duration::from_secs(24));
    let most = 2 + started.elapsed().as_millis() / 4_800;
    for rendition in RENDITIONS {
        let keys = session.keys_of(rendition) as u128;
        assert!((3..=most).contains(&keys), "{rendition}: {keys} keys, at most {most} could be");
    }
}

#[test]
fn after_kill_9_and_a_restart_what_was_published_still_decrypts() {
    let origin_port = free_port();
    let demo = Running::demo_in(tempfile::tempdir().unwrap(), origin_port);
    let mut session = Session::default();
    session.watch(&demo, Duration::from_secs(12));
    let before = session.published.clone();
    assert!(session.keys_of("360p") >= 2);
    let dir = demo.kill();

    let demo = Running::demo_in(dir, origin_port);
    for rendition in RENDITIONS {
        // The first playlist after the restart overlaps with the last one before, and agrees with it.
        let new = session.newly_published(&demo, rendition);
        assert!(new.len() < 8, "{rendition}: nothing of what was published is in the window");
    }
    // Paths, keys and bytes of before are served by the new process, which has no playlist state of them.
    session.keys = Keys::default();
    for ((rendition, _), segment) in &before {
        let moved = Segment {
            url: demo.at(url::Url::parse(&segment.url).unwrap().path()),
            key_url: demo.at(url::Url::parse(&segment.key_url).unwrap().path()),
            ..segment.clone()
        };
        session.check_bytes(&demo, rendition, &moved);
    }
    session.watch(&demo, Duration::from_secs(12));
}

/// Searches everything that was logged and stored for the content keys, and for what only the shield knows:
/// link keys and data encryption keys.
fn no_secret_is_readable(demo: &Running, keys: &Keys) {
    let mut secrets: Vec<Vec<u8>> = keys.0.values().cloned().collect();
    let seen_from_outside = secrets.len();
    secrets.extend(unwrapped(&demo.dir().join("data")));
    assert!(secrets.len() > seen_from_outside * 2, "link keys and the DEK were unwrapped too");

    let mut haystacks = vec![("what was logged".to_owned(), demo.logged().into_bytes())];
    for entry in std::fs::read_dir(demo.dir().join("data")).unwrap() {
        let path = entry.unwrap().path();
        haystacks.push((path.display().to_string(), std::fs::read(&path).unwrap()));
    }
    assert!(haystacks.len() >= 3, "log, database and master key file");
    assert!(haystacks[0].1.len() > 100_000, "everything was logged that can be");
    for secret in &secrets {
        for (spelling, needle) in spellings(secret) {
            for (place, haystack) in &haystacks {
                assert!(!contains(haystack, &needle), "a secret stands in {place} as {spelling}");
            }
        }
    }
}

/// The DEK, and content and link keys, by the master key file: as whoever steals both would get them.
fn unwrapped(data: &Path) -> Vec<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stream: StreamId = "demo".parse().unwrap();
    let stored = runtime.block_on(async {
        let store = Store::open(&Location::Sqlite(data.join("keyshield.db")), 1).await.unwrap();
        store.load(std::slice::from_ref(&stream)).await.unwrap().remove(0)
    });
    let kms = LocalKms::open(&data.join("keyshield.master")).unwrap();
    let mut secrets = Vec::new();
    for dek in &stored.deks {
        let context = Context::Dek { stream: &stream, dek: dek.id, version: dek.version };
        let wrapped = WrappedKey { kek_id: dek.kek_id.clone(), bytes: dek.wrapped.clone() };
        let opened = runtime.block_on(kms.unwrap(&context, &wrapped)).unwrap();
        for key in stored.keys.iter().filter(|key| !key.wrapped.is_empty()) {
            let context =
                Context::Content { stream: &stream, key: key.id, ordinal: key.ordinal, version: dek.version };
            let plaintext = open(opened.expose(), &context, &key.wrapped).unwrap();
            let (content, link) = plaintext.split_at(plaintext.len() - 32);
            secrets.extend([content.to_vec(), link.to_vec()]);
        }
        secrets.push(opened.expose().to_vec());
    }
    secrets
}

/// The bytes themselves, hex in both cases, and base64 at each of its three alignments.
pub fn spellings(secret: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut spellings = vec![
        ("bytes".to_owned(), secret.to_vec()),
        ("hex".to_owned(), hex::encode(secret).into_bytes()),
        ("upper-case hex".to_owned(), hex::encode_upper(secret).into_bytes()),
        ("a list of numbers".to_owned(), format!("{secret:?}").trim_matches(['[', ']']).as_bytes().to_vec()),
    ];
    for alignment in 0..3 {
        let shifted = [vec![0; alignment], secret.to_vec()].concat();
        let encoded = STANDARD.encode(shifted);
        // The characters that no byte before or after the secret can change: six bits each.
        let (first, end) = ((8 * alignment).div_ceil(6), 8 * (alignment + secret.len()) / 6);
        let certain = encoded[first..end].to_owned();
        let url_safe = certain.replace('+', "-").replace('/', "_");
        spellings.push((format!("base64 at {alignment}"), certain.into_bytes()));
        spellings.push((format!("base64url at {alignment}"), url_safe.into_bytes()));
    }
    spellings
}

pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_search_for_secrets_finds_what_it_searches_for() {
    let secret: Vec<u8> = (7..23).collect();
    let plants = [
        secret.clone(),
        hex::encode(&secret).into_bytes(),
        hex::encode_upper(&secret).into_bytes(),
        format!("{secret:?}").into_bytes(),
        STANDARD.encode(&secret).into_bytes(),
        STANDARD.encode([b"x", &secret[..]].concat()).into_bytes(),
        STANDARD.encode([b"xy", &secret[..], b"z"].concat()).into_bytes(),
    ];
    for plant in plants {
        let haystack = [b"before ", &plant[..], b" after"].concat();
        let found = spellings(&secret).iter().any(|(_, needle)| contains(&haystack, needle));
        assert!(found, "{}", String::from_utf8_lossy(&haystack));
    }
}
