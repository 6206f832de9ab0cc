//! CDNs and incidents, as they go over the wire.

use serde::Serialize;
use utoipa::ToSchema;

use super::date_time;
use crate::engine::{self, CdnStatus, KeyAtCdn, PurgeState, SyncState};
use crate::keys::IncidentId;

/// Where an incident is read.
pub(super) fn incident_path(id: IncidentId) -> String {
    format!("/api/hls/incidents/{id}")
}

/// How far a stream's CDNs have what they should.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct CdnSync {
    /// Of a key: `in-sync`, `syncing` or `degraded`. Of a revocation: `purging` or `complete`. `disabled`: the stream is
    /// delivered to no CDN, caches fetch from the shield.
    #[schema(value_type = String, examples("in-sync"))]
    status: &'static str,
    endpoints: Vec<CdnEndpointSync>,
}

/// One CDN.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct CdnEndpointSync {
    /// The CDN's name, or the address that the stream gives.
    endpoint: String,
    /// Of a key: `in-sync` (its edge has shown the key), `syncing`, `degraded` (it does not do what it is asked) or
    /// `unmanaged` (the shield is not connected to it). Of a revocation: `pending`, `purged`, `complete` or
    /// `abandoned` (the shield's configuration has no such CDN any more).
    #[schema(value_type = String, examples("in-sync"))]
    status: &'static str,
    /// Why it is no further.
    #[schema(required = true)]
    error: Option<String>,
}

impl CdnSync {
    const DISABLED: &'static str = "disabled";

    /// What CDNs have of a key.
    pub(super) fn of_key(cdns: Vec<KeyAtCdn>) -> Self {
        let managed = || cdns.iter().map(|cdn| cdn.state).filter(|state| *state != SyncState::Unmanaged);
        let status = if managed().next().is_none() {
            Self::DISABLED
        } else if managed().any(|state| state == SyncState::Degraded) {
            SyncState::Degraded.name()
        } else if managed().all(|state| state == SyncState::InSync) {
            SyncState::InSync.name()
        } else {
            SyncState::Syncing.name()
        };
        let of = |cdn: KeyAtCdn| CdnEndpointSync {
            endpoint: cdn.endpoint,
            status: cdn.state.name(),
            error: cdn.last_error,
        };
        Self { status, endpoints: cdns.into_iter().map(of).collect() }
    }

    /// How far CDNs are with letting go of keys.
    pub(super) fn of_incident(incident: &engine::Incident) -> Self {
        let of = |cdn: &engine::IncidentAtCdn| CdnEndpointSync {
            endpoint: cdn.cdn.clone(),
            status: cdn.state.name(),
            error: cdn.last_error.clone(),
        };
        let status = match (incident.cdns.is_empty(), incident.completed_at) {
            (true, _) => Self::DISABLED,
            (false, Some(_)) => PurgeState::Complete.name(),
            (false, None) => "purging",
        };
        Self { status, endpoints: incident.cdns.iter().map(of).collect() }
    }
}

/// The CDNs of this shield.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct CdnList {
    cdns: Vec<Cdn>,
}

impl From<Vec<CdnStatus>> for CdnList {
    fn from(cdns: Vec<CdnStatus>) -> Self {
        Self { cdns: cdns.into_iter().map(Cdn::from).collect() }
    }
}

/// A CDN, and how it is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Cdn {
    name: String,
    /// `cloudfront`, `cloudflare`, `fastly`, `custom`, or `plain`: only its address is known.
    #[schema(value_type = String, examples("fastly"))]
    kind: &'static str,
    /// `pull`: keys come through it from the shield. `push`: they lie sealed in its edge's own store.
    #[schema(value_type = String, examples("pull"))]
    mode: &'static str,
    /// Where players reach it.
    #[schema(examples("https://cdn.example.com/"))]
    edge_url: String,
    /// `in-sync`, `syncing` or `degraded`.
    #[schema(value_type = String, examples("in-sync"))]
    status: &'static str,
    /// Keys that its edge has shown.
    #[schema(minimum = 0)]
    keys_verified: u64,
    /// Keys that it has taken, and not shown yet.
    #[schema(minimum = 0)]
    keys_stored: u64,
    #[schema(format = DateTime, required = true)]
    failing_since: Option<String>,
    /// Calls that failed in a row.
    #[schema(value_type = u64, minimum = 0, maximum = 4_294_967_295_u64)]
    failures: u32,
    #[schema(required = true)]
    last_error: Option<String>,
}

impl From<CdnStatus> for Cdn {
    fn from(cdn: CdnStatus) -> Self {
        Self {
            name: cdn.name,
            kind: cdn.kind,
            mode: cdn.mode.name(),
            edge_url: cdn.edge,
            status: cdn.state.name(),
            keys_verified: cdn.keys.verified,
            keys_stored: cdn.keys.stored,
            failing_since: cdn.health.failing_since.map(date_time),
            failures: cdn.health.failures,
            last_error: cdn.health.last_error,
        }
    }
}

/// A page of incidents, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::control) struct IncidentList {
    pub(in crate::control) incidents: Vec<Incident>,
    /// The `before` of the next page; null on the last.
    #[schema(required = true)]
    pub(in crate::control) next: Option<String>,
}

/// Keys that were taken back, and what became of them at the CDNs.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct Incident {
    #[schema(pattern = "^[0-9a-f]{32}$")]
    incident_id: String,
    stream_id: String,
    reason: String,
    revoked_by: String,
    #[schema(format = DateTime)]
    revoked_at: String,
    /// The keys that were taken back.
    revoked_key_ids: Vec<String>,
    /// The key that took their place.
    successor_key_id: String,
    /// `open`, or `complete`: no CDN gives out the keys, or what was encrypted under them.
    #[schema(value_type = String, examples("complete"))]
    status: &'static str,
    /// Null while it is open.
    #[schema(format = DateTime, required = true)]
    completed_at: Option<String>,
    cdns: Vec<IncidentCdn>,
}

/// How far one CDN is with letting go.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(in crate::control) struct IncidentCdn {
    cdn: String,
    /// `pending`, `purged` (it was told, and is being looked at), `complete`, or `abandoned`: the configuration has no such
    /// CDN any more.
    #[schema(value_type = String, examples("complete"))]
    status: &'static str,
    /// How often it was told to purge.
    #[schema(value_type = u64, minimum = 0, maximum = 4_294_967_295_u64)]
    purges: u32,
    #[schema(format = DateTime, required = true)]
    purged_at: Option<String>,
    #[schema(format = DateTime, required = true)]
    completed_at: Option<String>,
    /// Why it is no further.
    #[schema(required = true)]
    last_error: Option<String>,
}

impl From<engine::Incident> for Incident {
    fn from(incident: engine::Incident) -> Self {
        let of = |cdn: engine::IncidentAtCdn| IncidentCdn {
            cdn: cdn.cdn,
            status: cdn.state.name(),
            purges: cdn.purges,
            purged_at: cdn.purged_at.map(date_time),
            completed_at: cdn.completed_at.map(date_time),
            last_error: cdn.last_error,
        };
        Self {
            incident_id: incident.id.to_string(),
            stream_id: incident.stream.to_string(),
            reason: incident.reason,
            revoked_by: incident.revoked_by,
            revoked_at: date_time(incident.revoked_at),
            revoked_key_ids: incident.keys.iter().map(ToString::to_string).collect(),
            successor_key_id: incident.successor.to_string(),
            status: if incident.completed_at.is_some() { "complete" } else { "open" },
            completed_at: incident.completed_at.map(date_time),
            cdns: incident.cdns.into_iter().map(of).collect(),
        }
    }
}
