//! Files that the agent writes itself: by a thread, since a disk may be slow, full or far away.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::Console;
use super::writer::{Writer, Written};
use crate::cli::Rotation;

/// A handle of the thread that writes files.
#[derive(Clone)]
pub(crate) struct Files {
    writer: Writer<LogFile>,
    console: Console,
}

/// A file that is written through [`Files`].
#[derive(Clone)]
pub(crate) struct LogFile(Arc<Mutex<Open>>);

struct Open {
    path: PathBuf,
    /// `None` once it cannot be written any more.
    file: Option<File>,
    size: u64,
    rotation: Option<Rotation>,
    console: Console,
}

impl Files {
    pub(crate) fn open(console: &Console) -> io::Result<(Self, Written)> {
        let (writer, written) = Writer::start("files", |file: LogFile, bytes: &[u8]| {
            file.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes);
        })?;
        Ok((Self { writer, console: console.clone() }, written))
    }

    /// Begins a file, or goes on with one.
    pub(crate) fn append_to(&self, path: &Path, rotation: Option<Rotation>) -> io::Result<LogFile> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let size = file.metadata()?.len();
        let open =
            Open { path: path.to_owned(), file: Some(file), size, rotation, console: self.console.clone() };
        Ok(LogFile(Arc::new(Mutex::new(open))))
    }

    /// Writes what came from a rank, once there is room.
    pub(crate) async fn pass(&self, file: &LogFile, bytes: Vec<u8>) {
        self.writer.pass(file.clone(), bytes).await;
    }

    /// Writes something of the agent's own.
    pub(crate) fn add(&self, file: &LogFile, bytes: Vec<u8>) {
        self.writer.add(file.clone(), bytes);
    }
}

impl Open {
    fn write(&mut self, bytes: &[u8]) {
        if let Err(error) = self.try_write(bytes) {
            // The job goes on without it.
            self.file = None;
            let path = self.path.display();
            self.console.note(&format!("{path} cannot be written any more: {error}"));
        }
    }

    fn try_write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let Some(file) = &mut self.file else { return Ok(()) };
            let room = self.rotation.map_or(u64::MAX, |rotation| rotation.size.saturating_sub(self.size));
            let part = part_that_fits(bytes, room, self.size == 0);
            file.write_all(&bytes[..part])?;
            self.size += part as u64;
            bytes = &bytes[part..];
            if !bytes.is_empty() {
                self.rotate()?;
            }
        }
        Ok(())
    }

    /// `stdout.log` becomes `stdout.log.1`, and so on up to the number of files that are kept.
    fn rotate(&mut self) -> io::Result<()> {
        let keep = self.rotation.map_or(0, |rotation| rotation.keep);
        let numbered = |number: u32| match number {
            0 => self.path.clone(),
            _ => PathBuf::from(format!("{}.{number}", self.path.display())),
        };
        for number in (0..keep).rev() {
            match fs::rename(numbered(number), numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.file = Some(File::create(&self.path)?);
        self.size = 0;
        Ok(())
    }
}

/// How much goes into the file: whole lines, as many as fit. A line that is longer than a whole file is cut.
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

    /// The files that come of these pieces, oldest first.
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
        let file = files.append_to(Path::new("/dev/full"), None).unwrap();
        for _ in 0..3 {
            files.pass(&file, b"lost".to_vec()).await;
        }
        drop((files, file, console));
        written.wait().await;
        said.wait().await;
        let seen = seen.lock().unwrap();
        assert!(
            seen.len() == 1 && seen[0].1.contains("/dev/full cannot be written any more: No space"),
            "{seen:?}"
        );
    }
}
