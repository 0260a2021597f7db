use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ::tar::{Archive, Entry};

use super::file::fail;
use crate::data::{SampleRng, ShardIter, Stream};
use crate::{Error, Result};

/// Size limit of a sample, in bytes.
const MAX_SAMPLE: u64 = 1 << 30;
const BLOCK: usize = 512;

/// Tar files in the format of WebDataset: adjacent members with the same name up to its first dot
/// form a sample.
///
/// Finding samples reads only the members' headers. Loading a sample reads its members, on the rank
/// that needs it. Members without a dot in their name, and names like `__this__`, are ignored. The
/// files must not be compressed, but the images and texts in them may be.
///
/// ```
/// use ice_core::StreamNode;
/// use ice_core::data::Stream;
/// use ice_core::data::readers::TarShards;
/// # use ice_core::Error;
/// # let folder = tempfile::tempdir().unwrap();
/// # let paths: Vec<_> = (0..2).map(|shard| folder.path().join(format!("{shard}.tar"))).collect();
/// # for path in &paths {
/// #     let mut tar = tar::Builder::new(std::fs::File::create(path).unwrap());
/// #     let mut header = tar::Header::new_gnu();
/// #     header.set_size(1);
/// #     tar.append_data(&mut header, "0001.cls", b"7".as_slice()).unwrap();
/// #     tar.into_inner().unwrap();
/// # }
/// let shards = TarShards::open(paths)?.counted()?;
/// let classes = shards.map(|sample| sample.text("cls")?.trim().parse::<i64>().map_err(|e| Error::Usage(e.to_string())));
/// let node = StreamNode::new(classes.stack()).shuffle(10_000).batch_size(64).workers(4);
/// # Ok::<(), ice_core::Error>(())
/// ```
pub struct TarShards {
    paths: Vec<PathBuf>,
    samples: Option<u64>,
}

/// Position of a sample in [`TarShards`].
#[derive(Debug, Clone)]
pub struct TarFound {
    shard: usize,
    key: String,
    members: Vec<Member>,
}

#[derive(Debug, Clone)]
struct Member {
    extension: String,
    start: u64,
    len: u64,
}

/// A sample of [`TarShards`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarSample {
    /// Common prefix of the members' names: folder and name up to the first dot.
    pub key: String,
    /// Contents of the members, by the rest of their names in lower case: `jpg`, `seg.png`.
    pub members: BTreeMap<String, Vec<u8>>,
}

impl TarShards {
    /// Creates shards from these files, in this order. A file is opened when it is read.
    ///
    /// # Errors
    /// [`Error::Data`] if a file is missing.
    pub fn open<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        let paths: Vec<PathBuf> = paths.into_iter().map(Into::into).collect();
        for path in &paths {
            File::open(path).map_err(fail(path))?;
        }
        Ok(Self { paths, samples: None })
    }

    /// Counts the samples of all shards, which gives epochs a length.
    ///
    /// # Errors
    /// [`Error::Data`] if a file is damaged.
    pub fn counted(mut self) -> Result<Self> {
        let mut samples = 0;
        for shard in 0..self.paths.len() {
            samples += find(&self.paths[shard], shard)?.len() as u64;
        }
        self.samples = Some(samples);
        Ok(self)
    }
}

impl Stream for TarShards {
    type LocatedSample = TarFound;
    type Item = TarSample;

    fn shards(&self) -> usize {
        self.paths.len()
    }

    fn open(&self, shard: usize) -> Result<ShardIter<TarFound>> {
        Ok(Box::new(find(&self.paths[shard], shard)?.into_iter().map(Ok)))
    }

    fn load(&self, found: TarFound, _: &mut SampleRng) -> Result<TarSample> {
        let path = &self.paths[found.shard];
        let file = File::open(path).map_err(fail(path))?;
        let mut members = BTreeMap::new();
        for Member { extension, start, len } in found.members {
            let mut bytes = vec![0; len as usize];
            file.read_exact_at(&mut bytes, start)
                .map_err(|error| fail(path)(format!("member {}.{extension}: {error}", found.key)))?;
            members.insert(extension, bytes);
        }
        Ok(TarSample { key: found.key, members })
    }

    fn samples(&self) -> Option<u64> {
        self.samples
    }
}

/// Finds the samples of a file.
fn find(path: &Path, shard: usize) -> Result<Vec<TarFound>> {
    let mut file = File::open(path).map_err(fail(path))?;
    let len = file.metadata().map_err(fail(path))?.len();
    check_end(&file, len).map_err(fail(path))?;
    file.seek(SeekFrom::Start(0)).map_err(fail(path))?;
    let mut archive = Archive::new(BufReader::with_capacity(BLOCK, file));
    let mut found: Vec<TarFound> = Vec::new();
    for entry in archive.entries_with_seek().map_err(fail(path))? {
        let mut entry = entry.map_err(fail(path))?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if entry.header().entry_type().is_gnu_sparse() || is_pax_sparse(&mut entry).map_err(fail(path))? {
            return Err(fail(path)(format!(
                "member {name} is sparse, which is not read: write the file without --sparse"
            )));
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let (start, size) = (entry.raw_file_position(), entry.size());
        if start.checked_add(size).is_none_or(|end| end > len) {
            return Err(fail(path)(format!(
                "member {name} of {size} bytes goes beyond the end: it is cut off"
            )));
        }
        let Some((key, extension)) = split(&name) else { continue };
        let member = Member { extension: extension.to_lowercase(), start, len: size };
        match found.last_mut().filter(|last| last.key == key) {
            None => found.push(TarFound { shard, key: key.into(), members: vec![member] }),
            Some(last) if last.members.iter().any(|other| other.extension == member.extension) => {
                return Err(fail(path)(format!("member {name} is there twice in a row")));
            }
            Some(last) => last.members.push(member),
        }
        let sample: u64 = found.last().map_or(0, |last| last.members.iter().map(|member| member.len).sum());
        if sample > MAX_SAMPLE {
            return Err(fail(path)(format!("sample {key} has more than {MAX_SAMPLE} bytes")));
        }
    }
    Ok(found)
}

/// Whether a member has records of GNU tar's sparse files in its PAX header (`tar --sparse
/// --format=pax`).
///
/// Other programs see such a member as a regular file. Its content starts with a map of the holes
/// in version 1.0, and lacks the holes in all versions.
fn is_pax_sparse<R: Read>(entry: &mut Entry<'_, R>) -> io::Result<bool> {
    let Some(records) = entry.pax_extensions()? else { return Ok(false) };
    for record in records {
        if record?.key_bytes().starts_with(b"GNU.sparse.") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Checks the zero blocks that end a tar file. Without this check, a file truncated between two
/// members would look complete.
fn check_end(file: &File, len: u64) -> Result<(), String> {
    let mut last = [1; BLOCK];
    if let Some(start) = len.checked_sub(BLOCK as u64) {
        file.read_exact_at(&mut last, start).map_err(|error| error.to_string())?;
    }
    if last == [0; BLOCK] {
        return Ok(());
    }
    Err(match last[..] {
        _ if len < BLOCK as u64 => format!("{len} bytes are no tar file"),
        _ => "has no end mark: it is cut off, or compressed".into(),
    })
}

/// Returns the folder and name up to the first dot, and the rest.
fn split(name: &str) -> Option<(&str, &str)> {
    let base = name.rfind('/').map_or(0, |slash| slash + 1);
    let dot = base + name[base..].find('.')?;
    let meta = name[base..].starts_with("__") && name.ends_with("__");
    (dot > base && !meta).then(|| (&name[..dot], &name[dot + 1..]))
}

impl TarSample {
    /// Returns the content of a member.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such member, with a list of the members.
    pub fn bytes(&self, extension: &str) -> Result<&[u8]> {
        self.members.get(extension).map(Vec::as_slice).ok_or_else(|| {
            let there: Vec<_> = self.members.keys().map(String::as_str).collect();
            Error::Usage(format!("sample {} has no `{extension}`; there are {}", self.key, there.join(", ")))
        })
    }

    /// Returns the content of a member that is UTF-8.
    ///
    /// # Errors
    /// The errors of [`TarSample::bytes`], or invalid UTF-8.
    pub fn text(&self, extension: &str) -> Result<&str> {
        std::str::from_utf8(self.bytes(extension)?)
            .map_err(|error| Error::Usage(format!("sample {}, `{extension}`: {error}", self.key)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ::tar::{Builder, EntryType, Header};

    use super::*;
    use crate::data::Pass;

    fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        for (name, content) in members {
            let mut header = Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            if name.ends_with('/') {
                header.set_entry_type(EntryType::Directory);
            }
            tar.append_data(&mut header, name, *content).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn samples(bytes: &[u8]) -> Result<Vec<TarSample>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.tar");
        fs::write(&path, bytes).unwrap();
        let shards = TarShards::open([&path]).unwrap().counted()?;
        let found: Result<Vec<_>> = shards.open(0)?.collect();
        let loaded: Result<Vec<_>> =
            found?.into_iter().map(|found| shards.load(found, &mut Pass::new(0, 0).rng(0))).collect();
        let loaded = loaded?;
        assert_eq!(shards.samples(), Some(loaded.len() as u64));
        Ok(loaded)
    }

    #[test]
    fn members_of_one_name_are_a_sample() {
        let long = format!("{}/0002.txt", "folder".repeat(40));
        let samples = samples(&archive(&[
            ("README", b"none"),
            ("__meta.x__", b"none"),
            ("a/", b""),
            ("a/0001.JPG", b"image"),
            ("a/0001.seg.png", &[7; 1500]),
            ("b/0001.jpg", b"other"),
            (&long, b"text"),
        ]))
        .unwrap();
        let keys: Vec<_> = samples.iter().map(|sample| sample.key.as_str()).collect();
        assert_eq!(keys, ["a/0001", "b/0001", &long[..long.len() - 4]]);
        assert_eq!(samples[0].bytes("jpg").unwrap(), b"image");
        assert_eq!(samples[0].bytes("seg.png").unwrap(), [7; 1500]);
        assert_eq!(samples[2].text("txt").unwrap(), "text");
        let message = samples[1].bytes("txt").unwrap_err().to_string();
        assert_eq!(message, "sample b/0001 has no `txt`; there are jpg");
    }

    #[test]
    fn pax_sparse_member_is_refused_in_all_versions() {
        for records in [
            [("GNU.sparse.major", "1"), ("GNU.sparse.name", "0001.jpg")],
            [("GNU.sparse.size", "1000"), ("GNU.sparse.map", "0,3,900,3")],
            [("mtime", "1.5"), ("GNU.sparse.offset", "0")],
        ] {
            let mut tar = Builder::new(Vec::new());
            tar.append_pax_extensions(records.map(|(key, value)| (key, value.as_bytes()))).unwrap();
            let mut header = Header::new_ustar();
            header.set_size(6);
            tar.append_data(&mut header, "GNUSparseFile.7/0001.jpg", b"abcxyz".as_slice()).unwrap();
            let message = samples(&tar.into_inner().unwrap()).unwrap_err().to_string();
            assert!(message.contains("x.tar") && message.contains("is sparse"), "{message}");
        }
        let mut tar = Builder::new(Vec::new());
        tar.append_pax_extensions([("mtime", b"1.5".as_slice())]).unwrap();
        let mut header = Header::new_ustar();
        header.set_size(6);
        tar.append_data(&mut header, "0001.jpg", b"abcxyz".as_slice()).unwrap();
        assert_eq!(samples(&tar.into_inner().unwrap()).unwrap().len(), 1);
    }

    #[test]
    fn a_file_cut_off_anywhere_is_an_error_that_names_it() {
        let whole = archive(&[("1.a", &[1; 600]), ("1.b", b"b"), ("2.a", &[2; 100])]);
        assert_eq!(samples(&whole).unwrap().len(), 2);
        // The end mark has two blocks, of which one is sufficient.
        for len in 0..whole.len() - 2 * BLOCK {
            let message = samples(&whole[..len]).unwrap_err().to_string();
            assert!(message.contains("x.tar"), "{message}");
        }
    }

    #[test]
    fn damage_is_an_error_or_another_content_and_never_a_panic() {
        let whole = archive(&[("1.a", &[1; 600]), ("1.b", b"b"), ("2.a", &[2; 100])]);
        for at in 0..whole.len() {
            for bit in [0x01, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= bit;
                let _: Result<Vec<TarSample>> = samples(&bytes);
            }
        }
        // A member whose header claims a size larger than the file.
        let mut bytes = archive(&[("1.a", b"x")]);
        let mut header = Header::new_gnu();
        header.set_path("1.a").unwrap();
        header.set_size(u64::MAX / 2);
        header.set_cksum();
        bytes[..BLOCK].copy_from_slice(header.as_bytes());
        let message = samples(&bytes).unwrap_err().to_string();
        assert!(message.contains("x.tar"), "{message}");
        let message = samples(&archive(&[("1.a", b"x"), ("1.A", b"y")])).unwrap_err().to_string();
        assert!(message.contains("twice"), "{message}");
    }
}
