//! A steering manifest as the shield publishes it (D22 §7.2).
//!
//! Its RELOAD-URI is led through the shield like the URI that the Multivariant Playlist names it by. Pathway clones
//! change hosts only, and paths of the shield are the paths of the origin, so they stay.

use serde_json::Value;
use thiserror::Error;

use super::error::Problem;
use super::linker::{Surroundings, Target};
use crate::keys::Place;

/// Why a steering manifest cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SteeringError {
    #[error("the steering manifest is not a JSON object")]
    NotJson,
    #[error("the steering manifest's RELOAD-URI: {0}")]
    ReloadUri(Problem),
}

/// Rewrites a steering manifest that lies at `around.from`.
///
/// # Errors
/// [`SteeringError`].
pub fn rewrite_steering(json: &[u8], around: &Surroundings<'_>) -> Result<String, SteeringError> {
    let manifest = serde_json::from_slice(json).map_err(|_| SteeringError::NotJson)?;
    let Value::Object(mut manifest) = manifest else { return Err(SteeringError::NotJson) };
    if let Some(Value::String(uri)) = manifest.get_mut("RELOAD-URI")
        && let Ok(to) = around.mounts.resolve(around.from, uri)
    {
        // By its host, and so from the shield's root: the manifest itself lies behind a link.
        let query = to.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        let absolute = format!("{}{}{query}", to.mount.bases()[0], to.path);
        let linked = around.clear(&absolute, &Target::as_it_is(Place::Steering), None);
        *uri = linked.map_err(SteeringError::ReloadUri)?;
    }
    Ok(Value::Object(manifest).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hls::tests::around;

    fn check(manifest: &str, expected: &str) {
        around(|around| {
            let rewritten = rewrite_steering(manifest.as_bytes(), around).unwrap();
            let mut shown = rewritten.clone();
            while let Some(at) = shown.find('~') {
                let len = shown[at..].find('/').unwrap();
                shown.replace_range(at..at + len, "LINK");
            }
            assert_eq!(shown, expected);
        });
    }

    #[test]
    fn the_reload_uri_is_linked_from_the_root() {
        let tail = r#""TTL":300,"VERSION":1}"#;
        for uri in
            ["steering.json", "/live/ch1/steering.json", "https://origin.example/live/ch1/steering.json"]
        {
            check(
                &format!(r#"{{"RELOAD-URI":"{uri}",{tail}"#),
                &format!(r#"{{"RELOAD-URI":"/live/ch1/LINK/steering.json",{tail}"#),
            );
        }
    }

    #[test]
    fn what_lies_elsewhere_stays() {
        let manifest = r#"{"PATHWAY-PRIORITY":["a"],"RELOAD-URI":"https://steer.example/x","TTL":300}"#;
        check(manifest, manifest);
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        around(|around| {
            assert_eq!(rewrite_steering(b"[1]", around), Err(SteeringError::NotJson));
            assert_eq!(rewrite_steering(b"<html>", around), Err(SteeringError::NotJson));
        });
    }
}
