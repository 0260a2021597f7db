//! One port, two protocols: the coordinator for agents and the store for ranks. The first byte of a connection tells.
//!
//! Nothing a stranger sends is held longer than needed: a connection that says nothing is closed, buffers are bounded, and
//! the first bytes that make no sense end it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ice_proto::frame::{self, Decoder, FrameError};
use ice_proto::rendezvous::{ToAgent, ToCoordinator};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use crate::Error;
use crate::alive::{self, KEEP_ALIVE};
use crate::auth::{self, AuthError, Token};
use crate::machine::{Action, Coordinator, Event, Settings};
use crate::store::codec::{self, Request};
use crate::store::state::Store;

/// How long a connection may be silent before its first byte.
const FIRST_BYTE: Duration = Duration::from_secs(30);
/// A rank may wait in the store for as long as it likes.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Messages that wait to be sent to one client; one that does not read is dropped at this many.
const OUTGOING: usize = 4096;
/// Bytes that wait to be sent to one client, beside the message that is on its way.
const OUTGOING_BYTES: usize = 64 << 20;
/// Connections that have not yet said what they are; more are turned away.
const STRANGERS: usize = 16 << 10;
/// Bytes of a request that is not whole yet; more than any client of torch sends.
const MAX_REQUEST: usize = 64 << 20;
const READ_CHUNK: usize = 64 << 10;

/// What a host serves.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Where to listen; port 0 takes a free one.
    pub address: SocketAddr,
    /// Identifier of the job.
    pub run_id: String,
    /// How long the nodes may take to come.
    pub join_timeout: Duration,
    /// How long more nodes are waited for once there are enough.
    pub last_call: Duration,
    /// What agents must know.
    pub token: Option<Token>,
}

/// The coordinator and the store of a job, served by a task of the current runtime until this is dropped.
pub struct Host {
    address: SocketAddr,
    task: JoinHandle<()>,
    agents: watch::Receiver<usize>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Host {
    /// Listens, and serves from then on. Clients can connect once this returns.
    ///
    /// # Errors
    /// [`Error::Bind`] where the address cannot be had.
    pub async fn bind(config: HostConfig) -> Result<Self, Error> {
        let fail = |source| Error::Bind { address: config.address, source };
        let listener = TcpListener::bind(config.address).await.map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let HostConfig { run_id, join_timeout, last_call, token, .. } = config;
        let settings = Settings { run_id, join_timeout, last_call, run_stamp: run_stamp() };
        let (count, agents) = watch::channel(0);
        let task = tokio::spawn(serve(listener, settings, token, count));
        Ok(Self { address, task, agents })
    }

    /// Waits until no agent is connected any more.
    pub async fn deserted(&self) {
        let mut agents = self.agents.clone();
        // An error means that the task has ended, and with it all connections.
        let _ = agents.wait_for(|count| *count == 0).await;
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.address.port()
    }
}

/// `<MMDDHHmm>_<random>` in local time.
fn run_stamp() -> String {
    use std::hash::{BuildHasher, Hasher};
    let random = std::hash::RandomState::new().build_hasher().finish() as u32;
    format!("{}_{random:08x}", jiff::ZonedDateTime::now().strftime("%m%d%H%M"))
}

/// The way to a client. What waits there is bounded in messages and in bytes.
struct Outgoing {
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

enum Input {
    Opened { id: u64, is_agent: bool, sender: Outgoing },
    Agent(u64, ToCoordinator),
    Store(u64, Request),
    Closed { id: u64, is_agent: bool },
}

/// The task that owns both machines. Everything reaches it in one order.
async fn serve(
    listener: TcpListener,
    settings: Settings,
    token: Option<Token>,
    agents: watch::Sender<usize>,
) {
    let start = Instant::now();
    let (inputs, mut events) = mpsc::channel(1024);
    let mut state = State {
        coordinator: Coordinator::new(settings),
        store: Store::new(),
        clients: std::collections::BTreeMap::new(),
        agents,
    };
    let mut next = 0;
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    loop {
        let deadline = state.coordinator.deadline().map(|deadline| start + deadline);
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    let Ok(stranger) = Arc::clone(&strangers).try_acquire_owned() else {
                        tracing::warn!(%peer, "too many connections that say nothing: one was turned away");
                        continue;
                    };
                    next += 1;
                    tokio::spawn(connection(next, stream, peer, inputs.clone(), stranger, token.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Out of descriptors: give others the time to end.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(input) = events.recv() => state.input(start.elapsed(), input),
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                state.coordinate(start.elapsed(), Event::Tick);
            }
        }
    }
}

struct State {
    coordinator: Coordinator,
    store: Store,
    clients: std::collections::BTreeMap<u64, Outgoing>,
    agents: watch::Sender<usize>,
}

impl State {
    fn input(&mut self, now: Duration, input: Input) {
        match input {
            Input::Opened { id, is_agent, sender } => {
                self.agents.send_modify(|count| *count += usize::from(is_agent));
                self.clients.insert(id, sender);
            }
            Input::Agent(id, message) => self.coordinate(now, Event::Message(id, message)),
            Input::Store(id, request) => {
                for (client, reply) in self.store.handle(id, request) {
                    self.send(client, reply);
                }
            }
            Input::Closed { id, is_agent } => {
                self.agents.send_modify(|count| *count -= usize::from(is_agent));
                self.clients.remove(&id);
                self.store.disconnect(id);
                self.coordinate(now, Event::Lost(id));
            }
        }
    }

    fn coordinate(&mut self, now: Duration, event: Event) {
        for action in self.coordinator.handle(now, event) {
            match action {
                Action::Send(peer, message) => match frame::encode(&message) {
                    Ok(frame) => self.send(peer, frame),
                    Err(error) => tracing::error!(%error, "a message to an agent was not sent"),
                },
                Action::Close(peer) => {
                    self.clients.remove(&peer);
                }
                Action::ClearStore => self.store.clear(),
            }
        }
    }

    /// Dropping the sender ends the connection once its queue is through.
    fn send(&mut self, client: u64, bytes: Vec<u8>) {
        let Some(sender) = self.clients.get(&client) else { return };
        if !sender.send(bytes) {
            tracing::warn!(client, "a client that does not read was dropped");
            self.clients.remove(&client);
        }
    }
}

/// Moves the bytes of one connection.
async fn connection(
    id: u64,
    mut stream: TcpStream,
    peer: SocketAddr,
    inputs: mpsc::Sender<Input>,
    stranger: OwnedSemaphorePermit,
    token: Option<Token>,
) {
    let _ = stream.set_nodelay(true);
    let mut first = [0];
    match timeout(FIRST_BYTE, stream.peek(&mut first)).await {
        Ok(Ok(1)) => {}
        _ => return,
    }
    let is_agent = first[0] == frame::MAGIC[0];
    let decoder = match is_agent {
        true => match auth::admit(&mut stream, token.as_ref()).await {
            Ok(decoder) => decoder,
            Err(error @ (AuthError::Io(_) | AuthError::Frame(_))) => {
                return tracing::debug!(%peer, %error, "a stranger went");
            }
            Err(_) => return tracing::warn!(%peer, "an agent without the job's token was turned away"),
        },
        false => Decoder::new(),
    };
    drop(stranger);
    let (reader, mut writer) = stream.into_split();
    let (sender, mut outgoing) = mpsc::channel::<Vec<u8>>(OUTGOING);
    let waiting = Arc::new(AtomicUsize::new(0));
    let sender = Outgoing { sender, waiting: Arc::clone(&waiting) };
    if inputs.send(Input::Opened { id, is_agent, sender }).await.is_err() {
        return;
    }
    let write = async {
        loop {
            match timeout(KEEP_ALIVE, outgoing.recv()).await {
                Ok(Some(bytes)) => {
                    waiting.fetch_sub(bytes.len(), Ordering::Relaxed);
                    writer.write_all(&bytes).await?;
                }
                Ok(None) => return writer.shutdown().await,
                Err(_) if is_agent => {
                    let frame = frame::encode(&ToAgent::KeepAlive).map_err(io::Error::other)?;
                    writer.write_all(&frame).await?;
                }
                Err(_) => {}
            }
        }
    };
    let read = async {
        match is_agent {
            true => read_agent(id, reader, decoder, &inputs).await,
            false => read_store(id, reader, &inputs).await,
        }
    };
    tokio::select! {
        result = write => if let Err(error) = result {
            tracing::debug!(%peer, %error, "a connection broke");
        },
        result = read => if let Err(error) = result {
            tracing::debug!(%peer, %error, "a connection was ended");
        },
    }
    let _ = inputs.send(Input::Closed { id, is_agent }).await;
}

async fn read_agent(
    id: u64,
    mut reader: OwnedReadHalf,
    mut decoder: Decoder,
    inputs: &mpsc::Sender<Input>,
) -> io::Result<()> {
    let mut buffer = vec![0; 4096];
    loop {
        while let Some(message) = decoder.next_message::<ToCoordinator>().map_err(invalid)? {
            if inputs.send(Input::Agent(id, message)).await.is_err() {
                return Ok(());
            }
        }
        let read = alive::read(&mut reader, &mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        decoder.feed(&buffer[..read]);
    }
}

async fn read_store(id: u64, mut reader: OwnedReadHalf, inputs: &mpsc::Sender<Input>) -> io::Result<()> {
    let mut pending: Vec<u8> = Vec::new();
    let mut validated = false;
    loop {
        // Without this a stranger's half request would be waited for.
        if !validated && pending.first().is_some_and(|command| *command != codec::VALIDATE) {
            return Err(io::Error::other("the first request must validate"));
        }
        let mut taken = 0;
        while let Some((request, read)) = codec::decode(&pending[taken..]).map_err(io::Error::other)? {
            taken += read;
            validated = true;
            if inputs.send(Input::Store(id, request)).await.is_err() {
                return Ok(());
            }
        }
        pending.drain(..taken);
        if pending.len() > MAX_REQUEST {
            return Err(io::Error::other("a request is too large"));
        }
        pending.reserve(READ_CHUNK);
        let limit = if validated { FOREVER } else { FIRST_BYTE };
        let read = timeout(limit, reader.read_buf(&mut pending)).await.map_err(io::Error::other)?;
        if read? == 0 {
            return Ok(());
        }
        if pending.is_empty() {
            pending.shrink_to(READ_CHUNK);
        }
    }
}

fn invalid(error: FrameError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
