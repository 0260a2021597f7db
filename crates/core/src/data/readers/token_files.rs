//! Headers of token files: the position of the tokens, and the detection of files that are not flat
//! tokens.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::TokenType;

/// Position of the tokens in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// Offset of the first token in bytes.
    pub(super) start: u64,
    /// Number of tokens.
    pub(super) tokens: usize,
}

/// Size of the header: 256 integers of 4 bytes, which are a magic number, a version, the number of
/// tokens, and zeros (`write_datafile` of llm.c).
const LLM_C_HEADER: u64 = 1024;
const LLM_C: [(u32, TokenType); 2] = [(20_240_520, TokenType::U16), (20_240_801, TokenType::U32)];
const NPY: &[u8] = b"\x93NUMPY";
/// The longest header that NumPy's own reader accepts.
const NPY_MAX_HEADER: u64 = 10_000;
const MEGATRON: &[u8] = b"MMIDIDX\0\0";

/// Formats other than tokens, with the remedy. Not checked for bytes, which may come from any file.
const OTHERS: [(&[u8], &str); 9] = [
    (b"\x1f\x8b\x08", "compressed with gzip: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard: decompress it first"),
    (b"\xfd7zXZ\0", "compressed with xz: decompress it first"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4: decompress it first"),
    (b"PK\x03\x04", "a zip file (.npz, torch.save): write its array with `array.tofile(path)`"),
    (b"PAR1", "a Parquet file: read it with `Parquet`"),
    (b"ARROW1\0\0", "an Arrow file: write its tokens with `array.tofile(path)`"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: write its tokens with `array.tofile(path)`"),
    (b"TNTIDX\0\0", "an index of fairseq: open the .bin file next to it"),
];

/// Finds the tokens of a file of `len` bytes.
pub(super) fn extent(path: &Path, file: &File, len: u64, kind: TokenType) -> Result<Extent, String> {
    let mut start = [0; 18];
    let read = read_up_to(file, &mut start, 0).map_err(|error| error.to_string())?;
    let start = &start[..read];
    if let Some(&[a, b, c, d]) = start.first_chunk()
        && let Some((_, stored)) = LLM_C.iter().find(|(magic, _)| *magic == u32::from_le_bytes([a, b, c, d]))
    {
        return llm_c(start, len, *stored, kind);
    }
    if start.starts_with(NPY) {
        return npy(file, start, len, kind);
    }
    if start.starts_with(MEGATRON) {
        let stored = start.get(17).map_or("", |code| megatron_type(*code));
        return Err(format!(
            "is an index of Megatron: open the .bin file next to it, whose tokens are {stored}"
        ));
    }
    if kind != TokenType::U8
        && let Some((_, what)) = OTHERS.iter().find(|(magic, _)| start.starts_with(magic))
    {
        return Err(format!("is {what}"));
    }
    megatron_neighbour(path, kind)?;
    flat(0, len, kind)
}

/// Returns the tokens from `start` to the end of the file.
fn flat(start: u64, len: u64, kind: TokenType) -> Result<Extent, String> {
    let (bytes, width) = (len - start, kind.width());
    if !bytes.is_multiple_of(width as u64) {
        return Err(format!(
            "{bytes} bytes are no tokens of {width} bytes: it is cut off, or of another type"
        ));
    }
    Ok(Extent { start, tokens: bytes as usize / width })
}

fn llm_c(start: &[u8], len: u64, stored: TokenType, kind: TokenType) -> Result<Extent, String> {
    same("a file of llm.c", stored, kind)?;
    let tokens = start.get(8..).and_then(<[u8]>::first_chunk).map(|count| u32::from_le_bytes(*count));
    let extent = len.checked_sub(LLM_C_HEADER).map(|_| flat(LLM_C_HEADER, len, kind)).transpose()?;
    match (tokens, extent) {
        (Some(tokens), Some(extent)) if tokens as usize == extent.tokens => Ok(extent),
        (tokens, extent) => Err(format!(
            "is a file of llm.c whose header says {} tokens, and has {}: it is cut off or damaged",
            tokens.unwrap_or_default(),
            extent.map_or(0, |extent| extent.tokens)
        )),
    }
}

/// Reads the header of a one-dimensional array in NumPy's format (`numpy.lib.format`), versions 1
/// to 3.
fn npy(file: &File, start: &[u8], len: u64, kind: TokenType) -> Result<Extent, String> {
    let (at, header) = match *start {
        [_, _, _, _, _, _, 1, _, a, b, ..] => (10, u64::from(u16::from_le_bytes([a, b]))),
        [_, _, _, _, _, _, 2 | 3, _, a, b, c, d, ..] => (12, u64::from(u32::from_le_bytes([a, b, c, d]))),
        _ => return Err("is a .npy file of an unknown version".into()),
    };
    if header > NPY_MAX_HEADER {
        return Err(format!("is a .npy file with a header of {header} bytes: it is damaged"));
    }
    let mut text = vec![0; header as usize];
    file.read_exact_at(&mut text, at).map_err(|error| format!("is a .npy file that is cut off: {error}"))?;
    let text = String::from_utf8_lossy(&text);
    let remedy = "write it with `array.ravel().astype(np.uint16).tofile(path)`";
    let value = |key: &str| {
        let (_, value) = text.split_once(&format!("'{key}':"))?;
        Some(value.trim_start())
    };
    let found = value("descr").and_then(|value| value.strip_prefix('\'')?.split_once('\'')).map(|(d, _)| d);
    let stored = match found {
        Some("|u1") => TokenType::U8,
        Some("<u2") => TokenType::U16,
        Some("<u4") => TokenType::U32,
        found => {
            let found = found.unwrap_or("several fields");
            return Err(format!("is a .npy file of {found}, which is not read: {remedy}"));
        }
    };
    let shape = value("shape").and_then(|value| value.strip_prefix('(')?.split_once(')')).map(|(s, _)| s);
    let shape = shape.unwrap_or_default();
    let tokens = shape.strip_suffix(',').and_then(|count| count.trim().parse::<usize>().ok());
    let Some(tokens) = tokens else {
        return Err(format!(
            "is a .npy file of the shape ({shape}), and tokens have one dimension: {remedy}"
        ));
    };
    same("a .npy file", stored, kind)?;
    let extent = flat((at + header).min(len), len, kind)?;
    if extent.tokens != tokens {
        let has = extent.tokens;
        return Err(format!(
            "is a .npy file whose header says {tokens} tokens, and has {has}: it is cut off"
        ));
    }
    Ok(extent)
}

fn same(what: &str, stored: TokenType, kind: TokenType) -> Result<(), String> {
    if stored == kind {
        return Ok(());
    }
    Err(format!("is {what} of TokenType::{stored:?}, and is opened as TokenType::{kind:?}"))
}

/// Compares the type with Megatron's index next to a `.bin` file, if there is one.
fn megatron_neighbour(path: &Path, kind: TokenType) -> Result<(), String> {
    let index = path.with_extension("idx");
    if path.extension().is_none_or(|extension| extension != "bin") || !index.is_file() {
        return Ok(());
    }
    let mut start = [0; 18];
    let read = File::open(&index).and_then(|file| read_up_to(&file, &mut start, 0));
    let read = read.map_err(|error| format!("{}: {error}", index.display()))?;
    if read < start.len() || !start.starts_with(MEGATRON) {
        return Ok(());
    }
    let same = match start[17] {
        1 => kind == TokenType::U8,
        // The type is int32, but tokens are never negative.
        4 => kind == TokenType::U32,
        8 => kind == TokenType::U16,
        _ => false,
    };
    if same {
        return Ok(());
    }
    let stored = megatron_type(start[17]);
    Err(format!("is opened as TokenType::{kind:?}, and its index of Megatron says that tokens are {stored}"))
}

/// Returns the name of Megatron's `DType` (megatron/core/datasets/indexed_dataset.py).
fn megatron_type(code: u8) -> &'static str {
    match code {
        1 => "TokenType::U8",
        2 => "int8, which is not read",
        3 => "int16, which is not read",
        4 => "TokenType::U32 (int32)",
        5 => "int64, which is not read",
        6 | 7 => "floating-point numbers, which are not read",
        8 => "TokenType::U16",
        _ => "of an unknown type",
    }
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], at + read as u64)? {
            0 => break,
            more => read += more,
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::data::readers::Tokens;
    use crate::data::{Items, Pass};

    fn llm_c_file(magic: u32, count: u32, tokens: &[u8]) -> Vec<u8> {
        let mut bytes: Vec<u8> = [magic, 1, count].iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.resize(LLM_C_HEADER as usize, 0);
        [&bytes, tokens].concat()
    }

    /// Returns a file in the format of `numpy.save`.
    fn npy_file(descr: &str, shape: &str, content: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}");
        let header = format!("{header:<117}\n");
        [NPY, &[1, 0], &(header.len() as u16).to_le_bytes(), header.as_bytes(), content].concat()
    }

    fn u16s(tokens: impl IntoIterator<Item = u16>) -> Vec<u8> {
        tokens.into_iter().flat_map(u16::to_le_bytes).collect()
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
            let path = self.0.path().join(name);
            fs::write(&path, bytes).unwrap();
            path
        }

        /// Returns the tokens of a file, or the message.
        fn tokens(&self, bytes: &[u8], kind: TokenType) -> Result<Vec<i64>, String> {
            let path = self.write("x.bin", bytes);
            let tokens = Tokens::open(&path, kind, 1).map_err(|error| error.to_string())?;
            let mut all = Vec::new();
            for index in 0..tokens.len() {
                let window = Vec::<i64>::try_from(tokens.get(index, &mut Pass::new(0, 0).rng(0)).unwrap());
                let window = window.unwrap();
                all.extend(&window[usize::from(index > 0)..]);
            }
            Ok(all)
        }
    }

    #[test]
    fn headers_of_llm_c_and_npy_are_not_tokens() {
        let folder = Folder(tempfile::tempdir().unwrap());
        let small = u16s([7, 50_256, 9]);
        let large: Vec<u8> = [70_000_u32, 1].iter().flat_map(|token| token.to_le_bytes()).collect();
        for (bytes, kind, expected) in [
            (llm_c_file(20_240_520, 3, &small), TokenType::U16, vec![7, 50_256, 9]),
            (llm_c_file(20_240_801, 2, &large), TokenType::U32, vec![70_000, 1]),
            (npy_file("'<u2'", "(3,)", &small), TokenType::U16, vec![7, 50_256, 9]),
            (npy_file("'<u4'", "(2,)", &large), TokenType::U32, vec![70_000, 1]),
            (npy_file("'|u1'", "(3,)", b"abc"), TokenType::U8, vec![97, 98, 99]),
        ] {
            assert_eq!(folder.tokens(&bytes, kind).unwrap(), expected);
            for len in bytes.len() - 5..bytes.len() {
                let message = folder.tokens(&bytes[..len], kind).unwrap_err();
                assert!(message.contains("x.bin") && message.contains("cut off"), "{message}");
            }
        }
    }

    #[test]
    fn files_that_are_not_flat_tokens_are_refused_with_the_remedy() {
        let folder = Folder(tempfile::tempdir().unwrap());
        let small = u16s([7, 50_256, 9]);
        let index = [MEGATRON, &1_u64.to_le_bytes(), &[8], &[0; 40]].concat();
        let cases: [(&[u8], TokenType, &str); 9] = [
            (&llm_c_file(20_240_520, 3, &small), TokenType::U32, "llm.c of TokenType::U16, and is opened as"),
            (&npy_file("'<u2'", "(3,)", &small), TokenType::U8, ".npy file of TokenType::U16"),
            (
                &npy_file("'<i8'", "(3,)", &[0; 24]),
                TokenType::U16,
                "of <i8, which is not read: write it with",
            ),
            (&npy_file("'>u2'", "(3,)", &small), TokenType::U16, "of >u2, which is not read"),
            (&npy_file("'<u2'", "(1, 3)", &small), TokenType::U16, "shape (1, 3), and tokens have one"),
            (&npy_file("[('a', '<u2')]", "(3,)", &small), TokenType::U16, "several fields"),
            (&index, TokenType::U16, "open the .bin file next to it, whose tokens are TokenType::U16"),
            (b"\x1f\x8b\x08\0\0\0\0\0", TokenType::U16, "gzip: decompress"),
            (b"PAR1PAR1", TokenType::U32, "read it with `Parquet`"),
        ];
        for (bytes, kind, expected) in cases {
            let message = folder.tokens(bytes, kind).unwrap_err();
            assert!(message.contains("x.bin") && message.contains(expected), "{message}");
        }
        // A model of bytes may read any file.
        assert_eq!(folder.tokens(b"PAR1", TokenType::U8).unwrap(), [80, 65, 82, 49]);
    }

    #[test]
    fn type_is_compared_with_the_index_of_megatron_next_to_the_file() {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("x.idx", &[MEGATRON, &1_u64.to_le_bytes(), &[4], &[0; 40]].concat());
        let tokens: Vec<u8> = [3_u32, 4].iter().flat_map(|token| token.to_le_bytes()).collect();
        assert_eq!(folder.tokens(&tokens, TokenType::U32).unwrap(), [3, 4]);
        let message = folder.tokens(&tokens, TokenType::U16).unwrap_err();
        assert!(message.contains("says that tokens are TokenType::U32"), "{message}");
        folder.write("x.idx", b"the index of another program");
        assert_eq!(folder.tokens(&tokens, TokenType::U16).unwrap(), [3, 0, 4, 0]);
    }
}
