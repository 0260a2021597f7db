//! Optimizers whose state can be read, saved and loaded. They run libtorch's fused kernels.
//!
//! In the book: `docs/optimizers.md`.

mod adam;
mod elapsed;
mod rmsprop;
mod schedule;
mod scheduled;
mod sgd;

use serde_json::Value as Json;
use tch::Tensor;

pub use adam::{Adam, AdamW};
pub(crate) use elapsed::Elapsed;
pub use elapsed::RunClock;
pub use rmsprop::RmsProp;
pub use schedule::Schedule;
pub use scheduled::Scheduled;
pub use sgd::Sgd;

use crate::Result;

/// A field of a parameter group, which a schedule can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Field {
    /// Learning rate.
    LearningRate,
    /// Momentum of [`Sgd`] and [`RmsProp`]. They have the field if they were created with a
    /// momentum other than 0.
    Momentum,
    /// Decay rate of the first moment of [`Adam`] and [`AdamW`].
    Beta1,
    /// Decay rate of the second moment of [`Adam`] and [`AdamW`].
    Beta2,
    /// Decay rate of the average of squares of [`RmsProp`].
    Alpha,
    /// Weight decay, or L2 penalty.
    WeightDecay,
    /// The term that keeps the division from zero.
    Epsilon,
}

/// Turns gradients into new parameters.
pub trait Optimizer {
    /// Creates the state for these parameters.
    fn set_up(&mut self, parameters: &[Tensor]);

    /// Applies one step, in place. `gradients` has one tensor per parameter, of its shape and
    /// dtype. A parameter with an undefined gradient took no part in the step: neither it nor its
    /// state changes.
    ///
    /// # Errors
    /// The failure of the kernel.
    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()>;

    /// Returns the state by PyTorch's names, each with one tensor per parameter.
    fn state(&self) -> Vec<(&'static str, &[Tensor])>;

    /// Returns the other values of a checkpoint, or null if there are none.
    fn values(&self) -> Json {
        Json::Null
    }

    /// Loads the values of [`Optimizer::values`].
    ///
    /// # Errors
    /// [`Error::Resume`](crate::Error::Resume) names what does not fit.
    fn load_values(&mut self, _values: &Json) -> Result<()> {
        Ok(())
    }

    /// Returns the learning rate.
    fn learning_rate(&self) -> f64;

    /// Sets the learning rate of the next steps.
    fn set_learning_rate(&mut self, learning_rate: f64);

    /// Returns the learning rate before a schedule, which [`Optimizer::set_learning_rate`] sets.
    fn base_learning_rate(&self) -> f64 {
        self.learning_rate()
    }

    /// Returns the value of a field, or `None` if the optimizer does not have it.
    fn field(&self, field: Field) -> Option<f64> {
        (field == Field::LearningRate).then(|| self.learning_rate())
    }

    /// Sets a field for the next steps, if the optimizer has it.
    fn set_field(&mut self, field: Field, value: f64) {
        if field == Field::LearningRate {
            self.set_learning_rate(value);
        }
    }

    /// Sets the clock of the run, before the first step. An optimizer that wraps another one passes
    /// the clock on.
    fn use_clock(&mut self, _clock: &RunClock) {}

    /// Multiplies the learning rate of all next steps, including that of a schedule.
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
        Scheduled::new(self).schedule(schedule)
    }

    /// Multiplies the value of a field by a schedule.
    ///
    /// ```
    /// use ice_core::optim::{AdamW, Field, Optimizer, Schedule};
    /// // From a weight decay of 0.04 to 0.4 over the run.
    /// let optimizer =
    ///     AdamW::new(1e-3).weight_decay(0.04).schedule_of(Field::WeightDecay, Schedule::linear(1.0, 10.0, 1).over_run(1));
    /// assert_eq!(optimizer.field(Field::WeightDecay), Some(0.04));
    /// ```
    fn schedule_of(self, field: Field, schedule: Schedule) -> Scheduled<Self>
    where
        Self: Sized,
    {
        Scheduled::new(self).schedule_of(field, schedule)
    }

    /// Sets a field to the values of a schedule.
    ///
    /// ```
    /// use ice_core::optim::{Field, Optimizer, Schedule, Sgd};
    /// let optimizer = Sgd::new(0.1).momentum(0.9).value_of(Field::Momentum, Schedule::linear(0.5, 0.9, 100));
    /// assert_eq!(optimizer.field(Field::Momentum), Some(0.5));
    /// ```
    fn value_of(self, field: Field, schedule: Schedule) -> Scheduled<Self>
    where
        Self: Sized,
    {
        Scheduled::new(self).value_of(field, schedule)
    }
}

/// Returns the lists without the entries of parameters that have no gradient, or `None` if all have
/// one.
fn with_gradient<const N: usize>(gradients: &[Tensor], lists: [&[Tensor]; N]) -> Option<[Vec<Tensor>; N]> {
    if gradients.iter().all(Tensor::defined) {
        return None;
    }
    Some(lists.map(|list| {
        let there = list.iter().zip(gradients).filter(|(_, gradient)| gradient.defined());
        there.map(|(tensor, _)| tensor.shallow_clone()).collect()
    }))
}
