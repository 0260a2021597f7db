use std::cell::Cell;
use std::rc::Rc;

/// Progress of a run before the next step, as input of schedules.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Elapsed {
    /// Number of steps that the optimizer has applied.
    pub(crate) steps: f64,
    /// Number of completed training epochs.
    pub(crate) epochs: u64,
    /// Completed part and length of the run's training, both in epochs or both in steps. Both are 0
    /// if the length is not known.
    pub(crate) done: f64,
    pub(crate) total: f64,
}

/// The clock of a run, which its optimizers read.
#[derive(Debug, Clone, Default)]
pub struct RunClock(Rc<Cell<Elapsed>>);

impl RunClock {
    pub(crate) fn read(&self) -> Elapsed {
        self.0.get()
    }

    pub(crate) fn set(&self, elapsed: Elapsed) {
        self.0.set(elapsed);
    }
}
