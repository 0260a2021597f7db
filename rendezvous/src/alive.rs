//! How each end of an agent's connection knows that the other lives.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::time::timeout;

/// Each end says something this often.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// An end that says nothing for so many periods is gone.
const PERIODS: u32 = 3;

/// Reads what comes, or fails after a silence.
///
/// The periods are waited for one by one: a process that was stopped for minutes and goes on finds one of them over, not all.
pub(crate) async fn read(reader: &mut (impl AsyncRead + Unpin), buffer: &mut [u8]) -> io::Result<usize> {
    for _ in 0..PERIODS {
        if let Ok(read) = timeout(KEEP_ALIVE, reader.read(buffer)).await {
            return read;
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::time::{Instant, advance};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_silence_ends_it() {
        let (mut ours, _theirs) = tokio::io::duplex(8);
        let start = Instant::now();
        assert_eq!(read(&mut ours, &mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(start.elapsed(), KEEP_ALIVE * PERIODS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_was_stopped_hears_what_comes_next() {
        let (mut ours, mut theirs) = tokio::io::duplex(8);
        let reading = tokio::spawn(async move { read(&mut ours, &mut [0; 8]).await.unwrap() });
        tokio::task::yield_now().await;
        advance(Duration::from_secs(3600)).await;
        tokio::task::yield_now().await;
        theirs.write_all(b"me").await.unwrap();
        assert_eq!(reading.await.unwrap(), 2);
    }
}
