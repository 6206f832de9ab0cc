//! What something costs: time on the wall, and of this process's CPU; and a table of it.
//!
//! The CPU is what to compare on a machine that others use too. A database server's is not in it.

use std::fmt;
use std::future::Future;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

#[derive(Debug, Clone, Copy)]
pub struct Cost {
    pub wall: Duration,
    pub cpu: Duration,
}

/// The CPU time that this process has had, of all its threads.
fn cpu() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().expect("it counts up from zero")
}

pub async fn measured<T>(work: impl Future<Output = T>) -> (T, Cost) {
    let (started, before) = (Instant::now(), cpu());
    let done = work.await;
    (done, Cost { wall: started.elapsed(), cpu: cpu() - before })
}

/// As [`measured`], without waiting.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Cost) {
    let (started, before) = (Instant::now(), cpu());
    let done = work();
    (done, Cost { wall: started.elapsed(), cpu: cpu() - before })
}

/// The medians of either time. `costs` is not empty.
pub fn median(costs: &mut [Cost]) -> Cost {
    let mut middle = |of: fn(&Cost) -> Duration| {
        costs.sort_by_key(of);
        of(&costs[costs.len() / 2])
    };
    Cost { wall: middle(|cost| cost.wall), cpu: middle(|cost| cost.cpu) }
}

/// One line for each case and size, cases together.
#[derive(Default)]
pub struct Table {
    rows: Vec<(&'static str, usize, Cost)>,
}

impl Table {
    pub fn add(&mut self, case: &'static str, streams: usize, cost: Cost) {
        eprintln!("{streams:>7} {case}: {:.1?}, CPU {:.1?}", cost.wall, cost.cpu);
        self.rows.push((case, streams, cost));
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = "| case | streams | wall, ms | CPU, ms | CPU a stream, µs | streams a second | wall ×10 | CPU ×10 |";
        writeln!(f, "{head}\n|---|--:|--:|--:|--:|--:|--:|--:|")?;
        let mut cases: Vec<&str> = Vec::new();
        for (case, ..) in &self.rows {
            if !cases.contains(case) {
                cases.push(case);
            }
        }
        for case in cases {
            let mut before: Option<Cost> = None;
            for (_, streams, cost) in self.rows.iter().filter(|(of, ..)| *of == case) {
                let millis = |time: Duration| time.as_secs_f64() * 1e3;
                let growth = |of: fn(&Cost) -> Duration| match &before {
                    Some(before) => format!("{:.1}", of(cost).as_secs_f64() / of(before).as_secs_f64()),
                    None => String::new(),
                };
                writeln!(
                    f,
                    "| {case} | {streams} | {:.2} | {:.2} | {:.2} | {:.0} | {} | {} |",
                    millis(cost.wall),
                    millis(cost.cpu),
                    millis(cost.cpu) * 1e3 / *streams as f64,
                    *streams as f64 / cost.wall.as_secs_f64(),
                    growth(|cost| cost.wall),
                    growth(|cost| cost.cpu),
                )?;
                before = Some(*cost);
            }
        }
        Ok(())
    }
}
