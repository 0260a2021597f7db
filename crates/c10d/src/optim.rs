//! Optimizer steps that update whole lists of tensors in one fused, in-place call. The caller owns
//! the state.
//!
//! In the book: `docs/optimizers.md`.
#![expect(unsafe_code, reason = "calls the C++ shim")]

use tch::Tensor;

use crate::error::check;
use crate::ffi::{self, IceAdam, IceRmsprop, IceSgd, Pointers, pointer};
use crate::{Error, Result};

/// Hyper-parameters of an Adam or AdamW step. Default: all are zero or false.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AdamStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Term that is added to the denominator.
    pub eps: f64,
    /// Whether to divide by the largest second moment so far.
    pub amsgrad: bool,
    /// Whether to decay the weights themselves, multiplied by the learning rate, like AdamW.
    /// Otherwise the decay is part of the gradient.
    pub decoupled: bool,
    /// Whether to ascend instead of descend.
    pub maximize: bool,
}

/// State of Adam between steps, with one tensor per parameter.
#[derive(Debug, Clone, Copy)]
pub struct AdamState<'a> {
    /// First moments, in the parameters' shapes.
    pub exp_avgs: &'a [Tensor],
    /// Second moments.
    pub exp_avg_sqs: &'a [Tensor],
    /// Largest second moments so far. Empty without amsgrad.
    pub max_exp_avg_sqs: &'a [Tensor],
    /// Step counters as f32 scalars, from 1, already incremented for this step.
    pub steps: &'a [Tensor],
}

/// Hyper-parameters of an SGD step. Default: all are zero or false.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// Share of the last update that is kept. 0 needs no buffers.
    pub momentum: f64,
    /// Share of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Whether to use Nesterov's momentum.
    pub nesterov: bool,
    /// Whether to ascend instead of descend.
    pub maximize: bool,
    /// Whether to overwrite the buffers with the gradients instead of decaying them.
    pub is_first_step: bool,
}

/// Hyper-parameters of an RMSprop step. Default: all are zero.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RmspropStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the average of squares.
    pub alpha: f64,
    /// Term that is added to the denominator.
    pub eps: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Share of the last update that is kept. 0 needs no buffers.
    pub momentum: f64,
}

/// Executes one step of Adam or AdamW, like `torch.optim.Adam(fused=True)`. All lists have one
/// floating-point tensor per parameter, of its shape and device. Exception: step counters are
/// scalars.
///
/// # Errors
/// `InvalidArgument` for lists of different lengths; `Torch` for shapes, types or devices that do
/// not fit.
pub fn fused_adam(params: &[Tensor], grads: &[Tensor], state: AdamState<'_>, s: &AdamStep) -> Result<()> {
    let AdamState { exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps } = state;
    for (what, list) in [("gradients", grads), ("first moments", exp_avgs), ("second moments", exp_avg_sqs)] {
        same_shapes(what, list, params)?;
    }
    if s.amsgrad || !max_exp_avg_sqs.is_empty() {
        same_shapes("largest second moments", max_exp_avg_sqs, params)?;
    }
    same_length("step counters", steps, params)?;
    if params.is_empty() {
        return Ok(());
    }
    let options = IceAdam {
        lr: s.lr,
        beta1: s.beta1,
        beta2: s.beta2,
        weight_decay: s.weight_decay,
        eps: s.eps,
        amsgrad: s.amsgrad,
        decoupled: s.decoupled,
        maximize: s.maximize,
    };
    let lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps].map(Pointers::of);
    let [params, grads, m, v, most, steps] = &lists;
    check(|message| {
        // SAFETY: the lists outlive the call and have the length that the kernel reads.
        unsafe {
            ffi::ice_fused_adam(
                params.list(),
                grads.list(),
                m.list(),
                v.list(),
                most.list(),
                steps.list(),
                options,
                message,
            )
        }
    })
}

/// Executes one step of SGD, like `torch.optim.SGD(fused=True)`. All lists have one floating-point
/// tensor per parameter, of its shape and device. `momentum_buffers` is empty without momentum.
///
/// # Errors
/// `InvalidArgument` for lists of different lengths; `Torch` for shapes, types or devices that do
/// not fit.
pub fn fused_sgd(
    params: &[Tensor],
    grads: &[Tensor],
    momentum_buffers: &[Tensor],
    s: &SgdStep,
) -> Result<()> {
    same_shapes("gradients", grads, params)?;
    if s.momentum != 0.0 || !momentum_buffers.is_empty() {
        same_shapes("momentum buffers", momentum_buffers, params)?;
    }
    if params.is_empty() {
        return Ok(());
    }
    let options = IceSgd {
        lr: s.lr,
        momentum: s.momentum,
        dampening: s.dampening,
        weight_decay: s.weight_decay,
        nesterov: s.nesterov,
        maximize: s.maximize,
        is_first_step: s.is_first_step,
    };
    let [params, grads, buffers] = [params, grads, momentum_buffers].map(Pointers::of);
    check(|message| {
        // SAFETY: the lists outlive the call; there is a buffer per parameter, or none if the
        // kernel reads none.
        unsafe { ffi::ice_fused_sgd(params.list(), grads.list(), buffers.list(), options, message) }
    })
}

/// Executes one step of RMSprop, like `torch.optim.RMSprop(foreach=True)`. All lists have one
/// floating-point tensor per parameter, of its shape and device. `grad_avgs` is empty unless the
/// step is centered, `momentum_buffers` is empty without momentum.
///
/// # Errors
/// `InvalidArgument` for lists of different lengths; `Torch` for shapes, types or devices that do
/// not fit.
pub fn foreach_rmsprop(
    params: &[Tensor],
    grads: &[Tensor],
    square_avgs: &[Tensor],
    grad_avgs: &[Tensor],
    momentum_buffers: &[Tensor],
    s: &RmspropStep,
) -> Result<()> {
    for (what, list, wanted) in [
        ("gradients", grads, true),
        ("averages of squares", square_avgs, true),
        ("averages of gradients", grad_avgs, !grad_avgs.is_empty()),
        ("momentum buffers", momentum_buffers, s.momentum != 0.0 || !momentum_buffers.is_empty()),
    ] {
        if wanted {
            same_shapes(what, list, params)?;
        }
    }
    if params.is_empty() {
        return Ok(());
    }
    let options = IceRmsprop {
        lr: s.lr,
        alpha: s.alpha,
        eps: s.eps,
        weight_decay: s.weight_decay,
        momentum: s.momentum,
    };
    let lists = [params, grads, square_avgs, grad_avgs, momentum_buffers].map(Pointers::of);
    let [params, grads, squares, averages, buffers] = &lists;
    check(|message| {
        // SAFETY: the lists outlive the call; each has the length of the parameters, or is empty.
        unsafe {
            ffi::ice_foreach_rmsprop(
                params.list(),
                grads.list(),
                squares.list(),
                averages.list(),
                buffers.list(),
                options,
                message,
            )
        }
    })
}

/// Removes the gradients of parameters, like `Optimizer.zero_grad(set_to_none=True)`, so that the
/// next backward pass does not add to zeros. Must not be used for gradients that are views into a
/// [`Reducer`](crate::Reducer)'s buckets.
///
/// # Errors
/// `Torch` for tensors that cannot have gradients.
pub fn clear_gradients(parameters: &[Tensor]) -> Result<()> {
    let list = Pointers::of(parameters);
    // SAFETY: the list outlives the call.
    check(|message| unsafe { ffi::ice_clear_gradients(list.list(), message) })
}

/// Multiplies tensors by a factor, in place.
///
/// # Errors
/// `Torch` for types that cannot be multiplied.
pub fn scale(tensors: &[Tensor], factor: f64) -> Result<()> {
    if tensors.is_empty() {
        return Ok(());
    }
    let list = Pointers::of(tensors);
    // SAFETY: the list outlives the call.
    check(|message| unsafe { ffi::ice_scale(list.list(), factor, message) })
}

/// Scales gradients in place so that their joint 2-norm is at most `max_norm`, like
/// `torch.nn.utils.clip_grad_norm_`. Returns the norm before, as an f32 scalar on the gradients'
/// device, without synchronizing with the device.
///
/// # Errors
/// `InvalidArgument` without gradients; `Torch` for gradients of several devices or types.
pub fn clip_grad_norm(grads: &[Tensor], max_norm: f64) -> Result<Tensor> {
    let Some(first) = grads.first() else { return Err(Error::invalid("there are no gradients to clip")) };
    let norm = Tensor::zeros([], (tch::Kind::Float, first.device()));
    let list = Pointers::of(grads);
    // SAFETY: the list and the scalar outlive the call.
    check(|message| unsafe { ffi::ice_clip_norm(list.list(), max_norm, pointer(&norm), message) })?;
    Ok(norm)
}

fn same_length(what: &str, list: &[Tensor], params: &[Tensor]) -> Result<()> {
    match list.len() == params.len() {
        true => Ok(()),
        false => Err(Error::invalid(format!("{} {what} for {} parameters", list.len(), params.len()))),
    }
}

/// Checks sizes and types: the fused kernels read the number of elements of the parameter from all
/// lists, regardless of their shapes.
fn same_shapes(what: &str, list: &[Tensor], params: &[Tensor]) -> Result<()> {
    same_length(what, list, params)?;
    for (index, (tensor, param)) in list.iter().zip(params).enumerate() {
        if !tensor.defined() || tensor.numel() != param.numel() || tensor.kind() != param.kind() {
            return Err(Error::invalid(format!("{what}: tensor {index} does not fit its parameter")));
        }
    }
    Ok(())
}
