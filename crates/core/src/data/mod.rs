//! Data: what a dataset is, in which order it is read, and readers of common formats.

mod idx;
mod mnist;
mod sampler;

use tch::Device;

pub use mnist::{Labelled, Mnist, Split};
pub use sampler::Sampler;

use crate::Result;

/// Samples that can be had by index.
pub trait Dataset {
    /// What a batch is to the nodes that use it.
    type Batch: 'static;

    /// How many samples there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The samples of these indices, in this order, on the device.
    ///
    /// # Errors
    /// Whatever keeps a sample from being read.
    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch>;
}
