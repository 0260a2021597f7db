use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::catalog::{Catalog, Section};
use crate::header::Header;
use crate::parameters::is_file_name;
use crate::stream::open_regular;
use crate::{CHUNK, Error, FileInfo, Manifest, Result, verify_file};

/// A checkpoint that was read completely once and verified. Its tensors stay on disk.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) path: PathBuf,
    pub(crate) manifest: Manifest,
    pub(crate) catalog: Catalog,
}

/// A few elements of a tensor, read from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Section of the tensor.
    pub section: Section,
    /// Key of the tensor.
    pub key: &'a str,
    /// Index of the first element in the tensor.
    pub start: u64,
    /// Number of elements.
    pub len: u64,
}

impl Checkpoint {
    /// Opens a checkpoint, and verifies every file against the manifest.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a file is missing or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest = Manifest::read(path)?;
        for (name, info) in &manifest.files {
            verify(path, name, info)?;
        }
        let catalog = Self::read_catalog(path, &manifest)?;
        Ok(Self { path: path.to_owned(), manifest, catalog })
    }

    /// Returns all damage of a checkpoint, or an empty list if it is intact.
    pub fn damage(path: &Path) -> Vec<Error> {
        let manifest = match Manifest::read(path) {
            Ok(manifest) => manifest,
            Err(error) => return vec![error],
        };
        let files = manifest.files.iter().map(|(name, info)| verify(path, name, info));
        let damage: Vec<_> = files.filter_map(Result::err).collect();
        match damage.is_empty() {
            true => Self::headers(path, &manifest).err().into_iter().collect(),
            false => damage,
        }
    }

    /// Returns the tensors that the headers of the files name, without verifying the files.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if headers are damaged or contradict each other.
    pub fn headers(path: &Path, manifest: &Manifest) -> Result<Catalog> {
        Self::read_catalog(path, manifest)
    }

    /// Opens a checkpoint whose files are in memory. `files` holds, by name, the header and the
    /// length including the header. `place` describes the checkpoint in messages, instead of a
    /// path.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if headers are damaged or contradict each other.
    pub fn in_memory(
        place: PathBuf,
        mut manifest: Manifest,
        files: BTreeMap<String, (Vec<u8>, u64)>,
    ) -> Result<Self> {
        let mut catalog = Catalog::default();
        manifest.files.clear();
        for (name, (header, bytes)) in files {
            let fail = |problem: String| Error::checkpoint(&place, format!("{name} {problem}"));
            let Some(section) = Section::of(&name) else { continue };
            let header = Header::read(&mut header.as_slice(), bytes).map_err(fail)?;
            catalog.add(section, &name, header.data_start, header.tensors).map_err(fail)?;
            manifest.files.insert(name, FileInfo { bytes, crc32c: 0 });
        }
        catalog.complete().map_err(|problem| Error::checkpoint(&place, problem))?;
        Ok(Self { path: place, manifest, catalog })
    }

    /// Creates a checkpoint that another process has opened and verified.
    pub fn assume(path: PathBuf, manifest: Manifest, catalog: Catalog) -> Self {
        Self { path, manifest, catalog }
    }

    fn read_catalog(path: &Path, manifest: &Manifest) -> Result<Catalog> {
        let mut catalog = Catalog::default();
        for (name, info) in &manifest.files {
            let Some(section) = Section::of(name) else { continue };
            let file = path.join(name);
            let fail = |problem: String| Error::checkpoint(&file, problem);
            let mut reader = BufReader::new(open_regular(&file).map_err(|error| fail(error.to_string()))?);
            let header = Header::read(&mut reader, info.bytes).map_err(fail)?;
            catalog.add(section, name, header.data_start, header.tensors).map_err(fail)?;
        }
        catalog.complete().map_err(|problem| Error::checkpoint(path, problem))?;
        Ok(catalog)
    }

    /// Returns the path of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the tensors.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Returns the bytes of one whole tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is no tensor with this key, or a file cannot be read.
    pub fn tensor(&self, section: Section, key: &str) -> Result<Vec<u8>> {
        let missing = || Error::checkpoint(&self.path, format!("has no `{key}`"));
        let saved = self.catalog.section(section).get(key).ok_or_else(missing)?;
        let mut bytes = vec![0; saved.bytes() as usize];
        let width = saved.dtype.bitsize() as u64;
        for extent in &saved.extents {
            let path = self.path.join(&extent.file);
            let (start, len) = ((extent.start * width / 8) as usize, (extent.len * width / 8) as usize);
            open_regular(&path)
                .and_then(|file| file.read_exact_at(&mut bytes[start..start + len], extent.offset))
                .map_err(|error| Error::checkpoint(&path, error))?;
        }
        Ok(bytes)
    }

    /// Returns the elements in the order of [`Checkpoint::stream`]: file by file, from start to
    /// end.
    pub fn pieces(&self) -> impl Iterator<Item = (&str, Vec<(u64, Piece<'_>)>)> {
        let tensors = || {
            Section::ALL.into_iter().flat_map(|section| {
                self.catalog.section(section).iter().map(move |(key, saved)| (section, key, saved))
            })
        };
        self.manifest.files.keys().map(move |name| {
            let mut pieces = Vec::new();
            for (section, key, saved) in tensors() {
                // A tensor whose elements have less than a byte is a single piece.
                let width = saved.dtype.bitsize() as u64 / 8;
                let most = (CHUNK as u64).checked_div(width).map_or(u64::MAX, |elements| elements.max(1));
                for extent in saved.extents.iter().filter(|extent| extent.file == *name) {
                    let mut done = 0;
                    while done < extent.len {
                        let len = most.min(extent.len - done);
                        let piece = Piece { section, key, start: extent.start + done, len };
                        pieces.push((extent.offset + done * width, piece));
                        done += len;
                    }
                }
            }
            pieces.sort_by_key(|(offset, _)| *offset);
            (name.as_str(), pieces)
        })
    }

    /// Reads the files once more, and passes the elements of the tensors to `take` piece by piece,
    /// in the order of [`Checkpoint::pieces`]. Verifies the checksums again, since a file may have
    /// changed since it was opened.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if a file has changed. The first error of `take` ends the reading.
    pub fn stream<E: From<Error>>(
        &self,
        mut take: impl FnMut(Piece<'_>, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut buffer = Vec::new();
        for (name, pieces) in self.pieces() {
            let path = self.path.join(name);
            let fail = |error: std::io::Error| Error::checkpoint(&path, error);
            let mut file = open_regular(&path).map_err(fail)?;
            let info = self.manifest.files[name];
            let (mut at, mut crc) = (0, 0);
            let mut fill = |buffer: &mut Vec<u8>, len: u64| {
                buffer.resize(len as usize, 0);
                file.read_exact(buffer).map_err(fail)?;
                crc = crc32c::crc32c_append(crc, buffer);
                Ok::<(), Error>(())
            };
            for (index, (offset, piece)) in pieces.iter().enumerate() {
                if *offset > at {
                    // These bytes are the header.
                    fill(&mut buffer, offset - at)?;
                }
                let end = pieces.get(index + 1).map_or(info.bytes, |(next, _)| *next);
                fill(&mut buffer, end - offset)?;
                at = end;
                take(*piece, &buffer)?;
            }
            if at < info.bytes {
                fill(&mut buffer, info.bytes - at)?;
            }
            if crc != info.crc32c {
                return Err(Error::checkpoint(&path, "was changed while it was read").into());
            }
        }
        Ok(())
    }
}

/// Verifies that a file of the manifest is inside of the checkpoint and intact.
fn verify(checkpoint: &Path, name: &str, info: &FileInfo) -> Result<()> {
    let file = checkpoint.join(name);
    match is_file_name(name) {
        true => verify_file(&file, info),
        false => Err(Error::checkpoint(&file, "lies outside of its checkpoint")),
    }
}
