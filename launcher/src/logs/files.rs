//! Files that the agent writes itself. A thread writes them, because a disk may be slow, full or
//! far away.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::writer::{Writer, Written};
use super::{Console, Health};
use crate::cli::Rotation;

/// Pause before another write to a file that could not be written. The pause doubles with each
/// failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// A handle of the thread that writes files.
#[derive(Clone)]
pub(crate) struct Files {
    writer: Writer<To>,
    health: Health,
}

/// Where the thread writes.
enum To {
    /// At the end of a file.
    End(LogFile),
    /// A whole file, which replaces the last one of its name.
    Whole(PathBuf, Content),
}

/// Makes the bytes of a file when it is written. The argument is the first failure to write a file of
/// the job.
type Content = Box<dyn FnOnce(Option<String>) -> io::Result<Vec<u8>> + Send>;

/// A file that is written through [`Files`].
#[derive(Clone)]
pub(crate) struct LogFile(Arc<Mutex<Open>>);

struct Open {
    path: PathBuf,
    file: File,
    size: u64,
    /// Bytes after the last end of a line.
    half_line: u64,
    rotation: Option<Rotation>,
    health: Health,
    /// State of the failure while the file cannot be written.
    failing: Option<Failing>,
}

/// A file that cannot be written.
struct Failing {
    /// Time of the next attempt to write.
    retry: Instant,
    /// Pause before that attempt.
    pause: Duration,
    /// Number of bytes that were lost.
    missing: u64,
}

impl Files {
    pub(crate) fn open(console: &Console) -> io::Result<(Self, Written)> {
        let health = Health::new(console.clone());
        let known = health.clone();
        let (writer, written) = Writer::start("files", move |to, bytes: &[u8]| match to {
            To::End(file) => {
                file.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes, Instant::now());
            }
            To::Whole(path, content) => {
                match content(health.first_failure()).and_then(|bytes| replace(&path, &bytes)) {
                    Ok(()) => health.works(&path, 0),
                    Err(error) => health.failed(&path, &error),
                }
            }
        })?;
        Ok((Self { writer, health: known }, written))
    }

    /// Returns the health of the files, which knows whether they can be written.
    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Opens a file to append to, and makes the file if necessary.
    pub(crate) fn append_to(&self, path: &Path, rotation: Option<Rotation>) -> io::Result<LogFile> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        let (path, health) = (path.to_owned(), self.health.clone());
        Ok(LogFile(Arc::new(Mutex::new(Open {
            path,
            file,
            size,
            half_line: 0,
            rotation,
            health,
            failing: None,
        }))))
    }

    /// Writes output of a rank, once there is room.
    pub(crate) async fn pass(&self, file: &LogFile, bytes: Vec<u8>) {
        self.writer.pass(To::End(file.clone()), bytes).await;
    }

    /// Writes output of the agent itself, without waiting for room.
    pub(crate) fn add(&self, file: &LogFile, bytes: Vec<u8>) {
        self.writer.add(To::End(file.clone()), bytes);
    }

    /// Replaces a file, after everything that was passed before is written.
    pub(crate) fn replace(
        &self,
        path: PathBuf,
        content: impl FnOnce(Option<String>) -> io::Result<Vec<u8>> + Send + 'static,
    ) {
        self.writer.add(To::Whole(path, Box::new(content)), Vec::new());
    }
}

/// Writes a temporary file and renames it, so that readers never see a part of it.
///
/// The rename may wait for the disk: ext4 allocates the blocks of a file that replaces another one
/// (ext4(5), `auto_da_alloc`).
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    if let Err(error) = fs::write(&partial, bytes) {
        // On a full disk, a part of the file may remain.
        let _ = fs::remove_file(&partial);
        return Err(error);
    }
    fs::rename(&partial, path)
}

impl Drop for Open {
    fn drop(&mut self) {
        self.health.forget(&self.path);
    }
}

impl Open {
    fn write(&mut self, bytes: &[u8], now: Instant) {
        if let Some(failing) = &mut self.failing
            && now < failing.retry
        {
            failing.missing += bytes.len() as u64;
            return;
        }
        match self.try_write(bytes) {
            Ok(()) => {
                if let Some(failing) = self.failing.take() {
                    self.health.works(&self.path, failing.missing);
                }
            }
            Err((left, error)) => {
                let (pause, missing) = match &self.failing {
                    Some(failing) => ((failing.pause * 2).min(RETRY_LAST), failing.missing),
                    None => (RETRY_FIRST, 0),
                };
                let missing = missing + left;
                self.failing = Some(Failing { retry: now + pause, pause, missing });
                self.health.failed(&self.path, &error);
            }
        }
    }

    /// Writes bytes, with rotation. Fails with the number of bytes that are missing.
    fn try_write(&mut self, mut bytes: &[u8]) -> Result<(), (u64, io::Error)> {
        while !bytes.is_empty() {
            let room = self.rotation.map_or(u64::MAX, |rotation| rotation.size.saturating_sub(self.size));
            let part = part_that_fits(bytes, room, self.size == 0);
            let (written, outcome) = self.write_part(&bytes[..part]);
            bytes = &bytes[written..];
            if let Err(error) = outcome {
                // The half line is removed, so that later output does not continue it.
                let cut = self.cut_half_line();
                return Err((bytes.len() as u64 + cut, error));
            }
            if !bytes.is_empty() {
                self.rotate().map_err(|error| (bytes.len() as u64, error))?;
            }
        }
        Ok(())
    }

    /// How much was written, and why not all.
    fn write_part(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut done = 0;
        let outcome = loop {
            match self.file.write(&bytes[done..]) {
                Ok(written) if done + written == bytes.len() => {
                    done += written;
                    break Ok(());
                }
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        self.size += done as u64;
        self.half_line = match bytes[..done].iter().rposition(|byte| *byte == b'\n') {
            Some(end) => (done - end - 1) as u64,
            None => self.half_line + done as u64,
        };
        (done, outcome)
    }

    /// Removes a line without an end from the end of the file. Returns the number of bytes removed.
    fn cut_half_line(&mut self) -> u64 {
        let half = std::mem::take(&mut self.half_line);
        let cut = |meta: fs::Metadata| self.file.set_len(meta.len().saturating_sub(half));
        match self.file.metadata().and_then(cut) {
            Ok(()) => {
                self.size = self.size.saturating_sub(half);
                half
            }
            Err(_) => 0,
        }
    }

    /// Renames `stdout.log` to `stdout.log.1`, and so on up to the number of kept files.
    fn rotate(&mut self) -> io::Result<()> {
        let keep = self.rotation.map_or(0, |rotation| rotation.keep);
        let numbered = |number: u32| match number {
            0 => self.path.clone(),
            _ => PathBuf::from(format!("{}.{number}", self.path.display())),
        };
        // If the previous rotation failed after it had renamed the current file, another one must
        // not push out a kept file.
        let kept = if self.path.exists() { keep } else { 0 };
        for number in (0..kept).rev() {
            match fs::rename(numbered(number), numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        // In append mode, because `cut_half_line` moves the end of the file before the position of
        // the last write.
        self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        self.file.set_len(0)?;
        (self.size, self.half_line) = (0, 0);
        Ok(())
    }
}

/// Returns the number of bytes that go into the file: all whole lines that fit. A line that is
/// longer than a whole file is cut.
fn part_that_fits(bytes: &[u8], room: u64, is_empty: bool) -> usize {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    if bytes.len() <= room {
        return bytes.len();
    }
    match bytes[..room].iter().rposition(|byte| *byte == b'\n') {
        Some(end) => end + 1,
        None if is_empty => room.max(1),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logs::console::tests::noted;

    /// Returns the content of the files that result from these pieces, oldest first.
    async fn written(rotation: Rotation, pieces: &[&str]) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stdout.log");
        let (console, _, _) = noted();
        let (files, written) = Files::open(&console).unwrap();
        let file = files.append_to(&path, Some(rotation)).unwrap();
        for piece in pieces {
            files.pass(&file, piece.as_bytes().to_vec()).await;
        }
        drop((files, file));
        written.wait().await;
        let mut found = Vec::new();
        for number in (0..9).rev() {
            let path = if number == 0 {
                path.clone()
            } else {
                PathBuf::from(format!("{}.{number}", path.display()))
            };
            found.extend(fs::read_to_string(path));
        }
        found
    }

    #[tokio::test]
    async fn full_files_are_set_aside_at_the_end_of_a_line() {
        let ten = Rotation { size: 10, keep: 2 };
        assert_eq!(written(ten, &["one\ntwo\n", "three\n", "4\n"]).await, ["one\ntwo\n", "three\n4\n"]);
        assert_eq!(written(ten, &["one\ntwo\nthree\nfour\n"]).await, ["one\ntwo\n", "three\n", "four\n"]);
        let many: Vec<String> = (0..20).map(|number| format!("line {number:02}\n")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(written(ten, &many).await, ["line 17\n", "line 18\n", "line 19\n"]);
        assert_eq!(written(ten, &["a line that is too long"]).await, ["a line tha", "t is too l", "ong"]);
        let one = Rotation { size: 10, keep: 0 };
        assert_eq!(written(one, &["one\ntwo\n", "three\n"]).await, ["three\n"]);
    }

    #[tokio::test]
    async fn a_disk_that_is_full_is_said_once_and_ends_nothing() {
        let (console, said, seen) = noted();
        let (files, written) = Files::open(&console).unwrap();
        let full = files.append_to(Path::new("/dev/full"), None).unwrap();
        for _ in 0..3 {
            files.pass(&full, b"lost".to_vec()).await;
        }
        drop((files, full, console));
        written.wait().await;
        said.wait().await;
        let seen = seen.lock().unwrap();
        assert!(seen.len() == 2 && seen[0].1.contains("/dev/full cannot be written: No space"), "{seen:?}");
    }

    #[tokio::test]
    async fn a_file_that_can_be_written_again_says_what_is_missing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let (console, said, seen) = noted();
        let (files, written) = Files::open(&console).unwrap();
        let file = files.append_to(&path, None).unwrap();
        {
            let mut open = file.0.lock().unwrap();
            let start = Instant::now();
            let works = std::mem::replace(&mut open.file, File::create("/dev/full").unwrap());
            open.write(b"12345", start);
            open.write(b"678", start);
            open.file = works;
            open.write(b"9", start);
            open.write(b"10\n", start + RETRY_FIRST);
            open.write(b"11\n", start + RETRY_FIRST);
        }
        drop((files, file, console));
        written.wait().await;
        said.wait().await;
        assert_eq!(fs::read_to_string(&path).unwrap(), "10\n11\n");
        let seen = seen.lock().unwrap();
        assert!(
            seen.len() == 3 && seen[2].1.ends_with("is written again; 9 bytes are missing\n"),
            "{seen:?}"
        );
    }
}
