//! Samples one by one: what they are, what is done to each, and how they become batches.

mod cache;
mod collate;
mod map;
mod record;

use std::path::Path;
use std::sync::Arc;

pub use cache::{CacheCounts, Cached};
pub use collate::{Collated, Stack};
pub use map::{Map, MapRandom};
pub use record::Record;

use super::SampleRng;
use crate::Result;

/// Samples that can be had one by one, by index.
///
/// ```
/// use ice_core::data::{Dataset, Items, items};
/// use tch::{Device, Tensor};
///
/// let dataset = items(100, |index| Ok(Tensor::from(index as i64)))
///     .map(|number| Ok(number * 2))
///     .map_random(|number, rng| Ok(if rng.chance(0.5) { -number } else { number }))
///     .stack();
/// // Int64 `[3]`.
/// let batch = dataset.batch(&[1, 2, 3], Device::Cpu)?;
/// assert_eq!(Vec::<i64>::try_from(batch.abs()).unwrap(), [2, 4, 6]);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub trait Items: Send + Sync {
    /// One sample.
    type Item: Send + 'static;

    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The sample of this index, less than [`Items::len`]. The random numbers are its own in this pass.
    ///
    /// # Errors
    /// Whatever keeps it from being read. Who asks adds the index.
    fn get(&self, index: usize, rng: &mut SampleRng) -> Result<Self::Item>;

    /// A number that is another one where the samples are: what is kept of them elsewhere is not taken for theirs.
    /// Readers make it from their files' names, lengths and times.
    fn fingerprint(&self) -> u64 {
        self.len() as u64
    }

    /// Does the same to each sample.
    fn map<T, F>(self, f: F) -> Map<Self, F>
    where
        Self: Sized,
        T: Send + 'static,
        F: Fn(Self::Item) -> Result<T> + Send + Sync,
    {
        Map::new(self, f)
    }

    /// Does something random to each sample, with numbers that do not depend on how many workers or ranks there are.
    fn map_random<T, F>(self, f: F) -> MapRandom<Self, F>
    where
        Self: Sized,
        T: Send + 'static,
        F: Fn(Self::Item, &mut SampleRng) -> Result<T> + Send + Sync,
    {
        MapRandom::new(self, f)
    }

    /// Keeps each sample in a folder, once it was made. See [`Cached`].
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) where the name is none for a folder.
    fn cache(self, folder: impl AsRef<Path>, name: &str) -> Result<Cached<Self>>
    where
        Self: Sized,
        Self::Item: Record,
    {
        Cached::new(self, folder.as_ref(), name)
    }

    /// Makes batches with `f`.
    fn collate<B, F>(self, f: F) -> Collated<Self, F>
    where
        Self: Sized,
        B: super::Batch,
        F: Fn(Vec<Self::Item>) -> Result<B> + Send + Sync,
    {
        Collated::new(self, f)
    }

    /// Makes batches with a new first dimension: tensors of one shape are stacked, numbers become a tensor, and of tuples
    /// each part for itself.
    #[expect(clippy::type_complexity, reason = "a function pointer that names the item")]
    fn stack(self) -> Collated<Self, fn(Vec<Self::Item>) -> Result<<Self::Item as Stack>::Batch>>
    where
        Self: Sized,
        Self::Item: Stack,
    {
        Collated::new(self, Stack::stack)
    }
}

impl<I: Items + ?Sized> Items for Arc<I> {
    type Item = I::Item;

    fn len(&self) -> usize {
        (**self).len()
    }

    fn get(&self, index: usize, rng: &mut SampleRng) -> Result<Self::Item> {
        (**self).get(index, rng)
    }

    fn fingerprint(&self) -> u64 {
        (**self).fingerprint()
    }
}

/// Samples that a function makes from their index.
pub fn items<T, F>(len: usize, f: F) -> FromFn<F>
where
    T: Send + 'static,
    F: Fn(usize) -> Result<T> + Send + Sync,
{
    FromFn { len, f }
}

/// What [`items`] makes.
pub struct FromFn<F> {
    len: usize,
    f: F,
}

impl<T: Send + 'static, F: Fn(usize) -> Result<T> + Send + Sync> Items for FromFn<F> {
    type Item = T;

    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, index: usize, _: &mut SampleRng) -> Result<T> {
        (self.f)(index)
    }
}
