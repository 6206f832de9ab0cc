//! What is wrong now, in words, and from when on somebody should be woken for it.
//!
//! Each is noted where it is found out. Deliberately absent: the log, to which those write who find something out.

use std::time::Duration;

use parking_lot::Mutex;

use super::{EngineStatus, Shared};
use crate::alert::Alert;
use crate::keys::Timestamp;
use crate::kms::KmsError;

/// A KMS that is away for less is nobody's trouble.
const KMS_ALERT_AFTER: Duration = Duration::from_secs(30);

/// What is known of what is wrong.
#[derive(Default)]
pub(super) struct Troubles {
    kms: Mutex<Option<(Timestamp, String)>>,
    supply: Mutex<Supply>,
    /// CDNs that do not do what they are asked, each in a sentence.
    cdns: Mutex<Vec<String>>,
}

/// How many keys streams have that are made ahead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Supply {
    /// Of the stream that has the fewest; `None` without streams.
    pub(super) least: Option<usize>,
    /// Streams that have none, and for which none can be made.
    pub(super) used_up: usize,
    /// Streams that could not be taken in.
    pub(super) put_off: usize,
}

impl Troubles {
    /// Notes what a call said about the KMS: why it is away, or that it is not.
    pub(super) fn note_kms(&self, now: Timestamp, error: Option<&KmsError>) {
        let mut kms = self.kms.lock();
        *kms = error.map(|error| (kms.as_ref().map_or(now, |(since, _)| *since), error.to_string()));
    }

    pub(super) fn note_supply(&self, supply: Supply) {
        *self.supply.lock() = supply;
    }

    pub(super) fn note_cdns(&self, degraded: Vec<String>) {
        *self.cdns.lock() = degraded;
    }

    /// Why the KMS is away, if it is.
    pub(super) fn kms(&self) -> Option<String> {
        self.kms.lock().as_ref().map(|(_, why)| why.clone())
    }

    /// Since when the KMS is away, if it is, and why.
    pub(super) fn kms_away(&self) -> Option<(Timestamp, String)> {
        self.kms.lock().clone()
    }

    /// Everything that an operator should know of, the weightiest first.
    pub(super) fn in_words(&self, status: &EngineStatus) -> Vec<String> {
        let supply = *self.supply.lock();
        let mut all = Vec::new();
        match self.kms() {
            Some(why) => all.push(supply.without_kms(&why, status)),
            None if !status.ready => all.push("keys are being loaded".to_owned()),
            None => {}
        }
        if status.ready && !status.store_up {
            all.push("the store does not answer: known streams go on, and nothing can be changed".to_owned());
        }
        all.extend(supply.in_words());
        if status.ready && status.store_up && !status.rotating {
            all.push("due rotations are not carried out: the log says why".to_owned());
        }
        all.extend(overdue_in_words(status));
        all.extend(self.cdns.lock().iter().cloned());
        if supply.put_off > 0 {
            all.push(format!(
                "streams whose last change could not be taken in: {}; the log says why",
                supply.put_off
            ));
        }
        all
    }
}

impl Shared {
    /// Raises and resolves alerts by what is known now.
    pub(super) fn judge(&self) {
        let now = self.clock.now();
        let (status, supply) = (*self.status.read(), *self.troubles.supply.lock());
        let away = self.troubles.kms_away();
        let away = away.filter(|(since, _)| now.since(*since) >= KMS_ALERT_AFTER);
        let away = away.map(|(_, why)| supply.without_kms(&why, &status));
        self.alerts.set(Alert::KmsUnavailable, now, away);
        self.alerts.set(Alert::KeysRunningOut, now, supply.in_words());
        let cdns = self.troubles.cdns.lock().join("; ");
        self.alerts.set(Alert::CdnDegraded, now, Some(cdns).filter(|cdns| !cdns.is_empty()));
        self.alerts.set(Alert::RotationOverdue, now, overdue_in_words(&status));
    }
}

impl Supply {
    /// What it means that the KMS is away.
    fn without_kms(&self, why: &str, status: &EngineStatus) -> String {
        match (status.ready, self.least) {
            (false, _) => format!("{why}: this node waits for it, because keys cannot be loaded without it"),
            (true, None) => format!("{why}: no stream can begin"),
            (true, Some(least)) => {
                format!("{why}: streams go on, each with {least} keys made ahead at least")
            }
        }
    }

    fn in_words(&self) -> Option<String> {
        let count = Some(self.used_up).filter(|count| *count > 0)?;
        Some(format!(
            "streams without a key made ahead, and none can be made: {count}; their last key stays in use"
        ))
    }
}

fn overdue_in_words(status: &EngineStatus) -> Option<String> {
    let count = Some(status.overdue_rotations).filter(|count| *count > 0)?;
    Some(format!("streams whose newest key is an hour older than its interval: {count}"))
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::kms::Cause;

    const WELL: EngineStatus = EngineStatus {
        ready: true,
        rotating: true,
        store_up: true,
        kms_up: true,
        cdn_sync: None,
        streams: 2,
        overdue_rotations: 0,
    };

    #[test]
    fn who_looks_learns_why_and_what_it_means() {
        let troubles = Troubles::default();
        assert_eq!(troubles.in_words(&WELL), [""; 0]);
        let now = Timestamp::from_unix_millis(1_000);
        let later = now.plus(Duration::from_secs(7));
        let error = KmsError {
            provider: "vault",
            key: "transit/keyshield".into(),
            cause: Cause::Unavailable("sealed".into()),
        };
        troubles.note_kms(now, Some(&error));
        troubles.note_kms(later, Some(&error));
        assert_eq!(troubles.kms_away().unwrap().0, now, "since the first time");
        troubles.note_supply(Supply { least: Some(3), ..Supply::default() });
        let away = EngineStatus { kms_up: false, ..WELL };
        let expected =
            "KMS vault, key transit/keyshield: sealed: streams go on, each with 3 keys made ahead at least";
        assert_eq!(troubles.in_words(&away), [expected]);
        let waiting = troubles.in_words(&EngineStatus { ready: false, rotating: false, ..away });
        assert!(waiting.len() == 1 && waiting[0].contains("sealed: this node waits"), "{waiting:?}");

        troubles.note_supply(Supply { least: Some(0), used_up: 4, put_off: 1 });
        let all = troubles.in_words(&EngineStatus { store_up: false, overdue_rotations: 5, ..away });
        assert_eq!(all.len(), 5, "{all:?}");
        assert!(all[2].contains(": 4;") && all[3].ends_with(": 5") && all[4].contains(": 1;"), "{all:?}");
        troubles.note_kms(later, None);
        assert_eq!((troubles.kms(), troubles.kms_away()), (None, None));
    }
}
