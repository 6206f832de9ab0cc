//! How `keyshield cdn check` shows what it found.

use std::fmt::Write;

use serde_json::{Value, json};

use super::check::{Outcome, Step};
use crate::cdn::DeliveryMode;

/// One CDN, and what came of its steps.
pub(super) struct Checked {
    pub name: String,
    pub kind: &'static str,
    pub mode: DeliveryMode,
    pub steps: Vec<Step>,
}

impl Checked {
    pub(super) fn is_ok(&self) -> bool {
        !self.steps.iter().any(Step::has_failed)
    }

    pub(super) fn was_stopped(&self) -> bool {
        self.steps.iter().any(|step| step.outcome == Outcome::Stopped)
    }
}

/// A line for each step, and one more for what to do.
pub(super) fn text(all: &[Checked]) -> String {
    let mut out = String::new();
    for checked in all {
        // Writing to memory does not fail.
        let _ = writeln!(out, "{} ({}, {})", checked.name, checked.kind, checked.mode.name());
        for Step { name, outcome } in &checked.steps {
            let _ = match outcome {
                Outcome::Ok(what) => writeln!(out, "  ok       {name:12} {what}"),
                Outcome::Failed { why, cure } => {
                    writeln!(out, "  FAILED   {name:12} {why}\n{:24}→ {cure}", "")
                }
                Outcome::Skipped(why) => writeln!(out, "  skipped  {name:12} {why}"),
                Outcome::Stopped => writeln!(out, "  stopped  {name}"),
            };
        }
    }
    out
}

pub(super) fn json(all: &[Checked]) -> Value {
    let steps = |checked: &Checked| -> Vec<Value> {
        let step = |Step { name, outcome }: &Step| match outcome {
            Outcome::Ok(what) => json!({ "step": name, "outcome": "ok", "detail": what }),
            Outcome::Failed { why, cure } => {
                json!({ "step": name, "outcome": "failed", "detail": why, "cure": cure })
            }
            Outcome::Skipped(why) => json!({ "step": name, "outcome": "skipped", "detail": why }),
            Outcome::Stopped => json!({ "step": name, "outcome": "stopped" }),
        };
        checked.steps.iter().map(step).collect()
    };
    let cdns = all.iter().map(|checked| {
        let (name, kind, mode) = (&checked.name, checked.kind, checked.mode.name());
        json!({ "name": name, "kind": kind, "mode": mode, "ok": checked.is_ok(), "steps": steps(checked) })
    });
    json!({ "ok": all.iter().all(Checked::is_ok), "cdns": cdns.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_shown_with_what_to_do() {
        let steps = vec![
            Step { name: "health", outcome: Outcome::Ok("it answers".into()) },
            Step::failed("route", "no answer", "look there"),
            Step { name: "gone", outcome: Outcome::Skipped("for that".into()) },
        ];
        let all = [Checked { name: "a".into(), kind: "custom", mode: DeliveryMode::Push, steps }];
        let expected = "a (custom, push)\n  ok       health       it answers\n  FAILED   route        no answer\n\
                        \u{20}                       → look there\n  skipped  gone         for that\n";
        assert_eq!(text(&all), expected);
        let shown = json(&all);
        assert_eq!((&shown["ok"], &shown["cdns"][0]["ok"]), (&json!(false), &json!(false)));
        assert_eq!(shown["cdns"][0]["steps"][1]["cure"], "look there");
    }
}
