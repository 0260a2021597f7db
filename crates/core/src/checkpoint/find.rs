//! Which checkpoint to go on from: the newest valid one wins, a damaged one is reported and skipped.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Checkpoint, MANIFEST, ResumeFrom};
use crate::{Error, Result};

impl Checkpoint {
    /// Finds and reads the checkpoint to go on from.
    ///
    /// # Errors
    /// [`Error::Usage`] where there is none, with where it was looked for.
    pub fn find(from: &ResumeFrom, out_dir: &Path, run_id: &str) -> Result<Self> {
        let found = match from {
            ResumeFrom::Path(path) if path.join(MANIFEST).exists() => return Self::open(path),
            ResumeFrom::Path(path) => {
                [path.clone(), path.join("ckpts")].iter().find_map(|path| Self::newest_in(path))
            }
            ResumeFrom::Latest => {
                let all = folders(out_dir).iter().flat_map(|run| folders(&run.join("ckpts"))).collect();
                Self::newest_of(all, Some(run_id))
            }
        };
        found.ok_or_else(|| {
            Error::Usage(match from {
                ResumeFrom::Path(path) => format!("--resume-from {}: no valid checkpoint there", path.display()),
                ResumeFrom::Latest => format!(
                    "--resume-from latest: no valid checkpoint of run id `{run_id}` below {}: check --out-dir and --run-id",
                    out_dir.display()
                ),
            })
        })
    }

    /// The newest valid checkpoint directly in a folder, of any job.
    pub(crate) fn newest_in(folder: &Path) -> Option<Self> {
        Self::newest_of(folders(folder), None)
    }

    fn newest_of(candidates: Vec<PathBuf>, run_id: Option<&str>) -> Option<Self> {
        let warn = |path: &Path, error: &Error| tracing::warn!("skipping {}: {error}", path.display());
        let mut dated = Vec::new();
        for path in candidates {
            match Self::open_manifest(&path) {
                Ok(manifest) if run_id.is_none_or(|run_id| run_id == manifest.run_id) => {
                    dated.push((manifest.saved_unix_ms, manifest.counters.train_steps(), path));
                }
                Ok(_) => {}
                Err(error) => warn(&path, &error),
            }
        }
        dated.sort();
        dated.iter().rev().find_map(|(.., path)| Self::open(path).inspect_err(|error| warn(path, error)).ok())
    }
}

/// The visible folders in a folder, in order of their names; none where it cannot be read.
fn folders(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let hidden = |path: &Path| path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let visible = |path: &PathBuf| path.is_dir() && !hidden(path);
    let mut folders: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(visible).collect();
    folders.sort();
    folders
}
