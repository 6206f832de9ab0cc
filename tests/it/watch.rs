//! Looking at everything that several nodes publish, as it is published: the same from each, and all of it
//! decryptable to the origin's bytes.
//!
//! Every playlist is asked for at every node each second. A segment is fetched from another node than the one
//! whose playlist named it, its key through whatever stands before the nodes, and what was once published is
//! remembered: it must not change. A few threads share the renditions out, so that none needs a lock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aes::Aes128;
use aes::cipher::block_padding::Pkcs7;
use aes::cipher::{BlockModeDecrypt, KeyIvInit};
use parking_lot::Mutex;
use url::Url;

use crate::fleet_origin::{Media, RENDITIONS};
use crate::harness::{Answer, Segment, agent, openssl_decrypt, pause, segments, try_ask_by};

const THREADS: usize = 6;
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Of these streams every node serves every segment; of the others one node does.
const FETCHED_FROM_ALL: usize = 2;
/// One segment in so many is decrypted by the `openssl` command line instead of by this process.
const OPENSSL_EVERY: usize = 97;
/// How many segments a playlist may be behind the origin: a node that serves stale ones does not go on.
const MOST_BEHIND: u64 = 4;
/// How many states of a playlist are remembered, for nodes that are behind.
const STATES: usize = 16;

/// Whom to look at, and what has been seen.
pub struct Watch {
    /// URLs, without a path.
    pub nodes: Vec<String>,
    /// Where keys are fetched: what stands before the nodes.
    pub front: String,
    pub media: Arc<Media>,
    pub streams: usize,
    /// Nodes may differ, and change what they published: it is counted, and must be decryptable all the same.
    pub may_differ: AtomicBool,
    pub totals: Totals,
    keys: Mutex<BTreeMap<String, Vec<u8>>>,
    over: AtomicBool,
}

/// What was looked at.
#[derive(Debug, Default)]
pub struct Totals {
    pub playlists: AtomicUsize,
    /// Playlists that two nodes published at one state of the origin.
    pub compared: AtomicUsize,
    pub decrypted: AtomicUsize,
    /// Segments between the first and the last that all nodes showed, of all renditions: none of them was left out.
    pub covered: AtomicUsize,
    pub by_openssl: AtomicUsize,
    /// How often one was fetched that was not known, or had been forgotten.
    pub keys: AtomicUsize,
    /// Only while nodes may differ.
    pub differences: AtomicUsize,
    pub slowest_millis: AtomicUsize,
}

impl Totals {
    pub fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::Relaxed)
    }
}

impl Watch {
    pub fn new(nodes: Vec<String>, front: String, media: &Arc<Media>, streams: usize) -> Self {
        Self {
            nodes,
            front,
            media: Arc::clone(media),
            streams,
            may_differ: AtomicBool::new(false),
            totals: Totals::default(),
            keys: Mutex::default(),
            over: AtomicBool::new(false),
        }
    }

    /// Looks for as long as `act` takes; a failure ends its [`Self::pause`] early.
    pub fn during<T>(&self, act: impl FnOnce() -> T) -> T {
        let stop = StopOnDrop(&self.over);
        self.over.store(false, Ordering::Relaxed);
        thread::scope(|scope| {
            for worker in 0..THREADS {
                scope.spawn(move || self.look(worker));
            }
            let acted = act();
            drop(stop);
            acted
        })
    }

    /// Lets time pass while the others look.
    pub fn pause(&self, time: Duration) {
        let started = Instant::now();
        while started.elapsed() < time && !self.has_failed() {
            pause(Duration::from_millis(50));
        }
    }

    /// Whether one of those who look has failed, while they do.
    pub fn has_failed(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Has every key fetched anew.
    pub fn forget_keys(&self) {
        self.keys.lock().clear();
    }

    fn look(&self, worker: usize) {
        let _stop = StopOnDrop(&self.over);
        let all = (0..self.streams).flat_map(|stream| (0..RENDITIONS.len()).map(move |r| (stream, r)));
        let own = all.enumerate().filter(|(at, _)| at % THREADS == worker);
        let mut own: Vec<_> = own.map(|(_, (stream, r))| Looker::new(self, stream, r)).collect();
        while !self.over.load(Ordering::Relaxed) {
            let started = Instant::now();
            own.iter_mut().for_each(Looker::look);
            pause(POLL_INTERVAL.saturating_sub(started.elapsed()));
        }
        own.iter().for_each(Looker::check_nothing_was_left_out);
    }

    /// The content key at a path, through the front.
    fn key(&self, agent: &ureq::Agent, path: &str) -> Vec<u8> {
        if let Some(key) = self.keys.lock().get(path) {
            return key.clone();
        }
        let answer = self.get(agent, &format!("{}{path}", self.front));
        assert_eq!(answer.body.len(), 16, "{path}");
        if self.keys.lock().insert(path.to_owned(), answer.body.clone()).is_none() {
            self.totals.keys.fetch_add(1, Ordering::Relaxed);
        }
        answer.body
    }

    fn differ(&self, stream: usize, rendition: usize, how: &str) {
        let may_differ = self.may_differ.load(Ordering::Relaxed);
        assert!(may_differ, "stream {stream}, {}: {how}", RENDITIONS[rendition]);
        self.totals.differences.fetch_add(1, Ordering::Relaxed);
    }

    /// What must be there, now.
    fn get(&self, agent: &ureq::Agent, url: &str) -> Answer {
        let started = Instant::now();
        let answer = try_ask_by(agent, "GET", url, &[]).unwrap_or_else(|error| panic!("{url}: {error}"));
        assert_eq!(answer.status, 200, "{url}: {}", String::from_utf8_lossy(&answer.body));
        let took = usize::try_from(started.elapsed().as_millis()).unwrap();
        self.totals.slowest_millis.fetch_max(took, Ordering::Relaxed);
        answer
    }
}

/// Ends all threads when one of them fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A segment as it was published, wherever it was.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Published {
    path: String,
    key_path: String,
    iv: String,
}

impl Published {
    fn from(segment: &Segment) -> Self {
        let path = |url: &str| {
            let url = Url::parse(url).unwrap();
            url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()))
        };
        Self { path: path(&segment.url), key_path: path(&segment.key_url), iv: segment.iv.clone() }
    }
}

/// One rendition, at every node.
struct Looker<'a> {
    watch: &'a Watch,
    agent: ureq::Agent,
    stream: usize,
    rendition: usize,
    published: BTreeMap<u64, Published>,
    checked: BTreeSet<u64>,
    /// As `checked`, from the beginning on.
    ever_checked: BTreeSet<u64>,
    /// For each node, what its playlists showed: the first Media Sequence Number, and one past the last.
    shown: Vec<Option<(u64, u64)>>,
    /// By the state of the origin (first Media Sequence Number, segments): the body, and which nodes had it.
    states: BTreeMap<(u64, usize), (String, BTreeSet<usize>)>,
}

impl<'a> Looker<'a> {
    fn new(watch: &'a Watch, stream: usize, rendition: usize) -> Self {
        Self {
            watch,
            agent: agent(),
            stream,
            rendition,
            published: BTreeMap::new(),
            checked: BTreeSet::new(),
            ever_checked: BTreeSet::new(),
            shown: vec![None; watch.nodes.len()],
            states: BTreeMap::new(),
        }
    }

    fn look(&mut self) {
        let path = Media::playlist_path(self.stream, self.rendition);
        for node in 0..self.watch.nodes.len() {
            let url = format!("{}{path}", self.watch.nodes[node]);
            let end = self.watch.media.end(self.stream);
            let text = self.watch.get(&self.agent, &url).text();
            self.watch.totals.playlists.fetch_add(1, Ordering::Relaxed);
            let segments = segments(&url, &text);
            let first = segments.first().expect("a live window").msn;
            let served_end = first + segments.len() as u64;
            assert!(served_end + MOST_BEHIND >= end, "{url} ends at {served_end}, the origin at {end}");
            // Windows are looked at oftener than they move on by their length, so each goes on where one before ended.
            let (began, ended) = self.shown[node].unwrap_or((first, first));
            assert!(first <= ended, "{url}: {ended} to {first} were in no playlist that was looked at");
            self.shown[node] = Some((began, ended.max(served_end)));
            self.compare(node, (first, segments.len()), text);
            for segment in &segments {
                self.check(node, segment.msn, Published::from(segment));
            }
            // What left the window will not come back.
            self.published.retain(|msn, _| *msn >= first.saturating_sub(STATES as u64));
            self.checked.retain(|msn| *msn >= first.saturating_sub(STATES as u64));
        }
    }

    /// Every segment that all nodes showed was fetched and decrypted.
    fn check_nothing_was_left_out(&self) {
        let from = self.shown.iter().flatten().map(|(first, _)| *first).max();
        let to = self.shown.iter().map(|shown| shown.map_or(0, |(_, end)| end)).min();
        let (Some(from), Some(to)) = (from, to) else { return };
        let left_out: Vec<_> = (from..to).filter(|msn| !self.ever_checked.contains(msn)).collect();
        let rendition = RENDITIONS[self.rendition];
        assert!(left_out.is_empty(), "stream {}, {rendition}: {left_out:?} of {from}..{to}", self.stream);
        self.watch
            .totals
            .covered
            .fetch_add(usize::try_from(to.saturating_sub(from)).unwrap(), Ordering::Relaxed);
    }

    /// Compares with what other nodes published at the same state of the origin.
    fn compare(&mut self, node: usize, state: (u64, usize), text: String) {
        let url = &self.watch.nodes[node];
        let (known, nodes) = self.states.entry(state).or_insert_with(|| (text.clone(), BTreeSet::new()));
        if *known == text {
            let is_new = nodes.insert(node);
            self.watch.totals.compared.fetch_add(usize::from(is_new && nodes.len() > 1), Ordering::Relaxed);
        } else {
            let how = format!("{url} published\n{text}\nand before it was\n{known}");
            self.watch.differ(self.stream, self.rendition, &how);
            self.states.remove(&state);
        }
        while self.states.len() > STATES {
            self.states.pop_first();
        }
    }

    /// Compares a segment with what it was before, and fetches it if that is this node's part.
    fn check(&mut self, node: usize, msn: u64, segment: Published) {
        match self.published.get(&msn) {
            Some(known) if *known == segment => {}
            Some(known) => {
                let how = format!("segment {msn} was {known:?} and is {segment:?}");
                self.watch.differ(self.stream, self.rendition, &how);
                self.checked.remove(&msn);
            }
            None => {}
        }
        self.published.insert(msn, segment.clone());
        let nodes = self.watch.nodes.len();
        let may_differ = self.watch.may_differ.load(Ordering::Relaxed);
        if !(may_differ || msn % nodes as u64 == node as u64) || !self.checked.insert(msn) {
            return;
        }
        self.ever_checked.insert(msn);
        let others = if self.stream < FETCHED_FROM_ALL { nodes } else { 1 };
        for other in 1..=others {
            self.check_bytes(&self.watch.nodes[(node + other) % nodes], msn, &segment);
        }
    }

    /// Fetches a segment, decrypts it, and compares it with the origin's.
    fn check_bytes(&self, node: &str, msn: u64, segment: &Published) {
        let totals = &self.watch.totals;
        let url = format!("{node}{}", segment.path);
        let mut served = self.watch.get(&self.agent, &url).body;
        let key = self.watch.key(&self.agent, &segment.key_path);
        let clear = self.watch.media.segment(self.stream, self.rendition, msn).expect("it was published");
        assert_ne!(served[..64], clear[..64], "{url} must be encrypted");
        let decrypted = if totals.decrypted.fetch_add(1, Ordering::Relaxed).is_multiple_of(OPENSSL_EVERY) {
            totals.by_openssl.fetch_add(1, Ordering::Relaxed);
            &openssl_decrypt(&served, &key, &segment.iv)[..]
        } else {
            let iv: [u8; 16] = hex::decode(&segment.iv).unwrap().try_into().unwrap();
            let key: [u8; 16] = key.try_into().unwrap();
            let decryptor = cbc::Decryptor::<Aes128>::new(&key.into(), &iv.into());
            decryptor.decrypt_padded::<Pkcs7>(&mut served).unwrap_or_else(|_| panic!("{url}: padding"))
        };
        assert!(decrypted == clear, "{url} does not decrypt to the origin's bytes");
    }
}
