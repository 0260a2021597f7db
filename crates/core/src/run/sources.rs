//! A copy of the program's sources, next to the results of the run.

use std::fs;
use std::path::{Path, PathBuf};

use ignore::WalkBuilder;

use super::Run;
use crate::{Error, Result};

/// Name of the folder for sources within the run's folder.
const SOURCES: &str = "src";
/// Size limit of a source file, in bytes. Larger files are not copied.
const LARGEST: u64 = 8 << 20;

impl Run<'_> {
    /// Copies the graph's sources into the run's folder, unless an earlier process of the run has
    /// done so. A failure is only a warning, since missing sources must not stop the training.
    pub(super) fn keep_sources(&self) {
        let to = self.folder.join(SOURCES);
        if self.graph.sources().is_empty() || to.exists() {
            return;
        }
        if let Err(error) = self.copy_sources(&to) {
            tracing::warn!("the sources are not kept in {}: {error}", to.display());
        }
    }

    fn copy_sources(&self, to: &Path) -> Result<()> {
        // The rename makes the copy complete or absent. A killed process leaves the partial folder,
        // which the next process replaces.
        let partial = to.with_extension("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(Error::io(&partial))?;
        }
        fs::create_dir_all(&partial).map_err(Error::io(&partial))?;
        let out_dir = fs::canonicalize(&self.config.out_dir).map_err(Error::io(&self.config.out_dir))?;
        let mut names = Vec::new();
        for source in self.graph.sources() {
            let copied = fs::canonicalize(source)
                .map_err(Error::io(source))
                .and_then(|source| copy(&source, &partial.join(unused(&source, &mut names)), &out_dir));
            if let Err(error) = copied {
                tracing::warn!("sources are not kept: {error}");
            }
        }
        fs::rename(&partial, to).map_err(Error::io(to))
    }
}

/// Returns the name of the folder or file, with a number if an earlier source has the same name.
fn unused(source: &Path, taken: &mut Vec<PathBuf>) -> PathBuf {
    let name = PathBuf::from(source.file_name().unwrap_or_else(|| "root".as_ref()));
    let earlier = taken.iter().filter(|other| **other == name).count();
    taken.push(name.clone());
    match earlier {
        0 => name,
        count => format!("{}-{}", name.display(), count + 1).into(),
    }
}

fn copy(source: &Path, to: &Path, out_dir: &Path) -> Result<()> {
    let (own, out_dir) = (source.to_owned(), out_dir.to_owned());
    let walk = WalkBuilder::new(source)
        .hidden(false)
        .require_git(false)
        .filter_entry(move |entry| {
            entry.path() == own || (entry.file_name() != ".git" && entry.path() != out_dir)
        })
        .build();
    for entry in walk {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                tracing::warn!("a source is not kept: {error}");
                continue;
            }
        };
        let from = entry.path();
        let Ok(metadata) = fs::symlink_metadata(from) else { continue };
        if !metadata.is_file() {
            continue;
        }
        if metadata.len() > LARGEST {
            tracing::warn!(
                "{} is larger than {} MiB and not kept with the sources",
                from.display(),
                LARGEST >> 20
            );
            continue;
        }
        let within = from.strip_prefix(source).unwrap_or(from);
        let to = if within.as_os_str().is_empty() { to.to_owned() } else { to.join(within) };
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        fs::copy(from, &to).map_err(Error::io(from))?;
    }
    Ok(())
}
