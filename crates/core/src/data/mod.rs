//! Data: what a dataset is, in which order it is read, who makes its batches, and readers of common formats.
//!
//! - [`Items`] are samples one by one. They are transformed, kept on disk, and collated into a `Dataset`.
//! - A [`Dataset`] makes batches of samples that can be had by index, for a [`DatasetNode`](crate::DatasetNode).
//! - A [`Stream`] is read in order, in shards, for a [`StreamNode`](crate::StreamNode).
//!
//! In the book: `docs/data.md`.

mod batch;
mod feed;
mod items;
mod lane;
mod pass;
pub mod readers;
mod sampler;
mod stream;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tch::Device;

pub use batch::Batch;
pub(crate) use feed::{Ahead, BatchSize, Feed, Seat};
pub use items::{CacheCounts, Cached, Collated, FromFn, Items, Map, MapRandom, Record, Stack, items};
pub use pass::{Pass, SampleRng};
pub use readers::{Labelled, Mnist, Split};
pub use sampler::{Place, Sampler};
pub use stream::{
    BatchStream, CollatedStream, FromShards, ShardIter, Stream, StreamMap, StreamMapRandom, stream,
};
pub(crate) use stream::{StreamFeed, StreamOrder};

use crate::Result;

/// Samples that can be had by index, made into batches.
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
    /// What a batch is to the nodes that use it.
    type Batch: Batch;

    /// How many samples there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The samples of these indices, in this order, on the device. In a worker thread that is the CPU: the node moves the
    /// batch to where it is used.
    ///
    /// # Errors
    /// Whatever keeps a sample from being read.
    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch>;

    /// As [`Dataset::batch`], for a dataset with random transforms: their numbers come from the pass. This is what the node
    /// calls.
    ///
    /// # Errors
    /// Whatever keeps a sample from being read.
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
