//! The IDX format of the MNIST files: two zero bytes, a type, the number of dimensions, each dimension as a big-endian
//! u32, then the elements. Source: the format note on the MNIST page (Y. LeCun, C. Cortes, C. Burges).

use std::fs;
use std::path::Path;

use tch::{Kind, Tensor};

use crate::{Error, Result};

const UNSIGNED_BYTE: u8 = 8;

/// Reads a file of unsigned bytes with `N` dimensions as a uint8 tensor.
pub(super) fn read<const N: usize>(path: &Path) -> Result<Tensor> {
    let fail = |problem: String| Error::Data { path: path.to_owned(), problem };
    let bytes = fs::read(path).map_err(|error| fail(format!("{error}: scripts/fetch-mnist fetches it")))?;
    parse::<N>(&bytes).map_err(fail)
}

fn parse<const N: usize>(bytes: &[u8]) -> Result<Tensor, String> {
    let header_len = 4 + 4 * N;
    let header = bytes.get(..header_len).ok_or_else(|| format!("{} bytes are no IDX file", bytes.len()))?;
    if header[..4] != [0, 0, UNSIGNED_BYTE, N as u8] {
        return Err(format!("starts with {:02x?}: not an IDX file of bytes in {N} dimensions", &header[..4]));
    }
    let size: Vec<i64> = header[4..]
        .chunks_exact(4)
        .map(|d| i64::from(u32::from_be_bytes([d[0], d[1], d[2], d[3]])))
        .collect();
    let elements = size.iter().try_fold(1_i64, |product, &d| product.checked_mul(d));
    let body = &bytes[header_len..];
    if elements != Some(body.len() as i64) {
        return Err(format!(
            "has {} bytes of data for the shape {size:?}: it is cut off or damaged",
            body.len()
        ));
    }
    Tensor::f_from_data_size(body, &size, Kind::Uint8).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_shapes_and_refuses_damage() {
        let file = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        let tensor = parse::<2>(&file).unwrap();
        assert_eq!(tensor.size(), [2, 3]);
        assert_eq!(tensor.int64_value(&[1, 0]), 4);

        assert!(parse::<2>(&file[..17]).unwrap_err().contains("cut off"));
        assert!(parse::<3>(&file).unwrap_err().contains("3 dimensions"));
        assert!(parse::<1>(&file[..5]).unwrap_err().contains("5 bytes"));
        let huge = [[0, 0, 8, 3].as_slice(), &[255; 12]].concat();
        assert!(parse::<3>(&huge).unwrap_err().contains("damaged"));
    }
}
