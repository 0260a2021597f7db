//! The state of a graph, copied to host memory in the order of the files.

use std::collections::BTreeMap;
use std::thread::{self, JoinHandle};

use ice_checkpoint::{Entry, Layout, MODEL, MODEL_INDEX, Section};
use serde_json::Value as Json;
use tch::Tensor;

use super::{Selection, UnclaimedState, dtype, key_prefix};
use crate::HyperGraph;

/// Size of a memory page. Touching one byte of each page makes the system provide it.
const PAGE: usize = 4096;

/// The division of a save among ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriterShare {
    pub(super) rank: usize,
    /// Number of ranks that write: 1 if rank 0 writes alone.
    pub(super) writers: usize,
    /// Whether tensors that every rank has are divided among the ranks.
    pub(super) split: bool,
}

/// A file to be written.
pub(super) struct File {
    pub(super) name: String,
    pub(super) layout: Layout,
}

/// The part of a checkpoint that this rank writes. The buffer with a file's number has its data.
pub(super) struct Snapshot {
    pub(super) files: Vec<File>,
    /// Positions of data and sums of meters, by uid.
    pub(super) nodes: BTreeMap<String, Json>,
    /// Index that maps each parameter to its file, if the parameters are divided.
    pub(super) index: Option<Vec<u8>>,
}

/// Host memory that the next save reuses. The system takes far longer to provide new pages than a
/// copy takes.
#[derive(Default)]
pub(super) struct Buffers(Vec<Vec<u8>>);

impl Buffers {
    /// Makes the system provide memory for files of these lengths, in the background.
    pub(super) fn prepare(lengths: Vec<usize>) -> std::io::Result<JoinHandle<Self>> {
        let touch = move || {
            let touched = |len: usize| {
                let mut buffer = vec![0; len];
                buffer.iter_mut().step_by(PAGE).for_each(|byte| *byte = std::hint::black_box(1));
                buffer
            };
            Self(lengths.into_iter().map(touched).collect())
        };
        thread::Builder::new().name("ice-checkpoint-memory".into()).spawn(touch)
    }

    /// Wraps existing memory.
    pub(super) fn of(buffers: Vec<Vec<u8>>) -> Self {
        Self(buffers)
    }

    /// Returns the memory, by file.
    pub(super) fn into_inner(self) -> Vec<Vec<u8>> {
        self.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn file(&self, file: usize) -> &[u8] {
        &self.0[file]
    }

    fn sized(&mut self, file: usize, len: usize) -> &mut [u8] {
        if self.0.len() <= file {
            self.0.resize_with(file + 1, Vec::new);
        }
        let buffer = &mut self.0[file];
        if buffer.capacity() < len {
            *buffer = vec![0; len];
        }
        buffer.resize(len, 0);
        buffer
    }
}

enum Source<'a> {
    Tensor(Tensor),
    Bytes(&'a [u8]),
}

/// The files that this rank will write, before anything is copied.
struct Plan<'a> {
    files: BTreeMap<String, Vec<(Entry, Source<'a>)>>,
    nodes: BTreeMap<String, Json>,
    index: Option<Vec<u8>>,
}

impl<'a> Plan<'a> {
    fn new(
        graph: &HyperGraph,
        selection: &Selection,
        kept: &'a UnclaimedState,
        share: WriterShare,
    ) -> Result<Self, String> {
        let mut sections = Section::ALL.map(|section| (section, Vec::new()));
        let mut nodes = BTreeMap::new();
        for entry in selection.of(graph) {
            let state = entry.node.borrow().state();
            let prefix = key_prefix(&entry.uid);
            let (model, optimizer) =
                ((state.model, state.model_parts), (state.optimizer, state.optimizer_parts));
            for ((_, into), (tensors, mut parts)) in sections.iter_mut().zip([model, optimizer]) {
                for (key, tensor) in tensors {
                    let dtype = dtype::dtype(tensor.kind())
                        .map_err(|problem| format!("`{prefix}{key}`: {problem}"))?;
                    let shape = dtype::shape(&tensor);
                    let part = parts.remove(&key);
                    into.push((
                        Entry { key: format!("{prefix}{key}"), dtype, shape, part },
                        Source::Tensor(tensor),
                    ));
                }
                if let Some(key) = parts.keys().next() {
                    return Err(format!("node `{}` has a part of `{key}` and no such tensor", entry.uid));
                }
            }
            if !state.values.is_null() {
                nodes.insert(entry.uid.clone(), state.values);
            }
        }
        if selection.is_all() {
            let (_, optimizer) = &mut sections[1];
            for (key, kept) in kept {
                if !optimizer.iter().any(|(entry, _)| entry.key == *key) {
                    let entry =
                        Entry { key: key.clone(), dtype: kept.dtype, shape: kept.shape.clone(), part: None };
                    optimizer.push((entry, Source::Bytes(&kept.bytes)));
                }
            }
        }
        let mut plan = Self { files: BTreeMap::new(), nodes, index: None };
        for (section, tensors) in sections {
            plan.divide(section, tensors, share)?;
        }
        Ok(plan)
    }

    /// Keeps the tensors of the section that this rank writes.
    fn divide(
        &mut self,
        section: Section,
        tensors: Vec<(Entry, Source<'a>)>,
        share: WriterShare,
    ) -> Result<(), String> {
        let split = share.split && share.writers > 1;
        // Only rank 0 has the optimizer state that was kept from an older checkpoint.
        let is_shared = |entry: &Entry, source: &Source| {
            split && entry.part.is_none() && matches!(source, Source::Tensor(_))
        };
        let sizes: Vec<(usize, u64)> = tensors
            .iter()
            .enumerate()
            .filter(|(_, (entry, source))| is_shared(entry, source))
            .map(|(index, (entry, _))| Ok((index, entry.bytes()?)))
            .collect::<Result<_, String>>()?;
        let owners = owners(&sizes, share.writers);
        let shard = |rank| section.shard(rank, share.writers);
        let whole = match section {
            Section::Model if !split => MODEL.to_owned(),
            _ => shard(0),
        };
        if section == Section::Model && split && share.rank == 0 {
            self.index = Some(index_of(&tensors, &owners, shard)?);
        }
        if share.rank == 0 {
            self.files.entry(whole.clone()).or_default();
        }
        for (index, (entry, source)) in tensors.into_iter().enumerate() {
            let file = match (owners.get(&index), &entry.part) {
                (Some(&owner), _) if owner == share.rank => shard(owner),
                (None, Some(part))
                    if !entry.shape.contains(&0) || (part.of.contains(&0) && share.rank == 0) =>
                {
                    shard(share.rank)
                }
                (None, None) if share.rank == 0 => whole.clone(),
                _ => continue,
            };
            self.files.entry(file).or_default().push((entry, source));
        }
        Ok(())
    }

    /// Lays out each file, and returns it with the sources of its entries.
    fn layouts(
        files: BTreeMap<String, Vec<(Entry, Source<'a>)>>,
    ) -> Result<Vec<(File, Vec<Source<'a>>)>, String> {
        let mut laid_out = Vec::new();
        for (name, tensors) in files {
            let (entries, sources): (Vec<_>, Vec<_>) = tensors.into_iter().unzip();
            let layout = Layout::new(&entries).map_err(|problem| format!("{name}: {problem}"))?;
            laid_out.push((File { name, layout }, sources));
        }
        Ok(laid_out)
    }
}

impl Snapshot {
    /// Copies what this rank writes into `buffers`.
    pub(super) fn take(
        graph: &HyperGraph,
        selection: &Selection,
        kept: &UnclaimedState,
        share: WriterShare,
        buffers: &mut Buffers,
    ) -> Result<Self, String> {
        let plan = Plan::new(graph, selection, kept, share)?;
        let mut files = Vec::new();
        for (number, (file, sources)) in Plan::layouts(plan.files)?.into_iter().enumerate() {
            let buffer = buffers.sized(number, file.layout.data_len());
            for placed in file.layout.placed() {
                let to = &mut buffer[placed.offset..placed.offset + placed.len];
                match &sources[placed.index] {
                    Source::Tensor(tensor) => {
                        tensor.f_copy_data_u8(to, tensor.numel()).map_err(|error| error.to_string())?;
                    }
                    Source::Bytes(bytes) => to.copy_from_slice(bytes),
                }
            }
            files.push(file);
        }
        Ok(Self { files, nodes: plan.nodes, index: plan.index })
    }

    /// Returns the bytes that [`Snapshot::take`] will need, by file.
    pub(super) fn lengths(graph: &HyperGraph, share: WriterShare) -> Result<Vec<usize>, String> {
        let kept = UnclaimedState::new();
        let plan = Plan::new(graph, &Selection::All, &kept, share)?;
        Ok(Plan::layouts(plan.files)?.iter().map(|(file, _)| file.layout.data_len()).collect())
    }
}

/// Divides tensors of these sizes evenly: the largest first, each to the rank with the smallest
/// load. Every rank gets the same result.
fn owners(sizes: &[(usize, u64)], ranks: usize) -> BTreeMap<usize, usize> {
    let mut sizes = sizes.to_vec();
    sizes.sort_by_key(|&(index, size)| (std::cmp::Reverse(size), index));
    let mut load = vec![0_u64; ranks];
    let mut owner = BTreeMap::new();
    for (index, size) in sizes {
        let least = (0..ranks).min_by_key(|&rank| (load[rank], rank)).unwrap_or(0);
        load[least] += size;
        owner.insert(index, least);
    }
    owner
}

/// Returns the index in the format of transformers.
fn index_of(
    tensors: &[(Entry, Source)],
    owners: &BTreeMap<usize, usize>,
    shard: impl Fn(usize) -> String,
) -> Result<Vec<u8>, String> {
    let (mut map, mut total) = (BTreeMap::new(), 0);
    for (index, (entry, _)) in tensors.iter().enumerate() {
        if let Some(&owner) = owners.get(&index) {
            map.insert(&entry.key, shard(owner));
            total += entry.bytes()?;
        }
    }
    let json = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": map });
    serde_json::to_vec_pretty(&json).map_err(|error| format!("{MODEL_INDEX}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_divided_evenly_and_the_same_everywhere() {
        let sizes = [(0, 10), (1, 40), (2, 10), (4, 20), (7, 0)];
        let owner = owners(&sizes, 2);
        assert_eq!(owner.len(), sizes.len());
        let of =
            |rank| sizes.iter().filter(|(index, _)| owner[index] == rank).map(|(_, size)| size).sum::<u64>();
        assert_eq!((of(0), of(1)), (40, 40));
    }
}
