use std::f64::consts::PI;
use std::rc::Rc;

use crate::optim::elapsed::Elapsed;

/// The factor of a learning rate, or of another field of an optimizer, over the course of training.
///
/// A schedule is a function of the optimizer's steps so far, or of other progress with
/// [`Schedule::by_epoch`] or [`Schedule::over_run`]. A checkpoint stores only the number of steps,
/// so that a resumed run follows the same curve.
///
/// The formulas are those of `torch.optim.lr_scheduler`, with a scheduler that is stepped after
/// every optimizer step, or with [`Schedule::by_epoch`] after every epoch.
#[derive(Clone)]
pub struct Schedule {
    curve: Rc<dyn Fn(Elapsed) -> f64>,
    /// Whether the curve is a function of more than the optimizer's steps.
    reads_clock: bool,
    /// Whether the curve is a function of the completed share of the run.
    needs_share: bool,
}

impl Schedule {
    /// Creates a schedule from any function of the steps so far, from 0 (`LambdaLR`).
    pub fn lambda(factor: impl Fn(u64) -> f64 + 'static) -> Self {
        Self::curve(move |steps| factor(steps as u64))
    }

    fn curve(curve: impl Fn(f64) -> f64 + 'static) -> Self {
        Self { curve: Rc::new(move |now| curve(now.steps)), reads_clock: false, needs_share: false }
    }

    /// Creates a schedule that is always 1.
    pub fn constant() -> Self {
        Self::curve(|_| 1.0)
    }

    /// Multiplies by `gamma` after every `every` steps (`StepLR`).
    pub fn step(every: u64, gamma: f64) -> Self {
        Self::lambda(move |step| power(gamma, step / every.max(1)))
    }

    /// Multiplies by `gamma` at each of these steps (`MultiStepLR`).
    pub fn milestones(at: impl Into<Vec<u64>>, gamma: f64) -> Self {
        let at = at.into();
        Self::lambda(move |step| {
            power(gamma, at.iter().filter(|milestone| **milestone <= step).count() as u64)
        })
    }

    /// Multiplies by `gamma` after every step (`ExponentialLR`).
    pub fn exponential(gamma: f64) -> Self {
        Self::lambda(move |step| power(gamma, step))
    }

    /// Changes linearly from one factor to another within `steps` steps, and then stays
    /// (`LinearLR`).
    pub fn linear(from: f64, to: f64, steps: u64) -> Self {
        Self::curve(move |step| from + (to - from) * share(step, steps))
    }

    /// Rises linearly to 1 within `steps` steps. The first step has `1 / (steps + 1)` instead of 0,
    /// so that it has an effect.
    pub fn linear_warmup(steps: u64) -> Self {
        Self::curve(move |step| ((step + 1.0) / (steps + 1) as f64).min(1.0))
    }

    /// Falls from 1 to `lowest` within `steps` steps along half a cosine, and then stays
    /// (`CosineAnnealingLR`, which would rise again).
    pub fn cosine(steps: u64, lowest: f64) -> Self {
        Self::curve(move |step| anneal(1.0, lowest, share(step, steps)))
    }

    /// Rises from 1/25 to 1 in three tenths of the steps and falls to 1/250,000, along cosines
    /// (`OneCycleLR` with its defaults; its highest rate is the optimizer's learning rate). Combine
    /// it with [`Schedule::one_cycle_momentum`].
    pub fn one_cycle(steps: u64) -> Self {
        Self::curve(move |step| cycle(step, steps, [1.0 / 25.0, 1.0, 1.0 / 25.0 / 1e4]))
    }

    /// Returns the momentum, or first beta of Adam, that `OneCycleLR` sets by default: from 0.95
    /// down to 0.85 and back.
    ///
    /// ```
    /// use ice_core::optim::{AdamW, Field, Optimizer, Schedule};
    /// let optimizer = AdamW::new(1e-3)
    ///     .schedule(Schedule::one_cycle(1000))
    ///     .value_of(Field::Beta1, Schedule::one_cycle_momentum(1000));
    /// assert_eq!(optimizer.field(Field::Beta1), Some(0.95));
    /// ```
    pub fn one_cycle_momentum(steps: u64) -> Self {
        Self::curve(move |step| cycle(step, steps, [0.95, 0.85, 0.95]))
    }

    /// Follows this schedule for `after` steps, and then `next` from its own step 0
    /// (`SequentialLR`).
    #[must_use]
    pub fn then(self, after: u64, next: Self) -> Self {
        let after = after as f64;
        self.with(next, move |first, next, now| match now.steps < after {
            true => first(now),
            false => next(Elapsed { steps: now.steps - after, ..now }),
        })
    }

    /// Returns the product of both schedules (`ChainedScheduler`).
    #[must_use]
    pub fn times(self, other: Self) -> Self {
        self.with(other, |first, other, now| first(now) * other(now))
    }

    /// Counts training epochs instead of steps. The factor stays the same within an epoch and
    /// changes after each, like a scheduler of PyTorch that is stepped once per epoch.
    ///
    /// ```
    /// use ice_core::optim::{Optimizer, Schedule, Sgd};
    /// // A tenth after 30 and after 60 epochs, however many steps an epoch has.
    /// let optimizer = Sgd::new(0.1).schedule(Schedule::milestones([30, 60], 0.1).by_epoch());
    /// ```
    #[must_use]
    pub fn by_epoch(self) -> Self {
        self.of(false, |curve, now| curve(Elapsed { steps: now.epochs as f64, ..now }))
    }

    /// Stretches this schedule, whose numbers refer to a run of `steps` steps, over the training of
    /// the whole run. Neither the number of ranks nor that of epochs needs to be known. With 100,
    /// the steps are per cent of the run.
    ///
    /// The tasks determine the length of the run: either all training tasks have a number of
    /// epochs, or all have a number of steps. If training ends early, the schedule does not reach
    /// its end.
    ///
    /// ```
    /// use ice_core::optim::{AdamW, Optimizer, Schedule};
    /// // Warms up for 5 % of the run, and then falls to a tenth at its end.
    /// let curve = Schedule::linear_warmup(5).then(5, Schedule::cosine(95, 0.1)).over_run(100);
    /// let optimizer = AdamW::new(3e-4).schedule(curve);
    /// ```
    #[must_use]
    pub fn over_run(self, steps: u64) -> Self {
        let steps = steps as f64;
        self.of(true, move |curve, now| {
            let share = if now.total > 0.0 { now.done * steps / now.total } else { 0.0 };
            curve(Elapsed { steps: share, ..now })
        })
    }

    fn of(
        self,
        needs_share: bool,
        change: impl Fn(&dyn Fn(Elapsed) -> f64, Elapsed) -> f64 + 'static,
    ) -> Self {
        let curve = self.curve;
        Self {
            curve: Rc::new(move |now| change(&*curve, now)),
            reads_clock: true,
            needs_share: needs_share || self.needs_share,
        }
    }

    fn with(
        self,
        other: Self,
        join: impl Fn(&dyn Fn(Elapsed) -> f64, &dyn Fn(Elapsed) -> f64, Elapsed) -> f64 + 'static,
    ) -> Self {
        let (first, second) = (self.curve, other.curve);
        Self {
            curve: Rc::new(move |now| join(&*first, &*second, now)),
            reads_clock: self.reads_clock || other.reads_clock,
            needs_share: self.needs_share || other.needs_share,
        }
    }

    /// Returns the factor after `steps` steps, before the end of the first epoch.
    pub fn factor(&self, steps: u64) -> f64 {
        self.at(Elapsed { steps: steps as f64, ..Elapsed::default() })
    }

    pub(super) fn at(&self, now: Elapsed) -> f64 {
        (self.curve)(now)
    }

    pub(super) fn reads_clock(&self) -> bool {
        self.reads_clock
    }

    pub(super) fn needs_share(&self) -> bool {
        self.needs_share
    }
}

fn power(base: f64, exponent: u64) -> f64 {
    base.powi(i32::try_from(exponent).unwrap_or(i32::MAX))
}

/// Returns the completed share of `steps`, at most 1. It is 1 if `steps` is 0.
fn share(step: f64, steps: u64) -> f64 {
    if step >= steps as f64 { 1.0 } else { step / steps as f64 }
}

/// Interpolates between two values along half a cosine.
fn anneal(from: f64, to: f64, share: f64) -> f64 {
    to + (from - to) * (1.0 + (PI * share).cos()) / 2.0
}

/// Returns the value of `OneCycleLR`, with two phases: three tenths of the steps, and the rest.
fn cycle(step: f64, steps: u64, [start, top, end]: [f64; 3]) -> f64 {
    let peak = 0.3 * steps as f64 - 1.0;
    let last = steps.saturating_sub(1) as f64;
    let step = step.min(last);
    match step <= peak {
        true => anneal(start, top, step / peak),
        false => anneal(top, end, (step - peak) / (last - peak)),
    }
}
