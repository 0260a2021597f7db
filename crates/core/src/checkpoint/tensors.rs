//! Tensors as safetensors hold them.

use std::borrow::Cow;
use std::collections::HashMap;

use safetensors::{Dtype, SafeTensors, View};
use tch::{Device, Kind, Tensor};

/// A tensor copied to host memory.
pub(super) struct HostTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

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

impl HostTensor {
    /// Copies a tensor of any device.
    pub(super) fn copy(tensor: &Tensor) -> Result<Self, String> {
        let kind = tensor.kind();
        let (_, dtype) = KINDS
            .into_iter()
            .find(|(known, _)| *known == kind)
            .ok_or_else(|| format!("tensors of {kind:?} cannot be saved"))?;
        let host = tensor.detach().to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0; host.numel() * kind.elt_size_in_bytes()];
        host.f_copy_data_u8(&mut bytes, host.numel()).map_err(|error| error.to_string())?;
        let shape = host.size().into_iter().map(|dimension| dimension as usize).collect();
        Ok(Self { dtype, shape, bytes })
    }
}

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// The bytes of a file that `safetensors.torch.load_file` reads.
pub(super) fn encode(tensors: &[(String, HostTensor)]) -> Result<Vec<u8>, String> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    safetensors::serialize(views, Some(metadata)).map_err(|error| error.to_string())
}

/// The tensors of a file, on the CPU, in order of their names.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<(String, Tensor)>, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let (kind, _) = KINDS
            .into_iter()
            .find(|(_, known)| *known == view.dtype())
            .ok_or_else(|| format!("`{name}` is of {:?}, which cannot be loaded", view.dtype()))?;
        let shape: Vec<i64> = view.shape().iter().map(|&dimension| dimension as i64).collect();
        let tensor =
            Tensor::f_from_data_size(view.data(), &shape, kind).map_err(|error| error.to_string())?;
        tensors.push((name, tensor));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_survives_the_file_to_the_bit() {
        for (kind, _) in KINDS {
            let values =
                (Tensor::arange(12, (Kind::Float, Device::Cpu)) * 1.5).to_kind(kind).view([3, 4]).tr();
            let file = encode(&[("x".into(), HostTensor::copy(&values).unwrap())]).unwrap();
            let read = decode(&file).unwrap();
            assert_eq!((read[0].0.as_str(), read[0].1.kind()), ("x", kind));
            assert_eq!(read[0].1, values, "{kind:?}");
        }
    }
}
