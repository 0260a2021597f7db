use std::io;
use std::path::PathBuf;

use ice_proto::exit::ExitCode;
use ice_rendezvous::Error as Rendezvous;

use crate::supervise::explained;

/// Reasons why the agent itself cannot work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The event loop cannot be set up.
    #[error("cannot set up the event loop: {}", explained(.0))]
    Runtime(io::Error),
    /// A limit of the system leaves no room for the job.
    #[error("cannot start: {0}")]
    Limit(String),
    /// The nodes cannot agree.
    #[error(transparent)]
    Rendezvous(#[from] ice_rendezvous::Error),
    /// A log folder or file cannot be made.
    #[error("cannot write logs to {}: {source}: choose another --log-dir", path.display())]
    Logs {
        /// The folder or file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The pipe for the timers of ranks cannot be made.
    #[error(
        "TORCHELASTIC_TIMER_FILE: cannot make the pipe {}: {source}: name another path, or leave the variable out",
        path.display()
    )]
    TimerPipe {
        /// The pipe, or its folder.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The file for events cannot be written.
    #[error("cannot write events to {}: {source}: choose another --events", path.display())]
    Events {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

impl Error {
    /// Returns the exit code of the process after this error.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Rendezvous(Rendezvous::Bind { .. } | Rendezvous::Resolve { .. })
            | Self::Limit(_)
            | Self::Logs { .. }
            | Self::TimerPipe { .. }
            | Self::Events { .. } => ExitCode::Usage,
            _ => ExitCode::Failure,
        }
    }
}
