use std::cell::Cell;
use std::path::PathBuf;

use crate::task::once::{Once, Stage};
use crate::{Result, Run, Tags};

/// Saves a checkpoint in its turn. Default folder: `ckpts/E<train epochs>S<train steps>` in the
/// run's folder.
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
    /// Saves a checkpoint of the whole graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Saves in this folder. An existing checkpoint is replaced.
    #[must_use]
    pub fn to(mut self, folder: impl Into<PathBuf>) -> Self {
        self.to = Some(folder.into());
        self
    }

    /// Saves only the nodes that these tags select. A run cannot resume from such a checkpoint,
    /// only load it.
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
        // Set before the save: a run that resumes from the checkpoint must not save it again.
        self.stage.set(Stage::Finished);
        run.save_checkpoint(self.to.as_deref(), self.tags.as_ref())
    }
}
