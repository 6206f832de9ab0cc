//! The shield as a whole: real processes, real players, origins that misbehave on command.
//!
//! One binary, so that it links once. Everything listens on loopback, is bounded in time and is stopped by
//! its own process ID. `scripts/bootstrap.sh test` installs what these tests call.

mod cdn;
mod cdn_api;
mod cdn_cli;
mod cli;
mod control_api;
mod corpus;
mod daemon;
mod data_plane;
mod edge_answers;
#[cfg(feature = "faults")]
mod faults;
mod fleet;
mod fleet_origin;
mod golden;
mod harness;
mod hook;
mod kinds;
mod kms;
#[cfg(feature = "kms-vault")]
mod kms_outage;
mod ll_clear;
mod ll_encoder;
mod ll_latency;
mod ll_media;
mod ll_origin;
mod ll_playlist;
mod low_latency;
mod machine;
mod media;
mod nginx;
mod operators_cli;
mod origin;
mod origins;
mod outage;
mod player_matrix;
mod players;
mod postgres;
mod real_players;
mod revocation;
#[cfg(all(feature = "kms-aws", feature = "kms-vault"))]
mod rewrap;
mod schemathesis;
mod sessions;
#[cfg(any(feature = "faults", all(feature = "kms-aws", feature = "kms-vault")))]
mod sqlite;
mod store;
mod store_deliveries;
mod watch;
mod wire;
