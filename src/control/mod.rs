//! The control plane: what operators and their tools speak to, on axum.
//!
//! On a listener of its own, loopback by default, and up from the first moment: while keys are loaded, health
//! says so and calls are answered with 503. Every call but health, metrics and the API's description needs a
//! token with a role. Deliberately absent: keys' bytes, anything that players need, and fetching from origins
//! ([`OriginProbe`] is given).

mod auth;
mod cdns;
mod extract;
mod health;
mod keys;
mod kms;
mod openapi;
mod probe;
mod problem;
mod streams;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::{Arc, OnceLock};

use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::{Router, middleware};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use auth::{
    Access, AccessError, AccessSettings, AccessToken, JwksSource, JwtSettings, Role, hash_token, new_token,
};
pub use probe::OriginProbe;

use crate::engine::{Engine, Operator, OperatorError};
use crate::hls::Mounts;
use crate::keys::Policy;
use crate::telemetry::Metrics;
use problem::{Kind, Problem};

/// What the control plane is made from.
pub struct ControlParts {
    pub engine: Engine,
    pub operator: OperatorSlot,
    pub metrics: Metrics,
    /// The origins at which streams may lie.
    pub mounts: Mounts,
    /// What a stream gets where the call that begins it says nothing.
    pub default_policy: Policy,
    pub access: Access,
    pub probe: Arc<dyn OriginProbe>,
}

type Control = Arc<ControlParts>;

/// The engine's operator, once keys are loaded.
#[derive(Clone, Default)]
pub struct OperatorSlot(Arc<OnceLock<Operator>>);

impl OperatorSlot {
    /// From now on calls are carried out. A second time changes nothing.
    pub fn fill(&self, operator: Operator) {
        let _ = self.0.set(operator);
    }

    fn get(&self) -> Result<Operator, OperatorError> {
        self.0.get().cloned().ok_or(OperatorError::NotReady)
    }
}

/// The control plane's routes.
pub fn router(parts: ControlParts) -> Router {
    let control: Control = Arc::new(parts);
    let (guarded, mut document) = guarded().split_for_parts();
    let (open, described) = open().split_for_parts();
    document.merge(described);
    let described: Arc<str> = openapi::to_json(document).into();
    guarded
        .route_layer(middleware::from_fn_with_state(Arc::clone(&control), auth::authorize))
        .merge(open)
        .route(DESCRIPTION, axum::routing::get(move || async move { json_text(&described) }))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(extract::MAX_BODY_BYTES))
        .with_state(control)
}

const DESCRIPTION: &str = "/api/hls/openapi.json";

fn guarded() -> OpenApiRouter<Control> {
    OpenApiRouter::with_openapi(openapi::Document::openapi())
        .routes(routes!(streams::list))
        .routes(routes!(streams::read, streams::update, streams::delete))
        .routes(routes!(streams::initialize))
        .routes(routes!(streams::stop))
        .routes(routes!(streams::erase))
        .routes(routes!(keys::list))
        .routes(routes!(keys::rotations))
        .routes(routes!(keys::rotate))
        .routes(routes!(keys::rotate_dek))
        .routes(routes!(keys::emergency_revoke))
        .routes(routes!(cdns::list))
        .routes(routes!(cdns::incidents))
        .routes(routes!(cdns::incident))
        .routes(routes!(kms::status))
        .routes(routes!(kms::rewrap, kms::rewrapping))
}

fn open() -> OpenApiRouter<Control> {
    OpenApiRouter::new().routes(routes!(health::health)).routes(routes!(metrics))
}

/// Metrics
///
/// In Prometheus's text format.
#[utoipa::path(get, path = "/metrics", operation_id = "getMetrics",
    tag = "operation", security(()),
    responses((status = 200, description = "All metrics.", body = String, content_type = "text/plain")))]
async fn metrics(State(control): State<Control>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], control.metrics.render())
}

fn json_text(text: &str) -> impl IntoResponse + use<> {
    ([(CONTENT_TYPE, "application/json")], text.to_owned())
}

async fn no_route() -> Problem {
    Problem::new(Kind::NoRoute, format!("nothing is at this path; {DESCRIPTION} describes what there is"))
}

async fn wrong_method() -> Problem {
    Problem::new(Kind::Method, "this path does not answer that method; the Allow header names those it does")
}

/// Carries something out whether or not its caller stays to hear of it.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, OperatorError>> + Send + 'static,
) -> Result<T, Problem> {
    let ended = tokio::spawn(work).await;
    // Nobody knows how far one came that panicked.
    ended.unwrap_or_else(|error| Err(OperatorError::Unknown(error.to_string()))).map_err(Problem::from)
}
