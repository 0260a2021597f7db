use std::cell::Cell;
use std::rc::Rc;

/// How far a run is before the step that is about to be done, as schedules see it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Elapsed {
    /// Steps that the optimizer has applied.
    pub(crate) steps: f64,
    /// Training epochs that are done.
    pub(crate) epochs: u64,
    /// How much of the run's training is done, and how much there is: in epochs, or in steps. Both are 0 if that is not known.
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
