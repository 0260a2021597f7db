use ice_c10d::optim::{AdamWStep, fused_adamw};
use tch::{Kind, Tensor};

use crate::Result;
use crate::optim::Optimizer;

/// Adam with decoupled weight decay (Loshchilov and Hutter, 2019), as `torch.optim.AdamW(fused=True)`.
#[derive(Debug)]
pub struct AdamW {
    options: AdamWStep,
    first_moments: Vec<Tensor>,
    second_moments: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl AdamW {
    /// PyTorch's defaults: betas 0.9 and 0.999, weight decay 0.01, epsilon 1e-8.
    pub fn new(learning_rate: f64) -> Self {
        let options = AdamWStep {
            lr: learning_rate,
            beta1: 0.9,
            beta2: 0.999,
            weight_decay: 0.01,
            eps: 1e-8,
            ..AdamWStep::default()
        };
        Self { options, first_moments: Vec::new(), second_moments: Vec::new(), steps: Vec::new() }
    }

    /// Decay rates of the two moments.
    #[must_use]
    pub fn betas(mut self, first: f64, second: f64) -> Self {
        (self.options.beta1, self.options.beta2) = (first, second);
        self
    }

    /// Decay of the weights per step, times the learning rate.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.options.weight_decay = weight_decay;
        self
    }

    /// What keeps the division from zero.
    #[must_use]
    pub fn epsilon(mut self, epsilon: f64) -> Self {
        self.options.eps = epsilon;
        self
    }
}

impl Optimizer for AdamW {
    fn set_up(&mut self, parameters: &[Tensor]) {
        let zeros = || parameters.iter().map(|p| p.detach().zeros_like()).collect();
        (self.first_moments, self.second_moments) = (zeros(), zeros());
        self.steps = parameters.iter().map(|p| Tensor::zeros([], (Kind::Float, p.device()))).collect();
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        for step in &mut self.steps {
            *step += 1.0;
        }
        let (first, second) = (&self.first_moments, &self.second_moments);
        Ok(fused_adamw(parameters, gradients, first, second, &self.steps, &self.options)?)
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        vec![("exp_avg", &self.first_moments), ("exp_avg_sq", &self.second_moments), ("step", &self.steps)]
    }

    fn learning_rate(&self) -> f64 {
        self.options.lr
    }

    fn set_learning_rate(&mut self, learning_rate: f64) {
        self.options.lr = learning_rate;
    }
}
