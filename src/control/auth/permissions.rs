//! Which role may make which call: the one table. `docs/control-api.md` shows it, and a test holds the two and
//! the running routes together.

use axum::http::Method;

use super::Role::{self, Admin, Auditor, Operator, Security, Viewer};

/// What can be asked of the control API by those who are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::control) enum Call {
    ListStreams,
    ReadStream,
    ReadKeys,
    ReadRotations,
    Initialize,
    Update,
    Rotate,
    RotateDek,
    EmergencyRevoke,
    Stop,
    Delete,
    Erase,
    ReadCdns,
    ReadIncidents,
    ReadIncident,
    ReadKms,
    ReadRewrap,
    Rewrap,
}

impl Call {
    pub(in crate::control) const ALL: [Call; 18] = [
        Call::ListStreams,
        Call::ReadStream,
        Call::ReadKeys,
        Call::ReadRotations,
        Call::Initialize,
        Call::Update,
        Call::Rotate,
        Call::RotateDek,
        Call::EmergencyRevoke,
        Call::Stop,
        Call::Delete,
        Call::Erase,
        Call::ReadCdns,
        Call::ReadIncidents,
        Call::ReadIncident,
        Call::ReadKms,
        Call::ReadRewrap,
        Call::Rewrap,
    ];

    /// The roles that may. Admin stands in every line by hand: nothing is permitted by an `else`.
    pub(in crate::control) fn permitted(self) -> &'static [Role] {
        match self {
            Call::ListStreams | Call::ReadStream | Call::ReadCdns => {
                &[Viewer, Auditor, Operator, Security, Admin]
            }
            Call::ReadKeys
            | Call::ReadRotations
            | Call::ReadIncidents
            | Call::ReadIncident
            | Call::ReadKms
            | Call::ReadRewrap => &[Auditor, Operator, Security, Admin],
            Call::Initialize | Call::Update => &[Operator, Admin],
            Call::Rotate | Call::RotateDek | Call::Stop => &[Operator, Security, Admin],
            Call::EmergencyRevoke | Call::Rewrap => &[Security, Admin],
            Call::Delete | Call::Erase => &[Admin],
        }
    }

    /// Method and path, as the routes have them.
    pub(in crate::control) fn route(self) -> (Method, &'static str) {
        match self {
            Call::ListStreams => (Method::GET, "/api/hls/streams"),
            Call::ReadStream => (Method::GET, "/api/hls/streams/{streamId}"),
            Call::ReadKeys => (Method::GET, "/api/hls/streams/{streamId}/keys"),
            Call::ReadRotations => (Method::GET, "/api/hls/streams/{streamId}/rotations"),
            Call::Initialize => (Method::POST, "/api/hls/streams/{streamId}/initialize"),
            Call::Update => (Method::PATCH, "/api/hls/streams/{streamId}"),
            Call::Rotate => (Method::POST, "/api/hls/streams/{streamId}/rotate"),
            Call::RotateDek => (Method::POST, "/api/hls/streams/{streamId}/rotate-dek"),
            Call::EmergencyRevoke => (Method::POST, "/api/hls/streams/{streamId}/emergency-revoke"),
            Call::Stop => (Method::POST, "/api/hls/streams/{streamId}/stop"),
            Call::Delete => (Method::DELETE, "/api/hls/streams/{streamId}"),
            Call::Erase => (Method::POST, "/api/hls/streams/{streamId}/erase"),
            Call::ReadCdns => (Method::GET, "/api/hls/cdns"),
            Call::ReadIncidents => (Method::GET, "/api/hls/incidents"),
            Call::ReadIncident => (Method::GET, "/api/hls/incidents/{incidentId}"),
            Call::ReadKms => (Method::GET, "/api/hls/kms"),
            Call::ReadRewrap => (Method::GET, "/api/hls/kms/rewrap"),
            Call::Rewrap => (Method::POST, "/api/hls/kms/rewrap"),
        }
    }

    /// The call that a request makes. HEAD asks for what GET asks for.
    pub(super) fn of(method: &Method, path: &str) -> Option<Self> {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        Self::ALL.into_iter().find(|call| call.route() == (method.clone(), path))
    }
}
