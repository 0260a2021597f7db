//! Detection of a silent peer, for both ends of an agent's connection.

use std::io;

use ice_proto::rendezvous::KeepAlive;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// Reads available bytes, or fails with `TimedOut` after a silence.
///
/// The intervals are awaited one by one: a process that was suspended for minutes finds one of them
/// elapsed when it resumes, and not all.
pub(crate) async fn read(
    keep_alive: KeepAlive,
    reader: &mut (impl AsyncRead + Unpin),
    buffer: &mut [u8],
) -> io::Result<usize> {
    for _ in 0..keep_alive.attempts {
        if let Ok(read) = timeout(keep_alive.interval, reader.read(buffer)).await {
            return read;
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncWriteExt;
    use tokio::time::{Instant, advance};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn silence_times_out() {
        let (mut ours, _theirs) = tokio::io::duplex(8);
        let (start, keep_alive) = (Instant::now(), KeepAlive::default());
        assert_eq!(
            read(keep_alive, &mut ours, &mut [0; 8]).await.unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
        assert_eq!(start.elapsed(), keep_alive.interval * keep_alive.attempts);
    }

    #[tokio::test(start_paused = true)]
    async fn suspended_process_reads_what_arrives_next() {
        let (mut ours, mut theirs) = tokio::io::duplex(8);
        let reading =
            tokio::spawn(async move { read(KeepAlive::default(), &mut ours, &mut [0; 8]).await.unwrap() });
        tokio::task::yield_now().await;
        advance(Duration::from_secs(3600)).await;
        tokio::task::yield_now().await;
        theirs.write_all(b"me").await.unwrap();
        assert_eq!(reading.await.unwrap(), 2);
    }
}
