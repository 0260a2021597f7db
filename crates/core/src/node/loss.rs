use ice_worker::Worker;
use tch::{Kind, Tensor};

use crate::meter::Sums;
use crate::{Context, Error, Measure, Node, NodeState, Outputs, Result, Value};

type Function = dyn Fn(&Outputs) -> Result<Tensor>;

/// A loss: the mean over the samples of the rank, as a scalar. The losses of a task are summed.
///
/// The ranks average their gradients. The loss is therefore scaled by `world size × samples here /
/// samples of all ranks`, so that every sample has the same weight, also in an uneven last batch
/// and in a step of several batches. The samples are those of the dataset that the loss depends on,
/// directly or through other nodes. A loss without a dataset has the same weight on all ranks. If a
/// loss depends on several datasets, [`LossNode::samples_of`] selects the one that counts.
pub struct LossNode {
    function: Box<Function>,
    weight: f64,
    samples_of: Option<String>,
    goes_backward: bool,
    pending: Option<Tensor>,
    /// Factor of the gradients of this pass.
    factor: Option<f64>,
    /// Sums of the epoch: the loss, summed over samples, and the samples.
    epoch: Sums,
    /// The same sums for the passes of one step.
    step: Option<Tensor>,
    /// Whether the sums of the epoch include the step.
    is_counted: bool,
}

impl LossNode {
    /// Creates a loss from the outputs of other nodes.
    pub fn new(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        Self {
            function: Box::new(function),
            weight: 1.0,
            samples_of: None,
            goes_backward: false,
            pending: None,
            factor: None,
            epoch: Sums::doubles(2),
            step: None,
            is_counted: false,
        }
    }

    /// Creates a loss whose closure runs backward itself in a training step (`x.is_training()`),
    /// any number of times and from any tensors. The step then applies the gradients that the
    /// closure has left, averaged over the ranks and weighted by samples like those of any loss.
    /// The value that the closure returns is only measured and shown.
    ///
    /// In a training task, either all losses run backward themselves, or none. A
    /// [`GradScaler`](crate::GradScaler) needs losses that do not.
    ///
    /// ```
    /// use ice_core::LossNode;
    /// // Two backward passes in one step.
    /// let loss = LossNode::with_backward(|x| {
    ///     let (policy, value) = (x.tensor("policy loss")?, x.tensor("value loss")?);
    ///     if x.is_training() {
    ///         policy.f_backward()?;
    ///         (&value * 0.5).f_backward()?;
    ///     }
    ///     Ok(policy + value)
    /// });
    /// ```
    pub fn with_backward(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        Self { goes_backward: true, ..Self::new(function) }
    }

    /// Sets the factor of this loss in the sum.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// Sets the dataset whose samples the loss is a mean over. Default: the dataset that the loss
    /// depends on.
    #[must_use]
    pub fn samples_of(mut self, dataset: impl Into<String>) -> Self {
        self.samples_of = Some(dataset.into());
        self
    }
}

impl Node for LossNode {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let loss = (self.function)(x)?;
        if !loss.size().is_empty() {
            return Err(Error::Graph(format!("a loss must be a scalar, not of shape {:?}", loss.size())));
        }
        let (share, correction) = x.share_of_loss(self.samples_of.as_deref())?;
        let row = sum_and_samples(&loss, share.here)?;
        let is_new = std::mem::take(&mut self.is_counted);
        self.step = Some(match self.step.take().filter(|_| !is_new) {
            Some(passes) => passes + row,
            None => row,
        });
        if x.is_training() {
            let scale = x.worker().world_size() as f64 * share.here as f64 / share.total as f64;
            let factor = self.weight * scale * correction;
            if self.goes_backward {
                self.factor = Some(factor);
                return Ok(Value::new(loss.detach()));
            }
            // A loss with the factor 1 needs no multiplication, forward or backward.
            self.pending = Some(if factor == 1.0 { loss.shallow_clone() } else { &loss * factor });
        }
        Ok(Value::new(loss))
    }

    fn before_step(&mut self) -> Result<()> {
        self.step = None;
        Ok(())
    }

    fn step_loss(&self) -> Option<Tensor> {
        self.step.as_ref().map(Tensor::shallow_clone)
    }

    fn step_end(&mut self) -> Result<()> {
        match &self.step {
            Some(step) if !self.is_counted => {
                self.is_counted = true;
                self.epoch.add(step)
            }
            _ => Ok(()),
        }
    }

    fn roll_back(&mut self) {
        (self.step, self.pending, self.factor) = (None, None, None);
    }

    fn is_measure(&self) -> bool {
        true
    }

    fn take_loss(&mut self) -> Option<Tensor> {
        self.pending.take()
    }

    fn goes_backward(&self) -> bool {
        self.goes_backward
    }

    fn take_gradient_factor(&mut self) -> Option<f64> {
        self.factor.take()
    }

    fn epoch_start(&mut self) {
        self.epoch.clear();
    }

    fn epoch_end(&mut self, _: &Worker) -> Result<Option<Measure>> {
        let sums = self.epoch.values()?;
        Ok(Some((sums[0] / sums[1]).into()))
    }

    fn sync_measures(&mut self, worker: &Worker) -> Result<()> {
        self.epoch.sync(worker)
    }

    fn state(&self) -> NodeState {
        NodeState { values: self.epoch.state(), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.epoch.load_state(&saved.values)
    }
}

/// Returns `[sum, samples]` of a mean over this many samples.
fn sum_and_samples(loss: &Tensor, samples: u64) -> Result<Tensor> {
    tch::no_grad(|| {
        let loss = loss.detach().f_to_kind(Kind::Double)?;
        // 0 times an infinite loss would be NaN, so zero samples add a plain 0.
        let sum = if samples == 0 { loss.zeros_like() } else { loss * samples as f64 };
        let samples = Tensor::full([], samples as f64, (Kind::Double, sum.device()));
        Ok(Tensor::f_stack(&[sum, samples], 0)?)
    })
}
