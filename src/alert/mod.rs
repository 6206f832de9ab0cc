//! Alerts: what an operator should be woken for, raised and resolved by name.
//!
//! Whoever finds something out says so again and again ([`Alerts::set`]); it is logged, counted and told to who listens
//! when it begins and when it ends. There are as many alerts as [`Alert`] has names, so nothing grows. Deliberately
//! absent: when something is bad enough (`engine`), and a memory beyond the process: what still holds after a restart is
//! raised and told anew.

mod webhook;

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::broadcast;

pub use webhook::{Webhook, WebhookError, WebhookUrl};

use crate::keys::Timestamp;
use crate::telemetry::Metrics;

/// Notices that may wait for who tells them on; the oldest are dropped for newer ones.
const NOTICES_KEPT: usize = 64;

/// What there is to be alerted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alert {
    /// The KMS does not answer, or refuses its key.
    KmsUnavailable,
    /// A stream has used up the keys that were made ahead, and none can be made.
    KeysRunningOut,
    /// A stream's newest key is much older than it should be.
    RotationOverdue,
    /// A CDN does not do what it is asked: keys, or a purge, wait for it.
    CdnDegraded,
}

impl Alert {
    pub const ALL: [Alert; 4] =
        [Alert::KmsUnavailable, Alert::KeysRunningOut, Alert::RotationOverdue, Alert::CdnDegraded];

    pub fn name(self) -> &'static str {
        match self {
            Alert::KmsUnavailable => "kms-unavailable",
            Alert::KeysRunningOut => "keys-running-out",
            Alert::RotationOverdue => "rotation-overdue",
            Alert::CdnDegraded => "cdn-degraded",
        }
    }

    /// `critical`: somebody should get up.
    pub fn severity(self) -> &'static str {
        match self {
            Alert::KmsUnavailable | Alert::RotationOverdue | Alert::CdnDegraded => "warning",
            Alert::KeysRunningOut => "critical",
        }
    }
}

/// An alert that began, or ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub alert: Alert,
    pub is_raised: bool,
    /// What is wrong, or was when it began.
    pub text: String,
    pub since: Timestamp,
    pub at: Timestamp,
}

/// The alerts that are active. Clones share everything.
#[derive(Clone)]
pub struct Alerts(Arc<Inner>);

struct Inner {
    active: Mutex<BTreeMap<Alert, (Timestamp, String)>>,
    notices: broadcast::Sender<Notice>,
    metrics: Metrics,
}

impl Alerts {
    pub fn new(metrics: Metrics) -> Self {
        for alert in Alert::ALL {
            metrics.alert_active.with_label_values(&[alert.name()]).set(0);
        }
        let notices = broadcast::channel(NOTICES_KEPT).0;
        Self(Arc::new(Inner { active: Mutex::default(), notices, metrics }))
    }

    /// Says why an alert holds now, or that it does not.
    pub fn set(&self, alert: Alert, now: Timestamp, why: Option<String>) {
        let mut active = self.0.active.lock();
        let notice = match (active.contains_key(&alert), why) {
            (false, Some(text)) => {
                tracing::error!(alert = alert.name(), text, "alert raised");
                active.insert(alert, (now, text.clone()));
                Notice { alert, is_raised: true, text, since: now, at: now }
            }
            (true, None) => {
                let Some((since, text)) = active.remove(&alert) else { return };
                tracing::info!(alert = alert.name(), "alert resolved");
                Notice { alert, is_raised: false, text, since, at: now }
            }
            _ => return,
        };
        self.0.metrics.alert_active.with_label_values(&[alert.name()]).set(i64::from(notice.is_raised));
        // Nobody may be listening.
        let _ = self.0.notices.send(notice);
    }

    /// The alerts that are active, with since when and why.
    pub fn active(&self) -> Vec<(Alert, Timestamp, String)> {
        let active = self.0.active.lock();
        active.iter().map(|(alert, (since, why))| (*alert, *since, why.clone())).collect()
    }

    /// Hears of every alert from now on.
    pub fn listen(&self) -> broadcast::Receiver<Notice> {
        self.0.notices.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_alert_is_documented_and_rules_ask_for_metrics_that_there_are() {
        let page = include_str!("../../docs/alerts.md");
        for alert in Alert::ALL {
            let row = format!("| `{}` | {} |", alert.name(), alert.severity());
            assert!(page.contains(&row), "{row}");
        }
        let metrics = Metrics::new();
        let _ = Alerts::new(metrics.clone());
        let (rules, there) = (include_str!("../../config/prometheus/keyshield.rules.yml"), metrics.render());
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let names = rules.split(|c| !is_name(c)).filter(|word| word.starts_with("keyshield_"));
        let missing: Vec<_> =
            names.clone().filter(|name| !there.contains(&format!("# TYPE {name} "))).collect();
        assert!(names.count() >= 5 && missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn an_alert_is_told_when_it_begins_and_when_it_ends_and_not_between() {
        let metrics = Metrics::new();
        let alerts = Alerts::new(metrics.clone());
        let mut heard = alerts.listen();
        let start = Timestamp::from_unix_millis(1_000);
        let at = |secs| start.plus(Duration::from_secs(secs));
        let active = || metrics.alert_active.with_label_values(&["kms-unavailable"]).get();
        alerts.set(Alert::KmsUnavailable, at(0), None);
        for secs in 1..4 {
            alerts.set(Alert::KmsUnavailable, at(secs), Some(format!("sealed for {secs} s")));
            assert_eq!(active(), 1);
        }
        assert_eq!(alerts.active(), [(Alert::KmsUnavailable, at(1), "sealed for 1 s".to_owned())]);
        alerts.set(Alert::KmsUnavailable, at(5), None);
        alerts.set(Alert::KmsUnavailable, at(6), None);
        assert_eq!((active(), alerts.active()), (0, vec![]));
        let notice = |is_raised, at| Notice {
            alert: Alert::KmsUnavailable,
            is_raised,
            text: "sealed for 1 s".into(),
            since: start.plus(Duration::from_secs(1)),
            at,
        };
        let told: Vec<_> = std::iter::from_fn(|| heard.try_recv().ok()).collect();
        assert_eq!(told, [notice(true, at(1)), notice(false, at(5))]);
    }
}
