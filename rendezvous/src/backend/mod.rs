//! How agents find each other: at an endpoint that all know, or through etcd.

mod endpoint;
#[cfg(feature = "etcd")]
mod etcd;
mod session;

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive};
use tokio::time::timeout;

pub use endpoint::{Endpoint, Role};
pub use session::{Patience, Session};

use crate::auth::Token;
use crate::host::{locked, random};
use crate::{Error, Host, HostConfig};

/// What all ways to meet have in common.
#[derive(Debug, Clone)]
pub struct MeetingConfig {
    /// Identifier of the job.
    pub run_id: String,
    /// Whether other nodes are to come.
    pub shared: bool,
    /// Which of this host's addresses to listen on and to connect from; any where `None`.
    pub local: Option<IpAddr>,
    /// How long the nodes may take to come.
    pub join_timeout: Duration,
    /// How long more nodes are waited for once there are enough.
    pub last_call: Duration,
    /// How long an address, a coordinator or etcd may take for an answer.
    pub answer: Duration,
    /// How each end of a connection knows that the other lives.
    pub keep_alive: KeepAlive,
    /// What all agents of the job know.
    pub token: Option<Token>,
}

impl MeetingConfig {
    fn host(&self, addresses: Vec<IpAddr>, port: u16) -> HostConfig {
        HostConfig {
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

/// Where etcd is, and who we are there.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://host:port` or `https://host:port` of its members.
    pub endpoints: Vec<String>,
    /// What all keys start with.
    pub prefix: String,
    /// Name and password.
    pub user: Option<(String, String)>,
    /// Certificates, as PEM.
    pub tls: Option<EtcdTls>,
    /// The port that a coordinator on this node listens on; 0 for a free one.
    pub port: u16,
}

impl EtcdConfig {
    /// Looks at the form of the endpoints, and asks none of them.
    ///
    /// # Errors
    /// Which of them is wrong, and why.
    pub fn check_endpoints(&self) -> Result<(), String> {
        #[cfg(feature = "etcd")]
        for url in &self.endpoints {
            etcd::endpoint::Endpoint::parse(url)?;
        }
        Ok(())
    }

    /// Looks at the certificates and the key.
    ///
    /// # Errors
    /// Which of them is missing or cannot be used, and why.
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

/// Certificates for etcd, as PEM.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct EtcdTls {
    /// Of the authority that etcd's certificate is checked against.
    pub ca: Option<Vec<u8>>,
    /// Our certificate and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// Where the agents of a job look for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At one address that all know.
    Endpoint(Endpoint),
    /// In etcd.
    Etcd(EtcdConfig),
}

/// This agent's way to the others, and its part as the host of the coordinator and the store, where it has that.
pub struct Meeting {
    config: MeetingConfig,
    place: Place,
    notes: Vec<String>,
    agent: u64,
    now: Mutex<Now>,
}

/// What changes when the coordinator moves.
struct Now {
    /// Of the coordinator and the store.
    address: (String, u16),
    hosting: Option<Hosting>,
}

enum Hosting {
    Endpoint(Host),
    #[cfg(feature = "etcd")]
    Etcd(Box<etcd::Leadership>),
}

impl Hosting {
    fn host(&self) -> &Host {
        match self {
            Self::Endpoint(host) => host,
            #[cfg(feature = "etcd")]
            Self::Etcd(leadership) => &leadership.host,
        }
    }
}

impl Meeting {
    /// Becomes the host where that is certain to be this agent's part.
    ///
    /// # Errors
    /// [`Error::Resolve`] and [`Error::Bind`] where the endpoint cannot be listened on.
    pub async fn open(config: MeetingConfig, place: Place) -> Result<Self, Error> {
        let (host, notes, address) = match &place {
            Place::Endpoint(endpoint) => {
                let (host, notes) = endpoint.host(&config).await?;
                let port = host.as_ref().map_or(endpoint.port, Host::port);
                (host, notes, (endpoint.host.clone(), port))
            }
            Place::Etcd(_) if crate::HAS_ETCD => (None, Vec::new(), (String::new(), 0)),
            Place::Etcd(_) => {
                return Err(Error::Refused {
                    problem: "this program was built without the feature `etcd`".into(),
                });
            }
        };
        let now = Now { address, hosting: host.map(Hosting::Endpoint) };
        Ok(Self { config, place, notes, agent: random(), now: Mutex::new(now) })
    }

    /// Connects to the coordinator and says hello.
    ///
    /// # Errors
    /// As [`Session::connect`], or etcd cannot be used.
    pub async fn meet(&self, hello: Hello) -> Result<Session, Error> {
        self.find(hello, Patience::wait(self.config.join_timeout)).await
    }

    /// Connects again after the coordinator was lost. At an endpoint, one that can be reached and is not there ends the search at once. One
    /// that cannot be reached is waited for as long as nodes may take to come: the others wait as long for this node, and a
    /// switch that restarts takes minutes.
    ///
    /// # Errors
    /// As [`Meeting::meet`].
    pub async fn meet_again(&self, hello: Hello) -> Result<Session, Error> {
        self.find(hello, Patience::until_refused(self.config.join_timeout)).await
    }

    async fn find(&self, hello: Hello, patience: Patience) -> Result<Session, Error> {
        match &self.place {
            Place::Endpoint(_) => {
                let MeetingConfig { local, token, answer, .. } = &self.config;
                let patience = patience.answer(*answer);
                let (host, port) = self.address();
                Session::connect((&host, port), *local, hello, token.as_ref(), patience).await
            }
            #[cfg(not(feature = "etcd"))]
            Place::Etcd(_) => Err(Error::Refused { problem: "there is no etcd in this build".into() }),
            #[cfg(feature = "etcd")]
            Place::Etcd(config) => {
                // Whoever looks for the coordinator is it no longer.
                let before = locked(&self.now).hosting.take();
                drop(before);
                let mut etcd = etcd::Etcd::new(config, &self.config)?;
                let (session, address, leadership) = etcd.meet(&hello).await?;
                *locked(&self.now) = Now { address, hosting: leadership.map(Box::new).map(Hosting::Etcd) };
                Ok(session)
            }
        }
    }

    /// The number that the coordinator knows this agent by, over all its connections.
    pub fn agent(&self) -> u64 {
        self.agent
    }

    /// Host and port of the coordinator and the store.
    pub fn address(&self) -> (String, u16) {
        locked(&self.now).address.clone()
    }

    /// Whether another agent becomes the host when this one is lost.
    pub fn moves(&self) -> bool {
        !matches!(self.place, Place::Endpoint(_))
    }

    /// Whether this agent is the host.
    pub fn is_host(&self) -> bool {
        locked(&self.now).hosting.is_some()
    }

    /// How long the coordinator is looked for after it was lost.
    pub fn patience(&self) -> Duration {
        self.config.join_timeout
    }

    /// What the user should know, one line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Waits until no agent is connected to this one any more, at most so long, and gives up its part as the host.
    pub async fn close(&self, limit: Duration) {
        let Some(hosting) = locked(&self.now).hosting.take() else { return };
        let _ = timeout(limit, hosting.host().deserted()).await;
        match hosting {
            Hosting::Endpoint(host) => drop(host),
            #[cfg(feature = "etcd")]
            Hosting::Etcd(leadership) => leadership.resign().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use ice_proto::rendezvous::RestartPolicy;
    use tokio::time::Instant;

    use super::*;
    use crate::address;

    #[tokio::test]
    async fn lost_coordinator_that_cannot_be_reached_is_looked_for_as_long_as_nodes_may_take_to_come() {
        let limit = Duration::from_secs(600);
        let config = MeetingConfig {
            run_id: "job".into(),
            shared: true,
            local: None,
            join_timeout: limit,
            last_call: Duration::ZERO,
            answer: Patience::ANSWER,
            keep_alive: KeepAlive::default(),
            token: None,
        };
        let hello = Hello {
            run_id: "job".into(),
            node_rank: Some(1),
            nnodes: (2, 2),
            local_world_size: 1,
            role: "default".into(),
            ranks_store: None,
            restarts: RestartPolicy { max_restarts: 1, window: None, backoff: Duration::ZERO, crash_loop: 0 },
            keep_alive: config.keep_alive,
            agent: 7,
            run_stamp: None,
            place: Some(1),
            addresses: Vec::new(),
            host: "host".into(),
            pid: 7,
        };
        // The system says at once that no connection can be made to a multicast address, and it is no refusal.
        let endpoint = Endpoint { host: "224.0.0.1".into(), port: 9, role: Role::Other };
        let meeting = Meeting::open(config, Place::Endpoint(endpoint)).await.unwrap();
        tokio::time::pause();
        let start = Instant::now();
        let error = meeting.meet_again(hello.clone()).await.map(drop).unwrap_err();
        let waited = start.elapsed();
        assert!(matches!(error, Error::Unreachable { timeout, .. } if timeout == limit), "{error}");
        assert!(waited > limit - Duration::from_secs(1) && waited <= limit, "{waited:?}");
    }

    #[tokio::test]
    async fn lost_coordinator_whose_host_refuses_is_gone() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let patience = Patience::until_refused(Duration::from_secs(600));
        let error = address::connect("127.0.0.1", port, None, Patience::ANSWER).await.unwrap_err();
        assert!(patience.is_over(&error), "{error}");
    }
}
