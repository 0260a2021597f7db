//! Messages between the ranks that write one checkpoint. They go through the store and not through
//! the process group: a thread sends them while the group is busy with training.

use std::path::Path;
use std::time::{Duration, Instant};

use ice_c10d::{ErrorKind, Store};

use crate::{Error, Result};

/// Time that a rank may take to write its share after the first rank has: as long as a collective
/// may take.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Interval at which a waiting rank checks whether the round is over.
const LOOK: Duration = Duration::from_millis(500);

/// Returns whether the round is over, so that some rank will never answer.
pub(super) type IsOver = dyn Fn() -> bool + Send + Sync;

/// Messages between ranks, by key.
pub(super) trait Exchange: Send + Sync {
    /// Posts a message.
    fn post(&self, key: &str, message: &[u8]) -> Result<()>;

    /// Waits briefly for a message. Returns `None` if the message has not arrived.
    fn look(&self, key: &str) -> Result<Option<Vec<u8>>>;

    /// Deletes a message.
    fn forget(&self, key: &str);
}

/// Waits for a message for as long as the rank that sends it may live.
///
/// # Errors
/// [`Error::Stopped`] if the round is over.
pub(super) fn wait(exchange: &dyn Exchange, key: &str, is_over: &IsOver, path: &Path) -> Result<Vec<u8>> {
    let started = Instant::now();
    loop {
        if let Some(message) = exchange.look(key)? {
            return Ok(message);
        }
        if is_over() {
            tracing::warn!("checkpoint {}: not saved, since another rank is gone", path.display());
            return Err(Error::Stopped);
        }
        if started.elapsed() > PATIENCE {
            let problem = format!("waited {} minutes for the other ranks to write", PATIENCE.as_secs() / 60);
            return Err(ice_checkpoint::Error::checkpoint(path, problem).into());
        }
    }
}

impl Exchange for Store {
    fn post(&self, key: &str, message: &[u8]) -> Result<()> {
        Ok(self.set(key, message)?)
    }

    fn look(&self, key: &str) -> Result<Option<Vec<u8>>> {
        match self.wait(&[key], LOOK) {
            Ok(()) => Ok(Some(self.get(key)?)),
            Err(error) if error.kind() == ErrorKind::Timeout => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn forget(&self, key: &str) {
        if let Err(error) = self.delete(key) {
            tracing::debug!(%error, key, "a message about a checkpoint stays in the store");
        }
    }
}
