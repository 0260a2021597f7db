#![expect(unsafe_code, reason = "calls the C++ shim")]

use tch::Tensor;

use crate::error::check;
use crate::ffi::{self, Handle, IceReducer, IceReducerOptions, IceStr, Pointers, pointer};
use crate::{Error, ProcessGroup, Result};

/// Grouping of gradients for communication. All ranks must have the same options.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReducerOptions {
    /// Size of a bucket in bytes.
    pub bucket_cap_bytes: usize,
    /// Size in bytes of the bucket that is sent first; small, so that communication starts early.
    pub first_bucket_bytes: usize,
    /// Whether to search, in every step, for parameters that the outputs do not depend on. Without
    /// the search, a parameter that lacks a gradient on only one rank makes gradients wrong.
    pub find_unused_parameters: bool,
    /// Whether all steps use the parameters of the first step, on every rank. Other parameters may
    /// then lack a gradient, without a search in each step.
    pub static_graph: bool,
    /// Whether gradients are views into the buckets, which saves a copy. They then must not be
    /// detached or replaced.
    pub gradient_as_bucket_view: bool,
}

impl Default for ReducerOptions {
    /// PyTorch's defaults: 25 MiB, first bucket 1 MiB, no search for unused parameters, no views.
    fn default() -> Self {
        Self {
            bucket_cap_bytes: 25 << 20,
            first_bucket_bytes: 1 << 20,
            find_unused_parameters: false,
            static_graph: false,
            gradient_as_bucket_view: false,
        }
    }
}

/// Averages the gradients of all ranks while backward computes them: the core of PyTorch's
/// `DistributedDataParallel`.
///
/// Each step calls [`prepare_forward`](Self::prepare_forward), the forward pass,
/// [`prepare_backward`](Self::prepare_backward), [`run_backward`], then [`regroup`](Self::regroup).
/// Micro-batches whose gradients are only accumulated omit both preparations, except for the last
/// micro-batch of a step.
#[derive(Debug)]
pub struct Reducer {
    handle: Handle<IceReducer>,
    group: ProcessGroup,
    parameters: usize,
}

impl Reducer {
    /// Checks that all ranks have the same parameters, by number, type and shape, and installs
    /// hooks on their gradients.
    ///
    /// `parameters` are named leaves that require gradients, in the order in which forward uses
    /// them (for a `VarStore`, that of `trainable_variables()`). Their values are not synchronized:
    /// broadcast them first.
    ///
    /// # Errors
    /// `InvalidArgument` without parameters, for a parameter that is not a leaf, or, on every rank,
    /// if the ranks differ; and the errors of the collectives.
    pub fn new(
        parameters: &[(String, Tensor)],
        group: &ProcessGroup,
        options: &ReducerOptions,
    ) -> Result<Self> {
        if parameters.is_empty() {
            return Err(Error::invalid("a reducer needs at least one parameter"));
        }
        let names: Vec<_> = parameters.iter().map(|(name, _)| IceStr::new(name)).collect();
        let tensors = Pointers::of(parameters.iter().map(|(_, tensor)| tensor));
        let options = IceReducerOptions {
            bucket_cap_bytes: options.bucket_cap_bytes,
            first_bucket_bytes: options.first_bucket_bytes,
            find_unused_parameters: options.find_unused_parameters,
            gradient_as_bucket_view: options.gradient_as_bucket_view,
            static_graph: options.static_graph,
        };
        let (guard, pointer) = group.lock();
        let handle = Handle::make(|out, message| {
            // SAFETY: there are as many names as tensors, all outlive the call, the group is alive,
            // the out-pointers are valid.
            unsafe { ffi::ice_reducer_new(tensors.list(), names.as_ptr(), pointer, options, out, message) }
        })?;
        drop(guard);
        Ok(Self { handle, group: group.clone(), parameters: parameters.len() })
    }

    /// Starts a step.
    ///
    /// # Errors
    /// The errors of the collectives.
    pub fn prepare_forward(&self) -> Result<()> {
        let _guard = self.group.lock();
        // SAFETY: the handle is alive.
        check(|message| unsafe { ffi::ice_reducer_prepare_forward(self.handle.pointer(), message) })
    }

    /// Regroups the gradients in the order of their arrival on rank 0, after the first backward
    /// pass with preparations. Returns whether it did; later calls do nothing. Collective: every
    /// rank calls it after a backward pass.
    ///
    /// # Errors
    /// The errors of the collectives.
    pub fn regroup(&self) -> Result<bool> {
        let (_guard, mut regrouped) = (self.group.lock(), false);
        check(|message| {
            // SAFETY: the handle is alive, and so is the flag.
            unsafe { ffi::ice_reducer_regroup(self.handle.pointer(), &mut regrouped, message) }
        })?;
        Ok(regrouped)
    }

    /// Returns the order in which forward uses the parameters, as far as it is known, as indices
    /// into the reducer's list. A reducer of a list in this order groups the gradients like this
    /// one.
    ///
    /// # Errors
    /// `Torch` if libtorch fails.
    pub fn order(&self) -> Result<Vec<usize>> {
        let mut places = vec![0_i64; self.parameters];
        check(|message| {
            // SAFETY: the handle is alive, and the buffer has room for the given number of places.
            unsafe {
                ffi::ice_reducer_order(self.handle.pointer(), places.as_mut_ptr(), places.len(), message)
            }
        })?;
        Ok(places.into_iter().rev().filter_map(|place| usize::try_from(place).ok()).collect())
    }

    /// Arms the reducer for the next backward pass. `outputs` are the tensors that backward starts
    /// from. They are only used with `find_unused_parameters`, and in the first step of a static
    /// graph.
    ///
    /// # Errors
    /// `Torch` if the previous backward pass did not reach all parameters. The message names them.
    pub fn prepare_backward(&mut self, outputs: &[&Tensor]) -> Result<()> {
        if outputs.is_empty() {
            return Err(Error::invalid("a backward pass starts from at least one output"));
        }
        let outputs = Pointers::of(outputs.iter().copied());
        check(|message| {
            // SAFETY: the handle is alive and the outputs outlive the call.
            unsafe { ffi::ice_reducer_prepare_backward(self.handle.pointer_mut(), outputs.list(), message) }
        })
    }
}

/// Computes the gradients of a scalar, like `tensor.backward()`. With a [`Reducer`], waits for
/// their averages.
///
/// # Errors
/// The failure of backward: `Network` or `Timeout` if a peer is lost in the overlapped
/// communication, else `Torch`.
pub fn run_backward(tensor: &Tensor) -> Result<()> {
    // SAFETY: the tensor is alive.
    check(|message| unsafe { ffi::ice_run_backward(pointer(tensor), message) })
}
