//! Connections of ranks to the store.
//!
//! Requests are handled in the buffer that they were read into, and answers are written at once, so
//! an idle connection holds no buffer. A client that does not read its answers is not read from.
//!
//! Bounds: a request has at most [`MAX_REQUEST`] bytes, in a buffer of at most twice that. An
//! answer takes at most [`MAX_ANSWER`] in addition to the store's values, and a connection has at
//! most one such answer. All connections together hold at most [`MAX_BUFFERED`]. The store and the
//! values being sent hold at most [`MAX_HELD`].

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::slot::ConnectionSlot;
use super::{Shared, locked};
use crate::store::codec::{MAX_REQUEST, Request, Scan};
use crate::store::state::{Connection, MAX_HELD, READY, Refused, Replies, Store};
#[cfg(doc)]
use crate::store::values::MAX_ANSWER;
use crate::store::values::{Answer, Sending};

/// Bytes per read.
const READ_CHUNK: usize = 64 << 10;
/// Unwritten bytes of answers from which on further requests wait.
const MAX_UNWRITTEN: usize = 256 << 10;
/// Maximum capacity that the buffers of answers and of a connection's requests retain.
const MAX_RETAINED: usize = 4 * MAX_UNWRITTEN;
/// Maximum of slices per vectored write.
const MAX_SLICES: usize = 64;
/// Maximum of bytes of all incomplete requests and unwritten answers.
const MAX_BUFFERED: usize = 512 << 20;

/// Notifications of other connections to a client.
///
/// The task of one connection changes this entry and wakes the task of the other, which reads the
/// entry under the same lock in its next poll. So a notification is neither lost nor seen twice.
struct ClientWaker {
    waker: Waker,
    /// Number of [`READY`] bytes owed to the client.
    ready: u32,
    /// Bytes that its connection holds.
    held: usize,
    /// Reason to close its connection, once there is one.
    close_reason: Option<CloseReason>,
}

/// Why the server closes a working connection to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum CloseReason {
    #[error("its round is over")]
    RoundOver,
    #[error("all connections together hold over {MAX_BUFFERED} bytes, and this one holds the most: {0}")]
    HoldsMost(usize),
}

impl ClientWaker {
    fn wake(&self) {
        self.waker.wake_by_ref();
    }
}

/// Returns whether a connection ended by a fault of its requests, which the user should see.
pub(super) fn is_fault(error: &io::Error) -> bool {
    let of = error.get_ref();
    of.is_some_and(|of| of.is::<Refused>() || matches!(of.downcast_ref(), Some(CloseReason::HoldsMost(_))))
}

/// The store, its connections, and scratch buffers.
pub(super) struct Clients {
    store: Store,
    wakers: HashMap<Connection, ClientWaker>,
    /// Bytes that connections hold, except those that are about to close.
    buffered: usize,
    /// Limit of `buffered`.
    max_buffered: usize,
    chunk: Box<[u8]>,
    replies: Replies,
}

impl Clients {
    pub(super) fn new() -> Self {
        Self {
            store: Store::new(MAX_HELD),
            wakers: HashMap::new(),
            buffered: 0,
            max_buffered: MAX_BUFFERED,
            chunk: vec![0; READ_CHUNK].into(),
            replies: Replies::default(),
        }
    }

    /// Empties the store for a new round and closes all connections. They belong to ranks of the
    /// last round, and their unread requests must not reach the new one.
    pub(super) fn clear(&mut self) {
        self.store.clear();
        for entry in self.wakers.values_mut() {
            entry.close_reason = Some(CloseReason::RoundOver);
            entry.wake();
        }
    }

    /// Returns the number of [`READY`] bytes owed to a client, and resets it.
    fn take_ready(&mut self, id: Connection, waker: &Waker) -> io::Result<u32> {
        let new = || ClientWaker { waker: waker.clone(), ready: 0, held: 0, close_reason: None };
        let entry = self.wakers.entry(id).or_insert_with(new);
        if let Some(close_reason) = entry.close_reason {
            return Err(io::Error::other(close_reason));
        }
        entry.waker.clone_from(waker);
        Ok(std::mem::take(&mut entry.ready))
    }

    /// Reads, handles and writes as far as possible without waiting, then accounts for the bytes
    /// held.
    fn poll_io(&mut self, stream: &TcpStream, client: &mut Client, waker: &Waker) -> io::Result<ReadOutcome> {
        let before = client.held();
        let result = self.transfer(stream, client, waker);
        let held = client.held();
        if held != before {
            self.account(client.id, held)?;
        }
        result
    }

    /// Accounts for the bytes that a connection holds. Over the limit, the connection with the most
    /// bytes closes: it does not read, or does not finish its requests. A rank that needs a few
    /// more bytes is not affected.
    fn account(&mut self, id: Connection, held: usize) -> io::Result<()> {
        let Some(entry) = self.wakers.get_mut(&id) else { return Ok(()) };
        self.buffered = self.buffered + held - std::mem::replace(&mut entry.held, held);
        while self.buffered > self.max_buffered {
            let Some((largest, entry)) = self.wakers.iter_mut().max_by_key(|(_, entry)| entry.held) else {
                break;
            };
            let close_reason = CloseReason::HoldsMost(entry.held);
            self.buffered -= std::mem::take(&mut entry.held);
            if *largest == id {
                return Err(io::Error::other(close_reason));
            }
            entry.close_reason = Some(close_reason);
            entry.wake();
        }
        Ok(())
    }

    fn transfer(
        &mut self,
        stream: &TcpStream,
        client: &mut Client,
        waker: &Waker,
    ) -> io::Result<ReadOutcome> {
        let ready = self.take_ready(client.id, waker)?;
        let Self { store, wakers, chunk, replies, .. } = self;
        replies.own.clear();
        // Before other answers: a client that cancels its wait reads this byte before the answer to
        // the cancellation.
        (0..ready).for_each(|_| replies.own.push(READY));
        let mut read = ReadOutcome::Drained;
        if client.unwritten.is_none() {
            // Buffered requests are handled before more are read.
            let bytes = if client.is_held_back() { 0 } else { read_available(stream, chunk)? };
            client.handle_input(&chunk[..bytes], store, replies)?;
            if bytes == chunk.len() {
                read = ReadOutcome::Partial;
            }
        }
        for woken in replies.woken.drain(..) {
            if let Some(entry) = wakers.get_mut(&woken) {
                entry.ready += 1;
                entry.wake();
            }
        }
        client.write(stream, &mut replies.own)?;
        if replies.own.held() > MAX_RETAINED {
            replies.own = Answer::default();
        }
        Ok(read)
    }

    fn disconnect(&mut self, client: &Client) {
        self.buffered -= self.wakers.remove(&client.id).map_or(0, |entry| entry.held);
        self.store.disconnect(client.id);
    }
}

/// How much of the available input was read.
#[derive(PartialEq, Eq)]
enum ReadOutcome {
    Drained,
    Partial,
}

struct Client {
    id: Connection,
    /// Requests that have not been handled; usually empty.
    pending: Vec<u8>,
    /// Scan of the first of them.
    scan: Scan,
    /// Answers that the client has not read; usually `None`.
    unwritten: Option<Box<Sending>>,
    /// Whether it has sent a request. A ping does not count: every client of torch begins with one.
    has_requested: bool,
}

impl Client {
    fn held(&self) -> usize {
        self.pending.capacity() + self.unwritten.as_ref().map_or(0, |unwritten| unwritten.held())
    }

    /// Handles complete requests, and keeps the rest.
    fn handle_input(&mut self, read: &[u8], store: &mut Store, replies: &mut Replies) -> io::Result<()> {
        if self.pending.is_empty() {
            let taken = self.handle_requests(read, store, replies)?;
            return append_pending(&mut self.pending, &read[taken..]);
        }
        let mut pending = std::mem::take(&mut self.pending);
        append_pending(&mut pending, read)?;
        let taken = self.handle_requests(&pending, store, replies)?;
        if taken < pending.len() {
            pending.drain(..taken);
            if taken > 0 && pending.capacity() > MAX_RETAINED {
                pending.shrink_to_fit();
            }
            self.pending = pending;
        }
        if self.pending.len() > MAX_REQUEST {
            return Err(io::Error::other("a request is too large"));
        }
        Ok(())
    }

    /// Handles complete requests. Returns the number of bytes handled.
    fn handle_requests(
        &mut self,
        bytes: &[u8],
        store: &mut Store,
        replies: &mut Replies,
    ) -> io::Result<usize> {
        let mut taken = 0;
        while replies.own.len() < MAX_UNWRITTEN {
            let rest = &bytes[taken..];
            if !self.scan.advance(rest).map_err(io::Error::other)? {
                break;
            }
            let Some((request, length)) = self.scan.request(rest).map_err(io::Error::other)? else {
                return Err(io::Error::other(Refused::Memory));
            };
            self.has_requested |= !matches!(request, Request::Ping(_) | Request::Validate);
            store.handle(self.id, request, replies).map_err(io::Error::other)?;
            // Its own wait is over: the byte belongs in order among the answers.
            if let Some(own) = replies.woken.iter().position(|woken| *woken == self.id) {
                replies.woken.swap_remove(own);
                replies.own.push(READY);
            }
            taken += length;
            self.scan = Scan::default();
        }
        Ok(taken)
    }

    fn write(&mut self, stream: &TcpStream, answer: &mut Answer) -> io::Result<()> {
        let no_memory = |_| io::Error::other(Refused::Memory);
        let unwritten = match &mut self.unwritten {
            Some(unwritten) => {
                // While an answer is unwritten, the client is owed only bytes of finished waits.
                unwritten.put(answer.own()).map_err(no_memory)?;
                unwritten
            }
            None => {
                let sent = if answer.has_shared() { 0 } else { write_available(stream, answer.own())? };
                if sent == answer.len() {
                    return Ok(());
                }
                self.unwritten.insert(Box::new(Sending::begin(answer, sent).map_err(no_memory)?))
            }
        };
        loop {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let account = unwritten.next(&mut slices);
            if account == 0 {
                self.unwritten = None;
                return Ok(());
            }
            let sent = match stream.try_write_vectored(&slices[..account]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                sent => sent?,
            };
            unwritten.sent(sent);
            // Yields to other connections before a large answer continues.
            if sent > MAX_UNWRITTEN {
                return Ok(());
            }
        }
    }
}

/// Appends bytes to the unhandled requests.
fn append_pending(pending: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    pending.try_reserve(bytes.len()).map_err(|_| io::Error::other(Refused::Memory))?;
    pending.extend_from_slice(bytes);
    Ok(())
}

/// Reads the available bytes. A short read means that the socket is empty, which saves a second
/// call.
fn read_available(stream: &TcpStream, chunk: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    let result = stream.try_io(Interest::READABLE, || {
        read = nix::unistd::read(stream, chunk)?;
        match read {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ if read < chunk.len() => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    });
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(read),
        result => result.map(|()| read),
    }
}

/// Writes as much as the kernel accepts. Returns the number of bytes.
fn write_available(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match stream.try_write(bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        written => written,
    }
}

/// Serves a validated client of the store until its connection ends.
///
/// The future is small, since tens of thousands of connections may be idle.
pub(super) struct StoreConnection {
    shared: Arc<Shared>,
    stream: TcpStream,
    client: Client,
    slot: ConnectionSlot,
    /// Whether its slot is marked as active.
    is_marked_active: bool,
}

impl StoreConnection {
    pub(super) fn new(shared: Arc<Shared>, slot: ConnectionSlot, stream: TcpStream) -> Self {
        let id = slot.id();
        let client =
            Client { id, pending: Vec::new(), scan: Scan::default(), unwritten: None, has_requested: false };
        Self { shared, stream, client, slot, is_marked_active: false }
    }
}

impl Drop for StoreConnection {
    fn drop(&mut self) {
        locked(&self.shared.clients).disconnect(&self.client);
    }
}

impl Future for StoreConnection {
    /// Why the connection ended.
    type Output = io::Error;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Error> {
        let Self { shared, stream, client, slot, is_marked_active } = self.get_mut();
        loop {
            let read = match locked(&shared.clients).poll_io(stream, client, context.waker()) {
                Ok(read) => read,
                Err(error) => return Poll::Ready(error),
            };
            if client.has_requested && !std::mem::replace(is_marked_active, true) {
                slot.mark_active();
            }
            let possible = if client.unwritten.is_some() {
                stream.poll_write_ready(context)
            } else if read == ReadOutcome::Partial || client.is_held_back() {
                // Yields to other connections.
                context.waker().wake_by_ref();
                return Poll::Pending;
            } else {
                stream.poll_read_ready(context)
            };
            if let Err(error) = ready!(possible) {
                return Poll::Ready(error);
            }
        }
    }
}

impl Client {
    /// Returns whether a complete request waits because the answers before it are unwritten.
    fn is_held_back(&mut self) -> bool {
        !self.pending.is_empty() && self.scan.advance(&self.pending).unwrap_or(true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ice_proto::rendezvous::KeepAlive;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::codec::encode;

    /// Connects a client, and spawns the server's end.
    async fn client(shared: &Arc<Shared>, id: Connection) -> (TcpStream, tokio::task::JoinHandle<io::Error>) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (other, _) = listener.accept().await.unwrap();
        let slot = ConnectionSlot::new(Arc::clone(shared), id, [127, 0, 0, 1].into());
        (stream, tokio::spawn(StoreConnection::new(Arc::clone(shared), slot, other)))
    }

    #[tokio::test]
    async fn connection_with_the_most_bytes_ends_if_all_together_hold_too_much() {
        let shared = Arc::new(Shared::new(None, KeepAlive::default()).unwrap());
        locked(&shared.clients).max_buffered = 8 << 20;
        let (mut greedy, greedy_ended) = client(&shared, 1).await;
        let (mut rank, _serve) = client(&shared, 2).await;
        let mut request = Vec::new();
        encode(&Request::Set(b"k", &vec![7; 7 << 20]), &mut request);
        // Most of an incomplete request.
        greedy.write_all(&request[..5 << 20]).await.unwrap();
        while locked(&shared.clients).buffered < 5 << 20 {
            tokio::task::yield_now().await;
        }
        request.clear();
        encode(&Request::Set(b"k", &vec![8; 1 << 20]), &mut request);
        encode(&Request::QueueLen(b"q"), &mut request);
        rank.write_all(&request).await.unwrap();
        rank.read_exact(&mut [0; 8]).await.unwrap();
        let ended = greedy_ended.await.unwrap();
        assert!(ended.to_string().contains("this one holds the most") && is_fault(&ended), "{ended}");
        assert_eq!(locked(&shared.clients).buffered, 0);
    }

    #[tokio::test]
    async fn requests_wait_unread_while_the_answers_of_others_are_not_written() {
        let shared = Arc::new(Shared::new(None, KeepAlive::default()).unwrap());
        locked(&shared.clients).max_buffered = 4 << 20;
        let (stream, _serve) = client(&shared, 1).await;
        let (mut reader, mut writer) = stream.into_split();
        let value = vec![7; MAX_UNWRITTEN];
        let mut set = Vec::new();
        encode(&Request::Set(b"k", &value), &mut set);
        // More bytes than may be held, in requests of which each poll handles one.
        let mut request = Vec::new();
        encode(&Request::MultiGet([&[&b"k"[..]][..], &[&[b'-'; 8 << 10][..]; 2]].concat()), &mut request);
        let handle_requests = (8 << 20) / request.len();
        let write = async {
            writer.write_all(&set).await.unwrap();
            for _ in 0..handle_requests {
                writer.write_all(&request).await.unwrap();
            }
        };
        let read = async {
            let mut answer = vec![0; 8 + value.len() + 8 + 8];
            for number in 0..handle_requests {
                reader.read_exact(&mut answer).await.unwrap_or_else(|error| panic!("{number}: {error}"));
            }
        };
        tokio::join!(write, read);
    }
}
