//! One address that all agents know.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::MeetingConfig;
use crate::address::{self, Listening};
use crate::{Error, Host};

/// Between two questions for a name that nobody knows.
const RETRY: Duration = Duration::from_millis(500);

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
        // Of a job of one node the name is this host's, and no other will make it known.
        let limit = if config.shared { config.join_timeout } else { Duration::ZERO };
        let found = known_in_time(&self.host, limit, || address::resolve(&self.host, self.port)).await;
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

/// Asks again for a while: a cluster makes the names of its nodes known as they come up, and name servers have bad moments.
async fn known_in_time<T, F: Future<Output = io::Result<T>>>(
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

    /// When a name that is known after so many questions is found, and how often it was asked for.
    async fn found(after: u32, limit: Duration) -> (io::Result<u32>, u32, Duration) {
        let (asked, began) = (Cell::new(0), Instant::now());
        let outcome = known_in_time("node0", limit, async || {
            asked.set(asked.get() + 1);
            if asked.get() > after { Ok(7) } else { Err(io::Error::other("name not known")) }
        });
        let outcome = outcome.await;
        (outcome, asked.get(), began.elapsed())
    }

    #[tokio::test]
    async fn a_name_may_become_known() {
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
