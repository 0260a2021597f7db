use ice_worker::Worker;
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use super::{Meter, Sums};
use crate::{Error, Measure, Result};

/// The share of samples whose class is among the `k` highest scores: `hits / n`, both counted. NaN
/// if there were no samples.
///
/// An update takes floating-point scores `[.., classes]` and integer labels `[..]`.
#[derive(Debug)]
pub struct Accuracy {
    k: i64,
    /// Hits and samples.
    counts: Sums,
}

impl Accuracy {
    /// Counts only the highest score.
    pub fn new() -> Self {
        Self::top(1)
    }

    /// Counts the `k` highest scores.
    pub fn top(k: usize) -> Self {
        Self { k: k as i64, counts: Sums::counts(2) }
    }
}

impl Default for Accuracy {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter for Accuracy {
    type Input = (Tensor, Tensor);

    fn reset(&mut self) {
        self.counts.clear();
    }

    fn update(&mut self, (scores, labels): &Self::Input) -> Result<()> {
        let (of_scores, of_labels) = (scores.size(), labels.size());
        if of_scores.split_last().is_none_or(|(_, rest)| rest != of_labels) {
            return Err(Error::Graph(format!(
                "accuracy of scores {of_scores:?} for labels {of_labels:?}: scores must be [.., classes] and labels [..]"
            )));
        }
        let row = tch::no_grad(|| {
            let (_, guesses) = scores.detach().f_topk(self.k, -1, true, false)?;
            let hits = guesses.f_eq_tensor(&labels.f_unsqueeze(-1)?)?.f_sum(Kind::Int64)?;
            let samples = Tensor::full([], labels.numel() as i64, (Kind::Int64, hits.device()));
            Tensor::f_stack(&[hits, samples], 0)
        })?;
        self.counts.add(&row)
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        self.counts.sync(worker)
    }

    fn evaluate(&self) -> Result<Measure> {
        let counts = self.counts.integers()?;
        Ok((counts[0] as f64 / counts[1] as f64).into())
    }

    fn state(&self) -> Json {
        self.counts.state()
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.counts.load_state(state)
    }
}
