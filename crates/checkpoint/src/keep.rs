//! Retention of checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use crate::find::Candidate;
use crate::parameters::is_file_name;
use crate::{BEST, CHECKPOINTS, Manifest, Result, Staging, candidates, staging};

/// Removes all but the newest `keep` checkpoints in a folder, and returns the removed ones. Damaged
/// checkpoints do not count and stay, for inspection. `protected` stays unless a newer checkpoint
/// is complete.
///
/// # Errors
/// [`crate::Error::Io`] if a checkpoint cannot be removed.
pub fn keep_last(folder: &Path, keep: usize, protected: Option<&Path>) -> Result<Vec<PathBuf>> {
    let whole: Vec<_> = candidates(folder).into_iter().filter(is_whole).collect();
    let surplus = whole.len().saturating_sub(keep.max(1));
    remove(whole.iter().take(surplus).map(|candidate| &candidate.path), protected, whole.last())
}

/// Removes all but the `keep` best checkpoints in a folder by the measure in their manifests, and
/// returns the removed ones.
///
/// # Errors
/// [`crate::Error::Io`] if a checkpoint cannot be removed.
pub fn keep_best(
    folder: &Path,
    measure: &str,
    keep: usize,
    protected: Option<&Path>,
) -> Result<Vec<PathBuf>> {
    let whole: Vec<_> = candidates(folder).into_iter().filter(is_whole).collect();
    let ranked = ranked(&whole, measure);
    let surplus = ranked.iter().skip(keep.max(1)).map(|candidate| &candidate.path);
    remove(surplus, protected, whole.last())
}

/// Gives the folder of a run the best checkpoints of the run whose `checkpoint` it continues, up to
/// that checkpoint. The other run keeps them, too: both folders share the files if the file system
/// has links.
///
/// # Errors
/// [`crate::Error::Io`] if a checkpoint cannot be added to the folder.
pub fn adopt_best(checkpoint: &Path, folder: &Path) -> Result<()> {
    let Some(holder) = fs::canonicalize(checkpoint).ok().and_then(|path| path.parent().map(PathBuf::from))
    else {
        return Ok(());
    };
    let is_of_run = holder.file_name().is_some_and(|name| name == CHECKPOINTS || name == BEST);
    let Some(run) =
        holder.parent().filter(|run| is_of_run && fs::canonicalize(folder).ok().as_deref() != Some(*run))
    else {
        return Ok(());
    };
    let steps = Manifest::read(checkpoint)?.counters.train_steps;
    for candidate in candidates(&run.join(BEST)).into_iter().filter(is_whole) {
        let (Ok(manifest), Some(name)) = (&candidate.manifest, candidate.path.file_name()) else { continue };
        if manifest.counters.train_steps > steps || !manifest.files.keys().all(|name| is_file_name(name)) {
            continue;
        }
        let staging = Staging::begin(&folder.join(BEST).join(name), "adopted")?;
        for file in manifest.files.keys() {
            staging.adopt(&candidate.path, file)?;
        }
        staging.commit(manifest)?;
    }
    Ok(())
}

/// Returns the candidates that compete by a measure, the best first.
pub(crate) fn ranked<'a>(candidates: &'a [Candidate], measure: &str) -> Vec<&'a Candidate> {
    let mut ranked: Vec<_> = candidates
        .iter()
        .filter_map(|candidate| {
            let best = candidate.manifest.as_ref().ok()?.best.as_ref()?;
            (best.measure == measure).then_some((best, candidate))
        })
        .collect();
    // Among equal values, the newer checkpoint comes first.
    ranked.sort_by(|(a, one), (b, other)| {
        let order = match (a.better.prefers(a.value, b.value), a.better.prefers(b.value, a.value)) {
            (true, _) => std::cmp::Ordering::Less,
            (_, true) => std::cmp::Ordering::Greater,
            _ => std::cmp::Ordering::Equal,
        };
        order.then_with(|| other.age().cmp(&one.age()))
    });
    ranked.into_iter().map(|(_, candidate)| candidate).collect()
}

fn remove<'a>(
    surplus: impl Iterator<Item = &'a PathBuf>,
    protected: Option<&Path>,
    newest: Option<&Candidate>,
) -> Result<Vec<PathBuf>> {
    let protected = protected.and_then(|path| fs::canonicalize(path).ok());
    let same = |path: &Path| protected.is_some() && fs::canonicalize(path).ok() == protected;
    let mut removed = Vec::new();
    for path in surplus {
        if same(path) && newest.is_none_or(|newest| same(&newest.path)) {
            continue;
        }
        staging::remove(path)?;
        removed.push(path.clone());
    }
    Ok(removed)
}

/// Whether all files exist with their lengths. Does not read their contents.
fn is_whole(candidate: &Candidate) -> bool {
    let Ok(Manifest { files, .. }) = &candidate.manifest else { return false };
    files.iter().all(|(name, info)| {
        fs::metadata(candidate.path.join(name)).is_ok_and(|file| file.len() == info.bytes)
    })
}
