//! Connections of agents, and the task that owns the coordinator. A single queue orders all of its
//! inputs.

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

use super::slot::ConnectionSlot;
use super::{Shared, locked};
use crate::auth::{self, AuthError};
use crate::channel::Channel;
use crate::coordinator::{Action, Coordinator, Event, Peer, Record, Settings};
use crate::keepalive;
use crate::tls;

/// Maximum of messages queued for one agent. An agent that exceeds it does not read and is dropped.
const MAX_QUEUED_MESSAGES: usize = 4096;
/// Maximum of bytes queued for one agent, in addition to the message being written.
const MAX_QUEUED_BYTES: usize = 64 << 20;

/// The queue to an agent, bounded in messages and in bytes.
pub(super) struct Outgoing {
    sender: mpsc::Sender<Vec<u8>>,
    waiting: Arc<AtomicUsize>,
}

impl Outgoing {
    /// Queues a message. Returns whether there was room.
    fn send(&self, bytes: Vec<u8>) -> bool {
        let length = bytes.len();
        if self.waiting.load(Ordering::Relaxed) > MAX_QUEUED_BYTES {
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
    Message(Peer, ToCoordinator),
    Closed(Peer),
}

/// A record to be written, and the channel that receives whether it was.
#[cfg_attr(not(feature = "etcd"), expect(dead_code, reason = "etcd alone keeps records"))]
pub(crate) struct PendingRecord {
    pub(crate) record: Record,
    pub(crate) acknowledge: oneshot::Sender<bool>,
}

/// State with which a server continues the job of another one, and can be replaced itself.
pub(crate) struct Failover {
    /// Record of the coordinator before it, if there was one.
    pub(crate) record: Option<Record>,
    /// Queue of the records to write. Once it is closed, another server leads or may lead.
    pub(crate) log: mpsc::Sender<PendingRecord>,
}

/// Writes each record before the messages that follow from it are sent.
struct RecordLog {
    sender: mpsc::Sender<PendingRecord>,
    last: Option<Record>,
}

impl RecordLog {
    /// Writes a record unless it equals the last one. Returns whether this server still leads.
    async fn keep(&mut self, record: Record) -> bool {
        if self.last.as_ref().is_some_and(|last| last.differs_only_in_time(&record)) {
            return true;
        }
        let (acknowledge, answer) = oneshot::channel();
        self.last = Some(record.clone());
        self.sender.send(PendingRecord { record, acknowledge }).await.is_ok() && answer.await.unwrap_or(false)
    }
}

/// Starts the task that owns the coordinator. When another server takes the lead, the task ends,
/// and with it all connections of agents.
pub(super) fn start(
    settings: Settings,
    failover: Option<Failover>,
    shared: Arc<Shared>,
) -> mpsc::Sender<Input> {
    let (inputs, mut events) = mpsc::channel(1024);
    let (record, log) = failover.map_or((None, None), |failover| (failover.record, Some(failover.log)));
    let before = record.as_ref().map_or(Duration::ZERO, Record::now);
    let coordinator = match record {
        Some(record) => Coordinator::resume(settings, record),
        None => Coordinator::new(settings),
    };
    let log = log.map(|sender| RecordLog { sender, last: None });
    let mut task = CoordinatorTask { coordinator, log, agents: BTreeMap::new(), shared };
    tokio::spawn(async move {
        let start = Instant::now();
        let now = || before + start.elapsed();
        loop {
            let deadline =
                task.coordinator.deadline().map(|deadline| start + deadline.saturating_sub(before));
            let replaced = task.log.as_ref().map(|log| log.sender.clone());
            let continues = tokio::select! {
                input = events.recv() => match input {
                    Some(input) => task.input(now(), input).await,
                    None => false,
                },
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    task.coordinate(now(), Event::Tick).await
                }
                () = closed(replaced) => false,
            };
            if !continues {
                return;
            }
        }
    });
    inputs
}

async fn closed(log: Option<mpsc::Sender<PendingRecord>>) {
    match log {
        Some(log) => log.closed().await,
        None => std::future::pending().await,
    }
}

struct CoordinatorTask {
    coordinator: Coordinator,
    log: Option<RecordLog>,
    agents: BTreeMap<Peer, Outgoing>,
    shared: Arc<Shared>,
}

impl CoordinatorTask {
    /// Handles an input. Returns whether this server still leads.
    async fn input(&mut self, now: Duration, input: Input) -> bool {
        match input {
            Input::Opened(peer, outgoing) => {
                self.shared.count.send_modify(|count| *count += 1);
                self.agents.insert(peer, outgoing);
                true
            }
            Input::Message(peer, message) => self.coordinate(now, Event::Message(peer, message)).await,
            Input::Closed(peer) => {
                self.shared.count.send_modify(|count| *count -= 1);
                self.agents.remove(&peer);
                self.coordinate(now, Event::Lost(peer)).await
            }
        }
    }

    async fn coordinate(&mut self, now: Duration, event: Event) -> bool {
        let actions = self.coordinator.handle(now, event);
        if let Some(log) = &mut self.log
            && !log.keep(self.coordinator.record(now)).await
        {
            return false;
        }
        for action in actions {
            match action {
                Action::Send(peer, message) => {
                    if let ToAgent::RoundStarted(round) = &message {
                        locked(&self.shared.connections).set_world_size(round.world_size as usize);
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

    /// Queues bytes for an agent. If the queue is full the agent is removed; dropping its sender
    /// closes the connection after the queue is written.
    fn send(&mut self, peer: Peer, bytes: Vec<u8>) {
        let Some(outgoing) = self.agents.get(&peer) else { return };
        if !outgoing.send(bytes) {
            tracing::warn!(peer, "an agent that does not read was dropped");
            self.agents.remove(&peer);
        }
    }
}

/// The transport of an agent's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Plain,
    Tls,
}

/// Serves an agent until its connection ends. Calls `on_admitted` once it is authenticated.
pub(super) async fn serve(
    shared: &Shared,
    slot: &ConnectionSlot,
    (mut stream, peer): (TcpStream, SocketAddr),
    transport: Transport,
    coordinator: mpsc::Sender<Input>,
    on_admitted: impl FnOnce(),
) -> io::Result<()> {
    match (transport, &shared.tls) {
        (Transport::Plain, None) => {
            let decoder = admit(shared, peer, &mut stream, &Channel::Plain).await?;
            on_admitted();
            run_session(shared, slot, stream.into_split(), decoder, coordinator).await
        }
        (Transport::Tls, Some(acceptor)) => {
            let inside = async {
                let (mut accepted, channel) =
                    acceptor.accept(stream).await.map_err(AuthError::from).map_err(io::Error::other)?;
                let decoder = admit(shared, peer, accepted.unauthenticated(), &channel).await?;
                on_admitted();
                run_session(shared, slot, tokio::io::split(accepted.authenticated()), decoder, coordinator)
                    .await
            };
            // Boxed: the state of TLS is large, and would be part of the future of every plain
            // connection.
            Box::pin(inside).await
        }
        (Transport::Plain, Some(_)) => {
            shared.log_rejected(peer, "an agent without --rdzv-tls was turned away");
            tls::refuse(stream).await
        }
        (Transport::Tls, None) => {
            shared.log_rejected(peer, "an agent with --rdzv-tls was turned away: this endpoint has no TLS");
            tls::refuse(stream).await
        }
    }
}

/// Authenticates an agent, and allows its host to use the store.
async fn admit(
    shared: &Shared,
    peer: SocketAddr,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    channel: &Channel,
) -> io::Result<Decoder> {
    match auth::admit(stream, shared.token.as_ref(), channel).await {
        Ok(decoder) => {
            shared.allow([peer.ip()]);
            Ok(decoder)
        }
        Err(error @ (AuthError::Io(_) | AuthError::Frame(_) | AuthError::Tls(_))) => {
            Err(io::Error::other(error))
        }
        Err(error) => {
            shared.log_rejected(peer, "an agent without the job's token was turned away");
            Err(io::Error::other(error))
        }
    }
}

async fn run_session(
    shared: &Shared,
    slot: &ConnectionSlot,
    (reader, mut writer): (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    decoder: Decoder,
    coordinator: mpsc::Sender<Input>,
) -> io::Result<()> {
    let id = slot.id();
    let (sender, mut outgoing) = mpsc::channel::<Vec<u8>>(MAX_QUEUED_MESSAGES);
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
        result = read(slot, reader, decoder, shared, &coordinator) => result,
    };
    let _ = coordinator.send(Input::Closed(id)).await;
    result
}

async fn read(
    slot: &ConnectionSlot,
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
                slot.mark_active();
            }
            if let ToCoordinator::Hello(hello) = &mut message {
                // Inserted first, since messages name the first address, and this one is verified.
                hello.addresses.insert(0, slot.address());
                shared.allow(hello.addresses.iter().copied());
            }
            if coordinator.send(Input::Message(slot.id(), message)).await.is_err() {
                return Ok(());
            }
        }
        let read = keepalive::read(shared.keep_alive, &mut reader, &mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..read]);
    }
}

fn invalid(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
