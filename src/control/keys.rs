//! A stream's keys: listed, rotated, taken back. Their states and times, never their bytes.

use axum::Json;
use axum::extract::State;

use super::auth::Caller;
use super::extract::{AtStream, JsonBody, Page};
use super::openapi::{BodyRefusals, ConflictRefusal, InvalidRefusal, NoStreamRefusal, Refusals};
use super::problem::Problem;
use super::wire::{DataKey, Key, KeyList, Revocation, RevokeRequest, Rotation, RotationList, StreamPath};
use super::{Control, to_its_end};
use crate::engine::OperatorError;
use crate::keys::Ordinal;

/// List a stream's keys
///
/// The newest first; of a deleted stream too.
#[utoipa::path(get, path = "/api/hls/streams/{streamId}/keys", operation_id = "listKeys",
    tag = "keys",
    params(
        StreamPath,
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, nullable = false,
            description = "At most so many; 100 by default."),
        ("before" = Option<u64>, Query, maximum = 4_294_967_295_u64, nullable = false,
            description = "The `next` of the page before.")
    ),
    responses((status = 200, description = "A page of keys.", body = KeyList),
        Refusals, NoStreamRefusal, InvalidRefusal))]
pub(super) async fn list(
    State(control): State<Control>,
    AtStream(id): AtStream,
    page: Page<Ordinal>,
) -> Result<Json<KeyList>, Problem> {
    let mut keys = control.operator.get()?.keys(&id, page.cursor, page.asked()).await?;
    let next = page.cut(&mut keys, |key| key.ordinal.0);
    Ok(Json(KeyList { keys: keys.into_iter().map(Key::from).collect(), next }))
}

/// List a stream's rotations
///
/// The keys that were promoted, the newest first.
#[utoipa::path(get, path = "/api/hls/streams/{streamId}/rotations", operation_id = "listRotations",
    tag = "keys",
    params(
        StreamPath,
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, nullable = false,
            description = "At most so many; 100 by default."),
        ("before" = Option<u64>, Query, maximum = 4_294_967_295_u64, nullable = false,
            description = "The `next` of the page before.")
    ),
    responses((status = 200, description = "A page of rotations.", body = RotationList),
        Refusals, NoStreamRefusal, InvalidRefusal))]
pub(super) async fn rotations(
    State(control): State<Control>,
    AtStream(id): AtStream,
    page: Page<Ordinal>,
) -> Result<Json<RotationList>, Problem> {
    let mut keys = control.operator.get()?.rotations(&id, page.cursor, page.asked()).await?;
    let next = page.cut(&mut keys, |key| key.ordinal.0);
    Ok(Json(RotationList { rotations: keys.into_iter().map(Key::from).collect(), next }))
}

/// Rotate a stream's key
///
/// Promotes the next key; each rendition goes over to it a lead past its live edge. Whoever asks for it waits for no CDN:
/// what an edge does not have yet, it asks the shield for; `cdnSync` says how far each has it.
#[utoipa::path(post, path = "/api/hls/streams/{streamId}/rotate", operation_id = "rotateKey",
    tag = "keys", params(StreamPath),
    responses((status = 200, description = "The rotation.", body = Rotation),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal))]
pub(super) async fn rotate(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
) -> Result<Json<Rotation>, Problem> {
    let operator = control.operator.get()?;
    let stream = id.clone();
    let rotation = {
        let operator = operator.clone();
        to_its_end(async move { operator.rotate(&id, &actor).await }).await?
    };
    let cdns = operator.key_at_cdns(&stream, rotation.key.id).await;
    let cdns =
        cdns.map_err(|error| OperatorError::Unknown(format!("the key was rotated; its CDNs: {error}")))?;
    Ok(Json(Rotation::of(&stream, rotation, cdns)))
}

/// Rotate a stream's data encryption key
///
/// Content keys that are made from now on are wrapped under a new data encryption key, which the KMS wraps. Those that are
/// there keep theirs, and go on being served; when none of them is left, the old one is shredded.
#[utoipa::path(post, path = "/api/hls/streams/{streamId}/rotate-dek", operation_id = "rotateDek",
    tag = "keys", params(StreamPath),
    responses((status = 200, description = "The new data encryption key.", body = DataKey),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal))]
pub(super) async fn rotate_dek(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
) -> Result<Json<DataKey>, Problem> {
    let operator = control.operator.get()?;
    let stream = id.clone();
    let renewed = to_its_end(async move { operator.rotate_dek(&id, &actor).await }).await?;
    Ok(Json(DataKey::of(&stream, renewed)))
}

/// Take keys back
///
/// When this answers, the node that was asked refuses the keys to players, and their successor is in force. Other nodes
/// do the same as soon as they hear of it, at the latest at their next poll; one that is cut off from the store goes on
/// as before until it is back. Segments keep their paths; playlists name the successor for them. CDNs let go of the keys, and
/// of what was encrypted under them, from this moment on: `statusUrl` says how far each is.
#[utoipa::path(post, path = "/api/hls/streams/{streamId}/emergency-revoke", operation_id = "emergencyRevoke",
    tag = "keys", params(StreamPath),
    request_body = RevokeRequest,
    responses((status = 200, description = "What was taken back, and what takes its place.", body = Revocation),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal, BodyRefusals))]
pub(super) async fn emergency_revoke(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
    JsonBody(request): JsonBody<RevokeRequest>,
) -> Result<Json<Revocation>, Problem> {
    let (reason, key) = request.checked()?;
    let operator = control.operator.get()?;
    let stream = id.clone();
    let revocation = to_its_end(async move { operator.revoke(&id, key, &reason, &actor).await }).await?;
    Ok(Json(Revocation::of(&stream, revocation)))
}
