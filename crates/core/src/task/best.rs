use std::cell::Cell;

use crate::task::once::{Once, Stage};
use crate::{Better, Result, Run};

/// Saves a checkpoint in its turn if a measure is among the best so far, under `best/E<train
/// epochs>S<train steps>` in the run's folder.
///
/// ```
/// use ice_core::{Better, SaveBest};
/// let best = SaveBest::new("val/accuracy", Better::Higher).max_keep(3);
/// ```
pub struct SaveBest {
    measure: String,
    better: Better,
    max_keep: usize,
    stage: Cell<Stage>,
}

impl SaveBest {
    /// Keeps the single best checkpoint by the last epoch's measure of the node with the uid
    /// `measure`.
    pub fn new(measure: impl Into<String>, better: Better) -> Self {
        Self { measure: measure.into(), better, max_keep: 1, stage: Cell::default() }
    }

    /// Sets the number of checkpoints to keep.
    #[must_use]
    pub fn max_keep(mut self, checkpoints: usize) -> Self {
        self.max_keep = checkpoints.max(1);
        self
    }
}

impl Once for SaveBest {
    const WHAT: &'static str = "a save of the best";
    const SAVES: bool = true;

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        self.stage.set(Stage::Finished);
        run.save_best(&self.measure, self.better, self.max_keep).map(|_| ())
    }
}
