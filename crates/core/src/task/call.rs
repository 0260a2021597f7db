use std::cell::Cell;

use serde_json::Value as Json;

use crate::task::parse;
use crate::{Result, Run, TaskItem};

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

impl<F: Fn(&Run) -> Result<()>> TaskItem for Call<F> {
    fn run(&self, run: &Run) -> Result<()> {
        (self.function)(run)?;
        self.finished.set(true);
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.finished.get()
    }

    fn reset(&self) {
        self.finished.set(false);
    }

    fn state(&self) -> Json {
        self.finished.get().into()
    }

    fn load_state(&self, state: &Json, dry_run: bool) -> Result<()> {
        let finished = parse(state, "a closure")?;
        if !dry_run {
            self.finished.set(finished);
        }
        Ok(())
    }

    fn epochs(&self, _: bool) -> u64 {
        0
    }
}
