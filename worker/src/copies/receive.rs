//! The holder's end: other ranks bring their copies.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ice_proto::copies::{self, Hello, Kept, MAX_PARTS, checksum};
use ice_proto::frame;

use super::exchange::{Card, Place, Sockets, Token};
use super::{Parcel, Shelf};

/// How long one who connects may take to say who it is, and how many may be about to.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_STRANGERS: usize = 64;

struct Desk {
    token: Token,
    owners: Vec<usize>,
    shelf: Shelf,
    sockets: Arc<Sockets>,
    strangers: AtomicUsize,
}

/// Takes in the copies of these ranks, until the sockets are closed. Returns where.
pub(super) fn listen(
    address: Option<String>,
    owners: Vec<usize>,
    shelf: &Shelf,
    sockets: &Arc<Sockets>,
) -> io::Result<Card> {
    let listener = TcpListener::bind((address.as_deref().unwrap_or("127.0.0.1"), 0))?;
    let mut token = [0; 32];
    getrandom::fill(&mut token).map_err(io::Error::other)?;
    let card = Card::At(listener.local_addr()?, token);
    sockets.add(Place::Desk, listener.try_clone()?.into());
    let desk = Desk {
        token,
        owners,
        shelf: shelf.clone(),
        sockets: Arc::clone(sockets),
        strangers: AtomicUsize::new(0),
    };
    thread::Builder::new().name("ice-copies-desk".into()).spawn(move || Arc::new(desk).open(&listener))?;
    Ok(card)
}

impl Desk {
    fn open(self: Arc<Self>, listener: &TcpListener) {
        while !self.sockets.are_closed() {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::debug!(%error, "no more copies are taken in"),
            };
            if self.strangers.fetch_add(1, Ordering::Relaxed) >= MAX_STRANGERS {
                self.strangers.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let desk = Arc::clone(&self);
            let serve = move || {
                let known = desk.identify(&stream);
                desk.strangers.fetch_sub(1, Ordering::Relaxed);
                let served = known.and_then(|owner| desk.serve(&stream, owner));
                if let Err(error) = served {
                    tracing::debug!(%error, "a rank brings no more copies");
                }
                // There is a second handle to it, which would keep it open.
                let _ = stream.shutdown(Shutdown::Both);
            };
            if let Err(error) = thread::Builder::new().name("ice-copies-in".into()).spawn(serve) {
                self.strangers.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!(%error, "a copy cannot be taken in");
            }
        }
    }

    fn identify(&self, mut stream: &TcpStream) -> io::Result<usize> {
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        let hello: Hello = frame::read(&mut stream)?;
        // Each byte is looked at, so that time tells nothing.
        let differs = hello.token.iter().zip(self.token).fold(0, |all, (theirs, own)| all | (theirs ^ own));
        let owner = hello.owner as usize;
        if differs != 0 || !self.owners.contains(&owner) {
            return Err(io::Error::other("a stranger"));
        }
        stream.set_read_timeout(None)?;
        self.sockets.add(Place::In(owner), stream.try_clone()?.into());
        Ok(owner)
    }

    fn serve(&self, mut stream: &TcpStream, owner: usize) -> io::Result<()> {
        loop {
            let announced: copies::Parcel = frame::read(&mut stream)?;
            if announced.owner as usize != owner || announced.parts.len() > MAX_PARTS {
                return Err(io::Error::other(format!("rank {owner} brings what is not its own")));
            }
            // The one that this replaces gives its memory.
            let old = self.shelf.give_up(owner, announced.whole);
            let mut memory: Vec<Vec<u8>> =
                old.into_iter().flat_map(|parcel| parcel.parts).map(|(_, bytes)| bytes).collect();
            memory.sort_by_key(Vec::capacity);
            let mut parts = Vec::new();
            for part in announced.parts {
                let mut bytes = take_fitting(&mut memory, part.bytes);
                // Grows with what comes, not with what was announced.
                stream.take(part.bytes).read_to_end(&mut bytes)?;
                if bytes.len() as u64 != part.bytes || checksum(&bytes) != part.crc32c {
                    return Err(io::Error::other(format!("`{}` was damaged on its way", part.name)));
                }
                parts.push((part.name, bytes));
            }
            let (number, of, step) = (announced.number, announced.of as usize, announced.step);
            self.shelf.put(Arc::new(Parcel { number, owner, of, step, parts }));
            stream.write_all(&frame::encode(&Kept { number }).map_err(io::Error::other)?)?;
        }
    }
}

/// The smallest of these in which so many bytes have room, emptied; or new memory. They are in order of their capacity.
fn take_fitting(memory: &mut Vec<Vec<u8>>, bytes: u64) -> Vec<u8> {
    match memory.iter().position(|free| free.capacity() as u64 >= bytes) {
        Some(at) => {
            let mut free = memory.remove(at);
            free.clear();
            free
        }
        None => Vec::new(),
    }
}
