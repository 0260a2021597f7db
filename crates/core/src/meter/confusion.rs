use ice_worker::Worker;
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use super::{Meter, Sums};
use crate::{Error, Measure, Result};

/// Counts of each combination of class and guess: `m[c][g]` counts the samples of class `c` with
/// the guess `g`.
///
/// The value is the accuracy, `Σ m[c][c] / Σ m[c][g]`. In addition, each class `c` has the parts
/// `precision.c` = `m[c][c] / Σᵢ m[i][c]` and `recall.c` = `m[c][c] / Σᵢ m[c][i]`. They are NaN for
/// a class that was never guessed or never present.
///
/// An update takes guesses and integer labels `[..]`. Guesses are either integer classes `[..]`, or
/// floating-point scores `[.., classes]` of which the highest is the guess.
///
/// [`MetricNode::meter`](crate::MetricNode::meter) gives access to the matrix itself.
#[derive(Debug)]
pub struct ConfusionMatrix {
    classes: i64,
    /// The matrix row by row, followed by the number of samples outside of its cells.
    counts: Sums,
}

impl ConfusionMatrix {
    /// Creates a matrix for this many classes, numbered from 0.
    pub fn new(classes: usize) -> Self {
        let classes = classes as i64;
        Self { classes, counts: Sums::counts(classes * classes + 1) }
    }

    /// Returns the matrix: a row for each class, with a column for each guess.
    ///
    /// # Errors
    /// Labels or guesses outside of the classes.
    pub fn counts(&self) -> Result<Vec<Vec<u64>>> {
        let mut counts = self.counts.integers()?;
        match counts.pop() {
            Some(outside) if outside > 0 => Err(Error::Graph(format!(
                "{outside} samples have a label or a guess that is none of the classes 0 to {}",
                self.classes - 1
            ))),
            _ => {
                let row = |row: &[i64]| row.iter().map(|count| count.unsigned_abs()).collect();
                Ok(counts.chunks_exact(self.classes.max(1) as usize).map(row).collect())
            }
        }
    }
}

impl Meter for ConfusionMatrix {
    type Input = (Tensor, Tensor);

    fn reset(&mut self) {
        self.counts.clear();
    }

    fn update(&mut self, (guesses, labels): &Self::Input) -> Result<()> {
        let row = tch::no_grad(|| -> Result<Tensor> {
            let guesses = match guesses.kind() {
                Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16 => guesses.f_argmax(-1, false)?,
                _ => guesses.shallow_clone(),
            };
            if guesses.size() != labels.size() {
                return Err(Error::Graph(format!(
                    "a confusion matrix of guesses {:?} for labels {:?}: there must be one for each",
                    guesses.size(),
                    labels.size()
                )));
            }
            let flat = |tensor: &Tensor| tensor.f_to_kind(Kind::Int64)?.f_flatten(0, -1);
            let (guesses, labels) = (flat(&guesses)?, flat(labels)?);
            let cells = self.classes * self.classes;
            let is_class = |tensor: &Tensor| tensor.f_ge(0)?.f_logical_and(&tensor.f_lt(self.classes)?);
            let inside = is_class(&guesses)?.f_logical_and(&is_class(&labels)?)?;
            // Counts samples outside of the matrix in a cell of their own. To check each label now
            // would make the rank wait for its device.
            let cell = (labels * self.classes + guesses)
                .f_where_self(&inside, &Tensor::full([], cells, (Kind::Int64, inside.device())))?;
            let zeros = Tensor::zeros([cells + 1], (Kind::Int64, inside.device()));
            Ok(zeros.f_scatter_add(0, &cell, &cell.f_ones_like()?)?)
        })?;
        self.counts.add(&row)
    }

    fn sync(&mut self, worker: &Worker) -> Result<()> {
        self.counts.sync(worker)
    }

    fn evaluate(&self) -> Result<Measure> {
        let matrix = self.counts()?;
        let sum = |cells: &mut dyn Iterator<Item = u64>| cells.sum::<u64>() as f64;
        let hits = |class: usize| matrix[class][class] as f64;
        let classes = 0..matrix.len();
        let precision = classes.clone().map(|class| {
            let guessed = sum(&mut matrix.iter().map(|row| row[class]));
            (format!("precision.{class}"), hits(class) / guessed)
        });
        let recall = classes.clone().map(|class| {
            let there = sum(&mut matrix[class].iter().copied());
            (format!("recall.{class}"), hits(class) / there)
        });
        let all = sum(&mut matrix.iter().flatten().copied());
        let value = classes.clone().map(hits).sum::<f64>() / all;
        Ok(Measure { value, parts: precision.chain(recall).collect() })
    }

    fn state(&self) -> Json {
        self.counts.state()
    }

    fn load_state(&mut self, state: &Json) -> Result<()> {
        self.counts.load_state(state)
    }
}
