use std::cell::Cell;
use std::num::NonZeroU64;
use std::rc::Rc;

use ice_c10d::optim::scale;
use ice_worker::Worker;
use tch::Tensor;

use crate::graph::Outputs;
use crate::graph::hyper::Entry;
use crate::precision::Precision;
use crate::run::Timers;
use crate::{Error, Measure, Node, Result};

/// The nodes that one task runs, and how their steps are computed.
#[derive(Clone)]
pub(crate) struct ExecutableGraph {
    entries: Vec<Rc<Entry>>,
    precision: Precision,
    /// Passes of a training step.
    passes: NonZeroU64,
    timers: Option<Rc<Timers>>,
    place: Cell<(u64, u64)>,
}

/// What a training step was.
pub(crate) struct Step {
    /// Batches.
    pub(crate) passes: u64,
    /// Samples of all ranks.
    pub(crate) samples: u64,
    /// This rank's, a scalar.
    pub(crate) loss: Tensor,
}

impl ExecutableGraph {
    pub(super) fn new(entries: Vec<Rc<Entry>>, precision: Precision, passes: NonZeroU64) -> Self {
        Self { entries, precision, passes, timers: None, place: Cell::default() }
    }

    pub(crate) fn with_timers(&self, timers: Option<Rc<Timers>>) -> Self {
        Self { timers, ..self.clone() }
    }

    /// Does a part of a step, and times it where that is asked for.
    pub(crate) fn timed<T>(&self, uid: &str, phase: &'static str, work: impl FnOnce() -> T) -> T {
        match &self.timers {
            Some(timers) => timers.time(uid, phase, work),
            None => work(),
        }
    }

    /// Training epochs and steps that are done.
    pub(crate) fn place(&self) -> (u64, u64) {
        self.place.get()
    }

    pub(crate) fn set_place(&self, place: (u64, u64)) {
        self.place.set(place);
    }

    pub(crate) fn passes(&self) -> u64 {
        self.passes.get()
    }

    pub(crate) fn entries(&self) -> &[Rc<Entry>] {
        &self.entries
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// Iterations left in the epoch: those of the node that runs out first; `None` where no node has a size.
    pub(crate) fn remaining(&self) -> Option<u64> {
        self.entries.iter().filter_map(|entry| entry.node.borrow().remaining()).min()
    }

    pub(crate) fn epoch_start(&self) {
        for entry in &self.entries {
            entry.node.borrow_mut().epoch_start();
        }
    }

    /// Begins the next pass over the data within an epoch.
    pub(crate) fn next_pass(&self, worker: &Worker) -> Result<()> {
        self.epoch_end(worker, |node| node.remaining().is_some()).map(drop)
    }

    /// Ends the epoch on the nodes that are to and collects what they measured, by uid, synchronised over the ranks.
    pub(crate) fn epoch_end(
        &self,
        worker: &Worker,
        ends: impl Fn(&dyn Node) -> bool,
    ) -> Result<Vec<(String, Measure)>> {
        let mut measures = Vec::new();
        for entry in self.entries.iter().filter(|entry| ends(&*entry.node.borrow())) {
            let measure = entry
                .node
                .borrow_mut()
                .epoch_end(worker)
                .map_err(|error| error.at(&entry.uid, "epoch end"))?;
            measures.extend(measure.map(|measure| (entry.uid.clone(), measure)));
        }
        Ok(measures)
    }

    /// The losses of the last training step over the samples of all ranks, by name. Collective.
    pub(crate) fn step_losses(&self, worker: &Worker) -> Result<Vec<(String, f64)>> {
        let own = |entry: &Rc<Entry>| Some((entry.name.clone(), entry.node.borrow().step_loss()?));
        let (names, rows): (Vec<_>, Vec<_>) = self.entries.iter().filter_map(own).unzip();
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let rows = Tensor::f_stack(&rows, 0)?;
        worker.all_reduce_sum(&rows)?;
        let means: Vec<f64> = Vec::try_from(rows.f_select(1, 0)?.f_div(&rows.f_select(1, 1)?)?)?;
        Ok(names.into_iter().zip(means).collect())
    }

    /// Runs every node once, without gradients. Returns the samples of all ranks.
    pub(crate) fn eval_step(&self, worker: &Worker) -> Result<u64> {
        tch::no_grad(|| {
            let samples = self.forward(worker, |outputs| {
                outputs.run_all()?;
                Ok(outputs.samples())
            })?;
            self.iteration_end();
            Ok(samples)
        })
    }

    /// Lets somebody ask for the outputs of an iteration.
    pub(crate) fn forward<T>(
        &self,
        worker: &Worker,
        look: impl FnOnce(&Outputs<'_>) -> Result<T>,
    ) -> Result<T> {
        let outputs = Outputs::new(self, worker, false);
        let _range = self.precision.begin(worker.device())?;
        look(&outputs)
    }

    /// Runs every node once per pass, goes back from the sum of the losses, and applies the optimizers.
    ///
    /// The passes of a step weigh as their samples do: each loss is scaled by its samples over those of the first pass, and the
    /// gradients at the end by those of the first pass over those of all.
    pub(crate) fn train_step(&self, worker: &Worker) -> Result<Step> {
        self.each("before the step", |node| node.before_step())?;
        let (mut samples, mut first, mut sum) = (0, None, None);
        let mut passes = 0;
        loop {
            passes += 1;
            let last = passes == self.passes.get() || self.remaining() == Some(1);
            let (here, loss) = self.pass(worker, last, first)?;
            samples += here;
            first.get_or_insert(here);
            sum = Some(sum.map_or_else(|| loss.shallow_clone(), |sum: Tensor| sum + &loss));
            if last {
                break;
            }
        }
        let mut loss = sum.unwrap_or_default();
        let first = first.unwrap_or(samples);
        let gradients: Vec<_> =
            self.entries.iter().flat_map(|entry| entry.node.borrow().gradients()).collect();
        if samples != first {
            let factor = first as f64 / samples as f64;
            scale(&gradients, factor)?;
            loss *= factor;
        }
        let counts = match &self.precision.scaler {
            Some(scaler) => scaler.borrow().unscale(&gradients)?,
            None => true,
        };
        drop(gradients);
        if counts {
            self.each("update", |node| node.update())?;
        }
        Ok(Step { passes, samples, loss })
    }

    /// Forward and backward over one batch, whose weight is relative to a first one of so many samples. Returns the samples of all
    /// ranks and the weighted loss.
    fn pass(&self, worker: &Worker, last: bool, first: Option<u64>) -> Result<(u64, Tensor)> {
        self.each("before the pass", |node| node.before_pass(last))?;
        let outputs = Outputs::new(self, worker, true);
        let range = self.precision.begin(worker.device())?;
        outputs.run_all()?;
        let loss = self
            .entries
            .iter()
            .filter_map(|entry| entry.node.borrow_mut().take_loss())
            .reduce(|sum, loss| sum + loss)
            .ok_or_else(|| {
                Error::Graph("a training task selects no loss node: add one or use Task::eval".into())
            })?;
        drop(range);
        let samples = outputs.samples();
        let loss = match first {
            Some(first) if first != samples => loss * (samples as f64 / first as f64),
            _ => loss,
        };
        let start = match &self.precision.scaler {
            Some(scaler) => scaler.borrow().scale(&loss)?,
            None => loss.shallow_clone(),
        };
        self.each("backward", |node| node.before_backward(&start, last))?;
        // From here on this rank waits for the others; one that did not come so far is behind.
        worker.link().tick();
        // All nodes at once: the graph of libtorch does not know them.
        self.timed("*", "backward", || ice_c10d::run_backward(&start))?;
        self.each("backward", |node| node.after_backward(last))?;
        self.iteration_end();
        Ok((samples, loss.detach()))
    }

    /// Calls a hook of all nodes.
    fn each(&self, phase: &'static str, hook: impl Fn(&mut dyn Node) -> Result<()>) -> Result<()> {
        for entry in &self.entries {
            let run = || hook(&mut *entry.node.borrow_mut());
            let outcome = if phase == "update" { self.timed(&entry.uid, phase, run) } else { run() };
            outcome.map_err(|error| error.at(&entry.uid, phase))?;
        }
        Ok(())
    }

    fn iteration_end(&self) {
        for entry in &self.entries {
            entry.node.borrow_mut().iteration_end();
        }
    }
}
