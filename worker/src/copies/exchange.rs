use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ice_c10d::Store;
use ice_proto::copies::{self, Hello, Kept, Part};
use ice_proto::frame;
use rustix::net::Shutdown;

use super::{Parcel, Shelf, receive};
use crate::{Error, Worker};

/// How long a holder may take to answer a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// What proves that somebody is a rank of the round.
pub(super) type Token = [u8; 32];

/// The way of the copies in one round. Ends with the round, or when it is dropped.
pub struct Exchange {
    wanted: mpsc::Sender<(Arc<Parcel>, Option<u64>)>,
    progress: Arc<Progress>,
    sockets: Arc<Sockets>,
}

impl Exchange {
    /// Opens this rank's ends: one for the copies that it holds, which go onto `shelf`, and one to the holder of its own. Collective;
    /// `holders` says for each rank who holds its copies, and no rank holds its own.
    ///
    /// # Errors
    /// [`Error::Collective`] where the store cannot be reached.
    pub fn open(worker: &Worker, holders: &[usize], shelf: &Shelf) -> Result<Self, Error> {
        let store = worker.store().ok_or(Error::RoundOver)?;
        let exchange = Self::between(&store, worker.local_address(), worker.rank(), holders, shelf)?;
        let sockets = Arc::clone(&exchange.sockets);
        worker.link().cut_with_round(move || sockets.close());
        Ok(exchange)
    }

    pub(super) fn between(
        store: &Store,
        address: Option<String>,
        own: usize,
        holders: &[usize],
        shelf: &Shelf,
    ) -> Result<Self, Error> {
        let sockets = Arc::new(Sockets::default());
        let owners: Vec<usize> = (0..holders.len()).filter(|&rank| holders[rank] == own).collect();
        let listening = receive::listen(address, owners, shelf, &sockets);
        let card = listening.unwrap_or_else(|error| Card::Nobody(error.to_string()));
        let met = meet(store, own, holders[own], &card);
        let way =
            met.map_err(|source| Error::Collective { doing: "cannot meet for copies".into(), source })?;
        let (wanted, parcels) = mpsc::channel();
        let progress = Arc::new(Progress::default());
        let sender = Sender { own, holder: holders[own], way, sockets: Arc::clone(&sockets), stream: None };
        let told = Arc::clone(&progress);
        let spawned =
            thread::Builder::new().name("ice-copies".into()).spawn(move || sender.run(parcels, &told));
        spawned.map_err(|source| Error::Link { source })?;
        Ok(Self { wanted, progress, sockets })
    }

    /// Sends a copy on its way. `whole` is the last one that is known to be whole on all ranks, which the holder keeps beside this.
    pub fn send(&self, parcel: Arc<Parcel>, whole: Option<u64>) {
        let mut state = self.progress.lock();
        state.under_way = true;
        state.failed = None;
        drop(state);
        if self.wanted.send((parcel, whole)).is_err() {
            self.progress.done(Err("the thread that sends copies is gone".into()));
        }
    }

    /// Waits until what was sent last is in the holder's memory.
    ///
    /// # Errors
    /// Why it is not.
    pub fn wait(&self) -> Result<(), String> {
        let under_way = |state: &mut State| state.under_way;
        let state = self.progress.changed.wait_while(self.progress.lock(), under_way);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state.failed.clone().map_or(Ok(()), Err)
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.sockets.close();
    }
}

/// Where a holder is to be found, as the store has it.
pub(super) enum Card {
    At(SocketAddr, Token),
    /// It cannot be reached, and says why.
    Nobody(String),
}

impl Card {
    fn write(&self) -> String {
        match self {
            Self::At(address, token) => {
                let token: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{address} {token}")
            }
            Self::Nobody(problem) => format!("- {problem}"),
        }
    }

    fn read(text: &str) -> Self {
        let parse = || {
            let (address, token) = text.split_once(' ')?;
            let byte = |at: usize| u8::from_str_radix(token.get(2 * at..2 * at + 2)?, 16).ok();
            let bytes: Vec<u8> = (0..32).map(byte).collect::<Option<_>>()?;
            Some(Self::At(address.parse().ok()?, bytes.try_into().ok()?))
        };
        parse().unwrap_or_else(|| Self::Nobody(text.trim_start_matches("- ").into()))
    }
}

/// Leaves word of where this rank is to be found, and looks up its holder.
fn meet(store: &Store, own: usize, holder: usize, card: &Card) -> Result<Card, ice_c10d::Error> {
    let key = |rank: usize| format!("copies/{rank}");
    store.set(&key(own), card.write().as_bytes())?;
    Ok(Card::read(&String::from_utf8_lossy(&store.get(&key(holder))?)))
}

/// How far the copies of this rank have come.
#[derive(Default)]
struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    under_way: bool,
    failed: Option<String>,
}

impl Progress {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, outcome: Result<(), String>) {
        let mut state = self.lock();
        state.under_way = false;
        state.failed = outcome.err();
        drop(state);
        self.changed.notify_all();
    }
}

/// Brings copies to their holder.
struct Sender {
    own: usize,
    holder: usize,
    way: Card,
    sockets: Arc<Sockets>,
    stream: Option<TcpStream>,
}

impl Sender {
    fn run(mut self, parcels: mpsc::Receiver<(Arc<Parcel>, Option<u64>)>, progress: &Progress) {
        for (parcel, whole) in parcels {
            let outcome = self.bring(&parcel, whole);
            if outcome.is_err() {
                self.sockets.remove(Place::Out);
            }
            // Before anybody hears of it, so that its memory can be used again.
            drop(parcel);
            progress.done(outcome.map_err(|error| {
                let at = match &self.way {
                    Card::At(address, _) => format!(" at {address}"),
                    Card::Nobody(_) => String::new(),
                };
                format!("rank {}{at} cannot be given rank {}'s copy: {error}", self.holder, self.own)
            }));
        }
    }

    fn bring(&mut self, parcel: &Parcel, whole: Option<u64>) -> io::Result<()> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        let mut writing = &stream;
        let parts = parcel.parts.iter().map(|(name, bytes)| Part {
            name: name.clone(),
            bytes: bytes.len() as u64,
            crc32c: copies::checksum(bytes),
        });
        let announced = copies::Parcel {
            number: parcel.number,
            whole,
            owner: parcel.owner as u32,
            of: parcel.of as u32,
            step: parcel.step,
            parts: parts.collect(),
        };
        writing.write_all(&frame::encode(&announced).map_err(io::Error::other)?)?;
        for (_, bytes) in &parcel.parts {
            writing.write_all(bytes)?;
        }
        let kept: Kept = frame::read(&mut &stream)?;
        if kept.number != parcel.number {
            return Err(io::Error::other(format!(
                "it has kept copy {} instead of {}",
                kept.number, parcel.number
            )));
        }
        self.stream = Some(stream);
        Ok(())
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let (address, token) = match &self.way {
            Card::At(address, token) => (address, token),
            Card::Nobody(problem) => return Err(io::Error::other(problem.clone())),
        };
        let stream = TcpStream::connect_timeout(address, CONNECT_TIMEOUT)?;
        stream.set_nodelay(true)?;
        self.sockets.add(Place::Out, stream.try_clone()?.into());
        let hello = Hello { token: *token, owner: self.own as u32 };
        (&stream).write_all(&frame::encode(&hello).map_err(io::Error::other)?)?;
        Ok(stream)
    }
}

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    Desk,
    Out,
    In(usize),
}

/// All sockets of an exchange, so that who waits at one is woken when it ends.
#[derive(Default)]
pub(super) struct Sockets(Mutex<Open>);

#[derive(Default)]
struct Open {
    closed: bool,
    sockets: BTreeMap<Place, OwnedFd>,
}

impl Sockets {
    /// Takes note of a socket, in the place of another.
    pub(super) fn add(&self, place: Place, socket: OwnedFd) {
        let mut open = self.lock();
        let old = if open.closed { Some(socket) } else { open.sockets.insert(place, socket) };
        old.iter().for_each(shut);
    }

    /// Ends the one in this place.
    fn remove(&self, place: Place) {
        self.lock().sockets.remove(&place).iter().for_each(shut);
    }

    pub(super) fn are_closed(&self) -> bool {
        self.lock().closed
    }

    fn close(&self) {
        let mut open = self.lock();
        open.closed = true;
        std::mem::take(&mut open.sockets).values().for_each(shut);
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shut(socket: &OwnedFd) {
    // One that its peer has ended is no concern any more.
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}
