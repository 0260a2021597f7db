#![expect(unsafe_code, reason = "calls the C++ shim")]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tch::Tensor;

use crate::error::check;
use crate::ffi::{self, Handle, IceGroup, IceStr, IceWork, Pointers, milliseconds, pointer};
use crate::{Error, Result, Store, Work};

/// Options for connections between the ranks of a gloo group.
#[derive(Debug, Clone)]
pub struct GlooOptions {
    /// Timeout of forming the group, and of each collective.
    pub timeout: Duration,
    /// Network interface to listen on, such as `eth0`. Takes precedence over `hostname`.
    pub interface: Option<String>,
    /// Name or address of this host, to which other ranks connect.
    pub hostname: Option<String>,
}

impl Default for GlooOptions {
    /// 30 minutes, and the address of this host's name or else loopback, like PyTorch.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30 * 60), interface: None, hostname: None }
    }
}

/// Reduction of the ranks' tensors, element by element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum. For bools, whether any is true.
    Sum,
    /// The mean, for floating-point tensors only.
    Average,
    /// The minimum.
    Min,
    /// The maximum.
    Max,
    /// The product. For bools, whether all are true.
    Product,
}

impl ReduceOp {
    /// Returns the number in `c10d::ReduceOp::RedOpType`.
    fn code(self) -> u8 {
        match self {
            Self::Sum => 0,
            Self::Average => 1,
            Self::Product => 2,
            Self::Min => 3,
            Self::Max => 4,
        }
    }
}

/// Processes that compute together. A clone is the same group, and dropping the last clone leaves
/// the group.
///
/// All ranks must call the same collectives in the same order, on tensors of the same shape and
/// type. A collective starts at once and returns a [`Work`] to wait for. Its tensors must not be
/// used before. Dropping a group blocks until a collective in progress ends, at the latest after
/// its timeout.
///
/// The strides of a tensor may differ between ranks: a column of a matrix or a `channels_last`
/// tensor takes part as a contiguous copy, which the wait writes back. Reductions support tensors
/// of Float, Double, Half, BFloat16, Int8, Uint8, Int, Int64 and Bool. All other operations only
/// move elements, and support every dense type. A sparse tensor, a type that cannot be reduced, or
/// an output whose elements share memory is `InvalidArgument` before anything is sent.
#[derive(Debug, Clone)]
pub struct ProcessGroup {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    handle: Handle<IceGroup>,
    /// Serializes submissions: c10d numbers collectives in the order of the calls, without a lock
    /// of its own.
    submit: Mutex<()>,
    rank: usize,
    world_size: usize,
}

impl ProcessGroup {
    /// Forms a group over TCP for tensors in host memory. Waits for all ranks. The keys of `store`
    /// must be new to this group.
    ///
    /// # Errors
    /// `Timeout` if a rank does not join, `Network` if the store or a rank cannot be reached,
    /// `InvalidArgument` if `rank` is not below `world_size`.
    pub fn gloo(store: &Store, rank: usize, world_size: usize, options: &GlooOptions) -> Result<Self> {
        let (r, size) = ranks(rank, world_size)?;
        let timeout = milliseconds(options.timeout);
        let interface = IceStr::optional(options.interface.as_deref());
        let hostname = IceStr::optional(options.hostname.as_deref());
        let handle = Handle::make(|out, message| {
            // SAFETY: the store is alive, the strings outlive the call, and the out-pointers are
            // valid.
            unsafe {
                ffi::ice_group_gloo(store.pointer(), r, size, timeout, interface, hostname, out, message)
            }
        })?;
        Ok(Self::from_handle(handle, rank, world_size))
    }

    /// Forms a group over NCCL for tensors on the CUDA device `device_index` of this process. Loads
    /// the CUDA half of libtorch: see [`nccl::load`](crate::nccl::load).
    ///
    /// # Errors
    /// `Unavailable` in a build without NCCL, `NoGpu` without a GPU, `InvalidArgument` for a device
    /// or rank out of range.
    pub fn nccl(
        store: &Store,
        rank: usize,
        world_size: usize,
        device_index: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let (r, size) = ranks(rank, world_size)?;
        let device = i32::from(
            i8::try_from(device_index)
                .map_err(|_| Error::invalid(format!("there is no CUDA device {device_index}")))?,
        );
        let handle = crate::nccl::group(store, r, size, device, milliseconds(timeout))?;
        Ok(Self::from_handle(handle, rank, world_size))
    }

    fn from_handle(handle: Handle<IceGroup>, rank: usize, world_size: usize) -> Self {
        Self { shared: Arc::new(Shared { handle, submit: Mutex::new(()), rank, world_size }) }
    }

    /// Returns the rank of this process, below [`world_size`](Self::world_size).
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// Returns the number of ranks.
    pub fn world_size(&self) -> usize {
        self.shared.world_size
    }

    /// Replaces `tensor` on every rank by the reduction of all ranks' tensors.
    ///
    /// # Errors
    /// `InvalidArgument` for an average of integers, a type that cannot be reduced, or a tensor on
    /// another kind of device.
    pub fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work> {
        self.submit(|group, out, message| {
            // SAFETY: group and tensor are alive, and the out-pointers are valid; c10d keeps the
            // tensor's storage alive.
            unsafe { ffi::ice_group_all_reduce(group, pointer(tensor), op.code(), out, message) }
        })
    }

    /// Replaces `tensor` on every rank by the tensor of the rank `root`.
    ///
    /// # Errors
    /// `InvalidArgument` for a root that is not a rank, or a tensor on another kind of device.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work> {
        if root >= self.world_size() {
            return Err(Error::invalid(format!(
                "root {root} is not below the world size {}",
                self.world_size()
            )));
        }
        self.submit(|group, out, message| {
            // SAFETY: like in all_reduce.
            unsafe { ffi::ice_group_broadcast(group, pointer(tensor), root as i64, out, message) }
        })
    }

    /// Copies the `input` of rank `i` into `outputs[i]` on every rank. All tensors have the same
    /// shape and type.
    ///
    /// # Errors
    /// `InvalidArgument` for a number of outputs other than the world size, or for different
    /// shapes.
    pub fn all_gather(&self, outputs: &[Tensor], input: &Tensor) -> Result<Work> {
        self.one_per_rank("outputs", outputs.len())?;
        let outputs = Pointers::of(outputs);
        self.submit(|group, out, message| {
            // SAFETY: like in all_reduce; the list outlives the call.
            unsafe { ffi::ice_group_all_gather(group, outputs.list(), pointer(input), out, message) }
        })
    }

    /// Stores the reduction of all ranks' `inputs[i]` in `output` on rank `i`. All tensors have the
    /// same shape and type.
    ///
    /// # Errors
    /// `InvalidArgument` for a number of inputs other than the world size, for different shapes, or
    /// for an operation that the backend lacks.
    pub fn reduce_scatter(&self, output: &Tensor, inputs: &[Tensor], op: ReduceOp) -> Result<Work> {
        self.one_per_rank("inputs", inputs.len())?;
        let inputs = Pointers::of(inputs);
        self.submit(|group, out, message| {
            // SAFETY: like in all_reduce; the list outlives the call.
            unsafe {
                ffi::ice_group_reduce_scatter(group, pointer(output), inputs.list(), op.code(), out, message)
            }
        })
    }

    /// Sends `tensor` to another rank, which [receives](Self::receive) it. Tensors from one rank to
    /// another arrive in the order of the calls.
    ///
    /// The operation is completed once the tensor may be used again, which does not imply that it
    /// has arrived. If many operations are in progress, gloo's sends and receives cost less than
    /// its collectives. [`Work::is_completed`] does not detect the end of gloo's sends and
    /// receives.
    ///
    /// # Errors
    /// `InvalidArgument` if `to` is not another rank, or for a tensor on another kind of device.
    pub fn send(&self, tensor: &Tensor, to: usize) -> Result<Work> {
        let to = self.other(to)?;
        self.submit(|group, out, message| {
            // SAFETY: like in all_reduce.
            unsafe { ffi::ice_group_send(group, pointer(tensor), to, out, message) }
        })
    }

    /// Replaces `tensor` by the tensor that the rank `from` [sends](Self::send), which has the same
    /// number of bytes.
    ///
    /// # Errors
    /// The errors of [`send`](Self::send).
    pub fn receive(&self, tensor: &Tensor, from: usize) -> Result<Work> {
        let from = self.other(from)?;
        self.submit(|group, out, message| {
            // SAFETY: like in all_reduce.
            unsafe { ffi::ice_group_receive(group, pointer(tensor), from, out, message) }
        })
    }

    /// Completes once every rank has called it.
    ///
    /// # Errors
    /// The errors of the backend if the barrier cannot start.
    pub fn barrier(&self) -> Result<Work> {
        self.submit(|group, out, message| {
            // SAFETY: the group is alive, and the out-pointers are valid.
            unsafe { ffi::ice_group_barrier(group, out, message) }
        })
    }

    /// Aborts operations in progress on the device, if the backend supports it. On CUDA, no
    /// operation then waits for a lost peer. The group is unusable afterwards, and so are tensors
    /// that took part in a collective. Gloo's collectives end with their connections, which
    /// `ice-link` closes.
    pub fn abort(&self) {
        // SAFETY: the group is alive; c10d lets any thread abort.
        let outcome = check(|message| unsafe { ffi::ice_group_abort(self.shared.handle.pointer(), message) });
        // A group that was already aborted returns an error, which is irrelevant here.
        drop(outcome);
    }

    /// Locks the group for calls that submit their own collectives.
    pub(crate) fn lock(&self) -> (MutexGuard<'_, ()>, *const IceGroup) {
        let guard = self.shared.submit.lock().unwrap_or_else(PoisonError::into_inner);
        (guard, self.shared.handle.pointer())
    }

    fn submit(
        &self,
        call: impl FnOnce(*const IceGroup, *mut *mut IceWork, *mut *mut std::ffi::c_char) -> i32,
    ) -> Result<Work> {
        let (_guard, group) = self.lock();
        Handle::make(|out, message| call(group, out, message)).map(Work::new)
    }

    /// Checks that this is another rank, and returns its number for c10d.
    fn other(&self, rank: usize) -> Result<i32> {
        if rank >= self.world_size() || rank == self.rank() {
            let (own, size) = (self.rank(), self.world_size());
            return Err(Error::invalid(format!("rank {rank} is not another than {own} of {size} ranks")));
        }
        Ok(rank as i32)
    }

    fn one_per_rank(&self, what: &str, count: usize) -> Result<()> {
        match count == self.world_size() {
            true => Ok(()),
            false => Err(Error::invalid(format!("{count} {what} for {} ranks", self.world_size()))),
        }
    }
}

fn ranks(rank: usize, world_size: usize) -> Result<(i32, i32)> {
    let out_of_range = || Error::invalid(format!("rank {rank} is not below the world size {world_size}"));
    let (r, size) = (i32::try_from(rank), i32::try_from(world_size));
    match (r, size) {
        (Ok(r), Ok(size)) if r < size => Ok((r, size)),
        _ => Err(out_of_range()),
    }
}
