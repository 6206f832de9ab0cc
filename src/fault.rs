//! Places where a test kills the process: between any two writes.
//!
//! Built with the feature `faults`, and only then, a process ends at the point that `KEYSHIELD_FAULT` names
//! (`{point}#{how often it was passed before}`), as if by `kill -9`; with `KEYSHIELD_FAULT_LOG` it writes each
//! point that it passes to that file, which is how a test learns them all. Without the feature, [`point`] is
//! nothing, and an optimised build with it does not compile.

#[cfg(all(feature = "faults", not(debug_assertions)))]
compile_error!("the feature `faults` is for tests: an optimised build must not have it");

/// The variables that are read here: none, without the feature.
#[cfg(feature = "faults")]
pub const VARIABLES: &[&str] = &[armed::KILL_AT, armed::LOG];
#[cfg(not(feature = "faults"))]
pub const VARIABLES: &[&str] = &[];

/// A place where the process may be killed. `name` says what has just been done, or is about to be.
#[inline]
pub fn point(name: &'static str) {
    #[cfg(feature = "faults")]
    armed::point(name);
    #[cfg(not(feature = "faults"))]
    let _ = name;
}

#[cfg(feature = "faults")]
mod armed {
    use std::collections::HashMap;
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::LazyLock;

    use parking_lot::Mutex;

    pub(super) const KILL_AT: &str = "KEYSHIELD_FAULT";
    pub(super) const LOG: &str = "KEYSHIELD_FAULT_LOG";

    struct Plan {
        kill_at: Option<String>,
        log: Option<String>,
    }

    #[expect(clippy::disallowed_methods, reason = "a test's own switch, not a setting")]
    static PLAN: LazyLock<Plan> =
        LazyLock::new(|| Plan { kill_at: std::env::var(KILL_AT).ok(), log: std::env::var(LOG).ok() });
    static PASSED: LazyLock<Mutex<HashMap<&'static str, u32>>> = LazyLock::new(Mutex::default);

    pub(super) fn point(name: &'static str) {
        let mut passed = PASSED.lock();
        let times = passed.entry(name).or_default();
        let here = format!("{name}#{times}");
        *times += 1;
        if let Some(path) = &PLAN.log {
            let file = OpenOptions::new().create(true).append(true).open(path);
            // A test that cannot write its log sees an empty one.
            let _ = file.and_then(|mut file| writeln!(file, "{here}"));
        }
        if PLAN.kill_at.as_deref() == Some(here.as_str()) {
            std::process::abort();
        }
    }
}
