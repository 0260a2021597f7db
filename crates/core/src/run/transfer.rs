//! The tensors of one rank on all ranks.

use std::collections::VecDeque;

use ice_worker::{Begun, Worker};
use tch::{Kind, Tensor};

use super::Run;
use crate::Result;

/// Tensors below this size, in bytes, travel together.
const SMALL: usize = 128 << 10;
/// How much travels together.
const PORTION: usize = 8 << 20;
/// Broadcasts that are under way at a time: while one waits for its turn, another uses the connection.
const AT_ONCE: usize = 8;

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
    under_way: VecDeque<(Begun, Portion)>,
    /// Whether what comes is kept apart until all is there: a state of one's own is not to be lost with a source that dies meanwhile.
    stages: bool,
    staged: Vec<(Tensor, Tensor)>,
}

/// What a broadcast brings.
enum Portion {
    /// A tensor, in its place.
    Whole,
    /// Several, one after the other as bytes.
    Packed { all: Tensor, tensors: Vec<Tensor> },
}

impl<'a> Transfer<'a> {
    fn new(worker: &'a Worker, source: usize, stages: bool) -> Self {
        let (small, under_way, staged) = (Vec::new(), VecDeque::new(), Vec::new());
        Self { worker, source, small, bytes: 0, under_way, stages, staged }
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
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes >= SMALL && tensor.is_contiguous() && tensor.device() == self.worker.device() {
            let view = tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            return self.begin(&view, Portion::Whole);
        }
        if bytes > 0 {
            self.small.push(tensor.shallow_clone());
            self.bytes += bytes;
        }
        if self.bytes >= PORTION { self.flush() } else { Ok(()) }
    }

    /// Sends the small ones.
    fn flush(&mut self) -> Result<()> {
        let tensors = std::mem::take(&mut self.small);
        self.bytes = 0;
        if tensors.is_empty() {
            return Ok(());
        }
        let device = self.worker.device();
        let flat = |tensor: &Tensor| -> Result<Tensor> {
            let row = tensor.f_contiguous()?.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            Ok(row.f_to_device(device)?)
        };
        let all = Tensor::f_cat(&tensors.iter().map(flat).collect::<Result<Vec<_>>>()?, 0)?;
        self.begin(&all.shallow_clone(), Portion::Packed { all, tensors })
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
            if let Portion::Packed { all, tensors } = portion
                && self.worker.rank() != self.source
            {
                unpack(&all, &tensors)?;
            }
        }
        Ok(())
    }
}

fn unpack(all: &Tensor, tensors: &[Tensor]) -> Result<()> {
    let mut start = 0;
    for tensor in tensors {
        let len = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as i64;
        // A view of another type must begin where one of its elements could.
        let bytes = all.f_narrow(0, start, len)?.copy().f_view_dtype(tensor.kind())?;
        tch::no_grad(|| tensor.shallow_clone().f_copy_(&bytes.f_view_as(tensor)?))?;
        start += len;
    }
    Ok(())
}
