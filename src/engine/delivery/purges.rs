//! Letting go of keys that were taken back: out of the edge's store, out of every cache, and looked after.
//!
//! A revocation's incident is a row, with one for each CDN. Each CDN has a road for these alone, so that a slow lane, or
//! a slow neighbour, keeps nobody from purging. A purge is repeated when every node has broken off the
//! answers under the old key that were under way: they would be cached behind the first one. Then the edge is asked what it gives out, and
//! while that is a revoked key, or what was encrypted under one, it is purged again.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::Place;
use super::pace::Call;
use crate::cdn::{CdnError, CdnFault, DeliveryMode, KeySeen, Purge};
use crate::engine::live::BREAK_OFF_AFTER;
use crate::engine::worker::Core;
use crate::fault;
use crate::keys::{KeyId, Timestamp};
use crate::store::{IncidentCdnRow, IncidentRow, PurgeState, StoreError};

/// Behind the moment at which a node breaks off what is under way, which is so long after it has heard of the revocation.
const LAST_PURGE_SLACK: Duration = Duration::from_secs(1);
/// How often incidents are looked for, and worked on.
const TICK: Duration = Duration::from_secs(1);
const TICK_WHILE_OPEN: Duration = Duration::from_millis(100);
/// What an edge still gives out is purged again after this, and then after twice as long each time.
const FIRST_PURGE_AGAIN: Duration = Duration::from_secs(2);
const LAST_PURGE_AGAIN: Duration = Duration::from_secs(60);
/// Incidents for which the edge is asked at once.
const PROBED_AT_ONCE: usize = 32;
/// Paths of an incident that the edge is asked for.
const MAX_PROBES: usize = 16;

impl Core {
    /// Works on revocations at one CDN for as long as the process lives.
    pub(in crate::engine) async fn keep_purging(self: Arc<Self>, place: Arc<Place>) {
        let mut tick = TICK;
        loop {
            tokio::select! {
                () = tokio::time::sleep(tick) => {}
                () = place.new_purges.notified() => {}
            }
            tick = TICK;
            if !self.holds_lease() || self.is_store_away() {
                continue;
            }
            match self.work_on_incidents(&place).await {
                Ok(0) => {}
                Ok(_) => tick = TICK_WHILE_OPEN,
                Err(error) => {
                    self.note_if_away(&error);
                    tracing::debug!(%error, cdn = place.cdn.name, "incidents could not be read or noted");
                }
            }
        }
    }

    /// One step for each incident that is open at a CDN; how many there are.
    async fn work_on_incidents(self: &Arc<Self>, place: &Arc<Place>) -> Result<usize, StoreError> {
        let incidents = self.store.open_incidents_at(&place.cdn.name).await?;
        let all = self.store.count_open_incidents().await?;
        self.shared.metrics.incidents_open.set(i64::try_from(all).unwrap_or(i64::MAX));
        let mut open: Vec<_> = incidents
            .into_iter()
            .filter_map(|mut incident| {
                let is_ours =
                    |row: &IncidentCdnRow| row.cdn == place.cdn.name && row.state != PurgeState::Complete;
                let at = incident.cdns.iter().position(is_ours)?;
                let row = incident.cdns.swap_remove(at);
                Some((incident, row))
            })
            .collect();
        if open.is_empty() || place.pace.lock().is_paused(Call::Purge, self.monotonic()) {
            return Ok(open.len());
        }
        let now = self.now();
        let (mut to_purge, mut to_probe): (Vec<_>, Vec<_>) = (Vec::new(), Vec::new());
        for (at, (incident, row)) in open.iter().enumerate() {
            let settles_within = place.cdn.cdn.limits().settles_within;
            match next(incident, row, now, (self.last_purge_after(), settles_within)) {
                Next::Purge => to_purge.push(at),
                Next::Probe => to_probe.push(at),
                Next::Wait => {}
            }
        }
        self.purge(place, &mut open, &to_purge).await?;
        let still_open = open.len();
        // The others have their turn in the next step: whoever is taken back now does not wait for them.
        to_probe.truncate(PROBED_AT_ONCE);
        let to_probe = open.into_iter().enumerate().filter(|(at, _)| to_probe.contains(at));
        self.probe(place, to_probe.map(|(_, open)| open)).await?;
        Ok(still_open)
    }

    /// When nothing that was under way at a revocation can come to a cache any more: nodes hear of it within the poll
    /// interval, and then break it off.
    fn last_purge_after(&self) -> Duration {
        BREAK_OFF_AFTER + self.fleet.poll_interval.max(LAST_PURGE_SLACK)
    }

    /// Purges for several incidents together, in as many calls as the vendor's limits ask for.
    async fn purge(
        &self,
        place: &Place,
        open: &mut [(IncidentRow, IncidentCdnRow)],
        which: &[usize],
    ) -> Result<(), StoreError> {
        let limits = place.cdn.cdn.limits();
        let at_once = limits.tags_per_purge.max(limits.urls_per_purge / MAX_PROBES).max(1);
        let mut which = which.iter().copied().peekable();
        while which.peek().is_some() {
            let (mut batch, mut keys) = (Vec::new(), Vec::new());
            while let Some(at) =
                which.next_if(|at| batch.is_empty() || keys.len() + open[*at].0.keys.len() <= at_once)
            {
                keys.extend_from_slice(&open[at].0.keys);
                batch.push(at);
            }
            let done = self.let_go(place, open, &batch, &keys).await;
            let now = self.now();
            let mut noted = Vec::with_capacity(batch.len());
            for at in &batch {
                let (incident, row) = &mut open[*at];
                row.updated_at = now;
                match &done {
                    Ok(true) => {
                        row.state = PurgeState::Purged;
                        row.purges = row.purges.saturating_add(1);
                        row.purged_at = Some(now);
                        row.last_error = None;
                    }
                    // No call is to be had now: nothing to note.
                    Ok(false) => return Ok(()),
                    Err(error) => row.last_error = Some(error.to_string()),
                }
                noted.push((incident.id, row.clone()));
            }
            self.store.note_purges(&noted).await?;
            if let Err(error) = done {
                self.note_cdn_failure(place, Call::Purge, &error).await;
                return Ok(());
            }
            self.note_cdn_up(place, Call::Purge).await;
        }
        Ok(())
    }

    /// Takes keys out of the edge's store, and what was encrypted under them out of the caches. `false`: the vendor's
    /// rate does not allow it yet.
    async fn let_go(
        &self,
        place: &Place,
        open: &[(IncidentRow, IncidentCdnRow)],
        batch: &[usize],
        keys: &[KeyId],
    ) -> Result<bool, CdnError> {
        {
            let (mut pace, now) = (place.pace.lock(), self.monotonic());
            let is_push = place.cdn.mode == DeliveryMode::Push;
            if (is_push && pace.is_scarce(Call::Write, now)) || !pace.take(Call::Purge, now) {
                return Ok(false);
            }
        }
        fault::point("purge: before the CDN is told");
        if place.cdn.mode == DeliveryMode::Push {
            for keys in keys.chunks(place.cdn.cdn.limits().keys_per_call.max(1)) {
                // A key that was taken back waits for no rate of ours.
                place.pace.lock().note(Call::Write, self.monotonic());
                self.ask(place, "delete", place.cdn.cdn.delete_keys(keys)).await?;
            }
        }
        let purge = self.purge_of(batch.iter().map(|at| &open[*at].0));
        // Where it takes its time, such as CloudFront's invalidations, the connector knows how long that may be.
        let done = place.cdn.cdn.purge(&purge).await;
        let outcome = done.as_ref().map_or_else(|error| error.fault.to_string(), |()| "ok".to_owned());
        self.shared.metrics.cdn_calls.with_label_values(&[&place.cdn.name, "purge", &outcome]).inc();
        fault::point("purge: the CDN was told, not noted");
        done.map(|()| true)
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
    async fn probe(
        self: &Arc<Self>,
        place: &Arc<Place>,
        open: impl Iterator<Item = (IncidentRow, IncidentCdnRow)>,
    ) -> Result<(), StoreError> {
        let mut asked = JoinSet::new();
        for (incident, row) in open {
            fault::point("purge: before the edge is asked");
            let (core, place) = (Arc::clone(self), Arc::clone(place));
            asked.spawn(async move {
                let found = core.what_is_left(&place, &incident).await;
                (incident, row, found)
            });
        }
        let mut noted = Vec::new();
        while let Some(joined) = asked.join_next().await {
            // A look that broke off is done again.
            let Ok((incident, mut row, found)) = joined else { continue };
            self.judge_probe(place, &incident, &mut row, found).await;
            noted.push((incident.id, row));
        }
        noted.sort_by_key(|(id, _)| *id);
        for incident in self.store.note_purges(&noted).await? {
            tracing::warn!(%incident, "every CDN has let go of the revoked keys");
        }
        Ok(())
    }

    async fn judge_probe(
        &self,
        place: &Place,
        incident: &IncidentRow,
        row: &mut IncidentCdnRow,
        found: Result<Option<String>, CdnError>,
    ) {
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
                self.note_cdn_up(place, Call::Purge).await;
            }
            Ok(Some(left)) => {
                row.last_error = Some(left);
                // To be purged again, when its time comes.
                row.state = PurgeState::Pending;
            }
            Err(error) => {
                row.last_error = Some(error.to_string());
                self.note_cdn_failure(place, Call::Purge, &error).await;
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
        (PurgeState::Complete, _) => Next::Wait,
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
