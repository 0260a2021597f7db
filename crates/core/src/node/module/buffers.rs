//! Tensors of a module that change without gradients, such as the statistics of a batch norm.

use ice_worker::Worker;
use tch::Tensor;

use super::flat::{buckets, flatten, unflatten};
use crate::Result;

/// The buffers of a module, in buckets that are broadcast as one tensor each.
pub(super) struct Buffers(Vec<Vec<Tensor>>);

impl Buffers {
    /// Groups the buffers by type. All ranks pass theirs in the same order.
    pub(super) fn new(mut tensors: Vec<Tensor>) -> Self {
        tensors.sort_by_key(|tensor| tensor.kind() as i32);
        let (shared, own): (Vec<_>, Vec<_>) = tensors.into_iter().partition(has_shared_elements);
        let together = buckets(&own).map(|bucket| bucket.iter().map(Tensor::shallow_clone).collect());
        // The group refuses such a tensor on all ranks. In a bucket it would fail on those that write to it alone.
        let alone = shared.into_iter().map(|tensor| vec![tensor]);
        Self(together.chain(alone).collect())
    }

    fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.0.iter().flatten()
    }

    /// Gives all ranks rank 0's buffers, by one collective per bucket.
    pub(super) fn broadcast(&self, worker: &Worker) -> Result<()> {
        if worker.world_size() == 1 {
            return Ok(());
        }
        let begin = |bucket: &Vec<Tensor>| {
            let row = match &bucket[..] {
                // The group takes any strides.
                [alone] => alone.shallow_clone(),
                several => flatten(several)?,
            };
            Ok((worker.begin_broadcast(0, &row)?, row))
        };
        // Several that are under way take less time than one after the other.
        let begun = self.0.iter().map(begin).collect::<Result<Vec<_>>>()?;
        for (bucket, (begun, row)) in self.0.iter().zip(begun) {
            begun.wait()?;
            if bucket.len() > 1 && worker.rank() != 0 {
                unflatten(&row, bucket)?;
            }
        }
        Ok(())
    }

    /// Copies of the values, for [`Buffers::restore`].
    pub(super) fn copies(&self) -> Vec<Tensor> {
        self.iter().map(Tensor::copy).collect()
    }

    /// Overwrites [copies](Buffers::copies) with the values of now.
    pub(super) fn save(&self, copies: &[Tensor]) -> Result<()> {
        for (copy, buffer) in copies.iter().zip(self.iter()) {
            copy.shallow_clone().f_copy_(buffer)?;
        }
        Ok(())
    }

    /// Gives the buffers the values of their [copies](Buffers::copies).
    pub(super) fn restore(&self, copies: &[Tensor]) {
        for (copy, buffer) in copies.iter().zip(self.iter()) {
            // A buffer that cannot be copied on its own device cannot be used in the next step, which fails then.
            drop(buffer.shallow_clone().f_copy_(copy));
        }
    }
}

/// Whether elements of the tensor are at one address, like those of an expanded tensor.
fn has_shared_elements(tensor: &Tensor) -> bool {
    tensor.size().iter().zip(tensor.stride()).any(|(size, stride)| *size > 1 && stride == 0)
}
