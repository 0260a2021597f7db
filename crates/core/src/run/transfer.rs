//! The tensors of one rank on all ranks.

use std::collections::VecDeque;

use ice_worker::{Begun, Worker};
use tch::{Kind, Tensor};

use super::Run;
use crate::Result;

/// Tensors below this size, in bytes, travel together: gloo needs about half a millisecond for each broadcast beside its bytes, in which it could
/// have sent two megabytes, and copying them costs less.
const SMALL: usize = 4 << 20;
/// How much travels together, in bytes, before the last tensor.
const PORTION: usize = 8 << 20;
/// Where a tensor begins in a portion, in bytes: where an element of any type may lie.
const ALIGNED: usize = 16;
/// Broadcasts that are under way at a time: while one waits for its turn, another uses the connection.
const AT_ONCE: usize = 4;

impl Run<'_> {
    /// The tensors of one rank on all of them: of the modules, and of their optimizers unless they are at their beginnings.
    pub(super) fn broadcast_tensors(&self, source: usize, only_models: bool, stages: bool) -> Result<()> {
        if self.worker.world_size() == 1 {
            return Ok(());
        }
        let mut transfer = Transfer::new(&self.worker, source, stages);
        for entry in self.graph.entries() {
            let state = entry.node.borrow().state();
            let optimizer = state.optimizer.iter().filter(|_| !only_models);
            for (_, tensor) in state.model.iter().chain(optimizer) {
                transfer.send(&tensor.detach())?;
            }
        }
        transfer.flush()?;
        transfer.settle(0)?;
        for (tensor, staged) in transfer.staged {
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&staged))?;
        }
        Ok(())
    }
}

/// Tensors on their way.
struct Transfer<'a> {
    worker: &'a Worker,
    source: usize,
    /// Small ones that will travel together.
    small: Vec<Tensor>,
    bytes: usize,
    /// Memory for portions, to be used again: what is fresh would have to be mapped page by page.
    buffers: Vec<Tensor>,
    under_way: VecDeque<(Begun, Portion)>,
    /// Whether what comes is kept apart until all is there: a state of one's own is not to be lost with a source that dies meanwhile.
    stages: bool,
    staged: Vec<(Tensor, Tensor)>,
}

/// What a broadcast brings.
enum Portion {
    /// A tensor, in its place.
    Whole,
    /// Several, one after the other as bytes in a buffer.
    Packed { buffer: Tensor, tensors: Vec<Tensor> },
}

impl<'a> Transfer<'a> {
    fn new(worker: &'a Worker, source: usize, stages: bool) -> Self {
        let (small, buffers, under_way, staged) = (Vec::new(), Vec::new(), VecDeque::new(), Vec::new());
        Self { worker, source, small, bytes: 0, buffers, under_way, stages, staged }
    }

    fn send(&mut self, tensor: &Tensor) -> Result<()> {
        let tensor = &match self.stages {
            true => {
                let place = tensor.f_empty_like()?;
                self.staged.push((tensor.shallow_clone(), place.shallow_clone()));
                place
            }
            false => tensor.shallow_clone(),
        };
        let bytes = size(tensor);
        if bytes >= SMALL && tensor.is_contiguous() && tensor.device() == self.worker.device() {
            let view = tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            return self.begin(&view, Portion::Whole);
        }
        if bytes > 0 {
            self.small.push(tensor.shallow_clone());
            self.bytes += bytes.next_multiple_of(ALIGNED);
        }
        if self.bytes >= PORTION { self.flush() } else { Ok(()) }
    }

    /// Sends the small ones.
    fn flush(&mut self) -> Result<()> {
        let tensors = std::mem::take(&mut self.small);
        let bytes = std::mem::take(&mut self.bytes);
        if tensors.is_empty() {
            return Ok(());
        }
        // Their buffers come back.
        self.settle(AT_ONCE - 1)?;
        let spare = self.buffers.iter().position(|buffer| buffer.numel() >= bytes);
        let buffer = match spare {
            Some(at) => self.buffers.swap_remove(at),
            None => {
                let len = bytes.max(PORTION + SMALL) as i64;
                Tensor::f_empty([len], (Kind::Uint8, self.worker.device()))?
            }
        };
        if self.worker.rank() == self.source {
            for (tensor, mut place) in tensors.iter().zip(places(&buffer, &tensors)?) {
                tch::no_grad(|| place.f_copy_(tensor))?;
            }
        }
        let view = buffer.f_narrow(0, 0, bytes as i64)?;
        self.begin(&view, Portion::Packed { buffer, tensors })
    }

    fn begin(&mut self, bytes: &Tensor, portion: Portion) -> Result<()> {
        self.settle(AT_ONCE - 1)?;
        self.under_way.push_back((self.worker.begin_broadcast(self.source, bytes)?, portion));
        Ok(())
    }

    /// Waits until no more than so many are under way.
    fn settle(&mut self, most: usize) -> Result<()> {
        while self.under_way.len() > most
            && let Some((begun, portion)) = self.under_way.pop_front()
        {
            begun.wait()?;
            if let Portion::Packed { buffer, tensors } = portion {
                if self.worker.rank() != self.source {
                    for (tensor, place) in tensors.iter().zip(places(&buffer, &tensors)?) {
                        tch::no_grad(|| tensor.shallow_clone().f_copy_(&place))?;
                    }
                }
                self.buffers.push(buffer);
            }
        }
        Ok(())
    }
}

/// Bytes of a tensor.
fn size(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Where the tensors lie in the buffer, as tensors of their shapes and types.
fn places(buffer: &Tensor, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut start = 0;
    let place = |tensor: &Tensor| {
        let bytes = size(tensor);
        let place =
            buffer.f_narrow(0, start as i64, bytes as i64)?.f_view_dtype(tensor.kind())?.f_view_as(tensor)?;
        start += bytes.next_multiple_of(ALIGNED);
        Ok(place)
    };
    tensors.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn tensors_of_all_types_and_layouts_come_out_of_a_buffer_as_they_went_in() {
        let cpu = |kind| (kind, Device::Cpu);
        let tensors = [
            Tensor::from_slice(&[true, false, true]),
            Tensor::from_slice(&[0.5, -1.5]),
            Tensor::from(7_i64),
            Tensor::arange(6, cpu(Kind::Float)).view([2, 3]).transpose(0, 1),
            Tensor::zeros([0], cpu(Kind::Float)),
            Tensor::ones([5], cpu(Kind::BFloat16)),
            Tensor::ones([1], cpu(Kind::ComplexDouble)),
        ];
        let bytes: usize = tensors.iter().map(|tensor| size(tensor).next_multiple_of(ALIGNED)).sum();
        let buffer = Tensor::zeros([bytes as i64], cpu(Kind::Uint8));
        for (tensor, mut place) in tensors.iter().zip(places(&buffer, &tensors).unwrap()) {
            place.copy_(tensor);
        }
        for (tensor, place) in tensors.iter().zip(places(&buffer, &tensors).unwrap()) {
            assert_eq!((tensor.kind(), tensor.size()), (place.kind(), place.size()));
            assert!(tensor.equal(&place), "{tensor:?} became {place:?}");
        }
    }
}
