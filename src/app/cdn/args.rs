//! The arguments of `cdn`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::app::remote::RemoteArgs;

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

/// What is signed.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct SignedWhat {
    /// This URL alone
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// Cookies for all URLs of this pattern
    #[arg(long, value_name = "PATTERN")]
    pub cookies: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum CdnCommand {
    /// How a running shield's CDNs are, by its control API
    #[command(after_help = "Example:\n  keyshield cdn status --control http://127.0.0.1:8081")]
    Status {
        #[command(flatten)]
        remote: RemoteArgs,
    },
    /// Revocations of a running shield, and how far each CDN is with letting go of the keys
    #[command(
        after_help = "Examples:\n  keyshield cdn incidents\n  keyshield cdn incidents 0199b2c3d4e5f60718293a4b5c6d7e8f"
    )]
    Incidents {
        #[command(flatten)]
        remote: RemoteArgs,
        /// Only this one, CDN by CDN
        #[arg(value_name = "INCIDENT-ID")]
        incident: Option<String>,
    },
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
        /// How long the edge is waited for, beyond what the vendor says that changes take
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(0..=3_600))]
        wait: u32,
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
    /// Bring the code of the edge to a CDN that takes it by its API: Fastly, CloudFront
    #[command(
        after_help = "Examples:\n  keyshield cdn deploy --config keyshield.toml --cdn edge-c\n  keyshield cdn deploy --config keyshield.toml --cdn edge-b --function keyshield-keys --needs-token\n\nAll that is there already stays as it is. Run it again after an update, or with a new edge secret."
    )]
    Deploy {
        #[command(flatten)]
        target: CdnTarget,
        /// CloudFront: the function's name
        #[arg(long, value_name = "NAME", default_value = "keyshield-keys")]
        function: String,
        /// Give keys out against a viewer's token alone
        #[arg(long)]
        needs_token: bool,
    },
    /// Sign a URL, or cookies, that let a viewer in at CloudFront
    #[command(
        after_help = "Examples:\n  keyshield cdn sign --config keyshield.toml --cdn edge-b --url https://b.example.com/live/ch1/master.m3u8 --ttl 3600\n  keyshield cdn sign --config keyshield.toml --cdn edge-b --cookies 'https://b.example.com/live/ch1/*' --ttl 3600"
    )]
    Sign {
        #[command(flatten)]
        target: CdnTarget,
        #[command(flatten)]
        what: SignedWhat,
        /// For how long it is good; signer_longest_life_secs at most
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=31_622_400))]
        ttl: u32,
    },
    /// Change the key that signs for CloudFront, without turning a viewer away; or go on with it
    #[command(
        after_help = "Examples:\n  keyshield cdn rotate-signer --config keyshield.toml --cdn edge-b\n  keyshield cdn rotate-signer --config keyshield.toml --cdn edge-b --status\n\nRun it again when it says so: the old key stays as long as anything that it signed."
    )]
    RotateSigner {
        #[command(flatten)]
        target: CdnTarget,
        /// Wait for what takes time, instead of being run again
        #[arg(long, conflicts_with = "status")]
        wait: bool,
        /// Only say how things stand
        #[arg(long)]
        status: bool,
    },
}
