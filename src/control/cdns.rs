//! CDNs and incidents: how delivery stands, and how far a revocation is. Nothing is changed here.

use axum::Json;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;

use super::Control;
use super::extract::{Cursor, Page};
use super::openapi::{InvalidRefusal, NoIncidentRefusal, Refusals};
use super::problem::{Faults, Problem};
use super::wire::{CdnList, Incident, IncidentList};
use crate::keys::{IdError, IncidentId};

impl Cursor for IncidentId {
    const NAME: &'static str = "before";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: IdError| format!("is wrong: {error}"))
    }
}

/// The incident that the path names.
pub(super) struct AtIncident(IncidentId);

impl<S: Send + Sync> FromRequestParts<S> for AtIncident {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let wrong = |why: String| Faults::of("incidentId", why);
        let Path(text) = Path::<String>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| wrong(rejection.body_text()))?;
        <IncidentId as Cursor>::parse(&text).map(Self).map_err(wrong)
    }
}

/// List CDNs
///
/// Those that this shield is connected to, in the order of its configuration, and how each is.
#[utoipa::path(get, path = "/api/hls/cdns", operation_id = "listCdns",
    tag = "cdns",
    responses((status = 200, description = "The CDNs.", body = CdnList), Refusals))]
pub(super) async fn list(State(control): State<Control>) -> Result<Json<CdnList>, Problem> {
    Ok(Json(control.operator.get()?.cdns().await?.into()))
}

/// List incidents
///
/// Keys that were taken back: by whom, when and why, and what became of them at the CDNs. The newest first.
#[utoipa::path(get, path = "/api/hls/incidents", operation_id = "listIncidents",
    tag = "cdns",
    params(
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, nullable = false,
            description = "At most so many; 100 by default."),
        ("before" = Option<String>, Query, pattern = "^[0-9a-f]{32}$", min_length = 32, max_length = 32,
            nullable = false, description = "The `next` of the page before.")
    ),
    responses((status = 200, description = "A page of incidents.", body = IncidentList),
        Refusals, InvalidRefusal))]
pub(super) async fn incidents(
    State(control): State<Control>,
    page: Page<IncidentId>,
) -> Result<Json<IncidentList>, Problem> {
    let mut incidents = control.operator.get()?.incidents(page.cursor, page.asked()).await?;
    let next = page.cut(&mut incidents, |incident| incident.id.to_string());
    Ok(Json(IncidentList { incidents: incidents.into_iter().map(Incident::from).collect(), next }))
}

/// Read an incident
///
/// The status URL of a revocation: what each CDN has done, until all are done.
#[utoipa::path(get, path = "/api/hls/incidents/{incidentId}", operation_id = "getIncident",
    tag = "cdns",
    params(("incidentId" = String, Path, pattern = "^[0-9a-f]{32}$", min_length = 32, max_length = 32,
        description = "The incident's ID.")),
    responses((status = 200, description = "The incident.", body = Incident),
        Refusals, NoIncidentRefusal, InvalidRefusal))]
pub(super) async fn incident(
    State(control): State<Control>,
    AtIncident(id): AtIncident,
) -> Result<Json<Incident>, Problem> {
    Ok(Json(control.operator.get()?.incident(id).await?.into()))
}
