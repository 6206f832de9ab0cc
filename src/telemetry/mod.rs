//! What the shield tells about itself: logs and metrics. Never a key.

mod logs;
mod metrics;

pub use logs::{LogFormat, init as init_logs};
pub use metrics::Metrics;
