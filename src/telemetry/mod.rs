//! What the shield tells about itself: logs and metrics. Never a key.

mod logs;
mod metrics;

pub use logs::{LogFormat, check_log_filter, init as init_logs};
pub use metrics::Metrics;
