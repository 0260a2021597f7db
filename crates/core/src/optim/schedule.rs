use std::f64::consts::PI;
use std::rc::Rc;

use serde::Deserialize;
use serde_json::Value as Json;
use tch::Tensor;

use crate::optim::Optimizer;
use crate::{Error, Result};

/// What the learning rate is multiplied by, as a function of the optimizer's steps so far. Nothing but that number is saved, so that a
/// resumed run follows the same curve.
///
/// The formulas are those of `torch.optim.lr_scheduler`, where the scheduler is stepped after every optimizer step.
#[derive(Clone)]
pub struct Schedule(Rc<dyn Fn(u64) -> f64>);

impl Schedule {
    /// Any function of the steps so far, from 0 (`LambdaLR`).
    pub fn lambda(factor: impl Fn(u64) -> f64 + 'static) -> Self {
        Self(Rc::new(factor))
    }

    /// Always 1.
    pub fn constant() -> Self {
        Self::lambda(|_| 1.0)
    }

    /// `gamma` once more after every `every` steps (`StepLR`).
    pub fn step(every: u64, gamma: f64) -> Self {
        Self::lambda(move |step| power(gamma, step / every.max(1)))
    }

    /// `gamma` once more at each of these steps (`MultiStepLR`).
    pub fn milestones(at: impl Into<Vec<u64>>, gamma: f64) -> Self {
        let at = at.into();
        Self::lambda(move |step| {
            power(gamma, at.iter().filter(|milestone| **milestone <= step).count() as u64)
        })
    }

    /// `gamma` once more after every step (`ExponentialLR`).
    pub fn exponential(gamma: f64) -> Self {
        Self::lambda(move |step| power(gamma, step))
    }

    /// From one factor to another in so many steps, in a straight line, and that from then on (`LinearLR`).
    pub fn linear(from: f64, to: f64, steps: u64) -> Self {
        Self::lambda(move |step| from + (to - from) * share(step, steps))
    }

    /// Up to 1 within so many steps. The first step has `1 / (steps + 1)`, so that it is not lost.
    pub fn linear_warmup(steps: u64) -> Self {
        Self::lambda(move |step| ((step + 1) as f64 / (steps + 1) as f64).min(1.0))
    }

    /// From 1 to `lowest` in so many steps, along half a cosine, and that from then on (`CosineAnnealingLR`, which would rise again).
    pub fn cosine(steps: u64, lowest: f64) -> Self {
        Self::lambda(move |step| lowest + (1.0 - lowest) * (1.0 + (PI * share(step, steps)).cos()) / 2.0)
    }

    /// Up from 1/25 to 1 in three tenths of the steps and down to 1/250,000, along cosines (`OneCycleLR` with its defaults, where the
    /// optimizer's own learning rate is the highest). Momentum stays as it is.
    pub fn one_cycle(steps: u64) -> Self {
        let anneal = |from: f64, to: f64, share: f64| to + (from - to) * (1.0 + (PI * share).cos()) / 2.0;
        Self::lambda(move |step| {
            let (start, end) = (1.0 / 25.0, 1.0 / 25.0 / 1e4);
            let top = 0.3 * steps as f64 - 1.0;
            let last = steps.saturating_sub(1) as f64;
            let step = (step as f64).min(last);
            match step <= top {
                true => anneal(start, 1.0, step / top),
                false => anneal(1.0, end, (step - top) / (last - top)),
            }
        })
    }

    /// This one for so many steps, then another from its own step 0 (`SequentialLR`).
    #[must_use]
    pub fn then(self, after: u64, next: Self) -> Self {
        Self::lambda(move |step| match step < after {
            true => self.factor(step),
            false => next.factor(step - after),
        })
    }

    /// The product of both (`ChainedScheduler`).
    #[must_use]
    pub fn times(self, other: Self) -> Self {
        Self::lambda(move |step| self.factor(step) * other.factor(step))
    }

    /// The factor after so many steps.
    pub fn factor(&self, steps: u64) -> f64 {
        (self.0)(steps)
    }
}

fn power(base: f64, exponent: u64) -> f64 {
    base.powi(i32::try_from(exponent).unwrap_or(i32::MAX))
}

/// How much of the way is done; all of none.
fn share(step: u64, steps: u64) -> f64 {
    if step >= steps { 1.0 } else { step as f64 / steps as f64 }
}

/// An optimizer whose learning rate follows a [`Schedule`].
pub struct Scheduled<O> {
    optimizer: O,
    schedule: Schedule,
    highest: f64,
    steps: u64,
}

impl<O: Optimizer> Scheduled<O> {
    pub(super) fn new(optimizer: O, schedule: Schedule) -> Self {
        let highest = optimizer.learning_rate();
        let mut scheduled = Self { optimizer, schedule, highest, steps: 0 };
        scheduled.follow();
        scheduled
    }

    fn follow(&mut self) {
        self.optimizer.set_learning_rate(self.highest * self.schedule.factor(self.steps));
    }
}

impl<O: Optimizer> Optimizer for Scheduled<O> {
    fn set_up(&mut self, parameters: &[Tensor]) {
        self.optimizer.set_up(parameters);
    }

    fn step(&mut self, parameters: &[Tensor], gradients: &[Tensor]) -> Result<()> {
        self.optimizer.step(parameters, gradients)?;
        self.steps += 1;
        self.follow();
        Ok(())
    }

    fn state(&self) -> Vec<(&'static str, &[Tensor])> {
        self.optimizer.state()
    }

    fn values(&self) -> Json {
        serde_json::json!({ "scheduled_steps": self.steps, "optimizer": self.optimizer.values() })
    }

    fn load_values(&mut self, values: &Json) -> Result<()> {
        let steps = values.get("scheduled_steps").map(u64::deserialize);
        self.steps = match steps {
            Some(Ok(steps)) => steps,
            _ => return Err(Error::Resume("the checkpoint knows no steps of this schedule".into())),
        };
        self.optimizer.load_values(values.get("optimizer").unwrap_or(&Json::Null))?;
        self.follow();
        Ok(())
    }

    /// Of the next step.
    fn learning_rate(&self) -> f64 {
        self.optimizer.learning_rate()
    }

    fn scale_learning_rate(&mut self, factor: f64) {
        self.set_learning_rate(self.highest * factor);
    }

    /// Sets what the schedule's factors refer to.
    fn set_learning_rate(&mut self, learning_rate: f64) {
        self.highest = learning_rate;
        self.follow();
    }
}
