//! Low-Latency HLS through the shield: parts, blocking reloads and delta updates, over key changes.
//!
//! A part is encrypted by itself under its segment's key and IV, which stand before the segment's first part. What
//! the shield may neither change nor keep for itself is compared with what the origin says.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::data_plane::{open, read_some};
use crate::harness::{Answer, Keys, Running, SOON, get, openssl_decrypt, wait_at_most, wait_for};
use crate::ll_clear::{check_ffmpeg, check_low_latency, hls_js_report};
use crate::ll_media::{PARTS, Place, RENDITIONS};
use crate::ll_origin::{LlOrigin, MASTER, Parts};
use crate::ll_playlist::{Follower, Key, Link, Playlist, blocking};
use crate::origin::{self, Origin};

const VIDEO: usize = 0;
const AUDIO: usize = 1;
/// A key is for three seconds.
const SEGMENTS_PER_KEY: u64 = 3;
/// Players that wait for one thing.
const PLAYERS: usize = 50;

/// The shield before an origin.
pub fn shield(origin: &LlOrigin) -> Running {
    let url = origin.at("");
    Running::serve(&format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{url}{MASTER}\"\n\
         [streams.policy]\nsegments_per_key = {SEGMENTS_PER_KEY}\n"
    ))
}

fn start(duration: Duration, parts: Parts) -> (LlOrigin, Running) {
    let origin = LlOrigin::start(duration, parts);
    let shield = shield(&origin);
    (origin, shield)
}

fn follow(shield: &Running, rendition: usize) -> Follower {
    Follower::start(&shield.at(&LlOrigin::playlist_path(rendition)))
}

/// Has many players ask for what the encoder, which stands, is halfway through; then lets it go on. All of them have
/// asked by then, and half a part's time is left for the last of them to arrive.
fn ask_together(origin: &LlOrigin, url: &str, target: &str) -> Vec<Answer> {
    let asking = Arc::new(AtomicUsize::new(0));
    let waiting: Vec<_> = (0..PLAYERS)
        .map(|_| {
            let (url, asking) = (url.to_owned(), Arc::clone(&asking));
            std::thread::spawn(move || {
                asking.fetch_add(1, Ordering::SeqCst);
                get(&url)
            })
        })
        .collect();
    wait_for("the origin's blocked request", || {
        (asking.load(Ordering::SeqCst) == PLAYERS && origin.count(target) > 0).then_some(())
    });
    origin.encoder.go_on();
    waiting.into_iter().map(|waiting| waiting.join().unwrap()).collect()
}

/// Everything that one rendition's playlists named so far: it must not change, and must decrypt.
struct Watched<'a> {
    origin: &'a LlOrigin,
    rendition: usize,
    keys: Keys,
    /// Media Segments have no part's place.
    links: BTreeMap<(u64, Option<u64>), Link>,
    hints: BTreeMap<Place, String>,
    /// Keys of parts, in their order.
    keys_of_parts: Vec<String>,
}

impl<'a> Watched<'a> {
    fn new(origin: &'a LlOrigin, rendition: usize) -> Self {
        let (links, hints) = (BTreeMap::new(), BTreeMap::new());
        Self { origin, rendition, keys: Keys::default(), links, hints, keys_of_parts: Vec::new() }
    }

    fn look(&mut self, playlist: &Playlist) {
        for (place, link) in &playlist.parts {
            if self.is_new((place.msn, Some(place.part)), link) {
                self.decrypts(link, self.origin.media.part(self.rendition, *place));
                let key = &link.key.as_ref().unwrap().url;
                if self.keys_of_parts.last() != Some(key) {
                    assert!(!self.keys_of_parts.contains(key), "back to an earlier key:\n{}", playlist.text);
                    self.keys_of_parts.push(key.clone());
                }
            }
            if let Some(hint) = self.hints.get(place) {
                assert_eq!(*hint, link.url, "{place:?} was hinted at by another link");
            }
            if let Some(segment) = playlist.segments.get(&place.msn) {
                assert_eq!(segment.key, link.key, "a segment and its parts:\n{}", playlist.text);
            }
        }
        for (msn, link) in &playlist.segments {
            if self.is_new((*msn, None), link) {
                self.decrypts(link, &self.origin.media.segment(self.rendition, *msn));
            }
        }
        if let Some(hint) = &playlist.hint {
            let known = self.hints.entry(playlist.last().next()).or_insert_with(|| hint.clone());
            assert_eq!(known, hint, "a hint changed");
        }
    }

    /// Whether it was not named before; what was must not have changed.
    fn is_new(&mut self, at: (u64, Option<u64>), link: &Link) -> bool {
        if let Some(known) = self.links.get(&at) {
            assert_eq!(known, link, "{at:?} changed");
            return false;
        }
        assert_eq!(link.range, None, "what is encrypted as a whole is no range");
        assert!(link.key.is_some(), "{at:?} has no key");
        self.links.insert(at, link.clone());
        true
    }

    fn decrypts(&mut self, link: &Link, clear: &[u8]) {
        let Key { url, iv } = link.key.as_ref().unwrap();
        let got = get(&link.url);
        assert_eq!(got.status, 200, "{}: {}", link.url, String::from_utf8_lossy(&got.body));
        assert_ne!(got.body[..32], clear[..32], "{} must be encrypted", link.url);
        let key = self.keys.get(url);
        assert!(openssl_decrypt(&got.body, &key, iv) == clear, "{} is not the origin's", link.url);
    }

    /// Hints at the first part of a segment whose key is not that of the segment before.
    fn hints_over_key_changes(&self) -> usize {
        let key = |msn, part| self.links.get(&(msn, Some(part))).and_then(|link| link.key.as_ref());
        let over = |place: &&Place| {
            place.part == 0
                && key(place.msn, 0)
                    .zip(key(place.msn - 1, PARTS - 1))
                    .is_some_and(|(new, old)| new.url != old.url)
        };
        self.hints.keys().filter(over).count()
    }
}

/// Follows both renditions for at least two key changes at the live edge.
fn check_parts(parts: Parts) {
    let (origin, shield) = start(Duration::from_secs(15), parts);
    std::thread::scope(|scope| {
        for rendition in 0..RENDITIONS.len() {
            let (origin, shield) = (&origin, &shield);
            scope.spawn(move || {
                let mut player = follow(shield, rendition);
                let mut watched = Watched::new(origin, rendition);
                watched.look(&player.playlist);
                let before = watched.keys_of_parts.len();
                // A player that is late may miss a hint; it will not miss all of them.
                wait_at_most(SOON, "two key changes among parts and hints", || {
                    watched.look(player.next());
                    let changes = watched.keys_of_parts.len() - before;
                    if parts == Parts::Ranges {
                        // Its length is not known, and so it is no resource that could be encrypted.
                        assert_eq!(watched.hints, BTreeMap::new());
                        return (changes >= 2).then_some(());
                    }
                    (changes >= 2 && watched.hints_over_key_changes() >= 2).then_some(())
                });
            });
        }
    });
}

#[test]
fn every_part_and_segment_decrypts_under_the_key_before_it_and_nothing_published_changes() {
    check_parts(Parts::Files);
}

#[test]
fn parts_that_are_byte_ranges_become_resources_of_their_own() {
    check_parts(Parts::Ranges);
}

#[test]
fn players_that_wait_for_one_playlist_cost_the_origin_one_request() {
    let (origin, shield) = start(Duration::from_secs(8), Parts::Files);
    let player = follow(&shield, VIDEO);
    let wanted = origin.last().next().next();
    origin.encoder.stop_halfway(wanted);
    let query = blocking(wanted);
    let target = format!("{}{query}", LlOrigin::playlist_path(VIDEO));
    let answers = ask_together(&origin, &format!("{}{query}", player.url), &target);
    for answer in &answers {
        assert!(player.parse(answer).last() >= wanted);
        assert!(answer.body == answers[0].body, "all get the same");
    }
    assert_eq!(origin.count(&target), 1);
}

#[test]
fn players_that_wait_for_one_part_cost_the_origin_one_request() {
    let (origin, shield) = start(Duration::from_secs(8), Parts::Files);
    let mut player = follow(&shield, AUDIO);
    let place = origin.last().next().next();
    origin.encoder.stop_halfway(place);
    let hint = player.until_hint_at(place);
    let target = LlOrigin::part_path(AUDIO, place);
    let answers = ask_together(&origin, &hint, &target);
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.body == answers[0].body));
    let link = player.next().parts[&place].clone();
    assert_eq!(link.url, hint);
    Watched::new(&origin, AUDIO).decrypts(&link, origin.media.part(AUDIO, place));
    assert_eq!(origin.count(&target), 1);
}

#[test]
fn what_the_origin_says_of_a_reload_the_shield_says_too() {
    let (origin, shield) = start(Duration::from_secs(12), Parts::Files);
    let player = follow(&shield, VIDEO);
    assert_eq!(player.ask("?_HLS_part=0").status, 400);
    assert_eq!(player.ask("?_HLS_msn=soon").status, 400);
    let far = origin.last().msn + 10;
    assert_eq!(player.ask(&format!("?_HLS_msn={far}")).status, 400);

    // It gives up: nothing comes, and no older playlist may stand in for what was asked for.
    origin.encoder.stop();
    let wanted = origin.last().next();
    assert_eq!(player.ask(&blocking(wanted)).status, 503);
    origin.encoder.go_on();
    let answer = wait_for("the end of the outage", || {
        Some(player.ask(&blocking(wanted))).filter(|answer| answer.status == 200)
    });
    assert!(player.parse(&answer).last() >= wanted);
}

#[test]
fn reloads_that_ask_for_different_things_do_not_answer_each_other() {
    let (origin, shield) = start(Duration::from_secs(10), Parts::Files);
    let mut player = follow(&shield, VIDEO);
    player.next();
    origin.encoder.stop();
    let last = origin.last();
    let [next, after] = [last.next(), last.next().next()];
    std::thread::scope(|scope| {
        let ask = |query: String| {
            let player = &player;
            scope.spawn(move || player.parse(&player.ask(&query)))
        };
        let for_next = ask(blocking(next));
        let for_next_delta = ask(format!("{}&_HLS_skip=YES", blocking(next)));
        let for_after = ask(blocking(after));
        let path = LlOrigin::playlist_path(VIDEO);
        for query in [blocking(next), format!("{}&_HLS_skip=YES", blocking(next)), blocking(after)] {
            wait_for("a blocked request at the origin", || {
                (origin.count(&format!("{path}{query}")) == 1).then_some(())
            });
        }
        // Who asks for nothing in particular, or for what is there, does not wait for the others.
        assert!(player.parse(&player.ask("")).last() <= last);
        let there = player.parse(&player.ask(&blocking(last)));
        assert_eq!((there.last(), there.skipped), (last, 0));
        assert!(!for_next.is_finished() && !for_next_delta.is_finished() && !for_after.is_finished());

        // The next part comes, and half of the one after: only those who wait for the next have what they wait for.
        origin.encoder.stop_halfway(after);
        let (full, delta) = (for_next.join().unwrap(), for_next_delta.join().unwrap());
        assert_eq!((full.last(), full.skipped), (next, 0));
        assert_eq!(delta.last(), next);
        assert!(delta.skipped > 0, "{}", delta.text);
        assert!(!for_after.is_finished());
        origin.encoder.go_on();
        let late = for_after.join().unwrap();
        assert!(late.last() >= after && late.skipped == 0, "{}", late.text);
    });
}

#[test]
fn a_delta_update_names_a_key_at_once_and_adds_up_to_the_full_playlist() {
    let (origin, shield) = start(Duration::from_secs(10), Parts::Files);
    let mut player = follow(&shield, VIDEO);
    let older = player.next().clone();
    let start = older.last();
    // Over more than one segment, so that merging has something to do.
    while player.playlist.last().msn < start.msn + 2 {
        player.next();
    }
    origin.encoder.stop();
    let (full, delta) = wait_for("both forms of one state", || {
        let full = player.parse(&player.ask(&blocking(origin.last())));
        let delta = player.parse(&player.ask(&format!("{}&_HLS_skip=YES", blocking(origin.last()))));
        (full.last() == delta.last()).then_some((full, delta))
    });
    assert_eq!(full.skipped, 0);
    assert!(delta.skipped > 0, "{}", delta.text);
    let (_, after) = delta.text.split_once("#EXT-X-SKIP:").unwrap();
    let first_key = after.find("#EXT-X-KEY:").expect("a key after the skip");
    for of_segment in ["#EXTINF:", "#EXT-X-PART:"] {
        assert!(first_key < after.find(of_segment).unwrap(), "{}", delta.text);
    }

    // As a player merges: what was skipped it has from before, everything else is what the update says.
    let first = delta.first_msn;
    let kept = older.segments.range(first..first + delta.skipped).map(|(msn, link)| (*msn, link.clone()));
    let merged: BTreeMap<_, _> = kept.chain(delta.segments.clone()).collect();
    assert_eq!(merged, full.segments);
    assert_eq!((delta.parts, delta.hint), (full.parts, full.hint));
}

#[test]
fn reports_of_renditions_and_the_servers_abilities_are_the_origins_own() {
    let (origin, shield) = start(Duration::from_secs(5), Parts::Files);
    let player = follow(&shield, AUDIO);
    origin.encoder.stop();
    let clear = Follower::start(&origin.at(&LlOrigin::playlist_path(AUDIO))).playlist;
    let served = player.parse(&player.ask(&blocking(origin.last())));
    for tag in ["#EXT-X-RENDITION-REPORT:", "#EXT-X-SERVER-CONTROL:", "#EXT-X-PART-INF:"] {
        assert_eq!(clear.lines(tag).len(), 1);
        assert_eq!(served.lines(tag), clear.lines(tag));
    }
    let dates = "#EXT-X-PROGRAM-DATE-TIME:";
    assert_eq!(served.lines(dates), clear.lines(dates));
}

#[test]
fn a_part_reaches_its_reader_while_the_origin_makes_it() {
    let (origin, shield) = start(Duration::from_secs(8), Parts::Files);
    let mut player = follow(&shield, VIDEO);
    let place = origin.last().next().next();
    origin.encoder.stop_halfway(place);
    let hint = player.until_hint_at(place);
    let clear = origin.media.part(VIDEO, place);
    let mut reader = open(&hint);
    // Half of the part, less a block that CBC cannot end yet.
    let (head, _) = read_some(&mut reader, clear.len() / 2 - 16);
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert_eq!(origin.last().next(), place, "the origin has not made it");
    origin.encoder.go_on();
    reader.read_to_end(&mut Vec::new()).unwrap();

    let playlist = player.next();
    assert_eq!(playlist.parts[&place].url, hint);
    Watched::new(&origin, VIDEO).decrypts(&playlist.parts[&place], clear);
}

#[test]
fn ffmpeg_plays_the_encrypted_low_latency_stream_over_key_changes() {
    let duration = Duration::from_secs(10);
    let (_origin, shield) = start(duration, Parts::Files);
    check_ffmpeg(&shield.at(MASTER), duration);
}

#[test]
fn hls_js_plays_the_encrypted_stream_by_parts_over_key_changes() {
    let duration = Duration::from_secs(15);
    let (_origin, shield) = start(duration, Parts::Files);
    let report = hls_js_report(&shield.at(MASTER), duration);
    check_low_latency(&report, duration);
    assert_eq!(report["decryptErrors"], 0, "{report}");
    // A key is for three seconds of both renditions.
    assert!(report["keysLoaded"].as_array().unwrap().len() >= 4, "{report}");
}

#[test]
fn a_delta_that_leaves_out_how_the_origin_encrypts_becomes_the_whole_playlist() {
    const HEAD: &str = "#EXTM3U\n#EXT-X-VERSION:9\n#EXT-X-TARGETDURATION:4\n\
        #EXT-X-SERVER-CONTROL:CAN-SKIP-UNTIL=24.0\n#EXT-X-MEDIA-SEQUENCE:1\n";
    const KEY: &str = "#EXT-X-KEY:METHOD=AES-128,URI=\"k.bin\",IV=0x01\n";
    let origin = Origin::start(|request| {
        origin::Answer::ok(match request.target.contains("_HLS_skip") {
            true => format!("{HEAD}#EXT-X-SKIP:SKIPPED-SEGMENTS=2\n#EXTINF:4,\nc.ts\n"),
            false => format!("{HEAD}{KEY}#EXTINF:4,\na.ts\n#EXTINF:4,\nb.ts\n#EXTINF:4,\nc.ts\n"),
        })
    });
    let url = origin.url();
    let shield = Running::serve(&format!(
        "[[origins]]\nname = \"main\"\nurls = [\"{url}\"]\n\
         [[streams]]\nid = \"live\"\nplaylist_url = \"{url}/live/index.m3u8\"\n\
         [streams.policy]\non_encrypted = \"rekey\"\n"
    ));
    let whole = shield.get("/live/index.m3u8").text();
    let delta = shield.get("/live/index.m3u8?_HLS_skip=YES").text();
    assert_eq!(delta, whole);
    assert_eq!(whole.matches(".k.").count(), 3, "{whole}");
    assert!(origin.count("/live/index.m3u8?_HLS_skip=YES") > 0, "the origin was asked for a delta");
}
