//! The choice of the checkpoint to resume from: the newest valid one. Damaged checkpoints are
//! reported and skipped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::{BEST, CHECKPOINTS, Checkpoint, Error, MANIFEST, Manifest, Result, is_remote};

/// Folder within the output folder for checkpoints from object stores.
#[cfg(feature = "object-store")]
const DOWNLOADS: &str = "downloads";

/// The checkpoint to resume from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResumeFrom {
    /// The newest valid checkpoint of this run id below the output folder.
    Latest,
    /// Like [`ResumeFrom::Latest`], but starts from the beginning if this run id has not saved any
    /// checkpoint. For job scripts that both start and continue a job.
    Auto,
    /// The folder of a checkpoint, a folder of checkpoints, or a folder of such folders: the newest
    /// valid checkpoint in it. Or the address of an object store with checkpoints.
    Path(PathBuf),
}

impl FromStr for ResumeFrom {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "latest" => Self::Latest,
            "auto" => Self::Auto,
            path => Self::Path(path.into()),
        })
    }
}

/// A folder that looks like a checkpoint, with its manifest or the manifest's error.
#[derive(Debug)]
pub struct Candidate {
    /// Folder of the candidate.
    pub path: PathBuf,
    /// Manifest of the candidate. Its other files have not been checked.
    pub manifest: Result<Manifest>,
}

impl Candidate {
    /// Returns the key for sorting candidates by age: the time of the save, then the training
    /// steps.
    pub(crate) fn age(&self) -> Option<(u64, u64)> {
        let manifest = self.manifest.as_ref().ok()?;
        Some((manifest.saved_unix_ms, manifest.counters.train_steps))
    }
}

/// Returns the checkpoints directly in a folder, the oldest first. Checkpoints with an unreadable
/// manifest come before all others.
pub fn candidates(folder: &Path) -> Vec<Candidate> {
    let mut candidates: Vec<_> = folders(folder)
        .into_iter()
        .filter(|path| path.join(MANIFEST).exists() || parent_holds_checkpoints(path))
        .map(|path| Candidate { manifest: Manifest::read(&path), path })
        .collect();
    candidates.sort_by(|a, b| (a.age(), &a.path).cmp(&(b.age(), &b.path)));
    candidates
}

fn parent_holds_checkpoints(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name);
    parent.is_some_and(|name| name == CHECKPOINTS || name == BEST)
}

impl Checkpoint {
    /// Finds and verifies the checkpoint to resume from.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no valid checkpoint. The message names the searched places.
    pub fn find(from: &ResumeFrom, out_dir: &Path, run_id: &str) -> Result<Self> {
        let of_run = |run: &Path| [run.join(CHECKPOINTS), run.join(BEST)];
        let found = match from {
            ResumeFrom::Path(path) if is_remote(&path.to_string_lossy()) => {
                Self::download(&path.to_string_lossy(), out_dir)?
            }
            ResumeFrom::Path(path) if path.join(MANIFEST).exists() => return Self::open(path),
            ResumeFrom::Path(path) => {
                let [own, best] = of_run(path);
                // The path may also be an output folder, with the folders of runs.
                let below = || folders(path).iter().flat_map(|run| of_run(run)).collect::<Vec<_>>();
                Self::newest_of(&[path.clone(), own, best], None).or_else(|| Self::newest_of(&below(), None))
            }
            ResumeFrom::Latest | ResumeFrom::Auto => {
                let all: Vec<_> = folders(out_dir).iter().flat_map(|run| of_run(run)).collect();
                Self::newest_of(&all, Some(run_id))
            }
        };
        found.ok_or_else(|| {
            Error::NotFound(match from {
                ResumeFrom::Path(path) => format!("--resume-from {}: no valid checkpoint there", path.display()),
                ResumeFrom::Auto => format!(
                    "--resume-from auto: run id `{run_id}` has checkpoints below {}, and none is valid: repair or remove them",
                    out_dir.display()
                ),
                ResumeFrom::Latest => format!(
                    "--resume-from latest: no valid checkpoint of run id `{run_id}` below {}: check --out-dir and --run-id",
                    out_dir.display()
                ),
            })
        })
    }

    /// Like [`Checkpoint::find`], but returns `None` for [`ResumeFrom::Auto`] if the run id has no
    /// checkpoint to resume from, not even a damaged one. To start from the beginning then loses
    /// nothing.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::find`], and [`Error::Io`] if the output folder cannot be read.
    pub fn find_if_any(from: &ResumeFrom, out_dir: &Path, run_id: &str) -> Result<Option<Self>> {
        if *from == ResumeFrom::Auto && !Self::has_any(out_dir, run_id)? {
            return Ok(None);
        }
        Self::find(from, out_dir, run_id).map(Some)
    }

    /// Whether this run id has checkpoints of whole graphs, including damaged ones.
    fn has_any(out_dir: &Path, run_id: &str) -> Result<bool> {
        match fs::read_dir(out_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            entries => entries.map(drop).map_err(Error::io(out_dir))?,
        }
        let is_of_run = |run: &Path, manifest: &Result<Manifest>| match manifest {
            Ok(manifest) => manifest.run_id == run_id && manifest.tags.is_none(),
            Err(_) => run.file_name().is_some_and(|name| is_named_for(&name.to_string_lossy(), run_id)),
        };
        Ok(folders(out_dir).iter().any(|run| {
            let all =
                [run.join(CHECKPOINTS), run.join(BEST)].into_iter().flat_map(|holder| candidates(&holder));
            all.into_iter().any(|candidate| is_of_run(run, &candidate.manifest))
        }))
    }

    #[cfg(feature = "object-store")]
    fn download(address: &str, out_dir: &Path) -> Result<Option<Self>> {
        crate::Remote::open(address)?.newest(&out_dir.join(DOWNLOADS))
    }

    #[cfg(not(feature = "object-store"))]
    fn download(address: &str, _: &Path) -> Result<Option<Self>> {
        Err(crate::without_remote(address))
    }

    /// Returns the newest valid checkpoint of a job whose program has several runs, from the folder
    /// of the run number `from` or of a later run. `first` is the folder of the first run.
    pub fn newest_of_runs(first: &Path, from: u64) -> Option<Self> {
        let is_due = |folder: &PathBuf| number_of(folder, first).is_some_and(|number| number >= from);
        let runs = first.parent().map(folders).unwrap_or_default().into_iter().filter(is_due);
        let holders: Vec<_> = runs.flat_map(|run| [run.join(CHECKPOINTS), run.join(BEST)]).collect();
        Self::newest_of(&holders, None)
    }

    /// Returns the newest valid checkpoint of a whole graph directly in one of the folders. Damaged
    /// checkpoints are reported and skipped.
    pub fn newest_of(holders: &[PathBuf], run_id: Option<&str>) -> Option<Self> {
        let warn = |path: &Path, error: &Error| tracing::warn!("skipping {}: {error}", path.display());
        let mut all: Vec<_> = holders.iter().flat_map(|holder| candidates(holder)).collect();
        all.sort_by(|a, b| (a.age(), &a.path).cmp(&(b.age(), &b.path)));
        let mut fitting = Vec::new();
        for candidate in all {
            match candidate.manifest {
                Ok(manifest)
                    if run_id.is_some_and(|run_id| run_id != manifest.run_id) || manifest.tags.is_some() => {}
                Ok(_) => fitting.push(candidate.path),
                Err(error) => warn(&candidate.path, &error),
            }
        }
        fitting.iter().rev().find_map(|path| Self::open(path).inspect_err(|error| warn(path, error)).ok())
    }
}

/// Returns the folder of a run of a program, given the folder of its first run. The second run has
/// the suffix `.2`.
pub fn folder_of_run(first: &Path, number: u64) -> PathBuf {
    let mut folder = first.as_os_str().to_owned();
    if number > 0 {
        folder.push(format!(".{}", number + 1));
    }
    folder.into()
}

/// Returns the number of the run with this folder, or `None` for a folder of another job.
fn number_of(folder: &Path, first: &Path) -> Option<u64> {
    let name = folder.file_name()?.to_str()?.strip_prefix(first.file_name()?.to_str()?)?;
    match name {
        "" => Some(0),
        name => name.strip_prefix('.')?.parse::<u64>().ok()?.checked_sub(1),
    }
}

/// Whether a folder has the name of a run of this id: `<run id>_<stamp>`, with at most one `_` in
/// the stamp.
pub(crate) fn is_named_for(folder: &str, run_id: &str) -> bool {
    let stamp = folder.strip_prefix(run_id).and_then(|rest| rest.strip_prefix('_'));
    stamp.is_some_and(|stamp| stamp.matches('_').count() <= 1)
}

/// Returns the visible folders in a folder, without symbolic links. Returns none if the folder
/// cannot be read.
pub(crate) fn folders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let visible = |entry: &fs::DirEntry| {
        !entry.file_name().as_encoded_bytes().starts_with(b".")
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    entries.filter_map(Result::ok).filter(visible).map(|entry| entry.path()).collect()
}
