//! Connections of ranks to the store.
//!
//! Bytes that come are handled where they lie, and answers are written at once: a connection that does nothing holds no buffer. A
//! client is not read from while it does not read.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::{Shared, locked};
use crate::store::codec::{MAX_REQUEST, Scan};
use crate::store::state::{Connection, MAX_HELD, READY, Replies, Store};

/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;
/// Requests wait while so much of the answers has not been written.
const UNWRITTEN: usize = 256 << 10;
/// Bytes of all requests that are not whole and of all answers that are not written.
const MAX_BUFFERED: usize = 512 << 20;

/// What others have for a client.
struct Bell {
    waker: Waker,
    /// How often it was told [`READY`] since it last looked.
    ready: u32,
    /// Whether its round is over.
    over: bool,
}

impl Bell {
    fn ring(&self) {
        self.waker.wake_by_ref();
    }
}

/// The store, who is connected to it, and room to work in.
pub(super) struct Clients {
    store: Store,
    bells: HashMap<Connection, Bell>,
    /// Bytes that connections hold for themselves.
    buffered: usize,
    chunk: Box<[u8]>,
    replies: Replies,
}

impl Clients {
    pub(super) fn new() -> Self {
        Self {
            store: Store::new(MAX_HELD),
            bells: HashMap::new(),
            buffered: 0,
            chunk: vec![0; CHUNK].into(),
            replies: Replies::default(),
        }
    }

    /// Empties the store for a new round. Whoever is connected belongs to ranks that have ended, and what they have sent and nobody has
    /// read yet must not get into the new round.
    pub(super) fn clear(&mut self) {
        self.store.clear();
        for bell in self.bells.values_mut() {
            bell.over = true;
            bell.ring();
        }
    }

    /// How often others told a client [`READY`] since it last looked.
    fn news(&mut self, id: Connection, waker: &Waker) -> io::Result<u32> {
        let bell =
            self.bells.entry(id).or_insert_with(|| Bell { waker: waker.clone(), ready: 0, over: false });
        if bell.over {
            return Err(io::Error::other("its round is over"));
        }
        bell.waker.clone_from(waker);
        Ok(std::mem::take(&mut bell.ready))
    }

    /// Moves what can be moved without waiting.
    fn turn(&mut self, stream: &TcpStream, client: &mut Client, waker: &Waker) -> io::Result<Read> {
        let before = client.held();
        let result = self.step(stream, client, waker);
        self.buffered = self.buffered + client.held() - before;
        if self.buffered > MAX_BUFFERED && client.held() > before {
            return Err(io::Error::other("all connections together hold too much"));
        }
        result
    }

    fn step(&mut self, stream: &TcpStream, client: &mut Client, waker: &Waker) -> io::Result<Read> {
        let ready = self.news(client.id, waker)?;
        let Self { store, bells, chunk, replies, .. } = self;
        replies.own.clear();
        // First, since a client that gives up its wait reads this before the answer to that.
        replies.own.extend((0..ready).map(|_| READY));
        let mut read = Read::All;
        if client.unwritten.is_empty() {
            let bytes = drain(stream, chunk)?;
            client.take_in(&chunk[..bytes], store, replies)?;
            if bytes == chunk.len() {
                read = Read::Part;
            }
        }
        for woken in replies.woken.drain(..) {
            if let Some(bell) = bells.get_mut(&woken) {
                bell.ready += 1;
                bell.ring();
            }
        }
        client.write(stream, &replies.own)?;
        Ok(read)
    }

    fn leave(&mut self, client: &Client) {
        self.bells.remove(&client.id);
        self.store.disconnect(client.id);
        self.buffered -= client.held();
    }
}

/// How much a turn has read of what was there.
#[derive(PartialEq, Eq)]
enum Read {
    All,
    Part,
}

struct Client {
    id: Connection,
    /// Requests that have not been handled; mostly none.
    pending: Vec<u8>,
    /// The first of them, as far as it is there.
    scan: Scan,
    /// Answers that the client has not taken yet; mostly none.
    unwritten: Vec<u8>,
}

impl Client {
    fn held(&self) -> usize {
        self.pending.capacity() + self.unwritten.capacity()
    }

    /// Handles all that is whole, and keeps the rest.
    fn take_in(&mut self, read: &[u8], store: &mut Store, replies: &mut Replies) -> io::Result<()> {
        if self.pending.is_empty() {
            let taken = self.requests(read, store, replies)?;
            self.pending.extend_from_slice(&read[taken..]);
            return Ok(());
        }
        let mut pending = std::mem::take(&mut self.pending);
        pending.extend_from_slice(read);
        let taken = self.requests(&pending, store, replies)?;
        if taken < pending.len() {
            pending.drain(..taken);
            self.pending = pending;
        }
        if self.pending.len() > MAX_REQUEST {
            return Err(io::Error::other("a request is too large"));
        }
        Ok(())
    }

    /// How many bytes were handled.
    fn requests(&mut self, bytes: &[u8], store: &mut Store, replies: &mut Replies) -> io::Result<usize> {
        let mut taken = 0;
        while replies.own.len() < UNWRITTEN {
            let rest = &bytes[taken..];
            if !self.scan.advance(rest).map_err(io::Error::other)? {
                break;
            }
            let Some((request, length)) = self.scan.request(rest).map_err(io::Error::other)? else { break };
            if let Err(refused) = store.handle(self.id, request, replies) {
                tracing::error!(%refused, "a client of the store was ended");
                return Err(io::Error::other(refused));
            }
            // In its place among the answers.
            if let Some(own) = replies.woken.iter().position(|woken| *woken == self.id) {
                replies.woken.swap_remove(own);
                replies.own.push(READY);
            }
            taken += length;
            self.scan = Scan::default();
        }
        Ok(taken)
    }

    fn write(&mut self, stream: &TcpStream, replies: &[u8]) -> io::Result<()> {
        if self.unwritten.is_empty() {
            let written = written(stream, replies)?;
            self.unwritten.extend_from_slice(&replies[written..]);
            return Ok(());
        }
        self.unwritten.extend_from_slice(replies);
        let written = written(stream, &self.unwritten)?;
        if written == self.unwritten.len() {
            self.unwritten = Vec::new();
        } else {
            self.unwritten.drain(..written);
        }
        Ok(())
    }
}

/// Reads what is there. Less than there is room for is all there is, which saves asking again.
fn drain(stream: &TcpStream, chunk: &mut [u8]) -> io::Result<usize> {
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

/// How many bytes the kernel takes now.
fn written(stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match stream.try_write(bytes) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        written => written,
    }
}

/// Serves a rank, which has validated, until it goes.
///
/// A future of few bytes, since there may be tens of thousands that do nothing.
pub(super) struct Serve {
    shared: Arc<Shared>,
    stream: TcpStream,
    client: Client,
}

impl Serve {
    pub(super) fn new(shared: Arc<Shared>, id: Connection, stream: TcpStream) -> Self {
        let client = Client { id, pending: Vec::new(), scan: Scan::default(), unwritten: Vec::new() };
        Self { shared, stream, client }
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        locked(&self.shared.clients).leave(&self.client);
    }
}

impl Future for Serve {
    /// Why it ended.
    type Output = io::Error;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Error> {
        let Self { shared, stream, client } = self.get_mut();
        loop {
            let read = match locked(&shared.clients).turn(stream, client, context.waker()) {
                Ok(read) => read,
                Err(error) => return Poll::Ready(error),
            };
            let possible = if !client.unwritten.is_empty() {
                stream.poll_write_ready(context)
            } else if read == Read::Part || client.is_held_back() {
                // Others have their turn first.
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
    /// Whether a request is whole and was not handled, since its answer would have been too much at once.
    fn is_held_back(&mut self) -> bool {
        !self.pending.is_empty() && self.scan.advance(&self.pending).unwrap_or(true)
    }
}
