//! Individual samples: their type, their transforms, and their collation into batches.

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

/// Samples with random access by index.
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
    /// Type of a sample.
    type Item: Send + 'static;

    /// Returns the number of samples.
    fn len(&self) -> usize;

    /// Whether there are no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the sample of this index, which is less than [`Items::len`]. The random numbers
    /// belong to this sample and pass.
    ///
    /// # Errors
    /// The reason that the sample cannot be read. The caller adds the index.
    fn get(&self, index: usize, rng: &mut SampleRng) -> Result<Self::Item>;

    /// Returns a number that differs for other samples, so that cached samples are not mistaken for
    /// these. Readers derive it from the names, lengths and times of their files.
    fn fingerprint(&self) -> u64 {
        self.len() as u64
    }

    /// Transforms each sample with `f`.
    fn map<T, F>(self, f: F) -> Map<Self, F>
    where
        Self: Sized,
        T: Send + 'static,
        F: Fn(Self::Item) -> Result<T> + Send + Sync,
    {
        Map::new(self, f)
    }

    /// Transforms each sample with `f` and random numbers, which do not depend on the number of
    /// workers or ranks.
    fn map_random<T, F>(self, f: F) -> MapRandom<Self, F>
    where
        Self: Sized,
        T: Send + 'static,
        F: Fn(Self::Item, &mut SampleRng) -> Result<T> + Send + Sync,
    {
        MapRandom::new(self, f)
    }

    /// Caches each sample in a folder once it is made. See [`Cached`].
    ///
    /// # Errors
    /// [`Error::Usage`](crate::Error::Usage) if the name is not valid for a folder.
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

    /// Makes batches with a new first dimension. Tensors of one shape are stacked, numbers become a
    /// tensor, and the parts of tuples are stacked separately.
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

/// Creates samples from a function of their index.
pub fn items<T, F>(len: usize, f: F) -> FromFn<F>
where
    T: Send + 'static,
    F: Fn(usize) -> Result<T> + Send + Sync,
{
    FromFn { len, f }
}

/// Samples created by [`items`].
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
