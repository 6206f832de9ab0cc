//! The arguments of `cdn`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// Which configuration, and which of its CDNs.
#[derive(Debug, Args)]
pub struct CdnTarget {
    /// The configuration file; environment variables go over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The CDN's name in [[cdns]]
    #[arg(long, value_name = "NAME")]
    pub cdn: String,
}

/// What a viewer's token is good for.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct TokenFor {
    /// The keys of this stream
    #[arg(long, value_name = "ID")]
    pub stream: Option<String>,
    /// The keys of all streams
    #[arg(long)]
    pub all_streams: bool,
}

#[derive(Debug, Subcommand)]
pub enum CdnCommand {
    /// Try each CDN end to end with a throw-away key, and say what is missing
    #[command(
        after_help = "Examples:\n  keyshield cdn check --config keyshield.toml\n  keyshield cdn check --config keyshield.toml --cdn edge-a --json\n\nIt stores a random key, asks the edge for it as a player would, and deletes it. The shield must be running for CDNs in pull mode."
    )]
    Check {
        /// The configuration file; environment variables go over it
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Only this one, by its name in [[cdns]] or its address in cdn.endpoints
        #[arg(long, value_name = "NAME")]
        cdn: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what the code at a CDN's edge must be given: they are secrets
    #[command(
        after_help = "Example:\n  keyshield cdn secrets --config keyshield.toml --cdn edge-a\n\nThey follow from the CDN's edge secret. Give them to the edge as its vendor keeps secrets (docs/cdn.md)."
    )]
    Secrets(CdnTarget),
    /// Make a viewer's token for key URIs, where the code at the edge asks for one
    #[command(
        after_help = "Examples:\n  keyshield cdn token --config keyshield.toml --cdn edge-a --stream ch1 --ttl 3600\n  keyshield cdn token --config keyshield.toml --cdn edge-a --all-streams --ttl 60\n\nA player sends it in the query of a key URI: ?token=TOKEN"
    )]
    Token {
        #[command(flatten)]
        target: CdnTarget,
        #[command(flatten)]
        scope: TokenFor,
        /// For how long it is good
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=31_622_400))]
        ttl: u32,
    },
}
