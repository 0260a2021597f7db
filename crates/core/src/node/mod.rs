//! The nodes of a graph.

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

/// Context of a node's set-up.
#[derive(Clone)]
pub struct Context {
    /// The rank that the graph runs on.
    pub worker: Rc<Worker>,
    /// Seed of the run.
    pub seed: u64,
    /// Clock of the run, for schedules of optimizers.
    pub clock: RunClock,
}

impl Context {
    /// Creates a context with a clock that does not advance.
    pub fn new(worker: Rc<Worker>, seed: u64) -> Self {
        Self { worker, seed, clock: RunClock::default() }
    }
}

/// A reduction of learning rates, like those of `torch.optim.lr_scheduler.ReduceLROnPlateau`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrReduction {
    /// Factor of the learning rate, below 1.
    pub factor: f64,
    /// Lowest learning rate.
    pub min_lr: f64,
    /// Smallest change: a rate that would change by no more than this stays.
    pub eps: f64,
}

impl LrReduction {
    /// Returns the new learning rate, or `None` if it stays.
    pub fn of(&self, rate: f64) -> Option<f64> {
        // `f64::max` would return `min_lr` for a rate that is NaN.
        let reduced = if rate * self.factor < self.min_lr { self.min_lr } else { rate * self.factor };
        (rate - reduced > self.eps).then_some(reduced)
    }
}

/// A round that begins: a period with a fixed set of ranks.
#[derive(Clone)]
pub struct Round {
    /// The rank that the graph runs on, with its number, world size and process group in this
    /// round.
    pub worker: Rc<Worker>,
    /// Factor from a batch per rank to the global batch. It exceeds the world size after nodes have
    /// left a run that keeps its global batch.
    pub batch_ranks: usize,
    /// Factor of the learning rates, relative to those of the program. 1 unless the global batch
    /// changes with the ranks.
    pub lr_factor: f64,
    /// Whether the state is the initial one, or is loaded later by [`Node::load_state`]. If false,
    /// it is already the same on all ranks.
    pub is_fresh: bool,
}

/// Distribution of the samples of one iteration over the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShare {
    /// Samples of this rank. 0 if fewer samples are left than there are ranks. The rank then
    /// computes on one sample that does not count, so that it takes part in the collectives.
    pub here: u64,
    /// Samples of all ranks.
    pub total: u64,
}

impl BatchShare {
    /// Whether a mean over these samples has the same weight on this rank as a mean over the
    /// others.
    pub(crate) fn is_spread_like(&self, other: &Self) -> bool {
        u128::from(self.here) * u128::from(other.total) == u128::from(other.here) * u128::from(self.total)
    }
}

/// Result that a node measured in an epoch, over all ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Measure {
    /// Main value, named by the uid of the node.
    pub value: f64,
    /// Further values, named by the uid, `.` and the name given here.
    pub parts: Vec<(String, f64)>,
}

impl Measure {
    /// Returns all values with their names.
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

/// A node of a [`HyperGraph`](crate::HyperGraph). Only [`Node::set_up`] and [`Node::forward`] are
/// required.
///
/// A run has one or more rounds. When a rank is lost, or nodes join or leave, the other ranks keep
/// their nodes and continue with them in the next round. When [`Node::enter_round`] is called, all
/// ranks have the same state, or it is loaded later. Exception: measures that a rank has not yet
/// shared.
///
/// In a training step the hooks run in this order, each on all nodes:
///
/// 1. `before_step`
/// 2. for each pass: `before_pass`, `forward` (lazily), `take_loss`, `before_backward`,
///    `after_backward` and `iteration_end`
/// 3. `update` and `step_end`
///
/// A step has one pass, unless gradients are accumulated or a batch is divided. A step that is
/// interrupted because a rank is lost ends with `roll_back` instead, and is repeated. If a node of
/// the task [runs backward](Node::goes_backward) itself, each pass calls `take_gradient_factor` and
/// `collect_gradients` after `forward`, instead of the hooks from `before_backward` to
/// `after_backward`.
pub trait Node: Any {
    /// Sets up the node on the device of the rank. Called once on every rank, in the same order.
    /// The rank's number and the world size may not be known yet, and collectives are not
    /// available.
    ///
    /// # Errors
    /// The failure of the set-up.
    fn set_up(&mut self, context: &Context) -> Result<()>;

    /// Computes the output of this iteration.
    ///
    /// # Errors
    /// The failure of the computation.
    fn forward(&mut self, x: &Outputs) -> Result<Value>;

    /// Prepares the node for a round that begins. Collective.
    ///
    /// # Errors
    /// The reason that the node cannot take part in the round.
    fn enter_round(&mut self, _round: &Round) -> Result<()> {
        Ok(())
    }

    /// Drops everything that holds on to the process group of the round, which is over.
    fn leave_round(&mut self) {}

    /// Prepares the node for a task that runs it, after a task that did not.
    ///
    /// # Errors
    /// The reason that the node cannot run.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// Cleans up before a task that does not run the node, after a task that did; or at the end of
    /// the run.
    ///
    /// # Errors
    /// The failure of the clean-up.
    fn clean_up(&mut self) -> Result<()> {
        Ok(())
    }

    /// Returns the remaining iterations of the epoch, for a node that has a size.
    fn remaining(&self) -> Option<u64> {
        None
    }

    /// Returns the samples of all ranks in the next `iterations` iterations of the epoch, for a
    /// dataset that knows them. In a step of several passes, a loss over the dataset then weights
    /// each of its samples the same, regardless of other datasets in the task.
    fn samples_ahead(&self, _iterations: u64) -> Option<u64> {
        None
    }

    /// Begins an epoch.
    fn epoch_start(&mut self) {}

    /// Ends an epoch, and returns its measure over all ranks. Called on every rank, in the same
    /// order, after [`Node::sync_measures`] of all nodes. Nodes with a size are called last.
    ///
    /// # Errors
    /// The failure of a collective.
    fn epoch_end(&mut self, _worker: &Worker) -> Result<Option<Measure>> {
        Ok(None)
    }

    /// Begins a training step.
    ///
    /// # Errors
    /// The reason that the step cannot begin.
    fn before_step(&mut self) -> Result<()> {
        Ok(())
    }

    /// Begins a forward pass of the step. In the pass with `last`, the ranks exchange gradients.
    ///
    /// # Errors
    /// The failure of a collective.
    fn before_pass(&mut self, _last: bool) -> Result<()> {
        Ok(())
    }

    /// Takes the loss that this node adds to the step. It is scaled so that the average of the
    /// ranks' gradients is the gradient of the average over all samples.
    fn take_loss(&mut self) -> Option<Tensor> {
        None
    }

    /// Prepares for the backward pass from `loss` (a scalar).
    ///
    /// # Errors
    /// The failure of a collective.
    fn before_backward(&mut self, _loss: &Tensor, _last: bool) -> Result<()> {
        Ok(())
    }

    /// Finishes the backward pass.
    ///
    /// # Errors
    /// The failure of a collective.
    fn after_backward(&mut self, _last: bool) -> Result<()> {
        Ok(())
    }

    /// Whether the node trains by itself. Either [`Node::forward`] runs backward in training, from
    /// any tensors and any number of times, or the node computes an update without gradients
    /// (`update`). The task then needs no loss, and the step applies the gradients that exist after
    /// `forward`. A [`ModuleNode`] averages its gradients over the ranks. A node with its own
    /// parameters must do so in [`Node::collect_gradients`]. Called once when a task selects its
    /// nodes.
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

    /// Takes the factor of the gradients that [`Node::forward`] has made in this pass, if the node
    /// [runs backward](Node::goes_backward) itself. With this factor, the average of the ranks'
    /// gradients is the gradient of the average over all samples.
    fn take_gradient_factor(&mut self) -> Option<f64> {
        None
    }

    /// Multiplies the gradients that a node has made itself in this pass by a factor, and adds them
    /// to those of the previous passes. After the last pass the ranks average the sums, unless
    /// `exchange` is false.
    ///
    /// # Errors
    /// The failure of a collective.
    fn collect_gradients(&mut self, _factor: f64, _last: bool, _exchange: bool) -> Result<()> {
        Ok(())
    }

    /// Returns the gradients of all passes, averaged over the ranks. They may still be scaled.
    fn gradients(&self) -> Vec<Tensor> {
        Vec::new()
    }

    /// Returns the parameters with sparse gradients, which can neither be averaged nor applied.
    /// Called after a step has failed.
    fn sparse_gradients(&self) -> Vec<String> {
        Vec::new()
    }

    /// Applies the gradients. They are complete, and finite if the run checks that.
    ///
    /// # Errors
    /// The failure of the update.
    fn update(&mut self) -> Result<()> {
        Ok(())
    }

    /// Reduces the learning rates of the node's optimizers. Returns the number of optimizers. The
    /// rates are part of the state.
    fn reduce_learning_rates(&mut self, _reduction: &LrReduction) -> usize {
        0
    }

    /// Drops the batch of the iteration, which is used up.
    fn iteration_end(&mut self) {}

    /// Returns the number of batches that remain in the iteration, including the current one. More
    /// than one if the iteration has more samples than the ranks process at a time.
    fn parts_left(&self) -> u64 {
        1
    }

    /// Counts the training step, or the iteration of an evaluation. Its measurements become part of
    /// the state.
    ///
    /// # Errors
    /// The reason that the step cannot count.
    fn step_end(&mut self) -> Result<()> {
        Ok(())
    }

    /// Returns to the start of a training step, or of an epoch of an evaluation, that does not
    /// count.
    fn roll_back(&mut self) {}

    /// Whether [`NodeState::values`] are sums of all ranks up to the last synchronization. In
    /// addition, each rank has its own sums since then.
    fn is_measure(&self) -> bool {
        false
    }

    /// Adds the measurements of the other ranks in the current epoch, so that each rank's state
    /// covers all ranks. Called before a checkpoint and at the end of an epoch, on every rank, in
    /// the same order. If it fails on one rank, it is called again.
    ///
    /// # Errors
    /// The failure of a collective.
    fn sync_measures(&mut self, _worker: &Worker) -> Result<()> {
        Ok(())
    }

    /// Returns scalars of the last step other than losses, to be shown: learning rates, norms.
    fn scalars(&self) -> Vec<(String, f64)> {
        Vec::new()
    }

    /// Returns the loss of the last training step, as `[sum over this rank's samples, samples]` of
    /// `Kind::Double`.
    fn step_loss(&self) -> Option<Tensor> {
        None
    }

    /// Returns tensors by name, whose elements are shown as histograms at the end of a training
    /// epoch.
    fn histograms(&self) -> Vec<(String, Tensor)> {
        Vec::new()
    }

    /// Returns the state of this node for a checkpoint. The tensors share memory with the node's
    /// own, and a checkpoint is loaded into them.
    fn state(&self) -> NodeState {
        NodeState::default()
    }

    /// Whether ranks hold different shards of this node's state. The same on every rank.
    fn is_sharded(&self) -> bool {
        false
    }

    /// Whether the unfinished step has changed the state in a way that [`Node::roll_back`] cannot
    /// undo. The state is then unusable. Only a node with a collective update needs to implement
    /// this.
    fn is_partially_updated(&self) -> bool {
        false
    }

    /// Whether a checkpoint must contain the [`NodeState::values`] of this node, if the node has
    /// any.
    fn requires_values(&self) -> bool {
        true
    }

    /// Whether a run may resume if the saved [`NodeState::values`] of this node do not fit, or are
    /// missing (null). The node then starts from its initial state. True for measures, whose values
    /// belong to the unfinished epoch.
    fn may_begin_after(&self, _saved: &Json) -> bool {
        self.is_measure()
    }

    /// Checks that [`Node::load_state`] would accept these values. Changes nothing.
    ///
    /// # Errors
    /// [`Error::Resume`] names what does not fit.
    fn check_values(&self, _values: &Json) -> Result<()> {
        Ok(())
    }

    /// Loads the state of a checkpoint. The tensors are those of [`Node::state`], filled. A tensor
    /// that the checkpoint does not have is unchanged, if the load permits that.
    ///
    /// # Errors
    /// [`Error::Resume`] names what is missing, unexpected or of another shape.
    fn load_state(&mut self, _saved: &NodeState) -> Result<()> {
        Ok(())
    }
}

/// The state of a node: tensors by name, and other values as JSON.
///
/// A tensor may be a piece of a larger tensor that several ranks hold together, described by a
/// [`Part`]. The checkpoint then contains the whole tensor, in the files of all these ranks. Each
/// rank of a later run gets the piece that it asks for.
#[derive(Default)]
pub struct NodeState {
    /// Parameters and buffers, with PyTorch's names.
    pub model: Vec<(String, Tensor)>,
    /// State of the optimizer.
    pub optimizer: Vec<(String, Tensor)>,
    /// The model's tensors that are pieces, by name.
    pub model_parts: BTreeMap<String, Part>,
    /// The optimizer's tensors that are pieces, by name.
    pub optimizer_parts: BTreeMap<String, Part>,
    /// Positions and sums. Null if there are none.
    pub values: Json,
}

/// Whether the saved position of a dataset is at the start of a pass, or no position is saved.
pub(crate) fn is_between_passes(saved: &Json) -> bool {
    saved.is_null() || ["cursor", "iteration"].iter().all(|place| saved[place] == 0)
}

/// Copies saved tensors into those of a node. Both must have the same names and shapes.
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
