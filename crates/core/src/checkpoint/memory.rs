//! Checkpoints in the memory of the ranks, of which each rank has a shard. The shards have the
//! contents of the files of a saved checkpoint.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ice_checkpoint::{Checkpoint, Manifest};
use ice_worker::Worker;
use ice_worker::replica::ShardReplica;

use super::load::Supply;
use super::snapshot::{Buffers, Snapshot, WriterShare};
use super::{Selection, Strictness, UnclaimedState, load};
use crate::collectives::{broadcast, gather_all};
use crate::{Error, HyperGraph, Result};

/// Name of the manifest within a parcel.
const ABOUT: &str = "manifest";
/// Suffix that turns the name of a file into the name of its header.
const HEADER: &str = ".header";

/// Identity of a shard within a replica.
pub(crate) struct Label {
    pub(crate) number: u64,
    pub(crate) owner: usize,
    pub(crate) of: usize,
}

/// Copies this owner's shard of the state. Tensors that every rank has are divided among the
/// owners. Reuses the memory of old replicas.
pub(crate) fn pack(
    label: &Label,
    mut manifest: Manifest,
    graph: &HyperGraph,
    kept: &UnclaimedState,
    old: Vec<ShardReplica>,
) -> Result<ShardReplica> {
    let share = WriterShare { rank: label.owner, writers: label.of, split: true };
    let files = old.into_iter().flat_map(|parcel| parcel.parts);
    let is_data = |name: &str| name != ABOUT && !name.ends_with(HEADER);
    let mut buffers = Buffers::of(files.filter(|(name, _)| is_data(name)).map(|(_, bytes)| bytes).collect());
    let snapshot = Snapshot::take(graph, &Selection::All, kept, share, &mut buffers).map_err(Error::Save)?;
    manifest.nodes = snapshot.nodes;
    let about = serde_json::to_vec(&manifest).map_err(|error| Error::Save(error.to_string()))?;
    let mut parts = vec![(ABOUT.to_owned(), about)];
    for (file, data) in snapshot.files.into_iter().zip(buffers.into_inner()) {
        parts.push((format!("{}{HEADER}", file.name), file.layout.header().to_vec()));
        parts.push((file.name, data));
    }
    let step = manifest.counters.train_steps;
    Ok(ShardReplica { number: label.number, owner: label.owner, of: label.of, step, parts })
}

/// Reassembles the state on every rank: each rank loads what its own nodes need. `suppliers` names
/// the rank that has each shard, and `parcels` are the shards of this rank. Returns the manifest,
/// and the optimizer state that no node uses. Collective.
pub(crate) fn unpack(
    parcels: &[Arc<ShardReplica>],
    suppliers: &[usize],
    graph: &HyperGraph,
    worker: &Worker,
) -> Result<(Manifest, UnclaimedState)> {
    let own = |owner: &usize| suppliers[*owner] == worker.rank();
    let own: Vec<_> = (0..suppliers.len()).filter(own).collect();
    let own: Vec<_> =
        own.iter().filter_map(|owner| parcels.iter().find(|parcel| parcel.owner == *owner)).collect();
    let headers = own.iter().flat_map(|parcel| headers_of(parcel)).collect::<Vec<_>>();
    let headers = gather_all(&headers, worker)?;
    let about = own.first().and_then(|parcel| parcel.part(ABOUT)).map(serde_json::from_slice::<Manifest>);
    let about = about.transpose().map_err(damaged)?;
    let manifest = broadcast(about, suppliers[0], worker)?;

    let mut files = BTreeMap::new();
    let mut supply = BTreeMap::new();
    for (source, (name, text, len)) in
        (0..).zip(headers).flat_map(|(rank, headers)| headers.into_iter().map(move |header| (rank, header)))
    {
        let header = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let data = own.iter().find_map(|parcel| parcel.part(&name)).filter(|_| source == worker.rank());
        supply.insert(name.clone(), Supply { source, header: header.len() as u64, data });
        files.insert(name, (header, len));
    }
    let place = PathBuf::from(format!("the copies of step {} in memory", manifest.counters.train_steps));
    let checkpoint = Checkpoint::in_memory(place, manifest, files)?;
    let kept = load(
        &checkpoint,
        Some(&supply),
        graph,
        &Selection::All,
        Strictness::Strict,
        &mut Vec::new(),
        worker,
    )?;
    Ok((checkpoint.manifest().clone(), kept))
}

/// Returns, for each file of a parcel, its name, the text of its header, and its length including
/// the header.
fn headers_of(parcel: &ShardReplica) -> Vec<(String, String, u64)> {
    let file = |(name, header): &(String, Vec<u8>)| {
        let name = name.strip_suffix(HEADER)?;
        let len = header.len() + parcel.part(name)?.len();
        // The text of the header follows its length, which has 8 bytes.
        let text = String::from_utf8(header.get(8..)?.to_vec()).ok()?;
        Some((name.to_owned(), text, len as u64))
    };
    parcel.parts.iter().filter_map(file).collect()
}

fn damaged(error: serde_json::Error) -> Error {
    Error::Resume(format!("a copy in memory cannot be understood: {error}"))
}
