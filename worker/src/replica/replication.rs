use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ice_c10d::Store;
use ice_proto::frame;
use ice_proto::replica::{self, OwnerHello, ReplicaPart, ReplicaStored};

use super::endpoint::{PeerEndpoint, exchange_endpoints};
use super::sockets::{SocketSlot, Sockets};
use super::{ReplicaStore, ShardReplica, server};
use crate::{Error, Worker};

/// Timeout of connecting to a holder.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Replication in one round. Ends with the round, or on drop.
pub struct Replication {
    queue: mpsc::Sender<(Arc<ShardReplica>, Option<u64>)>,
    progress: Arc<SendProgress>,
    sockets: Arc<Sockets>,
}

impl Replication {
    /// Starts this rank's server, which stores replicas of other ranks in `replicas`, and its
    /// connection to the holder of its own replicas. Collective. `holders` has the holder for each
    /// rank; no rank is its own.
    ///
    /// # Errors
    /// [`Error::Collective`] if the store cannot be reached.
    pub fn open(worker: &Worker, holders: &[usize], replicas: &ReplicaStore) -> Result<Self, Error> {
        let store = worker.store().ok_or(Error::RoundOver)?;
        let replication = Self::with_store(&store, worker.local_address(), worker.rank(), holders, replicas)?;
        let sockets = Arc::clone(&replication.sockets);
        worker.link().on_round_end(move || sockets.close());
        Ok(replication)
    }

    pub(super) fn with_store(
        store: &Store,
        address: Option<String>,
        own: usize,
        holders: &[usize],
        replicas: &ReplicaStore,
    ) -> Result<Self, Error> {
        let sockets = Arc::new(Sockets::default());
        let owners: Vec<usize> = (0..holders.len()).filter(|&rank| holders[rank] == own).collect();
        let listening = server::listen(address, owners, replicas, &sockets);
        let endpoint = listening.unwrap_or_else(|error| PeerEndpoint::Unreachable(error.to_string()));
        let exchanged = exchange_endpoints(store, own, holders[own], &endpoint);
        let peer = exchanged
            .map_err(|source| Error::Collective { doing: "cannot meet for copies".into(), source })?;
        let (queue, queued) = mpsc::channel();
        let progress = Arc::new(SendProgress::default());
        let sender = Sender { own, holder: holders[own], peer, sockets: Arc::clone(&sockets), stream: None };
        let sender_progress = Arc::clone(&progress);
        let spawned = thread::Builder::new()
            .name("ice-copies".into())
            .spawn(move || sender.run(queued, &sender_progress));
        spawned.map_err(|source| Error::Link { source })?;
        Ok(Self { queue, progress, sockets })
    }

    /// Queues a replica for sending. `whole` is the last replica that is known to be complete on
    /// all ranks; the holder keeps it in addition to this one.
    pub fn send(&self, replica: Arc<ShardReplica>, whole: Option<u64>) {
        let mut state = self.progress.lock();
        state.is_sending = true;
        state.failed = None;
        drop(state);
        if self.queue.send((replica, whole)).is_err() {
            self.progress.done(Err("the thread that sends copies is gone".into()));
        }
    }

    /// Waits until the last queued replica is in the holder's memory.
    ///
    /// # Errors
    /// Why sending failed.
    pub fn wait(&self) -> Result<(), String> {
        let is_sending = |state: &mut State| state.is_sending;
        let state = self.progress.changed.wait_while(self.progress.lock(), is_sending);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state.failed.clone().map_or(Ok(()), Err)
    }
}

impl Drop for Replication {
    fn drop(&mut self) {
        self.sockets.close();
    }
}

/// Progress of sending this rank's replicas.
#[derive(Default)]
struct SendProgress {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_sending: bool,
    failed: Option<String>,
}

impl SendProgress {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, outcome: Result<(), String>) {
        let mut state = self.lock();
        state.is_sending = false;
        state.failed = outcome.err();
        drop(state);
        self.changed.notify_all();
    }
}

/// Sends replicas to their holder.
struct Sender {
    own: usize,
    holder: usize,
    peer: PeerEndpoint,
    sockets: Arc<Sockets>,
    stream: Option<TcpStream>,
}

impl Sender {
    fn run(mut self, queued: mpsc::Receiver<(Arc<ShardReplica>, Option<u64>)>, progress: &SendProgress) {
        for (replica, whole) in queued {
            let outcome = self.send_replica(&replica, whole);
            if outcome.is_err() {
                self.sockets.remove(SocketSlot::Outgoing);
            }
            // Dropped before the waiting rank is notified, so that the rank can reuse the memory.
            drop(replica);
            progress.done(outcome.map_err(|error| {
                let at = match &self.peer {
                    PeerEndpoint::Reachable(address, _) => format!(" at {address}"),
                    PeerEndpoint::Unreachable(_) => String::new(),
                };
                format!("rank {}{at} cannot be given rank {}'s copy: {error}", self.holder, self.own)
            }));
        }
    }

    fn send_replica(&mut self, replica: &ShardReplica, whole: Option<u64>) -> io::Result<()> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        let mut writing = &stream;
        let parts = replica.parts.iter().map(|(name, bytes)| ReplicaPart {
            name: name.clone(),
            bytes: bytes.len() as u64,
            crc32c: replica::checksum(bytes),
        });
        let announced = replica::ReplicaHeader {
            number: replica.number,
            whole,
            owner: replica.owner as u32,
            of: replica.of as u32,
            step: replica.step,
            parts: parts.collect(),
        };
        writing.write_all(&frame::encode(&announced).map_err(io::Error::other)?)?;
        for (_, bytes) in &replica.parts {
            writing.write_all(bytes)?;
        }
        let stored: ReplicaStored = frame::read(&mut &stream)?;
        if stored.number != replica.number {
            return Err(io::Error::other(format!(
                "it has kept copy {} instead of {}",
                stored.number, replica.number
            )));
        }
        self.stream = Some(stream);
        Ok(())
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let (address, token) = match &self.peer {
            PeerEndpoint::Reachable(address, token) => (address, token),
            PeerEndpoint::Unreachable(problem) => return Err(io::Error::other(problem.clone())),
        };
        let stream = TcpStream::connect_timeout(address, CONNECT_TIMEOUT)?;
        stream.set_nodelay(true)?;
        self.sockets.add(SocketSlot::Outgoing, stream.try_clone()?.into());
        let hello = OwnerHello { token: *token, owner: self.own as u32 };
        (&stream).write_all(&frame::encode(&hello).map_err(io::Error::other)?)?;
        Ok(stream)
    }
}
