//! Who comes: connections are strangers until they have shown what they are.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ice_proto::frame;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::agents::{self, Input, Speech};
use super::connections::{self, Evicted};
use super::{Shared, clients, locked};
use crate::store::codec::{VALIDATE, VALIDATION_MAGIC};
use crate::tls;

/// How long a stranger has to show what it is.
const PATIENCE: Duration = Duration::from_secs(30);
/// Descriptors that are left to the rest of the process, where there are so many.
const RESERVED: u64 = 512;

/// How many connections there may be at a time.
pub(super) fn room() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    usize::try_from(soft.saturating_sub(RESERVED).max(soft / 2)).unwrap_or(usize::MAX)
}

/// Ends connections that make room for others, and says so if there is something to say.
fn end(evicted: impl IntoIterator<Item = Evicted<AbortHandle>>) {
    for Evicted { handle, message } in evicted {
        handle.abort();
        if let Some(message) = message {
            tracing::warn!("{message}");
        }
    }
}

/// The place of a connection, until this is dropped.
pub(super) struct Place {
    shared: Arc<Shared>,
    id: u64,
    address: IpAddr,
}

impl Place {
    pub(super) fn new(shared: Arc<Shared>, id: u64, address: IpAddr) -> Self {
        Self { shared, id, address: address.to_canonical() }
    }

    /// Where the connection comes from.
    pub(super) fn address(&self) -> IpAddr {
        self.address
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    fn becomes(&self, kind: connections::Kind) {
        end(locked(&self.shared.connections).becomes(self.id, kind));
    }

    /// The connection has asked for something, so that it makes no room for others.
    pub(super) fn asked(&self) {
        locked(&self.shared.connections).asked(self.id);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        locked(&self.shared.connections).remove(self.id);
    }
}

pub(super) struct Door {
    shared: Arc<Shared>,
    coordinator: mpsc::Sender<Input>,
    next: AtomicU64,
}

impl Door {
    pub(super) fn new(shared: Arc<Shared>, coordinator: mpsc::Sender<Input>) -> Self {
        Self { shared, coordinator, next: AtomicU64::new(0) }
    }

    /// Lets in who comes, for ever.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut failed = false;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    failed = false;
                    self.open(stream, peer);
                }
                Err(error) => {
                    // Once for all attempts until one succeeds.
                    if !std::mem::replace(&mut failed, true) {
                        tracing::warn!(%error, "a connection could not be accepted: trying again");
                    }
                    // Out of descriptors: idle connections make room, others get the time to end.
                    end(locked(&self.shared.connections).make_room());
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    fn open(&self, mut stream: TcpStream, peer: SocketAddr) {
        let _ = stream.set_nodelay(true);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (shared, coordinator) = (Arc::clone(&self.shared), self.coordinator.clone());
        let task = tokio::spawn(async move {
            let place = Place::new(Arc::clone(&shared), id, peer.ip());
            // Boxed, since they are large, and most connections are ranks'.
            let meeting = Box::pin(timeout(PATIENCE, meet(&mut stream, peer, &shared)));
            let result = match meeting.await {
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
                Ok(Err(error)) => Err(error),
                Ok(Ok(Kind::Rank)) => {
                    place.becomes(connections::Kind::Rank);
                    let error = clients::Serve::new(shared, place, stream).await;
                    if clients::is_fault(&error) {
                        tracing::error!(%peer, %error, "the host ended a connection to the store");
                    }
                    Err(error)
                }
                Ok(Ok(Kind::Agent(speech))) => {
                    let known = || place.becomes(connections::Kind::Agent);
                    let agent = agents::serve(&shared, &place, (stream, peer), speech, coordinator, known);
                    Box::pin(agent).await
                }
            };
            if let Err(error) = result {
                tracing::debug!(%peer, %error, "a connection was ended");
            }
        });
        let now = Instant::now();
        // The task has not run yet: the host has one thread, and this is its turn.
        end(locked(&self.shared.connections).add(id, peer.ip(), task.abort_handle(), now));
    }
}

enum Kind {
    Agent(Speech),
    /// It has validated.
    Rank,
}

/// Finds out what a stranger is.
async fn meet(stream: &mut TcpStream, peer: SocketAddr, shared: &Shared) -> io::Result<Kind> {
    let mut first = [0; 5];
    stream.peek(&mut first[..1]).await?;
    match first[0] {
        byte if byte == frame::MAGIC[0] => return Ok(Kind::Agent(Speech::Plain)),
        tls::HANDSHAKE => return Ok(Kind::Agent(Speech::Tls)),
        VALIDATE => stream.read_exact(&mut first).await?,
        _ => return Err(io::Error::other("neither an agent nor a rank")),
    };
    if first[1..] != VALIDATION_MAGIC.to_le_bytes() {
        return Err(io::Error::other("neither an agent nor a rank"));
    }
    if !shared.is_guest(peer.ip()) {
        shared.turned_away(peer, "a client of the store was turned away: no agent with the token runs there");
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(Kind::Rank)
}

#[cfg(feature = "tls")]
#[cfg(test)]
mod tests {
    use ice_proto::rendezvous::{KeepAlive, ToCoordinator};
    use tokio::io::{AsyncRead, AsyncWriteExt};
    use tokio::net::TcpSocket;

    use super::*;
    use crate::auth::{Channel, Token, greet};
    use crate::host::connections::Connections;
    use crate::store::codec::{Request, encode};

    /// A door for agents with a token and TLS, where it is, and what comes in.
    async fn door() -> (Arc<Door>, SocketAddr, mpsc::Receiver<Input>) {
        let shared = Shared::new(Some(token()), KeepAlive::default()).unwrap();
        let (coordinator, inputs) = mpsc::channel(16);
        let door = Arc::new(Door::new(Arc::new(shared), coordinator));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Arc::clone(&door).serve(listener));
        (door, address, inputs)
    }

    fn token() -> Token {
        Token::new("sixteen characters").unwrap().over_tls()
    }

    fn strangers(door: &Door) -> usize {
        locked(&door.shared.connections).count(connections::Kind::Stranger)
    }

    #[tokio::test]
    async fn an_agent_is_a_stranger_until_it_has_shown_that_it_knows_the_token() {
        for (token, is_known) in [(Token::new("eighteen characters").unwrap(), false), (token(), true)] {
            let (door, address, mut inputs) = door().await;
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut stream, channel) = tls::connect(stream).await.unwrap();
            assert_eq!(greet(&mut stream, Some(&token), &channel).await.is_ok(), is_known);
            if is_known {
                assert!(matches!(inputs.recv().await, Some(Input::Opened(..))));
            }
            assert_eq!(strangers(&door), usize::from(!is_known));
        }
    }

    /// Connects from an address of this host.
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
    async fn idle_connections_keep_no_agent_and_no_rank_out() {
        const FLOOD: [u8; 4] = [127, 0, 0, 9];
        let shared = Arc::new(Shared::new(None, KeepAlive::default()).unwrap());
        *locked(&shared.connections) = Connections::new(64);
        let (coordinator, mut inputs) = mpsc::channel(16);
        let door = Arc::new(Door::new(Arc::clone(&shared), coordinator));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Arc::clone(&door).serve(listener));
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
        // From another address, and from that of the flood itself.
        for from in [[127, 0, 0, 1], FLOOD] {
            let mut agent = connect_from(from, address).await;
            greet(&mut agent, None, &Channel::Plain).await.unwrap();
            let Some(Input::Opened(_, outgoing)) = inputs.recv().await else { panic!("no agent") };
            agent.write_all(&frame::encode(&ToCoordinator::Join).unwrap()).await.unwrap();
            assert!(matches!(inputs.recv().await, Some(Input::Said(..))));
            let mut rank = connect_from(from, address).await;
            rank.write_all(&get).await.unwrap();
            rank.read_exact(&mut [0; 12]).await.unwrap();
            all.push(flood().await);
            known.push((agent, rank, outgoing));
        }
        // They stay, too.
        for (agent, rank, _) in &mut known {
            rank.write_all(&get[5..]).await.unwrap();
            rank.read_exact(&mut [0; 12]).await.unwrap();
            agent.write_all(&frame::encode(&ToCoordinator::Join).unwrap()).await.unwrap();
            assert!(matches!(inputs.recv().await, Some(Input::Said(..))));
        }
    }

    #[tokio::test]
    async fn who_goes_no_further_is_sent_away() {
        let (door, address, _inputs) = door().await;
        let half = TcpStream::connect(address).await.unwrap();
        half.try_write(&[tls::HANDSHAKE, 3, 1, 0, 200, 1]).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let (whole, _) = tls::connect(stream).await.unwrap();
        assert_eq!(strangers(&door), 2);
        // From here on time passes as soon as nobody does anything.
        tokio::time::pause();
        for mut stream in [Box::new(half) as Box<dyn AsyncRead + Unpin>, Box::new(whole)] {
            let _ = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("it is still there");
        }
        assert_eq!(strangers(&door), 0);
    }

    #[tokio::test]
    async fn one_that_asks_in_another_way_is_answered_and_sent_away() {
        let (door, address, _inputs) = door().await;
        let mut streams = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"ICE\x01").await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            assert!(tls::is_refusal(answer.first_chunk().unwrap()), "{answer:?}");
            streams.push(stream);
        }
        // One does not stop talking, and one stays and is silent.
        while streams[0].write_all(&[0; 512]).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(strangers(&door), 1);
        tokio::time::pause();
        sleep(PATIENCE).await;
        assert_eq!(strangers(&door), 0);
    }
}
