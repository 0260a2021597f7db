//! Optimizers whose state can be read, saved and loaded. They run libtorch's fused kernels.
//!
//! In the book: `docs/optimizers.md`.

mod adam;
mod rmsprop;
mod schedule;
mod sgd;

use serde_json::Value as Json;
use tch::Tensor;

pub use adam::{Adam, AdamW};
pub use rmsprop::RmsProp;
pub use schedule::{Schedule, Scheduled};
pub use sgd::Sgd;

use crate::Result;

/// Turns gradients into new parameters.
pub trait Optimizer {
    /// Makes the state for these parameters.
    fn set_up(&mut self, parameters: &[Tensor]);

    /// Applies one step, in place. `gradients` has one tensor per parameter, of its shape and dtype; a parameter whose gradient is
    /// undefined took no part in the step, and neither it nor its state is changed.
    ///
    /// # Errors
    /// The failure of the kernel.
    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()>;

    /// The state by PyTorch's names, each with one tensor per parameter.
    fn state(&self) -> Vec<(&'static str, &[Tensor])>;

    /// What else a checkpoint must hold; null for nothing.
    fn values(&self) -> Json {
        Json::Null
    }

    /// Takes over what [`Optimizer::values`] had.
    ///
    /// # Errors
    /// [`Error::Resume`](crate::Error::Resume) says what does not fit.
    fn load_values(&mut self, _values: &Json) -> Result<()> {
        Ok(())
    }

    /// Learning rate.
    fn learning_rate(&self) -> f64;

    /// Sets the learning rate of the steps to come.
    fn set_learning_rate(&mut self, learning_rate: f64);

    /// Multiplies the learning rate of all steps to come, that of a schedule included.
    fn scale_learning_rate(&mut self, factor: f64) {
        self.set_learning_rate(self.learning_rate() * factor);
    }

    /// Lets the learning rate follow a schedule.
    ///
    /// ```
    /// use ice_core::optim::{AdamW, Optimizer, Schedule};
    /// let schedule = Schedule::linear_warmup(100).then(100, Schedule::cosine(900, 0.1));
    /// let optimizer = AdamW::new(3e-4).schedule(schedule);
    /// assert!(optimizer.learning_rate() < 3e-5);
    /// ```
    fn schedule(self, schedule: Schedule) -> Scheduled<Self>
    where
        Self: Sized,
    {
        Scheduled::new(self, schedule)
    }
}

/// The lists without the places of parameters that have no gradient.
fn with_gradient<const N: usize>(gradients: &[Tensor], lists: [&[Tensor]; N]) -> Option<[Vec<Tensor>; N]> {
    if gradients.iter().all(Tensor::defined) {
        return None;
    }
    Some(lists.map(|list| {
        let there = list.iter().zip(gradients).filter(|(_, gradient)| gradient.defined());
        there.map(|(tensor, _)| tensor.shallow_clone()).collect()
    }))
}
