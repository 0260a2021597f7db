#![expect(unsafe_code, reason = "calls the C++ shim")]

use std::ffi::c_void;

use tch::Tensor;

use crate::error::check;
use crate::ffi::{self, pointer};
use crate::{ProcessGroup, Result};

/// Mean and variance of each feature, `[features]`, over `count` values of all ranks together. The
/// variance is not corrected.
#[derive(Debug)]
pub struct BatchStatistics {
    /// Mean, `[features]`, in the dtype of weight and bias.
    pub mean: Tensor,
    /// Variance, `[features]`, in the same dtype.
    pub var: Tensor,
    /// Number of values of each feature.
    pub count: f64,
}

/// Normalizes `x`, `[n, features, size…]`, by the statistics of the batch of all ranks of the
/// group: `(x − mean)/√(var + eps)·weight + bias`. The output has the dtype of `x`. Like PyTorch's
/// SyncBatchNorm.
///
/// The backward pass is a collective: the gradient of `x` includes the dependence of mean and
/// variance on the values of all ranks. The gradients of `weight` and `bias` are those of this
/// rank's batch. All ranks must call this in the same order, and use the output in the same way.
///
/// # Errors
/// `Torch` for shapes that do not fit. In the backward pass, [`run_backward`](crate::run_backward)
/// returns the errors of the all-reduce.
pub fn batch_norm(
    group: &ProcessGroup,
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    statistics: &BatchStatistics,
    eps: f64,
) -> Result<Tensor> {
    let optional = |tensor: Option<&Tensor>| tensor.map_or(std::ptr::null_mut(), pointer);
    let (_guard, group) = group.lock();
    let mut out: *mut c_void = std::ptr::null_mut();
    check(|message| {
        // SAFETY: the group and the tensors are alive, weight and bias may be null, and the
        // out-pointers are valid.
        unsafe {
            ffi::ice_batch_norm(
                group,
                pointer(x),
                optional(weight),
                optional(bias),
                pointer(&statistics.mean),
                pointer(&statistics.var),
                statistics.count,
                eps,
                &mut out,
                message,
            )
        }
    })?;
    // SAFETY: the shim created a new at::Tensor, which tch then owns.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}
