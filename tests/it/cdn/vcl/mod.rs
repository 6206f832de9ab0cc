//! Runs as much of Fastly's VCL as the snippets of `edge/fastly` use, and refuses the rest.
//!
//! Fastly's compiler is to be had at Fastly alone. A linter that others wrote judges syntax, types and scopes
//! (`falco`, in `fastly_vcl.rs`); this makes the code answer requests. It is strict where VCL is lenient: an unknown
//! name, a join with a value that is not set and a comparison of two types are errors, not surprises.

mod functions;
mod parse;
mod run;

pub use parse::Program;
pub use run::{Edge, Outcome, Request};
