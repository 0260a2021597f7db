use std::io;
use std::path::{Path, PathBuf};

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint cannot be written, read or found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of a checkpoint is not what was written, or cannot be written like this.
    #[error("checkpoint {}: {problem}", path.display())]
    Checkpoint {
        /// The checkpoint's folder, or a file in it.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// There is no checkpoint where one was asked for.
    #[error("{0}")]
    NotFound(String),
    /// An object store failed.
    #[error("{address}: {problem}")]
    Remote {
        /// The store, or an object in it.
        address: String,
        /// Why.
        problem: String,
    },
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
    /// A checkpoint's file or folder and what is wrong with it.
    pub fn checkpoint(path: &Path, problem: impl ToString) -> Self {
        Self::Checkpoint { path: path.to_owned(), problem: problem.to_string() }
    }

    /// Whether the path that was asked for is at fault, so that nothing is gained by trying again.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NotFound(_))
    }

    /// Names the file or folder that the system could not handle.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
