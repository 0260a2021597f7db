use std::cell::Cell;

use serde::{Deserialize, Serialize};

use crate::task::carried::{Carried, Carry};
use crate::task::once::{Once, Stage};
use crate::{Better, Error, LrReduction, Result, Run};

/// Reduces learning rates if a measure has not improved for a number of turns, like
/// `torch.optim.lr_scheduler.ReduceLROnPlateau` with its defaults. Its turn in the task list
/// corresponds to `scheduler.step(measure)` in PyTorch.
///
/// It reduces the rates that the optimizers were created with, so that a
/// [`Schedule`](crate::optim::Schedule) multiplies the reduced rate. All ranks reduce alike, since
/// the measure covers all ranks. A checkpoint stores the best value, the counts and the reduced
/// rates, and restarted ranks adopt them. A measure that is NaN is not better than any other.
///
/// ```
/// use ice_core::{Better, ReduceLROnPlateau, Repeat, Task};
/// let tasks = Repeat::new(100)
///     .then(Task::train("train"))
///     .then(Task::eval("val"))
///     .then(ReduceLROnPlateau::new("val/loss", Better::Lower).factor(0.5).patience(3).min_lr(1e-6));
/// ```
pub struct ReduceLROnPlateau {
    measure: String,
    better: Better,
    nodes: Vec<String>,
    patience: u64,
    threshold: Threshold,
    cooldown: u64,
    reduction: LrReduction,
    watched: Carried<Watched>,
    stage: Cell<Stage>,
}

/// Difference to the best value that an improvement must exceed.
#[derive(Debug, Clone, Copy)]
enum Threshold {
    Relative(f64),
    Absolute(f64),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Watched {
    best: f64,
    bad_turns: u64,
    cooldown_left: u64,
}

impl ReduceLROnPlateau {
    /// Watches the last epoch's measure of the node with the uid `measure`, and reduces all
    /// learning rates.
    pub fn new(measure: impl Into<String>, better: Better) -> Self {
        let worst = match better {
            Better::Higher => f64::NEG_INFINITY,
            Better::Lower => f64::INFINITY,
        };
        Self {
            measure: measure.into(),
            better,
            nodes: Vec::new(),
            patience: 10,
            threshold: Threshold::Relative(1e-4),
            cooldown: 0,
            reduction: LrReduction { factor: 0.1, min_lr: 0.0, eps: 1e-8 },
            watched: Carried::new(Watched { best: worst, bad_turns: 0, cooldown_left: 0 }),
            stage: Cell::default(),
        }
    }

    /// Reduces only the learning rates of the node with this uid, and of others added by further
    /// calls.
    #[must_use]
    pub fn of(mut self, node: impl Into<String>) -> Self {
        self.nodes.push(node.into());
        self
    }

    /// Sets the factor of a reduction, below 1. Default: 0.1.
    #[must_use]
    pub fn factor(mut self, factor: f64) -> Self {
        self.reduction.factor = factor;
        self
    }

    /// Sets the number of turns without improvement that pass before a reduction. Default: 10.
    #[must_use]
    pub fn patience(mut self, turns: u64) -> Self {
        self.patience = turns;
        self
    }

    /// Sets the difference to the best value that an improvement must exceed, relative to the best
    /// value (`threshold_mode='rel'`). Default: 1e-4.
    #[must_use]
    pub fn rel_threshold(mut self, threshold: f64) -> Self {
        self.threshold = Threshold::Relative(threshold);
        self
    }

    /// Sets the absolute difference to the best value that an improvement must exceed
    /// (`threshold_mode='abs'`).
    #[must_use]
    pub fn abs_threshold(mut self, threshold: f64) -> Self {
        self.threshold = Threshold::Absolute(threshold);
        self
    }

    /// Sets the number of turns after a reduction that do not count. Default: 0.
    #[must_use]
    pub fn cooldown(mut self, turns: u64) -> Self {
        self.cooldown = turns;
        self
    }

    /// Sets the lowest learning rate. Default: 0.
    #[must_use]
    pub fn min_lr(mut self, least: f64) -> Self {
        self.reduction.min_lr = least;
        self
    }

    /// Sets the smallest change: a rate that would change by no more than this stays. Default:
    /// 1e-8.
    #[must_use]
    pub fn eps(mut self, eps: f64) -> Self {
        self.reduction.eps = eps;
        self
    }

    fn is_better(&self, value: f64, best: f64) -> bool {
        let bar = match (self.better, self.threshold) {
            (Better::Lower, Threshold::Relative(threshold)) => best * (1.0 - threshold),
            (Better::Higher, Threshold::Relative(threshold)) => best * (threshold + 1.0),
            (Better::Lower, Threshold::Absolute(threshold)) => best - threshold,
            (Better::Higher, Threshold::Absolute(threshold)) => best + threshold,
        };
        match self.better {
            Better::Lower => value < bar,
            Better::Higher => value > bar,
        }
    }

    /// Adds the value of a turn. Returns whether the rates must be reduced.
    fn take(&self, watched: &mut Watched, value: f64) -> bool {
        if self.is_better(value, watched.best) {
            (watched.best, watched.bad_turns) = (value, 0);
        } else {
            watched.bad_turns += 1;
        }
        if watched.cooldown_left > 0 {
            watched.cooldown_left -= 1;
            watched.bad_turns = 0;
        }
        let reduces = watched.bad_turns > self.patience;
        if reduces {
            (watched.bad_turns, watched.cooldown_left) = (0, self.cooldown);
        }
        reduces
    }

    fn reduce(&self, run: &Run) -> Result<()> {
        let graph = run.graph();
        if let Some(unknown) = self.nodes.iter().find(|node| !graph.uids().any(|uid| uid == node.as_str())) {
            return Err(Error::Graph(format!("no node `{unknown}` has learning rates to reduce")));
        }
        let wanted = |uid: &String| self.nodes.is_empty() || self.nodes.contains(uid);
        let mut optimizers = 0;
        for entry in graph.entries().iter().filter(|entry| wanted(&entry.uid)) {
            optimizers += entry.node.borrow_mut().reduce_learning_rates(&self.reduction);
        }
        if optimizers == 0 {
            return Err(Error::Graph(format!(
                "`{}` is on a plateau, and no node has an optimizer whose learning rate could be reduced",
                self.measure
            )));
        }
        Ok(())
    }
}

impl Once for ReduceLROnPlateau {
    const WHAT: &'static str = "a reduction of learning rates";

    fn stage(&self) -> &Cell<Stage> {
        &self.stage
    }

    fn perform(&self, run: &Run) -> Result<()> {
        let value = run.measure(&self.measure)?;
        self.watched.change(|watched| {
            if !self.take(watched, value) {
                return Ok(());
            }
            if run.is_main() {
                let (measure, best, factor) = (&self.measure, watched.best, self.reduction.factor);
                println!("{measure} is not better than {best:.4}: learning rates times {factor}");
            }
            self.reduce(run)
        })
    }

    fn carried(&self) -> Option<&dyn Carry> {
        Some(&self.watched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PyTorch 2.13's reductions, which tests/python/optim_reference.py records as changes of the
    /// rate.
    #[test]
    fn plateau_counts_turns_as_torch_does() {
        let reference: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/reference/optim.json")).unwrap();
        let plateau = || ReduceLROnPlateau::new("m", Better::Lower).patience(1);
        let cases = [
            ("min rel", plateau()),
            ("min abs", plateau().abs_threshold(0.05)),
            ("max rel", ReduceLROnPlateau::new("m", Better::Higher).patience(1).rel_threshold(0.02)),
            ("max abs", ReduceLROnPlateau::new("m", Better::Higher).patience(0).abs_threshold(0.1)),
            ("cooldown", plateau().cooldown(2)),
            ("floor", plateau().patience(0).factor(0.3).min_lr(0.03).eps(0.0)),
            ("eps", plateau().patience(0).factor(0.5).eps(0.1)),
        ];
        let numbers = |name: &str, what: &str| -> Vec<f64> {
            let numbers = reference["plateaus"][name][what].as_array().unwrap();
            // JSON has no NaN, so the reference has null.
            numbers.iter().map(|number| number.as_f64().unwrap_or(f64::NAN)).collect()
        };
        assert_eq!(reference["plateaus"].as_object().unwrap().len(), cases.len());
        for (name, plateau) in cases {
            let (values, rates) = (numbers(name, "values"), numbers(name, "rates"));
            let (mut rate, mut changes) = (0.5, 0);
            for (turn, (value, expected)) in values.iter().zip(&rates).enumerate() {
                plateau
                    .watched
                    .change(|watched| {
                        if plateau.take(watched, *value) {
                            rate = plateau.reduction.of(rate).unwrap_or(rate);
                            changes += 1;
                        }
                        Ok(())
                    })
                    .unwrap();
                plateau.watched.settle();
                assert_eq!(rate, *expected, "{name}, turn {turn}");
            }
            assert!(changes > 0, "{name}");
        }
    }
}
