//! How agents find each other: at an endpoint that all know, or through etcd.

mod endpoint;
mod session;

use std::net::IpAddr;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive};

pub use endpoint::{Endpoint, Role};
pub use session::Session;

use crate::auth::Token;
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

/// This agent's way to the others, and its part as the host of the coordinator and the store, where it has that.
pub struct Meeting {
    config: MeetingConfig,
    endpoint: Endpoint,
    host: Option<Host>,
    notes: Vec<String>,
}

impl Meeting {
    /// Becomes the host where that is this agent's part.
    ///
    /// # Errors
    /// [`Error::Resolve`] and [`Error::Bind`] where the endpoint cannot be listened on.
    pub async fn open(config: MeetingConfig, mut endpoint: Endpoint) -> Result<Self, Error> {
        let (host, notes) = endpoint.host(&config).await?;
        if let Some(host) = &host {
            endpoint.port = host.port();
        }
        Ok(Self { config, endpoint, host, notes })
    }

    /// Connects to the coordinator and says hello.
    ///
    /// # Errors
    /// As [`Session::connect`].
    pub async fn meet(&self, hello: Hello) -> Result<Session, Error> {
        let MeetingConfig { local, token, join_timeout, .. } = &self.config;
        Session::connect(self.address(), *local, hello, token.as_ref(), *join_timeout).await
    }

    /// Host and port of the coordinator and the store.
    pub fn address(&self) -> (&str, u16) {
        (&self.endpoint.host, self.endpoint.port)
    }

    /// Whether this agent hosts them.
    pub fn is_host(&self) -> bool {
        self.host.is_some()
    }

    /// What the user should know, one line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Waits until no agent is connected to this one any more.
    pub async fn deserted(&self) {
        if let Some(host) = &self.host {
            host.deserted().await;
        }
    }
}
