//! The agent's stdout and stderr. A console that nobody reads holds up the ranks that write to it, never the event loop; one that is
//! closed is of no consequence.

use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::Duration;

use rustix::termios::tcgetwinsize;

use super::status::StatusLine;
use super::writer::{Writer, Written};

/// Pause before a console that was set to non-blocking is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// One of the two streams of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Stdout,
    Stderr,
    /// The line of a terminal that is rewritten in place.
    Status,
}

impl Target {
    /// Whether a person watches who likes colours.
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
pub(crate) struct Console(Writer<Target>);

impl Console {
    /// Starts its thread.
    pub(crate) fn open() -> io::Result<(Self, Written)> {
        let mut status = StatusLine::new();
        let on_terminal = [io::stdout().is_terminal(), io::stderr().is_terminal()];
        Self::with(move |target, bytes| {
            // What goes elsewhere does not get into the line's way.
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

    fn with(write: impl FnMut(Target, &[u8]) + Send + 'static) -> io::Result<(Self, Written)> {
        let (writer, written) = Writer::start("console", write)?;
        Ok((Self(writer), written))
    }

    /// Passes on what a rank wrote, once there is room.
    pub(crate) async fn pass(&self, target: Target, bytes: Vec<u8>) {
        self.0.pass(target, bytes).await;
    }

    /// Says something on stderr, after all that was passed on before.
    pub(crate) fn say(&self, text: &str) {
        self.0.add(Target::Stderr, text.into());
    }

    /// Says a line of the launcher's own.
    pub(crate) fn note(&self, text: &str) {
        self.say(&format!("ice-launch: {text}\n"));
    }

    /// Says what is soon out of date anyway, unless the console is behind.
    pub(crate) fn say_if_idle(&self, text: &str) {
        if self.0.is_idle() {
            self.say(text);
        }
    }

    /// Rewrites the line at the bottom of the terminal, unless the console is behind.
    pub(crate) fn status_if_idle(&self, text: &str) {
        if self.0.is_idle() {
            self.0.add(Target::Status, text.into());
        }
    }

    /// Takes that line away.
    pub(crate) fn no_status(&self) {
        self.0.add(Target::Status, Vec::new());
    }
}

/// Whether lines can be rewritten where stderr goes.
pub(crate) fn can_rewrite() -> bool {
    let is_dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    io::stderr().is_terminal() && !is_dumb
}

/// Columns of the terminal; 0 where it does not know.
fn columns() -> usize {
    tcgetwinsize(io::stderr()).map_or(0, |size| size.ws_col.into())
}

fn write(target: Target, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    // A console that is closed does not end the job.
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

    /// What reached a console, piece by piece.
    pub(crate) type Seen = Arc<Mutex<Vec<(Target, String)>>>;

    /// A console that notes what it is given.
    pub(crate) fn noted() -> (Console, Written, Seen) {
        let seen = Seen::default();
        let notes = Arc::clone(&seen);
        let write = move |target, bytes: &[u8]| {
            notes.lock().unwrap().push((target, String::from_utf8_lossy(bytes).into_owned()));
        };
        let (console, written) = Console::with(write).unwrap();
        (console, written, seen)
    }

    #[tokio::test]
    async fn a_console_that_is_not_read_bounds_the_ranks_and_not_the_agent() {
        let (go, blocked) = std_mpsc::channel::<()>();
        let seen = Seen::default();
        let notes = Arc::clone(&seen);
        let (console, written) = Console::with(move |target, bytes| {
            let _ = blocked.recv();
            notes.lock().unwrap().push((target, String::from_utf8_lossy(bytes).into_owned()));
        })
        .unwrap();
        for number in 0..WAITING {
            console.pass(Target::Stdout, number.to_string().into_bytes()).await;
        }
        let more = console.pass(Target::Stdout, b"more".to_vec());
        assert!(tokio::time::timeout(Duration::from_millis(50), more).await.is_err(), "there is no room");
        console.say_if_idle("progress");
        console.say("report");
        drop(go);
        drop(console);
        tokio::time::timeout(Duration::from_secs(20), written.wait()).await.unwrap();
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), WAITING + 1, "{seen:?}");
        assert_eq!(seen[WAITING], (Target::Stderr, "report".into()));
    }
}
