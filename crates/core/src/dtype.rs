//! Types of tensors: those of libtorch and those of safetensors files.

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

/// Returns the type of a file for tensors of this kind, if files have one.
pub(crate) fn of_kind(kind: Kind) -> Option<Dtype> {
    KINDS.into_iter().find_map(|(known, dtype)| (known == kind).then_some(dtype))
}

/// Returns libtorch's kind for this type of a file, if libtorch has one.
pub(crate) fn kind_of(dtype: Dtype) -> Option<Kind> {
    KINDS.into_iter().find_map(|(kind, known)| (known == dtype).then_some(kind))
}
