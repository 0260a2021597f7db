//! TLS 1.3 between agents and the coordinator, without certificates.
//!
//! The coordinator's host makes a key for as long as it lives and shows it as it is (a raw public key, RFC 7250). The agent accepts any
//! key: the proofs of the token, exchanged inside, hold for this one connection and tell who is at the other end (see [`crate::auth`]).
//!
//! A side that is addressed in the way that it does not speak, plain or TLS, answers with the same seven bytes: a TLS alert. A TLS client
//! understands it, and no frame starts like it. This much is there without the feature `tls`, too: such a build refuses TLS by name.

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
use crate::auth::timed;

/// The first byte of a TLS connection: a record of the handshake (RFC 8446, section 5.1). No command of the store and no frame starts so.
pub(crate) const HANDSHAKE: u8 = 0x16;
/// A fatal alert, `handshake_failure` (RFC 8446, section 6).
const REFUSAL: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 40];
/// Bytes that a stranger may send, all in all. Ours needs less than a third.
const MOST: u64 = 4096;

/// Whether these are the first bytes of an alert.
pub(crate) fn is_refusal(first: &[u8; 4]) -> bool {
    first[..2] == REFUSAL[..2]
}

/// Tells the other end that it is not spoken to in its way, and waits until it has gone.
pub(crate) async fn refuse(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let part = async {
        stream.write_all(&REFUSAL).await?;
        stream.shutdown().await?;
        // What it has sent and nobody reads would reset the connection, and the alert be lost.
        let mut rest = stream.take(MOST);
        while rest.read(&mut [0; 256]).await? > 0 {}
        Ok(())
    };
    timed(part).await
}
