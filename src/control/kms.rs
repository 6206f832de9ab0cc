//! Key management services: those that are held, and the way from one to another.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::auth::Caller;
use super::extract::JsonBody;
use super::openapi::{BodyRefusals, InvalidRefusal, Refusals};
use super::problem::Problem;
use super::wire::{KmsStatus, Rewrap, RewrapRequest, Rewrapping};
use super::{Control, to_its_end};

/// Say who wraps the data encryption keys
///
/// The providers that are held, each asked now, and how many data encryption keys are under which of their keys: a key
/// under which there is none may go.
#[utoipa::path(get, path = "/api/hls/kms", operation_id = "getKms",
    tag = "kms",
    responses((status = 200, description = "Providers and keys.", body = KmsStatus), Refusals))]
pub(super) async fn status(State(control): State<Control>) -> Result<Json<KmsStatus>, Problem> {
    Ok(Json(control.operator.get()?.kms_status().await?.into()))
}

/// Put all data encryption keys under a provider's current key
///
/// Streams go on meanwhile: their keys stay, only what wraps them changes. It goes on when this has answered, and the same
/// call joins the one that runs. Run it again when it broke off or left something: what is done stays done.
#[utoipa::path(post, path = "/api/hls/kms/rewrap", operation_id = "rewrap",
    tag = "kms",
    request_body = RewrapRequest,
    responses(
        (status = 202, description = "It runs.", body = Rewrap),
        (status = 409, description = "It runs to another provider, or on another node.",
            body = Problem, content_type = "application/problem+json"),
        Refusals, InvalidRefusal, BodyRefusals
    ))]
pub(super) async fn rewrap(
    State(control): State<Control>,
    Caller(actor): Caller,
    JsonBody(request): JsonBody<RewrapRequest>,
) -> Result<(StatusCode, Json<Rewrap>), Problem> {
    let to = request.checked()?;
    let operator = control.operator.get()?;
    let rewrap = to_its_end(async move { operator.rewrap(&to, &actor).await }).await?;
    Ok((StatusCode::ACCEPTED, Json(rewrap.into())))
}

/// Say how far re-wrapping is
#[utoipa::path(get, path = "/api/hls/kms/rewrap", operation_id = "getRewrap",
    tag = "kms",
    responses((status = 200, description = "The last one of this node, and whether another node has one.",
        body = Rewrapping), Refusals))]
pub(super) async fn rewrapping(State(control): State<Control>) -> Result<Json<Rewrapping>, Problem> {
    Ok(Json(control.operator.get()?.rewrapping().await?.into()))
}
