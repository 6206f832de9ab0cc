//! Letting go of keys that were taken back: out of the edge's store, out of every cache, and looked after.
//!
//! A revocation's incident is a row, with one for each CDN. Each CDN has a road for these alone, so that a slow lane, or
//! a slow neighbour, keeps nobody from purging; and another for asking its edge, so that one that does not answer keeps
//! no later revocation from being purged. What is next for a row says which of the two works on it. A purge is repeated
//! when every node has broken off the answers under the old key that were under way: they would be cached behind the
//! first one. Then the edge is asked what it gives out, and while that is a revoked key, or what was encrypted under one,
//! it is purged again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::Place;
use super::pace::Call;
use crate::cdn::{CdnError, CdnFault, DeliveryMode, KeySeen, Purge};
use crate::engine::live::BREAK_OFF_AFTER;
use crate::engine::worker::Core;
use crate::fault;
use crate::keys::{IncidentId, KeyId, Timestamp};
use crate::store::{IncidentCdnRow, IncidentRow, PurgeState, StoreError};

/// Behind the moment at which a node breaks off what is under way, which is so long after it has heard of the revocation.
const LAST_PURGE_SLACK: Duration = Duration::from_secs(1);
/// How often incidents are looked for, and worked on.
const TICK: Duration = Duration::from_secs(1);
const TICK_WHILE_URGENT: Duration = Duration::from_millis(100);
/// What is open for longer than this waits for something that takes its time.
const URGENT_FOR: Duration = Duration::from_secs(60);
/// What an edge still gives out is purged again after this, and then after twice as long each time.
const FIRST_PURGE_AGAIN: Duration = Duration::from_secs(2);
const LAST_PURGE_AGAIN: Duration = Duration::from_secs(60);
/// Incidents about which an edge is asked at once.
const PROBED_AT_ONCE: usize = 16;
/// Paths of an incident that the edge is asked for.
const MAX_PROBES: usize = 16;

/// Purges under way at one CDN at once: a vendor may take a minute for one, and none must wait for another.
const MAX_UNDER_WAY: usize = 16;

/// Purges that have begun.
#[derive(Default)]
struct UnderWay {
    tasks: JoinSet<()>,
    incidents: Arc<Mutex<HashSet<IncidentId>>>,
}

impl UnderWay {
    fn begin(&self, batch: &[Open]) -> Begun {
        let which: Vec<_> = batch.iter().map(|(incident, _)| incident.id).collect();
        self.incidents.lock().extend(&which);
        Begun { which, all: Arc::clone(&self.incidents) }
    }
}

/// Incidents for which a purge has begun, until it is dropped.
struct Begun {
    which: Vec<IncidentId>,
    all: Arc<Mutex<HashSet<IncidentId>>>,
}

impl Drop for Begun {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        for id in &self.which {
            all.remove(id);
        }
    }
}

/// An incident, and its row of one CDN.
type Open = (IncidentRow, IncidentCdnRow);

impl Core {
    /// Purges what was taken back at one CDN for as long as the process lives.
    pub(in crate::engine) async fn keep_purging(self: Arc<Self>, place: Arc<Place>) {
        // Ends with this.
        let mut under_way = UnderWay::default();
        let mut tick = TICK;
        loop {
            tokio::select! {
                () = tokio::time::sleep(tick) => {}
                () = place.new_purges.notified() => {}
            }
            while under_way.tasks.try_join_next().is_some() {}
            tick = self.worked(&place, self.purge_what_is_due(&place, &mut under_way).await);
        }
    }

    /// Asks the edge of one CDN, once it was purged, for as long as the process lives.
    pub(in crate::engine) async fn keep_probing(self: Arc<Self>, place: Arc<Place>) {
        let mut tick = TICK;
        loop {
            tokio::time::sleep(tick).await;
            tick = self.worked(&place, self.probe_what_is_due(&place).await);
        }
    }

    /// How long to wait after a step at a CDN: it says when the newest revocation was that is open there.
    fn worked(&self, place: &Place, step: Result<Option<Timestamp>, StoreError>) -> Duration {
        match step {
            Ok(Some(newest)) if self.now().since(newest) < URGENT_FOR => TICK_WHILE_URGENT,
            Ok(_) => TICK,
            Err(error) => {
                self.note_if_away(&error);
                tracing::debug!(%error, cdn = place.cdn.name, "incidents could not be read or noted");
                TICK
            }
        }
    }

    /// What is open at a CDN, if it is this node's to work on.
    async fn open_at(&self, place: &Place) -> Result<Vec<Open>, StoreError> {
        if !self.holds_lease() || self.is_store_away() {
            return Ok(Vec::new());
        }
        let of_place = |incident: IncidentRow| {
            let row =
                incident.cdns.iter().find(|row| row.cdn == place.cdn.name && row.state.is_open())?.clone();
            Some((incident, row))
        };
        Ok(self.store.open_incidents(&place.cdn.name).await?.into_iter().filter_map(of_place).collect())
    }

    /// One step for each incident that is to be purged; when the newest was that is open.
    async fn purge_what_is_due(
        self: &Arc<Self>,
        place: &Arc<Place>,
        under_way: &mut UnderWay,
    ) -> Result<Option<Timestamp>, StoreError> {
        // Before the rows are read: what ends in between is looked at the next time, and not purged once more.
        let busy = under_way.incidents.lock().clone();
        let open = self.open_at(place).await?;
        let newest = open.iter().map(|(incident, _)| incident.revoked_at).max();
        if newest.is_none() {
            // What could not be done is not to be done any more.
            self.note_nothing_to_do(place, &[Call::Purge, Call::Probe]).await;
        }
        if newest.is_none() || place.pace.lock().is_paused(Call::Purge, self.monotonic()) {
            return Ok(newest);
        }
        let is_due = |open: &Open| !busy.contains(&open.0.id) && self.next(place, open) == Next::Purge;
        let mut due: Vec<_> = open.into_iter().filter(is_due).collect();
        // What was never purged is the most urgent, whatever of older ones is to be purged again.
        due.sort_by_key(|(_, row)| row.purges);
        self.begin_purges(place, due, under_way);
        Ok(newest)
    }

    /// As [`Self::purge_what_is_due`], of those whose edge is to be asked.
    async fn probe_what_is_due(
        self: &Arc<Self>,
        place: &Arc<Place>,
    ) -> Result<Option<Timestamp>, StoreError> {
        let open = self.open_at(place).await?;
        let newest = open.iter().map(|(incident, _)| incident.revoked_at).max();
        if !place.pace.lock().is_paused(Call::Probe, self.monotonic()) {
            let due = open.into_iter().filter(|open| self.next(place, open) == Next::Probe).collect();
            self.probe(place, due).await?;
        }
        Ok(newest)
    }

    fn next(&self, place: &Place, (incident, row): &Open) -> Next {
        let settles_within = place.cdn.cdn.limits().settles_within;
        next(incident, row, self.now(), (self.last_purge_after(), settles_within))
    }

    /// When nothing that was under way at a revocation can come to a cache any more: nodes hear of it within the poll
    /// interval and what it takes to read, and then break it off.
    fn last_purge_after(&self) -> Duration {
        let heard_within = if self.is_alone() { Duration::ZERO } else { self.fleet.poll_interval };
        BREAK_OFF_AFTER + heard_within + LAST_PURGE_SLACK
    }

    /// Begins purges for several incidents together, in as many calls as the vendor's limits ask for and its rate allows.
    fn begin_purges(self: &Arc<Self>, place: &Arc<Place>, due: Vec<Open>, under_way: &mut UnderWay) {
        let limits = place.cdn.cdn.limits();
        let at_once = limits.tags_per_purge.max(limits.urls_per_purge / MAX_PROBES).max(1);
        let mut due = due.into_iter().peekable();
        while due.peek().is_some() && under_way.tasks.len() < MAX_UNDER_WAY && self.may_tell(place) {
            let (mut batch, mut keys) = (Vec::new(), 0);
            while let Some(open) =
                due.next_if(|(incident, _)| batch.is_empty() || keys + incident.keys.len() <= at_once)
            {
                keys += open.0.keys.len();
                batch.push(open);
            }
            let (core, place, begun) = (Arc::clone(self), Arc::clone(place), under_way.begin(&batch));
            under_way.tasks.spawn(async move {
                let _begun = begun;
                if let Err(error) = core.purge(&place, batch).await {
                    core.note_if_away(&error);
                    tracing::debug!(%error, cdn = place.cdn.name, "a purge could not be noted; it is done again");
                }
            });
        }
    }

    /// Takes the right to tell a CDN, if its rate allows it now.
    fn may_tell(&self, place: &Place) -> bool {
        let (mut pace, now) = (place.pace.lock(), self.monotonic());
        let is_push = place.cdn.mode == DeliveryMode::Push;
        !(is_push && pace.is_scarce(Call::Write, now)) && pace.take(Call::Purge, now)
    }

    async fn purge(&self, place: &Place, mut batch: Vec<Open>) -> Result<(), StoreError> {
        // What comes to a cache from now on, the vendor need not take out, however long it takes for the rest.
        let told_at = self.now();
        let done = self.let_go(place, &batch).await;
        for (_, row) in &mut batch {
            row.updated_at = self.now();
            match &done {
                Ok(()) => {
                    row.state = PurgeState::Purged;
                    row.purges = row.purges.saturating_add(1);
                    row.purged_at = Some(told_at);
                    row.last_error = None;
                }
                Err(error) => row.last_error = Some(error.to_string()),
            }
        }
        let noted: Vec<_> = batch.into_iter().map(|(incident, row)| (incident.id, row)).collect();
        self.store.note_purges(&noted).await?;
        match done {
            Ok(()) => self.note_cdn_up(place, Call::Purge).await,
            Err(error) => self.note_cdn_failure(place, Call::Purge, &error).await,
        }
        Ok(())
    }

    /// Takes keys out of the edge's store, and what was encrypted under them out of the caches.
    async fn let_go(&self, place: &Place, batch: &[Open]) -> Result<(), CdnError> {
        fault::point("purge: before the CDN is told");
        let mut deleted = Ok(());
        if place.cdn.mode == DeliveryMode::Push {
            let keys: Vec<_> = batch.iter().flat_map(|(incident, _)| incident.keys.iter().copied()).collect();
            for keys in keys.chunks(place.cdn.cdn.limits().keys_per_call.max(1)) {
                // A key that was taken back waits for no rate of ours.
                place.pace.lock().note(Call::Write, self.monotonic());
                deleted = self.ask(place, "delete", place.cdn.cdn.delete_keys(keys)).await;
                if deleted.is_err() {
                    break;
                }
            }
        }
        // Whatever became of its store: the caches are another part of it, and as urgent.
        let purge = self.purge_of(batch.iter().map(|(incident, _)| incident));
        // Where it takes its time, such as CloudFront's invalidations, the connector knows how long that may be.
        let done = place.cdn.cdn.purge(&purge).await;
        self.count_call(place, "purge", &done);
        fault::point("purge: the CDN was told, not noted");
        done.and(deleted)
    }

    fn purge_of<'i>(&self, incidents: impl Iterator<Item = &'i IncidentRow>) -> Purge {
        let mut purge = Purge::default();
        for incident in incidents {
            for key in &incident.keys {
                purge.tags.push(format!("keyshield-key-{key}"));
                purge.paths.push(self.key_path(*key));
                purge.prefixes.push(self.key_path(*key));
            }
            purge.paths.extend(incident.paths.iter().cloned());
            if let Some(stream) = self.shared.directory.read().get(&incident.stream) {
                purge.prefixes.push(stream.prefix_of_shield());
            }
        }
        purge.prefixes.dedup();
        purge
    }

    fn key_path(&self, key: KeyId) -> String {
        format!("{}{key}", self.delivery.rules.key_path)
    }

    /// Looks whether the edge has let go, for several incidents at once.
    async fn probe(self: &Arc<Self>, place: &Arc<Place>, which: Vec<Open>) -> Result<(), StoreError> {
        for some in which.chunks(PROBED_AT_ONCE) {
            let mut asked = JoinSet::new();
            for (incident, row) in some.iter().cloned() {
                fault::point("purge: before the edge is asked");
                let (core, place) = (Arc::clone(self), Arc::clone(place));
                asked.spawn(async move {
                    let found = core.what_is_left(&place, &incident).await;
                    (incident, row, found)
                });
            }
            let (mut noted, mut failed) = (Vec::with_capacity(some.len()), None);
            while let Some(joined) = asked.join_next().await {
                let Ok((incident, mut row, found)) = joined else { continue };
                failed = self.judge_probe(place, &incident, &mut row, found).or(failed);
                noted.push((incident.id, row));
            }
            for incident in self.store.note_purges(&noted).await? {
                tracing::warn!(%incident, "every CDN has let go of the revoked keys");
            }
            match failed {
                Some(error) => {
                    self.note_cdn_failure(place, Call::Probe, &error).await;
                    return Ok(());
                }
                None => self.note_cdn_up(place, Call::Probe).await,
            }
        }
        Ok(())
    }

    /// Puts what was found into a row; a failure is the CDN's.
    fn judge_probe(
        &self,
        place: &Place,
        incident: &IncidentRow,
        row: &mut IncidentCdnRow,
        found: Result<Option<String>, CdnError>,
    ) -> Option<CdnError> {
        row.updated_at = self.now();
        match found {
            Ok(None) => {
                row.state = PurgeState::Complete;
                row.completed_at = Some(row.updated_at);
                row.last_error = None;
                let took = row.updated_at.since(incident.revoked_at);
                let (cdn, incident) = (&place.cdn.name, incident.id);
                tracing::info!(cdn, %incident, took_millis = took.as_millis(), "the CDN has let go of revoked keys");
                self.shared.metrics.revocation_seconds.with_label_values(&[cdn]).observe(took.as_secs_f64());
                None
            }
            Ok(Some(left)) => {
                row.last_error = Some(left);
                // To be purged again, when its time comes.
                row.state = PurgeState::Pending;
                None
            }
            Err(error) => {
                row.last_error = Some(error.to_string());
                Some(error)
            }
        }
    }

    /// What the edge still gives out, in words.
    async fn what_is_left(&self, place: &Place, incident: &IncidentRow) -> Result<Option<String>, CdnError> {
        let cdn = &place.cdn.cdn;
        for key in &incident.keys {
            // The shield says "gone"; an edge's own store says that it has none.
            let seen = match self.ask(place, "probe", cdn.verify(*key)).await {
                // Its answer tells nothing of the key, and nobody gets one by it.
                Err(error) if error.fault == CdnFault::NotFound => KeySeen::Missing,
                seen => seen?,
            };
            if matches!(seen, KeySeen::Has(_)) {
                return Ok(Some(format!("the edge still gives out key {key}")));
            }
            if self.ask(place, "probe", cdn.has_cached(&self.key_path(*key), *key)).await? {
                return Ok(Some(format!("a cache still gives out key {key}")));
            }
        }
        for path in incident.paths.iter().take(MAX_PROBES) {
            for key in &incident.keys {
                if self.ask(place, "probe", cdn.has_cached(path, *key)).await? {
                    return Ok(Some(format!("a cache still has {path} under key {key}")));
                }
            }
        }
        Ok(None)
    }
}

/// What is next for an incident at a CDN.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Purge,
    Probe,
    Wait,
}

/// `last_purge_after`, `settles_within`: both from the revocation on.
fn next(
    incident: &IncidentRow,
    row: &IncidentCdnRow,
    now: Timestamp,
    (last_purge_after, settles_within): (Duration, Duration),
) -> Next {
    let last = incident.revoked_at.plus(last_purge_after);
    match (row.state, row.purged_at) {
        (PurgeState::Complete | PurgeState::Abandoned, _) => Next::Wait,
        (PurgeState::Pending, None) => Next::Purge,
        // Something was left: again and again, with pauses that grow.
        (PurgeState::Pending, Some(at)) => {
            let pause = FIRST_PURGE_AGAIN
                .saturating_mul(1 << row.purges.saturating_sub(2).min(8))
                .min(LAST_PURGE_AGAIN);
            if now.since(at) >= pause { Next::Purge } else { Next::Wait }
        }
        (PurgeState::Purged, Some(at)) if at < last => {
            if now >= last {
                Next::Purge
            } else {
                Next::Wait
            }
        }
        (PurgeState::Purged, purged_at) => {
            // Told at once, and once more when it was time: it has known since the revocation. Otherwise since it was told.
            let in_time = |at: &Timestamp| row.purges >= 2 && *at < last.plus(LAST_PURGE_SLACK);
            let known_since = purged_at.filter(|at| !in_time(at)).unwrap_or(incident.revoked_at);
            if now >= known_since.plus(settles_within) { Next::Probe } else { Next::Wait }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::IncidentId;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_unix_millis(1_000_000 + millis)
    }

    fn check(state: PurgeState, purged: &[i64], now: i64, settles_secs: u64, expected: Next) {
        let incident = IncidentRow {
            id: IncidentId::from_bytes([1; 16]),
            stream: "ch1".parse().unwrap(),
            reason: "leaked".into(),
            actor: "sam".into(),
            revoked_at: at(0),
            transition_until: at(8_000),
            successor: KeyId::from_bytes([2; 16]),
            keys: vec![KeyId::from_bytes([3; 16])],
            paths: Vec::new(),
            completed_at: None,
            cdns: Vec::new(),
        };
        let row = IncidentCdnRow {
            state,
            purges: u32::try_from(purged.len()).unwrap(),
            cdn: "a".into(),
            purged_at: purged.last().map(|millis| at(*millis)),
            last_error: None,
            updated_at: at(0),
            completed_at: None,
        };
        let settles = Duration::from_secs(settles_secs);
        assert_eq!(
            next(&incident, &row, at(now), (Duration::from_secs(4), settles)),
            expected,
            "{state:?} {purged:?} at {now}"
        );
    }

    #[test]
    fn a_cdn_purges_at_once_and_again_when_nothing_is_under_way_any_more() {
        check(PurgeState::Pending, &[], 1, 0, Next::Purge);
        check(PurgeState::Purged, &[20], 3_999, 0, Next::Wait);
        check(PurgeState::Purged, &[20], 4_000, 0, Next::Purge);
        check(PurgeState::Purged, &[20, 4_010], 4_011, 0, Next::Probe);
    }

    #[test]
    fn one_that_was_away_need_purge_but_once() {
        check(PurgeState::Purged, &[90_000], 90_001, 0, Next::Probe);
    }

    #[test]
    fn an_edge_is_asked_when_it_should_have_settled() {
        check(PurgeState::Purged, &[20, 4_010], 59_999, 60, Next::Wait);
        check(PurgeState::Purged, &[20, 4_010], 60_000, 60, Next::Probe);
        // One that was away then has not begun to.
        check(PurgeState::Purged, &[90_000], 149_999, 60, Next::Wait);
        check(PurgeState::Purged, &[90_000], 150_000, 60, Next::Probe);
        check(PurgeState::Purged, &[20, 4_010, 70_000], 129_999, 60, Next::Wait);
    }

    #[test]
    fn what_is_left_is_purged_again_later_and_later() {
        check(PurgeState::Pending, &[20, 4_010], 6_009, 0, Next::Wait);
        check(PurgeState::Pending, &[20, 4_010], 6_010, 0, Next::Purge);
        check(PurgeState::Pending, &[20, 4_010, 6_010], 9_000, 0, Next::Wait);
        check(PurgeState::Pending, &[0; 30], 59_000, 0, Next::Wait);
        check(PurgeState::Pending, &[0; 30], 60_000, 0, Next::Purge);
    }
}
