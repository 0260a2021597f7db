use std::cell::Cell;

use crate::task::once::Once;
use crate::{Result, Run};

/// A closure in the list of tasks. It runs once on every rank; on resume not again if it had run.
pub struct Call<F> {
    function: F,
    finished: Cell<bool>,
}

impl<F: Fn(&Run) -> Result<()>> Call<F> {
    /// Calls `function` when its turn comes.
    pub fn new(function: F) -> Self {
        Self { function, finished: Cell::new(false) }
    }
}

impl<F: Fn(&Run) -> Result<()>> Once for Call<F> {
    const WHAT: &'static str = "a closure";

    fn finished(&self) -> &Cell<bool> {
        &self.finished
    }

    fn perform(&self, run: &Run) -> Result<()> {
        (self.function)(run)?;
        self.finished.set(true);
        Ok(())
    }
}
