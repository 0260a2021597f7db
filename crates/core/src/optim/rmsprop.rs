use ice_c10d::optim::{RmspropStep, foreach_rmsprop};
use tch::Tensor;

use crate::Result;
use crate::optim::{Field, Optimizer, with_gradient};

/// RMSprop (Hinton, 2012), like `torch.optim.RMSprop(foreach=True)`.
#[derive(Debug)]
pub struct RmsProp {
    options: RmspropStep,
    centered: bool,
    square_averages: Vec<Tensor>,
    gradient_averages: Vec<Tensor>,
    momentum_buffers: Vec<Tensor>,
}

impl RmsProp {
    /// Creates the optimizer with PyTorch's defaults: alpha 0.99, epsilon 1e-8, no momentum, no
    /// penalty, not centered.
    pub fn new(learning_rate: f64) -> Self {
        Self {
            options: RmspropStep { lr: learning_rate, alpha: 0.99, eps: 1e-8, ..RmspropStep::default() },
            centered: false,
            square_averages: Vec::new(),
            gradient_averages: Vec::new(),
            momentum_buffers: Vec::new(),
        }
    }

    /// Sets the decay rate of the average of squares.
    #[must_use]
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.options.alpha = alpha;
        self
    }

    /// Sets the term that keeps the division from zero.
    #[must_use]
    pub fn epsilon(mut self, epsilon: f64) -> Self {
        self.options.eps = epsilon;
        self
    }

    /// Sets the share of the last update that the next one keeps.
    #[must_use]
    pub fn momentum(mut self, momentum: f64) -> Self {
        self.options.momentum = momentum;
        self
    }

    /// Sets the L2 penalty, which is added to the gradient.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.options.weight_decay = weight_decay;
        self
    }

    /// Sets whether to divide by an estimate of the variance instead of the mean square.
    #[must_use]
    pub fn centered(mut self, centered: bool) -> Self {
        self.centered = centered;
        self
    }
}

impl Optimizer for RmsProp {
    fn set_up(&mut self, parameters: &[Tensor]) {
        let zeros = |wanted: bool| match wanted {
            true => parameters.iter().map(|p| p.detach().zeros_like()).collect(),
            false => Vec::new(),
        };
        self.square_averages = zeros(true);
        self.gradient_averages = zeros(self.centered);
        self.momentum_buffers = zeros(self.options.momentum != 0.0);
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        // A schedule may set a momentum of 0. The buffers then stay unchanged, like in PyTorch.
        let buffers = if self.options.momentum == 0.0 { &[] } else { &self.momentum_buffers[..] };
        let lists = [parameters, gradients, &self.square_averages, &self.gradient_averages, buffers];
        let chosen = with_gradient(gradients, lists);
        let lists = chosen.as_ref().map_or(lists, |chosen| chosen.each_ref().map(Vec::as_slice));
        let [parameters, gradients, squares, averages, buffers] = lists;
        Ok(foreach_rmsprop(parameters, gradients, squares, averages, buffers, &self.options)?)
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        let slots: [(&'static str, &[Tensor]); 3] = [
            ("square_avg", &self.square_averages),
            ("grad_avg", &self.gradient_averages),
            ("momentum_buffer", &self.momentum_buffers),
        ];
        slots.into_iter().filter(|(_, tensors)| !tensors.is_empty()).collect()
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
            Field::Alpha => Some(self.options.alpha),
            Field::WeightDecay => Some(self.options.weight_decay),
            Field::Epsilon => Some(self.options.eps),
            _ => None,
        }
    }

    fn set_field(&mut self, field: Field, value: f64) {
        match field {
            Field::LearningRate => self.options.lr = value,
            Field::Momentum => self.options.momentum = value,
            Field::Alpha => self.options.alpha = value,
            Field::WeightDecay => self.options.weight_decay = value,
            Field::Epsilon => self.options.eps = value,
            _ => {}
        }
    }
}
