//! Moves the output of a rank from a pipe to files and to the console, and remembers the last
//! lines.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use memchr::memrchr;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::console::Shown;
use super::tail::Tail;
use super::{Console, Files, LogFile, Target};

/// Time or length after which a line without an end is passed on.
const PARTIAL_AFTER: Duration = Duration::from_millis(50);
const PARTIAL_OVER: usize = 64 << 10;
/// Time that the pipe of a rank that has ended may be silent before it counts as empty: another
/// process may hold the pipe open.
const DRAIN: Duration = Duration::from_secs(1);

/// A task that reads a rank's stream. The task continues when this handle is dropped.
pub(crate) struct Pump {
    task: JoinHandle<()>,
    tail: Tail,
}

/// Destinations of a stream.
pub(crate) struct Sink {
    pub(crate) console: Console,
    /// Output of the agent that the stream goes to.
    pub(crate) target: Option<Target>,
    /// Prefix of each line on the console.
    pub(crate) prefix: String,
    /// File for the unchanged bytes.
    pub(crate) file: Option<LogFile>,
    /// File for the lines that contain one of the texts, with the prefix.
    pub(crate) filtered: Option<Filtered>,
    pub(crate) files: Files,
}

/// Destination of filtered lines.
pub(crate) struct Filtered {
    pub(crate) texts: Vec<String>,
    /// Prefix without colours.
    pub(crate) prefix: String,
    pub(crate) file: LogFile,
}

/// Returns a pipe for a stream of a rank: the end that a [`Pump`] reads, and the end for the rank.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}

impl Pump {
    /// Starts to read. The rank has ended when the sender of `ended` is dropped.
    pub(crate) fn start(pipe: OwnedFd, sink: Sink, ended: watch::Receiver<()>) -> io::Result<Self> {
        let tail = Tail::default();
        let receiver = Receiver::from_owned_fd(pipe)?;
        let lines = Lines::new(sink, tail.clone());
        Ok(Self { task: tokio::spawn(pump(receiver, lines, ended)), tail })
    }

    /// Returns the last lines of a rank that has ended, at most `count`. Waits up to [`DRAIN`] for
    /// bytes that are still in the pipe, but no longer, since the console may not be read.
    pub(crate) async fn last_lines(&mut self, count: usize) -> Vec<String> {
        if !self.task.is_finished() {
            let _ = timeout(DRAIN, &mut self.task).await;
        }
        self.tail.lines(count)
    }
}

async fn pump(mut pipe: Receiver, mut lines: Lines, mut ended: watch::Receiver<()>) {
    let mut buffer = vec![0; 64 << 10];
    let mut rank_lives = true;
    loop {
        let patience = match (lines.has_partial(), rank_lives) {
            (true, _) => PARTIAL_AFTER,
            (false, false) => DRAIN,
            (false, true) => Duration::MAX,
        };
        tokio::select! {
            biased;
            read = pipe.read(&mut buffer) => match read {
                Ok(0) | Err(_) => break,
                Ok(read) => lines.take(&buffer[..read]).await,
            },
            _ = ended.changed(), if rank_lives => rank_lives = false,
            () = tokio::time::sleep(patience), if patience != Duration::MAX => match lines.has_partial() {
                true => lines.flush_partial().await,
                false => break,
            },
        }
    }
    lines.finish().await;
}

struct Lines {
    shown: Option<Shown>,
    file: Option<LogFile>,
    filtered: Option<Filtered>,
    files: Files,
    tail: Tail,
    /// Bytes that wait for the end of their line, or for its next refresh.
    pending: Vec<u8>,
    /// The line that is not complete yet, for the filter.
    unfiltered: Vec<u8>,
}

impl Lines {
    fn new(sink: Sink, tail: Tail) -> Self {
        let Sink { console, target, prefix, file, filtered, files } = sink;
        let shown = target.map(|target| console.show(target, prefix));
        Self { shown, file, filtered, files, tail, pending: Vec::new(), unfiltered: Vec::new() }
    }

    async fn take(&mut self, bytes: &[u8]) {
        if let Some(file) = &self.file {
            self.files.pass(file, bytes.to_vec()).await;
        }
        self.pending.extend_from_slice(bytes);
        let lines = memrchr(b'\n', &self.pending).map_or(0, |end| end + 1);
        // A carriage return completes a refresh of the line, but belongs to the next refresh.
        let refresh = memrchr(b'\r', &self.pending[lines..]).map(|at| lines + at);
        let is_raw = self.shown.as_ref().is_none_or(Shown::is_raw);
        let end = match refresh {
            Some(at) if is_raw => at + 1,
            Some(at) => at,
            None => lines,
        };
        if end > 0 {
            let rest = self.pending.split_off(end);
            let whole = std::mem::replace(&mut self.pending, rest);
            self.show(whole).await;
        } else if self.pending.len() > PARTIAL_OVER {
            self.flush_partial().await;
        }
    }

    /// Whether there is text to pass on although its line may continue.
    fn has_partial(&self) -> bool {
        self.pending.iter().any(|byte| *byte != b'\r')
    }

    async fn flush_partial(&mut self) {
        if !self.pending.is_empty() {
            let partial = std::mem::take(&mut self.pending);
            self.show(partial).await;
        }
    }

    /// Passes on the rest and ends the stream.
    async fn finish(&mut self) {
        self.flush_partial().await;
        if !self.unfiltered.is_empty() {
            self.filter(b"\n").await;
        }
        if let Some(shown) = &self.shown {
            shown.end();
        }
    }

    async fn show(&mut self, bytes: Vec<u8>) {
        self.tail.push(&bytes);
        if self.filtered.is_some() {
            self.filter(&bytes).await;
        }
        if let Some(shown) = &self.shown {
            shown.pass(bytes).await;
        }
    }

    /// Writes lines that contain one of the texts to the filter's file. Each refresh of a line
    /// counts as a line.
    async fn filter(&mut self, bytes: &[u8]) {
        let Some(filtered) = &self.filtered else { return };
        self.unfiltered.extend_from_slice(bytes);
        let is_long = self.unfiltered.len() > PARTIAL_OVER;
        let end = match memrchr(b'\n', &self.unfiltered) {
            Some(end) => end + 1,
            None if is_long => self.unfiltered.len(),
            None => return,
        };
        let mut selected = Vec::new();
        for line in self.unfiltered[..end].split(|byte| matches!(byte, b'\n' | b'\r')) {
            if filtered.texts.iter().any(|text| contains(line, text.as_bytes())) {
                selected.extend_from_slice(filtered.prefix.as_bytes());
                selected.extend_from_slice(line);
                selected.push(b'\n');
            }
        }
        self.unfiltered.drain(..end);
        if !selected.is_empty() {
            self.files.pass(&filtered.file, selected).await;
        }
    }
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    line.windows(text.len()).any(|part| part == text)
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

    /// Feeds these pieces to a pump, one after the other, and returns the output that reached the
    /// console.
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
    async fn a_line_that_is_passed_on_in_two_halves_has_one_prefix() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let (console, written, seen) = noted();
        let sink = sink(console, "[a]:", None);
        let (_rank, ended) = watch::channel(());
        let _pump = Pump::start(reader, sink, ended).unwrap();
        let mut writer = File::from(writer);
        let shows = async |wanted: &str| {
            while text(&seen) != wanted {
                tokio::task::yield_now().await;
            }
        };
        for (piece, wanted) in [
            ("loading", "[a]:loading"),
            (" done\n", "[a]:loading done\n"),
            ("\r 10%", "[a]:loading done\n[a]: 10%"),
            ("\r 20%", "[a]:loading done\n[a]: 10%\r[a]: 20%"),
        ] {
            writer.write_all(piece.as_bytes()).unwrap();
            timeout(SOON, shows(wanted)).await.unwrap_or_else(|_| panic!("{piece:?}: {:?}", text(&seen)));
        }
        drop(writer);
        timeout(SOON, written.wait()).await.unwrap();
        assert_eq!(text(&seen), "[a]:loading done\n[a]: 10%\r[a]: 20%\n");
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
        let lines = pump.last_lines(20).await;
        timeout(SOON, written.wait()).await.unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), text);
        assert_eq!(lines.len(), 20);
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
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("filtered_stdout.log");
        let (console, _, seen) = noted();
        let (files, written) = Files::open(&console).unwrap();
        let file = files.append_to(&path, None).unwrap();
        let texts = vec!["apple".into(), "orange".into()];
        let filtered = Some(Filtered { texts, prefix: "[a0]:".into(), file });
        let sink = Sink { console, target: None, prefix: "coloured".into(), file: None, filtered, files };
        let mut lines = Lines::new(sink, Tail::default());
        lines.take(b"an apple\npear\n2 ora").await;
        lines.flush_partial().await;
        lines.take(b"nges\n\rapple 1%\rpear\rapple 2%").await;
        lines.finish().await;
        drop(lines);
        timeout(SOON, written.wait()).await.unwrap();
        let lines = ["[a0]:an apple", "[a0]:2 oranges", "[a0]:apple 1%", "[a0]:apple 2%", ""];
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines.join("\n"));
        assert_eq!(text(&seen), "");
    }
}
