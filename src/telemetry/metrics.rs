//! Metrics: `keyshield_*`, in base units, for Prometheus. `docs/metrics.md` explains each.

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// Every metric of the process. Made once, shared by all rooms.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    /// Answers of the data plane, by `kind` (playlist, segment, key, pass_through, other) and `status`.
    pub responses: IntCounterVec,
    pub response_bytes: IntCounterVec,
    pub origin_requests: IntCounterVec,
    pub origin_retries: IntCounter,
    /// Segment requests by where their bytes came from: `hit`, `joined` a flow that was filling, `filled`.
    pub flows: IntCounterVec,
    pub flows_filling: IntGauge,
    pub flow_cache_bytes: IntGauge,
    /// Playlists served beyond their time because the origin failed.
    pub stale_playlists: IntCounter,
    pub plaintext_bytes: IntCounter,
    pub promotions: IntCounterVec,
    /// Calls of the KMS for data encryption keys, by `operation` and `outcome`.
    pub kms_calls: IntCounterVec,
    pub kms_up: IntGauge,
    /// By `provider`, of those that are held besides the one that wraps.
    pub kms_held_up: IntGaugeVec,
    /// Data encryption keys that are unwrapped in memory.
    pub deks_unwrapped: IntGauge,
    pub keys: IntGaugeVec,
    pub streams: IntGauge,
    /// Streams that changed in the store and could not be taken in.
    pub streams_put_off: IntGauge,
    pub overdue_rotations: IntGauge,
    pub store_up: IntGauge,
    /// Whether each `alert` is active.
    pub alert_active: IntGaugeVec,
    /// What came of posting alerts to the webhook, by `outcome`.
    pub alert_posts: IntCounterVec,
    /// Calls of CDNs, by `cdn`, `operation` and `outcome`.
    pub cdn_calls: IntCounterVec,
    /// Whether each `cdn` does what it is asked, as the node that delivers finds.
    pub cdn_up: IntGaugeVec,
    /// Keys by `cdn` and `state` (waiting, stored, verified).
    pub cdn_keys: IntGaugeVec,
    /// Revocations that some CDN is not done with.
    pub incidents_open: IntGauge,
    /// From a revocation until a `cdn` had let go.
    pub revocation_seconds: HistogramVec,
    pub lease_held: IntGauge,
    pub sweep_seconds: Histogram,
    pub sweep_errors: IntCounter,
}

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter =
            |name: &str, help: &str| register(&registry, IntCounter::with_opts(Opts::new(name, help)));
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauge = |name: &str, help: &str| register(&registry, IntGauge::with_opts(Opts::new(name, help)));
        Self {
            responses: counters(
                "keyshield_responses_total",
                "Answers to players and CDNs.",
                &["kind", "status"],
            ),
            response_bytes: counters(
                "keyshield_response_body_bytes_total",
                "Body bytes sent to players and CDNs.",
                &["kind"],
            ),
            origin_requests: counters(
                "keyshield_origin_requests_total",
                "Requests to origins by outcome: a status class such as 2xx, or error.",
                &["origin", "outcome"],
            ),
            origin_retries: counter(
                "keyshield_origin_retries_total",
                "Requests sent again because a reused connection was dead.",
            ),
            flows: counters(
                "keyshield_segment_requests_total",
                "Segment requests by source: hit, joined, filled.",
                &["source"],
            ),
            flows_filling: gauge("keyshield_flows_filling", "Segments being fetched and encrypted now."),
            flow_cache_bytes: gauge("keyshield_flow_cache_bytes", "Bytes of complete segments in memory."),
            stale_playlists: counter(
                "keyshield_stale_playlists_total",
                "Playlists served beyond their time because the origin failed.",
            ),
            plaintext_bytes: counter(
                "keyshield_encrypted_bytes_total",
                "Plaintext bytes taken from origins and encrypted.",
            ),
            promotions: counters(
                "keyshield_key_promotions_total",
                "Content keys promoted, by reason: start, count, promotion, reset.",
                &["reason"],
            ),
            kms_calls: counters(
                "keyshield_kms_calls_total",
                "Calls of the KMS, each with the attempts that it took.",
                &["operation", "outcome"],
            ),
            kms_up: gauge("keyshield_kms_up", "Whether the KMS answers and lets its key be used: 1 or 0."),
            kms_held_up: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("keyshield_kms_held_up", "Whether a KMS that is held besides answers: 1 or 0."),
                    &["provider"],
                ),
            ),
            deks_unwrapped: gauge(
                "keyshield_deks_unwrapped",
                "Data encryption keys that are unwrapped in memory.",
            ),
            keys: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("keyshield_keys", "Content keys that are not destroyed, by state."),
                    &["state"],
                ),
            ),
            streams: gauge("keyshield_streams", "Streams that are encrypted."),
            streams_put_off: gauge(
                "keyshield_streams_put_off",
                "Streams whose last change this node could not take in.",
            ),
            overdue_rotations: gauge(
                "keyshield_overdue_rotations",
                "Streams whose newest key is older than it should be.",
            ),
            alert_active: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("keyshield_alert_active", "Whether an alert is active: 1 or 0."),
                    &["alert"],
                ),
            ),
            alert_posts: counters(
                "keyshield_alert_posts_total",
                "Alerts posted to the webhook: taken, failed (tried again), refused, dropped.",
                &["outcome"],
            ),
            cdn_calls: counters(
                "keyshield_cdn_calls_total",
                "Calls of CDNs: put, delete, verify, purge, probe; ok, or what failed.",
                &["cdn", "operation", "outcome"],
            ),
            cdn_up: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new("keyshield_cdn_up", "Whether a CDN does what it is asked: 1 or 0."),
                    &["cdn"],
                ),
            ),
            cdn_keys: register(
                &registry,
                IntGaugeVec::new(
                    Opts::new(
                        "keyshield_cdn_keys",
                        "Keys by what a CDN has of them: waiting, stored, verified.",
                    ),
                    &["cdn", "state"],
                ),
            ),
            incidents_open: gauge("keyshield_incidents_open", "Revocations with which some CDN is not done."),
            revocation_seconds: register(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "keyshield_revocation_seconds",
                        "Time from a revocation until a CDN had let go of the keys.",
                    )
                    .buckets(vec![
                        1.0, 2.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3_600.0,
                    ]),
                    &["cdn"],
                ),
            ),
            store_up: gauge("keyshield_store_up", "Whether the store answers: 1 or 0."),
            lease_held: gauge("keyshield_lease_held", "Whether this node is the one that sweeps: 1 or 0."),
            sweep_seconds: register(
                &registry,
                Histogram::with_opts(HistogramOpts::new(
                    "keyshield_sweep_seconds",
                    "Time of one sweep over all streams.",
                )),
            ),
            sweep_errors: counter(
                "keyshield_sweep_errors_total",
                "Operations of a sweep that failed; the next sweep tries again.",
            ),
            registry,
        }
    }

    /// All metrics in Prometheus's text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        let encoded = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        debug_assert!(encoded.is_ok(), "writing to memory does not fail");
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn register<C>(registry: &Registry, metric: prometheus::Result<C>) -> C
where
    C: prometheus::core::Collector + Clone + 'static,
{
    // Names and labels are the literals above: `new` in any test would show a bad or doubled one.
    let metric = metric.expect("the metric's name is legal");
    registry.register(Box::new(metric.clone())).expect("the metric's name is taken once");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_render_under_the_products_prefix() {
        let metrics = Metrics::new();
        metrics.streams.set(3);
        let text = metrics.render();
        assert!(text.contains("keyshield_streams 3"), "{text}");
        let foreign = text.lines().find(|l| !l.starts_with('#') && !l.starts_with("keyshield_"));
        assert_eq!(foreign, None);
    }
}
