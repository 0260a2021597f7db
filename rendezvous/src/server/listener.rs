//! Accepts connections and finds out their protocol.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ice_proto::frame;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::agents::{self, Input, Transport};
use super::connections;
use super::slot::{ConnectionSlot, close_evicted};
use super::{Shared, clients, locked};
use crate::store::codec::{VALIDATE, VALIDATION_MAGIC};
use crate::tls;

/// Time that a connection has to show its protocol.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// File descriptors that are reserved for the rest of the process.
const RESERVED_DESCRIPTORS: u64 = 512;

/// Returns the maximum of connections, from the limit of file descriptors.
pub(super) fn max_connections() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    usize::try_from(soft.saturating_sub(RESERVED_DESCRIPTORS).max(soft / 2)).unwrap_or(usize::MAX)
}

pub(super) struct Listener {
    shared: Arc<Shared>,
    coordinator: mpsc::Sender<Input>,
    next: AtomicU64,
}

impl Listener {
    pub(super) fn new(shared: Arc<Shared>, coordinator: mpsc::Sender<Input>) -> Self {
        Self { shared, coordinator, next: AtomicU64::new(0) }
    }

    /// Accepts connections until the task is aborted.
    pub(super) async fn serve(self: Arc<Self>, socket: TcpListener) {
        let mut failed = false;
        loop {
            match socket.accept().await {
                Ok((stream, peer)) => {
                    failed = false;
                    self.accept(stream, peer);
                }
                Err(error) => {
                    // Logged once until an attempt succeeds.
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!(%error, "a connection could not be accepted: trying again");
                    }
                    // Probably out of file descriptors: an idle connection is closed, and active
                    // ones get time to end.
                    close_evicted(locked(&self.shared.connections).make_room());
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    fn accept(&self, mut stream: TcpStream, peer: SocketAddr) {
        let _ = stream.set_nodelay(true);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (shared, coordinator) = (Arc::clone(&self.shared), self.coordinator.clone());
        let task = tokio::spawn(async move {
            let slot = ConnectionSlot::new(Arc::clone(&shared), id, peer.ip());
            // Boxed: these futures are large, and most connections are those of ranks.
            let sniffing = Box::pin(timeout(HANDSHAKE_TIMEOUT, sniff_protocol(&mut stream, peer, &shared)));
            let result = match sniffing.await {
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
                Ok(Err(error)) => Err(error),
                Ok(Ok(Protocol::Store)) => {
                    slot.becomes(connections::Kind::Rank);
                    let error = clients::StoreConnection::new(shared, slot, stream).await;
                    if clients::is_fault(&error) {
                        tracing::error!(%peer, %error, "the host ended a connection to the store");
                    }
                    Err(error)
                }
                Ok(Ok(Protocol::Agent(transport))) => {
                    let known = || slot.becomes(connections::Kind::Agent);
                    let agent = agents::serve(&shared, &slot, (stream, peer), transport, coordinator, known);
                    Box::pin(agent).await
                }
            };
            if let Err(error) = result {
                tracing::debug!(%peer, %error, "a connection was ended");
            }
        });
        let now = Instant::now();
        // The server has one thread, so the new task runs only after this entry exists.
        close_evicted(locked(&self.shared.connections).add(id, peer.ip(), task.abort_handle(), now));
    }
}

enum Protocol {
    Agent(Transport),
    /// A client of the store that has sent its validation.
    Store,
}

/// Reads the protocol from the first byte, and the validation of a store client.
async fn sniff_protocol(stream: &mut TcpStream, peer: SocketAddr, shared: &Shared) -> io::Result<Protocol> {
    let mut first = [0; 5];
    stream.peek(&mut first[..1]).await?;
    match first[0] {
        byte if byte == frame::MAGIC[0] => return Ok(Protocol::Agent(Transport::Plain)),
        tls::HANDSHAKE => return Ok(Protocol::Agent(Transport::Tls)),
        VALIDATE => stream.read_exact(&mut first).await?,
        _ => return Err(io::Error::other("neither an agent nor a rank")),
    };
    if first[1..] != VALIDATION_MAGIC.to_le_bytes() {
        return Err(io::Error::other("neither an agent nor a rank"));
    }
    if !shared.is_allowed(peer.ip()) {
        shared
            .log_rejected(peer, "a client of the store was turned away: no agent with the token runs there");
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(Protocol::Store)
}

#[cfg(feature = "tls")]
#[cfg(test)]
mod tests {
    use ice_proto::rendezvous::{KeepAlive, ToCoordinator};
    use tokio::io::{AsyncRead, AsyncWriteExt};
    use tokio::net::TcpSocket;

    use super::*;
    use crate::auth::{Token, greet};
    use crate::channel::Channel;
    use crate::server::connections::Connections;
    use crate::store::codec::{Request, encode};

    /// Starts a listener for agents with a token and TLS. Returns it, its address and the
    /// coordinator's inputs.
    async fn listener() -> (Arc<Listener>, SocketAddr, mpsc::Receiver<Input>) {
        let shared = Shared::new(Some(token()), KeepAlive::default()).unwrap();
        let (coordinator, inputs) = mpsc::channel(16);
        let listener = Arc::new(Listener::new(Arc::new(shared), coordinator));
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(Arc::clone(&listener).serve(socket));
        (listener, address, inputs)
    }

    fn token() -> Token {
        Token::new("sixteen characters").unwrap().over_tls()
    }

    fn pending(listener: &Listener) -> usize {
        locked(&listener.shared.connections).count(connections::Kind::Pending)
    }

    #[tokio::test]
    async fn agent_is_pending_until_it_proves_the_token() {
        for (token, is_marked_active) in
            [(Token::new("eighteen characters").unwrap(), false), (token(), true)]
        {
            let (listener, address, mut inputs) = listener().await;
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut stream, channel) = tls::connect(stream).await.unwrap();
            assert_eq!(greet(&mut stream, Some(&token), &channel).await.is_ok(), is_marked_active);
            if is_marked_active {
                assert!(matches!(inputs.recv().await, Some(Input::Opened(..))));
            }
            assert_eq!(pending(&listener), usize::from(!is_marked_active));
        }
    }

    /// Connects from this address of the host.
    async fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(to).await.unwrap()
    }

    fn validate() -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&Request::Validate, &mut bytes);
        bytes
    }

    #[tokio::test]
    async fn idle_connections_block_neither_agents_nor_ranks() {
        const FLOOD: [u8; 4] = [127, 0, 0, 9];
        let shared = Arc::new(Shared::new(None, KeepAlive::default()).unwrap());
        *locked(&shared.connections) = Connections::new(64);
        let (coordinator, mut inputs) = mpsc::channel(16);
        let listener = Arc::new(Listener::new(Arc::clone(&shared), coordinator));
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(Arc::clone(&listener).serve(socket));
        let flood = async || {
            let mut idle = Vec::new();
            for first in [b"".to_vec(), b"I".to_vec(), validate()] {
                for _ in 0..100 {
                    let mut stream = connect_from(FLOOD, address).await;
                    // It may have been ended already.
                    let _ = stream.write_all(&first).await;
                    idle.push(stream);
                }
            }
            idle
        };
        let mut get = validate();
        encode(&Request::Ping(7), &mut get);
        encode(&Request::QueueLen(b"q"), &mut get);
        let mut all = vec![flood().await];
        let mut known = Vec::new();
        // From another address, and from the address of the flood.
        for from in [[127, 0, 0, 1], FLOOD] {
            let mut agent = connect_from(from, address).await;
            greet(&mut agent, None, &Channel::Plain).await.unwrap();
            let Some(Input::Opened(_, outgoing)) = inputs.recv().await else { panic!("no agent") };
            agent.write_all(&frame::encode(&ToCoordinator::Join).unwrap()).await.unwrap();
            assert!(matches!(inputs.recv().await, Some(Input::Message(..))));
            let mut rank = connect_from(from, address).await;
            rank.write_all(&get).await.unwrap();
            rank.read_exact(&mut [0; 12]).await.unwrap();
            all.push(flood().await);
            known.push((agent, rank, outgoing));
        }
        // These connections survive the next floods, too.
        for (agent, rank, _) in &mut known {
            rank.write_all(&get[5..]).await.unwrap();
            rank.read_exact(&mut [0; 12]).await.unwrap();
            agent.write_all(&frame::encode(&ToCoordinator::Join).unwrap()).await.unwrap();
            assert!(matches!(inputs.recv().await, Some(Input::Message(..))));
        }
    }

    #[tokio::test]
    async fn unfinished_handshake_is_closed_after_the_timeout() {
        let (listener, address, _inputs) = listener().await;
        let half = TcpStream::connect(address).await.unwrap();
        half.try_write(&[tls::HANDSHAKE, 3, 1, 0, 200, 1]).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let (whole, _) = tls::connect(stream).await.unwrap();
        assert_eq!(pending(&listener), 2);
        // Paused time advances when all tasks are idle.
        tokio::time::pause();
        for mut stream in [Box::new(half) as Box<dyn AsyncRead + Unpin>, Box::new(whole)] {
            let _ = timeout(HANDSHAKE_TIMEOUT, stream.read_to_end(&mut Vec::new()))
                .await
                .expect("it is still there");
        }
        assert_eq!(pending(&listener), 0);
    }

    #[tokio::test]
    async fn plain_agent_at_a_tls_endpoint_gets_an_alert_and_is_closed() {
        let (listener, address, _inputs) = listener().await;
        let mut streams = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"ICE\x01").await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            assert!(tls::is_refusal(answer.first_chunk().unwrap()), "{answer:?}");
            streams.push(stream);
        }
        // One peer keeps sending, the other stays silent.
        while streams[0].write_all(&[0; 512]).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(pending(&listener), 1);
        tokio::time::pause();
        sleep(HANDSHAKE_TIMEOUT).await;
        assert_eq!(pending(&listener), 0);
    }
}
