//! Loading from files into the tensors of the nodes. Everything is compared first, so that nothing
//! is half loaded.

use std::collections::BTreeMap;
use std::rc::Rc;

use ice_checkpoint::{Checkpoint, Overlap, Part, Piece, Section};
use ice_worker::Worker;
use safetensors::Dtype;
use serde_json::Value as Json;
use tch::{Device, Kind, Tensor};

use super::compat::Report;
use super::{dtype, key_prefix};
use crate::graph::Entry as NodeEntry;
use crate::{Error, HyperGraph, NodeState, Result, Tags};

/// The nodes that take part in saving or loading.
#[derive(Debug, Clone, Default)]
pub(crate) enum Selection {
    #[default]
    All,
    Tags(Tags),
}

impl Selection {
    pub(crate) fn of<'a>(&'a self, graph: &'a HyperGraph) -> impl Iterator<Item = &'a Rc<NodeEntry>> {
        graph.entries().iter().filter(move |entry| match self {
            Self::All => true,
            Self::Tags(query) => entry.tags.selected_by(query),
        })
    }

    pub(crate) fn is_all(&self) -> bool {
        matches!(self, Self::All)
    }
}

/// The treatment of a part of a checkpoint that does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strictness {
    /// An error that names all such parts, before anything is loaded.
    Strict,
    /// An error. Exception: parts on which the training does not depend are left out.
    Graded,
    /// The part is left out.
    Any,
}

/// A file of a checkpoint in the memory of a rank.
pub(crate) struct Supply<'a> {
    /// The rank that has the file.
    pub(crate) source: usize,
    /// Length of the header in bytes. Offsets in the file count from the start of the header.
    pub(crate) header: u64,
    /// The bytes that follow the header. `None` on other ranks.
    pub(crate) data: Option<&'a [u8]>,
}

/// The files of a checkpoint in memory, by name.
pub(crate) type Supplies<'a> = BTreeMap<String, Supply<'a>>;

/// Optimizer state that no node has a use for at present, by key. Rank 0 keeps it for the next
/// checkpoints.
pub(crate) type UnclaimedState = BTreeMap<String, UnclaimedTensor>;

pub(crate) struct UnclaimedTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

/// Phase of a node in errors that occur before anything is loaded.
const CHECK: &str = "check of the checkpoint";

/// Whether the checkpoint was refused before anything was loaded.
pub(crate) fn is_misfit(error: &Error) -> bool {
    match error {
        Error::Node { phase, .. } => *phase == CHECK,
        error => matches!(error, Error::Resume(_)),
    }
}

/// A tensor to fill.
pub(super) struct Target {
    /// The elements as one contiguous row.
    elements: Tensor,
    /// The node's tensor, if it is not contiguous: it is filled from the row at the end.
    scattered: Option<Tensor>,
    start: u64,
}

#[derive(Default)]
pub(super) struct Loading {
    pub(super) targets: BTreeMap<(Section, String), Target>,
    /// The states of the nodes, whose tensors are the targets.
    states: Vec<(Rc<NodeEntry>, NodeState)>,
    keep: BTreeMap<String, UnclaimedTensor>,
}

/// Loads the state of the selected nodes on every rank. Rank 0 reads for all, unless the checkpoint
/// is in memory. Adds to `left_out` each part that does not fit and is therefore left out. Returns
/// the optimizer state that no node uses. Collective.
pub(crate) fn load(
    checkpoint: &Checkpoint,
    in_memory: Option<&Supplies>,
    graph: &HyperGraph,
    selection: &Selection,
    fit: Strictness,
    left_out: &mut Vec<String>,
    worker: &Worker,
) -> Result<UnclaimedState> {
    let (mut loading, report) = Loading::prepare(checkpoint, graph, selection, fit, left_out)?;
    if !report.is_none() {
        if fit != Strictness::Any {
            return Err(Error::Resume(format!("{} does not fit: {report}", checkpoint.path().display())));
        }
        left_out.push(report.to_string());
    }
    loading.fill(checkpoint, in_memory, graph, selection, worker)?;
    for (entry, state) in &loading.states {
        entry.node.borrow_mut().load_state(state).map_err(|error| error.at(&entry.uid, "load"))?;
    }
    Ok(loading.keep)
}

impl Loading {
    fn prepare(
        checkpoint: &Checkpoint,
        graph: &HyperGraph,
        selection: &Selection,
        fit: Strictness,
        left_out: &mut Vec<String>,
    ) -> Result<(Self, Report)> {
        let (catalog, manifest) = (checkpoint.catalog(), checkpoint.manifest());
        let mut report = Report::default();
        let mut loading = Self::default();
        for entry in selection.of(graph) {
            let (prefix, misfit) = (key_prefix(&entry.uid), report.of(&entry.uid));
            let mut state = entry.node.borrow().state();
            for section in Section::ALL {
                let (tensors, parts) = match section {
                    Section::Model => (&state.model, &state.model_parts),
                    Section::Optimizer => (&state.optimizer, &state.optimizer_parts),
                };
                let saved = catalog.section(section);
                for (key, tensor) in tensors {
                    let (full, part) = (format!("{prefix}{key}"), parts.get(key));
                    if misfit.check(key, tensor, part, saved.get(&full)) {
                        loading.targets.insert((section, full), Target::new(tensor, part)?);
                    }
                }
                for (full, saved) in saved.iter().filter(|(full, _)| owner(graph, full) == Some(&entry.uid)) {
                    let key = &full[prefix.len()..];
                    if tensors.iter().any(|(own, _)| own == key) {
                        continue;
                    }
                    let parameter = |slot: &str| state.model.iter().any(|(own, _)| own == slot);
                    if section == Section::Optimizer
                        && key.rsplit_once('.').is_some_and(|(own, _)| parameter(own))
                    {
                        let bytes = Vec::with_capacity(saved.bytes() as usize);
                        let kept = UnclaimedTensor { dtype: saved.dtype, shape: saved.shape.clone(), bytes };
                        loading.keep.insert(full.clone(), kept);
                    } else {
                        misfit.unexpected.push(key.into());
                    }
                }
            }
            let saved = manifest.nodes.get(&entry.uid);
            let needs_values = !state.values.is_null() && entry.node.borrow().requires_values();
            let may_begin = fit == Strictness::Graded
                && entry.node.borrow().may_begin_after(saved.unwrap_or(&Json::Null));
            match saved {
                None if needs_values && may_begin => {
                    left_out.push(format!(
                        "node `{}` is not in the checkpoint and begins at its beginning",
                        entry.uid
                    ));
                    continue;
                }
                None if needs_values => misfit.missing.push("its position or sums".into()),
                saved => state.values = saved.cloned().unwrap_or(Json::Null),
            }
            if fit != Strictness::Any || saved.is_some() {
                let checked = entry.node.borrow().check_values(&state.values);
                match checked {
                    Err(error) if may_begin => {
                        left_out.push(format!("node `{}` begins at its beginning: {error}", entry.uid));
                        continue;
                    }
                    checked => checked.map_err(|error| error.at(&entry.uid, CHECK))?,
                }
            }
            loading.states.push((Rc::clone(entry), state));
        }
        if selection.is_all() {
            let keys = catalog.model.keys().chain(catalog.optimizer.keys());
            keys.filter(|key| owner(graph, key).is_none()).for_each(|key| report.nobodys(key));
            for uid in manifest.nodes.keys().filter(|uid| !graph.uids().any(|own| own == uid.as_str())) {
                let has_tensors = || catalog.model.keys().any(|key| key.starts_with(&key_prefix(uid)));
                match fit == Strictness::Graded && !has_tensors() {
                    true => left_out.push(format!("node `{uid}` is not in the program")),
                    false => report.of(uid).unexpected.push("the node itself".into()),
                }
            }
        }
        Ok((loading, report))
    }

    /// Streams all elements past the targets. Every rank takes part in every transfer, in the same
    /// order, whether it needs the elements or not: the transfers are collective.
    pub(super) fn fill(
        &mut self,
        checkpoint: &Checkpoint,
        in_memory: Option<&Supplies>,
        graph: &HyperGraph,
        selection: &Selection,
        worker: &Worker,
    ) -> Result<()> {
        let selected: Vec<_> = selection.of(graph).map(|entry| entry.uid.as_str()).collect();
        let passes =
            |piece: &Piece| owner(graph, piece.key).is_some_and(|uid| selected.contains(&uid.as_str()));
        if !worker.is_main() {
            self.keep.clear();
        }
        let row = |bytes: &[u8]| Tensor::f_from_data_size(bytes, &[bytes.len() as i64], Kind::Uint8);
        if in_memory.is_none() && worker.is_main() {
            checkpoint.stream(|piece, bytes| {
                if !passes(&piece) {
                    return Ok(());
                }
                self.take(&piece, row(bytes)?, 0, checkpoint, worker)
            })?;
        } else {
            for (name, pieces) in checkpoint.pieces() {
                let supply = in_memory.and_then(|files| files.get(name));
                let source = supply.map_or(0, |supply| supply.source);
                for (offset, piece) in pieces.into_iter().filter(|(_, piece)| passes(piece)) {
                    let dtype = checkpoint.catalog().section(piece.section)[piece.key].dtype;
                    let bytes = piece.len as usize * dtype.bitsize() / 8;
                    let data = match supply.and_then(|supply| Some((supply.data?, supply.header))) {
                        Some((data, header)) => row(&data[(offset - header) as usize..][..bytes])?,
                        None => Tensor::f_empty([bytes as i64], (Kind::Uint8, Device::Cpu))?,
                    };
                    self.take(&piece, data, source, checkpoint, worker)?;
                }
            }
        }
        for target in self.targets.values() {
            if let Some(scattered) = &target.scattered {
                let filled = target.elements.f_view_as(scattered)?;
                tch::no_grad(|| scattered.detach().f_copy_(&filled))?;
            }
        }
        Ok(())
    }

    fn keep(&mut self, piece: &Piece, data: &Tensor) -> Result<()> {
        if piece.section == Section::Optimizer
            && let Some(kept) = self.keep.get_mut(piece.key)
        {
            let start = piece.start as usize * kept.dtype.bitsize() / 8;
            let end = start + data.numel();
            if kept.bytes.len() < end {
                kept.bytes.resize(end, 0);
            }
            data.f_copy_data_u8(&mut kept.bytes[start..end], end - start)?;
        }
        Ok(())
    }

    /// Sends the piece from the rank `source` to all ranks, and copies the elements that this rank
    /// needs.
    fn take(
        &mut self,
        piece: &Piece,
        data: Tensor,
        source: usize,
        checkpoint: &Checkpoint,
        worker: &Worker,
    ) -> Result<()> {
        let data = if worker.world_size() > 1 {
            // Sends bytes, since the backends do not support every kind of element.
            let data = data.f_to_device(worker.device())?;
            worker.broadcast_from(source, &data)?;
            data
        } else {
            data
        };
        self.keep(piece, &data)?;
        let Some(target) = self.targets.get(&(piece.section, piece.key.to_owned())) else { return Ok(()) };
        let own = (target.start, target.elements.numel() as u64);
        let Some(common) = Overlap::of((piece.start, piece.len), own) else { return Ok(()) };
        let saved = &checkpoint.catalog().section(piece.section)[piece.key];
        let fail = |problem| ice_checkpoint::Error::checkpoint(checkpoint.path(), problem);
        let data = data.f_view_dtype(dtype::kind(saved.dtype).map_err(fail)?)?;
        let from = data.f_narrow(0, common.in_first as i64, common.len as i64)?;
        let mut to = target.elements.f_narrow(0, common.in_second as i64, common.len as i64)?;
        tch::no_grad(|| to.f_copy_(&from))?;
        let lost = |kind| fail(format!("`{}` has values that are infinite in {kind:?}", piece.key));
        match to.kind() != from.kind() && finite(&to)? != finite(&from)? {
            true => Err(lost(to.kind()).into()),
            false => Ok(()),
        }
    }
}

impl Target {
    pub(super) fn new(tensor: &Tensor, part: Option<&Part>) -> Result<Self> {
        let start = part.map_or(0, |part| part.start);
        let tensor = tensor.detach();
        if tensor.is_contiguous() {
            return Ok(Self { elements: tensor.f_view([-1])?, scattered: None, start });
        }
        let elements = Tensor::f_empty([tensor.numel() as i64], (tensor.kind(), tensor.device()))?;
        Ok(Self { elements, scattered: Some(tensor), start })
    }
}

/// Returns the uid of the node that a key belongs to: the longest whose prefix the key starts with.
pub(super) fn owner<'a>(graph: &'a HyperGraph, key: &str) -> Option<&'a String> {
    let of = graph.entries().iter().map(|entry| &entry.uid).filter(|uid| key.starts_with(&key_prefix(uid)));
    of.max_by_key(|uid| key_prefix(uid).len())
}

/// Returns the number of finite elements.
fn finite(tensor: &Tensor) -> Result<i64> {
    Ok(tensor.f_isfinite()?.f_sum(Kind::Int64)?.f_int64_value(&[])?)
}
