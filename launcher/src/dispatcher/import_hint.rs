//! A hint for jobs whose ranks import PyTorch again at each restart.

use std::fs::File;
use std::io::{BufRead, BufReader};

use crate::LaunchPlan;
use crate::warm::is_python;

/// Library that a process has mapped once it has imported PyTorch.
const LIBRARY: &str = "/libtorch_python.so";

pub(super) struct ImportHint {
    /// Whether the program could be started with `--preload`, and the hint was not given yet.
    is_open: bool,
    imports_torch: bool,
}

impl ImportHint {
    pub(super) fn new(plan: &LaunchPlan) -> Self {
        let is_open = plan.preload.is_empty() && is_python(&plan.program);
        Self { is_open, imports_torch: false }
    }

    /// Notes whether the ranks have imported PyTorch, after another one has failed.
    pub(super) fn look(&mut self, ranks: impl Iterator<Item = u32>) {
        if self.is_open && !self.imports_torch {
            // One may be the rank that has failed, whose memory is gone.
            self.imports_torch = ranks.take(2).any(has_imported_torch);
        }
    }

    /// Returns the hint when ranks are started again, once.
    pub(super) fn line(&mut self) -> Option<&'static str> {
        let is_due = self.is_open && self.imports_torch;
        self.is_open &= !is_due;
        is_due.then_some(
            "hint: the ranks import PyTorch at each restart: --preload torch forks them from a process that \
             has imported it",
        )
    }
}

fn has_imported_torch(pid: u32) -> bool {
    let Ok(maps) = File::open(format!("/proc/{pid}/maps")) else { return false };
    BufReader::new(maps).lines().map_while(Result::ok).any(|line| line.ends_with(LIBRARY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hint_is_given_once() {
        let mut hint = ImportHint { is_open: true, imports_torch: true };
        assert!(hint.line().is_some());
        assert_eq!(hint.line(), None);
        let mut hint = ImportHint { is_open: true, imports_torch: false };
        hint.look([std::process::id()].into_iter());
        assert_eq!(hint.line(), None, "this process has not imported it");
    }
}
