//! The shield as a whole: real processes, real players, origins that misbehave on command.
//!
//! One binary, so that it links once. Everything listens on loopback, is bounded in time and is stopped by
//! its own process ID. `scripts/bootstrap.sh test` installs what these tests call.

mod cli;
mod data_plane;
mod harness;
mod origin;
mod origins;
mod players;
mod sessions;
