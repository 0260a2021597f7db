//! What rank 0 read, on every rank.

use std::path::PathBuf;

use ice_checkpoint::{Catalog, Checkpoint, Manifest};
use ice_worker::Worker;
use serde::Serialize;
use serde::de::DeserializeOwned;
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
    let head = broadcast_bytes(&head, 0, worker)?;
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

/// What one rank has, on every rank.
pub(crate) fn broadcast<T: Serialize + DeserializeOwned>(
    own: Option<T>,
    source: usize,
    worker: &Worker,
) -> Result<T> {
    let fail = |error: serde_json::Error| Error::Resume(error.to_string());
    let bytes = own.map_or(Ok(Vec::new()), |own| serde_json::to_vec(&own)).map_err(fail)?;
    serde_json::from_slice(&broadcast_bytes(&bytes, source, worker)?).map_err(fail)
}

/// The bytes of one rank, on every rank.
fn broadcast_bytes(bytes: &[u8], source: usize, worker: &Worker) -> Result<Vec<u8>> {
    let len = Tensor::from_slice(&[bytes.len() as i64]).to_device(worker.device());
    worker.broadcast_from(source, &len)?;
    let len = len.f_int64_value(&[0])?;
    let data = match worker.rank() == source {
        true => Tensor::from_slice(bytes),
        false => Tensor::zeros([len], (Kind::Uint8, Device::Cpu)),
    };
    let data = data.to_device(worker.device());
    if len > 0 {
        worker.broadcast_from(source, &data)?;
    }
    let mut bytes = vec![0; len as usize];
    data.f_copy_data_u8(&mut bytes, len as usize)?;
    Ok(bytes)
}
