use std::cell::Cell;

use serde::{Deserialize, Serialize};

use crate::task::carried::{Carried, Carry};
use crate::task::once::{Once, Stage};
use crate::{Better, Result, Run};

/// Leaves the repetition that contains it if a measure has not improved for a number of turns.
///
/// A checkpoint stores the best value and the number of turns since, and restarted ranks adopt
/// them. A measure that is NaN is not better than any other.
///
/// ```
/// use ice_core::{Better, EarlyStop, Repeat, SaveBest, Task};
/// let epochs = Repeat::new(100)
///     .then(Task::train("train"))
///     .then(Task::eval("val"))
///     .then(SaveBest::new("val/accuracy", Better::Higher))
///     .then(EarlyStop::new("val/accuracy", Better::Higher).patience(5).min_delta(1e-3));
/// // The rest of the list follows all the same.
/// let tasks = Repeat::once().then(epochs).then(Task::eval("test"));
/// ```
pub struct EarlyStop {
    measure: String,
    better: Better,
    patience: u64,
    min_delta: f64,
    watched: Carried<Watched>,
    stage: Cell<Stage>,
}

#[derive(Default, Serialize, Deserialize)]
struct Watched {
    best: Option<f64>,
    /// Number of turns since the best value.
    worse: u64,
}

impl EarlyStop {
    /// Watches the last epoch's measure of the node with the uid `measure`. Leaves after the first
    /// turn without improvement.
    pub fn new(measure: impl Into<String>, better: Better) -> Self {
        let (measure, watched) = (measure.into(), Carried::new(Watched::default()));
        Self { measure, better, patience: 1, min_delta: 0.0, watched, stage: Cell::default() }
    }

    /// Sets the number of turns in a row without improvement after which to leave; at least 1.
    #[must_use]
    pub fn patience(mut self, turns: u64) -> Self {
        self.patience = turns.max(1);
        self
    }

    /// Sets the difference to the best value that an improvement must exceed.
    #[must_use]
    pub fn min_delta(mut self, delta: f64) -> Self {
        self.min_delta = delta.abs();
        self
    }

    fn is_better(&self, value: f64, best: Option<f64>) -> bool {
        // Any number is better than NaN.
        let best = best.unwrap_or(f64::NAN);
        let bar = match self.better {
            Better::Higher => best + self.min_delta,
            Better::Lower => best - self.min_delta,
        };
        self.better.prefers(value, bar)
    }
}

impl Once for EarlyStop {
    const WHAT: &'static str = "an early stop";
    const VOTES: bool = true;

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        let value = run.measure(&self.measure)?;
        self.watched.change(|watched| {
            if self.is_better(value, watched.best) {
                *watched = Watched { best: Some(value), worse: 0 };
                return Ok(());
            }
            watched.worse += 1;
            if watched.worse >= self.patience {
                if run.is_main() {
                    println!(
                        "{} was not better than {:.4} for {} turns: leaving the repetition",
                        self.measure,
                        watched.best.unwrap_or(f64::NAN),
                        watched.worse
                    );
                }
                run.stop_task();
            }
            Ok(())
        })
    }

    fn carried(&self) -> Option<&dyn Carry> {
        Some(&self.watched)
    }
}
