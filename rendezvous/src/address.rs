//! Addresses of this host: where to listen, and where connections come from.
//!
//! In the book: `docs/clusters.md#addresses`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// Returns the addresses of this host's interfaces; an empty list if the system does not say.
pub fn own_addresses() -> Vec<IpAddr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces.filter_map(|interface| ip(interface.address?)).collect()
}

/// Converts an interface address. Link-local IPv6 addresses are left out, since reaching one
/// requires naming an interface.
fn ip(storage: nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
    let v6 = storage.as_sockaddr_in6().map(|address| address.ip());
    v4.or(v6.filter(|address| !address.is_unicast_link_local()).map(IpAddr::V6))
}

/// Returns the address that the user means by an address of this host, a host name, or the name of
/// an interface.
///
/// # Errors
/// The text is none of these; the message lists the addresses of this host.
pub fn parse_local(text: &str) -> Result<IpAddr, String> {
    let of_interface = || {
        let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
        interfaces
            .filter(|interface| interface.interface_name == text)
            .find_map(|interface| ip(interface.address?))
    };
    let own = own_addresses();
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
    // The whole of 127/8 belongs to this host.
    address.is_loopback() || address.is_unspecified() || own.contains(&address)
}

fn list(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "none".into();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Addresses to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddresses {
    /// The addresses; empty if the endpoint is another host.
    pub addresses: Vec<IpAddr>,
    /// A note for the user, in one line.
    pub note: Option<String>,
}

/// Returns where to listen for an endpoint. `host` is the name that the user gave, `found` its
/// addresses, `own` those of this host. `is_this_host` says that the user means this host, whatever
/// the name's addresses are; `multi_node` that other nodes will connect.
pub fn listen_addresses(
    host: &str,
    found: &[IpAddr],
    own: &[IpAddr],
    is_this_host: bool,
    multi_node: bool,
) -> ListenAddresses {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in found.iter().copied().filter(|address| is_own(*address, own)) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let reachable = || own.iter().copied().filter(|address| !address.is_loopback());
    if addresses.is_empty() {
        if !is_this_host {
            return ListenAddresses { addresses, note: None };
        }
        addresses.extend(reachable().chain([Ipv4Addr::LOCALHOST.into()]));
        let note = format!(
            "{host} is {}, no address of this host: listening on {}, in case it is translated on the way; \
             --local-addr chooses one",
            list(found),
            list(&addresses)
        );
        return ListenAddresses { addresses, note: Some(note) };
    }
    let only_here = addresses.iter().all(IpAddr::is_loopback);
    if !(multi_node && only_here && reachable().next().is_some()) {
        return ListenAddresses { addresses, note: None };
    }
    let loopback = list(&addresses);
    // A literal address is used as given; the agents of all nodes may be on this host.
    if host.parse::<IpAddr>().is_ok() {
        let note = format!(
            "listening on {loopback}, where only agents of this host can come; --master-addr names a host \
             that other nodes can reach"
        );
        return ListenAddresses { addresses, note: Some(note) };
    }
    addresses.extend(reachable());
    let note = format!(
        "{host} is {loopback} on this host itself, where no other node could come: listening on {}, too; \
         --local-addr chooses one",
        list(&reachable().collect::<Vec<_>>())
    );
    ListenAddresses { addresses, note: Some(note) }
}

/// Returns all addresses of a host.
///
/// # Errors
/// The name does not resolve, or has no address.
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

/// Connects to the first address of a host that answers within `answer`.
///
/// # Errors
/// The message lists each address, the source address, and the failure.
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

/// Returns the source address that this host uses towards another. No packet is sent.
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

    /// Checks the addresses to listen on, and the parts of the note.
    #[track_caller]
    fn check(host: &str, found: &str, is_this_host: bool, multi_node: bool, addresses: &str, said: &[&str]) {
        let listen_addresses = listen_addresses(host, &ips(found), &ips(OWN), is_this_host, multi_node);
        assert_eq!(listen_addresses.addresses, ips(addresses));
        let note = listen_addresses.note.unwrap_or_default();
        assert!(said.iter().all(|part| note.contains(part)), "{note}");
        assert_eq!(note.is_empty(), said.is_empty(), "{note}");
    }

    #[test]
    fn server_listens_on_the_addresses_of_its_endpoint() {
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
    fn host_that_resolves_to_loopback_also_listens_on_reachable_addresses() {
        check("node0", "127.0.1.1", true, true, "127.0.1.1 10.0.0.7 fd00::7", &["127.0.1.1", "--local-addr"]);
        check("node0", "127.0.1.1", true, false, "127.0.1.1", &[]);
        // Some operators of Kubernetes give the master `localhost` as its own name, and the others
        // the name of its service.
        let both = "::1 127.0.0.1 10.0.0.7 fd00::7";
        check("localhost", "::1 127.0.0.1", true, true, both, &["localhost is ::1, 127.0.0.1", "10.0.0.7"]);
        check("localhost", "::1 127.0.0.1", true, false, "::1 127.0.0.1", &[]);
    }

    #[test]
    fn address_of_another_host_is_assumed_translated_or_not_served() {
        check("gate", "192.0.2.1", true, true, "10.0.0.7 fd00::7 127.0.0.1", &["192.0.2.1", "--local-addr"]);
        check("gate", "192.0.2.1", false, true, "", &[]);
    }

    #[test]
    fn local_address_is_an_address_or_an_interface() {
        assert_eq!(parse_local("127.0.0.1"), Ok(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(parse_local("lo"), Ok(Ipv4Addr::LOCALHOST.into()));
        assert!(parse_local("192.0.2.1").unwrap_err().contains("192.0.2.1"));
        assert!(parse_local("no-such-thing.invalid").unwrap_err().contains("no-such-thing.invalid"));
    }

    #[tokio::test]
    async fn connect_error_names_each_attempt_and_its_source_address() {
        let error = connect("127.0.0.1", 1, None, Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(error.to_string().starts_with("127.0.0.1:1 from 127.0.0.1: "), "{error}");
    }
}
