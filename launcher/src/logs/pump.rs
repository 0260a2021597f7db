//! Moves what a rank writes from a pipe to files and to the console, and remembers the last lines.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{Console, Files, LogFile, Target};

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

    fn push_all(&self, bytes: &[u8]) {
        let is_end = |byte: &u8| *byte == b'\n';
        let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        // Only the last ones of many lines are looked at.
        let last: Vec<&[u8]> = body.rsplitn(TAIL_LINES + 1, is_end).take(TAIL_LINES).collect();
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for line in last.into_iter().rev() {
            if lines.len() == TAIL_LINES {
                lines.pop_front();
            }
            let line = &line[..line.len().min(TAIL_LINE)];
            lines.push_back(String::from_utf8_lossy(line).trim_end().to_owned());
        }
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
    /// The console's stream that it goes to.
    pub(crate) target: Option<Target>,
    /// Put before each line on the console.
    pub(crate) prefix: String,
    /// Gets the bytes as they are.
    pub(crate) file: Option<LogFile>,
    /// Gets the lines that contain one of the texts, with the prefix.
    pub(crate) filtered: Option<Filtered>,
    pub(crate) files: Files,
}

/// Lines that are written once more.
pub(crate) struct Filtered {
    pub(crate) texts: Vec<String>,
    /// Without colours.
    pub(crate) prefix: String,
    pub(crate) file: LogFile,
}

/// A pipe for a stream of a rank: the end that a [`Pump`] reads, and the end that the rank gets.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
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
        if let Some(file) = &self.sink.file {
            self.sink.files.pass(file, bytes.to_vec()).await;
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
        let mut out = Vec::with_capacity(bytes.len());
        let mut selected = Vec::new();
        self.tail.push_all(bytes);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            if let Some(filtered) = &self.sink.filtered
                && filtered.texts.iter().any(|text| contains(line, text.as_bytes()))
            {
                with_prefix(&filtered.prefix, line, &mut selected);
            }
            if self.sink.target.is_some() {
                with_prefix(&self.sink.prefix, line, &mut out);
            }
        }
        if let Some(target) = self.sink.target {
            self.sink.console.pass(target, out).await;
        }
        if let Some(filtered) = self.sink.filtered.as_ref().filter(|_| !selected.is_empty()) {
            self.sink.files.pass(&filtered.file, selected).await;
        }
    }
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    line.windows(text.len()).any(|part| part == text)
}

/// A line with a prefix is ended, so that no two share one.
fn with_prefix(prefix: &str, line: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(prefix.as_bytes());
    out.extend_from_slice(line);
    if !prefix.is_empty() && !line.ends_with(b"\n") {
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::super::console::tests::{Seen, noted};
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn sink(console: Console, prefix: &str, file: Option<&std::path::Path>) -> Sink {
        let (files, _) = Files::open(&console).unwrap();
        let file = file.map(|path| files.append_to(path, None).unwrap());
        Sink { console, target: Some(Target::Stdout), prefix: prefix.into(), file, filtered: None, files }
    }

    /// Feeds a pump these pieces, one after the other, and returns all that reached the console.
    async fn passed_on(prefix: &str, pieces: &[&[u8]]) -> String {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (console, written, seen) = noted();
        let sink = sink(console, prefix, None);
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
        let (console, written, _seen) = noted();
        let sink = sink(console, "[0]:", Some(&path));
        let (_rank, ended) = watch::channel(());
        let mut pump = Pump::start(reader, sink, ended).unwrap();
        let mut text: Vec<u8> = (0..50).flat_map(|i| format!("line {i}\n").into_bytes()).collect();
        text.extend(b"\xff\x00 no end");
        let mut writer = File::from(writer);
        writer.write_all(&text).unwrap();
        drop(writer);
        let lines = pump.last_lines().await;
        timeout(SOON, written.wait()).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), text);
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!(lines[0], "line 31");
        assert!(lines[19].ends_with("no end"));
    }

    #[tokio::test]
    async fn a_pipe_that_somebody_holds_open_is_not_read_for_ever() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (console, written, seen) = noted();
        let sink = sink(console, "", None);
        let (rank, ended) = watch::channel(());
        let _pump = Pump::start(reader, sink, ended).unwrap();
        let mut holder = File::from(writer);
        holder.write_all(b"last words").unwrap();
        drop(rank);
        timeout(SOON, written.wait()).await.unwrap();
        assert_eq!(text(&seen), "last words");
    }

    #[tokio::test]
    async fn lines_with_a_text_are_written_once_more() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("filtered_stdout.log");
        let (console, written, seen) = noted();
        let mut sink = Sink { target: None, ..sink(console, "coloured", None) };
        let file = sink.files.append_to(&path, None).unwrap();
        let texts = vec!["apple".into(), "orange".into()];
        sink.filtered = Some(Filtered { texts, prefix: "[a0]:".into(), file });
        let (_rank, ended) = watch::channel(());
        let _pump = Pump::start(reader, sink, ended).unwrap();
        File::from(writer).write_all(b"an apple\npear\n2 oranges\n").unwrap();
        timeout(SOON, written.wait()).await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "[a0]:an apple\n[a0]:2 oranges\n");
        assert_eq!(text(&seen), "");
    }
}
