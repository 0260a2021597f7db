//! How agents find the coordinator: at an endpoint that all know, or through etcd.

mod endpoint;
#[cfg(feature = "etcd")]
mod etcd;
mod session;

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive};
use tokio::time::timeout;

pub use endpoint::{Endpoint, ServedBy};
pub use session::{RetryPolicy, Session};

use crate::auth::Token;
use crate::server::{locked, random};
use crate::{Error, Server, ServerConfig};

/// Configuration of a rendezvous, for every backend.
#[derive(Debug, Clone)]
pub struct RendezvousConfig {
    /// Identifier of the job.
    pub run_id: String,
    /// Whether the job has several nodes.
    pub multi_node: bool,
    /// Address of this host to listen on and to connect from; any if `None`.
    pub local: Option<IpAddr>,
    /// Time in which the minimum of nodes must join, and in which a coordinator is searched for.
    pub join_timeout: Duration,
    /// Time in which further nodes may join once the minimum has.
    pub last_call: Duration,
    /// Timeout of connecting to an address, and of each answer of the coordinator or of etcd.
    pub answer_timeout: Duration,
    /// Keepalives of an agent's connection.
    pub keep_alive: KeepAlive,
    /// Token that all agents of the job share.
    pub token: Option<Token>,
}

impl RendezvousConfig {
    fn host(&self, addresses: Vec<IpAddr>, port: u16) -> ServerConfig {
        ServerConfig {
            addresses,
            port,
            run_id: self.run_id.clone(),
            join_timeout: self.join_timeout,
            last_call: self.last_call,
            keep_alive: self.keep_alive,
            token: self.token.clone(),
        }
    }
}

/// Address of etcd, and the credentials for it.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// URLs of its members: `http://host:port` or `https://host:port`.
    pub endpoints: Vec<String>,
    /// Prefix of all keys.
    pub prefix: String,
    /// User name and password.
    pub user: Option<(String, String)>,
    /// Certificates in PEM.
    pub tls: Option<EtcdTls>,
    /// Port of a coordinator on this node; 0 takes a free one.
    pub port: u16,
}

impl EtcdConfig {
    /// Checks the form of the endpoints without connecting.
    ///
    /// # Errors
    /// The first invalid endpoint, and why it is invalid.
    pub fn check_endpoints(&self) -> Result<(), String> {
        #[cfg(feature = "etcd")]
        for url in &self.endpoints {
            etcd::endpoint::Endpoint::parse(url)?;
        }
        Ok(())
    }

    /// Checks the certificates and the key.
    ///
    /// # Errors
    /// The missing or invalid file, and why it is invalid.
    pub fn check_tls(&self) -> Result<(), String> {
        #[cfg(feature = "etcd")]
        etcd::endpoint::client_config(self)?;
        Ok(())
    }
}

impl std::fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EtcdConfig({}{})", self.endpoints.join(","), self.prefix)
    }
}

/// Certificates for etcd in PEM.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct EtcdTls {
    /// Certificate of the authority that signed etcd's.
    pub ca: Option<Vec<u8>>,
    /// Client certificate and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// Where the agents of a job find the coordinator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// At one address that all agents know.
    Endpoint(Endpoint),
    /// Through a leader key in etcd.
    Etcd(EtcdConfig),
}

/// Connects this agent to the coordinator, and hosts the coordinator and the store if that is this
/// agent's role.
pub struct Rendezvous {
    config: RendezvousConfig,
    backend: Backend,
    notes: Vec<String>,
    agent_id: u64,
    current: Mutex<Current>,
}

/// State that changes when the coordinator moves to another agent.
struct Current {
    /// Host and port of the coordinator and the store.
    address: (String, u16),
    role: Option<HostRole>,
}

enum HostRole {
    Endpoint(Server),
    #[cfg(feature = "etcd")]
    Etcd(Box<etcd::Leadership>),
}

impl HostRole {
    fn host(&self) -> &Server {
        match self {
            Self::Endpoint(host) => host,
            #[cfg(feature = "etcd")]
            Self::Etcd(leadership) => &leadership.host,
        }
    }
}

impl Rendezvous {
    /// Starts the server if this agent is certain to host it.
    ///
    /// # Errors
    /// [`Error::Resolve`] and [`Error::Bind`] if the endpoint cannot be listened on.
    pub async fn open(config: RendezvousConfig, backend: Backend) -> Result<Self, Error> {
        let (host, notes, address) = match &backend {
            Backend::Endpoint(endpoint) => {
                let (host, notes) = endpoint.host(&config).await?;
                let port = host.as_ref().map_or(endpoint.port, Server::port);
                (host, notes, (endpoint.host.clone(), port))
            }
            Backend::Etcd(_) if crate::HAS_ETCD => (None, Vec::new(), (String::new(), 0)),
            Backend::Etcd(_) => {
                return Err(Error::Refused {
                    problem: "this program was built without the feature `etcd`".into(),
                });
            }
        };
        let current = Current { address, role: host.map(HostRole::Endpoint) };
        Ok(Self { config, backend, notes, agent_id: random(), current: Mutex::new(current) })
    }

    /// Connects to the coordinator and says hello.
    ///
    /// # Errors
    /// Those of [`Session::connect`], and failures of etcd.
    pub async fn connect(&self, hello: Hello) -> Result<Session, Error> {
        self.find(hello, RetryPolicy::within(self.config.join_timeout)).await
    }

    /// Connects again after the connection was lost. At an endpoint, a refused connection ends the
    /// search at once, since the coordinator's host is up and the coordinator is gone. An
    /// unreachable host is retried for the join timeout: the other nodes wait for this one as long,
    /// and a switch that restarts takes minutes.
    ///
    /// # Errors
    /// Those of [`Rendezvous::connect`].
    pub async fn reconnect(&self, hello: Hello) -> Result<Session, Error> {
        self.find(hello, RetryPolicy::until_refused(self.config.join_timeout)).await
    }

    async fn find(&self, hello: Hello, retry: RetryPolicy) -> Result<Session, Error> {
        match &self.backend {
            Backend::Endpoint(_) => {
                let RendezvousConfig { local, token, answer_timeout, .. } = &self.config;
                let retry = retry.answer_timeout(*answer_timeout);
                let (host, port) = self.address();
                Session::connect((&host, port), *local, hello, token.as_ref(), retry).await
            }
            #[cfg(not(feature = "etcd"))]
            Backend::Etcd(_) => Err(Error::Refused { problem: "there is no etcd in this build".into() }),
            #[cfg(feature = "etcd")]
            Backend::Etcd(config) => {
                // An agent that searches for the coordinator hosts it no longer.
                let before = locked(&self.current).role.take();
                drop(before);
                let mut etcd = etcd::Etcd::new(config, &self.config)?;
                let (session, address, leadership) = etcd.connect(&hello).await?;
                *locked(&self.current) =
                    Current { address, role: leadership.map(Box::new).map(HostRole::Etcd) };
                Ok(session)
            }
        }
    }

    /// Returns the number by which the coordinator recognizes this agent on each of its
    /// connections.
    pub fn agent_id(&self) -> u64 {
        self.agent_id
    }

    /// Returns host and port of the coordinator and the store.
    pub fn address(&self) -> (String, u16) {
        locked(&self.current).address.clone()
    }

    /// Returns whether another agent hosts the coordinator once this one is lost.
    pub fn coordinator_can_move(&self) -> bool {
        !matches!(self.backend, Backend::Endpoint(_))
    }

    /// Returns whether this agent hosts the coordinator.
    pub fn is_host(&self) -> bool {
        locked(&self.current).role.is_some()
    }

    /// Returns the time for which a lost coordinator is searched.
    pub fn reconnect_timeout(&self) -> Duration {
        self.config.join_timeout
    }

    /// Returns notes for the user, one line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Stops hosting the coordinator once no agent is connected to it, after `limit` at the latest.
    pub async fn close(&self, limit: Duration) {
        let Some(role) = locked(&self.current).role.take() else { return };
        let _ = timeout(limit, role.host().wait_idle()).await;
        match role {
            HostRole::Endpoint(host) => drop(host),
            #[cfg(feature = "etcd")]
            HostRole::Etcd(leadership) => leadership.resign().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use ice_proto::rendezvous::RestartPolicy;
    use tokio::time::Instant;

    use super::*;
    use crate::address;

    /// Returns the configuration of a job `job` without a token.
    pub(super) fn config() -> RendezvousConfig {
        RendezvousConfig {
            run_id: "job".into(),
            multi_node: true,
            local: None,
            join_timeout: Duration::from_secs(600),
            last_call: Duration::ZERO,
            answer_timeout: RetryPolicy::DEFAULT_ANSWER_TIMEOUT,
            keep_alive: KeepAlive::default(),
            token: None,
        }
    }

    pub(super) fn hello(config: &RendezvousConfig) -> Hello {
        Hello {
            run_id: config.run_id.clone(),
            node_rank: Some(1),
            nnodes: (2, 2),
            local_world_size: 1,
            role: "default".into(),
            ranks_store: None,
            restarts: RestartPolicy { max_restarts: 1, window: None, backoff: Duration::ZERO, crash_loop: 0 },
            keep_alive: config.keep_alive,
            agent_id: 7,
            run_stamp: None,
            last_node_rank: Some(1),
            addresses: Vec::new(),
            host: "host".into(),
            pid: 7,
        }
    }

    #[tokio::test]
    async fn unreachable_coordinator_is_retried_for_the_join_timeout() {
        let config = config();
        let (limit, hello) = (config.join_timeout, hello(&config));
        // Linux refuses to connect to a multicast address at once, with another error than a
        // refused connection.
        let endpoint = Endpoint { host: "224.0.0.1".into(), port: 9, served_by: ServedBy::Other };
        let rendezvous = Rendezvous::open(config, Backend::Endpoint(endpoint)).await.unwrap();
        tokio::time::pause();
        let start = Instant::now();
        let error = rendezvous.reconnect(hello.clone()).await.map(drop).unwrap_err();
        let waited = start.elapsed();
        assert!(matches!(error, Error::Unreachable { timeout, .. } if timeout == limit), "{error}");
        assert!(waited > limit - Duration::from_secs(1) && waited <= limit, "{waited:?}");
    }

    #[tokio::test]
    async fn refused_connection_ends_the_search_for_a_lost_coordinator() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let retry = RetryPolicy::until_refused(Duration::from_secs(600));
        let error =
            address::connect("127.0.0.1", port, None, RetryPolicy::DEFAULT_ANSWER_TIMEOUT).await.unwrap_err();
        assert!(retry.is_final(&error), "{error}");
    }
}
