//! Configuration: text in, checked values out.
//!
//! [`raw`] is what the file and the environment say, [`Config`] is what was checked: who holds one need not
//! doubt its addresses, origins or policies. `config/keyshield.toml` documents every key. Deliberately
//! absent: opening what the configuration names (`app` does).

mod environment;
mod raw;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

pub use environment::Environment;
pub use raw::{RawConfig, RawOrigin, RawPolicy, RawStream};

use crate::hls::{BaseUrl, Mount, MountError, Mounts, normalized_path};
use crate::keys::{IdError, IvMode, KeyMethod, Policy, PolicyError, StreamId};
use crate::telemetry::{LogFormat, check_log_filter};

const YEAR_SECS: u64 = 366 * 86_400;
/// A year: whoever wants no time trigger says 0.
const MAX_INTERVAL_MINUTES: f64 = 525_600.0;

/// What is wrong with the configuration: where, and what to do.
#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}")]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("environment variable {name}={value:?}: {why}")]
    Environment { name: &'static str, value: String, why: String },
    #[error("{field} = {value:?}: {why}")]
    Field { field: String, value: String, why: String },
    #[error("{0}")]
    Origins(#[from] MountError),
    #[error("stream {stream}: {source}")]
    Policy { stream: String, source: PolicyError },
    #[error("stream {id:?}: {source}")]
    StreamId { id: String, source: IdError },
    #[error("stream {stream}: playlist_url {url:?}: {source}; add it to [[origins]] or correct it")]
    StreamUrl { stream: String, url: String, source: MountError },
    #[error("stream {stream}: path_prefix {prefix:?} does not begin the path of playlist_url, {path:?}")]
    StreamPrefix { stream: String, prefix: String, path: String },
    #[error("streams {one} and {other} both own {prefix:?} at origin {origin:?}")]
    PrefixTaken { one: String, other: String, prefix: String, origin: String },
    #[error("stream {0} is configured twice")]
    StreamTwice(String),
}

/// A stream, checked: its playlist lies at an allowed origin, below its prefix.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamConfig {
    pub id: StreamId,
    pub origin: String,
    pub prefix: String,
    /// The path of its main playlist, as players ask the shield for it.
    pub playlist_path: String,
    pub policy: Policy,
}

/// The whole configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub listen: SocketAddr,
    pub control_listen: SocketAddr,
    /// 0: one for each core.
    pub threads: usize,
    pub shutdown_grace: Duration,
    pub log_format: LogFormat,
    pub log_filter: String,
    pub database: PathBuf,
    pub master_key_file: PathBuf,
    pub sweep_interval: Duration,
    pub key_uri_base: String,
    pub key_max_age: Duration,
    pub segment_max_age: Duration,
    pub cors_origins: Vec<String>,
    pub max_playlist_bytes: usize,
    pub playlist_cache_bytes: u64,
    pub stale_if_error: Duration,
    pub playlist_timeout: Duration,
    pub segment_timeout: Duration,
    pub max_segment_bytes: u64,
    pub segment_cache_bytes: u64,
    pub max_filling_segments: usize,
    pub connect_timeout: Duration,
    pub read_timeout: Duration,
    pub idle_timeout: Duration,
    pub pool_size: usize,
    pub ca_file: Option<String>,
    pub mounts: Mounts,
    pub streams: Vec<StreamConfig>,
}

impl Config {
    /// Reads the file, puts the environment over it, and checks the whole.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn load(path: &Path, environment: &Environment) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut raw: RawConfig = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        environment.apply(&mut raw)?;
        Self::checked(&raw)
    }

    /// # Errors
    /// The first field whose value makes no sense.
    pub fn checked(raw: &RawConfig) -> Result<Self, ConfigError> {
        let mounts = raw.origins.iter().map(mount).collect::<Result<Vec<_>, _>>()?;
        let mounts = Mounts::new(mounts)?;
        let streams =
            raw.streams.iter().map(|s| stream(s, &raw.policy, &mounts)).collect::<Result<Vec<_>, _>>()?;
        refuse_shared(&streams)?;
        Ok(Self {
            listen: address("shield.listen", &raw.shield.listen)?,
            control_listen: address("control.listen", &raw.control.listen)?,
            threads: between("shield.threads", raw.shield.threads, 0..=1_024)?,
            shutdown_grace: secs("shield.shutdown_grace_secs", raw.shield.shutdown_grace_secs, 0..=600)?,
            log_format: raw.log.format.parse().map_err(|why: &str| ConfigError::Field {
                field: "log.format".into(),
                value: raw.log.format.clone(),
                why: why.into(),
            })?,
            log_filter: checked_filter(&raw.log.filter)?,
            database: raw.store.database.clone(),
            master_key_file: raw.kms.master_key_file.clone(),
            sweep_interval: Duration::from_millis(between(
                "keys.sweep_interval_millis",
                raw.keys.sweep_interval_millis,
                10..=10_000,
            )?),
            key_uri_base: key_uri_base(&raw.keys.uri_base)?,
            key_max_age: secs("keys.max_age_secs", raw.keys.max_age_secs, 0..=YEAR_SECS)?,
            segment_max_age: secs("segments.max_age_secs", raw.segments.max_age_secs, 0..=YEAR_SECS)?,
            cors_origins: raw.shield.cors_origins.clone(),
            max_playlist_bytes: between("playlists.max_bytes", raw.playlists.max_bytes, 1..=1 << 30)?,
            playlist_cache_bytes: raw.playlists.cache_bytes,
            stale_if_error: secs(
                "playlists.stale_if_error_secs",
                raw.playlists.stale_if_error_secs,
                0..=86_400,
            )?,
            playlist_timeout: secs("playlists.timeout_secs", raw.playlists.timeout_secs, 1..=600)?,
            segment_timeout: secs("segments.timeout_secs", raw.segments.timeout_secs, 1..=3_600)?,
            max_segment_bytes: between("segments.max_bytes", raw.segments.max_bytes, 1..=1 << 40)?,
            segment_cache_bytes: raw.segments.cache_bytes,
            max_filling_segments: between("segments.max_filling", raw.segments.max_filling, 1..=1_000_000)?,
            connect_timeout: secs(
                "upstream.connect_timeout_secs",
                raw.upstream.connect_timeout_secs,
                1..=600,
            )?,
            read_timeout: secs("upstream.read_timeout_secs", raw.upstream.read_timeout_secs, 1..=600)?,
            idle_timeout: secs("upstream.idle_timeout_secs", raw.upstream.idle_timeout_secs, 1..=86_400)?,
            pool_size: between("upstream.pool_size", raw.upstream.pool_size, 1..=100_000)?,
            ca_file: Some(raw.upstream.ca_file.clone()).filter(|path| !path.is_empty()),
            mounts,
            streams,
        })
    }
}

fn field(field: &str, value: impl ToString, why: &str) -> ConfigError {
    ConfigError::Field { field: field.to_owned(), value: value.to_string(), why: why.to_owned() }
}

fn address(name: &str, text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse().map_err(|_| field(name, text, "must be IP:PORT, such as 127.0.0.1:8080 or [::]:8080"))
}

fn between<N: Copy + PartialOrd + ToString>(
    name: &str,
    value: N,
    range: RangeInclusive<N>,
) -> Result<N, ConfigError> {
    let why = || format!("must be between {} and {}", range.start().to_string(), range.end().to_string());
    if range.contains(&value) { Ok(value) } else { Err(field(name, value, &why())) }
}

fn secs(name: &str, value: u64, range: RangeInclusive<u64>) -> Result<Duration, ConfigError> {
    between(name, value, range).map(Duration::from_secs)
}

fn checked_filter(filter: &str) -> Result<String, ConfigError> {
    let checked = check_log_filter(filter).map(|()| filter.to_owned());
    checked.map_err(|why| field("log.filter", filter, &why))
}

/// What stands before the key ID: a path of the shield, or an absolute URL of a CDN in front of it.
fn key_uri_base(text: &str) -> Result<String, ConfigError> {
    let legal = text.starts_with('/') || BaseUrl::parse(text).is_ok();
    let plain = text.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    if !legal || !plain {
        let why = "must be a path such as /api/hls/keys/ or an absolute http(s) URL";
        return Err(field("keys.uri_base", text, why));
    }
    Ok(format!("{}/", text.trim_end_matches('/')))
}

fn mount(raw: &RawOrigin) -> Result<Mount, ConfigError> {
    let bases = raw.urls.iter().map(|url| BaseUrl::parse(url)).collect::<Result<Vec<_>, _>>()?;
    let mut mount = Mount::new(raw.name.clone(), &raw.mount, bases, raw.pass_through)?;
    mount.query_params.clone_from(&raw.query_params);
    Ok(mount)
}

fn stream(raw: &RawStream, defaults: &RawPolicy, mounts: &Mounts) -> Result<StreamConfig, ConfigError> {
    let id: StreamId =
        raw.id.parse().map_err(|source| ConfigError::StreamId { id: raw.id.clone(), source })?;
    let bad_url =
        |source| ConfigError::StreamUrl { stream: raw.id.clone(), url: raw.playlist_url.clone(), source };
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
    let policy = policy(&raw.policy.over(defaults), &raw.id)?;
    let playlist_path = place.mount.shield_path(&place.path);
    Ok(StreamConfig { id, origin: place.mount.origin.clone(), prefix, playlist_path, policy })
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

fn policy(raw: &RawPolicy, stream: &str) -> Result<Policy, ConfigError> {
    let base = Policy::default();
    let named = |name: &str, value: &str, why: &str| field(&format!("{stream}: {name}"), value, why);
    let key_method = match &raw.key_method {
        None => base.key_method,
        Some(name) => KeyMethod::from_name(name)
            .ok_or_else(|| named("key_method", name, "must be \"AES-128\" or \"AES-256\""))?,
    };
    let iv_mode = match &raw.iv_mode {
        None => base.iv_mode,
        Some(name) => {
            let why = "must be \"segment\", \"period\" or \"sequence\"";
            IvMode::from_name(name).ok_or_else(|| named("iv_mode", name, why))?
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
    let policy = Policy {
        key_method,
        rotation_interval,
        segments_per_key: raw.segments_per_key.unwrap_or(base.segments_per_key),
        pre_generate_keys: raw.pre_generate_keys.unwrap_or(base.pre_generate_keys),
        grace_period: secs(raw.grace_period_secs, base.grace_period),
        lead_segments: raw.lead_segments.unwrap_or(base.lead_segments),
        cdn_ttl: secs(raw.cdn_ttl_secs, base.cdn_ttl),
        iv_mode,
        encrypt_init_sections: raw.encrypt_init_sections.unwrap_or(base.encrypt_init_sections),
    };
    policy.checked().map_err(|source| ConfigError::Policy { stream: stream.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        Config::checked(&raw).map_err(|error| error.to_string())
    }

    const ORIGIN: &str = "[[origins]]\nname = \"main\"\nurls = [\"https://origin.example\"]\n";

    #[test]
    fn the_shipped_file_has_every_key_at_its_default() {
        let shipped = include_str!("../../config/keyshield.toml");
        let file: toml::Table = shipped.parse().unwrap();
        let mut raw: RawConfig = toml::from_str(shipped).unwrap();
        assert!(Config::checked(&raw).is_ok());

        // The origin and the stream are examples: at their defaults but for their names and URLs.
        let origin = raw.origins.remove(0);
        assert_eq!(
            origin,
            RawOrigin { name: origin.name.clone(), urls: origin.urls.clone(), ..RawOrigin::default() }
        );
        let stream = raw.streams.remove(0);
        assert_eq!(stream.policy, RawPolicy::default());
        assert_eq!(raw, RawConfig::default());

        // Every key is there: those of the defaults, and no other.
        let defaults = toml::Table::try_from(RawConfig::default()).unwrap();
        for (section, keys) in &defaults {
            let Some(keys) = keys.as_table() else { continue };
            let present = file[section].as_table().unwrap();
            assert_eq!(present.keys().collect::<Vec<_>>(), keys.keys().collect::<Vec<_>>(), "[{section}]");
        }
    }

    #[test]
    fn unknown_keys_are_errors_with_their_line() {
        let error = parse("[shield]\nlisten = \"127.0.0.1:1\"\nlisen = 1\n").unwrap_err();
        assert!(error.contains("line 3") && error.contains("lisen"), "{error}");
    }

    #[test]
    fn a_stream_owns_the_directory_of_its_playlist_or_its_prefix() {
        let stream =
            "[[streams]]\nid = \"ch1\"\nplaylist_url = \"https://origin.example/live/ch1/master.m3u8\"\n";
        let config = parse(&format!("{ORIGIN}{stream}")).unwrap();
        assert_eq!(config.streams[0].prefix, "/live/ch1/");
        assert_eq!(config.streams[0].playlist_path, "/live/ch1/master.m3u8");
        let flat = format!("{ORIGIN}{stream}path_prefix = \"/live/ch\"\n");
        assert_eq!(parse(&flat).unwrap().streams[0].prefix, "/live/ch");
        let elsewhere = format!("{ORIGIN}{stream}path_prefix = \"/vod/\"\n");
        assert!(parse(&elsewhere).unwrap_err().contains("path_prefix"));
    }

    #[test]
    fn a_stream_at_an_origin_that_is_not_allowed_is_refused() {
        let stream = "[[streams]]\nid = \"ch1\"\nplaylist_url = \"https://other.example/a.m3u8\"\n";
        let error = parse(&format!("{ORIGIN}{stream}")).unwrap_err();
        assert!(error.contains("other.example") && error.contains("[[origins]]"), "{error}");
    }

    #[test]
    fn a_streams_policy_goes_over_the_defaults() {
        let text = format!(
            "{ORIGIN}[policy]\nsegments_per_key = 50\ngrace_period_secs = 10\n\
             [[streams]]\nid = \"ch1\"\nplaylist_url = \"https://origin.example/a.m3u8\"\n\
             [streams.policy]\nsegments_per_key = 20\nrotation_interval_minutes = 0\niv_mode = \"period\"\n"
        );
        let policy = &parse(&text).unwrap().streams[0].policy;
        assert_eq!(policy.segments_per_key, 20);
        assert_eq!(policy.grace_period, Duration::from_secs(10));
        assert_eq!(policy.rotation_interval, None);
        assert_eq!(policy.iv_mode, IvMode::Period);
    }

    #[test]
    fn values_that_make_no_sense_name_their_field() {
        for (text, named) in [
            ("[shield]\nlisten = \"localhost\"\n", "shield.listen"),
            ("[segments]\nmax_bytes = 0\n", "segments.max_bytes"),
            ("[log]\nformat = \"xml\"\n", "log.format"),
            ("[log]\nfilter = \"keyshield=loud\"\n", "log.filter"),
            ("[segments]\nmax_filling = 9223372036854775807\n", "segments.max_filling"),
            ("[playlists]\nstale_if_error_secs = 99999999999\n", "playlists.stale_if_error_secs"),
            ("[upstream]\npool_size = 1000000000000\n", "upstream.pool_size"),
            ("[keys]\nuri_base = \"keys\"\n", "keys.uri_base"),
            ("[keys]\nuri_base = \"/a\\\"b\"\n", "keys.uri_base"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        let stream = "[[streams]]\nid = \"ch1\"\nplaylist_url = \"https://origin.example/a.m3u8\"\n";
        for (setting, named) in [
            ("key_method = \"DES\"", "key_method"),
            ("iv_mode = \"x\"", "iv_mode"),
            ("segments_per_key = 0", "segments_per_key"),
            ("rotation_interval_minutes = -1", "rotation_interval_minutes"),
            ("rotation_interval_minutes = nan", "rotation_interval_minutes"),
        ] {
            let error = parse(&format!("{ORIGIN}{stream}[streams.policy]\n{setting}\n")).unwrap_err();
            assert!(error.contains(named) && error.contains("ch1"), "{error}");
        }
    }

    #[test]
    fn two_streams_cannot_own_one_prefix() {
        let stream = |id| {
            format!("[[streams]]\nid = \"{id}\"\nplaylist_url = \"https://origin.example/a/{id}.m3u8\"\n")
        };
        let error = parse(&format!("{ORIGIN}{}{}", stream("one"), stream("two"))).unwrap_err();
        assert!(error.contains("one") && error.contains("two"), "{error}");
    }
}
