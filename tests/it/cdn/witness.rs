//! What playlists named around a revocation, and what CDNs make of it when they are said to have let go.
//!
//! It asks as players do, through the edges, from before the revocation on, and keeps every segment's URL with the key and
//! the IV that its playlist named. It also keeps the keys: whoever leaks one has had it. Afterwards each URL is asked for
//! again, as it was named and without its query.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aes::Aes128;
use aes::cipher::block_padding::Pkcs7;
use aes::cipher::{BlockModeDecrypt, KeyIvInit};
use parking_lot::Mutex;
use url::Url;

use crate::fleet_origin::{Media, RENDITIONS};
use crate::harness::{agent, pause, segments, try_ask_by};

const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Older URLs nobody comes back to.
const KEPT: Duration = Duration::from_secs(60);

/// One naming of a segment.
#[derive(Debug, Clone)]
struct Named {
    rendition: usize,
    msn: u64,
    iv: String,
    at: Instant,
}

#[derive(Default)]
struct Seen {
    /// By path and query, and by key ID.
    named: BTreeMap<(String, String), Named>,
    keys: BTreeMap<String, Vec<u8>>,
}

/// Who looks at one stream through some edges.
pub struct Witness {
    edges: Vec<String>,
    stream: usize,
    media: Arc<Media>,
    seen: Mutex<Seen>,
    over: AtomicBool,
}

/// What CDNs gave out when they were said to have let go.
#[derive(Debug, Default)]
pub struct Given {
    pub answers: usize,
    /// Of these, by caches.
    pub hits: usize,
    /// Of these, what a cache had before it was asked here.
    pub kept: usize,
    /// Decrypted to the origin's bytes under a key that is in force.
    pub decrypted: usize,
    /// Under a key that is in force, by which no playlist named them: they had left the window.
    pub unnamed: usize,
}

impl Witness {
    pub fn new(edges: &[String], stream: usize, media: &Arc<Media>) -> Self {
        let (edges, media) = (edges.to_vec(), Arc::clone(media));
        Self { edges, stream, media, seen: Mutex::default(), over: AtomicBool::new(false) }
    }

    /// Looks on while `act` runs.
    pub fn during<T>(&self, act: impl FnOnce() -> T) -> T {
        struct Over<'w>(&'w AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        std::thread::scope(|scope| {
            let over = Over(&self.over);
            self.edges.iter().for_each(|edge| drop(scope.spawn(|| self.look_on(edge))));
            let done = act();
            drop(over);
            done
        })
    }

    fn look_on(&self, edge: &str) {
        let agent = agent();
        while !self.over.load(Ordering::Relaxed) {
            (0..RENDITIONS.len()).for_each(|rendition| self.look(&agent, edge, rendition));
            pause(POLL_INTERVAL);
        }
    }

    fn look(&self, agent: &ureq::Agent, edge: &str, rendition: usize) {
        let url = format!("{edge}{}", Media::playlist_path(self.stream, rendition));
        let playlist = try_ask_by(agent, "GET", &url, &[]).unwrap();
        assert_eq!(playlist.status, 200, "{url}");
        for segment in segments(&url, &playlist.text()) {
            let (path, key) = (path_of(&segment.url), last_of(&segment.key_url));
            let is_known = self.seen.lock().keys.contains_key(&key);
            // A playlist that was on its way may name a key that was taken back meanwhile.
            if !is_known
                && let Ok(answer) = try_ask_by(agent, "GET", &segment.key_url, &[])
                && answer.status == 200
            {
                self.seen.lock().keys.insert(key.clone(), answer.body);
            }
            let named = Named { rendition, msn: segment.msn, iv: segment.iv, at: Instant::now() };
            self.seen.lock().named.insert((path, key), named);
        }
    }

    /// Every edge is asked for all that was named, and must give out nothing that is under one of these keys.
    pub fn check_nothing_is_left(&self, revoked: &BTreeSet<String>) -> Vec<Given> {
        let seen = self.seen.lock();
        assert!(revoked.iter().any(|key| seen.keys.contains_key(key)), "one of them was had");
        self.edges.iter().map(|edge| self.check_edge(edge, &seen, revoked)).collect()
    }

    fn check_edge(&self, edge: &str, seen: &Seen, revoked: &BTreeSet<String>) -> Given {
        let (agent, mut given) = (agent(), Given::default());
        let recent = seen.named.iter().filter(|(_, named)| named.at.elapsed() < KEPT);
        let urls: BTreeSet<&str> =
            recent.flat_map(|((path, _), _)| [path.as_str(), without_query(path)]).collect();
        for path in urls {
            // Once as it is there now, and once as it is kept from then on.
            for turn in 0..2 {
                let url = format!("{edge}{path}");
                let answer = try_ask_by(&agent, "GET", &url, &[]).unwrap();
                assert_eq!(answer.status, 200, "{url}");
                let under = answer.header("keyshield-key").expect("segments say their key").to_owned();
                given.answers += 1;
                let is_hit = answer.header("x-cache") == Some("HIT");
                given.hits += usize::from(is_hit);
                given.kept += usize::from(is_hit && turn == 0);
                assert!(!revoked.contains(&under), "{url}: {under} is revoked; {answer:?}");
                let same = |named: &&(String, String)| without_query(&named.0) == without_query(path);
                for place in seen.named.keys().filter(same) {
                    let (named, key) = (&seen.named[place], seen.keys.get(&place.1));
                    let clear = self.media.segment(self.stream, named.rendition, named.msn).unwrap();
                    let opened = key.and_then(|key| decrypted(&answer.body, key, &named.iv));
                    let opens = opened.is_some_and(|opened| opened == clear);
                    assert!(!(opens && revoked.contains(&place.1)), "{url} opens under {}", place.1);
                    if place.1 == under {
                        assert!(opens, "{url} under {under} does not decrypt to the origin's bytes");
                        given.decrypted += 1;
                    }
                }
                let is_named = seen.named.keys().filter(same).any(|place| place.1 == under);
                given.unnamed += usize::from(!is_named);
            }
        }
        given
    }

    /// No playlist names one of these keys, at any edge.
    pub fn check_playlists(&self, revoked: &BTreeSet<String>) {
        let paths = (0..RENDITIONS.len()).map(|rendition| Media::playlist_path(self.stream, rendition));
        for path in paths.chain([Media::master_path(self.stream)]) {
            for edge in &self.edges {
                let url = format!("{edge}{path}");
                let text = try_ask_by(&agent(), "GET", &url, &[]).unwrap().text();
                assert!(revoked.iter().all(|key| !text.contains(&format!("keys/{key}"))), "{url}: {text}");
            }
        }
    }
}

fn path_of(url: &str) -> String {
    Url::parse(url).unwrap()[url::Position::BeforePath..].to_owned()
}

fn last_of(url: &str) -> String {
    url.rsplit('/').next().unwrap().to_owned()
}

fn without_query(path: &str) -> &str {
    path.split('?').next().unwrap()
}

/// `None`: the padding is wrong.
fn decrypted(ciphertext: &[u8], key: &[u8], iv: &str) -> Option<Vec<u8>> {
    let iv: [u8; 16] = hex::decode(iv).unwrap().try_into().unwrap();
    let key: [u8; 16] = key.try_into().unwrap();
    let decryptor = cbc::Decryptor::<Aes128>::new(&key.into(), &iv.into());
    let mut buffer = ciphertext.to_vec();
    decryptor.decrypt_padded::<Pkcs7>(&mut buffer).ok().map(<[u8]>::to_vec)
}
