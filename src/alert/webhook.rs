//! Telling alerts to a URL: a JSON body by POST, tried until it is taken.
//!
//! Notices go in their order. One that is refused for good (a 4xx) is given up; everything else is tried again, later
//! and later and at the latest after a minute, or when `Retry-After` says. Meanwhile a bounded number waits. The URL is
//! a secret, because chat systems put their tokens into it: it stands in no log.

use std::fmt;
use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use thiserror::Error;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use zeroize::Zeroizing;

use super::Notice;
use crate::entropy;
use crate::keys::Timestamp;
use crate::telemetry::Metrics;

const TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// More than this no receiver is waited for, whatever it asks.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3_600);

/// A URL that is not shown.
#[derive(Clone, PartialEq, Eq)]
pub struct WebhookUrl(Zeroizing<String>);

impl WebhookUrl {
    pub fn new(url: String) -> Self {
        Self(Zeroizing::new(url))
    }
}

impl fmt::Debug for WebhookUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookUrl(redacted)")
    }
}

/// Why there is no webhook.
#[derive(Debug, Error)]
#[error("cannot make an HTTP client for alerts: {0}")]
pub struct WebhookError(reqwest::Error);

/// Where notices are posted to.
#[derive(Debug)]
pub struct Webhook {
    client: Client,
    url: WebhookUrl,
    /// Names the node in each notice.
    node: String,
    metrics: Metrics,
}

/// What came of one attempt.
enum Outcome {
    Taken,
    Refused(StatusCode),
    Again { why: String, after: Option<Duration> },
}

impl Webhook {
    /// # Errors
    /// A TLS set-up that is not to be had.
    pub fn new(url: WebhookUrl, node: String, metrics: Metrics) -> Result<Self, WebhookError> {
        // Another part of the process may have been first; one is as good as the other.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().timeout(TIMEOUT).redirect(reqwest::redirect::Policy::none());
        Ok(Self { client: client.build().map_err(WebhookError)?, url, node, metrics })
    }

    /// Posts notices for as long as there can be any.
    pub async fn post_all(self, mut notices: Receiver<Notice>) {
        loop {
            match notices.recv().await {
                Ok(notice) => self.post(&notice).await,
                Err(RecvError::Lagged(missed)) => {
                    self.count("dropped", missed);
                    tracing::error!(
                        missed,
                        "alerts were not told: their webhook did not take them for too long"
                    );
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    async fn post(&self, notice: &Notice) {
        let (body, mut pause) = (body(notice, &self.node), FIRST_PAUSE);
        loop {
            match self.attempt(&body).await {
                Outcome::Taken => return self.count("taken", 1),
                Outcome::Refused(status) => {
                    tracing::error!(alert = notice.alert.name(), %status, "the webhook refuses an alert: check alerts.webhook_url");
                    return self.count("refused", 1);
                }
                Outcome::Again { why, after } => {
                    self.count("failed", 1);
                    let pause_now = after.unwrap_or(pause).min(LONGEST_RETRY_AFTER);
                    tracing::warn!(alert = notice.alert.name(), why, "an alert could not be told yet");
                    tokio::time::sleep(jittered(pause_now)).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn attempt(&self, body: &Value) -> Outcome {
        let again = |why, after| Outcome::Again { why, after };
        let response = match self.client.post(self.url.0.as_str()).json(body).send().await {
            Ok(response) => response,
            Err(error) => return again(cause(error), None),
        };
        let status = response.status();
        let retry_after =
            response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        match status.as_u16() {
            200..=299 => Outcome::Taken,
            408 | 425 | 429 | 500..=599 => again(status.to_string(), retry_after.map(Duration::from_secs)),
            _ => Outcome::Refused(status),
        }
    }

    fn count(&self, outcome: &str, by: u64) {
        self.metrics.alert_posts.with_label_values(&[outcome]).inc_by(by);
    }
}

/// What is behind an error, without the URL.
fn cause(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

/// The same up to a quarter longer, so that nodes do not come together; never sooner than a receiver asked.
fn jittered(pause: Duration) -> Duration {
    let [random] = *entropy::random::<1>();
    pause + pause * u32::from(random) / 1_024
}

fn body(notice: &Notice, node: &str) -> Value {
    json!({
        "alert": notice.alert.name(),
        "status": if notice.is_raised { "raised" } else { "resolved" },
        "severity": notice.alert.severity(),
        "text": notice.text,
        "node": node,
        "since": date_time(notice.since),
        "at": date_time(notice.at),
    })
}

fn date_time(at: Timestamp) -> String {
    let nanos = i128::from(at.as_unix_millis()) * 1_000_000;
    let at = OffsetDateTime::from_unix_timestamp_nanos(nanos).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::Router;
    use axum::extract::State;
    use axum::http::HeaderMap;
    use axum::routing::post;
    use parking_lot::Mutex;
    use tokio::time::Instant;

    use super::*;
    use crate::alert::{Alert, Alerts};

    type Received = Arc<Mutex<Vec<(Instant, String)>>>;

    /// A receiver on loopback that answers one status after the other, the last one for good.
    async fn receiver(statuses: &'static [u16]) -> (String, Received) {
        let received = Received::default();
        let take = move |State(received): State<Received>, text: String| async move {
            let mut received = received.lock();
            let status = statuses[received.len().min(statuses.len() - 1)];
            received.push((Instant::now(), text));
            let mut headers = HeaderMap::new();
            if status == 429 {
                headers.insert("Retry-After", "1".parse().unwrap());
            }
            (StatusCode::from_u16(status).unwrap(), headers)
        };
        let routes = Router::new().route("/secret-token", post(take)).with_state(Arc::clone(&received));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/secret-token", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        (url, received)
    }

    fn webhook(url: String) -> (Alerts, Metrics) {
        let metrics = Metrics::new();
        let alerts = Alerts::new(metrics.clone());
        let webhook = Webhook::new(WebhookUrl::new(url), "n1".into(), metrics.clone()).unwrap();
        assert!(!format!("{webhook:?}").contains("secret-token"));
        tokio::spawn(webhook.post_all(alerts.listen()));
        (alerts, metrics)
    }

    fn posts(metrics: &Metrics, outcome: &str) -> u64 {
        metrics.alert_posts.with_label_values(&[outcome]).get()
    }

    async fn until(what: impl Fn() -> bool) {
        let holds = async {
            while !what() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), holds).await.expect("it comes about");
    }

    const AT: Timestamp = Timestamp::from_unix_millis(1_709_210_096_007);

    #[tokio::test]
    async fn a_notice_is_tried_until_it_is_taken_and_the_next_one_comes_behind_it() {
        let (url, received) = receiver(&[429, 200]).await;
        let (alerts, metrics) = webhook(url);
        alerts.set(Alert::KmsUnavailable, AT, Some("sealed".into()));
        alerts.set(Alert::KmsUnavailable, AT.plus(Duration::from_secs(5)), None);
        until(|| posts(&metrics, "taken") == 2).await;
        assert_eq!(posts(&metrics, "failed"), 1);
        let received = received.lock();
        let bodies: Vec<Value> =
            received.iter().map(|(_, text)| serde_json::from_str(text).unwrap()).collect();
        assert!(received[1].0 - received[0].0 >= Duration::from_secs(1), "as Retry-After says");
        let expected = json!({
            "alert": "kms-unavailable", "status": "raised", "severity": "warning", "text": "sealed", "node": "n1",
            "since": "2024-02-29T12:34:56.007Z", "at": "2024-02-29T12:34:56.007Z",
        });
        assert_eq!((&bodies[0], &bodies[1]), (&expected, &expected));
        assert_eq!(
            (&bodies[2]["status"], &bodies[2]["at"]),
            (&json!("resolved"), &json!("2024-02-29T12:35:01.007Z"))
        );
    }

    #[tokio::test]
    async fn what_is_refused_for_good_is_given_up() {
        let (url, received) = receiver(&[404, 200]).await;
        let (alerts, metrics) = webhook(url);
        alerts.set(Alert::RotationOverdue, AT, Some("1 stream".into()));
        alerts.set(Alert::KeysRunningOut, AT, Some("1 stream".into()));
        until(|| posts(&metrics, "taken") == 1).await;
        assert_eq!((posts(&metrics, "refused"), received.lock().len()), (1, 2));
    }

    #[tokio::test]
    async fn no_more_notices_wait_than_may() {
        let (url, _) = receiver(&[503]).await;
        let (alerts, metrics) = webhook(url);
        for _ in 0..100 {
            alerts.set(Alert::KmsUnavailable, AT, Some("sealed".into()));
            alerts.set(Alert::KmsUnavailable, AT, None);
        }
        // The first one was not even begun with: nothing has awaited yet.
        until(|| posts(&metrics, "dropped") >= 200 - 64).await;
    }

    #[tokio::test]
    async fn an_error_does_not_show_the_url() {
        let (alerts, _) = webhook("http://127.0.0.1:1/secret-token".into());
        drop(alerts);
        let error = Client::new().get("http://127.0.0.1:1/secret-token").send().await.unwrap_err();
        let text = cause(error);
        assert!(!text.contains("secret-token") && !text.is_empty(), "{text}");
    }
}
