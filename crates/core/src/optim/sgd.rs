use ice_c10d::optim::{SgdStep, fused_sgd};
use tch::Tensor;

use crate::Result;
use crate::optim::{Field, Optimizer, with_gradient};

/// Stochastic gradient descent with momentum, like `torch.optim.SGD(fused=True)`.
#[derive(Debug)]
pub struct Sgd {
    options: SgdStep,
    momentum_buffers: Vec<Tensor>,
}

impl Sgd {
    /// Creates the optimizer without momentum and weight decay.
    pub fn new(learning_rate: f64) -> Self {
        Self { options: SgdStep { lr: learning_rate, ..SgdStep::default() }, momentum_buffers: Vec::new() }
    }

    /// Sets the share of the last step that the next one keeps.
    #[must_use]
    pub fn momentum(mut self, momentum: f64) -> Self {
        self.options.momentum = momentum;
        self
    }

    /// Sets whether to use Nesterov's momentum, which needs a momentum.
    #[must_use]
    pub fn nesterov(mut self, nesterov: bool) -> Self {
        self.options.nesterov = nesterov;
        self
    }

    /// Sets the L2 penalty.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.options.weight_decay = weight_decay;
        self
    }
}

impl Optimizer for Sgd {
    fn set_up(&mut self, parameters: &[Tensor]) {
        // With zero buffers, the first step equals that of PyTorch without dampening. The state
        // thus needs no flag for the first step.
        if self.options.momentum != 0.0 {
            self.momentum_buffers = parameters.iter().map(|p| p.detach().zeros_like()).collect();
        }
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        // A schedule may set a momentum of 0. The buffers then stay unchanged, like in PyTorch.
        let buffers = if self.options.momentum == 0.0 { &[] } else { &self.momentum_buffers[..] };
        let lists = [parameters, gradients, buffers];
        let chosen = with_gradient(gradients, lists);
        let lists = chosen.as_ref().map_or(lists, |chosen| chosen.each_ref().map(Vec::as_slice));
        let [parameters, gradients, buffers] = lists;
        Ok(fused_sgd(parameters, gradients, buffers, &self.options)?)
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        match self.momentum_buffers.is_empty() {
            true => Vec::new(),
            false => vec![("momentum_buffer", &self.momentum_buffers)],
        }
    }

    fn learning_rate(&self) -> f64 {
        self.options.lr
    }

    fn set_learning_rate(&mut self, learning_rate: f64) {
        self.options.lr = learning_rate;
    }

    fn field(&self, field: Field) -> Option<f64> {
        let has_momentum = self.options.momentum != 0.0 || !self.momentum_buffers.is_empty();
        match field {
            Field::LearningRate => Some(self.options.lr),
            Field::Momentum => has_momentum.then_some(self.options.momentum),
            Field::WeightDecay => Some(self.options.weight_decay),
            _ => None,
        }
    }

    fn set_field(&mut self, field: Field, value: f64) {
        match field {
            Field::LearningRate => self.options.lr = value,
            Field::Momentum => self.options.momentum = value,
            Field::WeightDecay => self.options.weight_decay = value,
            _ => {}
        }
    }
}
