//! The address of the ranks' store (`MASTER_ADDR` and `MASTER_PORT`), if it differs from the
//! endpoint.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ice_proto::rendezvous::RanksStore;
use ice_rendezvous::Rendezvous;
use tokio::net::TcpSocket;

use super::hostname;
use crate::LaunchPlan;

/// The address that this agent proposes to the coordinator.
pub(super) struct StoreOffer {
    /// `--local-addr`, if the ranks of all nodes have to use it.
    local: Option<IpAddr>,
    /// Port of a store that rank 0 serves, if rank 0 is on this node.
    reserved: Option<ReservedPort>,
}

/// A port that no other process is given while this value lives. Its socket is bound and does not
/// listen: Linux lets a server with `SO_REUSEADDR`, like c10d's, bind the same port.
struct ReservedPort {
    port: u16,
    _socket: TcpSocket,
}

impl StoreOffer {
    pub(super) fn new(plan: &LaunchPlan) -> io::Result<Self> {
        // torchrun's static rendezvous uses --master-addr for all ranks, whatever --local-addr is.
        let local = plan.meeting.local.filter(|_| plan.dynamic);
        let reserved = if plan.rank_serves_store { Some(ReservedPort::new()?) } else { None };
        Ok(Self { local, reserved })
    }

    /// Returns the proposal for the next `Hello`.
    pub(super) fn of(&self, meeting: &Rendezvous) -> Option<RanksStore> {
        let (endpoint, port) = meeting.address();
        match &self.reserved {
            Some(reserved) => {
                let own = || if meeting.is_host() { endpoint } else { hostname() };
                let host = self.local.map_or_else(own, |local| local.to_string());
                Some(RanksStore { host, port: reserved.port, by_rank: true })
            }
            None if meeting.is_host() => {
                self.local.map(|local| RanksStore { host: local.to_string(), port, by_rank: false })
            }
            None => None,
        }
    }
}

impl ReservedPort {
    fn new() -> io::Result<Self> {
        // Both families, like c10d's server. A host without IPv6 has only IPv4.
        let both = TcpSocket::new_v6().and_then(|socket| Self::bind(socket, Ipv6Addr::UNSPECIFIED.into()));
        both.or_else(|_| Self::bind(TcpSocket::new_v4()?, Ipv4Addr::UNSPECIFIED.into()))
    }

    fn bind(socket: TcpSocket, any: IpAddr) -> io::Result<Self> {
        socket.set_reuseaddr(true)?;
        socket.bind((any, 0).into())?;
        Ok(Self { port: socket.local_addr()?.port(), _socket: socket })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reserved_port_can_be_served_and_is_given_to_no_other() {
        let reserved = ReservedPort::new().unwrap();
        let server = TcpSocket::new_v4().unwrap();
        server.set_reuseaddr(true).unwrap();
        server.bind((Ipv4Addr::UNSPECIFIED, reserved.port).into()).unwrap();
        let listener = server.listen(1).unwrap();
        let client = tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, reserved.port)).await;
        assert!(client.is_ok() && listener.accept().await.is_ok());
        // Without `SO_REUSEADDR` the port is taken.
        let other = TcpSocket::new_v4().unwrap();
        assert!(other.bind((Ipv4Addr::UNSPECIFIED, reserved.port).into()).is_err());
    }
}
