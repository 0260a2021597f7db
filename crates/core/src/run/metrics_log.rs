//! The TensorBoard events of a run: see `docs/metrics.md`.

use std::rc::Rc;

use super::Timers;
use crate::graph::ExecutableGraph;
use crate::tensorboard::{Board, Histogram};
use crate::{Measure, Result, Run, Tags};

impl Run<'_> {
    /// Shows a custom value at the current training step. Only rank 0 writes; other ranks may call
    /// it or not.
    pub fn show_scalar(&self, tag: &str, value: f64) {
        self.board.borrow().scalars(self.counters.train_steps(), [(tag.to_owned(), value)]);
    }

    /// Shows the values that nodes have shown in a step that now counts.
    pub(crate) fn show_scalars(&self, scalars: Vec<(String, f64)>) {
        if !scalars.is_empty() {
            self.board.borrow().scalars(self.counters.train_steps(), scalars);
        }
    }

    pub(super) fn open_board(&self) {
        let own = [("seed", self.config.seed as f64), ("world_size", self.worker.world_size() as f64)];
        let own = own.map(|(name, value)| (name.to_owned(), value.into()));
        let given = self.graph.hparams();
        let own = own.into_iter().filter(|(name, _)| given.iter().all(|(given, _)| given != name));
        let hparams: Vec<_> = given.iter().cloned().chain(own).collect();
        let folder = match (&self.config.events_dir, self.place.number) {
            (None, _) => self.folder.to_path_buf(),
            (Some(given), 0) => given.clone(),
            // Each run counts its steps from 0, so each needs its own curve.
            (Some(given), number) => given.join((number + 1).to_string()),
        };
        self.board.borrow_mut().open(&folder, self.counters.train_steps(), &hparams);
    }

    /// Closes the board. A run that was stopped has neither succeeded nor failed.
    pub(super) fn close_board(&self, is_ok: bool) {
        let succeeded = (!is_ok || self.tasks.is_finished() || self.is_over_early()).then_some(is_ok);
        self.board.borrow_mut().finish(self.counters.train_steps(), succeeded);
    }

    /// Returns the timers of a task. Only rank 0 measures.
    pub(crate) fn timers(&self, task: &Tags) -> Option<Rc<Timers>> {
        self.is_main().then(|| self.timers.of(&task.to_string(), self.worker.device()))
    }

    /// Writes all times so far to `timers.csv` in the run's folder.
    pub(crate) fn write_timers(&self) -> Result<()> {
        self.timers.write(&self.folder.join("timers.csv"))
    }

    /// Shows a training step over `samples` samples. Collective if the step is one that is shown.
    pub(crate) fn show_step(&self, tags: &Tags, graph: &ExecutableGraph, samples: u64) -> Result<()> {
        let step = self.counters.train_steps();
        let mut board = self.board.borrow_mut();
        if !board.count(step, samples) {
            return Ok(());
        }
        let losses = graph.step_losses(&self.worker)?;
        self.look_for_stragglers()?;
        if self.is_main() {
            let of_nodes = graph.entries().iter().flat_map(|entry| {
                let scalars = entry.node.borrow().scalars();
                scalars.into_iter().map(|(scalar, value)| (format!("{}.{scalar}", entry.name), value))
            });
            let rate = ("samples_per_second".to_owned(), board.rate());
            let all = losses.into_iter().chain(of_nodes).chain([rate]);
            board.scalars(step, all.map(|(name, value)| (format!("{tags}_step/{name}"), value)));
        }
        Ok(())
    }

    /// Shows the end of an epoch, with its measures by uid.
    pub(crate) fn show_epoch(
        &self,
        tags: &Tags,
        train: bool,
        graph: &ExecutableGraph,
        measures: &[(String, Measure)],
    ) -> Result<()> {
        if !self.is_main() {
            return Ok(());
        }
        self.write_timers()?;
        let (step, board) = (self.counters.train_steps(), self.board.borrow());
        let named = measures.iter().flat_map(|(uid, measure)| {
            let name = uid.rsplit('/').next().unwrap_or(uid);
            measure.named(name).map(|(name, value)| (format!("{tags}/{name}"), value))
        });
        let epoch = (format!("{tags}/epoch"), self.counters.epochs(train) as f64);
        board.scalars(step, named.chain([epoch]));
        if train { show_histograms(&board, step, graph) } else { Ok(()) }
    }
}

fn show_histograms(board: &Board, step: u64, graph: &ExecutableGraph) -> Result<()> {
    for entry in graph.entries().iter() {
        for (name, tensor) in entry.node.borrow().histograms() {
            if let Some(histogram) = Histogram::of(&tensor)? {
                board.histogram(step, &format!("{}/{name}", entry.name), histogram);
            }
        }
    }
    Ok(())
}
