use std::io;
use std::path::{Path, PathBuf};

use ice_c10d::ErrorKind;
use tch::TchError;

/// Result of a fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Reasons that a graph cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program assembled its graph or its tasks incorrectly.
    #[error("{0}")]
    Graph(String),
    /// A data file is missing or malformed.
    #[error("data file {}: {problem}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// The problem and its remedy.
        problem: String,
    },
    /// An option has an unusable value.
    #[error("{0}")]
    Usage(String),
    /// A node failed.
    #[error("node `{uid}`, {phase}: {source}")]
    Node {
        /// Uid of the node.
        uid: String,
        /// Phase of the step in which it failed.
        phase: &'static str,
        /// Cause of the failure.
        source: Box<Error>,
    },
    /// A sample of a dataset cannot be read.
    #[error("sample {index}: {source}")]
    Sample {
        /// Index of the sample in the dataset. For a stream, its position in the pass.
        index: u64,
        /// Cause of the failure.
        source: Box<Error>,
    },
    /// A batch of a dataset cannot be assembled.
    #[error("batch of samples {}: {source}", first_of(samples))]
    Batch {
        /// Indices of the samples in the batch.
        samples: Vec<i64>,
        /// Cause of the failure.
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
    /// A node leaves the current task within a step, which then does not count; or a closure leaves
    /// its repetition. If nodes return it, all ranks must do so in the same step. Prefer
    /// [`Outputs::stop_task`](crate::Outputs::stop_task) and
    /// [`Run::stop_task`](crate::Run::stop_task), which work from a single rank.
    #[error("the task was left before its end")]
    StopTask,
    /// A node or a closure ends the run successfully. If nodes return it, all ranks must do so in
    /// the same step. Prefer [`Outputs::stop_all_tasks`](crate::Outputs::stop_all_tasks) and
    /// [`Run::stop_all_tasks`](crate::Run::stop_all_tasks), which work from a single rank.
    #[error("the run was ended before its end")]
    StopAllTasks,
    /// Gradients are not finite. The message names the ranks.
    #[error("{0}")]
    NotFinite(String),
    /// The agent asked the run to end.
    #[error("stopped on request")]
    Stopped,
    /// Ranks of another node leave at this step, on request. The remaining ranks continue in the
    /// next round.
    #[error("nodes leave")]
    NodesLeave,
    /// The rank cannot continue.
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
        /// Cause of the failure.
        source: io::Error,
    },
}

impl Error {
    /// Whether the command line, or a file that it names, is at fault, so that a retry is useless.
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

    /// Returns the error below the wrappers that name nodes.
    pub(crate) fn root(&self) -> &Self {
        match self {
            Self::Node { source, .. } => source.root(),
            other => other,
        }
    }

    /// Whether another rank, or the connection to it, is lost.
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

/// Formats at most eight of the indices, and the number of the others.
fn first_of(samples: &[i64]) -> String {
    let shown: Vec<_> = samples.iter().take(8).map(i64::to_string).collect();
    let more = if samples.len() > 8 { format!(" and {} more", samples.len() - 8) } else { String::new() };
    format!("{}{more}", shown.join(", "))
}
