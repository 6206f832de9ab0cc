//! `GET /api/hls/health`, with the guide's JSON.
//!
//! `healthy`: everything works. `degraded`: what plays goes on playing, but an operator should look. With
//! `unhealthy` (503) a load balancer should send players elsewhere.

use axum::Json;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::engine::EngineStatus;

pub(super) fn answer(engine: &EngineStatus) -> (StatusCode, Json<Value>) {
    let (status, health, code) = match engine {
        EngineStatus { ready: false, .. } => ("unhealthy", "critical", StatusCode::SERVICE_UNAVAILABLE),
        EngineStatus { rotating: false, .. } => ("degraded", "warning", StatusCode::OK),
        EngineStatus { overdue_rotations: 1.., .. } => ("degraded", "warning", StatusCode::OK),
        _ => ("healthy", "good", StatusCode::OK),
    };
    let operational = |yes| if yes { "operational" } else { "down" };
    let body = json!({
        "status": status,
        "services": {
            "hlsEncryption": operational(engine.ready),
            "keyRotation": operational(engine.ready && engine.rotating),
            // No CDN is connected to: there is nothing to keep in step.
            "cdnSync": "disabled",
        },
        "metrics": {
            "activeStreams": engine.streams,
            "overdueRotations": engine.overdue_rotations,
            "healthStatus": health,
        },
    });
    (code, Json(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: EngineStatus =
        EngineStatus { ready: true, rotating: true, streams: 25, overdue_rotations: 0 };

    #[test]
    fn a_healthy_shield_answers_with_the_guides_json() {
        let (code, Json(body)) = answer(&WELL);
        assert_eq!(code, StatusCode::OK);
        let expected = json!({
            "status": "healthy",
            "services": {
                "hlsEncryption": "operational", "keyRotation": "operational", "cdnSync": "disabled"
            },
            "metrics": { "activeStreams": 25, "overdueRotations": 0, "healthStatus": "good" },
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn what_is_wrong_shows() {
        let status = |engine| {
            let (code, Json(body)) = answer(&engine);
            (code.as_u16(), body["status"].as_str().unwrap().to_owned())
        };
        assert_eq!(status(EngineStatus { ready: false, ..WELL }), (503, "unhealthy".into()));
        assert_eq!(status(EngineStatus { rotating: false, ..WELL }), (200, "degraded".into()));
        assert_eq!(status(EngineStatus { overdue_rotations: 2, ..WELL }), (200, "degraded".into()));
    }
}
