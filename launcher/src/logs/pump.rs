//! Moves what a rank writes from a pipe to a file, to the console, or to both, and remembers the last lines.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{Console, Target};

/// Lines that are remembered.
pub(crate) const TAIL_LINES: usize = 20;
/// Bytes of a line that are remembered.
const TAIL_LINE: usize = 2 << 10;
/// A line without an end is passed on after so long, or when it is this long.
const PARTIAL_AFTER: Duration = Duration::from_millis(50);
const PARTIAL_OVER: usize = 64 << 10;
/// How long the pipe of a rank that ended may be silent: somebody else may hold it open.
const DRAIN: Duration = Duration::from_secs(1);

/// The last lines of a stream.
#[derive(Clone, Default)]
struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn lines(&self) -> Vec<String> {
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

/// A stream on its way. It goes on by itself when this is dropped.
pub(crate) struct Pump {
    task: JoinHandle<()>,
    tail: Tail,
}

/// Where a stream goes.
pub(crate) struct Sink {
    pub(crate) console: Console,
    pub(crate) target: Target,
    /// Put before each line on the console.
    pub(crate) prefix: String,
    /// Gets the bytes as they are.
    pub(crate) file: Option<File>,
}

impl Pump {
    /// Starts to read. `ended` tells of the end of the rank when its sender is dropped.
    pub(crate) fn start(pipe: OwnedFd, sink: Sink, ended: watch::Receiver<()>) -> io::Result<Self> {
        let tail = Tail::default();
        let receiver = Receiver::from_owned_fd(pipe)?;
        let lines = Lines { sink, tail: tail.clone(), pending: Vec::new() };
        Ok(Self { task: tokio::spawn(pump(receiver, lines, ended)), tail })
    }

    /// The last lines of a rank that ended. Waits for what is still in the pipe, but not for a console that nobody reads.
    pub(crate) async fn last_lines(&mut self) -> Vec<String> {
        if !self.task.is_finished() {
            let _ = timeout(DRAIN, &mut self.task).await;
        }
        self.tail.lines()
    }
}

async fn pump(mut pipe: Receiver, mut lines: Lines, mut ended: watch::Receiver<()>) {
    let mut buffer = vec![0; 64 << 10];
    let mut rank_lives = true;
    loop {
        let patience = match (lines.pending.is_empty(), rank_lives) {
            (false, _) => PARTIAL_AFTER,
            (true, false) => DRAIN,
            (true, true) => Duration::MAX,
        };
        tokio::select! {
            biased;
            read = pipe.read(&mut buffer) => match read {
                Ok(0) | Err(_) => break,
                Ok(read) => lines.take(&buffer[..read]).await,
            },
            _ = ended.changed(), if rank_lives => rank_lives = false,
            () = tokio::time::sleep(patience), if patience != Duration::MAX => match lines.pending.is_empty() {
                true => break,
                false => lines.flush_partial().await,
            },
        }
    }
    lines.flush_partial().await;
}

struct Lines {
    sink: Sink,
    tail: Tail,
    pending: Vec<u8>,
}

impl Lines {
    async fn take(&mut self, bytes: &[u8]) {
        if let Some(file) = &mut self.sink.file
            && let Err(error) = file.write_all(bytes)
        {
            tracing::warn!(%error, "a log file cannot be written any more");
            self.sink.file = None;
        }
        self.pending.extend_from_slice(bytes);
        // A carriage return ends a state of a progress bar.
        let Some(end) = self.pending.iter().rposition(|byte| matches!(byte, b'\n' | b'\r')) else {
            if self.pending.len() > PARTIAL_OVER {
                self.flush_partial().await;
            }
            return;
        };
        let rest = self.pending.split_off(end + 1);
        let whole = std::mem::replace(&mut self.pending, rest);
        self.show(&whole).await;
    }

    async fn flush_partial(&mut self) {
        if !self.pending.is_empty() {
            let partial = std::mem::take(&mut self.pending);
            self.show(&partial).await;
        }
    }

    async fn show(&self, bytes: &[u8]) {
        let prefix = self.sink.prefix.as_bytes();
        let mut out = Vec::with_capacity(bytes.len());
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.tail.push(line);
            out.extend_from_slice(prefix);
            out.extend_from_slice(line);
            if !prefix.is_empty() && !line.ends_with(b"\n") {
                out.push(b'\n');
            }
        }
        self.sink.console.pass(self.sink.target, out).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::console::tests::{Seen, noted};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// Feeds a pump these pieces, one after the other, and returns all that reached the console.
    async fn passed_on(prefix: &str, pieces: &[&[u8]]) -> String {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (console, written, seen) = noted();
        let sink = Sink { console, target: Target::Stdout, prefix: prefix.into(), file: None };
        let (_rank, ended) = watch::channel(());
        let _pump = Pump::start(reader, sink, ended).unwrap();
        let mut writer = File::from(writer);
        for piece in pieces {
            writer.write_all(piece).unwrap();
            tokio::task::yield_now().await;
        }
        drop(writer);
        timeout(SOON, written.wait()).await.unwrap();
        text(&seen)
    }

    fn text(seen: &Seen) -> String {
        seen.lock().unwrap().iter().map(|(_, text)| text.as_str()).collect()
    }

    #[tokio::test]
    async fn lines_are_whole_and_carry_the_prefix() {
        assert_eq!(
            passed_on("[a]:", &[b"on", b"e\ntw", b"o\n\nend"]).await,
            "[a]:one\n[a]:two\n[a]:\n[a]:end\n"
        );
        assert_eq!(passed_on("", &[b"on", b"e\ntw", b"o"]).await, "one\ntwo");
        assert_eq!(passed_on("[a]:", &[]).await, "");
    }

    #[tokio::test]
    async fn bytes_reach_the_file_untouched_and_the_last_lines_are_kept() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let file = Some(File::create(&path).unwrap());
        let (console, _written, _seen) = noted();
        let sink = Sink { console, target: Target::Stderr, prefix: "[0]:".into(), file };
        let (_rank, ended) = watch::channel(());
        let mut pump = Pump::start(reader, sink, ended).unwrap();
        let mut text: Vec<u8> = (0..50).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        text.extend(b"\xff\x00 no end");
        let mut writer = File::from(writer);
        writer.write_all(&text).unwrap();
        drop(writer);
        let lines = pump.last_lines().await;
        assert_eq!(std::fs::read(&path).unwrap(), text);
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines[0], "line 31");
        assert!(lines[19].ends_with("no end"));
    }

    #[tokio::test]
    async fn a_pipe_that_somebody_holds_open_is_not_read_for_ever() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (console, written, seen) = noted();
        let sink = Sink { console, target: Target::Stderr, prefix: String::new(), file: None };
        let (rank, ended) = watch::channel(());
        let _pump = Pump::start(reader, sink, ended).unwrap();
        let mut holder = File::from(writer);
        holder.write_all(b"last words").unwrap();
        drop(rank);
        timeout(SOON, written.wait()).await.unwrap();
        assert_eq!(text(&seen), "last words");
    }
}
