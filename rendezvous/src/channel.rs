//! The kind of an agent's connection, and the timeout of its handshake.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

/// Timeout of each step of the handshake.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The kind of a connection, and its channel binding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    /// Without TLS there is no binding.
    Plain,
    /// Inside TLS, with the channel binding.
    #[cfg_attr(not(any(feature = "tls", test)), expect(dead_code, reason = "TLS alone has it"))]
    Tls([u8; 32]),
}

/// Limits work to [`HANDSHAKE_TIMEOUT`].
pub(crate) async fn timed<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(HANDSHAKE_TIMEOUT, work).await?
}
