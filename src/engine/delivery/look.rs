//! What is to be done at a CDN: the difference between the keys of the streams in memory and the rows of what it has.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Place;
use super::lane::Lane;
use crate::engine::live::LiveKey;
use crate::engine::worker::Core;
use crate::keys::{KeyId, belongs_at_edges};
use crate::store::{DeliveryRow, DeliveryState};

/// Keys that are worked on in one step, so that a lane with much to do looks up now and then.
const WORKED_ON_AT_ONCE: usize = 10_000;
/// Where nothing has changed, streams are gone through this often all the same.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// What is to be done.
#[derive(Default)]
pub(super) struct Due {
    pub(super) put: Vec<Arc<LiveKey>>,
    pub(super) verify: Vec<Arc<LiveKey>>,
    pub(super) delete: Vec<KeyId>,
}

impl Due {
    pub(super) fn is_empty(&self) -> bool {
        self.put.is_empty() && self.verify.is_empty() && self.delete.is_empty()
    }
}

impl Core {
    /// What is to be done; `None` while all is as it was when nothing was.
    pub(super) fn look(
        &self,
        place: &Place,
        rows: &HashMap<KeyId, DeliveryRow>,
        lane: &mut Lane,
    ) -> Option<Due> {
        let now = self.monotonic();
        let print = self.print_of_streams();
        let is_settled = |(before, at): (u64, Instant)| before == print && now - at < LOOK_AGAIN_AFTER;
        if lane.settled.is_some_and(is_settled) && place.pace.lock().trouble().is_none() {
            return None;
        }
        let mut due = Due::default();
        let (mut found, mut is_any_stored) = (0_usize, false);
        for stream in self.shared.directory.read().iter() {
            let known = stream.known.read();
            if !self.delivery.of_stream(&known.row.cdn).has(place.at) {
                continue;
            }
            for key in known.keys.values().filter(|key| belongs_at_edges(key.life.state)) {
                let state = rows.get(&key.live.id).map(|row| row.state);
                found += usize::from(state.is_some());
                // Of keys too that were opened since the rows were read.
                key.live.note_delivered(place.at, state == Some(DeliveryState::Verified));
                match state {
                    None | Some(DeliveryState::Sending) => due.put.push(Arc::clone(&key.live)),
                    Some(DeliveryState::Stored) => {
                        is_any_stored = true;
                        if lane.looks.get(&key.live.id).is_none_or(|(at, _)| *at <= now) {
                            due.verify.push(Arc::clone(&key.live));
                        }
                    }
                    Some(DeliveryState::Verified) => {}
                }
            }
        }
        let mut is_any_unheard = false;
        if rows.len() > found {
            (due.delete, is_any_unheard) = self.unwanted(place, rows, lane);
        }
        let is_settled = due.is_empty() && !is_any_stored && !is_any_unheard;
        lane.settled = is_settled.then_some((print, now));
        // Those that are used next are delivered first.
        due.put.sort_by_key(|key| key.ordinal);
        // One that is not shown again and again must not be asked for before those that would be.
        due.verify.sort_by_key(|key| lane.looks.get(&key.id).map(|(_, pause)| *pause));
        due.put.truncate(WORKED_ON_AT_ONCE);
        due.verify.truncate(WORKED_ON_AT_ONCE);
        due.delete.truncate(WORKED_ON_AT_ONCE);
        Some(due)
    }

    /// The keys that have no business at the CDN, and whether there are some of which that is not known yet.
    fn unwanted(&self, place: &Place, rows: &HashMap<KeyId, DeliveryRow>, lane: &Lane) -> (Vec<KeyId>, bool) {
        let directory = self.shared.directory.read();
        let has_heard = *self.shared.news.done.borrow() >= lane.heard_with;
        let (mut unwanted, mut is_any_unheard) = (Vec::new(), false);
        for row in rows.values() {
            let is_wanted = match directory.get(&row.stream).map(|stream| stream.known.read()) {
                None if has_heard => Some(false),
                None => None,
                // What could not be read, or opened, may still be wanted, and so may what another node has made.
                Some(known) if !known.is_read() || known.unopened.contains(&row.ordinal) => None,
                Some(known) if row.ordinal >= known.next => None,
                Some(known) => {
                    let key = known.keys.get(&row.ordinal).filter(|key| key.live.id == row.key);
                    let is_delivered = self.delivery.of_stream(&known.row.cdn).has(place.at);
                    Some(is_delivered && key.is_some_and(|key| belongs_at_edges(key.life.state)))
                }
            };
            match is_wanted {
                Some(true) => {}
                Some(false) => unwanted.push(row.key),
                None => is_any_unheard = true,
            }
        }
        (unwanted, is_any_unheard)
    }

    /// Changes whenever some stream does. Far cheaper than to go through their keys, which every CDN's lane would do
    /// each second.
    fn print_of_streams(&self) -> u64 {
        let directory = self.shared.directory.read();
        directory.iter().fold(directory.len() as u64, |print, stream| {
            let rev = stream.known.read().row.rev;
            (print ^ rev.cast_unsigned()).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    pub(super) fn note_counts(&self, place: &Place, rows: &HashMap<KeyId, DeliveryRow>, due: &Due) {
        let count = |state| rows.values().filter(|row| row.state == state).count();
        let (verified, stored) = (count(DeliveryState::Verified), count(DeliveryState::Stored));
        let counts = [("verified", verified), ("stored", stored), ("waiting", due.put.len())];
        for (state, count) in counts {
            let gauge = self.shared.metrics.cdn_keys.with_label_values(&[&place.cdn.name, state]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}
