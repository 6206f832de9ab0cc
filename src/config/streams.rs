//! Streams and their rules, checked against the origins.

use std::time::Duration;

use super::ConfigError;
use super::checks::{entry, field};
use super::raw::{RawPolicy, RawStream};
use super::secrets::masked_url;
use crate::hls::{Mounts, normalized_path};
use crate::keys::{
    IvMode, KeyMethod, NO_IV_MODE, OnEncrypted, Policy, PolicyError, StreamId, Subtitles, SyncPolicy,
};

/// A year: whoever wants no time trigger says 0.
const MAX_INTERVAL_MINUTES: f64 = 525_600.0;

/// A stream, checked: its playlist lies at an allowed origin, below its prefix.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamConfig {
    pub id: StreamId,
    pub origin: String,
    pub prefix: String,
    /// As it was given, but for parameters that its origin does not list: they are never sent, may be secrets, and would
    /// be shown to whoever may list streams.
    pub playlist_url: String,
    /// The path of its main playlist, as players ask the shield for it.
    pub playlist_path: String,
    pub policy: Policy,
}

/// The rules of all streams by themselves: an error in them belongs to `[policy]` and not to the first stream.
pub(super) fn default_policy(raw: &RawPolicy) -> Result<Policy, ConfigError> {
    let wrong = |PolicyError { field, rule }| {
        // A policy's fields have no units in their names, keys have.
        let key = super::schema::get().keys().iter().map(|key| key.path.as_str());
        let path = format!("policy.{field}");
        entry(key.into_iter().find(|key| key.starts_with(&path)).unwrap_or(&path), rule)
    };
    let policy = policy(raw, "policy", None)?;
    if let (false, Some(given)) = (policy.key_method.has_iv_mode(), &raw.iv_mode) {
        return Err(field("policy.iv_mode", given, NO_IV_MODE));
    }
    policy.checked().map_err(wrong)
}

pub(super) fn streams(
    raw: &[RawStream],
    defaults: &RawPolicy,
    mounts: &Mounts,
) -> Result<Vec<StreamConfig>, ConfigError> {
    let streams = raw.iter().enumerate().map(|(at, raw)| stream(at, raw, defaults, mounts));
    let streams = streams.collect::<Result<Vec<_>, _>>()?;
    refuse_shared(&streams)?;
    Ok(streams)
}

fn stream(
    at: usize,
    raw: &RawStream,
    defaults: &RawPolicy,
    mounts: &Mounts,
) -> Result<StreamConfig, ConfigError> {
    let id: StreamId =
        raw.id.parse().map_err(|source| ConfigError::StreamId { id: raw.id.clone(), source })?;
    let bad_url = |source| ConfigError::StreamUrl {
        stream: raw.id.clone(),
        url: masked_url(&raw.playlist_url),
        source,
    };
    let place = mounts.place_of(&raw.playlist_url).map_err(bad_url)?;
    let plain = normalized_path(&place.path).map_err(bad_url)?;
    let prefix = match &raw.path_prefix {
        Some(prefix) => prefix.clone(),
        // The directory: everything up to the last slash, which every path has.
        None => plain[..=plain.rfind('/').unwrap_or(0)].to_owned(),
    };
    if !prefix.starts_with('/') || !plain.starts_with(&prefix) {
        return Err(ConfigError::StreamPrefix { stream: raw.id.clone(), prefix, path: plain });
    }
    let place_of_policy = format!("streams[{at}].policy");
    let policy = policy(&raw.policy.over(defaults), &place_of_policy, Some(&raw.id))?;
    if !policy.key_method.has_iv_mode() {
        refuse_iv_mode(raw, defaults, &place_of_policy)?;
    }
    let policy = policy.checked().map_err(|source| ConfigError::Policy { stream: raw.id.clone(), source })?;
    let playlist_path = place.mount.shield_path(&place.path);
    let origin = place.mount.origin.clone();
    let bare = raw.playlist_url.split(['?', '#']).next().unwrap_or_default();
    let playlist_url = match place.query.as_deref().and_then(|query| place.mount.playlist_query(query)) {
        Some(query) => format!("{bare}?{query}"),
        None => bare.to_owned(),
    };
    Ok(StreamConfig { id, origin, prefix, playlist_url, playlist_path, policy })
}

/// A stream whose method has no IV mode may not be given one: whoever does expects IVs that nobody would see. The
/// default may stand in `[policy]`, for other streams; anything else there would be meant for this one too.
fn refuse_iv_mode(raw: &RawStream, defaults: &RawPolicy, place: &str) -> Result<(), ConfigError> {
    let id = &raw.id;
    if let Some(given) = &raw.policy.iv_mode {
        return Err(field(&format!("{place}.iv_mode"), given, &format!("stream {id}: {NO_IV_MODE}")));
    }
    match &defaults.iv_mode {
        Some(given) if given != IvMode::default().name() => {
            let why = format!(
                "stream {id} is under AES-256-GCM, which has no IV mode: give iv_mode in the [streams.policy] of \
                 the streams that need it and not in [policy], or give {id} another key_method"
            );
            Err(field("policy.iv_mode", given, &why))
        }
        _ => Ok(()),
    }
}

fn refuse_shared(streams: &[StreamConfig]) -> Result<(), ConfigError> {
    for (at, one) in streams.iter().enumerate() {
        for other in &streams[at + 1..] {
            if one.id == other.id {
                return Err(ConfigError::StreamTwice(one.id.to_string()));
            }
            if one.origin == other.origin && one.prefix == other.prefix {
                return Err(ConfigError::PrefixTaken {
                    one: one.id.to_string(),
                    other: other.id.to_string(),
                    prefix: one.prefix.clone(),
                    origin: one.origin.clone(),
                });
            }
        }
    }
    Ok(())
}

/// The rules as the engine takes them; its own check of them comes after.
fn policy(raw: &RawPolicy, place: &str, stream: Option<&str>) -> Result<Policy, ConfigError> {
    let base = Policy::default();
    let named = |name: &str, value: &str, why: &str| {
        let whose = stream.map(|id| format!("stream {id}: ")).unwrap_or_default();
        field(&format!("{place}.{name}"), value, &format!("{whose}{why}"))
    };
    let key_method = match &raw.key_method {
        None => base.key_method,
        Some(name) => KeyMethod::from_name(name).ok_or_else(|| {
            named("key_method", name, "must be \"AES-128\", \"AES-256\" or \"AES-256-GCM\"")
        })?,
    };
    let iv_mode = match &raw.iv_mode {
        None => base.iv_mode,
        Some(name) => {
            let why = "must be \"segment\", \"period\" or \"sequence\"";
            IvMode::from_name(name).ok_or_else(|| named("iv_mode", name, why))?
        }
    };
    let on_encrypted = match &raw.on_encrypted {
        None => base.on_encrypted,
        Some(name) => {
            let why = "must be \"reject\", \"pass\" or \"rekey\"";
            OnEncrypted::from_name(name).ok_or_else(|| named("on_encrypted", name, why))?
        }
    };
    let subtitles = match &raw.subtitles {
        None => base.subtitles,
        Some(name) => {
            let why = "must be \"encrypt\" or \"clear\"";
            Subtitles::from_name(name).ok_or_else(|| named("subtitles", name, why))?
        }
    };
    let sync_policy = match &raw.sync_policy {
        None => base.sync_policy,
        Some(name) => {
            let why = "must be \"all\", \"quorum\" or \"best-effort\"";
            SyncPolicy::from_name(name).ok_or_else(|| named("sync_policy", name, why))?
        }
    };
    let secs = |value: Option<u64>, default| value.map_or(default, Duration::from_secs);
    let rotation_interval = match raw.rotation_interval_minutes {
        None => base.rotation_interval,
        Some(minutes) if (0.0..=MAX_INTERVAL_MINUTES).contains(&minutes) => {
            Some(Duration::from_secs_f64(minutes * 60.0)).filter(|interval| !interval.is_zero())
        }
        Some(minutes) => {
            let why = "must be between 0 and 525600";
            return Err(named("rotation_interval_minutes", &minutes.to_string(), why));
        }
    };
    Ok(Policy {
        key_method,
        rotation_interval,
        segments_per_key: raw.segments_per_key.unwrap_or(base.segments_per_key),
        pre_generate_keys: raw.pre_generate_keys.unwrap_or(base.pre_generate_keys),
        grace_period: secs(raw.grace_period_secs, base.grace_period),
        lead_segments: raw.lead_segments.unwrap_or(base.lead_segments),
        cdn_ttl: secs(raw.cdn_ttl_secs, base.cdn_ttl),
        iv_mode,
        encrypt_init_sections: raw.encrypt_init_sections.unwrap_or(base.encrypt_init_sections),
        on_encrypted,
        subtitles,
        session_keys: raw.session_keys.unwrap_or(base.session_keys),
        sync_policy,
        emergency_rotation: raw.emergency_rotation_enabled.unwrap_or(base.emergency_rotation),
        revocation_transition: raw
            .revocation_transition_target_durations
            .unwrap_or(base.revocation_transition),
    })
}
