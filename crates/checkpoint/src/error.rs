use std::io;
use std::path::{Path, PathBuf};

/// Result of a fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Reasons that a checkpoint cannot be written, read or found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of a checkpoint differs from what was written, or cannot be written in this form.
    #[error("checkpoint {}: {problem}", path.display())]
    Checkpoint {
        /// Folder of the checkpoint, or a file in it.
        path: PathBuf,
        /// Description of the problem.
        problem: String,
    },
    /// The checkpoint that was asked for does not exist.
    #[error("{0}")]
    NotFound(String),
    /// An object store failed.
    #[error("{address}: {problem}")]
    Remote {
        /// Address of the store, or of an object in it.
        address: String,
        /// Cause of the failure.
        problem: String,
    },
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
    /// Creates an error with a checkpoint's file or folder and its problem.
    pub fn checkpoint(path: &Path, problem: impl ToString) -> Self {
        Self::Checkpoint { path: path.to_owned(), problem: problem.to_string() }
    }

    /// Whether the given path is at fault, so that a retry is useless.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    /// Creates an error that names the file or folder of a failed system call.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
