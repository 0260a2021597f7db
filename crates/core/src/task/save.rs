use std::cell::Cell;

use crate::task::once::Once;
use crate::{Result, Run};

/// Saves a checkpoint when its turn comes, under `ckpts/E<train epochs>S<train steps>` of the run's folder.
#[derive(Default)]
pub struct SaveCheckpoint {
    finished: Cell<bool>,
}

impl SaveCheckpoint {
    /// A checkpoint of the whole graph.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Once for SaveCheckpoint {
    const WHAT: &'static str = "a save";

    fn finished(&self) -> &Cell<bool> {
        &self.finished
    }

    fn perform(&self, run: &Run) -> Result<()> {
        // Before the save: a run that resumes from it must not save it again.
        self.finished.set(true);
        run.save_checkpoint()
    }
}
