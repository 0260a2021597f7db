//! Samples cached in a folder.
//!
//! ```text
//! <folder>/<name>-<fingerprint>/<index / 1000>/<index>.item
//!     8 bytes `ICE-ITEM`, the CRC-32C of the rest as a little-endian u32, then a safetensors file
//! ```

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::record::{Record, decode, encode};
use super::{Collated, Items};
use crate::data::SampleRng;
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"ICE-ITEM";
const HEADER: usize = MAGIC.len() + 4;
/// Age of a partial file from which it is treated as left by a killed process.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Samples that are made once and then read from a folder, created by [`Items::cache`].
///
/// All ranks of a node may share the folder, and so may nodes with a common file system. Each
/// sample is a file, which is either complete or absent. A damaged file is made again, with a
/// warning that names it. If a file cannot be written, the sample is made again each time, with a
/// single warning.
///
/// A sample is identified by the name, the fingerprint of the items (see [`Items::fingerprint`]),
/// and its index. The code of earlier transforms is not part of the identity: **change the name
/// when they change**. Random numbers of earlier transforms depend only on the index; transforms
/// that must differ in each epoch belong after the cache.
///
/// ```
/// use ice_core::data::{Dataset, Items, items};
/// use tch::{Device, Tensor};
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path();
/// let slow = items(100, |index| Ok((Tensor::from(index as f32).square(), index as i64)));
/// let dataset = slow.cache(folder, "squares-v1")?.limit(10 << 30).stack();
/// let (squares, numbers) = dataset.batch(&[3, 4], Device::Cpu)?;
/// assert_eq!(squares.size(), [2]);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct Cached<I> {
    items: I,
    name: String,
    folder: PathBuf,
    limit: Option<u64>,
    /// Bytes in the folder, once they have been counted.
    used: OnceLock<AtomicU64>,
    written: AtomicU64,
    warned: AtomicBool,
    hits: AtomicU64,
    misses: AtomicU64,
    damaged: AtomicU64,
}

/// Number of samples that a cache had or missed, in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheCounts {
    /// Samples read from the cache.
    pub hits: u64,
    /// Samples that were absent.
    pub misses: u64,
    /// Samples that were present, but damaged.
    pub damaged: u64,
}

impl<I: Items> Cached<I>
where
    I::Item: Record,
{
    pub(super) fn new(items: I, folder: &Path, name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(Error::Usage(format!(
                "`{name}` is no name for a cache: use letters, digits, `-`, `_` and `.`"
            )));
        }
        let name = format!("{name}-{:016x}", items.fingerprint());
        Ok(Self {
            folder: folder.join(&name),
            items,
            name,
            limit: None,
            used: OnceLock::new(),
            written: AtomicU64::new(0),
            warned: AtomicBool::new(false),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
        })
    }

    /// Sets a limit in bytes, after which no samples are added; other samples are made each time.
    /// Each process counts the bytes present at its start and the bytes it adds, so that several
    /// processes at once may exceed the limit.
    #[must_use]
    pub fn limit(mut self, bytes: u64) -> Self {
        self.limit = Some(bytes);
        self
    }

    /// Returns the counts of hits and misses so far.
    pub fn counts(&self) -> CacheCounts {
        CacheCounts {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            damaged: self.damaged.load(Ordering::Relaxed),
        }
    }

    fn path(&self, index: usize) -> PathBuf {
        self.folder.join(format!("{:06}", index / 1000)).join(format!("{index:09}.item"))
    }

    /// Reads the sample. Returns `None` if it is absent.
    fn read(&self, index: usize, path: &Path) -> Result<Option<I::Item>, String> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let body = match (bytes.get(..MAGIC.len()), bytes.get(MAGIC.len()..HEADER), bytes.get(HEADER..)) {
            (Some(magic), Some(crc), Some(body)) if magic == MAGIC => {
                (crc == crc32c::crc32c(body).to_le_bytes()).then_some(body)
            }
            _ => return Err(format!("{} bytes are no cached sample", bytes.len())),
        };
        decode(body.ok_or("its checksum is wrong")?, &self.key(index)).map(Some)
    }

    fn key(&self, index: usize) -> String {
        format!("{}/{index}", self.name)
    }

    fn write(&self, index: usize, path: &Path, item: &I::Item) -> Result<()> {
        let partial = self.folder.join("partial");
        let used = self.used.get_or_init(|| {
            remove_abandoned(&partial);
            AtomicU64::new(self.limit.map_or(0, |_| size_of(&self.folder)))
        });
        let body = encode(item, &self.key(index))?;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        let len = bytes.len() as u64;
        if self.limit.is_some_and(|limit| used.load(Ordering::Relaxed) + len > limit) {
            return Ok(());
        }
        let count = self.written.fetch_add(1, Ordering::Relaxed);
        let beside = partial.join(format!("{}-{count}-{index}", std::process::id()));
        for folder in [Some(partial.as_path()), path.parent()].into_iter().flatten() {
            fs::create_dir_all(folder).map_err(Error::io(folder))?;
        }
        let placed = fs::write(&beside, &bytes).and_then(|()| fs::rename(&beside, path));
        placed.map_err(|error| {
            // If this fails, a later process finds and removes the file.
            let _: std::io::Result<()> = fs::remove_file(&beside);
            Error::io(path)(error)
        })?;
        used.fetch_add(len, Ordering::Relaxed);
        Ok(())
    }
}

impl<I: Items> Items for Cached<I>
where
    I::Item: Record,
{
    type Item = I::Item;

    fn len(&self) -> usize {
        self.items.len()
    }

    fn get(&self, index: usize, _: &mut SampleRng) -> Result<I::Item> {
        let path = self.path(index);
        let count = match self.read(index, &path) {
            Ok(Some(item)) => {
                self.hits.fetch_add(1, Ordering::Relaxed);
                return Ok(item);
            }
            Ok(None) => &self.misses,
            Err(problem) => {
                tracing::warn!(path = %path.display(), problem, "a cached sample is damaged and made anew");
                &self.damaged
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        let item = self.items.get(index, &mut SampleRng::of_index(index as u64))?;
        if let Err(error) = self.write(index, &path, &item)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "samples cannot be cached");
        }
        Ok(item)
    }

    fn fingerprint(&self) -> u64 {
        self.items.fingerprint()
    }
}

impl<I, F> Collated<Cached<I>, F>
where
    I: Items,
    I::Item: Record,
{
    /// Returns the cache's counts of hits and misses so far.
    pub fn cache_counts(&self) -> CacheCounts {
        self.items().counts()
    }
}

fn remove_abandoned(partial: &Path) {
    let Ok(files) = fs::read_dir(partial) else { return };
    for file in files.flatten() {
        let age = file.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
        if matches!(age, Ok(Ok(age)) if age > ABANDONED) {
            // Another process may have removed the file first.
            let _: std::io::Result<()> = fs::remove_file(file.path());
        }
    }
}

fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use tch::{Kind, Tensor};

    use super::*;
    use crate::data::{Pass, items};

    type Sample = (Tensor, String, i64);

    fn rng() -> SampleRng {
        Pass::new(1, 1).rng(1)
    }

    /// Creates samples that count how often they are made.
    fn counted() -> (impl Items<Item = Sample>, Arc<AtomicUsize>) {
        let made = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&made);
        let items = items(20, move |index| {
            count.fetch_add(1, Ordering::Relaxed);
            let tensor = Tensor::from_slice(&[index as f32, 0.5]).to_kind(Kind::BFloat16);
            Ok((tensor, format!("sample {index}"), index as i64))
        });
        (
            items.map_random(|(tensor, text, number), rng| Ok((tensor, text, number + rng.below(5) as i64))),
            made,
        )
    }

    #[test]
    fn a_sample_is_made_once_and_is_the_same_from_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let (samples, made) = counted();
        let samples = Arc::new(samples);
        let cached = Arc::clone(&samples).cache(folder.path(), "test").unwrap();
        let first: Vec<Sample> = (0..20).map(|index| cached.get(index, &mut rng()).unwrap()).collect();
        let again = samples.cache(folder.path(), "test").unwrap();
        for (index, sample) in first.iter().enumerate() {
            assert_eq!(&again.get(index, &mut Pass::new(2, 3).rng(4)).unwrap(), sample);
        }
        assert_eq!(made.load(Ordering::Relaxed), 20);
        assert_eq!(again.counts(), CacheCounts { hits: 20, misses: 0, damaged: 0 });
        assert!(first.iter().any(|(_, _, number)| number % 7 != 0));
        assert_eq!(fs::read_dir(cached.folder.join("partial")).unwrap().count(), 0);
    }

    #[test]
    fn names_and_fingerprints_keep_samples_apart() {
        let folder = tempfile::tempdir().unwrap();
        let get = |len: usize, add: usize, name: &str| {
            let cached =
                items(len, move |index| Ok((index + add) as i64)).cache(folder.path(), name).unwrap();
            cached.get(0, &mut rng()).unwrap()
        };
        assert_eq!(get(3, 1, "a"), 1);
        assert_eq!(get(3, 2, "a"), 1);
        assert_eq!(get(4, 2, "a"), 2);
        assert_eq!(get(3, 2, "b"), 2);
        for name in ["", "../x", "a/b", ".hidden"] {
            assert!(items(1, |_| Ok(0_i64)).cache(folder.path(), name).is_err(), "{name}");
        }
    }

    #[test]
    fn any_damage_is_found_and_the_sample_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (samples, made) = counted();
        let cached = samples.cache(folder.path(), "test").unwrap();
        let first = cached.get(7, &mut rng()).unwrap();
        let path = cached.path(7);
        let whole = fs::read(&path).unwrap();
        let other = {
            drop(cached.get(8, &mut rng()).unwrap());
            fs::read(cached.path(8)).unwrap()
        };
        let mut damages: Vec<Vec<u8>> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
        damages.extend((0..whole.len()).map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            bytes
        }));
        damages.push(other);
        let before = made.load(Ordering::Relaxed);
        for damage in &damages {
            fs::write(&path, damage).unwrap();
            assert_eq!(cached.get(7, &mut rng()).unwrap(), first);
            assert_eq!(fs::read(&path).unwrap(), whole);
        }
        assert_eq!(made.load(Ordering::Relaxed) - before, damages.len());
        assert_eq!(cached.counts().damaged, damages.len() as u64);
    }

    #[test]
    fn the_limit_is_kept_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let one = {
            let cached = counted().0.cache(folder.path(), "size").unwrap();
            drop(cached.get(0, &mut rng()).unwrap());
            size_of(&cached.folder)
        };
        for _ in 0..2 {
            let (samples, _) = counted();
            let cached = samples.cache(folder.path(), "test").unwrap().limit(3 * one + one / 2);
            (0..9).for_each(|index| drop(cached.get(index, &mut rng()).unwrap()));
            assert_eq!(size_of(&cached.folder), 3 * one);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let cached = counted().0.cache(&file, "test").unwrap();
        assert_eq!(cached.get(3, &mut rng()).unwrap().1, "sample 3");
    }
}
