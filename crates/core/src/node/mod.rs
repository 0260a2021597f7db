//! What a graph is made of.

mod dataset;
mod loss;
mod metric;
mod module;
mod probe;
mod stream;
mod value;

use std::any::Any;
use std::collections::BTreeMap;
use std::rc::Rc;

use ice_checkpoint::Part;
use ice_worker::Worker;
use serde_json::Value as Json;
use tch::Tensor;

pub use dataset::DatasetNode;
pub use loss::LossNode;
pub use metric::MetricNode;
pub use module::{ModuleNode, SharedNode, TorchScript};
pub use probe::Probe;
pub use stream::StreamNode;
pub use value::Value;

use crate::optim::RunClock;
use crate::{Error, Outputs, Result};

/// What a node is made ready with.
#[derive(Clone)]
pub struct Context {
    /// The rank that the graph runs on.
    pub worker: Rc<Worker>,
    /// The seed of the run.
    pub seed: u64,
    /// The clock of the run, for schedules of optimizers.
    pub clock: RunClock,
}

impl Context {
    /// The rank and the seed, and a clock that stands still.
    pub fn new(worker: Rc<Worker>, seed: u64) -> Self {
        Self { worker, seed, clock: RunClock::default() }
    }
}

/// A reduction of learning rates, like those of `torch.optim.lr_scheduler.ReduceLROnPlateau`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrReduction {
    /// The factor, below 1.
    pub factor: f64,
    /// The lowest learning rate.
    pub min_lr: f64,
    /// A rate that would change by no more than this stays.
    pub eps: f64,
}

impl LrReduction {
    /// The new learning rate; `None` if it stays.
    pub fn of(&self, rate: f64) -> Option<f64> {
        // `f64::max` would take the bound for a rate that is NaN.
        let reduced = if rate * self.factor < self.min_lr { self.min_lr } else { rate * self.factor };
        (rate - reduced > self.eps).then_some(reduced)
    }
}

/// A round that begins: a time in which the ranks stay the same.
#[derive(Clone)]
pub struct Round {
    /// The rank that the graph runs on: which one of how many it is now, and its process group.
    pub worker: Rc<Worker>,
    /// How many ranks a batch that is given per rank is multiplied by. More than there are after nodes have left a run that keeps its global
    /// batch.
    pub batch_ranks: usize,
    /// What learning rates are multiplied by, compared with what the program gave. 1 unless the global batch changes with the ranks.
    pub lr_factor: f64,
    /// Whether the state comes later, by [`Node::load_state`], or is that of the beginning. Otherwise it is the same on all ranks now.
    pub is_fresh: bool,
}

/// How the samples of one iteration are spread over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Samples of this rank. 0 where fewer samples are left than there are ranks: the rank then computes on one that
    /// counts for nothing, so that it takes part in the collectives.
    pub here: u64,
    /// Samples of all ranks.
    pub total: u64,
}

impl Share {
    /// Whether a mean over these samples weighs as much on this rank as one over the others.
    pub(crate) fn is_spread_like(&self, other: &Self) -> bool {
        u128::from(self.here) * u128::from(other.total) == u128::from(other.here) * u128::from(self.total)
    }
}

/// What a node measured in an epoch, over all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Measure {
    /// The value, which goes by the uid of the node.
    pub value: f64,
    /// What there is beside it, which goes by the uid, `.` and the name given here.
    pub parts: Vec<(String, f64)>,
}

impl Measure {
    /// Everything, by what it goes by.
    pub(crate) fn named<'a>(&'a self, uid: &'a str) -> impl Iterator<Item = (String, f64)> + 'a {
        let parts = self.parts.iter().map(move |(part, value)| (format!("{uid}.{part}"), *value));
        std::iter::once((uid.to_owned(), self.value)).chain(parts)
    }
}

impl From<f64> for Measure {
    fn from(value: f64) -> Self {
        Self { value, parts: Vec::new() }
    }
}

/// A node of a [`HyperGraph`](crate::HyperGraph). Only [`Node::set_up`] and [`Node::forward`] must be written.
///
/// A run has one round or several: when a rank is lost, or nodes come or go, the others keep their nodes and go on with them in the next
/// round. All ranks have the same state when [`Node::enter_round`] is called, but for what each has measured alone, unless it comes later.
///
/// In a training step the hooks run in this order, each on all nodes: `before_step`, for each pass `before_pass`, `forward` (lazily),
/// `take_loss`, `before_backward`, `after_backward` and `iteration_end`, then `update` and `step_end`. There is one pass, unless gradients are
/// accumulated. A step that is not finished, since a rank is lost, ends with `roll_back` instead, and is done again. In a task with
/// a node that [goes backward](Node::goes_backward) by itself, `take_gradient_factor` and `collect_gradients` follow `forward` in each
/// pass, in place of the hooks from `before_backward` to `after_backward`.
pub trait Node: Any {
    /// Makes the node ready on the device of the rank; called once, on every rank, in the same order. Which rank that is of how many may not
    /// be known yet, and there are no collectives.
    ///
    /// # Errors
    /// Whatever keeps it from being ready.
    fn set_up(&mut self, context: &Context) -> Result<()>;

    /// Makes the output of this iteration.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    fn forward(&mut self, x: &Outputs) -> Result<Value>;

    /// A round begins. Collective.
    ///
    /// # Errors
    /// Whatever keeps the node from taking part in it.
    fn enter_round(&mut self, _round: &Round) -> Result<()> {
        Ok(())
    }

    /// The round is over: drop all that holds on to its process group.
    fn leave_round(&mut self) {}

    /// A task begins that runs this node, and the one before it did not.
    ///
    /// # Errors
    /// Whatever keeps it from running.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// A task begins that does not run this node, and the one before it did; or the run ends.
    ///
    /// # Errors
    /// Whatever could not be cleaned up.
    fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }

    /// Iterations left in the epoch, for a node that has a size.
    fn remaining(&self) -> Option<u64> {
        None
    }

    /// Samples of all ranks in the next iterations of the epoch, for a dataset that knows them. In a step of several passes a loss over
    /// its samples weighs each of them the same, whatever other datasets the task has.
    fn samples_ahead(&self, _iterations: u64) -> Option<u64> {
        None
    }

    /// An epoch begins.
    fn epoch_start(&mut self) {}

    /// An epoch ended: what was measured, over all ranks. Called on every rank, in the same order, after [`Node::sync_measures`] of all
    /// nodes, and on those with a size last.
    ///
    /// # Errors
    /// The failure of a collective.
    fn epoch_end(&mut self, _worker: &Worker) -> Result<Option<Measure>> {
        Ok(None)
    }

    /// A training step begins.
    ///
    /// # Errors
    /// Whatever keeps it from beginning.
    fn before_step(&mut self) -> Result<()> {
        Ok(())
    }

    /// A forward pass of the step begins. The ranks exchange gradients in the last one.
    ///
    /// # Errors
    /// The failure of a collective.
    fn before_pass(&mut self, _last: bool) -> Result<()> {
        Ok(())
    }

    /// The loss that this node adds to the step, scaled so that the average of the ranks' gradients is the gradient of the
    /// average over all samples.
    fn take_loss(&mut self) -> Option<Tensor> {
        None
    }

    /// The backward pass from `loss` (a scalar) begins.
    ///
    /// # Errors
    /// The failure of a collective.
    fn before_backward(&mut self, _loss: &Tensor, _last: bool) -> Result<()> {
        Ok(())
    }

    /// The backward pass is through.
    ///
    /// # Errors
    /// The failure of a collective.
    fn after_backward(&mut self, _last: bool) -> Result<()> {
        Ok(())
    }

    /// Whether the node trains by itself: [`Node::forward`] goes backward in training, from whatever it likes and as often as it likes, or
    /// the node computes an update without gradients (`update`). The task then needs no loss, and the step applies the gradients that are
    /// there after `forward`. A [`ModuleNode`] averages its gradients over the ranks, and a node with parameters of its own does so in
    /// [`Node::collect_gradients`]. Called once when a task selects its nodes.
    ///
    /// ```
    /// use ice_core::{Context, Node, Outputs, Result, Value};
    /// use tch::Kind;
    ///
    /// /// Two backward passes in a step, through the module nodes `actor` and `critic`, which have optimizers.
    /// struct Learner;
    ///
    /// impl Node for Learner {
    ///     fn set_up(&mut self, _: &Context) -> Result<()> {
    ///         Ok(())
    ///     }
    ///
    ///     fn forward(&mut self, x: &Outputs) -> Result<Value> {
    ///         if x.is_training() {
    ///             for name in ["actor", "critic"] {
    ///                 x.tensor(name)?.square().mean(Kind::Float).f_backward()?;
    ///             }
    ///         }
    ///         Ok(Value::new(()))
    ///     }
    ///
    ///     fn goes_backward(&self) -> bool {
    ///         true
    ///     }
    /// }
    /// ```
    fn goes_backward(&self) -> bool {
        false
    }

    /// The factor of the gradients that [`Node::forward`] has made in this pass, if it [goes backward](Node::goes_backward) by itself: with it, the
    /// average of the ranks' gradients is the gradient of the average over all samples.
    fn take_gradient_factor(&mut self) -> Option<f64> {
        None
    }

    /// In a pass whose gradients a node has made by itself: multiplies them by a factor, and adds them to those of the passes before. After
    /// the last pass the ranks average the sums, unless `exchange` is false.
    ///
    /// # Errors
    /// The failure of a collective.
    fn collect_gradients(&mut self, _factor: f64, _last: bool, _exchange: bool) -> Result<()> {
        Ok(())
    }

    /// The gradients of all passes, averaged over the ranks, which may still be scaled.
    fn gradients(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// The parameters whose gradients are sparse, which can neither be averaged nor applied: asked for when a step has failed.
    fn sparse_gradients(&self) -> Vec<String> {
        Vec::new()
    }

    /// The gradients are there, and finite where that is looked at: apply them.
    ///
    /// # Errors
    /// The failure of the update.
    fn update(&mut self) -> Result<()> {
        Ok(())
    }

    /// Reduces the learning rates of the node's optimizers. Returns the number of optimizers. The rates are a part of the state.
    fn reduce_learning_rates(&mut self, _reduction: &LrReduction) -> usize {
        0
    }

    /// The batch is used up.
    fn iteration_end(&mut self) {}

    /// Batches that the iteration still has, the present one included. More than one where it has more samples than the ranks take at a time.
    fn parts_left(&self) -> u64 {
        1
    }

    /// The training step, or the iteration of an evaluation, counts. What was measured in it becomes a part of the state.
    ///
    /// # Errors
    /// Whatever keeps it from counting.
    fn step_end(&mut self) -> Result<()> {
        Ok(())
    }

    /// The training step that was begun does not count, or the epoch of an evaluation: go back to where it began.
    fn roll_back(&mut self) {}

    /// Whether [`NodeState::values`] are sums of all ranks up to the last synchronisation, beside which each rank has its own.
    fn is_measure(&self) -> bool {
        false
    }

    /// Takes in what the other ranks have measured so far in the epoch, so that the state of each rank holds for all. Called before a
    /// checkpoint and at the end of an epoch, on every rank, in the same order; again where it failed on one of them.
    ///
    /// # Errors
    /// The failure of a collective.
    fn sync_measures(&mut self, _worker: &Worker) -> Result<()> {
        Ok(())
    }

    /// What there is to see of the last step beside losses: learning rates, norms.
    fn scalars(&self) -> Vec<(String, f64)> {
        Vec::new()
    }

    /// The loss of the last training step, as `[sum over this rank's samples, samples]` of `Kind::Double`.
    fn step_loss(&self) -> Option<Tensor> {
        None
    }

    /// Tensors whose elements are to be shown as histograms at the end of a training epoch, by name.
    fn histograms(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// What a checkpoint must hold of this node. The tensors share memory with the node's own: a checkpoint is loaded into them.
    fn state(&self) -> NodeState {
        NodeState::default()
    }

    /// Whether ranks hold different parts of this node's state. The same on every rank.
    fn is_sharded(&self) -> bool {
        false
    }

    /// Whether the step that was begun has changed the state in a way that [`Node::roll_back`] cannot undo, which only a node whose update is
    /// collective needs to do. The state is then of no use.
    fn is_torn(&self) -> bool {
        false
    }

    /// Whether a checkpoint without [`NodeState::values`] of this node, which has some, does not fit.
    fn requires_values(&self) -> bool {
        true
    }

    /// Whether a run may resume although the [`NodeState::values`] that are saved of this node do not fit it, or are missing (null): the node then begins
    /// at its beginning. True of measures, whose values are those of the epoch that was under way.
    fn may_begin_after(&self, _saved: &Json) -> bool {
        self.is_measure()
    }

    /// Checks that [`Node::load_state`] will take these values. Nothing is changed.
    ///
    /// # Errors
    /// [`Error::Resume`] says what does not fit.
    fn check_values(&self, _values: &Json) -> Result<()> {
        Ok(())
    }

    /// Takes over what a checkpoint holds. The tensors are those that [`Node::state`] gave, filled; one that the checkpoint does
    /// not have, where that is allowed, is as it was.
    ///
    /// # Errors
    /// [`Error::Resume`] names what is missing, unexpected or of another shape.
    fn load_state(&mut self, _saved: &NodeState) -> Result<()> {
        Ok(())
    }
}

/// The state of a node: tensors by name, and whatever else fits into JSON.
///
/// A tensor may be a piece of a larger one that several ranks hold together: its [`Part`] says so. The checkpoint then has the
/// whole, in files of all these ranks, and gives each rank of a later run the piece that this one asks for.
#[derive(Default)]
pub struct NodeState {
    /// Parameters and buffers, named as PyTorch would.
    pub model: Vec<(String, Tensor)>,
    /// State of the optimizer.
    pub optimizer: Vec<(String, Tensor)>,
    /// Which of the model's tensors are pieces, by name.
    pub model_parts: BTreeMap<String, Part>,
    /// Which of the optimizer's tensors are pieces, by name.
    pub optimizer_parts: BTreeMap<String, Part>,
    /// Positions and sums; null for none.
    pub values: Json,
}

/// Whether the saved position of a dataset is at the beginning of a pass; also if none is saved.
pub(crate) fn is_between_passes(saved: &Json) -> bool {
    saved.is_null() || ["cursor", "iteration"].iter().all(|place| saved[place] == 0)
}

/// Copies saved tensors into those of a node; both must have the same names and shapes.
pub(crate) fn copy_tensors(saved: &[(String, Tensor)], own: &[(String, Tensor)], what: &str) -> Result<()> {
    let missing: Vec<_> = own
        .iter()
        .filter(|(name, _)| !saved.iter().any(|(key, _)| key == name))
        .map(|(name, _)| name)
        .collect();
    let unexpected: Vec<_> = saved
        .iter()
        .filter(|(name, _)| !own.iter().any(|(key, _)| key == name))
        .map(|(name, _)| name)
        .collect();
    if !missing.is_empty() || !unexpected.is_empty() {
        return Err(Error::Resume(format!(
            "the {what} of the checkpoint do not fit: missing {missing:?}, unexpected {unexpected:?}"
        )));
    }
    for (name, tensor) in own {
        let (_, value) = saved
            .iter()
            .find(|(key, _)| key == name)
            .ok_or_else(|| Error::Resume(format!("`{name}` is missing")))?;
        if value.size() != tensor.size() || value.kind() != tensor.kind() {
            return Err(Error::Resume(format!(
                "`{name}` is {:?} of shape {:?} in the checkpoint and {:?} of shape {:?} here",
                value.kind(),
                value.size(),
                tensor.kind(),
                tensor.size()
            )));
        }
        tch::no_grad(|| tensor.shallow_clone().f_copy_(value))?;
    }
    Ok(())
}
