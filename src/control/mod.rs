//! The control plane: what operators and their tools speak to, on axum.
//!
//! On a listener of its own, loopback by default. Deliberately absent: keys' bytes, and anything that players
//! need.

mod health;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;

use crate::engine::Engine;
use crate::telemetry::Metrics;

#[derive(Clone)]
struct Control {
    engine: Engine,
    metrics: Metrics,
}

/// The control plane's routes.
pub fn router(engine: Engine, metrics: Metrics) -> Router {
    Router::new()
        .route("/api/hls/health", get(health))
        .route("/metrics", get(metrics_text))
        .with_state(Control { engine, metrics })
}

async fn health(State(control): State<Control>) -> impl IntoResponse {
    health::answer(&control.engine.status())
}

async fn metrics_text(State(control): State<Control>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], control.metrics.render())
}
