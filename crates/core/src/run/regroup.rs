//! Recovery when the ranks change: finding the rank that is furthest, and bringing its state to the
//! ranks that lack it.
//!
//! All ranks execute the same operations in the same order, and count them. The rank with the
//! highest progress counter has the newest state, and ranks with equal counters are in the same
//! state.
//!
//! A rank that is interrupted within an operation has counted only the operations before. If
//! another rank has completed the operation, the interrupted rank adopts that rank's state.
//! Otherwise all ranks repeat the operation.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ice_checkpoint::Exact;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Run;
use crate::collectives::{broadcast, gather};
use crate::graph::Entries;
use crate::node::Round;
use crate::{Counters, Error, NodeState, Result};

/// A rank's progress.
#[derive(Default)]
pub(super) struct Progress {
    /// Whether this rank has a state to continue from. False until the run has begun or resumed.
    pub(super) has_state: Cell<bool>,
    /// Progress counter: completed operations that all ranks execute.
    pub(super) position: Cell<u64>,
    /// Number of these operations that synchronized measures.
    pub(super) syncs: Cell<u64>,
    /// The nodes of the training step in progress.
    pub(super) in_step: RefCell<Option<Entries>>,
    /// Number of ranks at the start of the run. 0 before the first round.
    pub(super) base_ranks: Cell<usize>,
    /// Number of ranks of the previous round.
    pub(super) ranks: Cell<Option<usize>>,
    /// The state to return to if an evaluation is disturbed.
    pub(super) mark: RefCell<Option<EvalRestorePoint>>,
    /// Number of steps that the round repeats, including the first one, until its first step is
    /// applied. `None` afterwards.
    pub(super) first_step: Cell<Option<u64>>,
}

/// The start of an epoch of an evaluation. Its iterations need no other rank, so ranks may be
/// anywhere within it. To restart it is cheap.
pub(super) struct EvalRestorePoint {
    entries: Entries,
    tasks: Json,
    counters: Counters,
    position: u64,
}

/// How a run begins in a round.
pub(super) enum Beginning {
    /// With state from the memory of ranks.
    FromMemory,
    /// From a checkpoint, or from the start of the run.
    Afresh,
    /// The run is completed: the checkpoint to resume from belongs to the run number `due`.
    Later { due: u64 },
}

/// A rank's report of its progress to the other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RankProgress {
    has_state: bool,
    position: u64,
    syncs: u64,
    base_ranks: usize,
    /// Whether the ranks have agreed to end the run early.
    is_over: bool,
}

impl RankProgress {
    /// Returns the key for comparing states. Ranks with equal keys are in the same state.
    fn place(&self) -> (bool, u64) {
        (self.has_state, self.position)
    }

    /// Whether this rank has the measures of all ranks up to the other's last synchronization.
    fn has_measures_of(&self, other: &Self) -> bool {
        self.has_state && self.syncs == other.syncs
    }
}

/// Values that ranks with an older state receive, in addition to tensors.
#[derive(Serialize, Deserialize)]
struct Shared {
    tasks: Json,
    counters: ice_checkpoint::Counts,
    measures: BTreeMap<String, Exact>,
    position: u64,
    syncs: u64,
    values: BTreeMap<String, Json>,
}

impl Run<'_> {
    /// Counts an operation that all ranks execute.
    pub(crate) fn passed(&self) {
        self.progress.position.set(self.progress.position.get() + 1);
    }

    /// Counts a synchronization of the measures of all ranks.
    pub(crate) fn synced(&self) {
        self.progress.syncs.set(self.progress.syncs.get() + 1);
        self.passed();
    }

    /// Notes that an epoch of an evaluation of these nodes begins.
    pub(crate) fn mark(&self, entries: &Entries) {
        if self.worker.can_stay() {
            let mark = EvalRestorePoint {
                entries: Rc::clone(entries),
                tasks: self.tasks.state(),
                counters: self.counters.clone(),
                position: self.progress.position.get(),
            };
            self.progress.mark.replace(Some(mark));
        }
    }

    /// Notes that the epoch of the evaluation is over.
    pub(crate) fn unmark(&self) {
        self.progress.mark.replace(None);
    }

    /// Notes that a training step of these nodes begins.
    pub(crate) fn step_begins(&self, entries: &Entries) {
        self.progress.in_step.replace(Some(Rc::clone(entries)));
    }

    /// Counts the training step in progress, which has been applied.
    pub(crate) fn step_counts(&self) {
        self.progress.in_step.replace(None);
        self.count_step(true);
        self.passed();
        if let Some(repeated) = self.progress.first_step.take() {
            self.worker.first_step(self.counters.train_steps(), repeated);
        }
    }

    /// Leaves a round that failed or is over, and enters the next one. Returns false if there is no
    /// next round for this rank.
    pub(super) fn change_round(&self, why: &Error) -> Result<bool> {
        tracing::debug!(%why, "leaving the round");
        self.end_copies();
        self.leave_nodes();
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

    /// Begins a round: agrees on the state to continue from, brings it to the ranks that lack it,
    /// and prepares the nodes. Collective.
    pub(super) fn begin_round(&self) -> Result<Beginning> {
        let began = Instant::now();
        self.writer.borrow_mut().enter_round(&self.worker);
        let was_running = self.progress.has_state.get();
        let begun = self.progress.in_step.borrow().is_some();
        let steps_begun = self.counters.train_steps() + u64::from(begun);
        let parts = match self.is_sharded() {
            true => {
                // Undoes the unfinished step before ranks compare their shards. A shard that is
                // ahead of the others is useless, so no rank needs to know how its step ended
                // elsewhere.
                self.leave_step();
                self.find_parts()?
            }
            false => None,
        };
        let standings = self.standings()?;
        // Time until here may include waiting for a rank that was still starting: it does not count
        // as transfer.
        let met = Instant::now();
        let own = standings[self.worker.rank()];
        let newest = standings.iter().max_by_key(|standing| standing.place()).copied().unwrap_or(own);
        let source = standings.iter().position(|standing| *standing == newest).unwrap_or(0);
        let known = standings.iter().map(|standing| standing.base_ranks).find(|ranks| *ranks > 0);
        let base = match known {
            Some(base) => base,
            None => self.saved_base()?.unwrap_or(self.worker.world_size()),
        };
        let repeats = begun && own == newest;
        // Shards in use include the agreement to end. A replica is older than the end of the run.
        let has_last_state = newest.has_state || parts.as_ref().is_some_and(|parts| !parts.are_copies);
        self.leaving_in_round(has_last_state && standings.iter().any(|standing| standing.is_over));
        if !newest.has_state {
            self.leave_step();
            if parts.is_none() {
                let others: Vec<_> = (0..standings.len()).filter(|rank| *rank != source).collect();
                self.transfer_tensors(source, &others, true, false)?;
            }
        } else {
            let lacks = |rank: &usize| standings[*rank].place() != newest.place();
            let lacking: Vec<_> = (0..standings.len()).filter(lacks).collect();
            match lacking.is_empty() {
                true => self.leave_step(),
                false => self.catch_up(source, &lacking, &own, &newest)?,
            }
        }
        let mut transferred = met.elapsed();
        let (batch_ranks, lr_factor) = self.config.elastic_batch.on(self.worker.world_size(), base);
        self.tell_batch(base, lr_factor);
        self.progress.base_ranks.set(base);
        let round =
            Round { worker: Rc::clone(&self.worker), batch_ranks, lr_factor, is_fresh: !newest.has_state };
        self.graph.enter_round(&round)?;
        let from = match &parts {
            Some(parts) => {
                let begun = Instant::now();
                self.put_together(parts)?;
                transferred += begun.elapsed();
                Some(if parts.are_copies { "copies in memory".into() } else { "the parts of all".into() })
            }
            None if newest.has_state => Some(format!("the memory of rank {source}")),
            None => {
                if let Some(due) = self.begin(was_running)? {
                    return Ok(Beginning::Later { due });
                }
                None
            }
        };
        if !newest.has_state {
            self.progress.position.set(0);
            self.progress.syncs.set(0);
        }
        if let Some(from) = &from
            && self.is_main()
        {
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            println!(
                "round {}: continuing after step {} on {}, from {from} ({:.0} ms into the round, {:.0} of them for the state)",
                self.worker.round(),
                self.counters.train_steps(),
                match self.worker.world_size() {
                    1 => "1 rank".into(),
                    ranks => format!("{ranks} ranks"),
                },
                ms(began.elapsed()),
                ms(transferred)
            );
        }
        self.progress.has_state.set(true);
        let again = match newest.has_state {
            true => u64::from(repeats),
            false if was_running => steps_begun.saturating_sub(self.counters.train_steps()),
            false => 0,
        };
        self.progress.first_step.set(Some(again));
        Ok(if from.is_some() { Beginning::FromMemory } else { Beginning::Afresh })
    }

    /// Undoes the training step in progress, which does not count.
    pub(super) fn leave_step(&self) {
        self.progress.in_step.take().into_iter().for_each(|entries| roll_back(&entries));
    }

    /// Gathers the progress reports of all ranks.
    fn standings(&self) -> Result<Vec<RankProgress>> {
        let progress = &self.progress;
        let own = [
            progress.has_state.get().into(),
            progress.position.get() as i64,
            progress.syncs.get() as i64,
            progress.base_ranks.get() as i64,
            self.is_over_early().into(),
        ];
        let standing = |word: Vec<i64>| RankProgress {
            has_state: word[0] != 0,
            position: word[1] as u64,
            syncs: word[2] as u64,
            base_ranks: word[3] as usize,
            is_over: word[4] != 0,
        };
        Ok(gather(&own, &self.worker)?.into_iter().map(standing).collect())
    }

    /// Brings the state of the rank that is furthest to the ranks that lack it.
    fn catch_up(
        &self,
        source: usize,
        lacking: &[usize],
        own: &RankProgress,
        newest: &RankProgress,
    ) -> Result<()> {
        let lacks = own.place() != newest.place();
        let has_measures = own.has_measures_of(newest);
        // Another rank has completed the step that interrupted this rank: this rank's measurements
        // of the step are complete, and count.
        let counts = has_measures && lacks;
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
        self.transfer_tensors(source, lacking, false, lacks && own.has_state)?;
        if !lacks {
            return Ok(());
        }
        self.forget_wishes();
        self.tasks.load_state(&shared.tasks, false)?;
        self.counters.restore(shared.counters);
        let measures = shared.measures.into_iter().map(|(uid, measure)| (uid, measure.0));
        self.measures.replace(measures.collect());
        self.progress.position.set(shared.position);
        self.progress.syncs.set(shared.syncs);
        for entry in self.graph.entries() {
            let mut node = entry.node.borrow_mut();
            if has_measures && node.is_measure() {
                // The sums over all ranks are equal on both ranks, and this rank's own sums exist
                // nowhere else.
                continue;
            }
            let values = shared.values.get(&entry.uid).cloned().unwrap_or(Json::Null);
            let state = NodeState { values, ..node.state() };
            node.load_state(&state).map_err(|error| error.at(&entry.uid, "start of a round"))?;
        }
        Ok(())
    }

    fn shared(&self) -> Shared {
        let (values, measures) = (self.graph.entries().iter(), self.measures.borrow());
        Shared {
            tasks: self.tasks.state(),
            counters: self.counters.saved(),
            measures: measures.iter().map(|(uid, measure)| (uid.clone(), Exact(*measure))).collect(),
            position: self.progress.position.get(),
            syncs: self.progress.syncs.get(),
            values: values.map(|entry| (entry.uid.clone(), entry.node.borrow().state().values)).collect(),
        }
    }
}

pub(super) fn roll_back(entries: &Entries) {
    entries.iter().for_each(|entry| entry.node.borrow_mut().roll_back());
}
