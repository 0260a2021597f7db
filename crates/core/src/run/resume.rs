//! Resuming a run from a checkpoint.

use ice_checkpoint::adopt_best;

use super::first_folder;
use crate::checkpoint::{Checkpoint, Manifest, Selection, Strictness, broadcast, is_misfit, load};
use crate::{Error, Result, ResumeFrom, Run, Tags};

/// Result of the search for the checkpoint to resume from.
enum FoundCheckpoint {
    Nothing,
    Loaded,
    /// The checkpoint belongs to the later run with this number.
    OfLaterRun(u64),
}

impl Run<'_> {
    /// Loads the state of the nodes that `tags` select. Default: all nodes. The progress of the
    /// tasks stays as it is. Collective: rank 0 reads.
    ///
    /// With `strict`, a part that does not fit is an error that names it, and nothing is loaded.
    /// Otherwise it is a warning. Optimizer state that a node has no use for is not an error: it is
    /// kept, and saved again.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the checkpoint is missing or damaged, [`Error::Resume`] if it does
    /// not fit.
    pub fn load_checkpoint(&self, resume_from: &ResumeFrom, strict: bool, tags: Option<&Tags>) -> Result<()> {
        self.writer.borrow_mut().finish()?;
        let found = match self.is_main() {
            true => Some(Checkpoint::find(resume_from, &self.config.out_dir, self.worker.run_id())?),
            false => None,
        };
        let Some(checkpoint) = broadcast(found, &self.worker)? else { return Ok(()) };
        let selection = tags.map_or(Selection::All, |tags| Selection::Tags(tags.clone()));
        let fit = if strict { Strictness::Strict } else { Strictness::Any };
        let mut left_out = Vec::new();
        let kept = load(&checkpoint, None, self.graph, &selection, fit, &mut left_out, &self.worker)?;
        self.unclaimed.borrow_mut().extend(kept);
        self.name_left_out(&checkpoint, &left_out);
        Ok(())
    }

    /// Resumes from a checkpoint, or starts with the configured initial parameters. A run that
    /// `has_begun` needs a checkpoint, and fails without. If the checkpoint belongs to a later run,
    /// loads nothing and returns the number of that run.
    pub(super) fn begin(&self, has_begun: bool) -> Result<Option<u64>> {
        match self.resume()? {
            FoundCheckpoint::Loaded => return Ok(None),
            FoundCheckpoint::OfLaterRun(due) => return Ok(Some(due)),
            FoundCheckpoint::Nothing => {}
        }
        if has_begun {
            return Err(Error::Resume(
                "a rank is gone with its part of the optimizer's state, and no checkpoint has been saved yet: \
                 save more often (--save-every-steps)"
                    .into(),
            ));
        }
        let Some(init) = &self.config.init_from else { return Ok(None) };
        let found = if self.is_main() { Some(init.find(self.graph)?) } else { None };
        let Some(found) = broadcast(found, &self.worker)? else { return Ok(None) };
        init.load(&found, self.graph, &self.worker)?;
        Ok(None)
    }

    /// Finds the checkpoint to resume from. If the ranks were restarted, or nodes have joined or
    /// left, it is the newest checkpoint of this run or a later one. Otherwise it is the configured
    /// checkpoint, unless that belongs to an earlier run.
    fn find_checkpoint(&self) -> Result<Option<Checkpoint>> {
        let number = self.place.number;
        let again = self.worker.restart_count() > 0 || self.worker.round() > 0;
        let first = first_folder(&self.config, &self.worker);
        if let Some(own) = again.then(|| Checkpoint::newest_of_runs(&first, number)).flatten() {
            return Ok(Some(own));
        }
        let Some(from) = self.config.resume_from.as_ref().filter(|_| !self.place.has_done_the_last) else {
            return Ok(None);
        };
        match Checkpoint::find_if_any(from, &self.config.out_dir, self.worker.run_id()) {
            // This run need not have a checkpoint: an earlier run began without one, or its
            // checkpoint was replaced.
            Err(ice_checkpoint::Error::NotFound(_)) if number > 0 => Ok(None),
            found => Ok(found?.filter(|found| found.manifest().run >= number)),
        }
    }

    fn resume(&self) -> Result<FoundCheckpoint> {
        let found = if self.is_main() { self.find_checkpoint()? } else { None };
        let Some(checkpoint) = broadcast(found, &self.worker)? else { return Ok(FoundCheckpoint::Nothing) };
        let due = checkpoint.manifest().run;
        if due > self.place.number {
            if self.is_main() {
                let (path, run) = (checkpoint.path().display(), self.place.number + 1);
                println!("run {run} is done: {path} is of run {}", due + 1);
            }
            return Ok(FoundCheckpoint::OfLaterRun(due));
        }
        match self.resume_from(&checkpoint) {
            Err(error) if self.config.checkpoints.begin_if_misfit && is_misfit(&error) => {
                if self.is_main() {
                    tracing::warn!("starting from the beginning: {error}");
                }
                Ok(FoundCheckpoint::Nothing)
            }
            outcome => outcome.map(|()| FoundCheckpoint::Loaded),
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
        let fit = if self.config.checkpoints.strict { Strictness::Strict } else { Strictness::Graded };
        let mut left_out = Vec::new();
        let load_tasks = |dry_run, left_out: &mut Vec<String>| match fit {
            Strictness::Strict => self.tasks.load_state(&manifest.tasks, dry_run),
            _ => self.tasks.load_what_fits(&manifest.tasks, dry_run, left_out),
        };
        load_tasks(true, &mut left_out)?;
        let kept = load(checkpoint, None, self.graph, &Selection::All, fit, &mut left_out, &self.worker)?;
        self.unclaimed.borrow_mut().extend(kept);
        // The dry run has already listed the parts that do not fit.
        load_tasks(false, &mut Vec::new())?;
        self.take_up(manifest);
        self.name_left_out(checkpoint, &left_out);
        self.writer.borrow_mut().resumed(checkpoint.path(), manifest);
        if self.is_main() {
            println!("resuming from {}", checkpoint.path().display());
            // Without them, the first turn of the resumed run would always count as its best.
            if self.tasks.saves()
                && let Err(error) = adopt_best(checkpoint.path(), &self.folder)
            {
                tracing::warn!("the best checkpoints stay in the folder of the run before alone: {error}");
            }
        }
        Ok(())
    }

    /// Adopts counters and measures of a loaded state.
    pub(super) fn take_up(&self, manifest: &Manifest) {
        self.counters.restore(manifest.counters);
        self.measures.borrow_mut().extend(manifest.measures.clone());
    }

    fn name_left_out(&self, checkpoint: &Checkpoint, left_out: &[String]) {
        if !left_out.is_empty() && self.is_main() {
            let list: String = left_out.iter().map(|what| format!("\n  {what}")).collect();
            tracing::warn!(
                "not all of {} fits this program; it is loaded but for{list}",
                checkpoint.path().display()
            );
        }
    }
}
