//! Configuration: layers in, checked values out.
//!
//! Defaults, a file, the environment and flags go one over the other ([`Layers`]) and come to a [`RawConfig`];
//! [`Config`] is what was checked: who holds one need not doubt its addresses, origins or policies. [`Effective`]
//! says where each value came from. `config/keyshield.toml` documents every key. Deliberately absent: opening what
//! the configuration names (`app` does).

mod access;
mod alerts;
mod cdn;
mod checks;
mod database;
mod effective;
mod environment;
mod error;
mod file;
mod kms;
mod layers;
mod raw;
mod schema;
mod secrets;
mod streams;

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

pub use access::{AccessToken, JwksSource, JwtConfig, Role};
pub use cdn::{CdnConfig, CdnRules, CdnVendor, endpoint_name};
use checks::{YEAR_SECS, address, between, field, key_uri_base, log_filter, millis, mount, secs};
pub use database::Database;
pub use effective::{Effective, EffectiveValue};
pub use environment::Environment;
pub use error::ConfigError;
#[cfg(feature = "kms-aws")]
pub use kms::AwsConfig;
#[cfg(feature = "kms-azure")]
pub use kms::AzureConfig;
#[cfg(feature = "kms-gcp")]
pub use kms::GcpConfig;
#[cfg(feature = "kms-vault")]
pub use kms::VaultConfig;
pub use kms::{DekConfig, KeyringConfig, KmsConfig};
pub use layers::{Layers, Setting, Source};
pub use raw::{RawConfig, RawControl, RawJwt, RawOrigin, RawPolicy, RawStream, RawToken};
pub use secrets::masked_url;
pub use streams::StreamConfig;

use crate::alert::WebhookUrl;
use crate::hls::Mounts;
use crate::keys::Policy;
use crate::telemetry::LogFormat;

/// The whole configuration, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub listen: SocketAddr,
    pub control_listen: SocketAddr,
    pub tokens: Vec<AccessToken>,
    pub jwt: Option<JwtConfig>,
    /// 0: one for each core.
    pub threads: usize,
    pub shutdown_grace: Duration,
    pub log_format: LogFormat,
    pub log_filter: String,
    pub database: Database,
    /// Connections to PostgreSQL.
    pub store_max_connections: u32,
    /// How often changes by other nodes are looked for where they are not told.
    pub store_poll_interval: Duration,
    /// How long a node that does not renew it holds the lease of the sweep.
    pub store_lease: Duration,
    pub kms: KeyringConfig,
    pub deks: DekConfig,
    /// Where alerts are told to.
    pub alert_webhook: Option<WebhookUrl>,
    pub cdn: CdnRules,
    /// Besides those of which only an address is known (`cdn.endpoints`).
    pub cdns: Vec<CdnConfig>,
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
    /// What a stream gets that says nothing else.
    pub policy: Policy,
    pub streams: Vec<StreamConfig>,
}

impl Config {
    /// Puts the file, the environment and the settings over the defaults, and checks the whole.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn load(
        file: Option<&Path>,
        environment: &Environment,
        settings: &[Setting],
    ) -> Result<Effective, ConfigError> {
        let mut layers = Layers::over(&RawConfig::default());
        if let Some(path) = file {
            layers.file(path)?;
        }
        layers.environment(environment)?;
        layers.flags(settings)?;
        let effective = layers.finish()?;
        // An empty file is somebody's will, nothing at all is a slip.
        if file.is_none() && effective.config.mounts.iter().next().is_none() {
            return Err(ConfigError::Nothing);
        }
        Ok(effective)
    }

    /// # Errors
    /// The first field whose value makes no sense.
    pub fn checked(raw: &RawConfig) -> Result<Self, ConfigError> {
        let mounts = raw.origins.iter().map(mount).collect::<Result<Vec<_>, _>>()?;
        let mounts = Mounts::new(mounts)?;
        let policy = streams::default_policy(&raw.policy)?;
        let streams = streams::streams(&raw.streams, &raw.policy, &mounts)?;
        Ok(Self {
            listen: address("shield.listen", &raw.shield.listen)?,
            control_listen: address("control.listen", &raw.control.listen)?,
            tokens: access::tokens(&raw.control.tokens)?,
            jwt: raw.control.jwt.as_ref().map(access::jwt).transpose()?,
            threads: between("shield.threads", raw.shield.threads, 0..=1_024)?,
            shutdown_grace: secs("shield.shutdown_grace_secs", raw.shield.shutdown_grace_secs, 0..=600)?,
            log_format: raw
                .log
                .format
                .parse()
                .map_err(|why: &str| field("log.format", &raw.log.format, why))?,
            log_filter: log_filter(&raw.log.filter)?,
            database: Database::parse(&raw.store.database)?,
            store_max_connections: between("store.max_connections", raw.store.max_connections, 1..=100)?,
            store_poll_interval: millis(
                "store.poll_interval_millis",
                raw.store.poll_interval_millis,
                50..=10_000,
            )?,
            store_lease: secs("store.lease_secs", raw.store.lease_secs, 2..=300)?,
            kms: kms::keyring(&raw.kms)?,
            deks: kms::deks(&raw.kms)?,
            alert_webhook: alerts::webhook(&raw.alerts)?,
            cdn: cdn::rules(&raw.cdn)?,
            cdns: cdn::cdns(&raw.cdns, &raw.cdn)?,
            sweep_interval: millis(
                "keys.sweep_interval_millis",
                raw.keys.sweep_interval_millis,
                10..=10_000,
            )?,
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
            policy,
            streams,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::{IvMode, KeyMethod, OnEncrypted, Subtitles, SyncPolicy};

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

        // Every key is there: those of the defaults in their order, and no other. Lists of tables are in comments.
        let mut defaults = toml::Table::try_from(RawConfig::default()).unwrap();
        defaults["control"].as_table_mut().unwrap().remove("tokens");
        for (section, keys) in &defaults {
            let Some(keys) = keys.as_table() else { continue };
            let present = file[section].as_table().unwrap();
            assert_eq!(present.keys().collect::<Vec<_>>(), keys.keys().collect::<Vec<_>>(), "[{section}]");
        }
        let of = |table: &toml::Table, provider: &str| -> Vec<String> {
            table["kms"][provider].as_table().unwrap().keys().cloned().collect()
        };
        for provider in ["aws", "azure", "gcp", "vault"] {
            assert_eq!(of(&file, provider), of(&defaults, provider), "[kms.{provider}]");
        }
    }

    #[test]
    fn what_the_shipped_file_has_in_comments_is_right_too() {
        let shipped = include_str!("../../config/keyshield.toml");
        let is_toml = |line: &str| {
            let name = line.split(" = ").next().unwrap_or(line);
            line.starts_with('[') || (line.contains(" = ") && !name.contains(' '))
        };
        let uncommented =
            |line: &'static str| line.strip_prefix("# ").filter(|rest| is_toml(rest)).unwrap_or(line);
        let text: Vec<_> = shipped.lines().map(uncommented).collect();
        let config = parse(&text.join("\n")).unwrap();
        assert_eq!(
            (config.tokens[0].name.as_str(), config.tokens[0].role),
            ("release-pipeline", Role::Operator)
        );
        assert_eq!(config.jwt.unwrap().audience, "keyshield");
        assert_eq!(config.streams[0].policy.segments_per_key, 50);
        let kinds: Vec<_> = config.cdns.iter().map(|cdn| cdn.vendor.kind()).collect();
        assert_eq!(kinds, ["cloudflare", "cloudfront", "fastly", "custom"]);
        // Each example has every key of its entry.
        let file: toml::Table = text.join("\n").parse().unwrap();
        let given = |at: usize, kind: &str| file["cdns"][at][kind].as_table().unwrap().clone();
        let all = toml::Table::try_from(raw::RawCdn::everything()).unwrap();
        for (at, kind) in kinds.iter().enumerate() {
            let keys = |table: &toml::Table| table.keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(&given(at, kind)), keys(all[*kind].as_table().unwrap()), "[cdns.{kind}]");
        }
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
    fn of_a_playlists_query_there_is_what_its_origin_lists() {
        let stream =
            "[[streams]]\nid = \"ch1\"\nplaylist_url = \"https://origin.example/a.m3u8?token=secret&q=1\"\n";
        let shown =
            |origin: &str| parse(&format!("{origin}{stream}")).unwrap().streams[0].playlist_url.clone();
        assert_eq!(shown(ORIGIN), "https://origin.example/a.m3u8");
        assert_eq!(shown(&format!("{ORIGIN}query_params = [\"q\"]\n")), "https://origin.example/a.m3u8?q=1");
        let error =
            parse(&format!("{ORIGIN}{}", stream.replace("origin.example", "other.example"))).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
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
             [streams.policy]\nsegments_per_key = 20\nrotation_interval_minutes = 0\niv_mode = \"period\"\n\
             on_encrypted = \"rekey\"\nsubtitles = \"clear\"\nsession_keys = true\n\
             sync_policy = \"best-effort\"\n\
             emergency_rotation_enabled = false\nrevocation_transition_target_durations = 0\n"
        );
        let policy = &parse(&text).unwrap().streams[0].policy;
        assert_eq!(policy.segments_per_key, 20);
        assert_eq!(policy.grace_period, Duration::from_secs(10));
        assert_eq!(policy.rotation_interval, None);
        assert_eq!(policy.iv_mode, IvMode::Period);
        assert_eq!((policy.on_encrypted, policy.subtitles), (OnEncrypted::Rekey, Subtitles::Clear));
        assert!(policy.session_keys);
        assert_eq!(policy.sync_policy, SyncPolicy::BestEffort);
        assert_eq!((policy.emergency_rotation, policy.revocation_transition), (false, 0));
    }

    #[test]
    fn an_iv_mode_and_a_method_without_one_do_not_go_together() {
        const GCM: &str = "key_method = \"AES-256-GCM\"\n";
        let config = |policy: &str, own: &str| {
            let stream = "[[streams]]\nid = \"ch1\"\nplaylist_url = \"https://origin.example/a.m3u8\"\n";
            parse(&format!("{ORIGIN}[policy]\n{policy}{stream}[streams.policy]\n{own}"))
        };
        let taken = |policy, own| {
            let policy = &config(policy, own).unwrap().streams[0].policy;
            (policy.key_method, policy.iv_mode)
        };
        let gcm = (KeyMethod::Aes256Gcm, IvMode::Segment);
        assert_eq!(taken(GCM, ""), gcm);
        assert_eq!(taken("", GCM), gcm);
        // The shipped file has the default: it is for the other streams.
        assert_eq!(taken("iv_mode = \"segment\"\n", GCM), gcm);
        assert_eq!(
            taken(GCM, "key_method = \"AES-128\"\niv_mode = \"period\"\n"),
            (KeyMethod::Aes128, IvMode::Period)
        );

        let refused = |policy: &str, own: &str, named: &str| {
            let error = config(policy, own).unwrap_err();
            assert!(error.starts_with(named) && error.contains("AES-256-GCM"), "{error}");
            error
        };
        for mode in ["segment", "period"] {
            let mode = format!("iv_mode = \"{mode}\"\n");
            let both = format!("{GCM}{mode}");
            let error = refused(&both, "", &format!("policy.{}", mode.trim_end()));
            assert!(error.contains("must be left out"), "{error}");
            refused("", &both, "streams[0].policy.iv_mode");
            let error = refused(GCM, &mode, "streams[0].policy.iv_mode");
            assert!(error.contains("stream ch1: must be left out"), "{error}");
        }
        let error = refused("iv_mode = \"period\"\n", GCM, "policy.iv_mode = \"period\": stream ch1");
        assert!(error.contains("[streams.policy]") && error.contains("another key_method"), "{error}");
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
            ("[store]\nmax_connections = 0\n", "store.max_connections"),
            ("[store]\npoll_interval_millis = 20000\n", "store.poll_interval_millis"),
            ("[store]\nlease_secs = 1\n", "store.lease_secs"),
            ("[store]\ndatabase = \"mysql://db\"\n", "store.database"),
            ("[policy]\niv_mode = \"x\"\n", "policy.iv_mode"),
            ("[policy]\non_encrypted = \"ignore\"\n", "policy.on_encrypted"),
            ("[policy]\nsubtitles = \"x\"\n", "policy.subtitles"),
            ("[policy]\nsync_policy = \"most\"\n", "policy.sync_policy"),
            ("[policy]\ngrace_period_secs = 99999999999\n", "policy.grace_period_secs"),
            (
                "[policy]\nrevocation_transition_target_durations = 101\n",
                "policy.revocation_transition_target",
            ),
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
            ("on_encrypted = \"Reject\"", "on_encrypted"),
            ("subtitles = \"\"", "subtitles"),
            ("sync_policy = \"none\"", "sync_policy"),
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
