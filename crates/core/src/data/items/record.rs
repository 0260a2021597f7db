use std::collections::{BTreeMap, HashMap};

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result, dtype};

/// A sample that can be stored on disk, as a list of tensors.
///
/// ```
/// use ice_core::data::Record;
/// use tch::Tensor;
///
/// struct Sentence {
///     tokens: Tensor,
///     text: String,
/// }
///
/// impl Record for Sentence {
///     fn to_parts(&self, parts: &mut Vec<Tensor>) {
///         self.tokens.to_parts(parts);
///         self.text.to_parts(parts);
///     }
///
///     fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
///         Ok(Self { tokens: Record::from_parts(parts)?, text: Record::from_parts(parts)? })
///     }
/// }
/// ```
pub trait Record: Sized {
    /// Appends the parts of the sample.
    fn to_parts(&self, parts: &mut Vec<Tensor>);

    /// Reads the parts of a sample, in the same order.
    ///
    /// # Errors
    /// The part that is missing or of another type.
    fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String>;
}

impl Record for Tensor {
    fn to_parts(&self, parts: &mut Vec<Tensor>) {
        parts.push(self.shallow_clone());
    }

    fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
        parts.next().ok_or_else(|| "it has too few parts".into())
    }
}

impl Record for Vec<u8> {
    fn to_parts(&self, parts: &mut Vec<Tensor>) {
        parts.push(Tensor::from_slice(self));
    }

    fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
        let part = Tensor::from_parts(parts)?;
        if part.kind() != Kind::Uint8 || part.dim() != 1 {
            return Err(format!("a part is {:?} of shape {:?} and no bytes", part.kind(), part.size()));
        }
        Self::try_from(part).map_err(|error| error.to_string())
    }
}

impl Record for String {
    fn to_parts(&self, parts: &mut Vec<Tensor>) {
        parts.push(Tensor::from_slice(self.as_bytes()));
    }

    fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
        Self::from_utf8(Record::from_parts(parts)?).map_err(|error| error.to_string())
    }
}

macro_rules! numbers {
    ($($name:ty as $stored:ty;)+) => {$(
        impl Record for $name {
            fn to_parts(&self, parts: &mut Vec<Tensor>) {
                parts.push(Tensor::from(*self as $stored));
            }

            fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
                let part = Tensor::from_parts(parts)?;
                <$stored>::try_from(part).map(|number| number as $name).map_err(|error| error.to_string())
            }
        }
    )+};
}

numbers! { i64 as i64; i32 as i64; u32 as i64; u8 as i64; usize as i64; f32 as f32; f64 as f64; }

impl<K: Record + Ord, V: Record> Record for BTreeMap<K, V> {
    fn to_parts(&self, parts: &mut Vec<Tensor>) {
        (self.len() as i64).to_parts(parts);
        for (key, value) in self {
            key.to_parts(parts);
            value.to_parts(parts);
        }
    }

    fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
        let len = i64::from_parts(parts)?;
        (0..len).map(|_| Ok((K::from_parts(parts)?, V::from_parts(parts)?))).collect()
    }
}

macro_rules! tuples {
    ($(($($name:ident $at:tt)+))+) => {$(
        impl<$($name: Record),+> Record for ($($name,)+) {
            fn to_parts(&self, parts: &mut Vec<Tensor>) {
                $(self.$at.to_parts(parts);)+
            }

            fn from_parts(parts: &mut dyn Iterator<Item = Tensor>) -> Result<Self, String> {
                Ok(($($name::from_parts(parts)?,)+))
            }
        }
    )+};
}

tuples! { (A 0 B 1) (A 0 B 1 C 2) (A 0 B 1 C 2 D 3) }

/// Encodes the parts as a safetensors file, with the key of the sample.
pub(super) fn encode(item: &impl Record, key: &str) -> Result<Vec<u8>> {
    let mut parts = Vec::new();
    item.to_parts(&mut parts);
    let fail = |problem: String| Error::Usage(format!("the sample cannot be kept: {problem}"));
    let mut host = Vec::new();
    for part in &parts {
        let kind = part.kind();
        let dtype = dtype::of_kind(kind).ok_or_else(|| fail(format!("it has a tensor of {kind:?}")))?;
        let part = part.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0; part.numel() * kind.elt_size_in_bytes()];
        part.f_copy_data_u8(&mut bytes, part.numel())?;
        let shape: Vec<usize> = part.size().into_iter().map(|dimension| dimension as usize).collect();
        host.push((dtype, shape, bytes));
    }
    let views: Result<Vec<_>> = host
        .iter()
        .enumerate()
        .map(|(at, (dtype, shape, bytes))| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            view.map(|view| (format!("{at:06}"), view)).map_err(|error| fail(error.to_string()))
        })
        .collect();
    let metadata = HashMap::from([("key".to_owned(), key.to_owned())]);
    safetensors::serialize(views?, Some(metadata)).map_err(|error| fail(error.to_string()))
}

/// Decodes the sample of a file. Fails if the file has another key.
pub(super) fn decode<T: Record>(bytes: &[u8], key: &str) -> Result<T, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| error.to_string())?;
    let found = metadata.metadata().as_ref().and_then(|metadata| metadata.get("key"));
    if found.map(String::as_str) != Some(key) {
        return Err(format!("it is {found:?} and not `{key}`"));
    }
    let file = SafeTensors::deserialize(bytes).map_err(|error| error.to_string())?;
    let mut parts = Vec::new();
    for (name, view) in file.tensors() {
        let kind =
            dtype::kind_of(view.dtype()).ok_or_else(|| format!("part {name} is of {:?}", view.dtype()))?;
        let shape: Vec<i64> = view.shape().iter().map(|&dimension| dimension as i64).collect();
        let tensor =
            Tensor::f_from_data_size(view.data(), &shape, kind).map_err(|error| error.to_string())?;
        parts.push((name, tensor));
    }
    parts.sort_by(|a, b| a.0.cmp(&b.0));
    let mut parts = parts.into_iter().map(|(_, part)| part);
    let item = T::from_parts(&mut parts)?;
    match parts.next() {
        Some(_) => Err("it has too many parts".into()),
        None => Ok(item),
    }
}
