use std::cell::Cell;
use std::path::PathBuf;

use crate::task::once::{Once, Stage};
use crate::{Result, ResumeFrom, Run, Tags};

/// Loads the state of nodes from a checkpoint in its turn: pretrained parameters, or those of an
/// earlier phase. The progress of the tasks stays as it is. To continue a run from its end, resume
/// it instead.
///
/// ```
/// use ice_core::LoadCheckpoint;
/// let encoder = LoadCheckpoint::from("pretrained/encoder").tags("encoder").strict(false);
/// ```
pub struct LoadCheckpoint {
    from: ResumeFrom,
    tags: Option<Tags>,
    strict: bool,
    stage: Cell<Stage>,
}

impl LoadCheckpoint {
    /// Loads all nodes from the folder of a checkpoint, or from the newest valid checkpoint in a
    /// folder of checkpoints. Everything must fit.
    pub fn from(path: impl Into<PathBuf>) -> Self {
        Self { from: ResumeFrom::Path(path.into()), tags: None, strict: true, stage: Cell::default() }
    }

    /// Loads only the nodes that these tags select.
    #[must_use]
    pub fn tags(mut self, tags: impl Into<Tags>) -> Self {
        self.tags = Some(tags.into());
        self
    }

    /// Sets whether everything must fit. If false, parts that do not fit are skipped and named in a
    /// warning.
    #[must_use]
    pub fn strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }
}

impl Once for LoadCheckpoint {
    const WHAT: &'static str = "a load";

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        run.load_checkpoint(&self.from, self.strict, self.tags.as_ref())
    }
}
