use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tch::Tensor;

use super::file::{Fingerprint, fail};
use super::token_files::{self, Extent};
use crate::data::{Items, SampleRng};
use crate::{Error, Result};

/// Storage format of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenType {
    /// One byte, from 0 to 255, of any file without a known header.
    U8,
    /// Two bytes, little-endian, like in the `.bin` files of nanoGPT.
    U16,
    /// Four bytes, little-endian.
    U32,
}

impl TokenType {
    pub(super) fn width(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// Windows of a flat file of tokens. Each window is read on access, from the system's page cache.
///
/// A sample is an int64 tensor `[length + 1]`: the first `length` tokens are the input of a model,
/// the last `length` its target. By default a window starts every `length` tokens;
/// [`Tokens::stride`] changes the distance. Tokens at the end that do not fill a window are left
/// out.
///
/// The headers of llm.c's files (`.bin` with a magic number) and of NumPy's (`.npy`, one dimension
/// of uint8, uint16 or uint32) are recognized, and tokens start after them. An index of Megatron
/// (`.idx`) is an error that names the format. The same holds for compressed files, archives and
/// tables that are opened as [`TokenType::U16`] or [`TokenType::U32`].
///
/// ```
/// use ice_core::data::{Dataset, Items};
/// use ice_core::data::readers::{TokenType, Tokens};
/// use tch::Device;
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("train.bin");
/// std::fs::write(&path, (0..10_u16).flat_map(u16::to_le_bytes).collect::<Vec<_>>()).unwrap();
/// let windows = Tokens::open(&path, TokenType::U16, 3)?.stack();
/// let batch = windows.batch(&[0, 2], Device::Cpu)?;
/// let (seen, said) = (batch.narrow(1, 0, 3), batch.narrow(1, 1, 3));
/// assert_eq!(Vec::<i64>::try_from(seen.get(1)).unwrap(), [6, 7, 8]);
/// assert_eq!(Vec::<i64>::try_from(said.get(1)).unwrap(), [7, 8, 9]);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct Tokens {
    path: PathBuf,
    file: File,
    kind: TokenType,
    extent: Extent,
    length: usize,
    stride: usize,
    fingerprint: Fingerprint,
}

impl Tokens {
    /// Opens a file for windows of this length, at least 1.
    ///
    /// # Errors
    /// [`Error::Data`] if the file is missing, ends within a token, has fewer tokens than one
    /// window, or has a header that contradicts `kind`.
    pub fn open(path: impl AsRef<Path>, kind: TokenType, length: usize) -> Result<Self> {
        let path = path.as_ref().to_owned();
        if length == 0 {
            return Err(Error::Usage("windows of 0 tokens: give at least 1".into()));
        }
        let file = File::open(&path).map_err(fail(&path))?;
        let len = file.metadata().map_err(fail(&path))?.len();
        let extent = token_files::extent(&path, &file, len, kind).map_err(fail(&path))?;
        let tokens = extent.tokens;
        if tokens <= length {
            return Err(fail(&path)(format!(
                "{tokens} tokens do not fill a window of {length} and the one after it"
            )));
        }
        let mut fingerprint = Fingerprint::default();
        fingerprint.add_file(&path)?;
        Ok(Self { path, file, kind, extent, length, stride: length, fingerprint })
    }

    /// Sets the distance of the windows' starts, at least 1. If it is less than their length,
    /// windows overlap.
    #[must_use]
    pub fn stride(mut self, stride: usize) -> Self {
        self.stride = stride.max(1);
        self
    }

    /// Returns the number of tokens of the file.
    pub fn tokens(&self) -> usize {
        self.extent.tokens
    }
}

impl Items for Tokens {
    type Item = Tensor;

    fn len(&self) -> usize {
        (self.extent.tokens - self.length - 1) / self.stride + 1
    }

    fn get(&self, index: usize, _: &mut SampleRng) -> Result<Tensor> {
        let width = self.kind.width();
        let mut bytes = vec![0; (self.length + 1) * width];
        let start = self.extent.start + (index * self.stride * width) as u64;
        self.file.read_exact_at(&mut bytes, start).map_err(fail(&self.path))?;
        let tokens: Vec<i64> = match self.kind {
            TokenType::U8 => bytes.into_iter().map(i64::from).collect(),
            TokenType::U16 => {
                bytes.chunks_exact(2).map(|b| i64::from(u16::from_le_bytes([b[0], b[1]]))).collect()
            }
            TokenType::U32 => bytes
                .chunks_exact(4)
                .map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
        };
        Ok(Tensor::f_from_slice(&tokens)?)
    }

    fn fingerprint(&self) -> u64 {
        let mut fingerprint = self.fingerprint;
        for number in [self.kind.width(), self.length, self.stride] {
            fingerprint.add(&(number as u64).to_le_bytes());
        }
        fingerprint.finish()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::data::Pass;

    fn windows(tokens: &Tokens) -> Vec<Vec<i64>> {
        let get = |index| tokens.get(index, &mut Pass::new(0, 0).rng(0)).unwrap();
        (0..tokens.len()).map(|index| Vec::<i64>::try_from(get(index)).unwrap()).collect()
    }

    #[test]
    fn windows_share_one_token_with_the_next_and_overlap_by_the_stride() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        fs::write(&path, (0..8_u32).flat_map(|t| (t + 70_000).to_le_bytes()).collect::<Vec<_>>()).unwrap();
        let open = |length| Tokens::open(&path, TokenType::U32, length).unwrap();
        let plus = |tokens: &[i64]| tokens.iter().map(|t| t + 70_000).collect::<Vec<_>>();
        assert_eq!(windows(&open(3)), [plus(&[0, 1, 2, 3]), plus(&[3, 4, 5, 6])]);
        assert_eq!(windows(&open(7)), [plus(&[0, 1, 2, 3, 4, 5, 6, 7])]);
        assert_eq!(windows(&open(6).stride(1)).len(), 2);
        assert_eq!(windows(&open(1)).len(), 7);
        assert_ne!(open(3).fingerprint(), open(2).fingerprint());

        let text = folder.path().join("text");
        fs::write(&text, "hé!").unwrap();
        assert_eq!(windows(&Tokens::open(&text, TokenType::U8, 3).unwrap()), [[104, 195, 169, 33]]);
    }

    #[test]
    fn what_is_no_file_of_such_tokens_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.bin");
        let problem = |kind, length| Tokens::open(&path, kind, length).err().unwrap().to_string();
        assert!(problem(TokenType::U16, 1).contains("x.bin"));
        fs::write(&path, [0; 10]).unwrap();
        assert!(problem(TokenType::U32, 1).contains("cut off"));
        assert!(problem(TokenType::U16, 5).contains("5 tokens do not fill a window of 5"));
        assert!(problem(TokenType::U16, 0).contains("at least 1"));
        let tokens = Tokens::open(&path, TokenType::U16, 4).unwrap();
        fs::write(&path, [0; 4]).unwrap();
        let message = tokens.get(0, &mut Pass::new(0, 0).rng(0)).unwrap_err().to_string();
        assert!(message.contains("x.bin"), "{message}");
    }
}
