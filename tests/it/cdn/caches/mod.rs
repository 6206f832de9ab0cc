//! Real caches before shields, as CDNs of an operator's own: varnish, which purges by tag and knows queries, and nginx,
//! which drops queries from its cache key. Each has an agent that answers the API of `docs/custom-cdn.openapi.yaml`.
//!
//! ```text
//! Varnish::start(&[node, …])          before the shields' data planes, in pull mode
//! Varnish::start_push(&[node, …], s)  key URIs are answered by the agent from its store, opened with the secret s
//! Nginx::start, Nginx::start_push     likewise
//!   .edge_url()                       where players play, and `Edge` asks
//!   .agent_url(), .token()            for `CustomSettings`
//!   .agent                            an `AgentHandle`:
//!     refuse()  slow(Duration)  flap(serves, fails)  rate_limit(calls, per)  purges_take(Duration)  lose_purges()  heal()
//!     can_only(&["tags", …])          its capabilities
//!     calls()  count("POST /v1/purge")  most_within(Duration, "")  stored()  purged()
//! ```
//!
//! A purge takes half a second: an agent looks through its cache again for what was being fetched. Answers have `X-Cache: HIT` or `MISS`. All end when they are dropped, by their process IDs; the agents' ports are theirs
//! from the start, so that one which refuses is not one which is away: for that, drop it.

mod agent;
mod keys;
mod nginx;
mod switches;
mod varnish;

pub use agent::{AgentHandle, TOKEN};
pub use nginx::Nginx;
pub use varnish::Varnish;
