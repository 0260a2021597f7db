use ice_worker::Worker;
use serde::Deserialize;
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use crate::node::WeightedMean;
use crate::{Context, Error, Measure, Node, NodeState, Outputs, Result, Value};

type Function = dyn Fn(&Outputs) -> Result<Tensor>;

/// A metric over an epoch: the average of one number per sample, exact over ranks that hold different counts of samples.
pub struct MetricNode {
    function: Box<Function>,
    mean: WeightedMean,
}

impl MetricNode {
    /// The average of what `function` makes: a tensor with one element per sample of this rank, of any dtype that converts
    /// to double; `[n]` with 1 for a hit and 0 for a miss gives an accuracy.
    pub fn average(function: impl Fn(&Outputs) -> Result<Tensor> + 'static) -> Self {
        Self { function: Box::new(function), mean: WeightedMean::default() }
    }
}

impl Node for MetricNode {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, x: &Outputs) -> Result<Value> {
        let values = tch::no_grad(|| (self.function)(x))?;
        if x.share().here > 0 {
            self.mean.add(values.sum(Kind::Double).double_value(&[]), values.numel() as f64);
        }
        Ok(Value::new(values))
    }

    fn epoch_start(&mut self) {
        self.mean = WeightedMean::default();
    }

    fn epoch_end(&mut self, worker: &Worker) -> Result<Option<Measure>> {
        Ok(Some(Measure { value: self.mean.synchronised(worker)? }))
    }

    fn state(&self) -> NodeState {
        NodeState { values: serde_json::to_value(self.mean).unwrap_or(Json::Null), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.mean =
            WeightedMean::deserialize(&saved.values).map_err(|error| Error::Resume(error.to_string()))?;
        Ok(())
    }
}
