//! Types of tensors: those of libtorch and those of the files.

use safetensors::Dtype;
use tch::Kind;

const KINDS: [(Kind, Dtype); 10] = [
    (Kind::Uint8, Dtype::U8),
    (Kind::Int8, Dtype::I8),
    (Kind::Int16, Dtype::I16),
    (Kind::Int, Dtype::I32),
    (Kind::Int64, Dtype::I64),
    (Kind::Half, Dtype::F16),
    (Kind::BFloat16, Dtype::BF16),
    (Kind::Float, Dtype::F32),
    (Kind::Double, Dtype::F64),
    (Kind::Bool, Dtype::BOOL),
];

pub(super) fn dtype(kind: Kind) -> Result<Dtype, String> {
    let found = KINDS.into_iter().find(|(known, _)| *known == kind);
    found.map(|(_, dtype)| dtype).ok_or_else(|| format!("tensors of {kind:?} cannot be saved"))
}

pub(super) fn kind(dtype: Dtype) -> Result<Kind, String> {
    let found = KINDS.into_iter().find(|(_, known)| *known == dtype);
    found.map(|(kind, _)| kind).ok_or_else(|| format!("tensors of {dtype:?} cannot be loaded"))
}

pub(super) fn shape(tensor: &tch::Tensor) -> Vec<u64> {
    tensor.size().into_iter().map(i64::unsigned_abs).collect()
}
