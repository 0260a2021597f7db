use std::io;

use ice_proto::env::EnvError;
use tch::TchError;

/// A failure of a rank.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable of the environment contract is missing or invalid.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// The device cannot be bound.
    #[error("cannot bind {device}: {problem}")]
    Device {
        /// The device of the rank.
        device: String,
        /// Cause and remedy.
        problem: String,
    },
    /// A collective or the store failed.
    #[error("{doing}: {source}")]
    Collective {
        /// The failed operation.
        doing: String,
        /// Error of c10d.
        source: ice_c10d::Error,
    },
    /// The round is over: another rank is gone, or nodes join or leave.
    #[error("the round is over")]
    RoundOver,
    /// The link to the agent cannot be used.
    #[error("cannot use the link to the agent (ICE_LINK_FD): {source}")]
    Link {
        /// Error of the system.
        source: io::Error,
    },
    /// The process has joined its job before.
    #[error(
        "this process has joined its job before: use the one Worker for all runs, or Launch::run on the thread of the first run"
    )]
    JoinedBefore,
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] TchError),
}

impl From<ice_link::Error> for Error {
    fn from(error: ice_link::Error) -> Self {
        match error {
            ice_link::Error::RoundOver => Self::RoundOver,
            ice_link::Error::Thread(source) => Self::Link { source },
        }
    }
}
