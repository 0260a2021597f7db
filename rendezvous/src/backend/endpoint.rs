//! One address that all agents know.

use std::io;
use std::net::IpAddr;

use super::MeetingConfig;
use crate::address::{self, Listening};
use crate::{Error, Host};

/// Who hosts the coordinator and the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// This agent.
    This,
    /// Another one.
    Other,
    /// This agent, if the endpoint's address is this machine's and nobody listens there.
    Elect,
}

/// Where the coordinator and the store are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address of the host.
    pub host: String,
    /// The port; 0 for a free one.
    pub port: u16,
    /// Who serves it.
    pub role: Role,
}

impl Endpoint {
    /// Hosts it where that is this agent's part, and says what the user should know.
    pub(super) async fn host(&self, config: &MeetingConfig) -> Result<(Option<Host>, Vec<String>), Error> {
        if self.role == Role::Other {
            return Ok((None, Vec::new()));
        }
        let found = address::resolve(&self.host, self.port).await;
        let found = found.map_err(|source| Error::Resolve { host: self.host.clone(), source })?;
        let found: Vec<IpAddr> = found.into_iter().map(|address| address.ip()).collect();
        let certain = self.role == Role::This;
        let own = address::own();
        let Listening { mut addresses, mut note } =
            address::listening(&self.host, &found, &own, certain, config.shared);
        if let Some(local) = config.local
            && !addresses.is_empty()
        {
            // The ranks of this host come to the address that its name has here.
            addresses.retain(|address| found.contains(address) && address.is_loopback() && *address != local);
            addresses.push(local);
            note = None;
        }
        if addresses.is_empty() {
            return Ok((None, Vec::new()));
        }
        match Host::bind(config.host(addresses, self.port)).await {
            Ok(host) => Ok((Some(host), note.into_iter().collect())),
            // Another agent on this machine was first.
            Err(Error::Bind { source, .. }) if !certain && source.kind() == io::ErrorKind::AddrInUse => {
                Ok((None, Vec::new()))
            }
            Err(error) => Err(error),
        }
    }
}
