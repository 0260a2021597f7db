//! Files that ranks touch to show progress.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use tempfile::TempDir;

/// A folder with a file for each process, which the process makes. The folder is a temporary one
/// instead of the folder of the logs, which may be on a file system that does not respond.
pub(crate) struct Heartbeats(TempDir);

impl Heartbeats {
    /// Makes the folder. Its time of modification is 1970 until a process makes a file in it.
    pub(crate) fn make() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("ice-launch-heartbeats-").tempdir()?;
        fs::File::open(folder.path())?.set_modified(UNIX_EPOCH)?;
        Ok(Self(folder))
    }

    /// Returns the path of the folder, which is absolute.
    pub(crate) fn folder(&self) -> &Path {
        self.0.path()
    }

    /// Returns the file of a process, by the number that the agent has given to the process.
    pub(crate) fn file(&self, process: u64) -> PathBuf {
        self.0.path().join(process.to_string())
    }

    /// Returns the times at which these processes last touched their files, since 1970. A process
    /// that has not touched its file yet is left out.
    pub(crate) fn touched(&self, processes: impl IntoIterator<Item = (u32, u64)>) -> BTreeMap<u32, Duration> {
        // Most programs have no heartbeats, and one look tells that for all ranks.
        if fs::metadata(self.0.path()).and_then(|folder| folder.modified()).is_ok_and(|at| at == UNIX_EPOCH) {
            return BTreeMap::new();
        }
        let touched = |process| {
            let modified = fs::metadata(self.file(process)).and_then(|file| file.modified()).ok()?;
            Some(modified.duration_since(UNIX_EPOCH).unwrap_or_default())
        };
        processes.into_iter().filter_map(|(rank, process)| Some((rank, touched(process)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_as_soon_as_a_process_has_made_one() {
        let heartbeats = Heartbeats::make().unwrap();
        let touched = || heartbeats.touched([(0, 10), (1, 11)]).into_keys().collect::<Vec<_>>();
        assert!(touched().is_empty());
        fs::write(heartbeats.file(11), "").unwrap();
        assert_eq!(touched(), [1]);
        fs::write(heartbeats.file(10), "").unwrap();
        assert_eq!(touched(), [0, 1]);
    }
}
