use std::cell::Cell;
use std::path::PathBuf;

use crate::task::once::{Once, Stage};
use crate::{Result, Run, Tags};

/// Saves a checkpoint when its turn comes, under `ckpts/E<train epochs>S<train steps>` of the run's folder unless said otherwise.
///
/// ```
/// use ice_core::SaveCheckpoint;
/// let all = SaveCheckpoint::new();
/// let encoder = SaveCheckpoint::new().to("pretrained/encoder").tags("encoder");
/// ```
#[derive(Default)]
pub struct SaveCheckpoint {
    to: Option<PathBuf>,
    tags: Option<Tags>,
    stage: Cell<Stage>,
}

impl SaveCheckpoint {
    /// A checkpoint of the whole graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Saves in this folder. A checkpoint that is there is replaced.
    #[must_use]
    pub fn to(mut self, folder: impl Into<PathBuf>) -> Self {
        self.to = Some(folder.into());
        self
    }

    /// Saves the nodes that these tags select alone. A run cannot resume from such a checkpoint, but load it.
    #[must_use]
    pub fn tags(mut self, tags: impl Into<Tags>) -> Self {
        self.tags = Some(tags.into());
        self
    }
}

impl Once for SaveCheckpoint {
    const WHAT: &'static str = "a save";
    const SAVES: bool = true;

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        // Before the save: a run that resumes from it must not save it again.
        self.stage.set(Stage::Finished);
        run.save_checkpoint(self.to.as_deref(), self.tags.as_ref())
    }
}
