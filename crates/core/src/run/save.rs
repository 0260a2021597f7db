//! Times and folders of the checkpoints of a run.

use std::path::{Path, PathBuf};

use ice_checkpoint::{BEST, CHECKPOINTS, candidates, probe, remove_abandoned, remove_leftovers};

use crate::checkpoint::{Best, Better, Keep, Manifest, Request, Selection};
use crate::collectives::decide;
use crate::{Result, Run, Tags};

impl Run<'_> {
    /// Saves a checkpoint of the nodes that `tags` select (default: all), and of the progress of
    /// all tasks. The folder is `save_to`; default: `ckpts/E<train epochs>S<train steps>` in the
    /// run's folder. Returns once the state is copied, and a thread writes it. Collective: every
    /// rank calls it. Rank 0 writes for all ranks, unless the state is sharded.
    ///
    /// # Errors
    /// The failure to copy the state, or the failure of the previous write.
    pub fn save_checkpoint(&self, save_to: Option<&Path>, tags: Option<&Tags>) -> Result<()> {
        // Rank 0 writes for all ranks, and waits until the previous save is on disk. The agent must
        // not take that wait for a hang.
        let _alone = self.worker.link().alone();
        self.graph.sync_measures(&self.worker)?;
        self.synced();
        let folder =
            save_to.map_or_else(|| self.folder.join(CHECKPOINTS).join(self.checkpoint_name()), PathBuf::from);
        let keep = match self.config.checkpoints.keep_last {
            Some(keep) if save_to.is_none() => Keep::Last(keep.get()),
            _ => Keep::All,
        };
        self.save(Request { folder, manifest: self.manifest(tags), keep }, tags)
    }

    /// Saves a checkpoint under `best` in the run's folder if the last value of `measure` is among
    /// the best `keep` values saved there. Removes the checkpoint that is no longer among them.
    /// Returns whether it saved. Collective.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] if the node has measured nothing, and the errors of
    /// [`Run::save_checkpoint`].
    pub fn save_best(&self, measure: &str, better: Better, keep: usize) -> Result<bool> {
        let _alone = self.worker.link().alone();
        let value = self.measure(measure)?;
        let holder = self.folder.join(BEST);
        self.writer.borrow_mut().finish()?;
        let wins = || {
            let known = candidates(&holder).into_iter().filter_map(|candidate| candidate.manifest.ok()?.best);
            let at_least_as_good =
                known.filter(|best| best.measure == measure && !better.prefers(value, best.value));
            !value.is_nan() && at_least_as_good.count() < keep
        };
        if !decide(self.is_main() && wins(), &self.worker)? {
            return Ok(false);
        }
        self.graph.sync_measures(&self.worker)?;
        self.synced();
        let mut manifest = self.manifest(None);
        manifest.best = Some(Best { measure: measure.into(), value, better });
        let keep = Keep::Best { measure: measure.into(), keep };
        self.save(Request { folder: holder.join(self.checkpoint_name()), manifest, keep }, None)?;
        Ok(true)
    }

    /// Waits until the checkpoint in progress is on disk.
    ///
    /// # Errors
    /// The failure of the write.
    pub fn finish_saving(&self) -> Result<()> {
        let _alone = self.worker.link().alone();
        self.writer.borrow_mut().finish()
    }

    pub(crate) fn save_if_due(&self) -> Result<()> {
        match self.config.save_every_steps {
            Some(every) if self.counters.train_steps().is_multiple_of(every) => {
                self.save_checkpoint(None, None)
            }
            _ => Ok(()),
        }
    }

    /// Checks that the run's folder is writable, if the run saves checkpoints. Removes half-written
    /// files that killed processes of this run id have left.
    pub(super) fn remove_leftovers(&self) -> Result<()> {
        if self.is_to_save() {
            probe(&self.folder)?;
        }
        remove_abandoned(&self.config.out_dir, self.worker.run_id());
        for holder in [CHECKPOINTS, BEST] {
            remove_leftovers(&self.folder.join(holder))?;
        }
        Ok(())
    }

    fn is_to_save(&self) -> bool {
        self.config.save_every_steps.is_some() || self.tasks.saves()
    }

    pub(super) fn prepare_to_save(&self) {
        if self.is_to_save() {
            self.writer.borrow_mut().prepare(self.graph);
        }
    }

    fn save(&self, request: Request, tags: Option<&Tags>) -> Result<()> {
        let selection = tags.map_or(Selection::All, |tags| Selection::Tags(tags.clone()));
        let mut writer = self.writer.borrow_mut();
        writer.save(request, self.graph, &selection, &self.unclaimed.borrow(), self.worker.store().as_ref())
    }

    fn checkpoint_name(&self) -> String {
        format!("E{}S{}", self.counters.train_epochs(), self.counters.train_steps())
    }

    pub(super) fn manifest(&self, tags: Option<&Tags>) -> Manifest {
        let mut manifest = Manifest::new(
            self.worker.run_id(),
            self.worker.world_size(),
            self.config.seed,
            self.counters.saved(),
            self.tasks.state(),
        );
        manifest.run = self.place.number;
        manifest.measures = self.measures.borrow().clone();
        manifest.base_ranks = Some(self.progress.base_ranks.get()).filter(|ranks| *ranks > 0);
        manifest.tags = tags.map(ToString::to_string);
        manifest
    }
}
