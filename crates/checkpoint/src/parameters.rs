//! Files of parameters that belong to no checkpoint, in the formats of PyTorch and Hugging Face's
//! libraries.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::catalog::{Catalog, Saved, Section};
use crate::find::folders;
use crate::header::Header;
use crate::keep::ranked;
use crate::stream::{file_info, open_regular, read_bounded};
use crate::{
    BEST, CHECKPOINTS, Checkpoint, Counts, Error, MANIFEST, MODEL, MODEL_INDEX, Manifest, Result, candidates,
};

/// Largest index that is read, in bytes. The index of a model with 100,000 tensors has about 10 MB.
const MAX_INDEX: u64 = 64 << 20;

/// Start of an archive of `torch.save`.
const ZIP: [u8; 4] = *b"PK\x03\x04";

/// The file that maps each parameter to its shard. Other fields are ignored.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens parameters in safetensors files: a file, the index of a sharded model
    /// (`*.index.json`), or a folder. Optimizers are ignored.
    ///
    /// The folder is a checkpoint, contains `model.safetensors.index.json` or `model.safetensors`,
    /// or contains checkpoints. A run's `best` folder gives its best checkpoint, any other folder
    /// its newest one.
    ///
    /// Shards must be in the folder of their index. Links to files elsewhere, as in the cache of
    /// `huggingface_hub`, are followed.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there are no parameters. [`Error::Checkpoint`] if a file is not a
    /// safetensors file, or lacks a tensor that the index names.
    pub fn of_parameters(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::of_file(path);
        }
        if path.join(MANIFEST).exists() {
            return Ok(Self::open(path)?.without_optimizers());
        }
        let files = [MODEL_INDEX, MODEL].map(|name| path.join(name));
        if let Some(file) = files.iter().find(|file| file.exists()) {
            return Self::of_file(file);
        }
        let found = match path.file_name().is_some_and(|name| name == BEST) {
            true => Self::best_of(path)?,
            false => Self::newest_of(&[path.to_owned(), path.join(CHECKPOINTS), path.join(BEST)], None),
        };
        let nothing = || {
            let is_run = |folder: &PathBuf| folder.join(CHECKPOINTS).is_dir() || folder.join(BEST).is_dir();
            let modified = |run: &PathBuf| run.metadata().and_then(|run| run.modified()).ok();
            let newest = folders(path).into_iter().filter(is_run).max_by_key(modified);
            Error::NotFound(format!(
                "{} has neither {MODEL_INDEX} nor {MODEL} nor a valid checkpoint: give the folder of a checkpoint or of a run, or a file{}",
                path.display(),
                newest.map_or_else(String::new, |run| format!("; its newest run is {}", run.display()))
            ))
        };
        Ok(found.ok_or_else(nothing)?.without_optimizers())
    }

    /// Returns the best valid checkpoint in a folder of checkpoints that compete by a measure.
    /// Damaged checkpoints are reported and skipped.
    fn best_of(folder: &Path) -> Result<Option<Self>> {
        let candidates = candidates(folder);
        let measures = candidates.iter().filter_map(|candidate| {
            let best = candidate.manifest.as_ref().ok()?.best.as_ref()?;
            Some(best.measure.as_str())
        });
        let measures: BTreeSet<_> = measures.collect();
        if measures.len() > 1 {
            let measures: Vec<_> = measures.iter().map(|measure| format!("`{measure}`")).collect();
            return Err(Error::NotFound(format!(
                "{} has the best checkpoints by {}: give the folder of one of them",
                folder.display(),
                measures.join(" and ")
            )));
        }
        let ranked = measures.first().map(|measure| ranked(&candidates, measure)).unwrap_or_default();
        Ok(ranked.into_iter().find_map(|candidate| {
            let warn = |error: &Error| tracing::warn!("skipping {}: {error}", candidate.path.display());
            Self::open(&candidate.path).inspect_err(warn).ok()
        }))
    }

    fn of_file(file: &Path) -> Result<Self> {
        match file.extension().is_some_and(|extension| extension == "json") {
            true => Self::of_shards(file),
            false => {
                let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                Self::of_files(folder_of(file), [name])
            }
        }
    }

    /// Renames the keys of the parameters.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if two keys become the same.
    pub fn map_keys(mut self, mut rename: impl FnMut(&str) -> String) -> Result<Self> {
        let mut origins = BTreeMap::new();
        let mut renamed: BTreeMap<String, Saved> = BTreeMap::new();
        for (key, saved) in std::mem::take(&mut self.catalog.model) {
            let new = rename(&key);
            if let Some(other) = origins.insert(new.clone(), key.clone()) {
                return Err(Error::checkpoint(
                    &self.path,
                    format!("`{other}` and `{key}` both become `{new}`"),
                ));
            }
            renamed.insert(new, saved);
        }
        self.catalog.model = renamed;
        Ok(self)
    }

    fn without_optimizers(mut self) -> Self {
        self.catalog.optimizer.clear();
        self.manifest.files.retain(|name, _| Section::of(name) == Some(Section::Model));
        self
    }

    fn of_shards(index: &Path) -> Result<Self> {
        let fail = |problem: String| Error::checkpoint(index, problem);
        let bytes = read_bounded(index, "an index", MAX_INDEX).map_err(|error| unreadable(index, error))?;
        let Index { weight_map } = serde_json::from_slice(&bytes)
            .map_err(|error| fail(format!("is not an index of a sharded model: {error}")))?;
        let files: BTreeSet<_> = weight_map.values().cloned().collect();
        if let Some(outside) = files.iter().find(|name| !is_file_name(name)) {
            return Err(fail(format!("names `{outside}`, which lies outside of its folder")));
        }
        let found = Self::of_files(folder_of(index), files)?;
        for (key, file) in &weight_map {
            let saved = found.catalog.model.get(key);
            if !saved.is_some_and(|saved| saved.extents.iter().any(|extent| extent.file == *file)) {
                return Err(fail(format!("names `{key}` in {file}, which does not have it")));
            }
        }
        Ok(found)
    }

    fn of_files(folder: PathBuf, names: impl IntoIterator<Item = String>) -> Result<Self> {
        let mut catalog = Catalog::default();
        let mut manifest = Manifest::new("", 1, 0, Counts::default(), serde_json::Value::Null);
        for name in names {
            let file = folder.join(&name);
            let fail = |problem: String| Error::checkpoint(&file, problem);
            let read = |error: io::Error| fail(error.to_string());
            let info =
                file_info(&open_regular(&file).map_err(|error| unreadable(&file, error))?).map_err(read)?;
            let mut reader = BufReader::new(open_regular(&file).map_err(read)?);
            let header = Header::read(&mut reader, info.bytes).map_err(|problem| match is_zip(&file) {
                true => fail(
                    "is an archive of torch.save and not a safetensors file: \
                     write it with safetensors.torch.save_file(model.state_dict(), path)"
                        .into(),
                ),
                false => fail(problem),
            })?;
            catalog.add(Section::Model, &name, header.data_start, header.tensors).map_err(fail)?;
            manifest.files.insert(name, info);
        }
        catalog.complete().map_err(|problem| Error::checkpoint(&folder, problem))?;
        Ok(Self { path: folder, manifest, catalog })
    }
}

fn folder_of(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).to_owned()
}

/// Whether this is the name of a file in its folder, and not a path.
pub(crate) fn is_file_name(name: &str) -> bool {
    use std::path::Component;
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

fn unreadable(file: &Path, error: io::Error) -> Error {
    Error::NotFound(format!("{}: {error}", file.display()))
}

fn is_zip(file: &Path) -> bool {
    let mut start = [0; ZIP.len()];
    open_regular(file).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == ZIP
}
