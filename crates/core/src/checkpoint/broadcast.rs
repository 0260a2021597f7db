//! Distribution of what rank 0 has read.

use std::path::PathBuf;

use ice_checkpoint::{Catalog, Checkpoint, Manifest};
use ice_worker::Worker;

use crate::collectives::broadcast_bytes;
use crate::{Error, Result};

/// Sends the checkpoint that rank 0 has found, with its manifest and catalog, to all ranks. The
/// tensors follow when it is loaded. Collective.
pub(crate) fn broadcast(found: Option<Checkpoint>, worker: &Worker) -> Result<Option<Checkpoint>> {
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
