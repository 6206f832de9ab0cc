//! Who may call the control API: as the configuration says, and as a command adds.

use crate::config::{self, Config};
use crate::control::{AccessSettings, AccessToken, JwksSource, JwtSettings, Role};

pub(super) fn access(config: &Config, added: AccessSettings) -> AccessSettings {
    let configured = config.tokens.iter().map(|token| AccessToken {
        name: token.name.clone(),
        role: role(token.role),
        sha256: token.sha256,
    });
    let jwt = config.jwt.as_ref().map(|jwt| JwtSettings {
        jwks: match &jwt.jwks {
            config::JwksSource::File(path) => JwksSource::File(path.clone()),
            config::JwksSource::Url(url) => JwksSource::Url(url.clone()),
        },
        issuer: jwt.issuer.clone(),
        audience: jwt.audience.clone(),
        roles_claim: jwt.roles_claim.clone(),
    });
    AccessSettings { tokens: configured.chain(added.tokens).collect(), jwt: jwt.or(added.jwt) }
}

fn role(role: config::Role) -> Role {
    match role {
        config::Role::Admin => Role::Admin,
        config::Role::Operator => Role::Operator,
        config::Role::Security => Role::Security,
        config::Role::Auditor => Role::Auditor,
        config::Role::Viewer => Role::Viewer,
    }
}
