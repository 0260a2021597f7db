//! Leaving tasks, and ending the run, on all ranks at the same place.
//!
//! There are three ways, by the place that asks for it:
//!
//! - After a closure of the task list, all ranks vote by one gather.
//! - Between steps there is no common collective, since ranks exchange nothing in an evaluation. A
//!   rank publishes its wish over the store, and all ranks agree on a step boundary.
//! - A node or an item of the task list that leaves by an error must do so on all ranks. The ranks
//!   verify that over the store, and then vote on how much they leave.

use std::cell::Cell;

use ice_worker::Boundary;

use super::Run;
use crate::collectives::gather;
use crate::graph::Entries;
use crate::{Error, Result};

/// Position of the run's number within the number of a task: the lower bits count the progress.
const RUN_BITS: u32 = 40;

/// How much of the program the ranks leave before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Leave {
    #[default]
    Nothing,
    /// The current task, or the repetition that contains the closure.
    Task,
    Run,
}

impl Leave {
    /// Returns the part that an error of a node or a closure leaves.
    pub(crate) fn of(error: &Error) -> Self {
        match error.root() {
            Error::StopTask => Self::Task,
            Error::StopAllTasks => Self::Run,
            _ => Self::Nothing,
        }
    }
}

/// The wishes and agreements of a run to leave.
#[derive(Default)]
pub(super) struct Leaving {
    /// The most that this rank asks to leave, until the ranks agree on it.
    asked: Cell<Leave>,
    /// Whether this rank has published its wish in this round.
    is_published: Cell<bool>,
    /// Number of the current task, the same on all ranks: the number of the run above [`RUN_BITS`],
    /// and below it the progress counter at the task's start in this round.
    task: Cell<u64>,
    /// Whether the ranks have agreed to end the run early.
    is_over: Cell<bool>,
    /// Whether the ranks have agreed that the current item of the task list leaves.
    is_agreed: Cell<bool>,
}

impl Run<'_> {
    /// Leaves the [`Repeat`](crate::Repeat) that contains the closure, once the closure returns. If
    /// one rank asks for it, all ranks leave. Outside of a closure, the ranks leave the next task
    /// at the start of a step.
    ///
    /// Nodes call [`Outputs::stop_task`](crate::Outputs::stop_task) instead.
    pub fn stop_task(&self) {
        self.ask_to_leave(Leave::Task);
    }

    /// Ends the run successfully, once the closure returns. If one rank asks for it, all ranks end.
    ///
    /// Nodes call [`Outputs::stop_all_tasks`](crate::Outputs::stop_all_tasks) instead.
    pub fn stop_all_tasks(&self) {
        self.ask_to_leave(Leave::Run);
    }

    pub(crate) fn ask_to_leave(&self, what: Leave) {
        self.leaving.asked.set(self.leaving.asked.get().max(what));
    }

    /// Agrees on the most that any rank asks to leave, after a closure that all ranks have run.
    /// Collective.
    pub(crate) fn vote(&self) -> Result<Leave> {
        let own = self.leaving.asked.get();
        let votes = gather(&[own as i64], &self.worker)?.concat();
        let most = votes.iter().copied().max().unwrap_or(0);
        let others: Vec<_> = (0..).zip(&votes).filter(|(_, vote)| **vote < most).collect();
        if self.is_main() && !others.is_empty() {
            let ranks: Vec<_> = others.iter().map(|(rank, _): &(usize, _)| rank.to_string()).collect();
            tracing::warn!(
                "all ranks leave the {}, though rank {} did not ask for it: state that decides belongs into Repeat::call_with, \
                 which hands it over to ranks that were started again",
                if most == Leave::Run as i64 { "run" } else { "repetition" },
                ranks.join(", ")
            );
        }
        self.leaving.asked.set(Leave::Nothing);
        Ok([Leave::Nothing, Leave::Task, Leave::Run]
            .into_iter()
            .find(|leave| *leave as i64 == most)
            .unwrap_or_default())
    }

    /// Notes that an item of the task list begins.
    pub(crate) fn item_begins(&self) {
        self.leaving.is_agreed.set(false);
    }

    /// Notes that the ranks have agreed to leave the current item of the task list.
    pub(crate) fn item_is_left(&self) {
        self.leaving.is_agreed.set(true);
    }

    /// Handles an item of the task list that has left by an error, and returns what all ranks
    /// leave. Verifies first that all ranks have left the item, unless they have agreed to.
    /// Collective.
    pub(crate) fn leave_item(&self, asked: Leave) -> Result<Leave> {
        if self.is_over_early() || self.leaving.is_agreed.get() {
            return Ok(asked);
        }
        self.leave_together(asked, |rank, other| {
            format!(
                "rank {rank} has left an item of the task list by Error::StopTask or Error::StopAllTasks, and rank {other} has not: \
                 all ranks return it, or the item is a closure, after which they vote"
            )
        })
    }

    /// Verifies that all ranks have left the same place by an error, and agrees on the most that
    /// any of them leaves. Collective.
    fn leave_together(&self, asked: Leave, message: impl Fn(usize, u64) -> String) -> Result<Leave> {
        if let Some(other) = self.worker.leave_step()? {
            return Err(Error::Graph(message(self.worker.rank(), other)));
        }
        self.ask_to_leave(asked);
        self.vote()
    }

    /// Notes that a task begins, or continues in a new round.
    pub(crate) fn task_begins(&self) {
        self.leaving.task.set((self.place.number << RUN_BITS) | self.progress.position.get());
    }

    /// Handles a step boundary: obeys requests that all ranks have agreed on, and waits while the
    /// job is paused. Returns what all ranks leave there. `asked` is what a node of this rank asks
    /// to leave.
    pub(crate) fn at_boundary(&self, asked: Leave) -> Result<Leave> {
        loop {
            let asked = asked.max(self.leaving.asked.get());
            if asked > Leave::Nothing && self.publish(asked)? {
                return Ok(asked);
            }
            match self.worker.link().boundary(asked > Leave::Nothing) {
                Boundary::Continue => return Ok(Leave::Nothing),
                Boundary::Leave { all, task } => {
                    self.leaving.is_published.set(false);
                    // A request from an earlier task, or from an earlier run, is void.
                    let own = self.leaving.task.get();
                    if task == own || (all && task >> RUN_BITS == own >> RUN_BITS) {
                        return Ok(if all { Leave::Run } else { Leave::Task });
                    }
                }
                other => self.obey(other)?,
            }
        }
    }

    /// Publishes to the other ranks, once, what this rank asks to leave. Returns whether this rank
    /// is the only one and may leave at once.
    fn publish(&self, asked: Leave) -> Result<bool> {
        if self.worker.world_size() == 1 {
            return Ok(true);
        }
        if !self.leaving.is_published.replace(true) {
            self.worker.ask_to_leave(asked == Leave::Run, self.leaving.task.get())?;
        }
        Ok(false)
    }

    /// Handles a node that has left a step by an error: undoes the step, and returns what all ranks
    /// leave. Verifies first that all ranks have left the step. Collective.
    pub(crate) fn leave_step_by_error(&self, task: &crate::Tags, asked: Leave) -> Result<Leave> {
        let agreed = self.leave_together(asked, |rank, other| {
            format!(
                "rank {rank} has left the task `{task}` within a step, by Error::StopTask or Error::StopAllTasks, and rank {other} has not: \
                 use Outputs::stop_task or Outputs::stop_all_tasks, which all ranks follow once the step is done"
            )
        })?;
        self.leave_step();
        Ok(agreed)
    }

    /// Notes that all ranks leave the task with these nodes. Unfinished measurements of an
    /// evaluation do not count.
    pub(crate) fn task_was_left(&self, entries: &Entries, train: bool) {
        if !train {
            super::regroup::roll_back(entries);
        }
        self.unmark();
        if self.leaving.asked.get() == Leave::Task {
            self.leaving.asked.set(Leave::Nothing);
        }
        self.passed();
    }

    /// Notes that all ranks end the run early.
    pub(crate) fn end_early(&self) {
        self.leaving.is_over.set(true);
    }

    /// Whether all ranks have ended the run early.
    pub(super) fn is_over_early(&self) -> bool {
        self.leaving.is_over.get()
    }

    /// Drops this rank's wishes when it adopts the state of a rank that is further: that rank has
    /// acted on the wishes of all ranks.
    pub(super) fn forget_wishes(&self) {
        self.leaving.asked.set(Leave::Nothing);
    }

    /// Resets the agreements at the start of a round. `is_over` says whether the ranks had already
    /// agreed to end the run.
    pub(super) fn leaving_in_round(&self, is_over: bool) {
        self.leaving.is_over.set(is_over);
        self.leaving.is_published.set(false);
        self.leaving.is_agreed.set(false);
    }
}
