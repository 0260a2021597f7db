//! Meters: sums over an epoch on all ranks, and measures derived from them.
//!
//! A meter keeps sums and counts in f64 or i64, never averages. Its measure therefore does not
//! depend on the distribution of samples over ranks: with 10 samples on one rank and 3 on another,
//! each of the 13 has the same weight. A rank without samples adds nothing. Counts are exact. Only
//! f64 sums depend on the ranks, by the order of additions.
//!
//! Sums stay on the device until they are read, so that an update does not make the rank wait for
//! its GPU.
//!
//! In the book: `docs/metrics.md#metrics`, and how to write a meter (`docs/nodes.md#a-meter`).

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

/// The measuring part of a [`MetricNode`](crate::MetricNode).
///
/// An epoch calls [`reset`](Meter::reset), then for each batch [`update`](Meter::update), or
/// [`skip`](Meter::skip) on a rank without samples of the batch, then [`sync`](Meter::sync) and
/// [`evaluate`](Meter::evaluate). A checkpoint within the epoch calls [`sync`](Meter::sync) and
/// [`state`](Meter::state).
pub trait Meter {
    /// Input of an update.
    type Input: 'static;

    /// Resets all sums.
    fn reset(&mut self);

    /// Adds this rank's share of a batch.
    ///
    /// # Errors
    /// Input of a wrong shape.
    fn update(&mut self, input: &Self::Input) -> Result<()>;

    /// Notes a batch of which this rank has no samples.
    fn skip(&mut self) {}

    /// Adds the updates of the other ranks since the last call. Collective. May be called at any
    /// time and any number of times: no update is added twice.
    ///
    /// # Errors
    /// The failure of a collective.
    fn sync(&mut self, worker: &Worker) -> Result<()>;

    /// Returns the measure of all updates. Right after [`Meter::sync`] it is the same on all ranks.
    ///
    /// # Errors
    /// Input that turns out to be invalid.
    fn evaluate(&self) -> Result<Measure>;

    /// Returns the state for a checkpoint: everything that was added.
    fn state(&self) -> Json;

    /// Loads the state of a checkpoint. Every rank calls it with the same state.
    ///
    /// # Errors
    /// [`Error::Resume`](crate::Error::Resume) if the state belongs to another meter.
    fn load_state(&mut self, state: &Json) -> Result<()>;
}
