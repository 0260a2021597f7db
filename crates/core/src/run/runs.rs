//! Several runs in one program, one after the other.
//!
//! Every process of a job runs the program from its start. A restarted rank therefore starts the
//! first run while the other ranks are in a later one. The ranks agree on the run at the start of
//! each round. A rank skips a run if another rank is in a later one, or if the checkpoint to resume
//! from belongs to a later one: a rank starts a run only after all ranks have completed the
//! previous run.

use std::cell::Cell;
use std::rc::Rc;

use ice_worker::Worker;

use super::{End, RunPosition};
use crate::collectives::gather;
use crate::{Error, HyperGraph, Result, Run, RunConfig, TaskItem};

/// The runs of a program, one after the other, as executed by this rank.
///
/// A restarted rank, and a job that resumes, skip completed runs. A job that is asked to stop ends
/// with the current run and starts no further run.
///
/// ```no_run
/// # use std::rc::Rc;
/// # fn graph() -> ice_core::HyperGraph { ice_core::HyperGraph::new() }
/// use ice_core::{Repeat, RunConfig, Runs, Task, Worker};
/// let runs = Runs::new(Rc::new(Worker::start()?));
/// runs.execute(&graph(), &Repeat::once().then(Task::train("pretrain")), RunConfig::default())?;
/// runs.execute(&graph(), &Repeat::once().then(Task::train("tune")), RunConfig::default())?;
/// runs.finish()?;
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct Runs {
    worker: Rc<Worker>,
    /// Number of the next run, from 0.
    next: Cell<u64>,
    /// Number of the first run that is not known to be completed.
    due: Cell<u64>,
    has_done_the_last: Cell<bool>,
    is_stopped: Cell<bool>,
    has_begun: Cell<bool>,
}

impl Runs {
    /// Creates the list of runs, with none completed.
    pub fn new(worker: Rc<Worker>) -> Self {
        let (next, due) = (Cell::default(), Cell::default());
        let (has_done_the_last, is_stopped) = (Cell::default(), Cell::default());
        Self { worker, next, due, has_done_the_last, is_stopped, has_begun: Cell::default() }
    }

    /// Returns the rank that executes the runs.
    pub fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// Whether the job was asked to stop, so that no further run starts.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.get()
    }

    /// Whether this rank has completed a step of training or of evaluation, or has adopted the state
    /// of ranks that have. A later error is then not one of the command line alone.
    pub fn has_begun(&self) -> bool {
        self.has_begun.get()
    }

    /// Executes the next run, like [`Run::execute`], or skips it if it is completed. Collective:
    /// all ranks execute the same runs in the same order.
    ///
    /// # Errors
    /// The first failure, named by node and phase.
    pub fn execute(&self, graph: &HyperGraph, tasks: &dyn TaskItem, config: RunConfig) -> Result<()> {
        let number = self.next.replace(self.next.get() + 1);
        if self.is_stopped() || number < self.due.get() {
            return Ok(());
        }
        let place = RunPosition { number, has_done_the_last: self.has_done_the_last.get() };
        let end = Run::perform(graph, tasks, Rc::clone(&self.worker), config, place, &self.has_begun)?;
        self.has_done_the_last.set(matches!(end, End::Done));
        match end {
            End::Done => {}
            End::Stopped => self.is_stopped.set(true),
            End::Skipped { due } => self.due.set(due),
        }
        Ok(())
    }

    /// Checks, at the end of the program, that the program contained the run to resume.
    ///
    /// # Errors
    /// [`Error::Resume`] if the program has fewer runs.
    pub fn finish(&self) -> Result<()> {
        let (runs, due) = (self.next.get(), self.due.get());
        if due < runs || due == 0 || self.is_stopped() {
            return Ok(());
        }
        Err(Error::Resume(format!(
            "the checkpoint is of run {} of a program, and this program has {runs}: resume with the program that saved it, \
             or load the checkpoint with LoadCheckpoint",
            due + 1
        )))
    }
}

impl Run<'_> {
    /// Waits until all ranks of the round are in this run: restarted ranks skip earlier runs.
    /// Returns the run to skip to if this rank is behind. Collective.
    pub(super) fn meet_in_run(&self) -> Result<Option<u64>> {
        let own = self.place.number;
        loop {
            let numbers = gather(&[own as i64], &self.worker)?.concat();
            let due = numbers.iter().map(|number| *number as u64).max().unwrap_or(own);
            if due > own {
                tracing::debug!(own, due, "the other ranks are in a later run");
                return Ok(Some(due));
            }
            if numbers.iter().all(|number| *number as u64 == own) {
                return Ok(None);
            }
        }
    }

    /// Lets the nodes leave the round. The rank itself stays in it.
    pub(super) fn leave_nodes(&self) {
        for entry in self.graph.entries() {
            entry.node.borrow_mut().leave_round();
        }
    }
}
