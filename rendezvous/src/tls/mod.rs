//! TLS 1.3 between agents and the coordinator, without certificates.
//!
//! The server creates a key per process and presents it raw (RFC 7250). The agent accepts any key:
//! the proofs of the token, exchanged inside TLS, are bound to this connection and authenticate
//! both ends (see [`crate::auth`]).
//!
//! A peer that expects plain text and receives TLS, or the reverse, answers with the same seven
//! bytes: a TLS alert. TLS clients understand it, and no frame starts with these bytes. A build
//! without the feature `tls` refuses TLS in this way, too.

#[cfg(not(feature = "tls"))]
mod absent;
#[cfg(feature = "tls")]
mod session;

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

#[cfg(not(feature = "tls"))]
pub(crate) use self::absent::{Acceptor, Problem, connect, problem};
#[cfg(feature = "tls")]
pub(crate) use self::session::{Acceptor, Problem, connect, problem};
use crate::channel::timed;

/// First byte of a TLS connection: a handshake record (RFC 8446, section 5.1). No command of the
/// store and no frame starts with it.
pub(crate) const HANDSHAKE: u8 = 0x16;
/// A fatal alert, `handshake_failure` (RFC 8446, section 6).
const REFUSAL: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 40];
/// Maximum of bytes that an unauthenticated peer may send in total. An agent needs less than a
/// third.
const MAX_UNAUTHENTICATED: u64 = 4096;

/// A failed handshake of TLS.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The peer has answered in the way of one without TLS.
    #[cfg(feature = "tls")]
    Refused,
    /// Any other failure; [`problem`] finds an error of TLS in it.
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Returns whether these bytes start an alert.
pub(crate) fn is_refusal(first: &[u8; 4]) -> bool {
    first[..2] == REFUSAL[..2]
}

/// Sends the alert, and waits until the peer has closed.
pub(crate) async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let part = async {
        stream.write_all(&REFUSAL).await?;
        stream.shutdown().await?;
        // Closing a socket with unread input sends a reset, which could overtake the alert.
        let mut rest = stream.take(MAX_UNAUTHENTICATED);
        while rest.read(&mut [0; 256]).await? > 0 {}
        Ok(())
    };
    timed(part).await
}
