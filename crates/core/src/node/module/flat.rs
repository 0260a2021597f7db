//! Tensors that are exchanged together: a collective costs more than the bytes of many small
//! tensors.

use tch::Tensor;

use crate::Result;

/// Limit of the bytes that one collective moves.
const BUCKET_BYTES: usize = 25 << 20;

/// Divides tensors into buckets of neighbours that have one type and fit the limit. A tensor larger
/// than the limit has its own bucket.
pub(super) fn buckets(mut tensors: &[Tensor]) -> impl Iterator<Item = &[Tensor]> {
    std::iter::from_fn(move || {
        let kind = tensors.first()?.kind();
        let mut bytes = 0;
        let fits = |tensor: &&Tensor| {
            bytes += tensor.numel() * kind.elt_size_in_bytes();
            tensor.kind() == kind && bytes <= BUCKET_BYTES
        };
        let (bucket, rest) = tensors.split_at(tensors.iter().take_while(fits).count().max(1));
        tensors = rest;
        Some(bucket)
    })
}

/// Copies the elements of a bucket into one row. A single contiguous tensor shares its memory with
/// the row.
pub(super) fn flatten(bucket: &[Tensor]) -> Result<Tensor> {
    Ok(Tensor::f_flatten_dense_tensors(bucket)?)
}

/// Copies a row from [`flatten`] back into the tensors of its bucket, with any strides.
pub(super) fn unflatten(row: &Tensor, bucket: &[Tensor]) -> Result<()> {
    for (tensor, values) in bucket.iter().zip(Tensor::f_unflatten_dense_tensors(row, bucket)?) {
        tensor.shallow_clone().f_copy_(&values)?;
    }
    Ok(())
}
