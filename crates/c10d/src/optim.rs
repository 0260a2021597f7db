//! Optimizer steps that update whole lists of tensors in one fused, in-place call. The state stays with the caller.
#![expect(unsafe_code, reason = "calls the C++ shim")]

use tch::Tensor;

use crate::error::check;
use crate::ffi::{self, IceAdamW, IceSgd, Pointers};
use crate::{Error, Result};

/// The hyperparameters of one AdamW step. The default is all zero: set what you need.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AdamWStep {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled decay of the weights, times the learning rate.
    pub weight_decay: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Ascends instead of descending.
    pub maximize: bool,
}

/// The hyperparameters of one SGD step. The default is all zero: set what you need.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SgdStep {
    /// Learning rate.
    pub lr: f64,
    /// The part of the last update that is kept; 0 needs no buffers.
    pub momentum: f64,
    /// The part of the gradient that does not enter the momentum.
    pub dampening: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
    /// Ascends instead of descending.
    pub maximize: bool,
    /// Overwrites the buffers with the gradients instead of decaying them.
    pub is_first_step: bool,
}

/// One AdamW step, as `torch.optim.AdamW(fused=True)`. All lists have one tensor per parameter, floating-point and of its shape and
/// device, but `steps`: f32 scalars that count steps from 1, already incremented for this one.
///
/// # Errors
/// `InvalidArgument` for lists of different lengths; `Torch` for shapes, types or devices that do not fit.
pub fn fused_adamw(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
    s: &AdamWStep,
) -> Result<()> {
    let lists = [
        ("gradients", grads),
        ("first moments", exp_avgs),
        ("second moments", exp_avg_sqs),
        ("step counters", steps),
    ];
    for (what, list) in lists {
        same_length(what, list, params)?;
    }
    for (what, list) in &lists[..3] {
        same_shapes(what, list, params)?;
    }
    if params.is_empty() {
        return Ok(());
    }
    let options = IceAdamW {
        lr: s.lr,
        beta1: s.beta1,
        beta2: s.beta2,
        weight_decay: s.weight_decay,
        eps: s.eps,
        maximize: s.maximize,
    };
    let [params, grads, m, v, steps] = [params, grads, exp_avgs, exp_avg_sqs, steps].map(Pointers::of);
    check(|message| {
        // SAFETY: the lists outlive the call and are equally long.
        unsafe {
            ffi::ice_fused_adamw(
                params.list(),
                grads.list(),
                m.list(),
                v.list(),
                steps.list(),
                options,
                message,
            )
        }
    })
}

/// One SGD step, as `torch.optim.SGD(fused=True)`. All lists have one floating-point tensor per parameter, of its shape and device;
/// `momentum_buffers` is empty without momentum.
///
/// # Errors
/// `InvalidArgument` for lists of different lengths; `Torch` for shapes, types or devices that do not fit.
pub fn fused_sgd(
    params: &[Tensor],
    grads: &[Tensor],
    momentum_buffers: &[Tensor],
    s: &SgdStep,
) -> Result<()> {
    same_length("gradients", grads, params)?;
    same_shapes("gradients", grads, params)?;
    if s.momentum != 0.0 || !momentum_buffers.is_empty() {
        same_length("momentum buffers", momentum_buffers, params)?;
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
        // SAFETY: the lists outlive the call; the buffers are as many as the parameters, or none where none are read.
        unsafe { ffi::ice_fused_sgd(params.list(), grads.list(), buffers.list(), options, message) }
    })
}

fn same_length(what: &str, list: &[Tensor], params: &[Tensor]) -> Result<()> {
    match list.len() == params.len() {
        true => Ok(()),
        false => Err(Error::invalid(format!("{} {what} for {} parameters", list.len(), params.len()))),
    }
}

/// The fused kernels read as many elements as the parameter has, whatever the shapes of the others.
fn same_shapes(what: &str, list: &[Tensor], params: &[Tensor]) -> Result<()> {
    for (index, (tensor, param)) in list.iter().zip(params).enumerate() {
        if !tensor.defined() || tensor.numel() != param.numel() || tensor.kind() != param.kind() {
            return Err(Error::invalid(format!("{what}: tensor {index} does not fit its parameter")));
        }
    }
    Ok(())
}
