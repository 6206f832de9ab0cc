//! How delivery stands, for operators: of the CDNs, of a key, of an incident. Read from the store, so that every node
//! answers the same.

use std::collections::HashMap;
use std::sync::Arc;

use super::Place;
use crate::cdn::DeliveryMode;
use crate::engine::stream::Stream;
use crate::engine::{Operator, OperatorError};
use crate::keys::{CdnSet, IncidentId, KeyId, StreamId, Timestamp};
use crate::store::{CdnStateRow, DeliveryState, IncidentRow, NewIncident, PurgeState};

/// How far a CDN has what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncState {
    /// It has shown all that it should have.
    InSync,
    /// It is being brought there.
    Syncing,
    /// It does not do what it is asked.
    Degraded,
    /// This shield is not connected to it: it caches what it fetches.
    Unmanaged,
}

impl SyncState {
    pub const ALL: [SyncState; 4] =
        [SyncState::InSync, SyncState::Syncing, SyncState::Degraded, SyncState::Unmanaged];

    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            SyncState::InSync => "in-sync",
            SyncState::Syncing => "syncing",
            SyncState::Degraded => "degraded",
            SyncState::Unmanaged => "unmanaged",
        }
    }
}

/// A CDN, and how it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CdnStatus {
    pub name: String,
    pub kind: &'static str,
    pub mode: DeliveryMode,
    /// Where players reach it.
    pub edge: String,
    pub state: SyncState,
    pub keys: CdnKeys,
    pub health: CdnHealth,
}

/// How many keys a CDN has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CdnKeys {
    /// Shown by its edge.
    pub verified: u64,
    /// Taken, and not shown yet.
    pub stored: u64,
    /// On their way: it may have them.
    pub sending: u64,
}

/// What is wrong with a CDN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CdnHealth {
    pub failing_since: Option<Timestamp>,
    /// In a row.
    pub failures: u32,
    pub last_error: Option<String>,
}

/// What a CDN has of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyAtCdn {
    /// The CDN's name, or the address that a stream names and no CDN of this shield has.
    pub endpoint: String,
    pub state: SyncState,
    pub last_error: Option<String>,
}

/// Keys that were taken back, and what became of them at the CDNs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incident {
    pub id: IncidentId,
    pub stream: StreamId,
    pub reason: String,
    pub revoked_by: String,
    pub revoked_at: Timestamp,
    pub keys: Vec<KeyId>,
    pub successor: KeyId,
    /// When no CDN had anything left of them.
    pub completed_at: Option<Timestamp>,
    pub cdns: Vec<IncidentAtCdn>,
}

/// How far one CDN is with letting go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncidentAtCdn {
    pub cdn: String,
    pub state: PurgeState,
    pub purges: u32,
    pub purged_at: Option<Timestamp>,
    pub completed_at: Option<Timestamp>,
    pub last_error: Option<String>,
}

impl From<IncidentRow> for Incident {
    fn from(row: IncidentRow) -> Self {
        let at_cdn = |row: crate::store::IncidentCdnRow| IncidentAtCdn {
            cdn: row.cdn,
            state: row.state,
            purges: row.purges,
            purged_at: row.purged_at,
            completed_at: row.completed_at,
            last_error: row.last_error,
        };
        Self {
            id: row.id,
            stream: row.stream,
            reason: row.reason,
            revoked_by: row.actor,
            revoked_at: row.revoked_at,
            keys: row.keys,
            successor: row.successor,
            completed_at: row.completed_at,
            cdns: row.cdns.into_iter().map(at_cdn).collect(),
        }
    }
}

impl Incident {
    /// One that was stored a moment ago.
    pub(in crate::engine) fn begun(new: NewIncident, successor: KeyId) -> Self {
        let at_cdn = |cdn| IncidentAtCdn {
            cdn,
            state: PurgeState::Pending,
            purges: 0,
            purged_at: None,
            completed_at: None,
            last_error: None,
        };
        Self {
            id: new.id,
            stream: new.stream,
            reason: new.reason,
            revoked_by: new.actor,
            revoked_at: new.revoked_at,
            keys: new.keys,
            successor,
            completed_at: new.cdns.is_empty().then_some(new.revoked_at),
            cdns: new.cdns.into_iter().map(at_cdn).collect(),
        }
    }
}

impl Operator {
    /// Every CDN of this shield, in the order of its configuration.
    pub async fn cdns(&self) -> Result<Vec<CdnStatus>, OperatorError> {
        let core = &self.core;
        if core.delivery.places.is_empty() {
            return Ok(Vec::new());
        }
        let mut keys: HashMap<String, CdnKeys> = HashMap::new();
        for (cdn, state, count) in core.store.count_deliveries().await? {
            let of = keys.entry(cdn).or_default();
            match state {
                DeliveryState::Verified => of.verified = count,
                DeliveryState::Stored => of.stored = count,
                DeliveryState::Sending => of.sending = count,
            }
        }
        let states = self.cdn_states().await?;
        let status = |place: &Arc<Place>| {
            let name = &place.cdn.name;
            let keys = keys.get(name).copied().unwrap_or_default();
            let wanted = self.wanted_at(place);
            let health = states.get(name).map(health_of).unwrap_or_default();
            let state = if self.is_degraded(&health) {
                SyncState::Degraded
            } else if keys.stored + keys.sending > 0 || keys.verified != wanted {
                SyncState::Syncing
            } else {
                SyncState::InSync
            };
            let (kind, mode, edge) = (place.cdn.kind, place.cdn.mode, place.cdn.edge.clone());
            CdnStatus { name: name.clone(), kind, mode, edge, state, keys, health }
        };
        Ok(core.delivery.places.iter().map(status).collect())
    }

    /// What a stream's CDNs have of a key; empty where the stream is delivered to none.
    ///
    /// # Errors
    /// The store does not answer, or there is no such stream.
    pub async fn key_at_cdns(&self, id: &StreamId, key: KeyId) -> Result<Vec<KeyAtCdn>, OperatorError> {
        let core = &self.core;
        let stream = core.known_stream(id).await?;
        let (set, unknown) = self.cdns_of(&stream);
        let mut all = Vec::new();
        if !set.is_empty() {
            let rows = core.store.deliveries_of(key).await?;
            let states = self.cdn_states().await?;
            for place in core.delivery.places.iter().filter(|place| set.has(place.at)) {
                let name = &place.cdn.name;
                let row = rows.iter().find(|row| row.cdn == *name);
                let health = states.get(name).map(health_of).unwrap_or_default();
                let state = match row.map(|row| row.state) {
                    Some(DeliveryState::Verified) => SyncState::InSync,
                    _ if self.is_degraded(&health) => SyncState::Degraded,
                    _ => SyncState::Syncing,
                };
                let last_error = row.and_then(|row| row.last_error.clone());
                let last_error = last_error.or(health.last_error).filter(|_| state != SyncState::InSync);
                all.push(KeyAtCdn { endpoint: name.clone(), state, last_error });
            }
        }
        let unmanaged = |endpoint| KeyAtCdn { endpoint, state: SyncState::Unmanaged, last_error: None };
        all.extend(unknown.into_iter().map(unmanaged));
        Ok(all)
    }

    /// Incidents, the newest first, at most `limit` that are older than `before`.
    pub async fn incidents(
        &self,
        before: Option<IncidentId>,
        limit: usize,
    ) -> Result<Vec<Incident>, OperatorError> {
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        let rows = self.core.store.incidents(before, limit).await?;
        Ok(rows.into_iter().map(Incident::from).collect())
    }

    /// # Errors
    /// [`OperatorError::NoIncident`].
    pub async fn incident(&self, id: IncidentId) -> Result<Incident, OperatorError> {
        let row = self.core.store.incident(id).await?;
        row.map(Incident::from).ok_or(OperatorError::NoIncident(id))
    }

    async fn cdn_states(&self) -> Result<HashMap<String, CdnStateRow>, OperatorError> {
        let rows = self.core.store.cdn_states().await?;
        Ok(rows.into_iter().map(|row| (row.name.clone(), row)).collect())
    }

    fn is_degraded(&self, health: &CdnHealth) -> bool {
        health.failing_since.is_some() && health.failures >= self.core.delivery.rules.retry_attempts
    }

    fn cdns_of(&self, stream: &Stream) -> (CdnSet, Vec<String>) {
        let known = stream.known.read();
        let delivery = &self.core.delivery;
        (delivery.of_stream(&known.row.cdn), delivery.unknown(&known.row.cdn).cloned().collect())
    }

    /// How many keys a CDN should have, as far as this node knows.
    fn wanted_at(&self, place: &Place) -> u64 {
        let directory = self.core.shared.directory.read();
        let of = |stream: &Arc<Stream>| {
            let known = stream.known.read();
            let is_delivered = self.core.delivery.of_stream(&known.row.cdn).has(place.at);
            let belongs = known.keys.values().filter(|key| crate::keys::belongs_at_edges(key.life.state));
            if is_delivered { belongs.count() as u64 } else { 0 }
        };
        directory.iter().map(of).sum()
    }
}

fn health_of(row: &CdnStateRow) -> CdnHealth {
    CdnHealth { failing_since: row.failing_since, failures: row.failures, last_error: row.last_error.clone() }
}
