//! Data: datasets, the order of samples, the threads that make batches, and readers of common
//! formats.
//!
//! - [`Items`] are individual samples. They can be transformed, cached on disk, and collated into a
//!   `Dataset`.
//! - A [`Dataset`] makes batches of samples by index, for a [`DatasetNode`](crate::DatasetNode).
//! - A [`Stream`] is read in order, in shards, for a [`StreamNode`](crate::StreamNode).
//!
//! In the book: `docs/data.md`.

mod batch;
mod batch_loader;
mod items;
mod pass;
pub mod readers;
mod sampler;
mod stream;
#[cfg(test)]
mod tests;
mod worker_pool;

use std::sync::Arc;

use tch::Device;

pub use batch::Batch;
pub(crate) use batch_loader::{BatchLoader, BatchSize, PrefetchOptions, RankSlot};
pub use items::{CacheCounts, Cached, Collated, FromFn, Items, Map, MapRandom, Record, Stack, items};
pub use pass::{Pass, SampleRng};
pub use readers::{Labelled, Mnist, Split};
pub use sampler::{Sampler, SamplerCursor};
pub use stream::{
    BatchStream, CollatedStream, FromShards, ShardIter, Stream, StreamMap, StreamMapRandom, stream,
};
pub(crate) use stream::{StreamLoader, StreamOrder};

use crate::Result;

/// Samples with random access by index, made into batches.
///
/// ```
/// use ice_core::data::Dataset;
/// use ice_core::Result;
/// use tch::{Device, Kind, Tensor};
///
/// /// The squares of 0 to 99: int64 `[n]`.
/// struct Squares;
///
/// impl Dataset for Squares {
///     type Batch = Tensor;
///
///     fn len(&self) -> usize {
///         100
///     }
///
///     fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
///         Ok(Tensor::from_slice(indices).to_device(device).square())
///     }
/// }
/// ```
pub trait Dataset: Send + Sync {
    /// Type of a batch, as seen by the nodes that use it.
    type Batch: Batch;

    /// Returns the number of samples.
    fn len(&self) -> usize;

    /// Whether there are no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes a batch of the samples with these indices, in this order, on the device. In a worker
    /// thread the device is the CPU, and the node moves the batch later.
    ///
    /// # Errors
    /// The reason that a sample cannot be read.
    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch>;

    /// Like [`Dataset::batch`], for a dataset with random transforms: their random numbers come
    /// from the pass. The node calls this method.
    ///
    /// # Errors
    /// The reason that a sample cannot be read.
    fn batch_in(&self, _pass: &Pass, indices: &[i64], device: Device) -> Result<Self::Batch> {
        self.batch(indices, device)
    }
}

impl<D: Dataset + ?Sized> Dataset for Arc<D> {
    type Batch = D::Batch;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch> {
        (**self).batch(indices, device)
    }

    fn batch_in(&self, pass: &Pass, indices: &[i64], device: Device) -> Result<Self::Batch> {
        (**self).batch_in(pass, indices, device)
    }
}
