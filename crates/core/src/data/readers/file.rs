//! Functions that several readers use.

use std::fmt::Display;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use crate::{Error, Result};

/// Creates an error that names the file.
pub(super) fn fail<E: Display>(path: &Path) -> impl Fn(E) -> Error {
    let path = path.to_owned();
    move |problem| Error::Data { path: path.clone(), problem: problem.to_string() }
}

/// Returns the position of the only column with this name.
pub(super) fn only(columns: &[String], name: &str) -> Result<usize> {
    let found: Vec<_> = (0..columns.len()).filter(|&at| columns[at] == name).collect();
    match found[..] {
        [at] => Ok(at),
        [] => Err(Error::Usage(format!("no column `{name}`; there are {}", columns.join(", ")))),
        _ => {
            let numbers: Vec<_> = found.iter().map(|at| (at + 1).to_string()).collect();
            Err(Error::Usage(format!(
                "{} columns are named `{name}` (columns {}): rename them in the file",
                found.len(),
                numbers.join(", ")
            )))
        }
    }
}

/// A hash that is the same on every machine and in every release: FNV-1a.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        for &byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// Adds the name, the length and the modification time of a file.
    pub(super) fn add_file(&mut self, path: &Path) -> Result<()> {
        let metadata = fs::metadata(path).map_err(fail(path))?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        self.add(path.file_name().unwrap_or_default().as_bytes());
        self.add(&metadata.len().to_le_bytes());
        self.add(&modified.map_or(0, |time| time.as_nanos()).to_le_bytes());
        Ok(())
    }

    pub(super) fn finish(self) -> u64 {
        self.0
    }
}
