//! `keyshield serve`: the shield as its configuration describes it.

use super::servers::{Extras, run};
use crate::config::{Config, Environment};
use crate::telemetry::init_logs;

/// Runs the shield until it is told to stop.
pub fn serve(config: &Config, environment: &Environment) -> anyhow::Result<()> {
    init_logs(config.log_format, &config.log_filter)?;
    for name in environment.ignored(&config.kms) {
        tracing::warn!(
            "environment variable {name} is set, but not honoured by this version or with this KMS"
        );
    }
    if config.streams.is_empty() {
        tracing::warn!("no [[streams]] are configured: nothing is encrypted");
    }
    run(config, Extras::default())
}
