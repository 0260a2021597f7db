use tch::{Device, Kind, Tensor};

use super::Items;
use crate::data::batch::to_device;
use crate::data::worker_pool::guard;
use crate::data::{Batch, Dataset, Labelled, Pass};
use crate::{Error, Result};

/// Samples made into batches, created by [`Items::collate`] and [`Items::stack`].
///
/// Samples and batches are made on the CPU. The error or panic of a sample names the sample.
pub struct Collated<I, F> {
    items: I,
    collate: F,
}

impl<I, F> Collated<I, F> {
    pub(super) fn new(items: I, collate: F) -> Self {
        Self { items, collate }
    }

    pub(super) fn items(&self) -> &I {
        &self.items
    }
}

impl<I, B, F> Dataset for Collated<I, F>
where
    I: Items,
    B: Batch,
    F: Fn(Vec<I::Item>) -> Result<B> + Send + Sync,
{
    type Batch = B;

    fn len(&self) -> usize {
        self.items.len()
    }

    /// Makes the samples of pass 0 of a run with the seed 0.
    fn batch(&self, indices: &[i64], device: Device) -> Result<B> {
        self.batch_in(&Pass::new(0, 0), indices, device)
    }

    fn batch_in(&self, pass: &Pass, indices: &[i64], device: Device) -> Result<B> {
        let mut items = Vec::with_capacity(indices.len());
        for &index in indices {
            pass.check()?;
            let item = guard(|| self.items.get(index as usize, &mut pass.rng(index as u64)));
            items.push(item.map_err(|error| error.of_sample(index as u64))?);
        }
        to_device((self.collate)(items)?, device)
    }
}

/// Samples that become a batch by a new first dimension.
pub trait Stack: Sized {
    /// Type of the batch.
    type Batch: Batch;

    /// Makes a batch.
    ///
    /// # Errors
    /// Tensors of different shapes or kinds.
    fn stack(items: Vec<Self>) -> Result<Self::Batch>;
}

/// Stacks `[...]` each to `[n, ...]`.
impl Stack for Tensor {
    type Batch = Tensor;

    fn stack(items: Vec<Self>) -> Result<Tensor> {
        let first = items.first().map(|item| (item.size(), item.kind()));
        let other = items.iter().map(|item| (item.size(), item.kind())).find(|of| Some(of) != first.as_ref());
        match (first, other) {
            (Some((size, kind)), Some((other_size, other_kind))) => Err(Error::Usage(format!(
                "samples of one batch differ: {kind:?} of shape {size:?} and {other_kind:?} of shape {other_size:?}: \
                 make them alike, or collate them with a closure"
            ))),
            _ => Ok(Tensor::f_stack(&items, 0)?),
        }
    }
}

macro_rules! numbers {
    ($($name:ty => $kind:ident as $element:ty;)+) => {$(
        #[doc = concat!("A tensor of ", stringify!($kind), " `[n]`.")]
        impl Stack for $name {
            type Batch = Tensor;

            fn stack(items: Vec<Self>) -> Result<Tensor> {
                let items: Vec<$element> = items.into_iter().map(|item| item as $element).collect();
                Ok(Tensor::f_from_slice(&items)?.f_to_kind(Kind::$kind)?)
            }
        }
    )+};
}

numbers! {
    i64 => Int64 as i64;
    i32 => Int as i32;
    u8 => Uint8 as u8;
    bool => Bool as u8;
    f32 => Float as f32;
    f64 => Double as f64;
    usize => Int64 as i64;
}

impl<A: Stack, B: Stack> Stack for (A, B) {
    type Batch = (A::Batch, B::Batch);

    fn stack(items: Vec<Self>) -> Result<Self::Batch> {
        let (a, b) = items.into_iter().unzip();
        Ok((A::stack(a)?, B::stack(b)?))
    }
}

impl<A: Stack, B: Stack, C: Stack> Stack for (A, B, C) {
    type Batch = (A::Batch, B::Batch, C::Batch);

    fn stack(items: Vec<Self>) -> Result<Self::Batch> {
        let (a, (b, c)): (_, (_, _)) = items.into_iter().map(|(a, b, c)| (a, (b, c))).unzip();
        Ok((A::stack(a)?, B::stack(b)?, C::stack(c)?))
    }
}

impl Labelled {
    /// Makes a batch of images of one shape with their classes, for [`Items::collate`].
    ///
    /// # Errors
    /// Images of different shapes or kinds.
    pub fn collate(items: Vec<(Tensor, i64)>) -> Result<Self> {
        let (images, labels) = Stack::stack(items)?;
        Ok(Self { images, labels })
    }
}
