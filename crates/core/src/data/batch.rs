use std::collections::BTreeMap;

use tch::{Device, Tensor};

use crate::Result;

/// A batch that a dataset makes for one step. It moves from a worker thread to the step, and from
/// the CPU to the device.
///
/// ```
/// use ice_core::data::Batch;
/// use ice_core::Result;
/// use tch::Tensor;
///
/// struct Pairs {
///     left: Tensor,
///     right: Tensor,
/// }
///
/// impl Batch for Pairs {
///     fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
///         Ok(Self { left: f(self.left)?, right: f(self.right)? })
///     }
/// }
/// ```
pub trait Batch: Send + Sized + 'static {
    /// Replaces each tensor of the batch by `f` of the tensor. Parts without tensors stay
    /// unchanged.
    ///
    /// # Errors
    /// The errors of `f`.
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self>;
}

impl Batch for Tensor {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        f(self)
    }
}

impl<T: Batch> Batch for Option<T> {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.map(|batch| batch.map_tensors(f)).transpose()
    }
}

impl<T: Batch> Batch for Vec<T> {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.into_iter().map(|batch| batch.map_tensors(f)).collect()
    }
}

impl<K: Ord + Send + 'static, T: Batch> Batch for BTreeMap<K, T> {
    fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        self.into_iter().map(|(key, batch)| Ok((key, batch.map_tensors(f)?))).collect()
    }
}

macro_rules! tuples {
    ($(($($name:ident)+))+) => {$(
        impl<$($name: Batch),+> Batch for ($($name,)+) {
            fn map_tensors(self, f: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
                #[expect(non_snake_case, reason = "named after the types")]
                let ($($name,)+) = self;
                Ok(($($name.map_tensors(f)?,)+))
            }
        }
    )+};
}

tuples! { (A B) (A B C) (A B C D) }

macro_rules! without_tensors {
    ($($name:ty)+) => {$(
        impl Batch for $name {
            fn map_tensors(self, _: &mut dyn FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
                Ok(self)
            }
        }
    )+};
}

without_tensors! { () bool u8 u16 u32 u64 usize i8 i16 i32 i64 isize f32 f64 String }

/// Copies a batch for a GPU into page-locked memory, so that its copy to the GPU can overlap with
/// the step.
pub(crate) fn pin<B: Batch>(batch: B, device: Device) -> Result<B> {
    match device {
        Device::Cuda(_) => batch.map_tensors(&mut |tensor| match tensor.device() {
            Device::Cpu => Ok(tensor.f_pin_memory(device)?),
            _ => Ok(tensor),
        }),
        _ => Ok(batch),
    }
}

/// Moves a batch to the device. A copy from pinned memory is only queued. libtorch keeps the memory
/// until the copy is done, and computations on the batch wait for it in the same stream.
pub(crate) fn to_device<B: Batch>(batch: B, device: Device) -> Result<B> {
    batch.map_tensors(&mut |tensor| match tensor.device() == device {
        true => Ok(tensor),
        false => Ok(tensor.f_to_device_(device, tensor.kind(), true, false)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tensor_of_a_nested_batch_is_mapped_once() {
        let tensor = |value: i64| Tensor::from(value);
        let batch = (
            tensor(1),
            vec![(tensor(2), 7_i64), (tensor(3), 8)],
            Some(BTreeMap::from([("x".to_owned(), tensor(4))])),
        );
        let mut seen = Vec::new();
        let (one, pairs, map) = batch
            .map_tensors(&mut |tensor| {
                seen.push(tensor.int64_value(&[]));
                Ok(tensor + 10)
            })
            .unwrap();
        assert_eq!(seen, [1, 2, 3, 4]);
        assert_eq!(one.int64_value(&[]), 11);
        assert_eq!(
            pairs.iter().map(|(t, n)| (t.int64_value(&[]), *n)).collect::<Vec<_>>(),
            [(12, 7), (13, 8)]
        );
        assert_eq!(map.unwrap()["x"].int64_value(&[]), 14);
    }

    #[test]
    fn on_the_cpu_nothing_is_pinned_or_copied() {
        let batch = Tensor::zeros([3], (tch::Kind::Float, Device::Cpu));
        let place = batch.data_ptr();
        let moved = to_device(pin(batch, Device::Cpu).unwrap(), Device::Cpu).unwrap();
        assert_eq!(moved.data_ptr(), place);
    }
}
