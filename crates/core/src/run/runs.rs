//! Several runs in one program, one after the other.
//!
//! Every process of a job runs the program from its beginning, so a rank that is started again comes to the first run while the others
//! are in a later one. The ranks agree on the run at the beginning of each round. A run is skipped if another rank is in a later one, or
//! if the checkpoint to resume from is of a later one: nobody gets to a run before all ranks have done the run before it.

use std::cell::Cell;
use std::rc::Rc;

use ice_worker::Worker;

use super::{End, Place};
use crate::ranks::gather;
use crate::{Error, HyperGraph, Result, Run, RunConfig, TaskItem};

/// The runs of a program, one after the other, as this rank does them.
///
/// A run that is done is skipped, by a rank that was started again and by a job that resumes. A job that is told to stop ends with the run
/// that is under way: those after it are not begun.
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
    /// The number of the next run, from 0.
    next: Cell<u64>,
    /// The number of the first run that is not known to be done.
    due: Cell<u64>,
    has_done_the_last: Cell<bool>,
    is_stopped: Cell<bool>,
}

impl Runs {
    /// No run is done yet.
    pub fn new(worker: Rc<Worker>) -> Self {
        let (next, due) = (Cell::default(), Cell::default());
        Self { worker, next, due, has_done_the_last: Cell::default(), is_stopped: Cell::default() }
    }

    /// The rank.
    pub fn worker(&self) -> &Rc<Worker> {
        &self.worker
    }

    /// Whether the job was told to stop, so that no further run is begun.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.get()
    }

    /// Does the next run, like [`Run::execute`], or skips it if it is done. Collective: all ranks do the same runs in the same order.
    ///
    /// # Errors
    /// The first failure, named by node and phase.
    pub fn execute(&self, graph: &HyperGraph, tasks: &dyn TaskItem, config: RunConfig) -> Result<()> {
        let number = self.next.replace(self.next.get() + 1);
        if self.is_stopped() || number < self.due.get() {
            return Ok(());
        }
        let place = Place { number, has_done_the_last: self.has_done_the_last.get() };
        let end = Run::perform(graph, tasks, Rc::clone(&self.worker), config, place)?;
        self.has_done_the_last.set(matches!(end, End::Done));
        match end {
            End::Done => {}
            End::Stopped => self.is_stopped.set(true),
            End::Skipped { due } => self.due.set(due),
        }
        Ok(())
    }

    /// Checks at the end of the program that it had the run that it was to resume.
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
    /// Waits until all ranks of the round are in this run; those that were started again skip the earlier ones. Returns the run to skip to if
    /// this rank is one of them. Collective.
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

    /// The nodes leave the round, but the rank does not.
    pub(super) fn leave_nodes(&self) {
        for entry in self.graph.entries() {
            entry.node.borrow_mut().leave_round();
        }
    }
}
