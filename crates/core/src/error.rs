use std::io;
use std::path::{Path, PathBuf};

use ice_c10d::ErrorKind;
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
    /// A sample of a dataset cannot be had.
    #[error("sample {index}: {source}")]
    Sample {
        /// Its index in the dataset; of a stream, its position in the pass.
        index: u64,
        /// Why.
        source: Box<Error>,
    },
    /// A batch of a dataset cannot be made.
    #[error("batch of samples {}: {source}", first_of(samples))]
    Batch {
        /// The indices of its samples.
        samples: Vec<i64>,
        /// Why.
        source: Box<Error>,
    },
    /// The code of a dataset panicked.
    #[error("panicked: {0}")]
    Panicked(String),
    /// A checkpoint could not be saved.
    #[error("cannot save a checkpoint: {0}")]
    Save(String),
    /// A checkpoint cannot be found, written or read.
    #[error(transparent)]
    Checkpoint(#[from] ice_checkpoint::Error),
    /// A checkpoint does not fit the program that resumes from it.
    #[error("cannot resume: {0}")]
    Resume(String),
    /// A node leaves the task that is running, within a step that then does not count, or a closure leaves its repetition. Of nodes, all ranks must
    /// do so in the same step. Prefer [`Outputs::stop_task`](crate::Outputs::stop_task) and [`Run::stop_task`](crate::Run::stop_task), for
    /// which one rank is enough.
    #[error("the task was left before its end")]
    StopTask,
    /// A node or a closure ends the run, which counts as well done. Of nodes, all ranks must do so in the same step. Prefer
    /// [`Outputs::stop_all_tasks`](crate::Outputs::stop_all_tasks) and [`Run::stop_all_tasks`](crate::Run::stop_all_tasks), for which one rank
    /// is enough.
    #[error("the run was ended before its end")]
    StopAllTasks,
    /// Gradients are not finite; says of which ranks.
    #[error("{0}")]
    NotFinite(String),
    /// The agent has asked the run to end.
    #[error("stopped on request")]
    Stopped,
    /// Ranks of another node end at this step, as they were asked to; the others go on in the next round.
    #[error("nodes leave")]
    NodesLeave,
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
            Self::Node { source, .. } | Self::Sample { source, .. } | Self::Batch { source, .. } => {
                source.is_usage()
            }
            Self::Checkpoint(error) => error.is_usage(),
            _ => false,
        }
    }

    /// What it is at its root, whichever node it came from.
    pub(crate) fn root(&self) -> &Self {
        match self {
            Self::Node { source, .. } => source.root(),
            other => other,
        }
    }

    /// Whether another rank, or the way to it, is lost.
    pub(crate) fn is_lost(&self) -> bool {
        let is_lost =
            |error: &ice_c10d::Error| matches!(error.kind(), ErrorKind::Network | ErrorKind::Timeout);
        match self {
            Self::C10d(error) | Self::Worker(ice_worker::Error::Collective { source: error, .. }) => {
                is_lost(error)
            }
            Self::Worker(ice_worker::Error::RoundOver) => true,
            Self::Node { source, .. } => source.is_lost(),
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

    pub(crate) fn of_sample(self, index: u64) -> Self {
        match self {
            stopped @ Self::Stopped => stopped,
            source => Self::Sample { index, source: Box::new(source) },
        }
    }

    pub(crate) fn at(self, uid: &str, phase: &'static str) -> Self {
        match self {
            nested @ Self::Node { .. } => nested,
            source => Self::Node { uid: uid.into(), phase, source: Box::new(source) },
        }
    }
}

/// A list of indices that fits on a line.
fn first_of(samples: &[i64]) -> String {
    let shown: Vec<_> = samples.iter().take(8).map(i64::to_string).collect();
    let more = if samples.len() > 8 { format!(" and {} more", samples.len() - 8) } else { String::new() };
    format!("{}{more}", shown.join(", "))
}
