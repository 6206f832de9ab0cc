//! The composition root: what the commands do, put together from the rooms.
//!
//! The only place that knows every room, chooses between adapters and opens what the configuration names.

mod check;
mod demo;
mod health;
mod inspect;
mod rewrite;
mod serve;
mod servers;

pub use check::check;
pub use demo::{DemoOptions, demo};
pub use health::health;
pub use inspect::inspect;
pub use rewrite::{RewriteOptions, rewrite};
pub use serve::serve;
