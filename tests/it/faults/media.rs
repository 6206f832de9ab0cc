//! An origin whose every byte is known, and which goes on when it is told to.
//!
//! Any folder holds a stream of two renditions with the same numbers; any segment that was ever listed is there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::origin::{Answer, Origin};

pub const RENDITIONS: [&str; 2] = ["hi", "lo"];
/// An address at which nobody listens: what streams' URLs are under, so that they outlive the origin's port.
pub const NAME: &str = "http://127.0.0.1:1";
/// Segments in a playlist.
const WINDOW: u64 = 4;

/// How far the origin is: the first Media Sequence Number of every window.
#[derive(Clone)]
pub struct Media(Arc<AtomicU64>);

impl Media {
    /// An origin that lists segments from `first` on.
    pub fn start(first: u64) -> (Self, Origin) {
        let media = Self(Arc::new(AtomicU64::new(first)));
        let answers = media.clone();
        (media, Origin::forgetful(move |request| answers.answer(&request.target)))
    }

    pub fn first(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    /// Every playlist goes on by so many segments.
    pub fn advance(&self, by: u64) {
        self.0.fetch_add(by, Ordering::SeqCst);
    }

    fn answer(&self, target: &str) -> Answer {
        let first = self.first();
        if target.ends_with("/index.m3u8") {
            return Answer::ok(MULTIVARIANT);
        }
        if let Some(rendition) = target.strip_suffix(".m3u8").and_then(|path| path.rsplit('/').next()) {
            let mut text = format!(
                "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:{first}\n"
            );
            for msn in first..first + WINDOW {
                text.push_str(&format!("#EXTINF:1,\n{rendition}/{msn}.ts\n"));
            }
            return Answer::ok(text);
        }
        let msn = target.strip_suffix(".ts").and_then(|path| path.rsplit('/').next()?.parse::<u64>().ok());
        match msn.filter(|msn| *msn < first + WINDOW) {
            Some(_) => Answer::ok(clear(target)),
            None => Answer::status(404),
        }
    }
}

const MULTIVARIANT: &str = "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=200000\nhi.m3u8\n\
    #EXT-X-STREAM-INF:BANDWIDTH=100000\nlo.m3u8\n";

/// The bytes of the segment at a path: a few transport stream packets, no two of them alike.
pub fn clear(path: &str) -> Vec<u8> {
    let packet = |n: u8| {
        let noise = Sha256::new().chain_update(path).chain_update([n]).finalize();
        let filler = noise.iter().copied().cycle();
        [0x47].into_iter().chain(filler).take(188).collect::<Vec<_>>()
    };
    (0..5).flat_map(packet).collect()
}
