//! Leaving tasks, and ending the run, on all ranks at the same place.
//!
//! A closure of the task list is a place that all ranks come to: they vote after it, by one gather. Steps have no such place, since nothing
//! is exchanged in an evaluation: there a rank publishes its wish over the store, and all ranks agree on a boundary between steps. A node or
//! an item of the task list that leaves by an error does so on all ranks, which is made sure over the store; a vote then decides how much
//! they leave.

use std::cell::Cell;

use ice_worker::Boundary;

use super::Run;
use crate::graph::Entries;
use crate::ranks::gather;
use crate::{Error, Result};

/// Where the number of the run begins in that of a task.
const RUN_BITS: u32 = 40;

/// How much is left before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) enum Leave {
    #[default]
    Nothing,
    /// The task, or the repetition that a closure is in.
    Task,
    Run,
}

impl Leave {
    /// The part that an error of a node or a closure leaves.
    pub(crate) fn of(error: &Error) -> Self {
        match error.root() {
            Error::StopTask => Self::Task,
            Error::StopAllTasks => Self::Run,
            _ => Self::Nothing,
        }
    }
}

/// The run's wishes and agreements to leave.
#[derive(Default)]
pub(super) struct Leaving {
    /// The most that this rank asks to leave, as long as the ranks have not agreed on it.
    asked: Cell<Leave>,
    /// Whether the other ranks of the round were told of a wish of this rank.
    is_published: Cell<bool>,
    /// Number of the task that is running, the same on all ranks: the number of the run, and in the lower bits the progress counter when the
    /// task began in this round.
    task: Cell<u64>,
    /// Whether the ranks have agreed on the end of the run.
    is_over: Cell<bool>,
    /// Whether the ranks have agreed to leave by the item of the task list that is running.
    is_agreed: Cell<bool>,
}

impl Run<'_> {
    /// Leaves the [`Repeat`](crate::Repeat) that the closure is in, once the closure returns. It is enough that one rank asks for it: all ranks
    /// leave. Outside of a closure, the task that runs next is left at the beginning of a step.
    ///
    /// Nodes have [`Outputs::stop_task`](crate::Outputs::stop_task).
    pub fn stop_task(&self) {
        self.ask_to_leave(Leave::Task);
    }

    /// Ends the run, which counts as well done, once the closure returns. It is enough that one rank asks for it: all ranks end.
    ///
    /// Nodes have [`Outputs::stop_all_tasks`](crate::Outputs::stop_all_tasks).
    pub fn stop_all_tasks(&self) {
        self.ask_to_leave(Leave::Run);
    }

    pub(crate) fn ask_to_leave(&self, what: Leave) {
        self.leaving.asked.set(self.leaving.asked.get().max(what));
    }

    /// Agrees on the part that the ranks leave after a closure that all of them have run: the most that any of them asks for. Collective.
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

    /// An item of the task list begins.
    pub(crate) fn item_begins(&self) {
        self.leaving.is_agreed.set(false);
    }

    /// The ranks have agreed to leave by the item that is running.
    pub(crate) fn item_is_left(&self) {
        self.leaving.is_agreed.set(true);
    }

    /// An item of the task list has left by an error: returns what all ranks leave. Makes sure first that all ranks have left the item,
    /// unless they have agreed on that. Collective.
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

    /// Makes sure that all ranks have left the same place by an error, and agrees on the most that any of them leaves. Collective.
    fn leave_together(&self, asked: Leave, message: impl Fn(usize, u64) -> String) -> Result<Leave> {
        if let Some(other) = self.worker.leave_step()? {
            return Err(Error::Graph(message(self.worker.rank(), other)));
        }
        self.ask_to_leave(asked);
        self.vote()
    }

    /// A task begins, or is continued in this round.
    pub(crate) fn task_begins(&self) {
        self.leaving.task.set((self.place.number << RUN_BITS) | self.progress.position.get());
    }

    /// At a step boundary: does what all ranks were asked for, and waits while the job is paused. Returns what all ranks leave there;
    /// `asked` is what a node of this rank wants to leave.
    pub(crate) fn at_boundary(&self, asked: Leave) -> Result<Leave> {
        loop {
            let asked = asked.max(self.leaving.asked.get());
            if asked > Leave::Nothing && self.publish(asked)? {
                return Ok(asked);
            }
            match self.worker.link().boundary(asked > Leave::Nothing) {
                Boundary::GoOn => return Ok(Leave::Nothing),
                Boundary::Leave { all, task } => {
                    self.leaving.is_published.set(false);
                    // A request that was made in an earlier task, or in an earlier run, is void.
                    let own = self.leaving.task.get();
                    if task == own || (all && task >> RUN_BITS == own >> RUN_BITS) {
                        return Ok(if all { Leave::Run } else { Leave::Task });
                    }
                }
                other => self.obey(other)?,
            }
        }
    }

    /// Tells the other ranks once what this rank wants to leave. Whether there are none.
    fn publish(&self, asked: Leave) -> Result<bool> {
        if self.worker.world_size() == 1 {
            return Ok(true);
        }
        if !self.leaving.is_published.replace(true) {
            self.worker.ask_to_leave(asked == Leave::Run, self.leaving.task.get())?;
        }
        Ok(false)
    }

    /// A node has left a step by an error: returns what all ranks leave, and undoes what was done of the step. Makes sure first that all ranks
    /// have left the step. Collective.
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

    /// All ranks leave the task with these nodes. What was not measured to its end does not count.
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

    /// All ranks end the run before its end.
    pub(crate) fn end_early(&self) {
        self.leaving.is_over.set(true);
    }

    /// Whether all ranks have ended the run before its end.
    pub(super) fn is_over_early(&self) -> bool {
        self.leaving.is_over.get()
    }

    /// This rank takes over the state of one that has come further, and that has acted on the wishes of all.
    pub(super) fn forget_wishes(&self) {
        self.leaving.asked.set(Leave::Nothing);
    }

    /// A round begins in which the run is over, or is not.
    pub(super) fn leaving_in_round(&self, is_over: bool) {
        self.leaving.is_over.set(is_over);
        self.leaving.is_published.set(false);
        self.leaving.is_agreed.set(false);
    }
}
