//! Connections of ranks to the store.
//!
//! Bytes that come are handled where they lie, and answers are written at once: a connection that does nothing holds no buffer. A
//! client is not read from while it does not read.
//!
//! Bounds: a request has at most [`MAX_REQUEST`] bytes, in a buffer of at most twice that; an answer takes at most [`MAX_ANSWER`]
//! beside the store's values, and a connection has at most one such answer; all connections together hold at most
//! [`MAX_BUFFERED`]; the store and the values on their way hold at most [`MAX_HELD`].

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::io::Interest;
use tokio::net::TcpStream;

use super::door::Place;
use super::{Shared, locked};
use crate::store::codec::{MAX_REQUEST, Request, Scan};
use crate::store::state::{Connection, MAX_HELD, READY, Refused, Replies, Store};
#[cfg(doc)]
use crate::store::values::MAX_ANSWER;
use crate::store::values::{Answer, Sending};

/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;
/// Requests wait while so much of the answers has not been written.
const UNWRITTEN: usize = 256 << 10;
/// Most room for answers, and of a connection's requests, that is kept for the next ones.
const KEPT: usize = 4 * UNWRITTEN;
/// Parts of an answer that the kernel receives at a time.
const SLICES: usize = 64;
/// Bytes of all requests that are not whole and of all answers that are not written.
const MAX_BUFFERED: usize = 512 << 20;

/// What others have for a client.
struct Bell {
    waker: Waker,
    /// How often it was told [`READY`] since it last looked.
    ready: u32,
    /// Bytes that its connection holds for itself.
    held: usize,
    /// Why its connection ends.
    end: Option<End>,
}

/// Why the host ends a connection to the store that could continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("its round is over")]
    RoundOver,
    #[error("all connections together hold over {MAX_BUFFERED} bytes, and this one holds the most: {0}")]
    HoldsMost(usize),
}

impl Bell {
    fn ring(&self) {
        self.waker.wake_by_ref();
    }
}

/// Whether a connection ended because of its requests, which the user should know of.
pub(super) fn is_fault(error: &io::Error) -> bool {
    let of = error.get_ref();
    of.is_some_and(|of| of.is::<Refused>() || matches!(of.downcast_ref(), Some(End::HoldsMost(_))))
}

/// The store, who is connected to it, and room to work in.
pub(super) struct Clients {
    store: Store,
    bells: HashMap<Connection, Bell>,
    /// Bytes that connections hold for themselves, without those of connections that are about to end.
    buffered: usize,
    /// The most of them.
    max_buffered: usize,
    chunk: Box<[u8]>,
    replies: Replies,
}

impl Clients {
    pub(super) fn new() -> Self {
        Self {
            store: Store::new(MAX_HELD),
            bells: HashMap::new(),
            buffered: 0,
            max_buffered: MAX_BUFFERED,
            chunk: vec![0; CHUNK].into(),
            replies: Replies::default(),
        }
    }

    /// Empties the store for a new round. Whoever is connected belongs to ranks that have ended, and what they have sent and nobody has
    /// read yet must not get into the new round.
    pub(super) fn clear(&mut self) {
        self.store.clear();
        for bell in self.bells.values_mut() {
            bell.end = Some(End::RoundOver);
            bell.ring();
        }
    }

    /// How often others told a client [`READY`] since it last looked.
    fn news(&mut self, id: Connection, waker: &Waker) -> io::Result<u32> {
        let new = || Bell { waker: waker.clone(), ready: 0, held: 0, end: None };
        let bell = self.bells.entry(id).or_insert_with(new);
        if let Some(end) = bell.end {
            return Err(io::Error::other(end));
        }
        bell.waker.clone_from(waker);
        Ok(std::mem::take(&mut bell.ready))
    }

    /// Moves what can be moved without waiting.
    fn turn(&mut self, stream: &TcpStream, client: &mut Client, waker: &Waker) -> io::Result<Read> {
        let before = client.held();
        let result = self.step(stream, client, waker);
        let held = client.held();
        if held != before {
            self.count(client.id, held)?;
        }
        result
    }

    /// Counts what a connection holds. If all together hold too much, the connection with the most bytes ends: it is one that does not
    /// read or that does not finish its requests, and not the next one of a rank that needs some bytes.
    fn count(&mut self, id: Connection, held: usize) -> io::Result<()> {
        let Some(bell) = self.bells.get_mut(&id) else { return Ok(()) };
        self.buffered = self.buffered + held - std::mem::replace(&mut bell.held, held);
        while self.buffered > self.max_buffered {
            let Some((largest, bell)) = self.bells.iter_mut().max_by_key(|(_, bell)| bell.held) else {
                break;
            };
            let end = End::HoldsMost(bell.held);
            self.buffered -= std::mem::take(&mut bell.held);
            if *largest == id {
                return Err(io::Error::other(end));
            }
            bell.end = Some(end);
            bell.ring();
        }
        Ok(())
    }

    fn step(&mut self, stream: &TcpStream, client: &mut Client, waker: &Waker) -> io::Result<Read> {
        let ready = self.news(client.id, waker)?;
        let Self { store, bells, chunk, replies, .. } = self;
        replies.own.clear();
        // First, since a client that gives up its wait reads this before the answer to that.
        (0..ready).for_each(|_| replies.own.push(READY));
        let mut read = Read::All;
        if client.unwritten.is_none() {
            // Requests that wait for the answers of others are handled before more are read.
            let bytes = if client.is_held_back() { 0 } else { drain(stream, chunk)? };
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
        client.write(stream, &mut replies.own)?;
        if replies.own.held() > KEPT {
            replies.own = Answer::default();
        }
        Ok(read)
    }

    fn leave(&mut self, client: &Client) {
        self.buffered -= self.bells.remove(&client.id).map_or(0, |bell| bell.held);
        self.store.disconnect(client.id);
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
    unwritten: Option<Box<Sending>>,
    /// Whether it has asked for something. A ping is not enough: every client of torch begins with one.
    has_asked: bool,
}

impl Client {
    fn held(&self) -> usize {
        self.pending.capacity() + self.unwritten.as_ref().map_or(0, |unwritten| unwritten.held())
    }

    /// Handles all that is whole, and keeps the rest.
    fn take_in(&mut self, read: &[u8], store: &mut Store, replies: &mut Replies) -> io::Result<()> {
        if self.pending.is_empty() {
            let taken = self.requests(read, store, replies)?;
            return keep(&mut self.pending, &read[taken..]);
        }
        let mut pending = std::mem::take(&mut self.pending);
        keep(&mut pending, read)?;
        let taken = self.requests(&pending, store, replies)?;
        if taken < pending.len() {
            pending.drain(..taken);
            if taken > 0 && pending.capacity() > KEPT {
                pending.shrink_to_fit();
            }
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
            let Some((request, length)) = self.scan.request(rest).map_err(io::Error::other)? else {
                return Err(io::Error::other(Refused::Memory));
            };
            self.has_asked |= !matches!(request, Request::Ping(_) | Request::Validate);
            store.handle(self.id, request, replies).map_err(io::Error::other)?;
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

    fn write(&mut self, stream: &TcpStream, answer: &mut Answer) -> io::Result<()> {
        let no_memory = |_| io::Error::other(Refused::Memory);
        let unwritten = match &mut self.unwritten {
            Some(unwritten) => {
                // All that comes in between is that a wait is over.
                unwritten.put(answer.own()).map_err(no_memory)?;
                unwritten
            }
            None => {
                let sent = if answer.has_shared() { 0 } else { written(stream, answer.own())? };
                if sent == answer.len() {
                    return Ok(());
                }
                self.unwritten.insert(Box::new(Sending::begin(answer, sent).map_err(no_memory)?))
            }
        };
        loop {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = unwritten.next(&mut slices);
            if count == 0 {
                self.unwritten = None;
                return Ok(());
            }
            let sent = match stream.try_write_vectored(&slices[..count]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                sent => sent?,
            };
            unwritten.sent(sent);
            // Others have their turn before a client that takes much has the rest.
            if sent > UNWRITTEN {
                return Ok(());
            }
        }
    }
}

/// Adds bytes to those that wait to be handled.
fn keep(pending: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    pending.try_reserve(bytes.len()).map_err(|_| io::Error::other(Refused::Memory))?;
    pending.extend_from_slice(bytes);
    Ok(())
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
    place: Place,
    /// Whether its place knows that it has asked for something.
    is_known: bool,
}

impl Serve {
    pub(super) fn new(shared: Arc<Shared>, place: Place, stream: TcpStream) -> Self {
        let id = place.id();
        let client =
            Client { id, pending: Vec::new(), scan: Scan::default(), unwritten: None, has_asked: false };
        Self { shared, stream, client, place, is_known: false }
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
        let Self { shared, stream, client, place, is_known } = self.get_mut();
        loop {
            let read = match locked(&shared.clients).turn(stream, client, context.waker()) {
                Ok(read) => read,
                Err(error) => return Poll::Ready(error),
            };
            if client.has_asked && !std::mem::replace(is_known, true) {
                place.asked();
            }
            let possible = if client.unwritten.is_some() {
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use ice_proto::rendezvous::KeepAlive;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::store::codec::encode;

    /// A client of a store, and the other end.
    async fn client(shared: &Arc<Shared>, id: Connection) -> (TcpStream, tokio::task::JoinHandle<io::Error>) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (other, _) = listener.accept().await.unwrap();
        let place = Place::new(Arc::clone(shared), id, [127, 0, 0, 1].into());
        (stream, tokio::spawn(Serve::new(Arc::clone(shared), place, other)))
    }

    #[tokio::test]
    async fn connection_with_the_most_bytes_ends_if_all_together_hold_too_much() {
        let shared = Arc::new(Shared::new(None, KeepAlive::default()).unwrap());
        locked(&shared.clients).max_buffered = 8 << 20;
        let (mut greedy, greedy_ended) = client(&shared, 1).await;
        let (mut rank, _serve) = client(&shared, 2).await;
        let mut request = Vec::new();
        encode(&Request::Set(b"k", &vec![7; 7 << 20]), &mut request);
        // Most of a request that is not finished.
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
        let value = vec![7; UNWRITTEN];
        let mut set = Vec::new();
        encode(&Request::Set(b"k", &value), &mut set);
        // More bytes than may be held, in requests of which each turn handles one.
        let mut request = Vec::new();
        encode(&Request::MultiGet([&[&b"k"[..]][..], &[&[b'-'; 8 << 10][..]; 2]].concat()), &mut request);
        let requests = (8 << 20) / request.len();
        let write = async {
            writer.write_all(&set).await.unwrap();
            for _ in 0..requests {
                writer.write_all(&request).await.unwrap();
            }
        };
        let read = async {
            let mut answer = vec![0; 8 + value.len() + 8 + 8];
            for number in 0..requests {
                reader.read_exact(&mut answer).await.unwrap_or_else(|error| panic!("{number}: {error}"));
            }
        };
        tokio::join!(write, read);
    }
}
