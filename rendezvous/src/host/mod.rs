//! One port, two protocols: the coordinator for agents, plain or inside of TLS, and the store for ranks. The first byte of a connection
//! tells.
//!
//! Nothing a stranger sends is held longer than needed: a connection that says nothing is closed, buffers are bounded, and
//! the first bytes that make no sense end it.

mod agents;
mod clients;
mod connections;
mod door;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ice_proto::rendezvous::KeepAlive;
use ice_proto::text::printable;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::Error;
use crate::auth::Token;
use crate::machine::Settings;
use crate::tls::Acceptor;
#[cfg(feature = "etcd")]
pub(crate) use agents::Entry;
pub(crate) use agents::Takeover;
use clients::Clients;
use connections::Connections;
use door::Door;

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: u32 = 4096;

/// Most addresses that are named because their connections are turned away.
const NAMED: usize = 1024;

/// What a host serves.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// Where to listen, all on one port.
    pub addresses: Vec<IpAddr>,
    /// The port; 0 takes a free one.
    pub port: u16,
    /// Identifier of the job.
    pub run_id: String,
    /// How long the nodes may take to come.
    pub join_timeout: Duration,
    /// How long more nodes are waited for once there are enough.
    pub last_call: Duration,
    /// How a silent agent is told from a lost one.
    pub keep_alive: KeepAlive,
    /// What agents must know.
    pub token: Option<Token>,
}

/// The coordinator and the store of a job, served by a thread of their own until this is dropped.
pub struct Host {
    port: u16,
    agents: watch::Receiver<usize>,
    /// Dropped before the thread is waited for.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Host {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there.
            let _ = thread.join();
        }
    }
}

impl Host {
    /// Listens, and serves from then on. Clients can connect once this returns.
    ///
    /// # Errors
    /// [`Error::Bind`] where the address cannot be had.
    pub async fn bind(config: HostConfig) -> Result<Self, Error> {
        let listening = Listening::bind(&config.addresses, config.port)?;
        Self::serve(listening, config, None)
    }

    /// Serves, and goes on where another coordinator was lost.
    pub(crate) fn serve(
        listening: Listening,
        config: HostConfig,
        takeover: Option<Takeover>,
    ) -> Result<Self, Error> {
        let HostConfig { run_id, join_timeout, last_call, keep_alive, token, .. } = config;
        let Listening { port, listeners } = listening;
        let fail = Error::Host;
        // As agents' messages have it once they are read.
        let run_id = printable(&run_id).into_owned();
        let settings = Settings { run_id, join_timeout, last_call, run_stamp: run_stamp() };
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::new(Shared::new(token, keep_alive).map_err(fail)?);
        let agents = shared.count.subscribe();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let serve = move || {
            runtime.block_on(async move {
                let coordinator = agents::start(settings, takeover, Arc::clone(&shared));
                let door = Arc::new(Door::new(shared, coordinator));
                for listener in listeners {
                    match TcpListener::from_std(listener) {
                        Ok(listener) => drop(tokio::spawn(Arc::clone(&door).serve(listener))),
                        Err(error) => tracing::error!(%error, "an address is not served"),
                    }
                }
                let _ = stopped.await;
            });
        };
        let thread = thread::Builder::new().name("rendezvous".into()).spawn(serve).map_err(fail)?;
        Ok(Self { port, agents, stop: Some(stop), thread: Some(thread) })
    }

    /// Waits until no agent is connected any more.
    pub async fn deserted(&self) {
        let mut agents = self.agents.clone();
        // An error means that the thread has ended, and with it all connections.
        let _ = agents.wait_for(|count| *count == 0).await;
    }

    /// The port that it listens on.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// What all connections of a host have in common.
struct Shared {
    clients: Mutex<Clients>,
    /// Each with what ends it. Never locked together with `clients`.
    connections: Mutex<Connections<AbortHandle>>,
    /// Where agents that know the token have come from: from there alone the store can be reached. `None` where there is no token.
    guests: Option<Mutex<HashSet<IpAddr>>>,
    token: Option<Token>,
    /// `Some` where agents are heard inside of TLS alone.
    tls: Option<Acceptor>,
    keep_alive: KeepAlive,
    /// How often connections of an address were turned away, and why.
    turned_away: Mutex<HashMap<(&'static str, IpAddr), u64>>,
    /// Agents that are connected.
    count: watch::Sender<usize>,
}

impl Shared {
    fn new(token: Option<Token>, keep_alive: KeepAlive) -> io::Result<Self> {
        let tls = token.as_ref().filter(|token| token.is_over_tls()).map(|_| Acceptor::new()).transpose()?;
        Ok(Self {
            clients: Mutex::new(Clients::new()),
            connections: Mutex::new(Connections::new(door::room())),
            guests: token.as_ref().map(|_| Mutex::default()),
            token,
            tls,
            keep_alive,
            turned_away: Mutex::default(),
            count: watch::channel(0).0,
        })
    }

    /// Whether ranks may come from an address. They cannot show that they know the token; that an agent of the job runs on their host
    /// is all that is known of them.
    fn is_guest(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.guests.as_ref().is_none_or(|guests| address.is_loopback() || locked(guests).contains(&address))
    }

    /// Says that a connection was turned away: for each reason and address at the first time, the tenth, the hundredth. A stranger that
    /// tries again and again does not fill a disk.
    fn turned_away(&self, peer: SocketAddr, why: &'static str) {
        if let Some(times) = self.count_turned_away(peer.ip(), why) {
            tracing::warn!(%peer, times, "{why}");
        }
    }

    /// How often it was, if it is to be said.
    fn count_turned_away(&self, address: IpAddr, why: &'static str) -> Option<u64> {
        let mut counts = locked(&self.turned_away);
        let key = (why, address.to_canonical());
        if counts.len() >= NAMED && !counts.contains_key(&key) {
            return None;
        }
        let times = counts.entry(key).or_default();
        *times += 1;
        is_said(*times).then_some(*times)
    }

    fn welcome(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        if let Some(guests) = &self.guests {
            locked(guests).extend(addresses.into_iter().map(|address| address.to_canonical()));
        }
    }
}

/// Whether an event that happens over and over is said this time: the first, the tenth, the hundredth.
fn is_said(times: u64) -> bool {
    times.checked_ilog10().and_then(|power| 10_u64.checked_pow(power)) == Some(times)
}

/// The lock is held for one step of one thread; what a panic left behind is a whole step or nothing.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Addresses that clients can connect to already, although nobody serves them yet.
pub(crate) struct Listening {
    pub(crate) port: u16,
    listeners: Vec<std::net::TcpListener>,
}

impl Listening {
    /// Listens on all addresses. An address that several names led to, or that went away, is no error while others
    /// can be had.
    pub(crate) fn bind(addresses: &[IpAddr], port: u16) -> Result<Self, Error> {
        let mut listeners = Vec::new();
        let mut common = port;
        let mut failure = None;
        for address in addresses {
            let address = SocketAddr::new(*address, common);
            let listening = listen(address).and_then(|listener| {
                common = listener.local_addr()?.port();
                listener.into_std()
            });
            match listening {
                Ok(listener) => listeners.push(listener),
                // Where one part of the endpoint is taken, all of it is.
                Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                    return Err(Error::Bind { address, source });
                }
                Err(source) => failure = Some(Error::Bind { address, source }),
            }
        }
        match (listeners.is_empty(), failure) {
            (false, _) => Ok(Self { port: common, listeners }),
            (true, Some(error)) => Err(error),
            (true, None) => {
                Err(Error::Host(io::Error::new(io::ErrorKind::NotFound, "no address to listen on")))
            }
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// `<MMDDHHmm>_<random>` in local time.
fn run_stamp() -> String {
    format!("{}_{:08x}", jiff::ZonedDateTime::now().strftime("%m%d%H%M"), random() as u32)
}

/// A number that nobody else has; no secret.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_are_turned_away_over_and_over_are_said_at_powers_of_ten() {
        let shared = Shared::new(None, KeepAlive::default()).unwrap();
        let said = |last: u8, times: u32| -> Vec<u64> {
            let address = IpAddr::from([10, 0, 0, last]);
            (0..times).filter_map(|_| shared.count_turned_away(address, "no token")).collect()
        };
        assert_eq!(said(1, 1234), [1, 10, 100, 1000]);
        // Each address has its first time.
        assert_eq!(said(2, 5), [1]);
        // What is kept for this is bounded.
        for number in 0..2 * NAMED as u32 {
            shared.count_turned_away(std::net::Ipv4Addr::from(number).into(), "no token");
        }
        assert_eq!(locked(&shared.turned_away).len(), NAMED);
        assert_eq!(said(1, 8766), [10_000]);
    }
}
