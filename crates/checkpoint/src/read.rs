use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::catalog::{Catalog, Section};
use crate::header::Header;
use crate::parameters::is_file_name;
use crate::stream::open_regular;
use crate::{CHUNK, Error, FileInfo, Manifest, Result, verify_file};

/// A checkpoint that was read once, whole, and found to be what was written. Its tensors stay on the disk.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) path: PathBuf,
    pub(crate) manifest: Manifest,
    pub(crate) catalog: Catalog,
}

/// A few elements of a tensor on their way from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// What the tensor belongs to.
    pub section: Section,
    /// Its key.
    pub key: &'a str,
    /// First element in the tensor.
    pub start: u64,
    /// Number of elements.
    pub len: u64,
}

impl Checkpoint {
    /// Reads a checkpoint and checks every file against the manifest.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the file that is missing or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest = Manifest::read(path)?;
        for (name, info) in &manifest.files {
            verify(path, name, info)?;
        }
        let catalog = Self::read_catalog(path, &manifest)?;
        Ok(Self { path: path.to_owned(), manifest, catalog })
    }

    /// All that is wrong with a checkpoint; nothing where it is whole.
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

    /// The tensors that the headers of its files name; the files are not checked.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for headers that are damaged or do not fit each other.
    pub fn headers(path: &Path, manifest: &Manifest) -> Result<Catalog> {
        Self::read_catalog(path, manifest)
    }

    /// A checkpoint whose files are in memory: by name the header and the length, with the header, of each. `place` says so where a path would
    /// stand.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for headers that are damaged or do not fit each other.
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

    /// A checkpoint that another process has opened.
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

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its tensors.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The bytes of one tensor, whole.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that key, or a file cannot be read.
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

    /// The order that [`Checkpoint::stream`] passes the elements in: file by file, from front to back.
    pub fn pieces(&self) -> impl Iterator<Item = (&str, Vec<(u64, Piece<'_>)>)> {
        let tensors = || {
            Section::ALL.into_iter().flat_map(|section| {
                self.catalog.section(section).iter().map(move |(key, saved)| (section, key, saved))
            })
        };
        self.manifest.files.keys().map(move |name| {
            let mut pieces = Vec::new();
            for (section, key, saved) in tensors() {
                // Elements of less than a byte go in one piece.
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

    /// Reads the files once more, and hands out what the tensors hold piece by piece; the checksums are compared again, since a
    /// file may have changed since it was opened. `take` sees the pieces of [`Checkpoint::pieces`], in their order.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the file that changed, and the first error of `take` ends the reading.
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
                    // The header.
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

/// Checks that a file of the manifest lies in the checkpoint and is what was written.
fn verify(checkpoint: &Path, name: &str, info: &FileInfo) -> Result<()> {
    let file = checkpoint.join(name);
    match is_file_name(name) {
        true => verify_file(&file, info),
        false => Err(Error::checkpoint(&file, "lies outside of its checkpoint")),
    }
}
