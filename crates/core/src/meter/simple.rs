//! Meters of one number per sample.

use ice_worker::Worker;
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use super::{Meter, Sums};
use crate::{Measure, Result};

/// Returns `[sum, count]` of all elements.
pub(super) fn sum_and_count(values: &Tensor) -> Result<Tensor> {
    tch::no_grad(|| {
        let sum = values.detach().f_sum(Kind::Double)?;
        let count = Tensor::full([], values.numel() as f64, (Kind::Double, sum.device()));
        Ok(Tensor::f_stack(&[sum, count], 0)?)
    })
}

pub(super) fn ratio(sums: &[f64]) -> f64 {
    match sums {
        [sum, count] => sum / count,
        _ => f64::NAN,
    }
}

/// The mean of all elements of an epoch: `Σ x / n`. NaN if there are none.
///
/// An update takes a tensor with one element per sample, of any shape and of any type that converts
/// to double.
#[derive(Debug)]
pub struct Average(Sums);

impl Average {
    /// Creates the mean without elements.
    pub fn new() -> Self {
        Self(Sums::doubles(2))
    }
}

impl Default for Average {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter for Average {
    type Input = Tensor;

    fn reset(&mut self) {
        self.0.clear();
    }

    fn update(&mut self, values: &Tensor) -> Result<()> {
        self.0.add(&sum_and_count(values)?)
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        self.0.sync(worker)
    }

    fn evaluate(&self) -> Result<Measure> {
        Ok(ratio(&self.0.values()?).into())
    }

    fn state(&self) -> Json {
        self.0.state()
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.0.load_state(state)
    }
}

/// The sum of all elements of an epoch: `Σ x`. 0 if there are none.
///
/// An update takes a tensor of any shape and of any type that converts to double.
#[derive(Debug)]
pub struct Summation(Sums);

impl Summation {
    /// Creates the sum without elements.
    pub fn new() -> Self {
        Self(Sums::doubles(1))
    }
}

impl Default for Summation {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter for Summation {
    type Input = Tensor;

    fn reset(&mut self) {
        self.0.clear();
    }

    fn update(&mut self, values: &Tensor) -> Result<()> {
        self.0.add(&tch::no_grad(|| values.detach().f_sum(Kind::Double)?.f_unsqueeze(0))?)
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        self.0.sync(worker)
    }

    fn evaluate(&self) -> Result<Measure> {
        Ok(self.0.values()?.first().copied().unwrap_or_default().into())
    }

    fn state(&self) -> Json {
        self.0.state()
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.0.load_state(state)
    }
}

/// The mean of the elements of the last batch on all ranks. NaN before the first batch.
///
/// An update takes a tensor with one element per sample, like that of [`Average`]. A single number
/// is its own mean.
#[derive(Debug)]
pub struct Value(Sums);

impl Value {
    /// Creates the meter without a value.
    pub fn new() -> Self {
        Self(Sums::doubles(2))
    }
}

impl Default for Value {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter for Value {
    type Input = Tensor;

    fn reset(&mut self) {
        self.0.clear();
    }

    fn update(&mut self, values: &Tensor) -> Result<()> {
        self.0.clear();
        self.0.add(&sum_and_count(values)?)
    }

    fn skip(&mut self) {
        // Other ranks, which have a share of this batch, provide its value.
        self.0.clear();
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        self.0.sync(worker)
    }

    fn evaluate(&self) -> Result<Measure> {
        Ok(ratio(&self.0.values()?).into())
    }

    fn state(&self) -> Json {
        self.0.state()
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.0.load_state(state)
    }
}
