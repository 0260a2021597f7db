use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use ice_worker::Worker;
use serde_json::Value as Json;
use tch::{Kind, Tensor};

use super::manifest::{FORMAT_VERSION, FileInfo};
use super::tensors::decode;
use super::{MANIFEST, MODEL, Manifest, OPTIMIZER, key_prefix};
use crate::{Error, HyperGraph, NodeState, Result};

/// A checkpoint read into memory, whole and checked.
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    files: BTreeMap<String, Vec<u8>>,
}

impl Checkpoint {
    /// Reads a checkpoint and checks every file against the manifest.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] names the file that is missing or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest = Self::open_manifest(path)?;
        let mut files = BTreeMap::new();
        for (name, info) in &manifest.files {
            let file = path.join(name);
            let damaged = |problem: String| Error::Checkpoint { path: file.clone(), problem };
            if Path::new(name).components().count() != 1 {
                return Err(damaged("lies outside of its checkpoint".into()));
            }
            let bytes = fs::read(&file).map_err(|error| damaged(error.to_string()))?;
            let found = FileInfo::of(&bytes);
            if found != *info {
                return Err(damaged(format!(
                    "is damaged: {} bytes with crc32c {:08x}, written were {} with {:08x}",
                    found.bytes, found.crc32c, info.bytes, info.crc32c
                )));
            }
            files.insert(name.clone(), bytes);
        }
        Ok(Self { path: path.to_owned(), manifest, files })
    }

    pub(super) fn open_manifest(path: &Path) -> Result<Manifest> {
        let file = path.join(MANIFEST);
        let damaged = |problem: String| Error::Checkpoint { path: file.clone(), problem };
        let bytes = fs::read(&file).map_err(|error| damaged(error.to_string()))?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if manifest.format_version != FORMAT_VERSION {
            return Err(damaged(format!(
                "is of format {}, and this release reads {FORMAT_VERSION}",
                manifest.format_version
            )));
        }
        Ok(manifest)
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The tensors of one of its files, on the CPU.
    fn tensors(&self, name: &str) -> Result<Vec<(String, Tensor)>> {
        let fail = |problem| Error::Checkpoint { path: self.path.join(name), problem };
        let bytes = self.files.get(name).ok_or_else(|| fail("is missing".into()))?;
        decode(bytes).map_err(fail)
    }

    /// Copies the state into the nodes of a graph that is set up.
    pub(crate) fn load_into(&self, graph: &HyperGraph) -> Result<()> {
        let (mut model, mut optimizer) = (self.tensors(MODEL)?, self.tensors(OPTIMIZER)?);
        let known: BTreeSet<_> = graph.uids().collect();
        if let Some(unknown) = self.manifest.nodes.keys().find(|uid| !known.contains(uid.as_str())) {
            return Err(Error::Resume(format!(
                "the checkpoint has a node `{unknown}` and the graph has none"
            )));
        }
        for entry in graph.entries() {
            let prefix = key_prefix(&entry.uid);
            let saved = NodeState {
                model: take_with_prefix(&mut model, &prefix),
                optimizer: take_with_prefix(&mut optimizer, &prefix),
                values: self.manifest.nodes.get(&entry.uid).cloned().unwrap_or(Json::Null),
            };
            entry.node.borrow_mut().load_state(&saved).map_err(|error| error.at(&entry.uid, "load"))?;
        }
        match model.iter().chain(&optimizer).next() {
            Some((key, _)) => {
                Err(Error::Resume(format!("the checkpoint has `{key}` and the graph has no such node")))
            }
            None => Ok(()),
        }
    }

    /// Gives rank 0's checkpoint to all ranks, so that only rank 0's node needs to have it.
    pub(crate) fn shared(found: Option<Self>, worker: &Worker) -> Result<Option<Self>> {
        if worker.world_size() == 1 {
            return Ok(found);
        }
        let fail = |error: serde_json::Error| Error::Resume(error.to_string());
        let head = found.as_ref().map(|found| (&found.path, &found.manifest));
        let head = if worker.is_main() { serde_json::to_vec(&head).map_err(fail)? } else { Vec::new() };
        let head: Option<(PathBuf, Manifest)> =
            serde_json::from_slice(&broadcast(&head, worker)?).map_err(fail)?;
        let Some((path, manifest)) = head else { return Ok(None) };
        let mut files = BTreeMap::new();
        for name in manifest.files.keys() {
            let own = found.as_ref().and_then(|found| found.files.get(name));
            files.insert(name.clone(), broadcast(own.map_or(&[], Vec::as_slice), worker)?);
        }
        Ok(Some(Self { path, manifest, files }))
    }
}

fn take_with_prefix(tensors: &mut Vec<(String, Tensor)>, prefix: &str) -> Vec<(String, Tensor)> {
    let (taken, left) = std::mem::take(tensors).into_iter().partition(|(key, _)| key.starts_with(prefix));
    *tensors = left;
    let strip = |(key, tensor): (String, Tensor)| (key[prefix.len()..].to_owned(), tensor);
    Vec::into_iter(taken).map(strip).collect()
}

/// The bytes of rank 0, on every rank.
fn broadcast(bytes: &[u8], worker: &Worker) -> Result<Vec<u8>> {
    let len = Tensor::from_slice(&[bytes.len() as i64]).to_device(worker.device());
    worker.broadcast(&len)?;
    let len = len.f_int64_value(&[0])?;
    let data = match worker.is_main() {
        true => Tensor::from_slice(bytes),
        false => Tensor::zeros([len], (Kind::Uint8, tch::Device::Cpu)),
    };
    let data = data.to_device(worker.device());
    if len > 0 {
        worker.broadcast(&data)?;
    }
    let mut bytes = vec![0; len as usize];
    data.to_device(tch::Device::Cpu).f_copy_data_u8(&mut bytes, len as usize)?;
    Ok(bytes)
}
