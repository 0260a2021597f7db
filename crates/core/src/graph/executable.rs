use std::cell::{Cell, LazyCell, RefCell};
use std::num::NonZeroU64;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ice_c10d::amp::unscale;
use ice_c10d::optim::scale;
use ice_worker::Worker;
use tch::{Kind, Tensor};

use crate::collectives::gather;
use crate::graph::Outputs;
use crate::graph::hyper::Entry;
use crate::precision::Precision;
use crate::run::{Leave, Timers};
use crate::{Error, Measure, Node, Result, Value};

/// Nodes that run together.
pub(crate) type Entries = Rc<[Rc<Entry>]>;

/// The nodes that one task runs, and the computation of its steps.
#[derive(Clone)]
pub(crate) struct ExecutableGraph {
    entries: Entries,
    precision: Precision,
    /// Number of passes of a training step.
    passes: NonZeroU64,
    /// Samples of each node in all passes of the current step, if the step has several passes.
    /// `None` for a node that does not know its samples.
    step_samples: RefCell<Vec<Option<u64>>>,
    /// Whether nodes run their own backward pass.
    goes_backward: bool,
    timers: Option<Rc<Timers>>,
    place: Cell<StepPlace>,
    /// Folder of the run. `None` for a graph that is run by hand.
    folder: Option<Rc<Path>>,
    /// Scalars that nodes show in this step.
    scalars: RefCell<Vec<(String, f64)>>,
    /// The most that a node asks to leave after this step.
    asked: Cell<Leave>,
}

/// Progress of a run at the start of a step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepPlace {
    /// Completed training steps of the run.
    pub(crate) train_steps: u64,
    pub(crate) train_epochs: u64,
    /// Completed epochs of the run: of training in a training task, else of evaluation.
    pub(crate) epochs: u64,
    /// Completed iterations of the epoch.
    pub(crate) iteration: u64,
    pub(crate) epoch_iterations: Option<u64>,
}

/// Result of a training step.
pub(crate) struct Step {
    /// Number of batches.
    pub(crate) passes: u64,
    /// Number of samples of all ranks.
    pub(crate) samples: u64,
    /// Loss of this rank, a scalar.
    pub(crate) loss: Tensor,
    /// Time of this rank before it waited for others.
    pub(crate) own: Duration,
}

/// Result of the passes of a step.
struct Passes {
    passes: u64,
    samples: u64,
    /// Number of samples of the first pass.
    first: u64,
    loss: Tensor,
    own: Duration,
}

impl ExecutableGraph {
    pub(super) fn new(entries: Vec<Rc<Entry>>, precision: Precision, passes: NonZeroU64) -> Self {
        let goes_backward = entries.iter().any(|entry| entry.node.borrow().goes_backward());
        Self {
            entries: entries.into(),
            goes_backward,
            precision,
            passes,
            step_samples: RefCell::default(),
            timers: None,
            place: Cell::default(),
            folder: None,
            scalars: RefCell::default(),
            asked: Cell::default(),
        }
    }

    /// Returns the graph for a task of a run with this folder.
    pub(crate) fn for_task(&self, folder: &Rc<Path>, timers: Option<Rc<Timers>>) -> Self {
        Self { timers, folder: Some(Rc::clone(folder)), ..self.clone() }
    }

    /// Executes a part of a step, and times it if the task is timed.
    pub(crate) fn timed<T>(&self, uid: &str, phase: &'static str, work: impl FnOnce() -> T) -> T {
        match &self.timers {
            Some(timers) => timers.time(uid, phase, work),
            None => work(),
        }
    }

    pub(crate) fn place(&self) -> StepPlace {
        self.place.get()
    }

    pub(crate) fn set_place(&self, place: StepPlace) {
        self.place.set(place);
    }

    pub(crate) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Records a scalar of the step. A later value of the same tag replaces it.
    pub(crate) fn show_scalar(&self, tag: &str, value: f64) {
        let mut scalars = self.scalars.borrow_mut();
        match scalars.iter_mut().find(|(known, _)| known == tag) {
            Some((_, known)) => *known = value,
            None => scalars.push((tag.to_owned(), value)),
        }
    }

    /// Takes the scalars that nodes have shown since the last call.
    pub(crate) fn take_scalars(&self) -> Vec<(String, f64)> {
        self.scalars.take()
    }

    pub(crate) fn ask_to_leave(&self, what: Leave) {
        self.asked.set(self.asked.get().max(what));
    }

    /// Takes the most that nodes have asked to leave since the last call.
    pub(crate) fn asked_to_leave(&self) -> Leave {
        self.asked.take()
    }

    /// Returns the samples of the nodes at these positions in all passes of the current step.
    /// `None` if the step is one pass, or a node does not know its samples.
    pub(crate) fn step_samples(&self, nodes: [usize; 2]) -> Option<[u64; 2]> {
        let samples = self.step_samples.borrow();
        let [first, second] = nodes.map(|node| samples.get(node).copied().flatten());
        Some([first?, second?])
    }

    pub(crate) fn passes(&self) -> u64 {
        self.passes.get()
    }

    pub(crate) fn entries(&self) -> &Entries {
        &self.entries
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.name == name)
    }

    /// Returns the remaining iterations of the epoch: the smallest number of all nodes. `None` if
    /// no node has a size.
    pub(crate) fn remaining(&self) -> Option<u64> {
        self.entries.iter().filter_map(|entry| entry.node.borrow().remaining()).min()
    }

    /// Returns the number of batches that remain in the iteration.
    fn parts_left(&self) -> u64 {
        self.entries.iter().map(|entry| entry.node.borrow().parts_left()).max().unwrap_or(1)
    }

    pub(crate) fn epoch_start(&self) {
        for entry in self.entries.iter() {
            entry.node.borrow_mut().epoch_start();
        }
    }

    /// Begins the next pass over the data within an epoch.
    pub(crate) fn next_pass(&self, worker: &Worker) -> Result<()> {
        self.epoch_end(worker, |node| node.remaining().is_some()).map(drop)
    }

    /// Ends the epoch on the nodes that `ends` accepts, and returns their measures by uid,
    /// synchronized over the ranks.
    pub(crate) fn epoch_end(
        &self,
        worker: &Worker,
        ends: impl Fn(&dyn Node) -> bool,
    ) -> Result<Vec<(String, Measure)>> {
        let ending: Vec<_> = self.entries.iter().filter(|entry| ends(&*entry.node.borrow())).collect();
        // The synchronization may fail, so it comes first. If a rank is lost in it, the epoch has
        // not ended, and is ended again later.
        for entry in &ending {
            let synced = entry.node.borrow_mut().sync_measures(worker);
            synced.map_err(|error| error.at(&entry.uid, "epoch end"))?;
        }
        let (data, others): (Vec<_>, Vec<_>) =
            ending.into_iter().partition(|entry| entry.node.borrow().remaining().is_some());
        let mut measures = Vec::new();
        for entry in others.into_iter().chain(data) {
            let measure = entry
                .node
                .borrow_mut()
                .epoch_end(worker)
                .map_err(|error| error.at(&entry.uid, "epoch end"))?;
            measures.extend(measure.map(|measure| (entry.uid.clone(), measure)));
        }
        Ok(measures)
    }

    /// Returns the losses of the last training step over the samples of all ranks, by name.
    /// Collective.
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

    /// Runs every node once, without gradients. Returns the number of samples of all ranks.
    pub(crate) fn eval_step(&self, worker: &Worker) -> Result<u64> {
        tch::no_grad(|| {
            let mut samples = 0;
            loop {
                samples += self.forward(worker, &[], |outputs| {
                    outputs.run_all()?;
                    Ok(outputs.samples())
                })?;
                let was_last = self.parts_left() == 1;
                self.iteration_end();
                if was_last {
                    break;
                }
            }
            self.each("step end", |node| node.step_end())?;
            Ok(samples)
        })
    }

    /// Begins an iteration with these inputs, and calls `look` with its outputs.
    pub(crate) fn forward<T>(
        &self,
        worker: &Worker,
        inputs: &[(String, Value)],
        look: impl FnOnce(&Outputs<'_>) -> Result<T>,
    ) -> Result<T> {
        let outputs = Outputs::new(self, worker, false).with_inputs(inputs);
        let _range = self.precision.begin(worker.device())?;
        look(&outputs)
    }

    /// Executes a training step: runs every node once per pass, runs backward from the sum of the
    /// losses, and applies the optimizers. With `check`, returns `None` and applies nothing if
    /// gradients are not finite.
    ///
    /// Passes are weighted by their samples. Each loss is scaled by its samples divided by those of
    /// the first pass. At the end, the gradients are scaled by the samples of the first pass
    /// divided by those of all passes.
    pub(crate) fn train_step(&self, worker: &Worker, check: bool) -> Result<Option<Step>> {
        self.apply_step(worker, check).map_err(|error| self.name_sparse(error))
    }

    /// Names the parameter if a step failed because its gradient is sparse: libtorch's error names
    /// only the operation.
    fn name_sparse(&self, error: Error) -> Error {
        if error.is_lost() {
            return error;
        }
        let sparse = self.entries.iter().find_map(|entry| {
            let names = entry.node.borrow().sparse_gradients();
            (!names.is_empty()).then(|| (entry, names.join("`, `")))
        });
        match sparse {
            Some((entry, names)) => Error::Graph(format!(
                "the gradient of `{names}` is sparse, and can neither be averaged over ranks nor applied: \
                 make the embedding with `sparse` false"
            ))
            .at(&entry.uid, "backward"),
            None => error,
        }
    }

    fn apply_step(&self, worker: &Worker, check: bool) -> Result<Option<Step>> {
        let Passes { passes, samples, first, mut loss, own } = self.passes_of_step(worker, true)?;
        worker.confirm()?;
        // Gradients are fetched one by one, so only steps that look at them do so, and once.
        let gradients = LazyCell::new(|| -> Vec<_> {
            self.entries.iter().flat_map(|entry| entry.node.borrow().gradients()).collect()
        });
        if samples != first {
            let factor = first as f64 / samples as f64;
            scale(&gradients, factor)?;
            loss *= factor;
        }
        let counts = match &self.precision.scaler {
            Some(scaler) => scaler.borrow().unscale(&gradients)?,
            None if check && !are_finite(&gradients)? => return Ok(None),
            None => true,
        };
        drop(gradients);
        if counts {
            self.each("update", |node| node.update())?;
        }
        self.each("step end", |node| node.step_end())?;
        Ok(Some(Step { passes, samples, loss, own }))
    }

    /// Executes all passes of a step. With `exchange`, the ranks exchange gradients in the last
    /// pass.
    fn passes_of_step(&self, worker: &Worker, exchange: bool) -> Result<Passes> {
        self.each("before the step", |node| node.before_step())?;
        let iterations = match self.passes.get() {
            1 => 1,
            passes => self.remaining().map_or(passes, |left| left.min(passes)),
        };
        let mut of_step = self.step_samples.borrow_mut();
        of_step.clear();
        if iterations > 1 || self.parts_left() > 1 {
            of_step.extend(self.entries.iter().map(|entry| entry.node.borrow().samples_ahead(iterations)));
        }
        drop(of_step);
        let (mut samples, mut first, mut sum, mut own) = (0, None, None, Duration::ZERO);
        let mut passes = 0;
        loop {
            // An iteration that is divided into parts has more passes, but counts as one.
            let ends = self.parts_left() == 1;
            passes += u64::from(ends);
            let last = ends && (passes == self.passes.get() || self.remaining() == Some(1));
            let (here, loss, took) = match self.goes_backward {
                true => self.pass_with_backward(worker, last, exchange, first)?,
                false => self.pass(worker, last && exchange, first)?,
            };
            (samples, own) = (samples + here, own + took);
            first.get_or_insert(here);
            sum = Some(sum.map_or_else(|| loss.shallow_clone(), |sum: Tensor| sum + &loss));
            if last {
                let first = first.unwrap_or(samples);
                return Ok(Passes { passes, samples, first, loss: sum.unwrap_or_default(), own });
            }
        }
    }

    /// Repeats a step whose gradients were not finite, each rank on its own, and returns an error
    /// that names the ranks they came from. Collective.
    pub(crate) fn blame(&self, worker: &Worker, step: u64) -> Result<Error> {
        self.entries.iter().for_each(|entry| entry.node.borrow_mut().roll_back());
        let loss = self.passes_of_step(worker, false)?.loss.f_double_value(&[])?;
        let mut bad = Vec::new();
        for entry in self.entries.iter() {
            if !are_finite(&entry.node.borrow().gradients())? {
                bad.push(entry.uid.clone());
            }
        }
        let rank = worker.rank();
        let flags = gather(&[i64::from(!bad.is_empty())], worker)?.concat();
        let named: Vec<String> = (0..)
            .zip(flags)
            .filter(|(_, flag)| *flag > 0)
            .map(|(rank, _): (usize, _)| rank.to_string())
            .collect();
        let here = match bad.is_empty() {
            true => String::new(),
            false => {
                format!("; here, on rank {rank}, those of `{}`, with a loss of {loss}", bad.join("`, `"))
            }
        };
        let ranks = match named.is_empty() {
            true => "of all ranks together, though of none by itself,".into(),
            false => format!("of rank {}", named.join(", ")),
        };
        Ok(Error::NotFinite(format!(
            "the gradients {ranks} in step {step} are not finite, and were not applied{here}"
        )))
    }

    /// Runs forward and backward over one batch. `first` is the number of samples of the step's
    /// first pass, if this is a later one. Returns the samples of all ranks, the weighted loss, and
    /// the time before this rank waited for others.
    fn pass(&self, worker: &Worker, last: bool, first: Option<u64>) -> Result<(u64, Tensor, Duration)> {
        let begun = Instant::now();
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
                Error::Graph(
                    "a training task selects no loss node: add a LossNode, or LossNode::with_backward if the program goes backward by \
                     itself, let a node of your own say so by Node::goes_backward, or use Task::eval"
                        .into(),
                )
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
        // From here on this rank waits for the others. The hang check treats a rank that has not
        // reached this point as behind.
        if last {
            worker.link().collective();
        } else {
            worker.link().note_activity();
        }
        let own = begun.elapsed();
        // Times all nodes together: the autograd graph of libtorch does not know them.
        self.timed("*", "backward", || ice_c10d::run_backward(&start))?;
        self.each("backward", |node| node.after_backward(last))?;
        self.iteration_end();
        Ok((samples, loss.detach(), own))
    }

    /// Like [`ExecutableGraph::pass`], if nodes run their own backward pass within forward.
    fn pass_with_backward(
        &self,
        worker: &Worker,
        last: bool,
        exchange: bool,
        first: Option<u64>,
    ) -> Result<(u64, Tensor, Duration)> {
        if self.precision.scaler.is_some() {
            return Err(Error::Graph(
                "a gradient scaler needs the backward pass of the step: use LossNode::new, or bfloat16 without a scaler".into(),
            ));
        }
        let begun = Instant::now();
        self.each("before the pass", |node| node.before_pass(false))?;
        let outputs = Outputs::new(self, worker, true);
        let range = self.precision.begin(worker.device())?;
        outputs.run_all()?;
        drop(range);
        let mut factors = Vec::new();
        for entry in self.entries.iter() {
            let mut node = entry.node.borrow_mut();
            if node.take_loss().is_some() {
                return Err(Error::Graph(format!(
                    "`{}` leaves the backward pass to the step, and another node of the task goes backward by itself: \
                     make all losses with LossNode::with_backward, or none",
                    entry.uid
                )));
            }
            factors.extend(node.take_gradient_factor().map(|factor| (entry.uid.as_str(), factor)));
        }
        let (uid, factor) = factors.first().copied().unwrap_or(("", 1.0));
        if let Some((other, _)) = factors.iter().find(|(_, other)| *other != factor) {
            return Err(Error::Graph(format!(
                "the gradients of `{uid}` and `{other}` weigh differently, since their weights or datasets differ: go backward in one node"
            )));
        }
        let samples = outputs.samples();
        let of_first = first.filter(|first| *first > 0).map_or(1.0, |first| samples as f64 / first as f64);
        let (own, last_exchange) = (begun.elapsed(), last && exchange);
        self.each("gradients", |node| node.collect_gradients(factor * of_first, last, last_exchange))?;
        self.iteration_end();
        let losses = self.entries.iter().filter_map(|entry| entry.node.borrow().step_loss());
        let loss = losses.map(|row| row.get(0) / row.get(1)).reduce(|sum, loss| sum + loss);
        let loss = loss.unwrap_or_else(|| Tensor::zeros([], (Kind::Double, worker.device())));
        Ok((samples, loss, own))
    }

    /// Calls a hook on all nodes.
    fn each(&self, phase: &'static str, hook: impl Fn(&mut dyn Node) -> Result<()>) -> Result<()> {
        for entry in self.entries.iter() {
            let run = || hook(&mut *entry.node.borrow_mut());
            let outcome = if phase == "update" { self.timed(&entry.uid, phase, run) } else { run() };
            outcome.map_err(|error| error.at(&entry.uid, phase))?;
        }
        Ok(())
    }

    fn iteration_end(&self) {
        for entry in self.entries.iter() {
            entry.node.borrow_mut().iteration_end();
        }
    }
}

/// Whether all elements are finite. Waits for the device.
fn are_finite(gradients: &[Tensor]) -> Result<bool> {
    let Some(first) = gradients.first() else { return Ok(true) };
    let found = Tensor::f_zeros([], (Kind::Float, first.device()))?;
    unscale(gradients, &found, &found.f_ones_like()?)?;
    Ok(found.f_double_value(&[])? == 0.0)
}
