//! The IDX format of the MNIST files: two zero bytes, a type, the number of dimensions, each
//! dimension as a big-endian u32, then the elements. Source: the format note on the MNIST page (Y.
//! LeCun, C. Cortes, C. Burges).

use std::fs;
use std::path::Path;

use tch::{Kind, Tensor};

use crate::{Error, Result};

const UNSIGNED_BYTE: u8 = 8;

/// An IDX file of unsigned bytes, in memory.
///
/// ```
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("x-idx2-ubyte");
/// std::fs::write(&path, [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6]).unwrap();
/// let file = ice_core::data::readers::Idx::open(&path, 2)?;
/// assert_eq!(file.shape(), [2, 3]);
/// assert_eq!(file.row(1), [4, 5, 6]);
/// # Ok::<(), ice_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Idx {
    shape: Vec<i64>,
    bytes: Vec<u8>,
    header: usize,
}

impl Idx {
    /// Reads a file with this number of dimensions, at least 1.
    ///
    /// # Errors
    /// [`Error::Data`] if the file is missing, damaged, or of another type or number of dimensions.
    pub fn open(path: impl AsRef<Path>, dimensions: u8) -> Result<Self> {
        let path = path.as_ref();
        let fail = |problem: String| Error::Data { path: path.to_owned(), problem };
        let bytes = fs::read(path).map_err(|error| fail(error.to_string()))?;
        Self::parse(bytes, dimensions).map_err(fail)
    }

    fn parse(bytes: Vec<u8>, dimensions: u8) -> Result<Self, String> {
        let header_len = 4 + 4 * usize::from(dimensions);
        let header =
            bytes.get(..header_len).ok_or_else(|| format!("{} bytes are no IDX file", bytes.len()))?;
        if dimensions == 0 || header[..4] != [0, 0, UNSIGNED_BYTE, dimensions] {
            return Err(format!(
                "starts with {:02x?}: not an IDX file of bytes in {dimensions} dimensions",
                &header[..4]
            ));
        }
        let shape: Vec<i64> = header[4..]
            .chunks_exact(4)
            .map(|d| i64::from(u32::from_be_bytes([d[0], d[1], d[2], d[3]])))
            .collect();
        let elements = shape.iter().try_fold(1_i64, |product, &d| product.checked_mul(d));
        let body = bytes.len() - header_len;
        if elements != Some(body as i64) {
            return Err(format!(
                "has {body} bytes of data for the shape {shape:?}: it is cut off or damaged"
            ));
        }
        Ok(Self { shape, bytes, header: header_len })
    }

    /// Returns the size of each dimension.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Returns the number of rows: the size of the first dimension.
    pub fn rows(&self) -> usize {
        self.shape[0] as usize
    }

    /// Returns the elements of a row, in all dimensions but the first.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: usize) -> &[u8] {
        let len: i64 = self.shape[1..].iter().product();
        let start = self.header + row * len as usize;
        &self.bytes[start..start + len as usize]
    }

    /// Returns the rows of these indices as a uint8 tensor `[indices, ...]` on the CPU.
    ///
    /// # Errors
    /// [`Error::Usage`] if an index is out of range.
    pub fn rows_at(&self, indices: &[i64]) -> Result<Tensor> {
        let mut bytes = Vec::new();
        for &index in indices {
            let row = usize::try_from(index).ok().filter(|&row| row < self.rows());
            let row = row.ok_or_else(|| Error::Usage(format!("no row {index} in {}", self.rows())))?;
            bytes.extend_from_slice(self.row(row));
        }
        let shape = [&[indices.len() as i64], &self.shape[1..]].concat();
        Ok(Tensor::f_from_data_size(&bytes, &shape, Kind::Uint8)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_shapes_and_refuses_damage() {
        let file = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        let problem = |bytes: &[u8], dimensions| Idx::parse(bytes.to_vec(), dimensions).unwrap_err();
        let idx = Idx::parse(file.to_vec(), 2).unwrap();
        assert_eq!((idx.shape(), idx.row(1)), ([2, 3].as_slice(), [4, 5, 6].as_slice()));
        let rows = idx.rows_at(&[1, 0, 1]).unwrap();
        assert_eq!((rows.size(), rows.int64_value(&[0, 0])), (vec![3, 3], 4));
        assert!(idx.rows_at(&[2]).unwrap_err().to_string().contains("no row 2"));

        assert!(problem(&file[..17], 2).contains("cut off"));
        assert!(problem(&file, 3).contains("3 dimensions"));
        assert!(problem(&file[..5], 1).contains("5 bytes"));
        let huge = [[0, 0, 8, 3].as_slice(), &[255; 12]].concat();
        assert!(problem(&huge, 3).contains("damaged"));
    }
}
