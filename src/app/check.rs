//! `keyshield check`: is the configuration right, and what does it come to?

use std::fmt::Write;

use crate::config::Config;

/// The checked configuration in a few lines: listeners, origins, streams with their rules.
pub fn check(config: &Config) -> String {
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        // Writing to memory does not fail.
        let _ = writeln!(out, "{text}");
    };
    line(format_args!("players     {}", config.listen));
    line(format_args!("operators   {}", config.control_listen));
    line(format_args!("database    {}", config.database.display()));
    line(format_args!("master key  {}", config.master_key_file.display()));
    for mount in config.mounts.iter() {
        let urls: Vec<_> = mount.bases().iter().map(ToString::to_string).collect();
        let mode = if mount.pass_through { ", the rest passed through in clear" } else { "" };
        line(format_args!(
            "origin      {} at {}: {}{mode}",
            mount.origin,
            mount.shield_path("/"),
            urls.join(", ")
        ));
    }
    for stream in &config.streams {
        let policy = &stream.policy;
        let time = match policy.rotation_interval {
            Some(interval) => format!("every {} min or ", interval.as_secs_f64() / 60.0),
            None => "every ".to_owned(),
        };
        line(format_args!(
            "stream      {} at {}: {}, a new key {time}{} segments, {} made ahead",
            stream.id,
            stream.playlist_path,
            policy.key_method.name(),
            policy.segments_per_key,
            policy.pre_generate_keys,
        ));
    }
    out.push_str("the configuration is right\n");
    out
}
