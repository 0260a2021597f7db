//! The agent's stdout and stderr. A console that is not read blocks the ranks that write to it, but
//! never the event loop. Errors of a closed console are ignored.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::stat::{FileStat, fstat};
use rustix::termios::tcgetwinsize;

use super::layout::{Layout, Stream};
use super::status::StatusLine;
use super::writer::{Writer, Written};

/// Pause before another write to a console that was set to non-blocking and is full.
const RETRY: Duration = Duration::from_millis(5);

/// An output of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Stdout,
    Stderr,
    /// The line of a terminal that is rewritten in place.
    Status,
}

impl Target {
    /// Whether the stream is a terminal and the user has not disabled colours with `NO_COLOR`.
    pub(crate) fn is_coloured(self) -> bool {
        let is_terminal = match self {
            Self::Stdout => io::stdout().is_terminal(),
            Self::Stderr | Self::Status => io::stderr().is_terminal(),
        };
        is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }
}

/// A handle of the console.
#[derive(Clone)]
pub(crate) struct Console {
    writer: Writer<To>,
    /// Number of ranks' streams that go to the console, from which streams get their numbers.
    streams: Arc<AtomicU64>,
    /// Whether the terminal may have a status line.
    has_status: Arc<AtomicBool>,
}

/// Origin of a piece of output.
enum To {
    Stream(Target, Arc<Stream>),
    /// The end of a stream.
    EndOf(Target, Arc<Stream>),
    Agent,
    Status,
}

/// A handle of a rank's stream that is shown on the console.
#[derive(Clone)]
pub(crate) struct Shown {
    console: Console,
    target: Target,
    stream: Arc<Stream>,
}

impl Shown {
    /// Writes output of the rank, once there is room.
    pub(super) async fn pass(&self, bytes: Vec<u8>) {
        self.console.writer.pass(To::Stream(self.target, Arc::clone(&self.stream)), bytes).await;
    }

    /// Whether the bytes are written unchanged.
    pub(super) fn is_raw(&self) -> bool {
        self.stream.prefix.is_empty()
    }

    /// Ends the stream. No output may follow.
    pub(super) fn end(&self) {
        self.console.writer.add(To::EndOf(self.target, Arc::clone(&self.stream)), Vec::new());
    }
}

impl Console {
    /// Starts the thread that writes to the console.
    pub(crate) fn open() -> io::Result<(Self, Written)> {
        let mut status = StatusLine::new();
        let on_terminal = [io::stdout().is_terminal(), io::stderr().is_terminal()];
        Self::with(is_one_file(), move |target, bytes| {
            // Output that goes to a file or a pipe cannot overwrite the status line.
            match target {
                Target::Status => {
                    let text = String::from_utf8_lossy(bytes).into_owned();
                    write(Target::Stderr, status.set(text, columns()).as_bytes());
                }
                target if on_terminal[usize::from(target == Target::Stderr)] => {
                    write(Target::Stderr, status.hide().as_bytes());
                    write(target, bytes);
                    write(Target::Stderr, status.wrote(bytes, columns()).as_bytes());
                }
                target => write(target, bytes),
            }
        })
    }

    /// Starts the thread with a function that writes. `is_one`: stdout and stderr are the same
    /// terminal, pipe or file.
    fn with(
        is_one: bool,
        mut write: impl FnMut(Target, &[u8]) + Send + 'static,
    ) -> io::Result<(Self, Written)> {
        let mut layouts = [Layout::default(), Layout::default()];
        let of = move |target| usize::from(target == Target::Stderr && !is_one);
        let (writer, written) = Writer::start("console", move |to, bytes: &[u8]| match to {
            To::Stream(target, stream) => write(target, &layouts[of(target)].output(&stream, bytes)),
            To::EndOf(target, stream) => match layouts[of(target)].end(&stream) {
                b"" => {}
                end => write(target, end),
            },
            To::Agent => write(Target::Stderr, &layouts[of(Target::Stderr)].agent(bytes)),
            To::Status => write(Target::Status, bytes),
        })?;
        Ok((Self { writer, streams: Arc::default(), has_status: Arc::default() }, written))
    }

    /// Returns a handle of a rank's stream that goes to the console with a prefix before each line.
    pub(crate) fn show(&self, target: Target, prefix: String) -> Shown {
        let number = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        Shown { console: self.clone(), target, stream: Arc::new(Stream { number, prefix }) }
    }

    /// Writes a text to stderr, after all output that was passed on before.
    pub(crate) fn say(&self, text: &str) {
        self.writer.add(To::Agent, text.into());
    }

    /// Writes a line of the launcher's own.
    pub(crate) fn note(&self, text: &str) {
        self.say(&format!("ice-launch: {text}\n"));
    }

    /// Writes a text that is soon out of date, unless the console is behind.
    pub(crate) fn say_if_idle(&self, text: &str) {
        if self.writer.is_idle() {
            self.say(text);
        }
    }

    /// Rewrites the line at the bottom of the terminal, unless the console is behind.
    pub(crate) fn status_if_idle(&self, text: &str) {
        if self.writer.is_idle() {
            self.has_status.store(true, Ordering::Relaxed);
            self.writer.add(To::Status, text.into());
        }
    }

    /// Removes the line at the bottom of the terminal.
    pub(crate) fn no_status(&self) {
        // Each rank that ends calls this. Without a line, no call wakes the console's thread.
        if self.has_status.swap(false, Ordering::Relaxed) {
            self.writer.add(To::Status, Vec::new());
        }
    }
}

/// Whether stderr is a terminal on which a line can be rewritten.
pub(crate) fn can_rewrite() -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    io::stderr().is_terminal() && !is_dumb
}

/// Whether stdout and stderr are the same terminal, pipe or file.
fn is_one_file() -> bool {
    let [stdout, stderr] = [fstat(io::stdout()), fstat(io::stderr())];
    let number = |stat: FileStat| (stat.st_dev, stat.st_ino);
    stdout.ok().map(number) == stderr.ok().map(number)
}

/// Returns the number of columns of the terminal, 0 if unknown.
fn columns() -> usize {
    tcgetwinsize(io::stderr()).map_or(0, |size| size.ws_col.into())
}

fn write(target: Target, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // A closed console does not end the job.
    let _ = match target {
        Target::Stdout => {
            let mut console = io::stdout().lock();
            write_all(&mut console, bytes).and_then(|()| console.flush())
        }
        Target::Stderr | Target::Status => write_all(&mut io::stderr().lock(), bytes),
    };
}

fn write_all(console: &mut impl Write, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match console.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex, mpsc as std_mpsc};

    use super::super::writer::WAITING;
    use super::*;

    /// Output that reached a console, piece by piece.
    pub(crate) type Seen = Arc<Mutex<Vec<(Target, String)>>>;

    /// Returns a console that records its output.
    pub(crate) fn noted() -> (Console, Written, Seen) {
        let seen = Seen::default();
        let notes = Arc::clone(&seen);
        let write = move |target, bytes: &[u8]| {
            notes.lock().unwrap().push((target, String::from_utf8_lossy(bytes).into_owned()));
        };
        let (console, written) = Console::with(false, write).unwrap();
        (console, written, seen)
    }

    #[tokio::test]
    async fn a_console_that_is_not_read_bounds_the_ranks_and_not_the_agent() {
        let (go, blocked) = std_mpsc::channel::<()>();
        let seen = Seen::default();
        let notes = Arc::clone(&seen);
        let (console, written) = Console::with(false, move |target, bytes| {
            let _ = blocked.recv();
            notes.lock().unwrap().push((target, String::from_utf8_lossy(bytes).into_owned()));
        })
        .unwrap();
        let stream = console.show(Target::Stdout, String::new());
        for number in 0..WAITING {
            stream.pass(number.to_string().into_bytes()).await;
        }
        let more = stream.pass(b"more".to_vec());
        assert!(tokio::time::timeout(Duration::from_millis(50), more).await.is_err(), "there is no room");
        console.say_if_idle("progress");
        console.say("report");
        drop(go);
        drop((console, stream));
        tokio::time::timeout(Duration::from_secs(20), written.wait()).await.unwrap();
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), WAITING + 1, "{seen:?}");
        assert_eq!(seen[WAITING], (Target::Stderr, "report".into()));
    }
}
