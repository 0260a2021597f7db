//! Going on when the ranks change: who has come how far, and the newest state for those who lack it.
//!
//! All ranks do the same things in the same order, and count them. So whoever has counted more has come further, and who has counted as much
//! is in the same state. A rank that was in the middle of something counts what it had done before; if another rank got through, it takes that
//! one's state, and otherwise all do it again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use ice_checkpoint::{CHECKPOINTS, candidates};
use ice_worker::Worker;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;
use tch::{Device, Kind, Tensor};

use super::Run;
use crate::checkpoint::broadcast;
use crate::graph::Entries;
use crate::node::Round;
use crate::{Counters, Error, NodeState, Result};

/// Tensors below this size, in bytes, travel together.
const SMALL: usize = 128 << 10;
/// How much travels together.
const PORTION: usize = 8 << 20;

/// How the number of ranks bears on the size of a batch that is given per rank, once nodes come or go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ElasticBatch {
    /// The global batch stays: fewer ranks take it in several passes, whose gradients they add up, so that none has more samples at a time
    /// than it is given.
    #[default]
    KeepGlobal,
    /// Each rank's share stays, so that the global batch changes, and the learning rates with it.
    KeepLocal(LrRule),
}

/// How learning rates follow a global batch that has become `k` times what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LrRule {
    /// They stay.
    #[default]
    Keep,
    /// Times `k`, as for SGD (Goyal et al., 2017).
    Linear,
    /// Times the square root of `k`, as for Adam (Malladi et al., 2022).
    Sqrt,
}

impl ElasticBatch {
    /// What a batch per rank is multiplied by, and the learning rates, on so many ranks of a run that began with others.
    fn on(self, ranks: usize, base: usize) -> (usize, f64) {
        let k = ranks as f64 / base as f64;
        match self {
            Self::KeepGlobal => (base, 1.0),
            Self::KeepLocal(LrRule::Keep) => (ranks, 1.0),
            Self::KeepLocal(LrRule::Linear) => (ranks, k),
            Self::KeepLocal(LrRule::Sqrt) => (ranks, k.sqrt()),
        }
    }
}

/// How far a rank has come.
#[derive(Default)]
pub(super) struct Progress {
    /// Whether there is a state to go on with: not before the run has begun or resumed.
    pub(super) has_state: Cell<bool>,
    /// Things done that all ranks do.
    pub(super) position: Cell<u64>,
    /// How many of them were synchronisations of measures.
    pub(super) syncs: Cell<u64>,
    /// The nodes of the training step that is under way.
    pub(super) in_step: RefCell<Option<Entries>>,
    /// Ranks that the run began with; 0 as long as there was no round.
    pub(super) base_ranks: Cell<usize>,
    /// What to go back to when an evaluation is disturbed.
    pub(super) mark: RefCell<Option<Mark>>,
    /// Whether the first step of the round is still to be applied, and if so whether it was begun before.
    pub(super) first_step: Cell<Option<bool>>,
}

/// Where an epoch of an evaluation began. Its iterations need no other rank, so ranks are anywhere in it, and it is cheap to begin anew.
pub(super) struct Mark {
    entries: Entries,
    tasks: Json,
    counters: Counters,
    position: u64,
}

/// A rank's word on how far it has come, as numbers.
type Standing = [i64; 4];

/// What goes to those that lack it, beside tensors.
#[derive(Serialize, Deserialize)]
struct Shared {
    tasks: Json,
    counters: ice_checkpoint::Counts,
    measures: BTreeMap<String, f64>,
    position: u64,
    syncs: u64,
    values: BTreeMap<String, Json>,
}

impl Run<'_> {
    /// Notes that something is done that all ranks do.
    pub(crate) fn passed(&self) {
        self.progress.position.set(self.progress.position.get() + 1);
    }

    /// Notes that the measures of all ranks were synchronised.
    pub(crate) fn synced(&self) {
        self.progress.syncs.set(self.progress.syncs.get() + 1);
        self.passed();
    }

    /// An epoch of an evaluation of these nodes begins.
    pub(crate) fn mark(&self, entries: &Entries) {
        if self.worker.can_stay() {
            let mark = Mark {
                entries: Rc::clone(entries),
                tasks: self.tasks.state(),
                counters: self.counters.clone(),
                position: self.progress.position.get(),
            };
            self.progress.mark.replace(Some(mark));
        }
    }

    /// It is over.
    pub(crate) fn unmark(&self) {
        self.progress.mark.replace(None);
    }

    /// A training step of these nodes begins.
    pub(crate) fn step_begins(&self, entries: &Entries) {
        self.progress.in_step.replace(Some(Rc::clone(entries)));
    }

    /// It is applied.
    pub(crate) fn step_counts(&self) {
        self.progress.in_step.replace(None);
        self.counters.count_step(true);
        self.passed();
        if let Some(repeated) = self.progress.first_step.take() {
            self.worker.first_step(self.counters.train_steps(), repeated);
        }
    }

    /// Leaves a round that failed or is over, and takes part in the next one. False where there will be none.
    pub(super) fn change_round(&self, why: &Error) -> Result<bool> {
        tracing::debug!(%why, "leaving the round");
        for entry in self.graph.entries() {
            entry.node.borrow_mut().leave_round();
        }
        if let Some(mark) = self.progress.mark.take() {
            self.tasks.load_state(&mark.tasks, false)?;
            self.counters.restore(mark.counters.saved());
            self.progress.position.set(mark.position);
            roll_back(&mark.entries);
        }
        match why.root() {
            Error::NodesLeave => self.worker.await_end_of_round(),
            _ => self.worker.leave_round(&why.to_string()),
        }
        Ok(self.worker.enter_round()?)
    }

    /// Begins a round, on every rank: agrees on the state to go on with, brings it to those who lack it, and makes the nodes ready.
    pub(super) fn begin_round(&self) -> Result<()> {
        let began = Instant::now();
        self.writer.borrow_mut().enter_round(&self.worker);
        let sharded = self.graph.entries().iter().any(|entry| entry.node.borrow().is_sharded());
        let was_running = self.progress.has_state.get();
        if was_running && sharded {
            // The part of a rank that is gone is gone.
            self.progress.has_state.set(false);
        }
        let standings = self.standings()?;
        let newest = standings.iter().max_by_key(|standing| (standing[0], standing[1])).copied();
        let source = standings.iter().position(|standing| Some(*standing) == newest).unwrap_or(0);
        let newest = newest.unwrap_or_default();
        let own = standings[self.worker.rank()];
        let known = standings.iter().map(|standing| standing[3] as usize).find(|ranks| *ranks > 0);
        let base = match known {
            Some(base) => base,
            None => self.saved_base()?.unwrap_or(self.worker.world_size()),
        };
        let repeated = self.progress.in_step.borrow().is_some() && own == newest;
        if newest[0] == 0 {
            self.leave_step();
            self.broadcast_tensors(source, true, false)?;
        } else if standings.iter().any(|standing| standing[..2] != newest[..2]) {
            self.catch_up(source, &own, &newest)?;
        } else {
            self.leave_step();
        }
        let (batch_ranks, lr_factor) = self.config.elastic_batch.on(self.worker.world_size(), base);
        self.tell_batch(base, lr_factor);
        self.progress.base_ranks.set(base);
        let round = Round { worker: Rc::clone(&self.worker), batch_ranks, lr_factor };
        self.graph.enter_round(&round)?;
        if newest[0] == 0 {
            self.begin(was_running)?;
            self.progress.position.set(0);
            self.progress.syncs.set(0);
        } else if self.is_main() {
            println!(
                "round {}: going on after step {} on {} ranks, from the memory of rank {source} ({:.0} ms)",
                self.worker.round(),
                self.counters.train_steps(),
                self.worker.world_size(),
                began.elapsed().as_secs_f64() * 1e3
            );
        }
        self.progress.has_state.set(true);
        self.progress.first_step.set(Some(repeated));
        Ok(())
    }

    /// The step that was begun does not count.
    fn leave_step(&self) {
        self.progress.in_step.take().into_iter().for_each(|entries| roll_back(&entries));
    }

    /// Says what the batches are where there are other ranks than the run began with, or where there were.
    fn tell_batch(&self, base: usize, lr_factor: f64) {
        let ranks = self.worker.world_size();
        if !self.is_main() || (ranks == base && self.progress.base_ranks.get() == 0) {
            return;
        }
        match self.config.elastic_batch {
            ElasticBatch::KeepGlobal => println!(
                "{ranks} ranks share the batches of the {base} that the run began with: the global batch stays"
            ),
            ElasticBatch::KeepLocal(_) => println!(
                "{ranks} ranks instead of the {base} that the run began with: the global batch of datasets that give one per rank is {:.3} \
                 times what it was, learning rates {lr_factor:.3} times",
                ranks as f64 / base as f64
            ),
        }
    }

    /// The ranks that the run began with, as its newest checkpoint has it; rank 0 looks.
    fn saved_base(&self) -> Result<Option<usize>> {
        let newest = || candidates(&self.folder.join(CHECKPOINTS)).pop()?.manifest.ok()?.base_ranks;
        if self.worker.world_size() == 1 {
            return Ok(newest());
        }
        broadcast(self.is_main().then(newest), 0, &self.worker)
    }

    /// The words of all ranks.
    fn standings(&self) -> Result<Vec<Standing>> {
        let progress = &self.progress;
        let own: Standing = [
            progress.has_state.get().into(),
            progress.position.get() as i64,
            progress.syncs.get() as i64,
            progress.base_ranks.get() as i64,
        ];
        let worker = &self.worker;
        if worker.world_size() == 1 {
            return Ok(vec![own]);
        }
        let options = (Kind::Int64, worker.device());
        let all = Tensor::f_zeros([worker.world_size() as i64, own.len() as i64], options)?.f_unbind(0)?;
        worker.all_gather(&all, &Tensor::from_slice(&own).f_to_device(worker.device())?)?;
        let words = all.iter().map(|word| {
            let word: Vec<i64> = Vec::try_from(word.f_to_device(Device::Cpu)?)?;
            Ok(Standing::try_from(word).unwrap_or_default())
        });
        words.collect()
    }

    /// The state of the rank that has come furthest, on all of them.
    fn catch_up(&self, source: usize, own: &Standing, newest: &Standing) -> Result<()> {
        let lacks = own[..2] != newest[..2];
        // Another rank got through the step that this one was in: so has this one but for the end, and what it measured counts.
        let counts = own[0] == 1 && own[2] == newest[2] && lacks;
        let begun = self.progress.in_step.borrow().clone().filter(|_| counts);
        for entry in begun.iter().flat_map(|entries| entries.iter()) {
            let mut node = entry.node.borrow_mut();
            if node.is_measure() {
                node.step_end()?;
            }
        }
        self.leave_step();
        let shared = if self.worker.rank() == source { Some(self.shared()) } else { None };
        let shared = broadcast(shared, source, &self.worker)?;
        self.broadcast_tensors(source, false, lacks && own[0] == 1)?;
        if !lacks {
            return Ok(());
        }
        self.tasks.load_state(&shared.tasks, false)?;
        self.counters.restore(shared.counters);
        self.measures.replace(shared.measures);
        self.progress.position.set(shared.position);
        self.progress.syncs.set(shared.syncs);
        for entry in self.graph.entries() {
            let mut node = entry.node.borrow_mut();
            if own[0] == 1 && own[2] == newest[2] && node.is_measure() {
                // The sums of all ranks are the same, and its own ones are nobody else's.
                continue;
            }
            let values = shared.values.get(&entry.uid).cloned().unwrap_or(Json::Null);
            let state = NodeState { values, ..node.state() };
            node.load_state(&state).map_err(|error| error.at(&entry.uid, "start of a round"))?;
        }
        Ok(())
    }

    fn shared(&self) -> Shared {
        let values = self.graph.entries().iter();
        Shared {
            tasks: self.tasks.state(),
            counters: self.counters.saved(),
            measures: self.finite_measures(),
            position: self.progress.position.get(),
            syncs: self.progress.syncs.get(),
            values: values.map(|entry| (entry.uid.clone(), entry.node.borrow().state().values)).collect(),
        }
    }

    /// The tensors of one rank on all of them: of the modules, and of their optimizers unless they are at their beginnings.
    fn broadcast_tensors(&self, source: usize, only_models: bool, stages: bool) -> Result<()> {
        if self.worker.world_size() == 1 {
            return Ok(());
        }
        let mut small = Portion::new(&self.worker, source, stages);
        for entry in self.graph.entries() {
            let state = entry.node.borrow().state();
            let optimizer = state.optimizer.iter().filter(|_| !only_models);
            for (_, tensor) in state.model.iter().chain(optimizer) {
                small.send(&tensor.detach())?;
            }
        }
        small.flush()?;
        for (tensor, staged) in small.staged {
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&staged))?;
        }
        Ok(())
    }
}

fn roll_back(entries: &Entries) {
    entries.iter().for_each(|entry| entry.node.borrow_mut().roll_back());
}

/// Small tensors that travel together.
struct Portion<'a> {
    worker: &'a Worker,
    source: usize,
    tensors: Vec<Tensor>,
    bytes: usize,
    /// Whether what comes is kept apart until all is there: a state of one's own is not to be lost with a source that dies meanwhile.
    stages: bool,
    staged: Vec<(Tensor, Tensor)>,
}

impl<'a> Portion<'a> {
    fn new(worker: &'a Worker, source: usize, stages: bool) -> Self {
        Self { worker, source, tensors: Vec::new(), bytes: 0, stages, staged: Vec::new() }
    }

    fn send(&mut self, tensor: &Tensor) -> Result<()> {
        let tensor = &match self.stages {
            true => {
                let place = tensor.f_empty_like()?;
                self.staged.push((tensor.shallow_clone(), place.shallow_clone()));
                place
            }
            false => tensor.shallow_clone(),
        };
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes >= SMALL && tensor.is_contiguous() && tensor.device() == self.worker.device() {
            let view = tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            return Ok(self.worker.broadcast_from(self.source, &view)?);
        }
        if bytes > 0 {
            self.tensors.push(tensor.shallow_clone());
            self.bytes += bytes;
        }
        if self.bytes >= PORTION { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let (tensors, is_source) = (std::mem::take(&mut self.tensors), self.worker.rank() == self.source);
        self.bytes = 0;
        if tensors.is_empty() {
            return Ok(());
        }
        let device = self.worker.device();
        let flat = |tensor: &Tensor| -> Result<Tensor> {
            let row = tensor.f_contiguous()?.f_view([-1])?.f_view_dtype(Kind::Uint8)?;
            Ok(row.f_to_device(device)?)
        };
        let rows = tensors.iter().map(flat).collect::<Result<Vec<_>>>()?;
        let all = Tensor::f_cat(&rows, 0)?;
        self.worker.broadcast_from(self.source, &all)?;
        if is_source {
            return Ok(());
        }
        let mut start = 0;
        for (tensor, row) in tensors.iter().zip(&rows) {
            let len = row.numel() as i64;
            // A view of another type must begin where one of its elements could.
            let bytes = all.f_narrow(0, start, len)?.copy().f_view_dtype(tensor.kind())?;
            tch::no_grad(|| tensor.shallow_clone().f_copy_(&bytes.f_view_as(tensor)?))?;
            start += len;
        }
        Ok(())
    }
}
