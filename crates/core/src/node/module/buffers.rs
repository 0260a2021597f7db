//! Tensors of a module that change without gradients, such as the statistics of a batch norm.

use ice_worker::Worker;
use tch::Tensor;

use super::flat::{buckets, flatten, unflatten};
use crate::Result;

/// The buffers of a module, in buckets that are broadcast as one tensor each.
pub(super) struct Buffers(Vec<Vec<Tensor>>);

impl Buffers {
    /// Groups the buffers by type. All ranks pass their buffers in the same order.
    pub(super) fn new(mut tensors: Vec<Tensor>) -> Self {
        tensors.sort_by_key(|tensor| tensor.kind() as i32);
        let (shared, own): (Vec<_>, Vec<_>) = tensors.into_iter().partition(has_shared_elements);
        let together = buckets(&own).map(|bucket| bucket.iter().map(Tensor::shallow_clone).collect());
        // The process group refuses such a tensor on all ranks. Within a bucket, only the ranks
        // that write to it would fail.
        let alone = shared.into_iter().map(|tensor| vec![tensor]);
        Self(together.chain(alone).collect())
    }

    fn iter(&self) -> impl Iterator<Item = &Tensor> {
        self.0.iter().flatten()
    }

    /// Sends rank 0's buffers to all ranks, by one collective per bucket.
    pub(super) fn broadcast(&self, worker: &Worker) -> Result<()> {
        if worker.world_size() == 1 {
            return Ok(());
        }
        let begin = |bucket: &Vec<Tensor>| {
            let row = match &bucket[..] {
                // The process group accepts any strides.
                [alone] => alone.shallow_clone(),
                several => flatten(several)?,
            };
            Ok((worker.begin_broadcast(0, &row)?, row))
        };
        // Concurrent broadcasts take less time than sequential ones.
        let begun = self.0.iter().map(begin).collect::<Result<Vec<_>>>()?;
        for (bucket, (begun, row)) in self.0.iter().zip(begun) {
            begun.wait()?;
            if bucket.len() > 1 && worker.rank() != 0 {
                unflatten(&row, bucket)?;
            }
        }
        Ok(())
    }

    /// Returns copies of the values, for [`Buffers::restore`].
    pub(super) fn copies(&self) -> Vec<Tensor> {
        self.iter().map(Tensor::copy).collect()
    }

    /// Overwrites [copies](Buffers::copies) with the current values.
    pub(super) fn save(&self, copies: &[Tensor]) -> Result<()> {
        for (copy, buffer) in copies.iter().zip(self.iter()) {
            copy.shallow_clone().f_copy_(buffer)?;
        }
        Ok(())
    }

    /// Restores the values from their [copies](Buffers::copies).
    pub(super) fn restore(&self, copies: &[Tensor]) {
        for (copy, buffer) in copies.iter().zip(self.iter()) {
            // A buffer that cannot be copied on its own device also fails in the next step, which
            // reports the error.
            drop(buffer.shallow_clone().f_copy_(copy));
        }
    }
}

/// Whether elements of the tensor share an address, like those of an expanded tensor.
fn has_shared_elements(tensor: &Tensor) -> bool {
    tensor.size().iter().zip(tensor.stride()).any(|(size, stride)| *size > 1 && stride == 0)
}
