//! Transfer of tensors from one rank to the ranks that lack them.
//!
//! On a GPU, NCCL broadcasts to all ranks of the group. On the CPU, tensors travel along a binary
//! tree of the source and the lacking ranks only, in portions: a rank forwards a portion while the
//! next one is still in transit. In both cases, several portions are in flight, small tensors are
//! packed into one portion, and large tensors are split into several.
//!
//! All ranks iterate over the same tensors in the same order, so a portion needs no header.

use std::collections::VecDeque;

use ice_worker::{PendingCollective, Worker};
use tch::{Device, Kind, Tensor};

use super::Run;
use crate::Result;

/// Alignment of a tensor within a portion, in bytes: sufficient for elements of any type.
const ALIGNED: usize = 16;

/// Thresholds for packing and splitting tensors.
struct Sizes {
    /// Size in bytes below which tensors are packed together: a copy costs less than a send of its
    /// own.
    small: usize,
    /// Size in bytes at which packed tensors are sent. The last tensor may exceed it.
    portion: usize,
    /// Size in bytes above which a tensor is split.
    largest: usize,
    /// Number of portions in flight, so that the connection is never idle.
    at_once: usize,
}

/// Sizes for NCCL's broadcast, which costs as much as megabytes of data. Parts are small enough for
/// buffers on the GPU, which parts need that are not received in place.
const BROADCAST: Sizes = Sizes { small: 4 << 20, portion: 8 << 20, largest: 64 << 20, at_once: 4 };
/// Sizes for sends, which cost little. A rank that forwards small parts delivers early.
const TREE: Sizes = Sizes { small: 64 << 10, portion: 1 << 20, largest: 8 << 20, at_once: 64 };

impl Run<'_> {
    /// Brings the tensors of the rank `source` to the ranks that lack them: those of the modules
    /// and, without `only_models`, of their optimizers.
    ///
    /// `lacking` holds other ranks in ascending order, the same on all ranks. With `stages`,
    /// received tensors are kept apart until all have arrived.
    pub(super) fn transfer_tensors(
        &self,
        source: usize,
        lacking: &[usize],
        only_models: bool,
        stages: bool,
    ) -> Result<()> {
        let Some(way) = TransferPlan::of(self.worker.rank(), self.worker.device(), source, lacking) else {
            return Ok(());
        };
        let mut transfer = Transfer::new(&self.worker, way, stages);
        for entry in self.graph.entries() {
            let state = entry.node.borrow().state();
            let optimizer = state.optimizer.iter().filter(|_| !only_models);
            for (_, tensor) in state.model.iter().chain(optimizer) {
                transfer.send(&tensor.detach())?;
            }
        }
        transfer.finish()
    }
}

/// A rank's part in a broadcast.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Source,
    Lacks,
    /// The rank already has the tensors and ignores what it receives. An aborted broadcast leaves
    /// garbage in the receive buffer, so the rank must not receive into its own tensors.
    Observer,
}

/// The path of tensors to this rank, and the ranks that it forwards them to.
enum TransferPlan {
    /// A broadcast by NCCL to all ranks at once. Sends would first need a connection between each
    /// pair of ranks.
    Broadcast { source: usize, role: Role },
    /// Sends from rank to rank. Each rank forwards what has arrived while the rest is still in
    /// transit.
    Tree { from: Option<usize>, to: Vec<usize> },
}

impl TransferPlan {
    /// Returns this rank's part in the transfer, or `None` if it has no part.
    fn of(own: usize, device: Device, source: usize, lacking: &[usize]) -> Option<Self> {
        if lacking.is_empty() {
            return None;
        }
        if device.is_cuda() {
            let role = match own == source {
                true => Role::Source,
                false if lacking.contains(&own) => Role::Lacks,
                false => Role::Observer,
            };
            return Some(Self::Broadcast { source, role });
        }
        let rank = |place: usize| if place == 0 { source } else { lacking[place - 1] };
        let place = match own == source {
            true => 0,
            false => 1 + lacking.binary_search(&own).ok()?,
        };
        let (from, to) = neighbours(place, 1 + lacking.len());
        Some(Self::Tree { from: from.map(rank), to: to.into_iter().map(rank).collect() })
    }

    fn sizes(&self) -> &'static Sizes {
        match self {
            Self::Broadcast { .. } => &BROADCAST,
            Self::Tree { .. } => &TREE,
        }
    }

    /// Returns the ranks to which this rank forwards what it receives.
    fn next(&self) -> &[usize] {
        match self {
            Self::Tree { from: Some(_), to } => to,
            _ => &[],
        }
    }

    /// Whether this rank is the source of the tensors.
    fn is_source(&self) -> bool {
        match self {
            Self::Broadcast { role, .. } => *role == Role::Source,
            Self::Tree { from, .. } => from.is_none(),
        }
    }

    /// Whether a large tensor is sent from, or received into, its own memory, without a buffer.
    fn comes_in_place(&self, stages: bool) -> bool {
        match self {
            Self::Broadcast { role, .. } => *role == Role::Source || (*role == Role::Lacks && !stages),
            Self::Tree { .. } => true,
        }
    }

    /// Whether this rank needs what it receives.
    fn is_for_this(&self) -> bool {
        match self {
            Self::Broadcast { role, .. } => *role == Role::Lacks,
            Self::Tree { from, .. } => from.is_some(),
        }
    }
}

/// Returns the parent and the children of `place` in a binary tree of `count` places. The places of
/// a subtree are contiguous, so that few edges cross nodes if places are in the order of ranks.
fn neighbours(place: usize, count: usize) -> (Option<usize>, Vec<usize>) {
    let (mut at, mut end, mut from) = (0, count, None);
    loop {
        let below = at + 1;
        let middle = below + (end - below).div_ceil(2);
        if at == place {
            let to = [below, middle].into_iter().filter(|child| *child < end);
            return (from, to.collect());
        }
        from = Some(at);
        (at, end) = if place < middle { (below, middle) } else { (middle, end) };
    }
}

/// A transfer of tensors in progress.
struct Transfer<'a> {
    worker: &'a Worker,
    way: TransferPlan,
    /// Small tensors that will be packed into the next portion.
    small: Vec<Tensor>,
    bytes: usize,
    /// Buffers of completed portions, for reuse: fresh memory would have to be mapped page by page.
    buffers: Vec<Tensor>,
    /// Portions that are being received, or sent by the source.
    under_way: VecDeque<Portion>,
    /// Portions that were received and are being forwarded.
    passed_on: VecDeque<Portion>,
    /// Whether received tensors are kept apart until all have arrived. If the source dies
    /// meanwhile, a rank must not lose its own state. They are kept in host memory, since a GPU may
    /// lack room for two states.
    stages: bool,
    staged: Vec<(Tensor, Tensor)>,
}

/// A unit of transfer.
struct Portion {
    begun: Vec<PendingCollective>,
    /// A part of a tensor in place, or of a buffer with several tensors.
    view: Tensor,
    packed: Option<Packed>,
}

/// Several tensors, packed as bytes one after the other into a buffer.
struct Packed {
    buffer: Tensor,
    tensors: Vec<Tensor>,
}

impl<'a> Transfer<'a> {
    fn new(worker: &'a Worker, way: TransferPlan, stages: bool) -> Self {
        Self {
            worker,
            way,
            stages,
            small: Vec::new(),
            bytes: 0,
            buffers: Vec::new(),
            under_way: VecDeque::new(),
            passed_on: VecDeque::new(),
            staged: Vec::new(),
        }
    }

    fn send(&mut self, tensor: &Tensor) -> Result<()> {
        let (bytes, sizes) = (size(tensor), self.way.sizes());
        let is_large =
            bytes >= sizes.small && tensor.is_contiguous() && tensor.device() == self.worker.device();
        let tensor = match self.stages && self.way.is_for_this() {
            true => {
                let place = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
                self.staged.push((tensor.shallow_clone(), place.shallow_clone()));
                place
            }
            false => tensor.shallow_clone(),
        };
        if is_large {
            let view = tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            let comes_in_place = self.way.comes_in_place(self.stages);
            return (0..bytes).step_by(sizes.largest).try_for_each(|start| {
                let len = sizes.largest.min(bytes - start);
                let part = view.f_narrow(0, start as i64, len as i64)?;
                if comes_in_place { self.begin(part, None) } else { self.begin_packed(vec![part], len) }
            });
        }
        if bytes > 0 {
            self.small.push(tensor);
            self.bytes += bytes.next_multiple_of(ALIGNED);
        }
        if self.bytes >= sizes.portion { self.flush() } else { Ok(()) }
    }

    /// Sends the packed small tensors.
    fn flush(&mut self) -> Result<()> {
        let tensors = std::mem::take(&mut self.small);
        let bytes = std::mem::take(&mut self.bytes);
        if tensors.is_empty() { Ok(()) } else { self.begin_packed(tensors, bytes) }
    }

    fn begin_packed(&mut self, tensors: Vec<Tensor>, bytes: usize) -> Result<()> {
        let sizes = self.way.sizes();
        // Completes old portions first, so that their buffers can be reused.
        self.settle(sizes.at_once - 1)?;
        let spare = self.buffers.iter().position(|buffer| buffer.numel() >= bytes);
        let buffer = match spare {
            Some(at) => self.buffers.swap_remove(at),
            None => {
                let len = bytes.max(sizes.portion + sizes.small) as i64;
                Tensor::f_empty([len], (Kind::Uint8, self.worker.device()))?
            }
        };
        if self.way.is_source() {
            for (tensor, mut place) in tensors.iter().zip(places(&buffer, &tensors)?) {
                tch::no_grad(|| place.f_copy_(tensor))?;
            }
        }
        let view = buffer.f_narrow(0, 0, bytes as i64)?;
        self.begin(view, Some(Packed { buffer, tensors }))
    }

    fn begin(&mut self, view: Tensor, packed: Option<Packed>) -> Result<()> {
        self.settle(self.way.sizes().at_once - 1)?;
        let begun = match &self.way {
            TransferPlan::Broadcast { source, .. } => vec![self.worker.begin_broadcast(*source, &view)?],
            TransferPlan::Tree { from: Some(from), .. } => vec![self.worker.begin_receive(*from, &view)?],
            TransferPlan::Tree { from: None, to } => send_to(self.worker, to, &view)?,
        };
        self.under_way.push_back(Portion { begun, view, packed });
        Ok(())
    }

    /// Waits until at most `most` portions are in flight, received as well as forwarded.
    fn settle(&mut self, most: usize) -> Result<()> {
        while self.under_way.len() > most
            && let Some(mut portion) = self.under_way.pop_front()
        {
            wait(&mut portion)?;
            if let Some(Packed { buffer, tensors }) = &portion.packed
                && self.way.is_for_this()
            {
                for (tensor, place) in tensors.iter().zip(places(buffer, tensors)?) {
                    tch::no_grad(|| tensor.shallow_clone().f_copy_(&place))?;
                }
            }
            portion.begun = send_to(self.worker, self.way.next(), &portion.view)?;
            match portion.begun.is_empty() {
                true => self.take_back(portion),
                false => self.passed_on.push_back(portion),
            }
        }
        while self.passed_on.len() > most
            && let Some(mut portion) = self.passed_on.pop_front()
        {
            wait(&mut portion)?;
            self.take_back(portion);
        }
        Ok(())
    }

    fn take_back(&mut self, portion: Portion) {
        self.buffers.extend(portion.packed.map(|packed| packed.buffer));
    }

    fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.settle(0)?;
        self.worker.confirm()?;
        for (tensor, staged) in self.staged {
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&staged))?;
        }
        Ok(())
    }
}

fn send_to(worker: &Worker, ranks: &[usize], view: &Tensor) -> Result<Vec<PendingCollective>> {
    ranks.iter().map(|rank| Ok(worker.begin_send(*rank, view)?)).collect()
}

fn wait(portion: &mut Portion) -> Result<()> {
    portion.begun.drain(..).try_for_each(|begun| Ok(begun.wait()?))
}

/// Returns the size of a tensor in bytes.
fn size(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// Returns views of the packed tensors in the buffer, with their shapes and types.
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
    use std::thread;
    use std::time::Duration;

    use ice_c10d::{GlooOptions, ProcessGroup, Store, testing};

    use super::*;

    #[test]
    fn a_tree_reaches_every_place_once_and_is_not_deeper_than_it_must_be() {
        for count in 1..200 {
            assert_eq!(neighbours(0, count).0, None);
            for place in 1..count {
                let mut steps = 0;
                let mut at = place;
                while let (Some(from), _) = neighbours(at, count) {
                    let (_, to) = neighbours(from, count);
                    assert_eq!(
                        to.iter().filter(|child| **child == at).count(),
                        1,
                        "{at} below {from} of {count}"
                    );
                    assert!(to.len() <= 2);
                    (at, steps) = (from, steps + 1);
                }
                assert_eq!(at, 0);
                assert!(steps <= count.ilog2(), "{place} of {count} is {steps} steps away");
            }
            let branches: usize = (0..count).map(|place| neighbours(place, count).1.len()).sum();
            assert_eq!(branches, count - 1);
        }
    }

    #[test]
    fn a_broadcast_is_taken_by_those_alone_that_lack_what_comes() {
        const PATIENCE: Duration = Duration::from_secs(30);
        let (_server, port) = testing::serve_store().unwrap();
        let rank = |rank: usize| {
            let store = Store::tcp("127.0.0.1", port, PATIENCE).unwrap();
            let group = ProcessGroup::gloo(&store, rank, 4, &GlooOptions::default()).unwrap();
            let worker = Worker::of_group(group, store, Device::Cpu);
            let make = |len| Tensor::full([len], rank as f64, (Kind::Float, Device::Cpu));
            let tensors = [make(10), make(BROADCAST.largest as i64 / 3), make(0), make(1000)];
            let way = TransferPlan::of(rank, Device::Cuda(0), 1, &[0, 3]).unwrap();
            let mut transfer = Transfer::new(&worker, way, rank == 3);
            tensors.iter().try_for_each(|tensor| transfer.send(tensor)).unwrap();
            transfer.finish().unwrap();
            let has = if rank == 2 { 2.0 } else { 1.0 };
            assert!(tensors.iter().all(|tensor| tensor.eq(has).all().int64_value(&[]) == 1), "rank {rank}");
        };
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..4).map(|number| scope.spawn(move || rank(number))).collect();
            ranks.into_iter().for_each(|rank| rank.join().unwrap());
        });
    }

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
