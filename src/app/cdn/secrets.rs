//! `keyshield cdn secrets` and `keyshield cdn token`: what follows from a CDN's edge secret.

use std::fmt::Write;
use std::time::Duration;

use anyhow::Context;
use zeroize::Zeroizing;

use super::{CdnTarget, TokenFor, find, secret_of};
use crate::config::{Config, Environment};
use crate::keys::{Timestamp, TokenScope, viewer_token};

/// What the code at the edge is given, a line each, by the names that it reads them under.
///
/// # Errors
/// A configuration that cannot be used, a CDN that is not in it or has no edge secret.
pub fn secrets(target: &CdnTarget, environment: &Environment) -> anyhow::Result<Zeroizing<String>> {
    let config = Config::load(target.config.as_deref(), environment, &[])?.config;
    let secret = secret_of(find(&config, &target.cdn)?)?;
    // Long enough for all of it: what grows would leave a copy behind.
    let mut out = Zeroizing::new(String::with_capacity(512));
    for (name, value) in [
        ("EDGE_ENCRYPTION_KEY", secret.encryption_key()),
        ("EDGE_MAC_KEY", secret.mac_key()),
        ("EDGE_TOKEN_KEY", secret.token_key()),
    ] {
        // Writing to memory does not fail.
        let _ = writeln!(out, "{name}={}", *value);
    }
    Ok(out)
}

/// A viewer's token, good from now on.
///
/// # Errors
/// As [`secrets`]; a stream's ID that cannot be one.
pub fn token(
    target: &CdnTarget,
    scope: &TokenFor,
    (now, ttl): (Timestamp, Duration),
    environment: &Environment,
) -> anyhow::Result<String> {
    let scope = match &scope.stream {
        Some(stream) => TokenScope::Stream(stream.parse().with_context(|| format!("--stream {stream:?}"))?),
        None => TokenScope::AllStreams,
    };
    let config = Config::load(target.config.as_deref(), environment, &[])?.config;
    let secret = secret_of(find(&config, &target.cdn)?)?;
    Ok(format!("{}\n", viewer_token(&secret, &scope, now.plus(ttl))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::EdgeSecret;

    const SECRET: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

    fn target(directory: &tempfile::TempDir, secret: &str, cdn: &str) -> CdnTarget {
        let file = directory.path().join("k.toml");
        let text = format!(
            "[cdn]\nedge_secret = \"{secret}\"\nendpoints = [\"cdn.example\"]\n\
             [[cdns]]\nname = \"a\"\nkind = \"custom\"\nedge_url = \"https://cdn.example\"\n\
             [cdns.custom]\napi_url = \"https://api.example\"\n"
        );
        std::fs::write(&file, text).unwrap();
        CdnTarget { config: Some(file), cdn: cdn.into() }
    }

    #[test]
    fn the_edge_is_given_keys_that_follow_from_its_secret_and_never_the_secret() {
        let directory = tempfile::tempdir().unwrap();
        let text = secrets(&target(&directory, SECRET, "a"), &Environment::default()).unwrap();
        let names: Vec<_> = text.lines().filter_map(|line| line.split_once('=')).collect();
        assert_eq!(names.len(), 3);
        let keys = SECRET.parse::<EdgeSecret>().unwrap();
        assert_eq!(names[1], ("EDGE_MAC_KEY", keys.mac_key().as_str()));
        assert!(!text.contains(SECRET));
    }

    #[test]
    fn a_token_runs_out_after_its_time_and_is_for_one_stream_or_all() {
        let directory = tempfile::tempdir().unwrap();
        let target = target(&directory, SECRET, "a");
        let at = (Timestamp::from_unix_millis(1_800_000_000_000), Duration::from_secs(60));
        let of = |stream: Option<&str>| {
            let scope = TokenFor { stream: stream.map(str::to_owned), all_streams: stream.is_none() };
            token(&target, &scope, at, &Environment::default())
        };
        assert!(of(Some("ch1")).unwrap().starts_with("1800000060~ch1~"));
        assert!(of(None).unwrap().starts_with("1800000060~*~"));
        assert!(format!("{:#}", of(Some("a b")).unwrap_err()).contains("--stream"));
    }

    #[test]
    fn who_has_no_secret_is_told_how_to_get_one() {
        let directory = tempfile::tempdir().unwrap();
        let error = |secret: &str, cdn: &str| {
            let target = target(&directory, secret, cdn);
            format!("{:#}", secrets(&target, &Environment::default()).unwrap_err())
        };
        assert!(error("", "a").contains("edge_secret_file"), "{}", error("", "a"));
        let unknown = error(SECRET, "b");
        assert!(unknown.contains("no CDN \"b\"") && unknown.contains("a, cdn.example"), "{unknown}");
        assert!(error(SECRET, "cdn.example").contains("address"), "{}", error(SECRET, "cdn.example"));
    }
}
