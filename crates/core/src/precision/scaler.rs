use ice_c10d::amp::{ScaleUpdate, unscale, update_scale};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use crate::{Context, Error, Node, NodeState, Outputs, Result, Value};

/// Scales the loss so that small gradients do not vanish in `Kind::Half`, like
/// `torch.amp.GradScaler` with its defaults. If a gradient of any rank is not finite, all ranks
/// skip the step for all optimizers, and the scale is lowered.
///
/// The scaler is a node of its graph, so that its state is saved with that of the other nodes.
#[derive(Debug)]
pub struct GradScaler {
    first: f64,
    update: ScaleUpdate,
    enabled: bool,
    ready: Option<Ready>,
}

#[derive(Debug)]
struct Ready {
    scale: Tensor,
    growth_tracker: Tensor,
    found_inf: Tensor,
}

/// State in the format of `GradScaler.state_dict()`.
#[derive(Serialize, Deserialize)]
struct State {
    scale: f64,
    growth_tracker: i64,
}

impl Default for GradScaler {
    fn default() -> Self {
        Self::new()
    }
}

impl GradScaler {
    /// Starts with the scale 65,536, doubles it after 2,000 finite steps in a row, and halves it
    /// after a step that is not finite.
    pub fn new() -> Self {
        let update = ScaleUpdate { growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 };
        Self { first: 65536.0, update, enabled: true, ready: None }
    }

    /// Sets the scale of the first step.
    #[must_use]
    pub fn init_scale(mut self, scale: f64) -> Self {
        self.first = scale;
        self
    }

    /// Sets the factor by which the scale grows.
    #[must_use]
    pub fn growth_factor(mut self, factor: f64) -> Self {
        self.update.growth_factor = factor;
        self
    }

    /// Sets the factor of the scale after a skipped step.
    #[must_use]
    pub fn backoff_factor(mut self, factor: f64) -> Self {
        self.update.backoff_factor = factor;
        self
    }

    /// Sets the number of finite steps in a row after which the scale grows.
    #[must_use]
    pub fn growth_interval(mut self, steps: u32) -> Self {
        self.update.growth_interval = steps.into();
        self
    }

    /// Sets whether the scaler does anything.
    #[must_use]
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.enabled = enabled;
        self
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.enabled
    }

    fn ready(&self) -> Result<&Ready> {
        self.ready.as_ref().ok_or_else(|| Error::Graph("the gradient scaler was not set up".into()))
    }

    pub(crate) fn scale(&self, loss: &Tensor) -> Result<Tensor> {
        if !self.enabled {
            return Ok(loss.shallow_clone());
        }
        Ok(loss * &self.ready()?.scale)
    }

    /// Unscales the gradients and updates the scale. Returns whether all gradients are finite, so
    /// that the step counts.
    pub(crate) fn unscale(&self, gradients: &[Tensor]) -> Result<bool> {
        if !self.enabled {
            return Ok(true);
        }
        let ready = self.ready()?;
        let _ = ready.found_inf.shallow_clone().f_zero_()?;
        // Computes the reciprocal in double, like PyTorch: an f32 division may be imprecise on a
        // GPU.
        let inverse = ready.scale.to_kind(Kind::Double).reciprocal().to_kind(Kind::Float);
        // The ranks have already averaged the gradients: if one rank's are not finite, all ranks'
        // are not.
        unscale(gradients, &ready.found_inf, &inverse)?;
        let is_finite = ready.found_inf.f_double_value(&[])? == 0.0;
        update_scale(&ready.scale, &ready.growth_tracker, &ready.found_inf, &self.update)?;
        Ok(is_finite)
    }
}

impl Node for GradScaler {
    fn set_up(&mut self, context: &Context) -> Result<()> {
        let device = context.worker.device();
        self.ready = Some(Ready {
            scale: Tensor::full([], self.first, (Kind::Float, device)),
            growth_tracker: Tensor::zeros([], (Kind::Int, device)),
            found_inf: Tensor::zeros([], (Kind::Float, device)),
        });
        Ok(())
    }

    fn forward(&mut self, _: &Outputs) -> Result<Value> {
        Ok(Value::new(()))
    }

    fn scalars(&self) -> Vec<(String, f64)> {
        let scale = self.ready.as_ref().filter(|_| self.enabled).map(|ready| ready.scale.double_value(&[]));
        scale.map(|scale| ("scale".to_owned(), scale)).into_iter().collect()
    }

    fn state(&self) -> NodeState {
        let state = self.ready.as_ref().map(|ready| State {
            scale: ready.scale.double_value(&[]),
            growth_tracker: ready.growth_tracker.int64_value(&[]),
        });
        NodeState { values: serde_json::to_value(state).unwrap_or(Json::Null), ..NodeState::default() }
    }

    fn check_values(&self, values: &Json) -> Result<()> {
        State::deserialize(values).map(drop).map_err(|error| Error::Resume(error.to_string()))
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        let state = State::deserialize(&saved.values).map_err(|error| Error::Resume(error.to_string()))?;
        let ready = self.ready()?;
        let _ = ready.scale.shallow_clone().f_fill_(state.scale)?;
        let _ = ready.growth_tracker.shallow_clone().f_fill_(state.growth_tracker)?;
        Ok(())
    }
}
