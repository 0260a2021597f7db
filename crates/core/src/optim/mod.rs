//! Optimizers whose state can be read, saved and loaded. They run libtorch's fused kernels.

mod adamw;
mod sgd;

use tch::Tensor;

pub use adamw::AdamW;
pub use sgd::Sgd;

use crate::Result;

/// Turns gradients into new parameters.
pub trait Optimizer {
    /// Makes the state for these parameters.
    fn set_up(&mut self, parameters: &[Tensor]);

    /// Applies one step, in place. `gradients` has one tensor per parameter, of its shape and dtype.
    ///
    /// # Errors
    /// The failure of the kernel.
    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()>;

    /// The state by PyTorch's names, each with one tensor per parameter.
    fn state(&self) -> Vec<(&'static str, &[Tensor])>;

    /// Learning rate.
    fn learning_rate(&self) -> f64;

    /// Sets the learning rate of the steps to come.
    fn set_learning_rate(&mut self, learning_rate: f64);
}
