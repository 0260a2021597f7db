//! Moves what a rank writes from a pipe to a file, to the console, or to both, and remembers the last lines.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Lines that are remembered.
pub(crate) const TAIL_LINES: usize = 20;
/// Bytes of a line that are remembered.
const TAIL_LINE: usize = 2 << 10;
/// A line without an end is passed on after so long, or when it is this long.
const PARTIAL_AFTER: Duration = Duration::from_millis(50);
const PARTIAL_OVER: usize = 64 << 10;
/// How long the pipe of a rank that ended is read on: somebody else may hold it open.
const DRAIN: Duration = Duration::from_secs(1);

/// The last lines of a stream.
#[derive(Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    fn push(&self, line: &[u8]) {
        let line = &line[..line.len().min(TAIL_LINE)];
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(line).trim_end().to_owned());
    }
}

/// A stream on its way.
pub(crate) struct Pump {
    task: JoinHandle<()>,
    pub(crate) tail: Tail,
}

impl Pump {
    /// Starts to read. `prefix` is put before each line on the console.
    pub(crate) fn start(
        pipe: OwnedFd,
        to_stderr: bool,
        prefix: String,
        file: Option<File>,
    ) -> io::Result<Self> {
        let tail = Tail::default();
        let sink = Sink { to_stderr, prefix, file, tail: tail.clone(), pending: Vec::new() };
        let receiver = Receiver::from_owned_fd(pipe)?;
        Ok(Self { task: tokio::spawn(pump(receiver, sink)), tail })
    }

    /// Reads what is left of a rank that ended.
    pub(crate) async fn finish(&mut self) {
        if timeout(DRAIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

async fn pump(mut pipe: Receiver, mut sink: Sink) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = if sink.pending.is_empty() {
            pipe.read(&mut buffer).await
        } else {
            match timeout(PARTIAL_AFTER, pipe.read(&mut buffer)).await {
                Ok(read) => read,
                Err(_) => {
                    sink.flush_partial();
                    continue;
                }
            }
        };
        match read {
            Ok(0) | Err(_) => break,
            Ok(read) => sink.take(&buffer[..read]),
        }
    }
    sink.flush_partial();
}

struct Sink {
    to_stderr: bool,
    prefix: String,
    file: Option<File>,
    tail: Tail,
    pending: Vec<u8>,
}

impl Sink {
    fn take(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.file
            && let Err(error) = file.write_all(bytes)
        {
            tracing::warn!(%error, "a log file cannot be written any more");
            self.file = None;
        }
        self.pending.extend_from_slice(bytes);
        // A carriage return ends a state of a progress bar.
        let Some(end) = self.pending.iter().rposition(|byte| matches!(byte, b'\n' | b'\r')) else {
            if self.pending.len() > PARTIAL_OVER {
                self.flush_partial();
            }
            return;
        };
        let rest = self.pending.split_off(end + 1);
        let whole = std::mem::replace(&mut self.pending, rest);
        self.show(&whole);
    }

    fn flush_partial(&mut self) {
        if !self.pending.is_empty() {
            let partial = std::mem::take(&mut self.pending);
            self.show(&partial);
        }
    }

    fn show(&self, bytes: &[u8]) {
        let mut out = Vec::with_capacity(bytes.len());
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.tail.push(line);
            out.extend_from_slice(self.prefix.as_bytes());
            out.extend_from_slice(line);
            if !self.prefix.is_empty() && !line.ends_with(b"\n") {
                out.push(b'\n');
            }
        }
        // A console that is closed does not end the job.
        let _ = match self.to_stderr {
            true => io::stderr().lock().write_all(&out),
            false => {
                let mut console = io::stdout().lock();
                console.write_all(&out).and_then(|()| console.flush())
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bytes_reach_the_file_untouched_and_the_last_lines_are_kept() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = File::create(&path).unwrap();
        let mut pump = Pump::start(reader, true, "[0]:".into(), Some(file)).unwrap();
        let mut text: Vec<u8> = (0..50).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        text.extend(b"\xff\x00 no end");
        let mut writer = File::from(writer);
        writer.write_all(&text).unwrap();
        drop(writer);
        pump.finish().await;
        assert_eq!(std::fs::read(&path).unwrap(), text);
        let lines = pump.tail.lines();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines[0], "line 31");
        assert!(lines[19].ends_with("no end"));
    }
}
