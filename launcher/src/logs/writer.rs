//! A thread that writes what others hand it, in order. Who writes is held up by it only as far as its queue is full; the event loop
//! never is.

use std::io;
use std::sync::Arc;
use std::thread;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// Pieces of ranks' output that wait to be written.
pub(super) const WAITING: usize = 8;

struct Piece<T> {
    target: T,
    bytes: Vec<u8>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// A handle of the thread, which ends with the last one.
pub(super) struct Writer<T> {
    pieces: mpsc::UnboundedSender<Piece<T>>,
    /// Bounds the ranks' part of the queue; what the agent itself says is little.
    room: Arc<Semaphore>,
}

/// The end of a thread: all is written.
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

    /// Hands over what a rank wrote, once there is room.
    pub(super) async fn pass(&self, target: T, bytes: Vec<u8>) {
        let permit = Arc::clone(&self.room).acquire_owned().await.ok();
        let _ = self.pieces.send(Piece { target, bytes, _permit: permit });
    }

    /// Hands over something of the agent's own, after all that was passed before.
    pub(super) fn add(&self, target: T, bytes: Vec<u8>) {
        let _ = self.pieces.send(Piece { target, bytes, _permit: None });
    }

    pub(super) fn is_idle(&self) -> bool {
        self.room.available_permits() == WAITING
    }
}

impl Written {
    /// Waits until the last handle is dropped and all is written.
    pub(crate) async fn wait(self) {
        let _ = self.0.await;
    }
}
