//! Files in chunks: each chunk is written and checksummed in one pass, so that no whole file is
//! copied in memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use crate::manifest::FileInfo;
use crate::{Error, Result};

/// Number of bytes written or read at a time: small enough that the checksum finds them in the
/// cache.
pub const CHUNK: usize = 1 << 20;

/// Number of written bytes after which a sync is requested.
const SYNC_EVERY: usize = 32 << 20;
/// Smallest size of a file, in bytes, for which a second thread pays off.
const WORTH_A_THREAD: u64 = 32 << 20;
const MAX_THREADS: u64 = 8;

/// Writes the parts one after the other, and returns once they are on disk. While this thread
/// copies memory to the kernel, a second thread already waits for the disk.
///
/// # Errors
/// [`Error::Io`] with the path of the file.
pub fn write_file(path: &Path, parts: &[&[u8]]) -> Result<FileInfo> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    let written = if parts.iter().map(|part| part.len()).sum::<usize>() > SYNC_EVERY {
        write_and_sync(&mut file, parts)
    } else {
        write_parts(&mut file, parts, || {})
    };
    written.and_then(|info| file.sync_all().map(|()| info)).map_err(Error::io(path))
}

fn write_and_sync(file: &mut File, parts: &[&[u8]]) -> std::io::Result<FileInfo> {
    let (due, dues) = mpsc::sync_channel(1);
    let syncing = file.try_clone()?;
    thread::scope(|scope| {
        // The kernel reports a failed write only once, so an error that this thread receives must
        // be returned.
        let synced = scope.spawn(move || dues.iter().try_for_each(|()| syncing.sync_data()));
        // Dropping the closure drops the sender, which ends the thread. If the channel is full, a
        // sync is already due.
        let info = write_parts(file, parts, move || {
            let _ = due.try_send(());
        });
        synced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        info
    })
}

fn write_parts(file: &mut File, parts: &[&[u8]], mut sync: impl FnMut()) -> std::io::Result<FileInfo> {
    let (mut bytes, mut crc) = (0, 0);
    let mut unsynced = 0;
    for chunk in parts.iter().flat_map(|part| part.chunks(CHUNK)) {
        crc = crc32c::crc32c_append(crc, chunk);
        bytes += chunk.len() as u64;
        file.write_all(chunk)?;
        unsynced += chunk.len();
        if unsynced >= SYNC_EVERY {
            unsynced = 0;
            sync();
        }
    }
    Ok(FileInfo { bytes, crc32c: crc })
}

/// Drops the file's contents from the page cache, so that the system can reuse the memory. The
/// contents stay on disk.
pub fn forget_contents(path: &Path) {
    let advice = rustix::fs::Advice::DontNeed;
    let advised = File::open(path).and_then(|file| Ok(rustix::fs::fadvise(&file, 0, None, advice)?));
    if let Err(error) = advised {
        tracing::debug!("{}: stays in memory: {error}", path.display());
    }
}

/// Reads the whole file, and returns its length and checksum.
pub(crate) fn file_info(file: &File) -> std::io::Result<FileInfo> {
    let bytes = file.metadata()?.len();
    Ok(FileInfo { bytes, crc32c: checksum(file, bytes)? })
}

/// Opens a regular file for reading. Any other kind is an error: opening a FIFO would wait forever
/// for a writer.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("is not a regular file")),
    }
}

/// Reads a regular file of this kind, with at most `most` bytes.
pub(crate) fn read_bounded(path: &Path, kind: &str, most: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    check_size(file.metadata()?.len(), kind, most).map_err(io::Error::other)?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Fails if a file of this kind is larger than allowed.
pub(crate) fn check_size(bytes: u64, kind: &str, most: u64) -> Result<(), String> {
    match bytes <= most {
        true => Ok(()),
        false => Err(format!("has {bytes} bytes, and {kind} may have {most}")),
    }
}

/// Reads the whole file and compares it with what was written.
///
/// # Errors
/// [`Error::Checkpoint`] with the difference.
pub fn verify_file(path: &Path, written: &FileInfo) -> Result<()> {
    let fail = |error: std::io::Error| Error::checkpoint(path, error);
    let file = open_regular(path).map_err(fail)?;
    let bytes = file.metadata().map_err(fail)?.len();
    if bytes != written.bytes {
        return Err(Error::checkpoint(
            path,
            format!("is damaged: it has {bytes} bytes and {} were written", written.bytes),
        ));
    }
    let crc = checksum(&file, bytes).map_err(fail)?;
    if crc != written.crc32c {
        return Err(Error::checkpoint(
            path,
            format!("is damaged: its crc32c is {crc:08x} and {:08x} was written", written.crc32c),
        ));
    }
    Ok(())
}

/// Computes the checksum of a file, with several threads if it is large.
fn checksum(file: &File, bytes: u64) -> std::io::Result<u32> {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let threads = (bytes / WORTH_A_THREAD).clamp(1, cores.min(MAX_THREADS));
    let share = bytes.div_ceil(threads).max(1);
    let of = |thread: u64| {
        let (mut at, end) = ((thread * share).min(bytes), ((thread + 1) * share).min(bytes));
        let (mut crc, len) = (0, end - at);
        let mut buffer = vec![0; CHUNK];
        while at < end {
            let chunk = &mut buffer[..(end - at).min(CHUNK as u64) as usize];
            file.read_exact_at(chunk, at)?;
            crc = crc32c::crc32c_append(crc, chunk);
            at += chunk.len() as u64;
        }
        Ok((crc, len))
    };
    let others = |scope: &mut Vec<std::io::Result<(u32, u64)>>| {
        thread::scope(|s| {
            let running: Vec<_> = (1..threads).map(|thread| s.spawn(move || of(thread))).collect();
            scope.push(of(0));
            for thread in running {
                scope.push(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
        });
    };
    let mut sums = Vec::new();
    others(&mut sums);
    let mut whole = 0;
    for sum in sums {
        let (crc, len) = sum?;
        whole = crc32c::crc32c_combine(whole, crc, len as usize);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_in_parts_is_checked_as_a_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let data: Vec<u8> = (0..(WORTH_A_THREAD * 2 + 12345)).map(|i| (i * 7 + (i >> 11)) as u8).collect();
        for data in [&data[..], &data[..10], &data[..0]] {
            let (first, second) = data.split_at(data.len() / 3);
            let info = write_file(&path, &[first, second]).unwrap();
            assert_eq!(info, FileInfo { bytes: data.len() as u64, crc32c: crc32c::crc32c(data) });
            verify_file(&path, &info).unwrap();
            let wrong = FileInfo { crc32c: info.crc32c ^ 1, ..info };
            assert!(verify_file(&path, &wrong).unwrap_err().to_string().contains("crc32c"));
            let longer = FileInfo { bytes: info.bytes + 1, ..info };
            assert!(verify_file(&path, &longer).unwrap_err().to_string().contains("bytes"));
        }
    }
}
