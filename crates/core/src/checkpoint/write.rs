use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use ice_worker::Link;

use super::manifest::FileInfo;
use super::tensors::{HostTensor, encode};
use super::{MANIFEST, MODEL, Manifest, OPTIMIZER, key_prefix};
use crate::{Error, HyperGraph, Result};

/// Writes checkpoints in a thread, one at a time.
pub(crate) struct Writer {
    link: Link,
    under_way: Option<JoinHandle<Result<()>>>,
}

/// All of a checkpoint in host memory.
struct Snapshot {
    manifest: Manifest,
    model: Vec<(String, HostTensor)>,
    optimizer: Vec<(String, HostTensor)>,
}

impl Writer {
    pub(crate) fn new(link: Link) -> Self {
        Self { link, under_way: None }
    }

    /// Copies the state, waits for the save before, and starts writing.
    pub(crate) fn save(&mut self, folder: PathBuf, manifest: Manifest, graph: &HyperGraph) -> Result<()> {
        let snapshot = Snapshot::take(manifest, graph)
            .map_err(|problem| Error::Checkpoint { path: folder.clone(), problem })?;
        self.finish()?;
        let (link, hold) = (self.link.clone(), self.link.hold());
        let write = move || {
            let _hold = hold;
            let step = snapshot.manifest.counters.train_steps();
            snapshot.write(&folder)?;
            link.checkpoint_saved(&folder, step);
            Ok(())
        };
        let thread = thread::Builder::new().name("ice-checkpoint".into()).spawn(write);
        self.under_way = Some(thread.map_err(Error::io(Path::new("checkpoint thread")))?);
        Ok(())
    }

    /// Waits for the save that is under way.
    pub(crate) fn finish(&mut self) -> Result<()> {
        let Some(thread) = self.under_way.take() else { return Ok(()) };
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Snapshot {
    fn take(mut manifest: Manifest, graph: &HyperGraph) -> Result<Self, String> {
        let (mut model, mut optimizer) = (Vec::new(), Vec::new());
        for entry in graph.entries() {
            let state = entry.node.borrow().state();
            let prefix = key_prefix(&entry.uid);
            for (from, into) in [(state.model, &mut model), (state.optimizer, &mut optimizer)] {
                for (key, tensor) in from {
                    into.push((format!("{prefix}{key}"), HostTensor::copy(&tensor)?));
                }
            }
            if !state.values.is_null() {
                manifest.nodes.insert(entry.uid.clone(), state.values);
            }
        }
        Ok(Self { manifest, model, optimizer })
    }

    /// Writes beside, then renames into place. A checkpoint of that name is replaced.
    fn write(mut self, folder: &Path) -> Result<()> {
        let parent = folder.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let beside = sibling(folder, "partial");
        remove_if_there(&beside)?;
        fs::create_dir(&beside).map_err(Error::io(&beside))?;
        for (name, tensors) in [(MODEL, &self.model), (OPTIMIZER, &self.optimizer)] {
            let path = beside.join(name);
            let bytes =
                encode(tensors).map_err(|problem| Error::Checkpoint { path: path.clone(), problem })?;
            self.manifest.files.insert(name.into(), FileInfo::of(&bytes));
            write_through(&path, &bytes)?;
        }
        let path = beside.join(MANIFEST);
        let json = serde_json::to_vec_pretty(&self.manifest)
            .map_err(|error| Error::Checkpoint { path: path.clone(), problem: error.to_string() })?;
        write_through(&path, &json)?;
        sync_folder(&beside)?;
        let replaced = sibling(folder, "replaced");
        remove_if_there(&replaced)?;
        if folder.exists() {
            fs::rename(folder, &replaced).map_err(Error::io(folder))?;
        }
        fs::rename(&beside, folder).map_err(Error::io(folder))?;
        sync_folder(parent)?;
        remove_if_there(&replaced)
    }
}

/// A hidden neighbour of the folder, so that no search takes it for a checkpoint.
fn sibling(folder: &Path, suffix: &str) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!(".{name}.{suffix}"))
}

fn remove_if_there(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder)(error)),
        _ => Ok(()),
    }
}

fn write_through(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path))
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}
