//! keyshield: an HLS origin shield that encrypts a clear HLS origin inline and rotates the keys.
//!
//! The map of the house. Arrows run one way, and `tests/tidy.rs` keeps them:
//!
//! ```text
//! main → app → shield, control, demo → engine → store, kms, cdn, alert → hls, cipher → keys
//! ```
//!
//! Pure rooms (no clock, no randomness, no files, no sockets, no async): `keys`, `cipher`, `hls`.
//! `clock` and `entropy` are the two files that ask the outside for time and random bytes, `fault` is where tests
//! kill the process; `telemetry` is at everyone's service above the pure rooms, and `config` is read by `app`
//! alone.

#![warn(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

pub mod alert;
pub mod app;
pub mod cdn;
pub mod cipher;
pub mod clock;
pub mod config;
pub mod control;
pub mod demo;
pub mod engine;
pub mod entropy;
pub mod fault;
pub mod hls;
pub mod keys;
pub mod kms;
pub mod rest;
pub mod shield;
pub mod store;
pub mod telemetry;
