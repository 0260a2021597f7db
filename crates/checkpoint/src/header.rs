//! The header of a safetensors file, written and read without its data.

use std::collections::BTreeMap;
use std::io::Read;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value as Json, json};

/// Key in a file's metadata for the tensors that the file contains only in part, with their
/// elements.
const PARTS: &str = "ice.parts";
/// Largest header, like in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// Position of a piece in its tensor. Pieces are ranges of elements in row-major order; whole rows
/// are such a range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Shape of the whole tensor.
    pub of: Vec<u64>,
    /// Index of the first element of the piece.
    pub start: u64,
}

impl Part {
    /// Creates a piece of whole rows, starting with the row `first`, of a tensor of shape `of`.
    pub fn rows(first: u64, of: &[i64]) -> Self {
        let of = dimensions(of);
        let row: u64 = of.iter().skip(1).product();
        Self { start: first * row, of }
    }

    /// Creates a piece of elements in row-major order, starting with the element `start`, of a
    /// tensor of shape `of`. A rank that has no element of a shared tensor describes that by an
    /// empty piece.
    pub fn flat(start: u64, of: &[i64]) -> Self {
        Self { of: dimensions(of), start }
    }
}

fn dimensions(shape: &[i64]) -> Vec<u64> {
    shape.iter().map(|dimension| dimension.unsigned_abs()).collect()
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Key of the tensor.
    pub key: String,
    /// Type of the elements.
    pub dtype: Dtype,
    /// Shape of the tensor, or of the piece.
    pub shape: Vec<u64>,
    /// Position in a larger tensor, for a piece.
    pub part: Option<Part>,
}

/// Positions of the tensors in the data of a file that will be written.
#[derive(Debug, Default)]
pub struct Layout {
    header: Vec<u8>,
    placed: Vec<Placed>,
    data_len: usize,
}

/// Position of a tensor in the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Index of the entry in the list that the layout was created from.
    pub index: usize,
    /// Offset of the first byte in the data.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

/// Contents of the header of a file.
#[derive(Debug)]
pub struct Header {
    /// Offset of the data in the file, in bytes.
    pub data_start: u64,
    /// The tensors in order of their position.
    pub tensors: Vec<Stored>,
}

/// A tensor, or a piece of one, in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Description of the tensor.
    pub entry: Entry,
    /// Offset of the first byte in the data.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Returns the number of elements of a tensor of this shape, or `None` if it overflows.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))
}

impl Entry {
    /// Returns the length in bytes.
    ///
    /// # Errors
    /// A size that is not a whole number of bytes, or is too large.
    pub fn bytes(&self) -> Result<u64, String> {
        let bits =
            elements(&self.shape).and_then(|elements| elements.checked_mul(self.dtype.bitsize() as u64));
        match bits {
            Some(bits) if bits.is_multiple_of(8) => Ok(bits / 8),
            _ => Err(format!(
                "`{}` of shape {:?} and {:?} has no size in bytes",
                self.key, self.shape, self.dtype
            )),
        }
    }
}

impl Layout {
    /// Lays out tensors in the order of the safetensors library: wide elements first, then by key.
    ///
    /// # Errors
    /// A duplicate key, or an impossible size.
    pub fn new(entries: &[Entry]) -> Result<Self, String> {
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by(|&a, &b| {
            let wide = |i: usize| std::cmp::Reverse(entries[i].dtype.bitsize());
            (wide(a), &entries[a].key).cmp(&(wide(b), &entries[b].key))
        });
        let mut tensors = serde_json::Map::new();
        let mut parts = BTreeMap::new();
        let (mut placed, mut end) = (Vec::new(), 0_u64);
        for index in order {
            let entry = &entries[index];
            let len = entry.bytes()?;
            let start = end;
            end = start.checked_add(len).ok_or("is too large")?;
            let info = json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end] });
            if tensors.insert(entry.key.clone(), info).is_some() {
                return Err(format!("has `{}` twice", entry.key));
            }
            if let Some(part) = &entry.part {
                parts.insert(&entry.key, part);
            }
            let usize = |number: u64| usize::try_from(number).map_err(|_| "is too large".to_owned());
            placed.push(Placed { index, offset: usize(start)?, len: usize(len)? });
        }
        let mut metadata = BTreeMap::from([("format", "pt".to_owned())]);
        if !parts.is_empty() {
            metadata.insert(PARTS, serde_json::to_string(&parts).map_err(|error| error.to_string())?);
        }
        tensors.insert("__metadata__".into(), json!(metadata));
        let mut text = serde_json::to_vec(&tensors).map_err(|error| error.to_string())?;
        // The data start at a multiple of eight, so that the tensors of a mapped file are aligned.
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        let data_len = usize::try_from(end).map_err(|_| "is too large".to_owned())?;
        Ok(Self { header, placed, data_len })
    }

    /// Returns the start of the file, up to the data.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// Returns the tensors in order of their position.
    pub fn placed(&self) -> &[Placed] {
        &self.placed
    }

    /// Returns the length of the data in bytes.
    pub fn data_len(&self) -> usize {
        self.data_len
    }
}

#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Header {
    /// Reads the header of a file of this length.
    ///
    /// # Errors
    /// Description of the damage.
    pub fn read(file: &mut impl Read, file_len: u64) -> Result<Self, String> {
        let damaged = |what: String| format!("is no safetensors file: {what}");
        let mut len = [0; 8];
        file.read_exact(&mut len).map_err(|error| damaged(error.to_string()))?;
        let len = u64::from_le_bytes(len);
        if len > MAX_HEADER || len + 8 > file_len {
            return Err(damaged(format!("its header has {len} bytes and the file {file_len}")));
        }
        let mut text = vec![0; len as usize];
        file.read_exact(&mut text).map_err(|error| damaged(error.to_string()))?;
        let mut fields: BTreeMap<String, Json> =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        let metadata = fields.remove("__metadata__").unwrap_or(Json::Null);
        let mut parts: BTreeMap<String, Part> = match metadata.get(PARTS).and_then(Json::as_str) {
            Some(parts) => serde_json::from_str(parts).map_err(|error| damaged(error.to_string()))?,
            None => BTreeMap::new(),
        };
        let mut tensors = Vec::new();
        for (key, info) in fields {
            let info: Info =
                serde_json::from_value(info).map_err(|error| damaged(format!("`{key}`: {error}")))?;
            let (offset, end) = info.data_offsets;
            let part = parts.remove(&key);
            let entry = Entry { key, dtype: info.dtype, shape: info.shape, part };
            let len = entry.bytes()?;
            if offset.checked_add(len) != Some(end) {
                return Err(damaged(format!("`{}` lies at {offset}..{end} and has {len} bytes", entry.key)));
            }
            check_part(&entry)?;
            tensors.push(Stored { entry, offset, len });
        }
        tensors.sort_by_key(|tensor| (tensor.offset, tensor.len));
        let mut end = 0;
        for tensor in &tensors {
            if tensor.offset != end {
                return Err(damaged(format!("`{}` does not follow the tensor before", tensor.entry.key)));
            }
            end += tensor.len;
        }
        let data_start = len + 8;
        if data_start + end != file_len {
            return Err(damaged(format!("it describes {} bytes and has {file_len}", data_start + end)));
        }
        Ok(Self { data_start, tensors })
    }
}

fn check_part(entry: &Entry) -> Result<(), String> {
    let Some(part) = &entry.part else { return Ok(()) };
    let end = elements(&entry.shape).and_then(|len| part.start.checked_add(len));
    match (end, elements(&part.of)) {
        (Some(end), Some(all)) if end <= all => Ok(()),
        _ => Err(format!("a piece of `{}` lies outside of its tensor of shape {:?}", entry.key, part.of)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, dtype: Dtype, shape: &[u64]) -> Entry {
        Entry { key: key.into(), dtype, shape: shape.into(), part: None }
    }

    #[test]
    fn the_safetensors_library_reads_what_is_laid_out() {
        let entries = [
            entry("b", Dtype::U8, &[3]),
            entry("c", Dtype::F32, &[2, 2]),
            entry("a", Dtype::F32, &[0]),
            entry("d", Dtype::F64, &[]),
        ];
        let layout = Layout::new(&entries).unwrap();
        let order: Vec<_> = layout.placed().iter().map(|placed| entries[placed.index].key.as_str()).collect();
        assert_eq!(order, ["d", "a", "c", "b"]);
        let mut file = layout.header().to_vec();
        assert_eq!(file.len() % 8, 0);
        file.extend((0..layout.data_len()).map(|byte| byte as u8));
        let read = safetensors::SafeTensors::deserialize(&file).unwrap();
        assert_eq!(read.tensor("b").unwrap().data(), [24, 25, 26]);
        assert_eq!(read.tensor("c").unwrap().shape(), [2, 2]);

        let header = Header::read(&mut file.as_slice(), file.len() as u64).unwrap();
        assert_eq!(header.tensors.len(), 4);
        assert_eq!(header.tensors[3].entry, entries[0]);
        assert!(Header::read(&mut file.as_slice(), file.len() as u64 - 1).is_err());
    }

    #[test]
    fn parts_go_through_the_metadata() {
        let mut piece = entry("w", Dtype::F32, &[2, 5]);
        piece.part = Some(Part { of: vec![7, 5], start: 10 });
        let layout = Layout::new(std::slice::from_ref(&piece)).unwrap();
        let len = (layout.header().len() + layout.data_len()) as u64;
        let header = Header::read(&mut layout.header(), len).unwrap();
        assert_eq!(header.tensors[0].entry, piece);

        piece.part = Some(Part { of: vec![7, 5], start: 30 });
        let layout = Layout::new(&[piece]).unwrap();
        let problem = Header::read(&mut layout.header(), len).unwrap_err();
        assert!(problem.contains("outside of its tensor"), "{problem}");
    }

    #[test]
    fn a_key_is_there_once() {
        let twice = [entry("a", Dtype::U8, &[1]), entry("a", Dtype::U8, &[1])];
        assert!(Layout::new(&twice).unwrap_err().contains("`a` twice"));
    }
}
