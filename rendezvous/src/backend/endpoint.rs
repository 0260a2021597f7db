//! Rendezvous at one address that all agents know.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::RendezvousConfig;
use crate::address::{self, ListenAddresses};
use crate::{Error, Server};

/// Pause between two attempts to resolve a name.
const RETRY: Duration = Duration::from_millis(500);

/// The agent that hosts the coordinator and the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServedBy {
    /// This agent.
    This,
    /// Another agent.
    Other,
    /// This agent, if the endpoint's address belongs to this machine and its port is free.
    Elect,
}

/// Address of the coordinator and the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address of the host.
    pub host: String,
    /// Port; 0 takes a free one.
    pub port: u16,
    /// The agent that serves it.
    pub served_by: ServedBy,
}

impl Endpoint {
    /// Starts the server if this agent is to host it. Returns notes for the user as well.
    pub(super) async fn host(
        &self,
        config: &RendezvousConfig,
    ) -> Result<(Option<Server>, Vec<String>), Error> {
        if self.served_by == ServedBy::Other {
            return Ok((None, Vec::new()));
        }
        // In a job of one node no other node publishes the name, so waiting is in vain.
        let limit = if config.multi_node { config.join_timeout } else { Duration::ZERO };
        let found = resolve_within(&self.host, limit, || address::resolve(&self.host, self.port)).await;
        let found = found.map_err(|source| Error::Resolve { host: self.host.clone(), source })?;
        let found: Vec<IpAddr> = found.into_iter().map(|address| address.ip()).collect();
        let is_this_host = self.served_by == ServedBy::This;
        let own = address::own_addresses();
        let ListenAddresses { mut addresses, mut note } =
            address::listen_addresses(&self.host, &found, &own, is_this_host, config.multi_node);
        if let Some(local) = config.local
            && !addresses.is_empty()
        {
            // The ranks of this host use the address that its name has here, so loopback addresses
            // of the name are kept.
            addresses.retain(|address| found.contains(address) && address.is_loopback() && *address != local);
            addresses.push(local);
            note = None;
        }
        if addresses.is_empty() {
            return Ok((None, Vec::new()));
        }
        match Server::bind(config.host(addresses, self.port)).await {
            Ok(host) => Ok((Some(host), note.into_iter().collect())),
            // Another agent on this machine has bound the port first.
            Err(Error::Bind { source, .. }) if !is_this_host && source.kind() == io::ErrorKind::AddrInUse => {
                Ok((None, Vec::new()))
            }
            Err(error) => Err(error),
        }
    }
}

/// Resolves a name, and retries until `limit`: clusters publish the names of nodes as they start,
/// and name servers fail for moments.
async fn resolve_within<T, F: Future<Output = io::Result<T>>>(
    host: &str,
    limit: Duration,
    resolve: impl Fn() -> F,
) -> io::Result<T> {
    let deadline = Instant::now() + limit;
    let mut said = false;
    loop {
        match resolve().await {
            Err(error) if Instant::now() + RETRY < deadline => {
                if !said {
                    tracing::warn!("cannot resolve {host} yet ({error}): trying again for up to {limit:?}");
                    said = true;
                }
                sleep(RETRY).await;
            }
            found => return found,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Resolves a name that is found after `after` attempts. Returns the outcome, the number of
    /// attempts and the time.
    async fn found(after: u32, limit: Duration) -> (io::Result<u32>, u32, Duration) {
        let (asked, began) = (Cell::new(0), Instant::now());
        let outcome = resolve_within("node0", limit, async || {
            asked.set(asked.get() + 1);
            if asked.get() > after { Ok(7) } else { Err(io::Error::other("name not known")) }
        });
        let outcome = outcome.await;
        (outcome, asked.get(), began.elapsed())
    }

    #[tokio::test]
    async fn unknown_name_is_resolved_again_until_the_limit() {
        tokio::time::pause();
        let (outcome, asked, took) = found(3, Duration::from_secs(60)).await;
        assert_eq!((outcome.unwrap(), asked), (7, 4));
        assert!(took >= RETRY * 3);
        let (outcome, _, took) = found(u32::MAX, Duration::from_secs(60)).await;
        assert!(outcome.is_err() && took < Duration::from_secs(60) && took > Duration::from_secs(58));
        let (outcome, asked, _) = found(1, Duration::ZERO).await;
        assert!(outcome.is_err() && asked == 1);
    }
}
