use std::cell::Cell;

use ice_checkpoint::Counts;

/// Steps and epochs that a run has completed over all its tasks. Every checkpoint saves them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Counters {
    train_steps: Cell<u64>,
    train_epochs: Cell<u64>,
    eval_steps: Cell<u64>,
    eval_epochs: Cell<u64>,
}

impl Counters {
    /// Returns the number of applied optimizer steps.
    pub fn train_steps(&self) -> u64 {
        self.train_steps.get()
    }

    /// Returns the number of completed training epochs.
    pub fn train_epochs(&self) -> u64 {
        self.train_epochs.get()
    }

    /// Returns the number of iterations of evaluations.
    pub fn eval_steps(&self) -> u64 {
        self.eval_steps.get()
    }

    /// Returns the number of completed epochs of evaluations.
    pub fn eval_epochs(&self) -> u64 {
        self.eval_epochs.get()
    }

    /// Returns the number of completed epochs: of training with `train`, else of evaluation.
    pub fn epochs(&self, train: bool) -> u64 {
        if train { self.train_epochs() } else { self.eval_epochs() }
    }

    pub(crate) fn count_step(&self, train: bool) {
        let counter = if train { &self.train_steps } else { &self.eval_steps };
        counter.set(counter.get() + 1);
    }

    pub(crate) fn count_epoch(&self, train: bool) {
        let counter = if train { &self.train_epochs } else { &self.eval_epochs };
        counter.set(counter.get() + 1);
    }

    pub(crate) fn saved(&self) -> Counts {
        Counts {
            train_steps: self.train_steps(),
            train_epochs: self.train_epochs(),
            eval_steps: self.eval_steps(),
            eval_epochs: self.eval_epochs(),
        }
    }

    pub(crate) fn restore(&self, saved: Counts) {
        self.train_steps.set(saved.train_steps);
        self.train_epochs.set(saved.train_epochs);
        self.eval_steps.set(saved.eval_steps);
        self.eval_epochs.set(saved.eval_epochs);
    }
}
