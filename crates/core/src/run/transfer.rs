//! The tensors of one rank on all ranks.

use ice_worker::Worker;
use tch::{Kind, Tensor};

use super::Run;
use crate::Result;

/// Tensors below this size, in bytes, travel together.
const SMALL: usize = 128 << 10;
/// How much travels together.
const PORTION: usize = 8 << 20;

impl Run<'_> {
    /// The tensors of one rank on all of them: of the modules, and of their optimizers unless they are at their beginnings.
    pub(super) fn broadcast_tensors(&self, source: usize, only_models: bool, stages: bool) -> Result<()> {
        if self.worker.world_size() == 1 {
            return Ok(());
        }
        let mut small = Portion::new(&self.worker, source, stages);
        for entry in self.graph.entries() {
            let state = entry.node.borrow().state();
            let optimizer = state.optimizer.iter().filter(|_| !only_models);
            for (_, tensor) in state.model.iter().chain(optimizer) {
                small.send(&tensor.detach())?;
            }
        }
        small.flush()?;
        for (tensor, staged) in small.staged {
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&staged))?;
        }
        Ok(())
    }
}

/// Small tensors that travel together.
struct Portion<'a> {
    worker: &'a Worker,
    source: usize,
    tensors: Vec<Tensor>,
    bytes: usize,
    /// Whether what comes is kept apart until all is there: a state of one's own is not to be lost with a source that dies meanwhile.
    stages: bool,
    staged: Vec<(Tensor, Tensor)>,
}

impl<'a> Portion<'a> {
    fn new(worker: &'a Worker, source: usize, stages: bool) -> Self {
        Self { worker, source, tensors: Vec::new(), bytes: 0, stages, staged: Vec::new() }
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
            return Ok(self.worker.broadcast_from(self.source, &view)?);
        }
        if bytes > 0 {
            self.tensors.push(tensor.shallow_clone());
            self.bytes += bytes;
        }
        if self.bytes >= PORTION { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let (tensors, is_source) = (std::mem::take(&mut self.tensors), self.worker.rank() == self.source);
        self.bytes = 0;
        if tensors.is_empty() {
            return Ok(());
        }
        let device = self.worker.device();
        let flat = |tensor: &Tensor| -> Result<Tensor> {
            let row = tensor.f_contiguous()?.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            Ok(row.f_to_device(device)?)
        };
        let rows = tensors.iter().map(flat).collect::<Result<Vec<_>>>()?;
        let all = Tensor::f_cat(&rows, 0)?;
        self.worker.broadcast_from(self.source, &all)?;
        if is_source {
            return Ok(());
        }
        let mut start = 0;
        for (tensor, row) in tensors.iter().zip(&rows) {
            let len = row.numel() as i64;
            // A view of another type must begin where one of its elements could.
            let bytes = all.f_narrow(0, start, len)?.copy().f_view_dtype(tensor.kind())?;
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&bytes.f_view_as(tensor)?))?;
            start += len;
        }
        Ok(())
    }
}
