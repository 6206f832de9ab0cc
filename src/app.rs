//! The composition root: what the commands do, put together from the rooms.
//!
//! The only place that knows every room, chooses between adapters and opens what the configuration names.

mod access;
pub mod cdn;
mod check;
mod demo;
mod health;
mod inspect;
mod kms;
mod probe;
pub mod remote;
mod rewrite;
mod serve;
mod servers;
mod token;

pub use check::{check, check_json};
pub use demo::{DemoOptions, demo};
pub use health::health;
pub use inspect::inspect;
pub use rewrite::{RewriteOptions, rewrite};
pub use serve::serve;
pub use token::token;
