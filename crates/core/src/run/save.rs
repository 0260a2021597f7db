//! When and where a run saves.

use std::path::{Path, PathBuf};

use ice_checkpoint::{BEST, CHECKPOINTS, candidates, probe, remove_abandoned, remove_leftovers};

use crate::checkpoint::{Best, Better, Keep, Manifest, Request, Selection};
use crate::ranks::decide;
use crate::{Result, Run, Tags};

impl Run<'_> {
    /// Saves a checkpoint of the nodes that `tags` select, of all where there are none, and of the progress of all tasks: in the
    /// folder `save_to`, or else under `ckpts/E<train epochs>S<train steps>` of the run's. Returns once the state is copied; a
    /// thread writes it. Collective: every rank calls it; rank 0 writes for all, unless the state is sharded.
    ///
    /// # Errors
    /// The failure of this save's copy or of the write before it.
    pub fn save_checkpoint(&self, save_to: Option<&Path>, tags: Option<&Tags>) -> Result<()> {
        // Rank 0 writes for all, and waits for the save before to be on the disk.
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

    /// Saves a checkpoint under `best` of the run's folder if what `measure` last measured is among the best `keep` values that
    /// are saved there, and removes the one that is no longer. Says whether it was saved. Collective.
    ///
    /// # Errors
    /// [`crate::Error::Graph`] where the node has measured nothing; as [`Run::save_checkpoint`].
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

    /// Waits until the checkpoint that is being written is on the disk.
    ///
    /// # Errors
    /// What kept it from being written.
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

    /// Checks that the run's folder can be written, if the run is to save, and removes what killed processes of this run id have
    /// left half written.
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
        writer.save(request, self.graph, &selection, &self.kept.borrow(), self.worker.store().as_ref())
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
