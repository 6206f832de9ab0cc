//! The streams, found by ID and by the paths that they own.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Included, Unbounded};
use std::sync::Arc;

use super::stream::Stream;
use crate::keys::StreamId;

/// Streams that are not deleted. Look-ups by path cost about as much as the path is long, however many there are.
#[derive(Default)]
pub(super) struct Directory {
    by_id: BTreeMap<StreamId, Arc<Stream>>,
    /// Origin → prefix → stream; and the same with letters compared without their case.
    by_prefix: HashMap<String, Prefixes>,
}

#[derive(Default)]
struct Prefixes {
    exact: BTreeMap<String, Arc<Stream>>,
    /// How many streams have each prefix when case is left out.
    lower: BTreeMap<String, usize>,
}

impl Directory {
    /// Takes a stream in, and gives the one that had its ID.
    pub(super) fn insert(&mut self, stream: Arc<Stream>) -> Option<Arc<Stream>> {
        let before = self.remove(&stream.id);
        let prefixes = self.by_prefix.entry(stream.origin.clone()).or_default();
        prefixes.exact.insert(stream.prefix.clone(), Arc::clone(&stream));
        *prefixes.lower.entry(stream.prefix.to_lowercase()).or_default() += 1;
        self.by_id.insert(stream.id.clone(), stream);
        before
    }

    pub(super) fn remove(&mut self, id: &StreamId) -> Option<Arc<Stream>> {
        let stream = self.by_id.remove(id)?;
        if let Some(prefixes) = self.by_prefix.get_mut(&stream.origin) {
            // Another stream may have taken the prefix before this one's end was heard of.
            if prefixes.exact.get(&stream.prefix).is_some_and(|owner| owner.id == *id) {
                prefixes.exact.remove(&stream.prefix);
            }
            let lower = stream.prefix.to_lowercase();
            if let Some(count) = prefixes.lower.get_mut(&lower) {
                *count -= 1;
                if *count == 0 {
                    prefixes.lower.remove(&lower);
                }
            }
        }
        Some(stream)
    }

    pub(super) fn get(&self, id: &StreamId) -> Option<&Arc<Stream>> {
        self.by_id.get(id)
    }

    /// In the order of their IDs.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Stream>> {
        self.by_id.values()
    }

    pub(super) fn after(&self, id: Option<&StreamId>) -> impl Iterator<Item = &Arc<Stream>> {
        use std::ops::Bound::Excluded;
        let from = id.map_or(Unbounded, Excluded);
        self.by_id.range::<StreamId, _>((from, Unbounded)).map(|(_, stream)| stream)
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// The stream with the longest prefix that `path` begins with.
    pub(super) fn owner(&self, origin: &str, path: &str) -> Option<&Arc<Stream>> {
        longest_prefix(&self.by_prefix.get(origin)?.exact, path)
    }

    /// Whether some stream would own `path` if letters had no case.
    pub(super) fn has_like(&self, origin: &str, path: &str) -> bool {
        let prefixes = self.by_prefix.get(origin);
        prefixes.is_some_and(|prefixes| longest_prefix(&prefixes.lower, &path.to_lowercase()).is_some())
    }
}

/// The value of the longest key that `text` begins with. The greatest key that is not above `text` is either that
/// prefix, or shares with `text` all that a prefix of both could be.
fn longest_prefix<'m, V>(map: &'m BTreeMap<String, V>, text: &str) -> Option<&'m V> {
    let mut text = text;
    loop {
        let (key, value) = map.range::<str, _>((Unbounded, Included(text))).next_back()?;
        if text.starts_with(key.as_str()) {
            return Some(value);
        }
        let shared = key.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
        let cut = (0..=shared).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text = &text[..cut];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_is_found_among_neighbours() {
        let keys = ["/", "/live/", "/live/ch1/", "/live/ch1/a/", "/live/ch10/", "/live/ch2", "/live/ä"];
        let map: BTreeMap<_, _> = keys.iter().map(|key| ((*key).to_owned(), *key)).collect();
        let find = |text| longest_prefix(&map, text).copied();
        assert_eq!(find("/live/ch1/720p.m3u8"), Some("/live/ch1/"));
        assert_eq!(find("/live/ch1/a/x"), Some("/live/ch1/a/"));
        assert_eq!(find("/live/ch1/b"), Some("/live/ch1/"));
        assert_eq!(find("/live/ch10/x"), Some("/live/ch10/"));
        assert_eq!(find("/live/ch2_flat"), Some("/live/ch2"));
        assert_eq!(find("/live/ch3"), Some("/live/"));
        assert_eq!(find("/live/äö"), Some("/live/ä"));
        assert_eq!(find("/live/ö"), Some("/live/"));
        assert_eq!(find("/vod"), Some("/"));
        assert_eq!(find("x"), None);
    }
}
