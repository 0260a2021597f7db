use std::cell::Cell;

use serde_json::Value as Json;

use crate::task::parse;
use crate::{Result, Run, TaskItem};

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

impl TaskItem for SaveCheckpoint {
    fn run(&self, run: &Run) -> Result<()> {
        // Before the save: a run that resumes from it must not save it again.
        self.finished.set(true);
        run.save_checkpoint()
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
        let finished = parse(state, "a save")?;
        if !dry_run {
            self.finished.set(finished);
        }
        Ok(())
    }

    fn epochs(&self, _: bool) -> u64 {
        0
    }
}
