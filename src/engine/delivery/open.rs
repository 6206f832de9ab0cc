//! The incidents that are open, read once for all CDNs; and the end of those whose CDN is gone.
//!
//! Every CDN's roads look for incidents every second, and whenever the store tells of a change. That they share what one
//! of them has read a moment ago makes it one query, however many CDNs there are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::time::MissedTickBehavior;

use crate::engine::worker::Core;
use crate::store::{IncidentCdnRow, IncidentRow, PurgeState, StoreError};

/// For so long, what was read is shared: less than a road waits before it looks again at what it has changed itself.
const SHARED_FOR: Duration = Duration::from_millis(50);
/// How often incidents of CDNs that are gone are looked for.
const LOOK_FOR_GONE: Duration = Duration::from_secs(30);
/// A CDN that no node of the fleet has in its configuration for so long after a revocation does not come back with the
/// next node: a configuration is rolled out in less.
const GONE_AFTER: Duration = Duration::from_secs(10 * 60);

/// What was read last, and when that began.
#[derive(Debug, Default)]
pub(super) struct OpenIncidents {
    /// Changes with every word of news.
    news: AtomicU64,
    read: tokio::sync::Mutex<Option<Read>>,
}

#[derive(Debug)]
struct Read {
    news: u64,
    at: Instant,
    incidents: Arc<Vec<IncidentRow>>,
}

impl OpenIncidents {
    /// What was read may lack something.
    pub(super) fn are_old(&self) {
        self.news.fetch_add(1, Ordering::AcqRel);
    }
}

impl Core {
    /// The incidents that are open, the oldest first.
    pub(super) async fn open_incidents(&self) -> Result<Arc<Vec<IncidentRow>>, StoreError> {
        let open = &self.delivery.open;
        let mut last = open.read.lock().await;
        // Looked at before the store is: what comes in between is read again.
        let (news, at) = (open.news.load(Ordering::Acquire), Instant::now());
        if let Some(read) = last.as_ref()
            && read.news == news
            && at.duration_since(read.at) < SHARED_FOR
        {
            return Ok(Arc::clone(&read.incidents));
        }
        let incidents = Arc::new(self.store.open_incidents().await?);
        self.shared.metrics.incidents_open.set(i64::try_from(incidents.len()).unwrap_or(i64::MAX));
        *last = Some(Read { news, at, incidents: Arc::clone(&incidents) });
        Ok(incidents)
    }

    /// Ends what waits for CDNs that this shield has no more, for as long as the process lives.
    pub(in crate::engine) async fn keep_ending_what_is_gone(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_FOR_GONE.min(self.fleet.sweep_interval * 6));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if self.holds_lease()
                && !self.is_store_away()
                && let Err(error) = self.end_what_is_gone().await
            {
                self.note_if_away(&error);
                tracing::debug!(%error, "incidents could not be read or noted");
            }
        }
    }

    async fn end_what_is_gone(&self) -> Result<(), StoreError> {
        let now = self.now();
        for incident in self.open_incidents().await?.iter() {
            if now.since(incident.revoked_at) < GONE_AFTER {
                continue;
            }
            let is_gone = |row: &&IncidentCdnRow| {
                row.state.is_open() && self.delivery.places.iter().all(|place| place.cdn.name != row.cdn)
            };
            for row in incident.cdns.iter().filter(is_gone) {
                let (cdn, id) = (&row.cdn, incident.id);
                tracing::error!(cdn, incident = %id, "the configuration has no such CDN any more: what it has of revoked keys stays");
                let why = "the configuration has no CDN of this name any more: what it has cached, or stored, stays";
                let row = IncidentCdnRow {
                    state: PurgeState::Abandoned,
                    last_error: Some(why.to_owned()),
                    updated_at: now,
                    ..row.clone()
                };
                self.store.note_purges(&[(id, row)]).await?;
            }
        }
        Ok(())
    }
}
