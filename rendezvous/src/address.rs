//! Addresses: which are this host's, where to listen, and what was tried from where.
//!
//! In the book: `docs/clusters.md#addresses`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// The addresses of this host's interfaces; none where the system does not say.
pub fn own() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces.filter_map(|interface| ip(interface.address?)).collect()
}

/// What cannot be reached without naming an interface is left out.
fn ip(storage: nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    let v6 = storage.as_sockaddr_in6().map(|address| address.ip());
    v4.or(v6.filter(|address| !address.is_unicast_link_local()).map(IpAddr::V6))
}

/// The address that a user means: one of this host, a host name, or the name of an interface.
///
/// # Errors
/// What is wrong with it.
pub fn local(text: &str) -> Result<IpAddr, String> {
    let of_interface = || {
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        interfaces
            .filter(|interface| interface.interface_name == text)
            .find_map(|interface| ip(interface.address?))
    };
    let own = own();
    if let Ok(address) = text.parse::<IpAddr>() {
        return if is_own(address, &own) {
            Ok(address)
        } else {
            Err(format!("`{text}` is no address of this host, which has {}", list(&own)))
        };
    }
    if let Some(address) = of_interface() {
        return Ok(address);
    }
    let found: Vec<IpAddr> = std::net::ToSocketAddrs::to_socket_addrs(&(text, 0))
        .map_err(|error| format!("`{text}` is neither an interface nor a host: {error}"))?
        .map(|address| address.ip())
        .collect();
    found
        .iter()
        .copied()
        .find(|address| is_own(*address, &own))
        .ok_or_else(|| format!("`{text}` is {}, and this host has {}", list(&found), list(&own)))
}

fn is_own(address: IpAddr, own: &[IpAddr]) -> bool {
    // The whole of 127/8 is this host's.
    address.is_loopback() || address.is_unspecified() || own.contains(&address)
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "none".into();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// The addresses; none where the endpoint is another host.
    pub addresses: Vec<IpAddr>,
    /// What the user should know, in one line.
    pub note: Option<String>,
}

/// Where an endpoint is to be listened for on this host. `host` is what the user named, `found` its addresses, `own` those of this host.
/// `certain` says that this host is meant, whatever the name's addresses are; `shared` that other nodes are to come.
pub fn listening(host: &str, found: &[IpAddr], own: &[IpAddr], certain: bool, shared: bool) -> Listening {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found.iter().copied().filter(|address| is_own(*address, own)) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let reachable = || own.iter().copied().filter(|address| !address.is_loopback());
    if addresses.is_empty() {
        if !certain {
            return Listening { addresses, note: None };
        }
        addresses.extend(reachable().chain([Ipv4Addr::LOCALHOST.into()]));
        let note = format!(
            "{host} is {}, no address of this host: listening on {}, in case it is translated on the way; \
             --local-addr chooses one",
            list(found),
            list(&addresses)
        );
        return Listening { addresses, note: Some(note) };
    }
    let only_here = addresses.iter().all(IpAddr::is_loopback);
    if !(shared && only_here && reachable().next().is_some()) {
        return Listening { addresses, note: None };
    }
    let loopback = list(&addresses);
    // An address is taken at its word; the agents of all nodes may be on this host.
    if host.parse::<IpAddr>().is_ok() {
        let note = format!(
            "listening on {loopback}, where only agents of this host can come; --master-addr names a host \
             that other nodes can reach"
        );
        return Listening { addresses, note: Some(note) };
    }
    addresses.extend(reachable());
    let note = format!(
        "{host} is {loopback} on this host itself, where no other node could come: listening on {}, too; \
         --local-addr chooses one",
        list(&reachable().collect::<Vec<_>>())
    );
    Listening { addresses, note: Some(note) }
}

/// All addresses of a host.
///
/// # Errors
/// It has none, or nobody knows it.
pub async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in tokio::net::lookup_host((host, port)).await? {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    match addresses.is_empty() {
        true => Err(io::Error::new(io::ErrorKind::NotFound, "it has no address")),
        false => Ok(addresses),
    }
}

/// Connects to the first address of a host that answers within so long.
///
/// # Errors
/// Which addresses were tried, from where, and what came of each.
pub(crate) async fn connect(
    host: &str,
    port: u16,
    from: Option<IpAddr>,
    answer: Duration,
) -> io::Result<TcpStream> {
    let addresses = resolve(host, port).await?;
    let mut tried = Vec::new();
    let mut kind = io::ErrorKind::NotConnected;
    for address in &addresses {
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {answer:?}"));
        match timeout(answer, connect_to(*address, from)).await.unwrap_or_else(|_| Err(late())) {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                kind = error.kind();
                let source = from.or_else(|| source_of(*address));
                let source = source.map(|source| format!(" from {source}")).unwrap_or_default();
                tried.push(format!("{address}{source}: {error}"));
            }
        }
    }
    Err(io::Error::new(kind, tried.join("; ")))
}

async fn connect_to(address: SocketAddr, from: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(from) = from.filter(|from| from.is_ipv4() == address.is_ipv4() && !address.ip().is_loopback())
    {
        socket.bind((from, 0).into())?;
    }
    socket.connect(address).await
}

/// The address that this host uses towards another; nothing is sent.
pub(crate) fn source_of(address: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(address).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(text: &str) -> Vec<IpAddr> {
        text.split_whitespace().map(|part| part.parse().unwrap()).collect()
    }

    const OWN: &str = "127.0.0.1 ::1 10.0.0.7 fd00::7";

    /// Where one listens, and what is said.
    #[track_caller]
    fn check(host: &str, found: &str, certain: bool, shared: bool, addresses: &str, said: &[&str]) {
        let listening = listening(host, &ips(found), &ips(OWN), certain, shared);
        assert_eq!(listening.addresses, ips(addresses));
        let note = listening.note.unwrap_or_default();
        assert!(said.iter().all(|part| note.contains(part)), "{note}");
        assert_eq!(note.is_empty(), said.is_empty(), "{note}");
    }

    #[test]
    fn an_endpoint_is_listened_for_where_it_is() {
        check("node0", "10.0.0.7 fd00::7", true, true, "10.0.0.7 fd00::7", &[]);
        check("node0", "10.0.0.8 10.0.0.7 10.0.0.7", false, true, "10.0.0.7", &[]);
        check(
            "127.0.0.1",
            "127.0.0.1",
            true,
            true,
            "127.0.0.1",
            &["only agents of this host", "--master-addr"],
        );
        check("127.0.0.1", "127.0.0.1", true, false, "127.0.0.1", &[]);
        check("0.0.0.0", "0.0.0.0", true, true, "0.0.0.0", &[]);
    }

    #[test]
    fn a_host_that_is_its_own_loopback_listens_where_others_come() {
        check("node0", "127.0.1.1", true, true, "127.0.1.1 10.0.0.7 fd00::7", &["127.0.1.1", "--local-addr"]);
        check("node0", "127.0.1.1", true, false, "127.0.1.1", &[]);
        // Some operators of Kubernetes name the master to itself so, and by the name of its service to the others.
        let both = "::1 127.0.0.1 10.0.0.7 fd00::7";
        check("localhost", "::1 127.0.0.1", true, true, both, &["localhost is ::1, 127.0.0.1", "10.0.0.7"]);
        check("localhost", "::1 127.0.0.1", true, false, "::1 127.0.0.1", &[]);
    }

    #[test]
    fn another_hosts_address_is_translated_or_not_ours() {
        check("gate", "192.0.2.1", true, true, "10.0.0.7 fd00::7 127.0.0.1", &["192.0.2.1", "--local-addr"]);
        check("gate", "192.0.2.1", false, true, "", &[]);
    }

    #[test]
    fn a_local_address_is_an_address_or_an_interface() {
        assert_eq!(local("127.0.0.1"), Ok(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(local("lo"), Ok(Ipv4Addr::LOCALHOST.into()));
        assert!(local("192.0.2.1").unwrap_err().contains("192.0.2.1"));
        assert!(local("no-such-thing.invalid").unwrap_err().contains("no-such-thing.invalid"));
    }

    #[tokio::test]
    async fn what_was_tried_from_where_is_said() {
        let error = connect("127.0.0.1", 1, None, Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(error.to_string().starts_with("127.0.0.1:1 from 127.0.0.1: "), "{error}");
    }
}
