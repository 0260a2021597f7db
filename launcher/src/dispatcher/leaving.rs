//! A line at the start of the job, and lines at its end.

use std::io::{self, IsTerminal};
use std::time::Duration;

use ice_proto::exit::ExitCode;

use super::Dispatcher;
use crate::LaunchPlan;
use crate::report::Outline;

impl Dispatcher<'_> {
    /// Prints what was started: once, when the first ranks of this node run.
    pub(super) fn introduce(&mut self) {
        if std::mem::replace(&mut self.is_introduced, true) || !self.outlines() {
            return;
        }
        let Some((nodes, world_size)) = self.group.size() else { return };
        let outline = Outline {
            run_id: &self.plan.run_id,
            ranks: world_size,
            nodes,
            interpreter: self.plan.program.unusual_interpreter(),
            logs: self.group.log_folder().filter(|_| self.plan.logs.are_wanted()),
        };
        self.console.note(&outline.to_string());
    }

    /// Whether the lines at the start and at the end are printed. A job with default options whose
    /// stderr goes to a file or a program stays silent, like under torchrun. Of several nodes, only
    /// node 0 prints them.
    fn outlines(&self) -> bool {
        let is_first = self.group.place() == Some(0);
        io::stderr().is_terminal() || (is_first && asks_for_more(self.plan))
    }

    /// Prints how the job went, and finishes the report.
    pub(super) fn leave(&mut self, code: ExitCode) {
        self.end_round("this node leaves");
        let now = self.clock.now();
        if let Some(summary) = self.rounds.summary(now) {
            self.console.note(&summary);
        }
        self.group.finish(code, &self.rounds, now);
        if self.is_introduced && self.outlines() {
            let (run_id, restarts) = (&self.plan.run_id, self.group.restarts());
            self.console.note(&ending(run_id, self.group.outcome(), code, now, restarts));
        }
        // The next action of the user comes last.
        if let ExitCode::Requeue(number) = code {
            let from = match &self.saved {
                Some((path, step)) => format!(", and it can resume after step {step} from {path}"),
                None => String::new(),
            };
            self.console.note(&format!("preempted: start the job again (exit code {number}){from}"));
        } else if code != ExitCode::Success
            && let Some((path, step)) = &self.saved
        {
            self.console.note(&format!("the newest checkpoint, after step {step}, is {path}"));
        }
    }
}

fn asks_for_more(plan: &LaunchPlan) -> bool {
    plan.logs.are_wanted() || plan.nnodes.1 > 1
}

/// Returns the line with a job's outcome, duration and number of restarts.
fn ending(run_id: &str, outcome: &str, code: ExitCode, took: Duration, restarts: u32) -> String {
    let code = match code {
        ExitCode::Success => String::new(),
        code => format!(" (exit code {})", code.code()),
    };
    let restarts = match restarts {
        0 => "no restarts".into(),
        1 => "1 restart".into(),
        n => format!("{n} restarts"),
    };
    format!("run {run_id} {outcome}{code} after {}, {restarts}", duration(took))
}

/// Formats a duration for people.
fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    match (hours, minutes) {
        (0, 0) => format!("{:.1} s", time.as_secs_f64()),
        (0, _) => format!("{minutes} min {} s", seconds % 60),
        _ => format!("{hours} h {minutes} min"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_names_outcome_duration_and_restarts() {
        let second = Duration::from_millis(1500);
        let line = ending("digits", "succeeded", ExitCode::Success, second, 0);
        assert_eq!(line, "run digits succeeded after 1.5 s, no restarts");
        let line = ending("none", "failed", ExitCode::Rank(3), Duration::from_secs(63), 1);
        assert_eq!(line, "run none failed (exit code 3) after 1 min 3 s, 1 restart");
        assert_eq!(duration(Duration::from_secs(90_061)), "25 h 1 min");
    }
}
