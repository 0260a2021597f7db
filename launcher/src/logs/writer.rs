//! A thread that writes pieces of output in their order.
//!
//! The queue to the thread is unbounded, and a semaphore bounds the ranks' part of it: a piece of a
//! rank holds one of [`WAITING`] permits until the piece is written. `pass` waits for a permit, so
//! a slow disk or console blocks the ranks' pumps. `add` takes no permit, so the event loop never
//! waits.

use std::io;
use std::sync::Arc;
use std::thread;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// Maximum number of pieces of ranks' output that wait to be written.
pub(super) const WAITING: usize = 8;

struct Piece<T> {
    target: T,
    bytes: Vec<u8>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// A handle of the thread. The thread exits when the last handle is dropped.
pub(super) struct Writer<T> {
    pieces: mpsc::UnboundedSender<Piece<T>>,
    /// Bounds the ranks' part of the queue. The agent's own part is small.
    room: Arc<Semaphore>,
}

/// The end of a thread: everything is written.
pub(crate) struct Written(oneshot::Receiver<()>);

impl<T> Clone for Writer<T> {
    fn clone(&self) -> Self {
        Self { pieces: self.pieces.clone(), room: Arc::clone(&self.room) }
    }
}

impl<T: Send + 'static> Writer<T> {
    pub(super) fn start(
        name: &str,
        mut write: impl FnMut(T, &[u8]) + Send + 'static,
    ) -> io::Result<(Self, Written)> {
        let (pieces, mut queue) = mpsc::unbounded_channel::<Piece<T>>();
        let (done, written) = oneshot::channel();
        thread::Builder::new().name(name.into()).spawn(move || {
            while let Some(piece) = queue.blocking_recv() {
                write(piece.target, &piece.bytes);
            }
            drop(done);
        })?;
        Ok((Self { pieces, room: Arc::new(Semaphore::new(WAITING)) }, Written(written)))
    }

    /// Queues output of a rank, once there is room.
    pub(super) async fn pass(&self, target: T, bytes: Vec<u8>) {
        let permit = Arc::clone(&self.room).acquire_owned().await.ok();
        let _ = self.pieces.send(Piece { target, bytes, _permit: permit });
    }

    /// Queues output of the agent itself, after all output that was queued before.
    pub(super) fn add(&self, target: T, bytes: Vec<u8>) {
        let _ = self.pieces.send(Piece { target, bytes, _permit: None });
    }

    /// Whether no output of ranks waits to be written.
    pub(super) fn is_idle(&self) -> bool {
        self.room.available_permits() == WAITING
    }
}

impl Written {
    /// Waits until the last handle is dropped and everything is written.
    pub(crate) async fn wait(self) {
        let _ = self.0.await;
    }
}
