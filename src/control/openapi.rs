//! The API's description of itself: OpenAPI 3.1, made from the routes' own types.

use std::collections::BTreeMap;

use serde_json::json;
use utoipa::openapi::schema::Schema;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{ContentBuilder, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, Modify, OpenApi, ToSchema};

use super::problem::{PROBLEM_JSON, Problem};
use crate::keys::KeyMethod;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "keyshield control API",
        description = "Streams that are encrypted on the way through, their keys, and what can be done to them. \
                       Errors are application/problem+json (RFC 9457).",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "streams", description = "Begin, change and end streams."),
        (name = "keys", description = "Keys and their rotation; never their bytes."),
        (name = "cdns", description = "How the CDNs are, and what became of revocations there."),
        (name = "kms", description = "Who wraps the data encryption keys, and going over to another."),
        (name = "operation", description = "How the shield is. No token is needed.")
    ),
    components(schemas(Problem)),
    security(("bearer" = [])),
    modifiers(&Bearer)
)]
pub(super) struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let mut http = Http::new(HttpAuthScheme::Bearer);
        http.description =
            Some("A token of [[control.tokens]], or a JWT of the identity provider in [control.jwt].".into());
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("bearer", SecurityScheme::Http(http));
    }
}

fn problems(of: &[(u16, &str)]) -> BTreeMap<String, RefOr<Response>> {
    let schema = || RefOr::Ref(utoipa::openapi::Ref::from_schema_name(Problem::name()));
    let response = |description: &str| {
        let content = ContentBuilder::new().schema(Some(schema())).build();
        ResponseBuilder::new().description(description).content(PROBLEM_JSON, content).build()
    };
    of.iter().map(|(status, why)| (status.to_string(), RefOr::T(response(why)))).collect()
}

macro_rules! problem_responses {
    ($(#[$doc:meta])* $name:ident: $(($status:literal, $why:literal)),+ $(,)?) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                problems(&[$(($status, $why)),+])
            }
        }
    };
}

problem_responses! {
    /// What every call that needs a token may come to.
    Refusals:
    (401, "No valid token."),
    (403, "Not permitted to the caller's roles."),
    (503, "Nothing was changed: keys are not loaded yet (`not-ready`), the store or the KMS failed (`failed`, `kms-failed`), tokens \
           cannot be checked (`no-issuer-keys`). Or the store did not say whether it was done (`outcome-unknown`): \
           read the stream and its keys, and ask again if it was not."),
}

problem_responses! {
    /// Of calls with parameters or a body.
    InvalidRefusal: (422, "Fields or parameters that are wrong; `errors` names them."),
}

problem_responses! {
    NoStreamRefusal: (404, "No such stream."),
}

problem_responses! {
    NoIncidentRefusal: (404, "No such incident."),
}

problem_responses! {
    BodyRefusals:
    (400, "The body is not JSON."),
    (413, "The body has more than 64 KiB."),
    (415, "The body's type is not JSON."),
}

problem_responses! {
    ConflictRefusal: (409, "The stream's state does not permit it; `type` and `detail` say why."),
}

/// The document, as it is served.
pub(super) fn to_json(mut document: utoipa::openapi::OpenApi) -> String {
    refuse_iv_mode_under_gcm(&mut document);
    // Maps with string keys: there is nothing in it that JSON lacks.
    document.to_pretty_json().unwrap_or_default()
}

/// What two fields must not say together, which no type of utoipa can express: its extensions are keys like any
/// other in what is served.
fn refuse_iv_mode_under_gcm(document: &mut utoipa::openapi::OpenApi) {
    let schemas = document.components.as_mut().map(|components| &mut components.schemas);
    let rules = schemas.and_then(|schemas| schemas.get_mut("StreamConfigRequest"));
    if let Some(RefOr::T(Schema::Object(rules))) = rules {
        let together = json!({
            "required": ["keyMethod", "ivMode"],
            "properties": { "keyMethod": { "const": KeyMethod::Aes256Gcm.name() } }
        });
        rules.extensions.get_or_insert_default().insert("not".into(), together);
    }
}
