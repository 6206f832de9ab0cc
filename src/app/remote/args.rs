//! The arguments of `streams`, `keys` and `kms`.

use clap::{Args, Subcommand};
use zeroize::Zeroizing;

/// Where the control plane is, and how to show what it says.
#[derive(Debug, Args)]
pub struct RemoteArgs {
    /// Where the control plane listens
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "KEYSHIELD_CONTROL",
        default_value = "http://127.0.0.1:8081"
    )]
    pub control: String,
    /// The token to show it; better put into KEYSHIELD_TOKEN, where other users cannot see it
    #[arg(long, global = true, value_name = "TOKEN", env = "KEYSHIELD_TOKEN", hide_env_values = true)]
    pub token: Option<Zeroizing<String>>,
    /// Print the API's JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// A stream, by its ID.
#[derive(Debug, Args)]
pub struct Target {
    /// The stream's ID
    #[arg(value_name = "STREAM")]
    pub stream: String,
}

/// What may be said about a stream besides where it lies.
#[derive(Debug, Args)]
pub struct StreamFields {
    /// A CDN in front of it (repeat for more)
    #[arg(long, value_name = "URL")]
    pub cdn: Vec<String>,
    /// A rule of its own, named as in the API: rotationInterval=15, segmentsPerKey=50, keyMethod=AES-256 …
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub settings: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum StreamsCommand {
    /// All streams
    List,
    /// One stream with its rules and its newest key
    Show(Target),
    /// Begin a stream, or go on with a stopped one
    #[command(
        after_help = "Example:\n  keyshield streams initialize ch1 --playlist-url https://origin.example/live/ch1/master.m3u8 --set segmentsPerKey=50"
    )]
    Initialize {
        #[command(flatten)]
        target: Target,
        /// Its playlist at the origin
        #[arg(long, value_name = "URL")]
        playlist_url: String,
        /// What its paths begin with, where that is not the playlist's directory
        #[arg(long, value_name = "PATH")]
        path_prefix: Option<String>,
        #[command(flatten)]
        fields: StreamFields,
    },
    /// Change a stream's rules; keyMethod and ivMode hold for keys that are made from now on
    Update {
        #[command(flatten)]
        target: Target,
        /// Another playlist below the same prefix
        #[arg(long, value_name = "URL")]
        playlist_url: Option<String>,
        #[command(flatten)]
        fields: StreamFields,
    },
    /// Serve nothing of a stream any more, until it is initialized again
    Stop(Target),
    /// End a stream: its keys are destroyed, their history stays
    Delete(Target),
    /// Shred a stream's keys and remove everything about it (GDPR)
    Erase {
        #[command(flatten)]
        target: Target,
        /// Yes, for good
        #[arg(long)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// A stream's keys with their states and times, never their bytes
    List(Target),
    /// When a stream went over to which key, and why
    Rotations(Target),
    /// Go over to the next key now
    Rotate(Target),
    /// Take a stream's keys back at once: viewers go on under the next key
    #[command(
        after_help = "Example:\n  keyshield keys revoke ch1 --reason \"key found on a forum\" --wait\n\nWithout --wait it answers at once; keyshield cdn incidents says how far CDNs are."
    )]
    Revoke {
        #[command(flatten)]
        target: Target,
        /// Why: kept with the key
        #[arg(long, value_name = "TEXT")]
        reason: String,
        /// Only this key, and not all that are in use
        #[arg(long, value_name = "KEY-ID")]
        key: Option<String>,
        /// Wait until no CDN gives out the keys, or what was encrypted under them
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum KmsCommand {
    /// The providers that are held, and how many data encryption keys are under which of their keys
    Status,
    /// Put all data encryption keys under a provider's current key, while streams run
    #[command(
        after_help = "Examples:\n  keyshield kms rewrap --to vault\n  keyshield kms rewrap --to vault --json\n\nCtrl-C leaves it running. Run it again to follow it, or to go on with what it left."
    )]
    Rewrap {
        /// A provider of kms.provider or kms.also
        #[arg(long, value_name = "PROVIDER")]
        to: String,
    },
    /// Give a stream a new data encryption key, for the content keys that are made from now on
    #[command(after_help = "Examples:\n  keyshield kms rotate-dek ch1\n  keyshield kms rotate-dek --all")]
    RotateDek {
        /// The stream's ID
        #[arg(value_name = "STREAM", required_unless_present = "all", conflicts_with = "all")]
        stream: Option<String>,
        /// All streams that are running, one after the other
        #[arg(long)]
        all: bool,
    },
}
