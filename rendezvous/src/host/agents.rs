//! Connections of agents, and the task that owns the coordinator. Everything reaches it in one order.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ice_proto::frame::{self, Decoder, FrameError};
use ice_proto::rendezvous::{ToAgent, ToCoordinator};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use super::door::Place;
use super::{Shared, locked};
use crate::alive;
use crate::auth::{self, AuthError, Channel};
use crate::machine::{Action, Coordinator, Event, Peer, Record, Settings};
use crate::tls;

/// Messages that wait to be sent to one agent; one that does not read is dropped at this many.
const OUTGOING: usize = 4096;
/// Bytes that wait to be sent to one agent, beside the message that is on its way.
const OUTGOING_BYTES: usize = 64 << 20;

/// The way to an agent. What waits there is bounded in messages and in bytes.
pub(super) struct Outgoing {
    sender: mpsc::Sender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
}

impl Outgoing {
    /// Whether there was room.
    fn send(&self, bytes: Vec<u8>) -> bool {
        let length = bytes.len();
        if self.waiting.load(Ordering::Relaxed) > OUTGOING_BYTES {
            return false;
        }
        self.waiting.fetch_add(length, Ordering::Relaxed);
        self.sender.try_send(bytes).is_ok()
    }
}

#[expect(
    clippy::large_enum_variant,
    reason = "a hello is larger than the rest, and comes once per connection"
)]
pub(super) enum Input {
    Opened(Peer, Outgoing),
    Said(Peer, ToCoordinator),
    Closed(Peer),
}

/// A record that is to be kept, and who wants to know whether it is.
#[cfg_attr(not(feature = "etcd"), expect(dead_code, reason = "etcd alone keeps records"))]
pub(crate) struct Entry {
    pub(crate) record: Record,
    pub(crate) kept: oneshot::Sender<bool>,
}

/// What a host that may be replaced, and may replace another, needs.
pub(crate) struct Takeover {
    /// Where the coordinator before it was.
    pub(crate) record: Option<Record>,
    /// Where records go. Once it is closed, another host has taken over or may.
    pub(crate) ledger: mpsc::Sender<Entry>,
}

/// Keeps records before anybody hears of what is in them.
struct Ledger {
    sender: mpsc::Sender<Entry>,
    last: Option<Record>,
}

impl Ledger {
    /// Whether this host is still the one.
    async fn keep(&mut self, record: Record) -> bool {
        if self.last.as_ref().is_some_and(|last| last.is_like(&record)) {
            return true;
        }
        let (kept, answer) = oneshot::channel();
        self.last = Some(record.clone());
        self.sender.send(Entry { record, kept }).await.is_ok() && answer.await.unwrap_or(false)
    }
}

/// Starts the task that owns the coordinator. It ends, and with it all connections of agents, when another host takes over.
pub(super) fn start(
    settings: Settings,
    takeover: Option<Takeover>,
    shared: Arc<Shared>,
) -> mpsc::Sender<Input> {
    let (inputs, mut events) = mpsc::channel(1024);
    let (record, ledger) = takeover.map_or((None, None), |takeover| (takeover.record, Some(takeover.ledger)));
    let before = record.as_ref().map_or(Duration::ZERO, Record::now);
    let coordinator = match record {
        Some(record) => Coordinator::resume(settings, record),
        None => Coordinator::new(settings),
    };
    let ledger = ledger.map(|sender| Ledger { sender, last: None });
    let mut desk = Desk { coordinator, ledger, agents: BTreeMap::new(), shared };
    tokio::spawn(async move {
        let start = Instant::now();
        let now = || before + start.elapsed();
        loop {
            let deadline =
                desk.coordinator.deadline().map(|deadline| start + deadline.saturating_sub(before));
            let replaced = desk.ledger.as_ref().map(|ledger| ledger.sender.clone());
            let goes_on = tokio::select! {
                input = events.recv() => match input {
                    Some(input) => desk.input(now(), input).await,
                    None => false,
                },
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    desk.coordinate(now(), Event::Tick).await
                }
                () = closed(replaced) => false,
            };
            if !goes_on {
                return;
            }
        }
    });
    inputs
}

async fn closed(ledger: Option<mpsc::Sender<Entry>>) {
    match ledger {
        Some(ledger) => ledger.closed().await,
        None => std::future::pending().await,
    }
}

struct Desk {
    coordinator: Coordinator,
    ledger: Option<Ledger>,
    agents: BTreeMap<Peer, Outgoing>,
    shared: Arc<Shared>,
}

impl Desk {
    /// Whether this host is still the one.
    async fn input(&mut self, now: Duration, input: Input) -> bool {
        match input {
            Input::Opened(peer, outgoing) => {
                self.shared.count.send_modify(|count| *count += 1);
                self.agents.insert(peer, outgoing);
                true
            }
            Input::Said(peer, message) => self.coordinate(now, Event::Message(peer, message)).await,
            Input::Closed(peer) => {
                self.shared.count.send_modify(|count| *count -= 1);
                self.agents.remove(&peer);
                self.coordinate(now, Event::Lost(peer)).await
            }
        }
    }

    async fn coordinate(&mut self, now: Duration, event: Event) -> bool {
        let actions = self.coordinator.handle(now, event);
        if let Some(ledger) = &mut self.ledger
            && !ledger.keep(self.coordinator.record(now)).await
        {
            return false;
        }
        for action in actions {
            match action {
                Action::Send(peer, message) => {
                    if let ToAgent::RoundStarted(round) = &message {
                        locked(&self.shared.connections).round(round.world_size as usize);
                    }
                    match frame::encode(&message) {
                        Ok(frame) => self.send(peer, frame),
                        Err(error) => tracing::error!(%error, "a message to an agent was not sent"),
                    }
                }
                Action::Close(peer) => {
                    self.agents.remove(&peer);
                }
                Action::ClearStore => locked(&self.shared.clients).clear(),
            }
        }
        true
    }

    /// Dropping the sender ends the connection once its queue is through.
    fn send(&mut self, peer: Peer, bytes: Vec<u8>) {
        let Some(outgoing) = self.agents.get(&peer) else { return };
        if !outgoing.send(bytes) {
            tracing::warn!(peer, "an agent that does not read was dropped");
            self.agents.remove(&peer);
        }
    }
}

/// How an agent speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speech {
    Plain,
    Tls,
}

/// Serves an agent until it goes. `known` is called once it has shown that it is one.
pub(super) async fn serve(
    shared: &Shared,
    place: &Place,
    (mut stream, peer): (TcpStream, SocketAddr),
    speech: Speech,
    coordinator: mpsc::Sender<Input>,
    known: impl FnOnce(),
) -> io::Result<()> {
    match (speech, &shared.tls) {
        (Speech::Plain, None) => {
            let decoder = admit(shared, peer, &mut stream, &Channel::Plain).await?;
            known();
            talk(shared, place, stream.into_split(), decoder, coordinator).await
        }
        (Speech::Tls, Some(acceptor)) => {
            let inside = async {
                let (mut accepted, channel) = acceptor.accept(stream).await.map_err(io::Error::other)?;
                let decoder = admit(shared, peer, accepted.stranger(), &channel).await?;
                known();
                talk(shared, place, tokio::io::split(accepted.known()), decoder, coordinator).await
            };
            // The state of TLS is large, and without it nobody is to pay for it.
            Box::pin(inside).await
        }
        (Speech::Plain, Some(_)) => {
            shared.turned_away(peer, "an agent without --rdzv-tls was turned away");
            tls::refuse(stream).await
        }
        (Speech::Tls, None) => {
            shared.turned_away(peer, "an agent with --rdzv-tls was turned away: this endpoint has no TLS");
            tls::refuse(stream).await
        }
    }
}

/// Lets in who knows the token.
async fn admit(
    shared: &Shared,
    peer: SocketAddr,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    channel: &Channel,
) -> io::Result<Decoder> {
    match auth::admit(stream, shared.token.as_ref(), channel).await {
        Ok(decoder) => {
            shared.welcome([peer.ip()]);
            Ok(decoder)
        }
        Err(error @ (AuthError::Io(_) | AuthError::Frame(_) | AuthError::Tls(_))) => {
            Err(io::Error::other(error))
        }
        Err(error) => {
            shared.turned_away(peer, "an agent without the job's token was turned away");
            Err(io::Error::other(error))
        }
    }
}

async fn talk(
    shared: &Shared,
    place: &Place,
    (reader, mut writer): (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    decoder: Decoder,
    coordinator: mpsc::Sender<Input>,
) -> io::Result<()> {
    let id = place.id();
    let (sender, mut outgoing) = mpsc::channel::<Vec<u8>>(OUTGOING);
    let waiting = Arc::new(AtomicUsize::new(0));
    let to_agent = Outgoing { sender, waiting: Arc::clone(&waiting) };
    if coordinator.send(Input::Opened(id, to_agent)).await.is_err() {
        return Ok(());
    }
    let write = async {
        loop {
            match timeout(shared.keep_alive.interval, outgoing.recv()).await {
                Ok(Some(bytes)) => {
                    waiting.fetch_sub(bytes.len(), Ordering::Relaxed);
                    writer.write_all(&bytes).await?;
                    writer.flush().await?;
                }
                Ok(None) => return writer.shutdown().await,
                Err(_) => {
                    let frame = frame::encode(&ToAgent::KeepAlive).map_err(io::Error::other)?;
                    writer.write_all(&frame).await?;
                    writer.flush().await?;
                }
            }
        }
    };
    let result = tokio::select! {
        result = write => result,
        result = read(place, reader, decoder, shared, &coordinator) => result,
    };
    let _ = coordinator.send(Input::Closed(id)).await;
    result
}

async fn read(
    place: &Place,
    mut reader: impl AsyncRead + Unpin,
    mut decoder: Decoder,
    shared: &Shared,
    coordinator: &mpsc::Sender<Input>,
) -> io::Result<()> {
    let mut buffer = vec![0; 4096];
    let mut is_idle = true;
    loop {
        while let Some(mut message) = decoder.next_message::<ToCoordinator>().map_err(invalid)? {
            if message != ToCoordinator::KeepAlive && std::mem::take(&mut is_idle) {
                place.asked();
            }
            if let ToCoordinator::Hello(hello) = &mut message {
                // First, so that messages name the address that is known to be the agent's.
                hello.addresses.insert(0, place.address());
                shared.welcome(hello.addresses.iter().copied());
            }
            if coordinator.send(Input::Said(place.id(), message)).await.is_err() {
                return Ok(());
            }
        }
        let read = alive::read(shared.keep_alive, &mut reader, &mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..read]);
    }
}

fn invalid(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
