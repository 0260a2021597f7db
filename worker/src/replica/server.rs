//! The holder's end of replication: a server that receives the replicas of other ranks.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ice_proto::frame;
use ice_proto::replica::{self, MAX_PARTS, OwnerHello, ReplicaStored, checksum};

use super::endpoint::{PeerEndpoint, Token};
use super::sockets::{SocketSlot, Sockets};
use super::{ReplicaStore, ShardReplica};

/// Timeout of a connection's first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_PENDING: usize = 64;

struct ReplicaServer {
    token: Token,
    owners: Vec<usize>,
    replicas: ReplicaStore,
    sockets: Arc<Sockets>,
    pending: AtomicUsize,
}

/// Starts a thread that receives the replicas of these ranks until the sockets are closed. Returns
/// its address.
pub(super) fn listen(
    address: Option<String>,
    owners: Vec<usize>,
    replicas: &ReplicaStore,
    sockets: &Arc<Sockets>,
) -> io::Result<PeerEndpoint> {
    let listener = TcpListener::bind((address.as_deref().unwrap_or("127.0.0.1"), 0))?;
    let mut token = [0; 32];
    getrandom::fill(&mut token).map_err(io::Error::other)?;
    let endpoint = PeerEndpoint::Reachable(listener.local_addr()?, token);
    sockets.add(SocketSlot::Listen, listener.try_clone()?.into());
    let server = ReplicaServer {
        token,
        owners,
        replicas: replicas.clone(),
        sockets: Arc::clone(sockets),
        pending: AtomicUsize::new(0),
    };
    thread::Builder::new().name("ice-copies-desk".into()).spawn(move || Arc::new(server).open(&listener))?;
    Ok(endpoint)
}

impl ReplicaServer {
    fn open(self: Arc<Self>, listener: &TcpListener) {
        while !self.sockets.are_closed() {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::debug!(%error, "no more copies are taken in"),
            };
            if self.pending.fetch_add(1, Ordering::Relaxed) >= MAX_PENDING {
                self.pending.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let server = Arc::clone(&self);
            let serve = move || {
                let identified = server.identify(&stream);
                server.pending.fetch_sub(1, Ordering::Relaxed);
                let served = identified.and_then(|owner| server.serve(&stream, owner));
                if let Err(error) = served {
                    tracing::debug!(%error, "a rank brings no more copies");
                }
                // `sockets` has a second handle, which would keep the connection open.
                let _ = stream.shutdown(Shutdown::Both);
            };
            if let Err(error) = thread::Builder::new().name("ice-copies-in".into()).spawn(serve) {
                self.pending.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!(%error, "a copy cannot be taken in");
            }
        }
    }

    fn identify(&self, mut stream: &TcpStream) -> io::Result<usize> {
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        let hello: OwnerHello = frame::read(&mut stream)?;
        // Compares in constant time.
        let differs = hello.token.iter().zip(self.token).fold(0, |all, (theirs, own)| all | (theirs ^ own));
        let owner = hello.owner as usize;
        if differs != 0 || !self.owners.contains(&owner) {
            return Err(io::Error::other("a stranger"));
        }
        stream.set_read_timeout(None)?;
        self.sockets.add(SocketSlot::Incoming(owner), stream.try_clone()?.into());
        Ok(owner)
    }

    fn serve(&self, mut stream: &TcpStream, owner: usize) -> io::Result<()> {
        loop {
            let announced: replica::ReplicaHeader = frame::read(&mut stream)?;
            if announced.owner as usize != owner || announced.parts.len() > MAX_PARTS {
                return Err(io::Error::other(format!("rank {owner} brings what is not its own")));
            }
            // The buffers of the replaced replica are reused.
            let old = self.replicas.release(owner, announced.whole);
            let mut memory: Vec<Vec<u8>> =
                old.into_iter().flat_map(|replica| replica.parts).map(|(_, bytes)| bytes).collect();
            memory.sort_by_key(Vec::capacity);
            let mut parts = Vec::new();
            for part in announced.parts {
                let mut bytes = take_fitting(&mut memory, part.bytes);
                // The buffer grows with the received bytes, and not to the announced length.
                stream.take(part.bytes).read_to_end(&mut bytes)?;
                if bytes.len() as u64 != part.bytes || checksum(&bytes) != part.crc32c {
                    return Err(io::Error::other(format!("`{}` was damaged on its way", part.name)));
                }
                parts.push((part.name, bytes));
            }
            let (number, of, step) = (announced.number, announced.of as usize, announced.step);
            self.replicas.put(Arc::new(ShardReplica { number, owner, of, step, parts }));
            stream.write_all(&frame::encode(&ReplicaStored { number }).map_err(io::Error::other)?)?;
        }
    }
}

/// Takes the smallest buffer with room for this many bytes, emptied, or a new one. `memory` is
/// sorted by capacity.
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
