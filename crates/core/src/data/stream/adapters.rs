use tch::Device;

use super::{BatchStream, ShardIter, Stream};
use crate::Result;
use crate::data::batch::to_device;
use crate::data::worker_pool::guard;
use crate::data::{Batch, Pass, SampleRng};

/// Creates a stream of samples from a function that opens shards. Each sample is loaded as soon as
/// it is found. Work that costs more than reading belongs in [`Stream::map`].
pub fn stream<T, I, F>(shards: usize, open: F) -> FromShards<F>
where
    T: Send + 'static,
    I: Iterator<Item = Result<T>> + Send + 'static,
    F: Fn(usize) -> Result<I> + Send + Sync,
{
    FromShards { shards, samples: None, open }
}

/// A stream created by [`stream`].
pub struct FromShards<F> {
    shards: usize,
    samples: Option<u64>,
    open: F,
}

impl<F> FromShards<F> {
    /// Sets the number of samples of all shards together, which gives epochs a length.
    #[must_use]
    pub fn of_samples(mut self, samples: u64) -> Self {
        self.samples = Some(samples);
        self
    }
}

impl<T, I, F> Stream for FromShards<F>
where
    T: Send + 'static,
    I: Iterator<Item = Result<T>> + Send + 'static,
    F: Fn(usize) -> Result<I> + Send + Sync,
{
    type LocatedSample = T;
    type Item = T;

    fn shards(&self) -> usize {
        self.shards
    }

    fn open(&self, shard: usize) -> Result<ShardIter<T>> {
        Ok(Box::new((self.open)(shard)?))
    }

    fn load(&self, found: T, _: &mut SampleRng) -> Result<T> {
        Ok(found)
    }

    fn samples(&self) -> Option<u64> {
        self.samples
    }
}

macro_rules! adapter {
    ($(#[$doc:meta])+ $name:ident, ($($argument:ty),+), |$f:ident, $item:ident, $rng:ident| $call:expr) => {
        $(#[$doc])+
        pub struct $name<S, F> {
            stream: S,
            f: F,
        }

        impl<S, F> $name<S, F> {
            pub(super) fn new(stream: S, f: F) -> Self {
                Self { stream, f }
            }
        }

        impl<S: Stream, T: Send + 'static, F: Fn($($argument),+) -> Result<T> + Send + Sync> Stream for $name<S, F> {
            type LocatedSample = S::LocatedSample;
            type Item = T;

            fn shards(&self) -> usize {
                self.stream.shards()
            }

            fn open(&self, shard: usize) -> Result<ShardIter<S::LocatedSample>> {
                self.stream.open(shard)
            }

            fn load(&self, found: S::LocatedSample, $rng: &mut SampleRng) -> Result<T> {
                let ($f, $item) = (&self.f, self.stream.load(found, $rng)?);
                $call
            }

            fn samples(&self) -> Option<u64> {
                self.stream.samples()
            }
        }
    };
}

adapter! {
    /// A stream created by [`Stream::map`].
    StreamMap, (S::Item), |f, item, rng| f(item)
}

adapter! {
    /// A stream created by [`Stream::map_random`].
    StreamMapRandom, (S::Item, &mut SampleRng), |f, item, rng| f(item, rng)
}

/// Batches created by [`Stream::collate`] and [`Stream::stack`]. The error or panic of a sample
/// names its position in the pass.
pub struct CollatedStream<S, F> {
    stream: S,
    collate: F,
}

impl<S, F> CollatedStream<S, F> {
    pub(super) fn new(stream: S, collate: F) -> Self {
        Self { stream, collate }
    }
}

impl<S, B, F> BatchStream for CollatedStream<S, F>
where
    S: Stream,
    B: Batch,
    F: Fn(Vec<S::Item>) -> Result<B> + Send + Sync,
{
    type LocatedSample = S::LocatedSample;
    type Batch = B;

    fn shards(&self) -> usize {
        self.stream.shards()
    }

    fn open(&self, shard: usize) -> Result<ShardIter<S::LocatedSample>> {
        self.stream.open(shard)
    }

    fn batch_in(&self, pass: &Pass, samples: Vec<(u64, S::LocatedSample)>, device: Device) -> Result<B> {
        let mut items = Vec::with_capacity(samples.len());
        for (position, found) in samples {
            pass.check()?;
            let item = guard(|| self.stream.load(found, &mut pass.rng(position)));
            items.push(item.map_err(|error| error.of_sample(position))?);
        }
        to_device((self.collate)(items)?, device)
    }

    fn samples(&self) -> Option<u64> {
        self.stream.samples()
    }
}
