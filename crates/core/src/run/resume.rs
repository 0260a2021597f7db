//! Going on from a checkpoint.

use crate::checkpoint::{Checkpoint, Manifest, Selection, is_misfit, load, share};
use crate::{Error, Result, ResumeFrom, Run, Tags};

impl Run<'_> {
    /// Loads the state of the nodes that `tags` select, of all where there are none. The progress of the tasks stays as it is.
    /// With `strict`, everything that does not fit is an error that names it, and nothing is loaded; otherwise it is a warning.
    /// State of optimizers that a node has no use for is no misfit: it is kept, and saved again. Collective: rank 0 reads.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none or it is damaged, [`Error::Resume`] where it does not fit.
    pub fn load_checkpoint(&self, resume_from: &ResumeFrom, strict: bool, tags: Option<&Tags>) -> Result<()> {
        self.writer.borrow_mut().finish()?;
        let found = match self.is_main() {
            true => Some(Checkpoint::find(resume_from, &self.config.out_dir, self.worker.run_id())?),
            false => None,
        };
        let Some(checkpoint) = share(found, &self.worker)? else { return Ok(()) };
        let selection = tags.map_or(Selection::All, |tags| Selection::Tags(tags.clone()));
        self.kept.borrow_mut().extend(load(&checkpoint, None, self.graph, &selection, strict, &self.worker)?);
        Ok(())
    }

    /// Goes on from a checkpoint, or begins with the parameters that were given. A run that has begun needs a checkpoint.
    pub(super) fn begin(&self, has_begun: bool) -> Result<()> {
        if self.resume()? {
            return Ok(());
        }
        if has_begun {
            return Err(Error::Resume(
                "a rank is gone with its part of the optimizer's state, and no checkpoint has been saved yet: \
                 save more often (--save-every-steps)"
                    .into(),
            ));
        }
        let Some(init) = &self.config.init_from else { return Ok(()) };
        let found = if self.is_main() { Some(init.find(self.graph)?) } else { None };
        let Some(found) = share(found, &self.worker)? else { return Ok(()) };
        init.load(&found, self.graph, &self.worker)
    }

    /// Goes on from a checkpoint: the one of this run where the group was started again, after a failure or because nodes have come or
    /// gone; else the one asked for. False where there is none.
    fn resume(&self) -> Result<bool> {
        let from = || {
            let again = self.worker.restart_count() > 0 || self.worker.round() > 0;
            let own = again.then(|| Checkpoint::newest_in_run(&self.folder)).flatten();
            match (own, &self.config.resume_from) {
                (Some(own), _) => Ok(Some(own)),
                (None, Some(from)) => {
                    Checkpoint::find_if_any(from, &self.config.out_dir, self.worker.run_id())
                }
                (None, None) => Ok(None),
            }
        };
        let found = if self.is_main() { from()? } else { None };
        let Some(checkpoint) = share(found, &self.worker)? else { return Ok(false) };
        match self.resume_from(&checkpoint) {
            Err(error) if !self.config.checkpoints.strict && is_misfit(&error) => {
                if self.is_main() {
                    tracing::warn!("starting from the beginning: {error}");
                }
                Ok(false)
            }
            outcome => outcome.map(|()| true),
        }
    }

    fn resume_from(&self, checkpoint: &Checkpoint) -> Result<()> {
        let manifest = checkpoint.manifest();
        if let Some(tags) = &manifest.tags {
            return Err(Error::Resume(format!(
                "{} holds the nodes tagged `{tags}` alone: load it with LoadCheckpoint",
                checkpoint.path().display()
            )));
        }
        if manifest.seed != self.config.seed {
            return Err(Error::Resume(format!(
                "the checkpoint was made with --seed {} and this run has {}",
                manifest.seed, self.config.seed
            )));
        }
        self.tasks.load_state(&manifest.tasks, true)?;
        let kept = load(checkpoint, None, self.graph, &Selection::All, true, &self.worker)?;
        self.kept.borrow_mut().extend(kept);
        self.take_up(manifest)?;
        self.writer.borrow_mut().resumed(checkpoint.path(), manifest);
        if self.is_main() {
            println!("resuming from {}", checkpoint.path().display());
        }
        Ok(())
    }

    /// Is where the state is that was loaded.
    pub(super) fn take_up(&self, manifest: &Manifest) -> Result<()> {
        self.tasks.load_state(&manifest.tasks, false)?;
        self.counters.restore(manifest.counters);
        self.measures.borrow_mut().extend(manifest.measures.clone());
        Ok(())
    }
}
