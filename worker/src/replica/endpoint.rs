//! The address of a holder, which ranks find through the store.

use std::net::SocketAddr;

use ice_c10d::Store;

/// Token that proves that a peer is a rank of the round.
pub(super) type Token = [u8; 32];

/// Address of a holder, as published in the store.
pub(super) enum PeerEndpoint {
    Reachable(SocketAddr, Token),
    /// The holder cannot be reached, for this reason.
    Unreachable(String),
}

impl PeerEndpoint {
    fn write(&self) -> String {
        match self {
            Self::Reachable(address, token) => {
                let token: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("{address} {token}")
            }
            Self::Unreachable(problem) => format!("- {problem}"),
        }
    }

    fn read(text: &str) -> Self {
        let parse = || {
            let (address, token) = text.split_once(' ')?;
            let byte = |at: usize| u8::from_str_radix(token.get(2 * at..2 * at + 2)?, 16).ok();
            let bytes: Vec<u8> = (0..32).map(byte).collect::<Option<_>>()?;
            Some(Self::Reachable(address.parse().ok()?, bytes.try_into().ok()?))
        };
        parse().unwrap_or_else(|| Self::Unreachable(text.trim_start_matches("- ").into()))
    }
}

/// Publishes this rank's endpoint, and reads that of its holder.
pub(super) fn exchange_endpoints(
    store: &Store,
    own: usize,
    holder: usize,
    endpoint: &PeerEndpoint,
) -> Result<PeerEndpoint, ice_c10d::Error> {
    let key = |rank: usize| format!("copies/{rank}");
    store.set(&key(own), endpoint.write().as_bytes())?;
    Ok(PeerEndpoint::read(&String::from_utf8_lossy(&store.get(&key(holder))?)))
}
