//! Samples that can only be read in order.

mod adapters;
mod batch_loader;
mod walk;

use tch::Device;

pub use adapters::{CollatedStream, FromShards, StreamMap, StreamMapRandom, stream};
pub(crate) use batch_loader::{StreamLoader, StreamOrder};

use super::items::Stack;
use super::{Batch, Pass, SampleRng};
use crate::Result;

/// The samples of a shard, in order.
pub type ShardIter<T> = Box<dyn Iterator<Item = Result<T>> + Send>;

/// Samples that can only be read in sequence, from one or more shards.
///
/// Reading a sample has two steps. Finding it is cheap: the position of its bytes, or a line of
/// text. Loading it is expensive: reading, decoding, transforming. All ranks find all samples in
/// the same order, and each rank loads only its share. The order is therefore the same for any
/// number of ranks, no sample is repeated or left out, and a position is a single number. The cost
/// is that every rank finds every sample.
///
/// ```
/// use ice_core::StreamNode;
/// use ice_core::data::{Stream, stream};
/// # let folder = tempfile::tempdir().unwrap();
/// # std::fs::write(folder.path().join("0.txt"), "1\n2\n").unwrap();
/// # std::fs::write(folder.path().join("1.txt"), "3\n").unwrap();
/// # let folder = folder.path().to_owned();
/// use std::io::{BufRead, BufReader};
/// use ice_core::Error;
///
/// let lines = stream(2, move |shard| {
///     let path = folder.join(format!("{shard}.txt"));
///     let fail = |source| Error::Io { path: path.clone(), source };
///     let file = std::fs::File::open(&path).map_err(fail)?;
///     let path = path.clone();
///     Ok(BufReader::new(file).lines().map(move |line| {
///         line.map_err(|source| Error::Io { path: path.clone(), source })
///     }))
/// });
/// let numbers = lines.map(|line| line.parse::<i64>().map_err(|error| Error::Usage(error.to_string())));
/// let node = StreamNode::new(numbers.stack()).shuffle(1000).batch_size(32).workers(4);
/// ```
pub trait Stream: Send + Sync {
    /// A sample that was found.
    type LocatedSample: Send + 'static;
    /// A sample that was loaded.
    type Item: Send + 'static;

    /// Returns the number of shards.
    fn shards(&self) -> usize;

    /// Finds the samples of a shard.
    ///
    /// # Errors
    /// The reason that the shard cannot be opened.
    fn open(&self, shard: usize) -> Result<ShardIter<Self::LocatedSample>>;

    /// Loads a sample. The random numbers belong to this sample and pass.
    ///
    /// # Errors
    /// The reason that the sample cannot be read.
    fn load(&self, found: Self::LocatedSample, rng: &mut SampleRng) -> Result<Self::Item>;

    /// Returns the number of samples of all shards together, if it is known. A stream that does not
    /// know it needs tasks with a number of steps, or
    /// [`StreamNode::iterations`](crate::StreamNode::iterations).
    fn samples(&self) -> Option<u64> {
        None
    }

    /// Transforms each sample with `f`.
    fn map<T, F>(self, f: F) -> StreamMap<Self, F>
    where
        Self: Sized,
        T: Send + 'static,
        F: Fn(Self::Item) -> Result<T> + Send + Sync,
    {
        StreamMap::new(self, f)
    }

    /// Transforms each sample with `f` and random numbers, which do not depend on the number of
    /// workers or ranks.
    fn map_random<T, F>(self, f: F) -> StreamMapRandom<Self, F>
    where
        Self: Sized,
        T: Send + 'static,
        F: Fn(Self::Item, &mut SampleRng) -> Result<T> + Send + Sync,
    {
        StreamMapRandom::new(self, f)
    }

    /// Makes batches with `f`.
    fn collate<B, F>(self, f: F) -> CollatedStream<Self, F>
    where
        Self: Sized,
        B: Batch,
        F: Fn(Vec<Self::Item>) -> Result<B> + Send + Sync,
    {
        CollatedStream::new(self, f)
    }

    /// Makes batches with a new first dimension. See [`Items::stack`](super::Items::stack).
    #[expect(clippy::type_complexity, reason = "a function pointer that names the item")]
    fn stack(self) -> CollatedStream<Self, fn(Vec<Self::Item>) -> Result<<Self::Item as Stack>::Batch>>
    where
        Self: Sized,
        Self::Item: Stack,
    {
        CollatedStream::new(self, Stack::stack)
    }
}

/// A [`Stream`] made into batches, for a [`StreamNode`](crate::StreamNode).
pub trait BatchStream: Send + Sync {
    /// A sample that was found.
    type LocatedSample: Send + 'static;
    /// Type of a batch, as seen by the nodes that use it.
    type Batch: Batch;

    /// Returns the number of shards.
    fn shards(&self) -> usize;

    /// Finds the samples of a shard.
    ///
    /// # Errors
    /// The reason that the shard cannot be opened.
    fn open(&self, shard: usize) -> Result<ShardIter<Self::LocatedSample>>;

    /// Loads the samples, each with its position in the pass, into a batch on the device.
    ///
    /// # Errors
    /// The reason that a sample cannot be read.
    fn batch_in(
        &self,
        pass: &Pass,
        samples: Vec<(u64, Self::LocatedSample)>,
        device: Device,
    ) -> Result<Self::Batch>;

    /// Returns the number of samples of all shards together, if it is known.
    fn samples(&self) -> Option<u64>;
}
