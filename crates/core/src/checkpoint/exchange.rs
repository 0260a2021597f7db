//! How the ranks that write one checkpoint tell each other what they have written. It goes through the store and not through the
//! process group, since a thread does it while the group is busy with training.

use std::path::Path;
use std::time::{Duration, Instant};

use ice_c10d::{ErrorKind, Store};

use crate::{Error, Result};

/// How long a rank may take to write its share after the first one has: as long as a collective may.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// How often a rank that waits looks whether the round is over.
const LOOK: Duration = Duration::from_millis(500);

/// Whether the round is over, so that some rank will never answer.
pub(super) type IsOver = dyn Fn() -> bool + Send + Sync;

/// Messages between ranks, by key.
pub(super) trait Exchange: Send + Sync {
    /// Leaves a message.
    fn post(&self, key: &str, message: &[u8]) -> Result<()>;

    /// Waits a little for a message; `None` where there is none yet.
    fn look(&self, key: &str) -> Result<Option<Vec<u8>>>;

    /// Forgets a message.
    fn forget(&self, key: &str);
}

/// Waits for a message as long as the rank that it should come from may live.
///
/// # Errors
/// [`Error::Stopped`] once the round is over.
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
