use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use ice_proto::rendezvous::Round;
use tempfile::TempDir;

use crate::{Error, LaunchPlan};

/// How much of the end of a log file is read for the report.
const TAIL: u64 = 8 << 10;

/// `<log_dir>/<run_id>_<stamp>/`, with `_node<n>` at its end where there are several nodes, and `attempt_<n>/<local rank>/` below.
pub(crate) struct LogFolder {
    path: PathBuf,
    temporary: Option<TempDir>,
    /// Restarts before the attempt that is under way, and the name of its folder.
    attempt: Option<(u32, String)>,
}

/// The files of a rank in an attempt.
#[derive(Debug, Clone, Default)]
pub(crate) struct RankFiles {
    pub(crate) stdout: PathBuf,
    pub(crate) stderr: PathBuf,
    pub(crate) error: PathBuf,
    pub(crate) stacks: PathBuf,
}

impl LogFolder {
    pub(crate) fn make(plan: &LaunchPlan, round: &Round) -> Result<Self, Error> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Logs { path, source }
        };
        let (root, temporary) = match &plan.logs.folder {
            // A rank may change its working directory before it writes its error file.
            Some(folder) => (std::path::absolute(folder).map_err(fail(folder))?, None),
            None => {
                let folder = tempfile::Builder::new()
                    .prefix("ice-launch-")
                    .tempdir()
                    .map_err(fail(&std::env::temp_dir()))?;
                (folder.path().to_owned(), Some(folder))
            }
        };
        // Several nodes may share the folder, and their local ranks the numbers.
        let node = if round.nodes > 1 { format!("_node{}", round.you.group_rank) } else { String::new() };
        let path = root.join(format!("{}_{}{node}", plan.run_id, round.run_stamp));
        fs::create_dir_all(&path).map_err(fail(&path))?;
        Ok(Self { path, temporary, attempt: None })
    }

    /// Begins an attempt. A round that follows a change of the nodes is one, too, though no restart is counted.
    pub(crate) fn begin(&mut self, round: &Round) {
        let restarts = round.restart_count;
        let again = self.attempt.as_ref().is_some_and(|(last, _)| *last == restarts);
        let suffix = if again { format!("_round_{}", round.number) } else { String::new() };
        self.attempt = Some((restarts, format!("attempt_{restarts}{suffix}")));
    }

    fn attempt(&self) -> PathBuf {
        self.path.join(self.attempt.as_ref().map_or("attempt_0", |(_, name)| name))
    }

    /// Makes the folder of a rank.
    pub(crate) fn rank(&self, local_rank: u32) -> Result<RankFiles, Error> {
        let folder = self.attempt().join(local_rank.to_string());
        fs::create_dir_all(&folder).map_err(|source| Error::Logs { path: folder.clone(), source })?;
        Ok(RankFiles {
            stdout: folder.join("stdout.log"),
            stderr: folder.join("stderr.log"),
            error: folder.join("error.json"),
            stacks: folder.join("stacks.txt"),
        })
    }

    /// The folder of the job.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file for lines that are written once more: `stdout` or `stderr` of all ranks of an attempt.
    pub(crate) fn filtered(&self, stream: &str) -> PathBuf {
        self.attempt().join(format!("filtered_{stream}.log"))
    }

    /// Whether the user named the folder.
    pub(crate) fn is_named(&self) -> bool {
        self.temporary.is_none()
    }

    /// Keeps a temporary folder after the end.
    pub(crate) fn keep(&mut self) {
        if let Some(folder) = self.temporary.take() {
            let _ = folder.keep();
        }
    }
}

/// The last lines of a file.
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
    /// The last lines of the stderr file, where there is one.
    pub(crate) fn stderr_tail(&self, count: usize) -> Vec<String> {
        last_lines(&self.stderr, count).unwrap_or_default()
    }
}
