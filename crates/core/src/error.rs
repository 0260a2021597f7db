use std::io;
use std::path::{Path, PathBuf};

use tch::TchError;

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a graph cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program put its graph or its tasks together wrongly.
    #[error("{0}")]
    Graph(String),
    /// A data file is missing or not what it should be.
    #[error("data file {}: {problem}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// An option has a value that cannot be used.
    #[error("{0}")]
    Usage(String),
    /// A node failed.
    #[error("node `{uid}`, {phase}: {source}")]
    Node {
        /// The node.
        uid: String,
        /// What it was doing.
        phase: &'static str,
        /// Why.
        source: Box<Error>,
    },
    /// A checkpoint could not be saved.
    #[error("cannot save a checkpoint: {0}")]
    Save(String),
    /// A checkpoint cannot be found, written or read.
    #[error(transparent)]
    Checkpoint(#[from] ice_checkpoint::Error),
    /// A checkpoint does not fit the program that resumes from it.
    #[error("cannot resume: {0}")]
    Resume(String),
    /// The agent has asked the run to end.
    #[error("stopped on request")]
    Stopped,
    /// The rank cannot go on.
    #[error(transparent)]
    Worker(#[from] ice_worker::Error),
    /// The gradient exchange or a fused operation failed.
    #[error(transparent)]
    C10d(#[from] ice_c10d::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] TchError),
    /// The file system failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// Whether the command line or a file that it names is at fault, so that nothing is gained by trying again.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Usage(_) | Self::Data { .. } | Self::Resume(_) => true,
            Self::Node { source, .. } => source.is_usage(),
            Self::Checkpoint(error) => error.is_usage(),
            _ => false,
        }
    }

    /// Whether another rank may be the cause.
    pub(crate) fn is_collective(&self) -> bool {
        match self {
            Self::C10d(_) | Self::Worker(ice_worker::Error::Collective { .. }) => true,
            Self::Node { source, .. } => source.is_collective(),
            _ => false,
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn at(self, uid: &str, phase: &'static str) -> Self {
        match self {
            nested @ Self::Node { .. } => nested,
            source => Self::Node { uid: uid.into(), phase, source: Box::new(source) },
        }
    }
}
