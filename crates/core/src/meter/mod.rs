//! Meters: what is summed up over an epoch, on all ranks, and what comes of it.
//!
//! A meter keeps sums and counts, never averages, in f64 or i64. So what it says is the same however the samples are spread over the
//! ranks: an epoch of 10 samples on one rank and 3 on another weighs each of the 13 alike, and a rank without any adds nothing. Sums
//! in f64 are added in an order that depends on the ranks, which is the only difference; counts are exact.
//!
//! What is added stays on the device until it is asked for, so that an update makes no rank wait for its GPU.
//!
//! In the book: `docs/metrics.md#metrics`, and how to write one (`docs/nodes.md#a-meter`).

mod accuracy;
mod confusion;
mod dict;
mod moving;
mod simple;
mod sums;
#[cfg(test)]
mod tests;

use ice_worker::Worker;
use serde_json::Value as Json;

pub use accuracy::Accuracy;
pub use confusion::ConfusionMatrix;
pub use dict::Dict;
pub use moving::MovingAverage;
pub use simple::{Average, Summation, Value};
pub(crate) use sums::Sums;

use crate::{Measure, Result};

/// What a [`MetricNode`](crate::MetricNode) measures with.
///
/// In an epoch: [`reset`](Meter::reset), then for each batch [`update`](Meter::update), or [`skip`](Meter::skip) on a rank that has no
/// samples of it, then [`sync`](Meter::sync) and [`evaluate`](Meter::evaluate). A checkpoint is [`sync`](Meter::sync) and
/// [`state`](Meter::state) in between.
pub trait Meter {
    /// What an update takes in.
    type Input: 'static;

    /// Forgets everything.
    fn reset(&mut self);

    /// Takes in what this rank has of a batch.
    ///
    /// # Errors
    /// Input of a shape that does not fit.
    fn update(&mut self, input: &Self::Input) -> Result<()>;

    /// A batch passed of which this rank has no samples.
    fn skip(&mut self) {}

    /// Takes in what the other ranks have had since the last call. Collective. May be called at any time, and as often as one likes:
    /// what was taken in is not taken in again.
    ///
    /// # Errors
    /// The failure of a collective.
    fn sync(&mut self, worker: &Worker) -> Result<()>;

    /// What comes of everything that was taken in. Right after [`Meter::sync`] it is the same on all ranks.
    ///
    /// # Errors
    /// Input that turns out to make no sense.
    fn evaluate(&self) -> Result<Measure>;

    /// What a checkpoint must hold: everything that was taken in.
    fn state(&self) -> Json;

    /// Takes over what a checkpoint holds. Called on every rank with the same.
    ///
    /// # Errors
    /// [`Error::Resume`](crate::Error::Resume) where it is of another meter.
    fn load_state(&mut self, state: &Json) -> Result<()>;
}
