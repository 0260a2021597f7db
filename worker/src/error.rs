use std::io;

use ice_proto::env::EnvError;
use tch::TchError;

/// Why a rank cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable of the contract is missing or wrong.
    #[error(transparent)]
    Env(#[from] EnvError),
    /// The device cannot be bound.
    #[error("cannot bind {device}: {problem}")]
    Device {
        /// The device of the rank.
        device: String,
        /// Why, and what to do.
        problem: String,
    },
    /// A collective or the store failed.
    #[error("{doing}: {source}")]
    Collective {
        /// What was being done.
        doing: String,
        /// What c10d says.
        source: ice_c10d::Error,
    },
    /// The round is over: another rank is gone, or nodes come and go.
    #[error("the round is over")]
    RoundOver,
    /// The link to the agent cannot be used.
    #[error("cannot use the link to the agent (ICE_LINK_FD): {source}")]
    Link {
        /// Why.
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
