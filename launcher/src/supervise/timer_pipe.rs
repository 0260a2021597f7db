//! The pipe that PyTorch's `FileTimerClient` writes its requests to. Each request is one line of
//! JSON, in one write, so that the requests of several processes do not mix.
//!
//! Every process that can open the pipe can write anything to it. All input is therefore bounded,
//! and a line that is not a request is dropped.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::{ENXIO, O_NONBLOCK};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Maximum length of a request, PIPE_BUF. The client refuses longer requests.
const LONGEST: usize = 4096;

/// A request of a process.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct TimerRequest {
    pub(crate) pid: u32,
    #[serde(rename = "scope_id")]
    pub(crate) scope: String,
    /// Time of expiration in seconds since 1970. A negative number releases the timer.
    pub(crate) expiration_time: f64,
    /// Number of the signal. Zero or less for no signal.
    #[serde(default)]
    pub(crate) signal: i32,
}

/// A named pipe and its reading end. The pipe is removed when this is dropped.
pub(crate) struct TimerPipe {
    path: PathBuf,
    receiver: pipe::Receiver,
    lines: Lines,
}

impl Drop for TimerPipe {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

impl TimerPipe {
    /// Makes the pipe. An existing pipe without a reader was left behind by another job, and is
    /// replaced.
    ///
    /// # Errors
    /// `AddrInUse` if a process reads the existing pipe, `AlreadyExists` if the path is not a pipe.
    pub(crate) fn make(path: &Path) -> io::Result<Self> {
        if let Ok(there) = fs::symlink_metadata(path) {
            if !there.file_type().is_fifo() {
                return Err(io::Error::new(ErrorKind::AlreadyExists, "there is something else than a pipe"));
            }
            match OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(path) {
                Err(error) if error.raw_os_error() == Some(ENXIO) => fs::remove_file(path)?,
                Err(error) => return Err(error),
                Ok(_) => {
                    return Err(io::Error::new(ErrorKind::AddrInUse, "another launcher reads this pipe"));
                }
            }
        }
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        // The end for writing keeps the pipe open while no client has it open; otherwise reads
        // would return the end of the file.
        let receiver = pipe::OpenOptions::new().read_write(true).open_receiver(path)?;
        Ok(Self { path: path.to_owned(), receiver, lines: Lines::default() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the next request. Cancel-safe.
    pub(crate) async fn next(&mut self) -> io::Result<TimerRequest> {
        loop {
            if let Some(request) = self.lines.next() {
                return Ok(request);
            }
            let mut buffer = [0; LONGEST];
            let read = self.receiver.read(&mut buffer).await?;
            self.lines.feed(&buffer[..read]);
        }
    }

    /// Returns the next request if one has arrived.
    pub(crate) fn try_next(&mut self) -> Option<TimerRequest> {
        loop {
            if let Some(request) = self.lines.next() {
                return Some(request);
            }
            let mut buffer = [0; LONGEST];
            let read = self.receiver.try_read(&mut buffer).ok().filter(|read| *read > 0)?;
            self.lines.feed(&buffer[..read]);
        }
    }
}

/// Splits input into lines of bounded length. All lines have to be taken before more input is fed.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    /// Whether the current line is too long, and its rest is dropped.
    skips: bool,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns the next line that is a request.
    fn next(&mut self) -> Option<TimerRequest> {
        while let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.bytes.drain(..=end).collect();
            if std::mem::take(&mut self.skips) || end > LONGEST {
                continue;
            }
            match serde_json::from_slice::<TimerRequest>(&line) {
                Ok(request) => return Some(request),
                Err(error) => tracing::warn!(%error, "a line that is no request for a timer was dropped"),
            }
        }
        if self.bytes.len() > LONGEST {
            self.bytes.clear();
            self.skips = true;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn request(pid: u32, scope: &str, expiration_time: f64, signal: i32) -> TimerRequest {
        TimerRequest { pid, scope: scope.into(), expiration_time, signal }
    }

    #[tokio::test]
    async fn requests_come_through_the_pipe() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("timer");
        let mut pipe = TimerPipe::make(&path).unwrap();
        assert_eq!(pipe.try_next(), None);
        // A client opens the pipe for each request.
        for line in [
            r#"{"version": 1, "pid": 7, "scope_id": "a.py#3", "expiration_time": 1796000000.25, "signal": 9}"#,
            "nonsense",
            r#"{"pid": -1, "scope_id": "", "expiration_time": 1, "signal": 9}"#,
            r#"{"version": 1, "pid": 7, "scope_id": "a.py#3", "expiration_time": -1, "signal": 0}"#,
        ] {
            let mut client = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(&path).unwrap();
            writeln!(client, "{line}").unwrap();
        }
        assert_eq!(pipe.next().await.unwrap(), request(7, "a.py#3", 1_796_000_000.25, 9));
        assert_eq!(pipe.next().await.unwrap(), request(7, "a.py#3", -1.0, 0));
        assert_eq!(pipe.try_next(), None);
        drop(pipe);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_pipe_that_is_left_is_replaced_and_nothing_else_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("timer");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let kind = |made: io::Result<TimerPipe>| made.err().map(|error| error.kind());
        let pipe = TimerPipe::make(&path).unwrap();
        assert_eq!(kind(TimerPipe::make(&path)), Some(ErrorKind::AddrInUse));
        drop(pipe);
        fs::write(&path, "precious").unwrap();
        assert_eq!(kind(TimerPipe::make(&path)), Some(ErrorKind::AlreadyExists));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_line_without_end_takes_no_memory_and_the_next_one_counts() {
        let mut lines = Lines::default();
        for _ in 0..1000 {
            lines.feed(&[b'x'; LONGEST]);
            assert_eq!(lines.next(), None);
            assert!(lines.bytes.len() <= LONGEST);
        }
        lines.feed(b"\n{\"pid\":1,\"scope_id\":\"s\",\"expiration_time\":2}\n");
        assert_eq!(lines.next(), Some(request(1, "s", 2.0, 0)));
    }

    proptest! {
        #[test]
        fn anything_may_be_written(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..5000), 0..8)) {
            let mut lines = Lines::default();
            for part in parts {
                lines.feed(&part[..part.len().min(LONGEST)]);
                while lines.next().is_some() {}
                prop_assert!(lines.bytes.len() <= LONGEST);
            }
        }
    }
}
