use ice_c10d::optim::{AdamState, AdamStep, fused_adam};
use tch::{Kind, Tensor};

use crate::Result;
use crate::optim::{Field, Optimizer, with_gradient};

/// Common state of Adam and AdamW.
#[derive(Debug)]
struct Moments {
    options: AdamStep,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    largest: Vec<Tensor>,
    steps: Vec<Tensor>,
}

impl Moments {
    fn new(options: AdamStep) -> Self {
        let options = AdamStep { beta1: 0.9, beta2: 0.999, eps: 1e-8, ..options };
        Self { options, first: Vec::new(), second: Vec::new(), largest: Vec::new(), steps: Vec::new() }
    }

    fn set_up(&mut self, parameters: &[Tensor]) {
        let zeros = || parameters.iter().map(|p| p.detach().zeros_like()).collect();
        (self.first, self.second) = (zeros(), zeros());
        self.largest = if self.options.amsgrad { zeros() } else { Vec::new() };
        self.steps = parameters.iter().map(|p| Tensor::zeros([], (Kind::Float, p.device()))).collect();
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        let lists = [parameters, gradients, &self.first, &self.second, &self.largest, &self.steps];
        let chosen = with_gradient(gradients, lists);
        let lists = chosen.as_ref().map_or(lists, |chosen| chosen.each_ref().map(Vec::as_slice));
        let [parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps] = lists;
        for step in steps {
            let _ = step.shallow_clone().f_add_scalar_(1.0)?;
        }
        let state = AdamState { exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps };
        Ok(fused_adam(parameters, gradients, state, &self.options)?)
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        let mut state: Vec<(&'static str, &[Tensor])> =
            vec![("exp_avg", &self.first), ("exp_avg_sq", &self.second), ("step", &self.steps)];
        if self.options.amsgrad {
            state.push(("max_exp_avg_sq", &self.largest));
        }
        state
    }
}

/// Returns the option of a field.
fn slot(options: &mut AdamStep, field: Field) -> Option<&mut f64> {
    match field {
        Field::LearningRate => Some(&mut options.lr),
        Field::Beta1 => Some(&mut options.beta1),
        Field::Beta2 => Some(&mut options.beta2),
        Field::WeightDecay => Some(&mut options.weight_decay),
        Field::Epsilon => Some(&mut options.eps),
        Field::Momentum | Field::Alpha => None,
    }
}

macro_rules! adam {
    ($name:ident) => {
        impl $name {
            /// Sets the decay rates of the two moments.
            #[must_use]
            pub fn betas(mut self, first: f64, second: f64) -> Self {
                (self.0.options.beta1, self.0.options.beta2) = (first, second);
                self
            }

            /// Sets the term that keeps the division from zero.
            #[must_use]
            pub fn epsilon(mut self, epsilon: f64) -> Self {
                self.0.options.eps = epsilon;
                self
            }

            /// Sets whether to divide by the largest second moment so far (Reddi, Kale and Kumar,
            /// 2018).
            #[must_use]
            pub fn amsgrad(mut self, amsgrad: bool) -> Self {
                self.0.options.amsgrad = amsgrad;
                self
            }
        }

        impl Optimizer for $name {
            fn set_up(&mut self, parameters: &[Tensor]) {
                self.0.set_up(parameters);
            }

            fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
                self.0.step(parameters, gradients)
            }

            fn state(&self) -> Vec<(&'static str, &[Tensor])> {
                self.0.state()
            }

            fn learning_rate(&self) -> f64 {
                self.0.options.lr
            }

            fn set_learning_rate(&mut self, learning_rate: f64) {
                self.0.options.lr = learning_rate;
            }

            fn field(&self, field: Field) -> Option<f64> {
                slot(&mut self.0.options.clone(), field).copied()
            }

            fn set_field(&mut self, field: Field, value: f64) {
                slot(&mut self.0.options, field).into_iter().for_each(|slot| *slot = value);
            }
        }
    };
}

/// Adam (Kingma and Ba, 2015), like `torch.optim.Adam(fused=True)`.
#[derive(Debug)]
pub struct Adam(Moments);

adam!(Adam);

impl Adam {
    /// Creates the optimizer with PyTorch's defaults: betas 0.9 and 0.999, epsilon 1e-8, no
    /// penalty.
    pub fn new(learning_rate: f64) -> Self {
        Self(Moments::new(AdamStep { lr: learning_rate, ..AdamStep::default() }))
    }

    /// Sets the L2 penalty, which is added to the gradient.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.0.options.weight_decay = weight_decay;
        self
    }
}

/// Adam with decoupled weight decay (Loshchilov and Hutter, 2019), like
/// `torch.optim.AdamW(fused=True)`.
#[derive(Debug)]
pub struct AdamW(Moments);

adam!(AdamW);

impl AdamW {
    /// Creates the optimizer with PyTorch's defaults: betas 0.9 and 0.999, epsilon 1e-8, weight
    /// decay 0.01.
    pub fn new(learning_rate: f64) -> Self {
        let options =
            AdamStep { lr: learning_rate, weight_decay: 0.01, decoupled: true, ..AdamStep::default() };
        Self(Moments::new(options))
    }

    /// Sets the decay of the weights per step, multiplied by the learning rate.
    #[must_use]
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.0.options.weight_decay = weight_decay;
        self
    }
}
