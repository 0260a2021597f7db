//! Decides where progress is shown.

use std::io::{self, IsTerminal};

use crate::LaunchPlan;
use crate::logs::can_rewrite;

/// Whether progress is a line of the terminal that is rewritten in place. In that case all output
/// to the terminal has to go through the launcher.
pub(super) fn rewrites_progress(plan: &LaunchPlan) -> bool {
    let logs = &plan.logs;
    let passes = |local_rank: u32| {
        let is_shown = logs.console_ranks.as_ref().is_none_or(|ranks| ranks.contains(&local_rank));
        !is_shown || logs.redirects.of(local_rank).stdout || logs.tee.of(local_rank).stdout
    };
    let all_pass = || (0..plan.local_world_size()).all(passes);
    let is_apart = !io::stdout().is_terminal();
    !plan.progress_interval.is_zero() && can_rewrite() && (is_apart || launches_itself(plan) || all_pass())
}

/// Whether the program is one of this runtime that launches itself. Its output does not change when
/// it goes through the launcher; other programs buffer their output when they write to a pipe.
fn launches_itself(plan: &LaunchPlan) -> bool {
    std::env::current_exe().is_ok_and(|path| path == plan.program.path)
}
