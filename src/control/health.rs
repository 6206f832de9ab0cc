//! `GET /api/hls/health`, with the guide's JSON.
//!
//! `healthy`: everything works. `degraded`: what plays goes on playing, but an operator should look. With
//! `unhealthy` (503) a load balancer should send players elsewhere.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Control;
use super::wire::{Health, HealthMetrics, HealthServices};
use crate::engine::EngineStatus;

/// How the shield is
#[utoipa::path(get, path = "/api/hls/health", operation_id = "getHealth",
    tag = "operation", security(()),
    responses(
        (status = 200, description = "`healthy`, or `degraded`: `problems` says why.", body = Health),
        (status = 503, description = "`unhealthy`: send players elsewhere.", body = Health)
    ))]
pub(super) async fn health(State(control): State<Control>) -> (StatusCode, Json<Health>) {
    answer(&control.engine.status(), control.engine.problems())
}

fn answer(engine: &EngineStatus, problems: Vec<String>) -> (StatusCode, Json<Health>) {
    let (status, health_status, code) = match engine {
        EngineStatus { ready: false, .. } => ("unhealthy", "critical", StatusCode::SERVICE_UNAVAILABLE),
        EngineStatus { store_up: false, .. }
        | EngineStatus { kms_up: false, .. }
        | EngineStatus { rotating: false, .. } => ("degraded", "warning", StatusCode::OK),
        EngineStatus { overdue_rotations: 1.., .. } => ("degraded", "warning", StatusCode::OK),
        _ if !problems.is_empty() => ("degraded", "warning", StatusCode::OK),
        _ => ("healthy", "good", StatusCode::OK),
    };
    let operational = |yes| if yes { "operational" } else { "down" };
    let body = Health {
        status,
        services: HealthServices {
            hls_encryption: operational(engine.ready),
            key_rotation: operational(engine.ready && engine.rotating),
            cdn_sync: match engine.cdn_sync {
                // No CDN is connected to: there is nothing to keep in step.
                None => "disabled",
                Some(true) => "operational",
                Some(false) => "degraded",
            },
        },
        metrics: HealthMetrics {
            active_streams: engine.streams,
            overdue_rotations: engine.overdue_rotations,
            health_status,
        },
        problems,
    };
    (code, Json(body))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const WELL: EngineStatus = EngineStatus {
        ready: true,
        rotating: true,
        store_up: true,
        kms_up: true,
        cdn_sync: None,
        streams: 25,
        overdue_rotations: 0,
    };

    #[test]
    fn a_healthy_shield_answers_with_the_guides_json() {
        let (code, Json(body)) = answer(&WELL, Vec::new());
        assert_eq!(code, StatusCode::OK);
        let expected = json!({
            "status": "healthy",
            "services": {
                "hlsEncryption": "operational", "keyRotation": "operational", "cdnSync": "disabled"
            },
            "metrics": { "activeStreams": 25, "overdueRotations": 0, "healthStatus": "good" },
            "problems": [],
        });
        assert_eq!(serde_json::to_value(body).unwrap(), expected);
    }

    #[test]
    fn what_is_wrong_shows() {
        let status = |engine| {
            let (code, Json(body)) = answer(&engine, vec!["the store is away".into()]);
            assert_eq!(body.problems, ["the store is away"]);
            (code.as_u16(), body.status)
        };
        assert_eq!(status(EngineStatus { ready: false, ..WELL }), (503, "unhealthy"));
        assert_eq!(status(EngineStatus { rotating: false, ..WELL }), (200, "degraded"));
        assert_eq!(status(EngineStatus { store_up: false, ..WELL }), (200, "degraded"));
        assert_eq!(status(EngineStatus { kms_up: false, ..WELL }), (200, "degraded"));
        assert_eq!(status(EngineStatus { overdue_rotations: 2, ..WELL }), (200, "degraded"));
        assert_eq!(status(WELL), (200, "degraded"), "whatever it is");
    }
}
