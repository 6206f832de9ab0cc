//! What may be asked, and what of it makes sense.
//!
//! Reading gives the types that serde checks; `checked` gives the engine's, or a problem that names every field
//! that is wrong. Bounds stand in the schema and in `checked`; a test holds the two together.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use url::Url;
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, SchemaType, Type};
use utoipa::{IntoParams, ToSchema};

use super::names::{IvModeName, Method, OnEncryptedName, SubtitlesName, SyncPolicyName};
use crate::control::extract::{present, present_object, present_whole};
use crate::control::problem::{Faults, Problem};
use crate::engine::{PolicyChange, StreamChange, StreamInfo, StreamSpec};
use crate::hls::{Mounts, OriginPath, normalized_path};
use crate::keys::{IvMode, KeyId, KeyMethod, NO_IV_MODE, Policy, StreamId};

const MAX_URL_LEN: usize = 2_048;
const MAX_PREFIX_LEN: usize = 1_024;
const MAX_CDN_ENDPOINTS: usize = 20;
const MAX_REASON_LEN: usize = 1_000;
/// 366 days.
const YEAR_SECS: u32 = 31_622_400;
const MAX_INTERVAL_MINUTES: f64 = 525_600.0;

/// The stream that a path names.
#[derive(IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "names for the schema; `AtStream` reads it")]
pub(in crate::control) struct StreamPath {
    /// The stream's ID: 1 to 128 of `A-Z a-z 0-9 . _ -`, the first of them no dot.
    #[param(
        rename = "streamId",
        pattern = "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$",
        min_length = 1,
        max_length = 128,
        example = "ch1"
    )]
    stream_id: String,
}

/// A stream to be encrypted.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(examples(json!({
    "playlistUrl": "https://cdn.example.com/stream/playlist.m3u8",
    "cdnEndpoints": ["https://cdn1.example.com", "https://cdn2.example.com"],
    "config": {
        "rotationInterval": 30, "keyMethod": "AES-128", "segmentsPerKey": 100, "cdnSyncEnabled": true
    }
})))]
pub(in crate::control) struct InitializeRequest {
    /// Its main playlist, at an origin of the configuration.
    #[schema(min_length = 1, max_length = 2048, pattern = "^https?://[^\\s]+$")]
    playlist_url: String,
    /// What the paths of the stream at its origin begin with; by default the playlist's directory.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false, min_length = 1, max_length = 1024, pattern = "^/")]
    path_prefix: Option<String>,
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false, max_items = 20)]
    cdn_endpoints: Option<Vec<CdnEndpoint>>,
    #[serde(default, deserialize_with = "present_object")]
    #[schema(nullable = false)]
    config: Option<ConfigRequest>,
}

/// What is to be changed of a stream; what is left out stays. `config.encryptInitSections` must stay as it is.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(examples(json!({"config": {"segmentsPerKey": 50}})))]
pub(in crate::control) struct UpdateRequest {
    /// Its main playlist, below the stream's path prefix at the same origin.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false, min_length = 1, max_length = 2048, pattern = "^https?://[^\\s]+$")]
    playlist_url: Option<String>,
    /// All of them: the list takes the old one's place.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false, max_items = 20)]
    cdn_endpoints: Option<Vec<CdnEndpoint>>,
    #[serde(default, deserialize_with = "present_object")]
    #[schema(nullable = false)]
    config: Option<ConfigRequest>,
}

/// The URL of a CDN in front of the shield.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(
    min_length = 1,
    max_length = 2048,
    pattern = "^https?://[^\\s]+$",
    examples("https://cdn1.example.com")
)]
struct CdnEndpoint(String);

/// The rules of a stream; what is left out stays, at first as the configuration's `[policy]` has it.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = StreamConfigRequest)]
struct ConfigRequest {
    /// Minutes after which a new key is promoted, at least a second; 0: never by time.
    #[serde(default, deserialize_with = "present")]
    #[schema(schema_with = interval_schema)]
    rotation_interval: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    key_method: Option<Method>,
    /// Media Segments of a rendition under one key.
    #[serde(default, deserialize_with = "present_whole")]
    #[schema(nullable = false, minimum = 1, maximum = 1_000_000)]
    segments_per_key: Option<i64>,
    /// Whether keys are pushed to the stream's CDNs.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    cdn_sync_enabled: Option<bool>,
    /// Keys made ahead.
    #[serde(default, deserialize_with = "present_whole")]
    #[schema(nullable = false, minimum = 1, maximum = 100)]
    pre_generate_keys: Option<i64>,
    /// Whether keys may be revoked.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    emergency_rotation_enabled: Option<bool>,
    /// Seconds for which a key is kept after the last playlist that named it can have been in use.
    #[serde(default, deserialize_with = "present_whole")]
    #[schema(nullable = false, minimum = 0, maximum = 31_622_400)]
    grace_period: Option<i64>,
    /// Segments between the live edge and a key change that time or an operator asked for.
    #[serde(default, deserialize_with = "present_whole")]
    #[schema(nullable = false, minimum = 0, maximum = 100)]
    lead_segments: Option<i64>,
    /// Seconds for which caches in front of the shield may keep a playlist.
    #[serde(default, deserialize_with = "present_whole")]
    #[schema(nullable = false, minimum = 0, maximum = 31_622_400)]
    cdn_ttl: Option<i64>,
    /// Not with AES-256-GCM, whose segments carry their own IVs.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    iv_mode: Option<IvModeName>,
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    encrypt_init_sections: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    on_encrypted: Option<OnEncryptedName>,
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    subtitles: Option<SubtitlesName>,
    /// Whether Multivariant Playlists name the newest key in an EXT-X-SESSION-KEY, so that players load it early.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    session_keys: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false)]
    sync_policy: Option<SyncPolicyName>,
    /// Target Durations for which segments are still served under a revoked key; 0: not at all.
    #[serde(default, deserialize_with = "present_whole")]
    #[schema(nullable = false, minimum = 0, maximum = 100)]
    revocation_transition: Option<i64>,
}

fn interval_schema() -> Schema {
    let number = || ObjectBuilder::new().schema_type(SchemaType::Type(Type::Number));
    let never = number().minimum(Some(0)).maximum(Some(0));
    // A little over a second: a sixtieth has no exact decimal.
    let some = number().minimum(Some(0.0167)).maximum(Some(MAX_INTERVAL_MINUTES));
    let described = "Minutes after which a new key is promoted, at least a second; 0: never by time.";
    OneOfBuilder::new().item(never).item(some).description(Some(described)).into()
}

/// Keys to be taken back.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(examples(json!({"reason": "Security incident - immediate key revocation required"})))]
pub(in crate::control) struct RevokeRequest {
    /// One line, for the history of keys.
    #[schema(
        min_length = 1,
        max_length = 1000,
        pattern = "^[^\\s\\u0000-\\u001F\\u007F-\\u009F][^\\u0000-\\u001F\\u007F-\\u009F]*$"
    )]
    reason: String,
    /// One key; by default all that are in use.
    #[serde(default, deserialize_with = "present")]
    #[schema(nullable = false, min_length = 32, max_length = 32, pattern = "^[0-9a-f]{32}$")]
    key_id: Option<String>,
}

/// An erasure cannot be undone, so the stream is named twice.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(examples(json!({"confirm": "ch1"})))]
pub(in crate::control) struct EraseRequest {
    /// The stream's ID again.
    #[schema(min_length = 1, max_length = 128)]
    confirm: String,
}

/// A playlist that was found to lie at an allowed origin.
pub(in crate::control) struct PlaylistPlace<'m> {
    pub(in crate::control) place: OriginPath<'m>,
    /// With its percent-encoding undone, as prefixes are compared with.
    plain_path: String,
}

impl PlaylistPlace<'_> {
    /// Where the shield serves it, with the parameters of its query that choose what it is.
    fn shield_path(&self) -> String {
        let path = self.place.mount.shield_path(&self.place.path);
        match &self.place.query {
            Some(query) => format!("{path}?{query}"),
            None => path,
        }
    }

    /// Everything up to the last slash, which every path has.
    fn directory(&self) -> &str {
        &self.plain_path[..=self.plain_path.rfind('/').unwrap_or(0)]
    }
}

impl InitializeRequest {
    /// # Errors
    /// A problem that names every field that is wrong.
    pub(in crate::control) fn checked<'m>(
        self,
        id: StreamId,
        mounts: &'m Mounts,
        default_policy: &Policy,
    ) -> Result<(StreamSpec, PlaylistPlace<'m>), Problem> {
        let mut faults = Faults::default();
        let found = playlist_place(mounts, &self.playlist_url, &mut faults);
        let prefix = found.as_ref().map(|found| match self.path_prefix {
            Some(prefix) => {
                if prefix.chars().count() > MAX_PREFIX_LEN || !prefix.starts_with('/') {
                    faults.add(
                        "pathPrefix",
                        format!("must begin with a slash and have at most {MAX_PREFIX_LEN} characters"),
                    );
                } else if !found.plain_path.starts_with(&prefix) {
                    faults.add(
                        "pathPrefix",
                        format!("must begin the path of the playlist, {}", found.plain_path),
                    );
                }
                prefix
            }
            None => found.directory().to_owned(),
        });
        let cdn_endpoints = cdn_endpoints(self.cdn_endpoints, &mut faults).unwrap_or_default();
        let config = self.config.unwrap_or_default();
        let cdn_sync_enabled = config.cdn_sync_enabled.unwrap_or(true);
        let mut given = config.given();
        let base = config.base(default_policy);
        let policy = config.over(&base, &mut faults);
        faults.none()?;
        // Where one is missing there was a fault.
        let (Some(found), Some(prefix)) = (found, prefix) else {
            return Err(Faults::of("playlistUrl", "is wrong"));
        };
        // What is the same whether it was given or left out, everywhere and always, is as if it had been given.
        given["cdnSyncEnabled"] = cdn_sync_enabled.into();
        let request = json!({
            "playlistUrl": self.playlist_url, "pathPrefix": prefix, "cdnEndpoints": cdn_endpoints, "config": given,
        });
        let spec = StreamSpec {
            id,
            playlist_url: self.playlist_url,
            origin: found.place.mount.origin.clone(),
            prefix,
            playlist_path: found.shield_path(),
            cdn_endpoints,
            cdn_sync_enabled,
            policy,
            request: Some(request),
        };
        Ok((spec, found))
    }
}

impl UpdateRequest {
    /// The change to a stream that stands as `stream`, and the playlist that is new.
    ///
    /// # Errors
    /// A problem that names every field that is wrong.
    pub(in crate::control) fn checked<'m>(
        self,
        stream: &StreamInfo,
        mounts: &'m Mounts,
    ) -> Result<(StreamChange, Option<PlaylistPlace<'m>>), Problem> {
        let mut faults = Faults::default();
        let found = self.playlist_url.as_deref().and_then(|url| playlist_place(mounts, url, &mut faults));
        if let Some(found) = &found {
            let (origin, prefix) = (&stream.spec.origin, &stream.spec.prefix);
            if found.place.mount.origin != *origin || !found.plain_path.starts_with(prefix) {
                faults.add(
                    "playlistUrl",
                    format!("must lie below {prefix} at origin {origin}, as the stream does"),
                );
            }
        }
        let cdn_endpoints = cdn_endpoints(self.cdn_endpoints, &mut faults);
        let cdn_sync_enabled = self.config.as_ref().and_then(|config| config.cdn_sync_enabled);
        let init_sections = self.config.as_ref().and_then(|config| config.encrypt_init_sections);
        if init_sections.is_some_and(|encrypt| encrypt != stream.spec.policy.encrypt_init_sections) {
            let why = "cannot be changed while the stream is there, because it would change the URIs of EXT-X-MAPs \
                       that are published: delete the stream and initialize it again";
            faults.add("config.encryptInitSections", why);
        }
        let policy = self.config.map(|config| config.over(&stream.spec.policy, &mut faults));
        // What does not change is not sent: it would undo what another changes meanwhile.
        let policy = policy
            .filter(|policy| *policy != stream.spec.policy)
            .map(|to| PolicyChange { from: stream.spec.policy.clone(), to });
        faults.none()?;
        let playlist = self.playlist_url.zip(found.as_ref().map(PlaylistPlace::shield_path));
        Ok((StreamChange { playlist, cdn_endpoints, cdn_sync_enabled, policy }, found))
    }
}

impl RevokeRequest {
    /// # Errors
    /// A problem that names every field that is wrong.
    pub(in crate::control) fn checked(self) -> Result<(String, Option<KeyId>), Problem> {
        let mut faults = Faults::default();
        let length = self.reason.chars().count();
        if !(1..=MAX_REASON_LEN).contains(&length) {
            faults.add("reason", format!("must have 1 to {MAX_REASON_LEN} characters"));
        } else if self.reason.chars().any(char::is_control) || self.reason.starts_with(char::is_whitespace) {
            // It stands in logs and in the history of keys, a line each.
            faults.add("reason", "must be one line and begin with a character that shows");
        }
        let key = self.key_id.and_then(|text| {
            text.parse::<KeyId>().map_err(|error| faults.add("keyId", format!("is wrong: {error}"))).ok()
        });
        faults.none().map(|()| (self.reason, key))
    }
}

impl EraseRequest {
    /// # Errors
    /// A problem, when another stream is named than in the path.
    pub(in crate::control) fn checked(&self, id: &StreamId) -> Result<(), Problem> {
        if self.confirm == id.as_str() {
            Ok(())
        } else {
            Err(Faults::of("confirm", "must be the stream's ID"))
        }
    }
}

impl ConfigRequest {
    /// What a new stream starts from: `[policy]`, without an IV mode where the stream's method has none. Nobody has
    /// asked it of this stream, and no call could take it out of the configuration.
    fn base(&self, default_policy: &Policy) -> Policy {
        let mut base = default_policy.clone();
        if self.key_method.is_some_and(|method| !KeyMethod::from(method).has_iv_mode()) {
            base.iv_mode = IvMode::default();
        }
        base
    }

    /// The rules that were given, by their names.
    fn given(&self) -> Value {
        let mut given = json!(self);
        if let Value::Object(rules) = &mut given {
            rules.retain(|_, value| !value.is_null());
        }
        given
    }

    fn over(self, base: &Policy, faults: &mut Faults) -> Policy {
        let rotation_interval = match self.rotation_interval {
            None => base.rotation_interval,
            Some(0.0) => None,
            Some(minutes) if minutes * 60.0 >= 1.0 && minutes <= MAX_INTERVAL_MINUTES => {
                // Whole milliseconds are what the store keeps.
                Some(Duration::from_millis((minutes * 60_000.0).round() as u64))
            }
            Some(_) => {
                let range =
                    format!("must be 0, or minutes between a second (0.0167) and {MAX_INTERVAL_MINUTES}");
                faults.add("config.rotationInterval", range);
                None
            }
        };
        let key_method = self.key_method.map_or(base.key_method, Into::into);
        if !key_method.has_iv_mode() {
            if self.iv_mode.is_some() {
                faults.add("config.ivMode", NO_IV_MODE);
            } else if base.iv_mode != IvMode::default() {
                let (method, has, default) =
                    (key_method.name(), base.iv_mode.name(), IvMode::default().name());
                let first = format!(
                    "is {has:?}, and {method} has none: change it to {default:?} first, in a call of its own"
                );
                faults.add("config.ivMode", first);
            }
        }
        let mut whole = |name: &str, value: Option<i64>, range: RangeInclusive<u32>| {
            let value = value?;
            let within = u32::try_from(value).ok().filter(|n| range.contains(n));
            if within.is_none() {
                let (least, most) = (range.start(), range.end());
                faults.add(format!("config.{name}"), format!("must be between {least} and {most}"));
            }
            within
        };
        let segments_per_key = whole("segmentsPerKey", self.segments_per_key, 1..=1_000_000);
        let pre_generate_keys = whole("preGenerateKeys", self.pre_generate_keys, 1..=100);
        let grace_period = whole("gracePeriod", self.grace_period, 0..=YEAR_SECS);
        let lead_segments = whole("leadSegments", self.lead_segments, 0..=100);
        let cdn_ttl = whole("cdnTtl", self.cdn_ttl, 0..=YEAR_SECS);
        let revocation_transition = whole("revocationTransition", self.revocation_transition, 0..=100);
        let secs = |given: Option<u32>, base| given.map_or(base, |secs| Duration::from_secs(secs.into()));
        Policy {
            key_method,
            rotation_interval,
            segments_per_key: segments_per_key.unwrap_or(base.segments_per_key),
            pre_generate_keys: pre_generate_keys.unwrap_or(base.pre_generate_keys),
            grace_period: secs(grace_period, base.grace_period),
            lead_segments: lead_segments.unwrap_or(base.lead_segments),
            cdn_ttl: secs(cdn_ttl, base.cdn_ttl),
            iv_mode: self.iv_mode.map_or(base.iv_mode, Into::into),
            encrypt_init_sections: self.encrypt_init_sections.unwrap_or(base.encrypt_init_sections),
            on_encrypted: self.on_encrypted.map_or(base.on_encrypted, Into::into),
            subtitles: self.subtitles.map_or(base.subtitles, Into::into),
            session_keys: self.session_keys.unwrap_or(base.session_keys),
            sync_policy: self.sync_policy.map_or(base.sync_policy, Into::into),
            emergency_rotation: self.emergency_rotation_enabled.unwrap_or(base.emergency_rotation),
            revocation_transition: revocation_transition.unwrap_or(base.revocation_transition),
        }
    }
}

/// Where a playlist's URL leads among the allowed origins.
fn playlist_place<'m>(mounts: &'m Mounts, url: &str, faults: &mut Faults) -> Option<PlaylistPlace<'m>> {
    let found = absolute_url(url).and_then(|parsed| {
        // It is shown to whoever may list streams.
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err("must not have a user name or a password".to_owned());
        }
        if parsed.fragment().is_some() {
            return Err("must not have a fragment".to_owned());
        }
        let mut place = mounts.place_of(url).map_err(|error| match error {
            crate::hls::MountError::NotAllowed(site) => {
                format!(
                    "leads to {site}, which is not at an allowed origin: add it to [[origins]] or correct it"
                )
            }
            other => format!("is wrong: {other}"),
        })?;
        let unknown = place.query.as_deref().and_then(|query| place.mount.unknown_param(query));
        if let Some(name) = unknown {
            let origin = &place.mount.origin;
            return Err(format!(
                "has the parameter {name:?}, which origin {origin} does not list in query_params"
            ));
        }
        place.query = place.query.and_then(|query| place.mount.playlist_query(&query));
        let plain_path = normalized_path(&place.path).map_err(|error| format!("is wrong: {error}"))?;
        Ok(PlaylistPlace { place, plain_path })
    });
    found.map_err(|why| faults.add("playlistUrl", why)).ok()
}

/// # Errors
/// Why it is no absolute http or https URL of a decent length.
fn absolute_url(text: &str) -> Result<Url, String> {
    if text.chars().count() > MAX_URL_LEN {
        return Err(format!("must have at most {MAX_URL_LEN} characters"));
    }
    // The parser would put right what is not quite one (white space, `https:host`); it is kept as it was given.
    let is_http = text.starts_with("http://") || text.starts_with("https://");
    let is_plain = is_http && !text.chars().any(|c| c.is_whitespace() || c.is_control());
    let url = Url::parse(text).ok().filter(|url| is_plain && url.has_host());
    url.ok_or_else(|| "must be an absolute URL that begins with http:// or https://".to_owned())
}

fn cdn_endpoints(given: Option<Vec<CdnEndpoint>>, faults: &mut Faults) -> Option<Vec<String>> {
    let given = given?;
    if given.len() > MAX_CDN_ENDPOINTS {
        faults.add("cdnEndpoints", format!("must be at most {MAX_CDN_ENDPOINTS}"));
    }
    for (at, CdnEndpoint(url)) in given.iter().enumerate().take(MAX_CDN_ENDPOINTS) {
        let checked = absolute_url(url).and_then(|url| {
            let plain = url.username().is_empty() && url.password().is_none();
            if plain { Ok(()) } else { Err("must not have a user name or a password".to_owned()) }
        });
        if let Err(why) = checked {
            faults.add(format!("cdnEndpoints[{at}]"), why);
        }
    }
    Some(given.into_iter().map(|CdnEndpoint(url)| url).collect())
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
