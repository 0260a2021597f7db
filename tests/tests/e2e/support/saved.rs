//! Checkpoints that runs have saved.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the whole checkpoints of all runs in an output folder, ordered by run of the program,
/// then by training steps, then by epochs.
pub(crate) fn checkpoints(out_dir: &Path) -> Vec<PathBuf> {
    let runs = entries(out_dir);
    let all = runs.iter().flat_map(|run| entries(&run.join("ckpts")));
    // Other entries are links, or still being written.
    let named = all.filter_map(|path| Some((progress(&path)?, path)));
    let mut whole: Vec<_> = named.filter(|(_, path)| path.join("manifest.json").is_file()).collect();
    whole.sort();
    whole.into_iter().map(|(_, path)| path).collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map_or(Vec::new(), |all| all.map(|entry| entry.unwrap().path()).collect())
}

/// Returns run, steps and epochs of a checkpoint named `E<epochs>S<steps>`.
fn progress(path: &Path) -> Option<(u64, u64, u64)> {
    let run = path.ancestors().nth(2)?.extension().and_then(|run| run.to_str()?.parse().ok()).unwrap_or(1);
    let (epochs, steps) = path.file_name()?.to_str()?.strip_prefix('E')?.split_once('S')?;
    Some((run, steps.parse().ok()?, epochs.parse().ok()?))
}
