//! The agent's stdout and stderr, written by a thread of its own. A console that nobody reads holds up the ranks that write to it,
//! never the event loop; one that is closed is of no consequence.

use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// Pieces of ranks' output that wait to be written.
const WAITING: usize = 8;
/// Pause before a console that was set to non-blocking is tried again.
const RETRY: Duration = Duration::from_millis(5);

/// One of the two streams of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Stdout,
    Stderr,
}

struct Piece {
    target: Target,
    bytes: Vec<u8>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// A handle of the console. The thread ends with the last one.
#[derive(Clone)]
pub(crate) struct Console {
    pieces: mpsc::UnboundedSender<Piece>,
    /// Bounds the ranks' part of the queue; what the agent itself says is little.
    room: Arc<Semaphore>,
}

/// The end of the console: all is written.
pub(crate) struct Written(oneshot::Receiver<()>);

impl Console {
    /// Starts the thread.
    pub(crate) fn open() -> io::Result<(Self, Written)> {
        Self::with(write)
    }

    fn with(write: impl Fn(Target, &[u8]) + Send + 'static) -> io::Result<(Self, Written)> {
        let (pieces, mut queue) = mpsc::unbounded_channel::<Piece>();
        let (done, written) = oneshot::channel();
        thread::Builder::new().name("console".into()).spawn(move || {
            while let Some(piece) = queue.blocking_recv() {
                write(piece.target, &piece.bytes);
            }
            drop(done);
        })?;
        Ok((Self { pieces, room: Arc::new(Semaphore::new(WAITING)) }, Written(written)))
    }

    /// Passes on what a rank wrote, once there is room.
    pub(crate) async fn pass(&self, target: Target, bytes: Vec<u8>) {
        let permit = Arc::clone(&self.room).acquire_owned().await.ok();
        let _ = self.pieces.send(Piece { target, bytes, _permit: permit });
    }

    /// Says something on stderr, after all that was passed on before.
    pub(crate) fn say(&self, text: &str) {
        let _ = self.pieces.send(Piece { target: Target::Stderr, bytes: text.into(), _permit: None });
    }

    /// Says what is soon out of date anyway, unless the console is behind.
    pub(crate) fn say_if_idle(&self, text: &str) {
        if self.room.available_permits() == WAITING {
            self.say(text);
        }
    }
}

impl Written {
    /// Waits until the last handle is dropped and all is written.
    pub(crate) async fn wait(self) {
        let _ = self.0.await;
    }
}

fn write(target: Target, bytes: &[u8]) {
    // A console that is closed does not end the job.
    let _ = match target {
        Target::Stdout => {
            let mut console = io::stdout().lock();
            write_all(&mut console, bytes).and_then(|()| console.flush())
        }
        Target::Stderr => write_all(&mut io::stderr().lock(), bytes),
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
    use std::sync::{Mutex, mpsc as std_mpsc};

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
