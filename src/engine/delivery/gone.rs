//! How many incidents are open, and the end of what waits for CDNs that this shield has no more, so that none stays open
//! for ever.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::engine::worker::Core;
use crate::store::{IncidentCdnRow, PurgeState, StoreError};

/// How often it is looked for.
const LOOK_FOR_GONE: Duration = Duration::from_secs(30);
/// A CDN that no node of the fleet has in its configuration for so long after a revocation does not come back with the
/// next node: a configuration is rolled out in less.
const GONE_AFTER: Duration = Duration::from_secs(10 * 60);

impl Core {
    /// Ends what waits for CDNs that this shield has no more, for as long as the process lives.
    pub(in crate::engine) async fn keep_ending_what_is_gone(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LOOK_FOR_GONE.min(self.fleet.sweep_interval * 6));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !self.holds_lease() {
                // Whoever has it knows.
                self.shared.metrics.incidents_open.set(0);
            } else if !self.is_store_away()
                && let Err(error) = self.end_what_is_gone().await
            {
                self.note_if_away(&error);
                tracing::debug!(%error, "incidents could not be read or noted");
            }
        }
    }

    async fn end_what_is_gone(&self) -> Result<(), StoreError> {
        let open = self.store.count_open_incidents().await?;
        self.shared.metrics.incidents_open.set(i64::try_from(open).unwrap_or(i64::MAX));
        let known: Vec<_> = self.delivery.places.iter().map(|place| place.cdn.name.as_str()).collect();
        let now = self.now();
        let abandoned = |(id, row): (_, IncidentCdnRow)| {
            let cdn = &row.cdn;
            tracing::error!(cdn, incident = %id, "the configuration has no such CDN any more: what it has of revoked keys stays");
            let why =
                "the configuration has no CDN of this name any more: what it has cached, or stored, stays";
            let state = PurgeState::Abandoned;
            (id, IncidentCdnRow { state, last_error: Some(why.to_owned()), updated_at: now, ..row })
        };
        let gone = self.store.open_elsewhere(&known, now.minus(GONE_AFTER)).await?;
        let gone: Vec<_> = gone.into_iter().map(abandoned).collect();
        self.store.note_purges(&gone).await.map(drop)
    }
}
