//! Tensors of a module that change without gradients, such as the statistics of a batch norm.

use ice_worker::{Begun, Worker};
use tch::Tensor;

use crate::Result;

/// Gives all ranks rank 0's buffers. Collective.
pub(super) fn broadcast(buffers: &[Tensor], worker: &Worker) -> Result<()> {
    if worker.world_size() == 1 {
        return Ok(());
    }
    let begin = |buffer| worker.begin_broadcast(0, buffer);
    let begun = buffers.iter().map(begin).collect::<Result<Vec<_>, _>>()?;
    Ok(begun.into_iter().try_for_each(Begun::wait)?)
}

/// Gives buffers the values that they had when the step began.
pub(super) fn restore(buffers: &[Tensor], before: &[Tensor]) {
    for (before, buffer) in before.iter().zip(buffers) {
        // A buffer that cannot be copied on its own device cannot be used in the next step, which fails then.
        drop(buffer.shallow_clone().f_copy_(before));
    }
}
