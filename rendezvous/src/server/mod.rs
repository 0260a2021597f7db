//! One port for two protocols: the coordinator for agents, plain or inside TLS, and the store for
//! ranks. The first byte of a connection tells them apart.
//!
//! Input of unauthenticated peers is bounded: silent connections time out, buffers have limits, and
//! the first invalid byte closes the connection.

mod agents;
mod clients;
mod connections;
mod listener;
mod slot;

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
use tz::{DateTime, TimeZone};

use crate::Error;
use crate::auth::Token;
use crate::coordinator::Settings;
use crate::tls::Acceptor;
pub(crate) use agents::Failover;
#[cfg(feature = "etcd")]
pub(crate) use agents::PendingRecord;
use clients::Clients;
use connections::Connections;
use listener::Listener;

/// Backlog of the listening sockets.
const BACKLOG: u32 = 4096;

/// Maximum of addresses whose rejections are counted and logged.
const MAX_LOGGED_ADDRESSES: usize = 1024;

/// Configuration of a [`Server`].
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Addresses to listen on, all with the same port.
    pub addresses: Vec<IpAddr>,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// Identifier of the job.
    pub run_id: String,
    /// Time in which the minimum of nodes must join.
    pub join_timeout: Duration,
    /// Time in which further nodes may join once the minimum has.
    pub last_call: Duration,
    /// Interval and number of the keepalives after which a silent agent is lost.
    pub keep_alive: KeepAlive,
    /// Token that agents must prove; `None` accepts all agents.
    pub token: Option<Token>,
}

/// The server of a job's coordinator and store. A thread of its own serves both until the value is
/// dropped.
pub struct Server {
    port: u16,
    agents: watch::Receiver<usize>,
    /// Dropped before the thread is joined, which ends it.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed by the thread.
            let _ = thread.join();
        }
    }
}

impl Server {
    /// Listens and starts the thread. Clients can connect once this returns.
    ///
    /// # Errors
    /// [`Error::Bind`] if no address can be bound.
    pub async fn bind(config: ServerConfig) -> Result<Self, Error> {
        let listening = BoundListeners::bind(&config.addresses, config.port)?;
        Self::serve(listening, config, None)
    }

    /// Starts the thread; with `failover` it continues the job of another coordinator.
    pub(crate) fn serve(
        listening: BoundListeners,
        config: ServerConfig,
        failover: Option<Failover>,
    ) -> Result<Self, Error> {
        let ServerConfig { run_id, join_timeout, last_call, keep_alive, token, .. } = config;
        let BoundListeners { port, sockets } = listening;
        let fail = Error::Serve;
        // The form in which agents' messages have it after decoding.
        let run_id = printable(&run_id).into_owned();
        let settings = Settings { run_id, join_timeout, last_call, run_stamp: run_stamp() };
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::new(Shared::new(token, keep_alive).map_err(fail)?);
        let agents = shared.count.subscribe();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let serve = move || {
            runtime.block_on(async move {
                let coordinator = agents::start(settings, failover, Arc::clone(&shared));
                let listener = Arc::new(Listener::new(shared, coordinator));
                for socket in sockets {
                    match TcpListener::from_std(socket) {
                        Ok(socket) => drop(tokio::spawn(Arc::clone(&listener).serve(socket))),
                        Err(error) => tracing::error!(%error, "an address is not served"),
                    }
                }
                let _ = stopped.await;
            });
        };
        let thread = thread::Builder::new().name("rendezvous".into()).spawn(serve).map_err(fail)?;
        Ok(Self { port, agents, stop: Some(stop), thread: Some(thread) })
    }

    /// Waits until no agent is connected.
    pub async fn wait_idle(&self) {
        let mut agents = self.agents.clone();
        // An error means that the thread has ended, and with it all connections.
        let _ = agents.wait_for(|count| *count == 0).await;
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// State shared by all connections of a server.
struct Shared {
    clients: Mutex<Clients>,
    /// All connections with the handles of their tasks. Lock order: never held together with
    /// `clients`.
    connections: Mutex<Connections<AbortHandle>>,
    /// Addresses from which authenticated agents have connected. Only these may use the store.
    /// `None` without a token.
    allowed_hosts: Option<Mutex<HashSet<IpAddr>>>,
    token: Option<Token>,
    /// `Some` if agents must use TLS.
    tls: Option<Acceptor>,
    keep_alive: KeepAlive,
    /// Number of rejected connections per reason and address.
    log_rejected: Mutex<HashMap<(&'static str, IpAddr), u64>>,
    /// Number of connected agents.
    count: watch::Sender<usize>,
}

impl Shared {
    fn new(token: Option<Token>, keep_alive: KeepAlive) -> io::Result<Self> {
        let tls = token.as_ref().filter(|token| token.is_over_tls()).map(|_| Acceptor::new()).transpose()?;
        Ok(Self {
            clients: Mutex::new(Clients::new()),
            connections: Mutex::new(Connections::new(listener::max_connections())),
            allowed_hosts: token.as_ref().map(|_| Mutex::default()),
            token,
            tls,
            keep_alive,
            log_rejected: Mutex::default(),
            count: watch::channel(0).0,
        })
    }

    /// Returns whether an address may use the store. The protocol of torch's clients has no token,
    /// so an authenticated agent on the same host vouches for them.
    fn is_allowed(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.allowed_hosts
            .as_ref()
            .is_none_or(|allowed_hosts| address.is_loopback() || locked(allowed_hosts).contains(&address))
    }

    /// Logs a rejected connection: for each reason and address the first, the tenth, the hundredth.
    /// A peer that retries without end does not fill a disk.
    fn log_rejected(&self, peer: SocketAddr, why: &'static str) {
        if let Some(times) = self.count_rejected(peer.ip(), why) {
            tracing::warn!(%peer, times, "{why}");
        }
    }

    /// Counts a rejection. Returns the count if it is to be logged.
    fn count_rejected(&self, address: IpAddr, why: &'static str) -> Option<u64> {
        let mut counts = locked(&self.log_rejected);
        let key = (why, address.to_canonical());
        if counts.len() >= MAX_LOGGED_ADDRESSES && !counts.contains_key(&key) {
            return None;
        }
        let times = counts.entry(key).or_default();
        *times += 1;
        is_logged(*times).then_some(*times)
    }

    fn allow(&self, addresses: impl IntoIterator<Item = IpAddr>) {
        if let Some(allowed_hosts) = &self.allowed_hosts {
            locked(allowed_hosts).extend(addresses.into_iter().map(|address| address.to_canonical()));
        }
    }
}

/// Returns whether the n-th event of its kind is logged: the first, the tenth, the hundredth.
fn is_logged(times: u64) -> bool {
    times.checked_ilog10().and_then(|power| 10_u64.checked_pow(power)) == Some(times)
}

/// Locks a mutex, ignoring poison: every critical section here leaves valid state, even if it
/// panics.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Bound sockets. Clients can connect already, and are served once a [`Server`] takes the sockets.
pub(crate) struct BoundListeners {
    pub(crate) port: u16,
    sockets: Vec<std::net::TcpListener>,
}

impl BoundListeners {
    /// Binds all addresses to one port. An address that is a duplicate or has disappeared is
    /// ignored if another one can be bound.
    pub(crate) fn bind(addresses: &[IpAddr], port: u16) -> Result<Self, Error> {
        let mut sockets = Vec::new();
        let mut common = port;
        let mut failure = None;
        for address in addresses {
            let address = SocketAddr::new(*address, common);
            let listening = listen(address).and_then(|socket| {
                common = socket.local_addr()?.port();
                socket.into_std()
            });
            match listening {
                Ok(socket) => sockets.push(socket),
                // A port that is taken on one address counts as taken on all.
                Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
                    return Err(Error::Bind { address, source });
                }
                Err(source) => failure = Some(Error::Bind { address, source }),
            }
        }
        match (sockets.is_empty(), failure) {
            (false, _) => Ok(Self { port: common, sockets }),
            (true, Some(error)) => Err(error),
            (true, None) => {
                Err(Error::Serve(io::Error::new(io::ErrorKind::NotFound, "no address to listen on")))
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
    let zone = TimeZone::local().unwrap_or_else(|_| TimeZone::utc());
    let now = DateTime::now(zone.as_ref());
    let time = now
        .map(|now| format!("{:02}{:02}{:02}{:02}", now.month(), now.month_day(), now.hour(), now.minute()));
    format!("{}_{:08x}", time.unwrap_or_default(), random() as u32)
}

/// Returns a unique number. It is not a secret.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_rejections_are_logged_at_powers_of_ten() {
        let shared = Shared::new(None, KeepAlive::default()).unwrap();
        let said = |last: u8, times: u32| -> Vec<u64> {
            let address = IpAddr::from([10, 0, 0, last]);
            (0..times).filter_map(|_| shared.count_rejected(address, "no token")).collect()
        };
        assert_eq!(said(1, 1234), [1, 10, 100, 1000]);
        // Each address has a count of its own.
        assert_eq!(said(2, 5), [1]);
        // The number of counted addresses is bounded.
        for number in 0..2 * MAX_LOGGED_ADDRESSES as u32 {
            shared.count_rejected(std::net::Ipv4Addr::from(number).into(), "no token");
        }
        assert_eq!(locked(&shared.log_rejected).len(), MAX_LOGGED_ADDRESSES);
        assert_eq!(said(1, 8766), [10_000]);
    }
}
