//! Types and shapes of tensors as checkpoints have them.

use safetensors::Dtype;
use tch::Kind;

pub(super) fn dtype(kind: Kind) -> Result<Dtype, String> {
    crate::dtype::of_kind(kind).ok_or_else(|| format!("tensors of {kind:?} cannot be saved"))
}

pub(super) fn kind(dtype: Dtype) -> Result<Kind, String> {
    crate::dtype::kind_of(dtype).ok_or_else(|| format!("tensors of {dtype:?} cannot be loaded"))
}

pub(super) fn shape(tensor: &tch::Tensor) -> Vec<u64> {
    tensor.size().into_iter().map(i64::unsigned_abs).collect()
}
