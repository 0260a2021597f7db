//! What rank 0 read, on every rank.

use std::path::PathBuf;

use ice_checkpoint::{Catalog, Checkpoint, Manifest};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor};

use crate::{Error, Result};

/// Tells all ranks which checkpoint rank 0 has found and what is in it; the tensors follow when it is loaded.
pub(crate) fn share(found: Option<Checkpoint>, worker: &Worker) -> Result<Option<Checkpoint>> {
    if worker.world_size() == 1 {
        return Ok(found);
    }
    let fail = |error: serde_json::Error| Error::Resume(error.to_string());
    let head = found.as_ref().map(|found| (found.path(), found.manifest(), found.catalog()));
    let head = if worker.is_main() { serde_json::to_vec(&head).map_err(fail)? } else { Vec::new() };
    let head = broadcast(&head, worker)?;
    if worker.is_main() {
        return Ok(found);
    }
    let head: Option<(PathBuf, Manifest, Catalog)> = serde_json::from_slice(&head).map_err(fail)?;
    Ok(head.map(|(path, manifest, catalog)| Checkpoint::assume(path, manifest, catalog)))
}

/// Whether rank 0 says so.
pub(crate) fn decide(decision: bool, worker: &Worker) -> Result<bool> {
    let decision = Tensor::from_slice(&[i64::from(decision)]).to_device(worker.device());
    worker.broadcast(&decision)?;
    Ok(decision.f_int64_value(&[0])? != 0)
}

/// The bytes of rank 0, on every rank.
fn broadcast(bytes: &[u8], worker: &Worker) -> Result<Vec<u8>> {
    let len = Tensor::from_slice(&[bytes.len() as i64]).to_device(worker.device());
    worker.broadcast(&len)?;
    let len = len.f_int64_value(&[0])?;
    let data = match worker.is_main() {
        true => Tensor::from_slice(bytes),
        false => Tensor::zeros([len], (Kind::Uint8, Device::Cpu)),
    };
    let data = data.to_device(worker.device());
    if len > 0 {
        worker.broadcast(&data)?;
    }
    let mut bytes = vec![0; len as usize];
    data.f_copy_data_u8(&mut bytes, len as usize)?;
    Ok(bytes)
}
