use ice_worker::Worker;
use serde::Deserialize;
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use crate::node::WeightedMean;
use crate::{Context, Error, Measure, Node, NodeState, Outputs, Result, Value};

type Function = dyn Fn(&Outputs) -> Result<Tensor>;

/// A loss: the mean over the samples of the rank, as a scalar. Several losses of a task are summed.
///
/// The loss is scaled by `world size × samples here / samples of all ranks`, since the gradients of the ranks are averaged: so
/// every sample weighs the same, also in an uneven last batch.
pub struct LossNode {
    function: Box<Function>,
    weight: f64,
    pending: Option<Tensor>,
    running: Option<Tensor>,
    samples: f64,
    restored: WeightedMean,
}

impl LossNode {
    /// A loss from the outputs of other nodes.
    pub fn new(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        let function = Box::new(function);
        Self {
            function,
            weight: 1.0,
            pending: None,
            running: None,
            samples: 0.0,
            restored: WeightedMean::default(),
        }
    }

    /// The factor of this loss in the sum.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    fn mean(&self) -> WeightedMean {
        let mut mean = self.restored;
        if let Some(running) = &self.running {
            mean.add(running.double_value(&[]), self.samples);
        }
        mean
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
        let share = x.share();
        if share.here > 0 {
            let sum = tch::no_grad(|| loss.detach().to_kind(Kind::Double) * share.here as f64);
            self.running = Some(match self.running.take() {
                Some(running) => running + sum,
                None => sum,
            });
            self.samples += share.here as f64;
        }
        if x.is_training() {
            let scale = x.worker().world_size() as f64 * share.here as f64 / share.total as f64;
            self.pending = Some(&loss * (self.weight * scale));
        }
        Ok(Value::new(loss))
    }

    fn take_loss(&mut self) -> Option<Tensor> {
        self.pending.take()
    }

    fn epoch_start(&mut self) {
        (self.running, self.samples, self.restored) = (None, 0.0, WeightedMean::default());
    }

    fn epoch_end(&mut self, worker: &Worker) -> Result<Option<Measure>> {
        Ok(Some(Measure { value: self.mean().synchronised(worker)? }))
    }

    fn state(&self) -> NodeState {
        NodeState { values: serde_json::to_value(self.mean()).unwrap_or(Json::Null), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.epoch_start();
        self.restored =
            WeightedMean::deserialize(&saved.values).map_err(|error| Error::Resume(error.to_string()))?;
        Ok(())
    }
}
