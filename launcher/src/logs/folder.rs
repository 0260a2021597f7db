use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ice_proto::rendezvous::Round;
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use crate::{Error, LaunchPlan};

/// Number of bytes at the end of a log file that are read for the report.
const TAIL: u64 = 16 << 10;
/// Test data for a disk. A disk without room for 4 KiB is full.
const PROBE: [u8; 4 << 10] = [b'\n'; 4 << 10];
/// Folder for error files while the log folder cannot be written, after the folder for temporary
/// files.
const MEMORY: &str = "/dev/shm";

/// The folder of a job's logs: `<log_dir>/<run_id>_<stamp>/`, with `_node<n>` at its end if there
/// are several nodes, and `attempt_<n>/<local rank>/` below.
pub(crate) struct LogFolder {
    /// `None` if no folder could be made, and the user asked for none.
    path: Option<PathBuf>,
    /// Whether the user named the folder.
    is_named: bool,
    /// Whether the user asked for files in the folder.
    is_wanted: bool,
    temporary: Option<TempDir>,
    /// Folder for the error files of ranks whose own folder cannot be written.
    elsewhere: Option<TempDir>,
    /// Number of restarts before the running attempt, and the name of the attempt's folder.
    attempt: Option<(u32, String)>,
}

/// The files of a rank in an attempt. `None` for a file that cannot be written.
#[derive(Debug, Clone, Default)]
pub(crate) struct RankFiles {
    pub(crate) stdout: Option<PathBuf>,
    pub(crate) stderr: Option<PathBuf>,
    pub(crate) error: Option<PathBuf>,
    pub(crate) stacks: Option<PathBuf>,
}

impl LogFolder {
    /// Makes the folder of the job. If the user wants logs, a folder that cannot be made is an
    /// error and no rank starts.
    pub(crate) fn make(plan: &LaunchPlan, round: &Round) -> Result<Self, Error> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Logs { path, source }
        };
        let (root, temporary) = match &plan.logs.folder {
            // Absolute, because a rank may change its working directory before it writes its error
            // file.
            Some(folder) => (std::path::absolute(folder).map_err(fail(folder))?, None),
            None => match temporary_folder(std::env::temp_dir()) {
                Ok(folder) => (folder.path().to_owned(), Some(folder)),
                Err(error) if plan.logs.are_wanted() => return Err(fail(&std::env::temp_dir())(error)),
                Err(_) => return Ok(Self::without_path()),
            },
        };
        // Several nodes may share the folder and have the same local ranks.
        let node =
            if round.nodes > 1 { format!("_node{}", round.assignment.group_rank) } else { String::new() };
        let path = root.join(format!("{}_{}{node}", plan.run_id, round.run_stamp));
        match fs::create_dir_all(&path) {
            Err(error) if plan.logs.are_wanted() => return Err(fail(&path)(error)),
            Err(_) => return Ok(Self::without_path()),
            Ok(()) => {}
        }
        let (path, is_named, is_wanted) = (Some(path), temporary.is_none(), plan.logs.are_wanted());
        Ok(Self { path, is_named, is_wanted, temporary, elsewhere: None, attempt: None })
    }

    fn without_path() -> Self {
        Self {
            path: None,
            is_named: false,
            is_wanted: false,
            temporary: None,
            elsewhere: None,
            attempt: None,
        }
    }

    /// Begins an attempt. A round without a restart, after nodes joined or left, gets a folder of
    /// its own too: `attempt_<restarts>_round_<n>`.
    pub(crate) fn begin(&mut self, round: &Round) {
        let restarts = round.restart_count;
        let again = self.attempt.as_ref().is_some_and(|(last, _)| *last == restarts);
        let suffix = if again { format!("_round_{}", round.number) } else { String::new() };
        self.attempt = Some((restarts, format!("attempt_{restarts}{suffix}")));
    }

    fn attempt(&self) -> &str {
        self.attempt.as_ref().map_or("attempt_0", |(_, name)| name)
    }

    /// Makes the folder of a rank.
    ///
    /// # Errors
    /// Returns the path that cannot be written, and the error.
    pub(crate) fn rank(&self, local_rank: u32) -> Result<RankFiles, (PathBuf, io::Error)> {
        let Some(path) = &self.path else {
            let none =
                io::Error::new(io::ErrorKind::NotFound, "no folder for temporary files can be written");
            return Err((std::env::temp_dir(), none));
        };
        let folder = path.join(self.attempt()).join(local_rank.to_string());
        let made = fs::create_dir_all(&folder);
        match made.and_then(|()| if self.is_wanted { probe(&folder) } else { probe_if_full(&folder) }) {
            Ok(()) => Ok(RankFiles {
                stdout: Some(folder.join("stdout.log")),
                stderr: Some(folder.join("stderr.log")),
                ..RankFiles::about(&folder)
            }),
            Err(error) => Err((folder, error)),
        }
    }

    /// Returns files for a rank whose folder cannot be written: its error file may still fit into
    /// another folder. Its output has no files.
    pub(crate) fn rank_elsewhere(&mut self, local_rank: u32) -> RankFiles {
        if self.elsewhere.is_none() {
            let roots = [std::env::temp_dir(), MEMORY.into()];
            self.elsewhere = roots.into_iter().find_map(|root| {
                let folder = temporary_folder(root).ok()?;
                probe(folder.path()).ok().map(|()| folder)
            });
        }
        let Some(elsewhere) = &self.elsewhere else { return RankFiles::default() };
        let folder = elsewhere.path().join(self.attempt()).join(local_rank.to_string());
        match fs::create_dir_all(&folder).and_then(|()| probe(&folder)) {
            Ok(()) => RankFiles::about(&folder),
            Err(_) => RankFiles::default(),
        }
    }

    /// Returns the folder of the job.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Checks whether the folder can still be written. Ranks write their logs themselves, and the
    /// agent does not notice when these writes fail.
    ///
    /// # Errors
    /// Returns the folder, and the error.
    pub(crate) fn check(&self) -> Result<(), (&Path, io::Error)> {
        self.path().map_or(Ok(()), |path| probe(path).map_err(|error| (path, error)))
    }

    /// Returns the file for the filtered lines of `stdout` or `stderr` of all ranks of an attempt.
    pub(crate) fn filtered(&self, stream: &str) -> Option<PathBuf> {
        Some(self.path()?.join(self.attempt()).join(format!("filtered_{stream}.log")))
    }

    /// Whether the user named the folder.
    pub(crate) fn is_named(&self) -> bool {
        self.is_named
    }

    /// Keeps temporary folders after the end of the job.
    pub(crate) fn keep(&mut self) {
        for folder in [self.temporary.take(), self.elsewhere.take()].into_iter().flatten() {
            let _ = folder.keep();
        }
    }
}

fn temporary_folder(root: PathBuf) -> io::Result<TempDir> {
    tempfile::Builder::new().prefix("ice-launch-").tempdir_in(root)
}

/// Writes a file as a test. On a full disk a folder can often still be made, but no file, or no
/// byte.
fn probe(folder: &Path) -> io::Result<()> {
    let path = folder.join(".probe");
    let written = File::create(&path).and_then(|mut file| file.write_all(&PROBE));
    let removed = fs::remove_file(&path);
    written.and(removed)
}

/// Writes a probe only if the file system reports that it is full.
///
/// Each probe of each rank delays a restart by a write. A folder that holds only error files
/// therefore gets a probe only if the write may fail. A disk quota is not noticed this way.
fn probe_if_full(folder: &Path) -> io::Result<()> {
    let disk = statvfs(folder)?;
    // A file system that counts no inodes reports 0 of 0.
    let is_full = disk.blocks_available() == 0 || (disk.files() > 0 && disk.files_available() == 0);
    if is_full { probe(folder) } else { Ok(()) }
}

/// Returns the last lines of a file.
pub(crate) fn last_lines(path: &Path, count: usize) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().skip(usize::from(start > 0)).map(ToOwned::to_owned).collect();
    Ok(lines[lines.len().saturating_sub(count)..].to_vec())
}

impl RankFiles {
    /// Returns the files in a folder that describe a failure.
    fn about(folder: &Path) -> Self {
        let (error, stacks) = (Some(folder.join("error.json")), Some(folder.join("stacks.txt")));
        Self { stdout: None, stderr: None, error, stacks }
    }

    /// Returns the last lines of the stderr file, if there is one.
    pub(crate) fn stderr_tail(&self, count: usize) -> Vec<String> {
        self.stderr.as_ref().and_then(|path| last_lines(path, count).ok()).unwrap_or_default()
    }
}
