//! Streams: begun, listed, changed, stopped, deleted, erased.
//!
//! What changes something runs to its end whether or not the caller waits for it: a connection that breaks must
//! not leave half of it.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};

use super::auth::Caller;
use super::extract::{AtStream, JsonBody, Page};
use super::openapi::{BodyRefusals, ConflictRefusal, InvalidRefusal, NoStreamRefusal, Refusals};
use super::problem::{Faults, Problem};
use super::wire::{EraseRequest, Erasure, InitializeRequest, Stream, StreamList, StreamPath, UpdateRequest};
use super::{Control, to_its_end};
use crate::engine::OperatorError;
use crate::hls::OriginPath;
use crate::keys::StreamId;

/// Begin a stream
///
/// From then on it is served encrypted. The same call again finds the stream as it is; a stopped one goes on. The
/// playlist must lie at an origin of the configuration, and is fetched once to see that it is HLS.
#[utoipa::path(post, path = "/api/hls/streams/{streamId}/initialize", operation_id = "initializeStream",
    tag = "streams", params(StreamPath),
    request_body = InitializeRequest,
    responses(
        (status = 201, description = "The stream has begun.", body = Stream,
            headers(("Location" = String, description = "The stream's path."))),
        (status = 200, description = "It was there already.", body = Stream),
        (status = 409, description = "A stream of this ID exists otherwise, or its path prefix is taken.",
            body = Problem, content_type = "application/problem+json"),
        Refusals, InvalidRefusal, BodyRefusals
    ))]
pub(super) async fn initialize(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
    JsonBody(request): JsonBody<InitializeRequest>,
) -> Result<Response, Problem> {
    let (spec, playlist) = request.checked(id, &control.mounts, &control.default_policy)?;
    let operator = control.operator.get()?;
    // What is there already is compared and not fetched: that must work while the origin is away.
    match operator.stream(&spec.id).await {
        Err(OperatorError::NoStream(_)) => probe(&control, &playlist.place).await?,
        known => drop(known?),
    }
    let done = to_its_end(async move { operator.initialize(spec, &actor).await }).await?;
    let stream = Stream::from(done.stream);
    Ok(match done.created {
        true => (StatusCode::CREATED, [(LOCATION, stream.path())], Json(stream)).into_response(),
        false => Json(stream).into_response(),
    })
}

async fn probe(control: &Control, place: &OriginPath<'_>) -> Result<(), Problem> {
    let probed = control.probe.probe(place).await;
    probed.map_err(|why| Faults::of("playlistUrl", format!("does not lead to HLS: {why}")))
}

/// List streams
///
/// In the order of their IDs.
#[utoipa::path(get, path = "/api/hls/streams", operation_id = "listStreams",
    tag = "streams",
    params(
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, nullable = false,
            description = "At most so many; 100 by default."),
        ("after" = Option<String>, Query, pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$", min_length = 1,
            max_length = 128, nullable = false, description = "The `next` of the page before.")
    ),
    responses((status = 200, description = "A page of streams.", body = StreamList), Refusals, InvalidRefusal))]
pub(super) async fn list(
    State(control): State<Control>,
    page: Page<StreamId>,
) -> Result<Json<StreamList>, Problem> {
    let mut streams = control.operator.get()?.streams(page.cursor.as_ref(), page.asked()).await?;
    let next = page.cut(&mut streams, |stream| stream.spec.id.to_string());
    Ok(Json(StreamList { streams: streams.into_iter().map(Stream::from).collect(), next }))
}

/// Read a stream
#[utoipa::path(get, path = "/api/hls/streams/{streamId}", operation_id = "getStream",
    tag = "streams", params(StreamPath),
    responses((status = 200, description = "The stream.", body = Stream),
        Refusals, NoStreamRefusal, InvalidRefusal))]
pub(super) async fn read(
    State(control): State<Control>,
    AtStream(id): AtStream,
) -> Result<Json<Stream>, Problem> {
    Ok(Json(control.operator.get()?.stream(&id).await?.into()))
}

/// Change a stream
///
/// What is left out stays as it is. Paths that are published stay as they are too: a new playlist must lie below
/// the stream's path prefix, and `config.encryptInitSections` cannot be changed. A key keeps the `keyMethod` and the
/// `ivMode` that it was made with: new ones show when the keys that wait (`preGenerateKeys`) have had their turn.
#[utoipa::path(patch, path = "/api/hls/streams/{streamId}", operation_id = "updateStream",
    tag = "streams", params(StreamPath),
    request_body = UpdateRequest,
    responses((status = 200, description = "The stream, with the change in it.", body = Stream),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal, BodyRefusals))]
pub(super) async fn update(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
    JsonBody(request): JsonBody<UpdateRequest>,
) -> Result<Json<Stream>, Problem> {
    let operator = control.operator.get()?;
    let (change, playlist) = request.checked(&operator.stream(&id).await?, &control.mounts)?;
    if let Some(playlist) = playlist {
        probe(&control, &playlist.place).await?;
    }
    let stream = to_its_end(async move { operator.update(&id, change, &actor).await }).await?;
    Ok(Json(stream.into()))
}

/// Stop a stream
///
/// Nothing of it is served any more, from this moment. Its keys are kept; initialize it again to go on.
#[utoipa::path(post, path = "/api/hls/streams/{streamId}/stop", operation_id = "stopStream",
    tag = "streams", params(StreamPath),
    responses((status = 200, description = "The stream, stopped.", body = Stream),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal))]
pub(super) async fn stop(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
) -> Result<Json<Stream>, Problem> {
    let operator = control.operator.get()?;
    Ok(Json(to_its_end(async move { operator.stop(&id, &actor).await }).await?.into()))
}

/// Delete a stream
///
/// Its keys are destroyed and its path prefix is free; the history of its keys stays.
#[utoipa::path(delete, path = "/api/hls/streams/{streamId}", operation_id = "deleteStream",
    tag = "streams", params(StreamPath),
    responses((status = 204, description = "It is gone."),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal))]
pub(super) async fn delete(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
) -> Result<StatusCode, Problem> {
    let operator = control.operator.get()?;
    to_its_end(async move { operator.delete(&id, &actor).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Erase a stream
///
/// Removes its data encryption keys, without which its content keys cannot be opened, and every row about it but the
/// bare ID. Backups that were made before hold both, wrapped under the master key: let them expire. It may be running,
/// stopped or deleted.
#[utoipa::path(post, path = "/api/hls/streams/{streamId}/erase", operation_id = "eraseStream",
    tag = "streams", params(StreamPath),
    request_body = EraseRequest,
    responses((status = 200, description = "What was removed.", body = Erasure),
        Refusals, NoStreamRefusal, ConflictRefusal, InvalidRefusal, BodyRefusals))]
pub(super) async fn erase(
    State(control): State<Control>,
    Caller(actor): Caller,
    AtStream(id): AtStream,
    JsonBody(request): JsonBody<EraseRequest>,
) -> Result<Json<Erasure>, Problem> {
    request.checked(&id)?;
    let operator = control.operator.get()?;
    let stream = id.clone();
    let erased = to_its_end(async move { operator.erase(&id, &actor).await }).await?;
    Ok(Json(Erasure::of(&stream, erased)))
}
