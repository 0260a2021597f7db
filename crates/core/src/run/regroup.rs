//! Going on when the ranks change: who has come how far, and the newest state for those who lack it.
//!
//! All ranks do the same things in the same order, and count them. So whoever has counted more has come further, and who has counted as much
//! is in the same state. A rank that was in the middle of something counts what it had done before; if another rank got through, it takes that
//! one's state, and otherwise all do it again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ice_checkpoint::Exact;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::Run;
use crate::graph::Entries;
use crate::node::Round;
use crate::ranks::{broadcast, gather};
use crate::{Counters, Error, NodeState, Result};

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
    /// Ranks of the round before.
    pub(super) ranks: Cell<Option<usize>>,
    /// What to go back to when an evaluation is disturbed.
    pub(super) mark: RefCell<Option<Mark>>,
    /// Whether the first step of the round is still to be applied, and if so how many are done again, it included.
    pub(super) first_step: Cell<Option<u64>>,
}

/// Where an epoch of an evaluation began. Its iterations need no other rank, so ranks are anywhere in it, and it is cheap to begin anew.
pub(super) struct Mark {
    entries: Entries,
    tasks: Json,
    counters: Counters,
    position: u64,
}

/// How a run begins in a round.
pub(super) enum Beginning {
    /// With the state that ranks have.
    FromMemory,
    /// With a checkpoint, or at its beginning.
    Afresh,
    /// It is done: the checkpoint to resume from is of the run of this number.
    Later { due: u64 },
}

/// A rank's word on how far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    has_state: bool,
    position: u64,
    syncs: u64,
    base_ranks: usize,
    /// Whether the ranks have agreed on the end of the run.
    is_over: bool,
}

impl Standing {
    /// Ranks whose places are equal are in the same state.
    fn place(&self) -> (bool, u64) {
        (self.has_state, self.position)
    }

    /// Whether both know the measures of all ranks up to the same synchronisation.
    fn has_measures_of(&self, other: &Self) -> bool {
        self.has_state && self.syncs == other.syncs
    }
}

/// What goes to those that lack it, beside tensors.
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

    /// Begins a round, on every rank: agrees on the state to go on with, brings it to those who lack it, and makes the nodes ready.
    pub(super) fn begin_round(&self) -> Result<Beginning> {
        let began = Instant::now();
        self.writer.borrow_mut().enter_round(&self.worker);
        let was_running = self.progress.has_state.get();
        let begun = self.progress.in_step.borrow().is_some();
        let steps_begun = self.counters.train_steps() + u64::from(begun);
        let parts = match self.is_sharded() {
            true => {
                // A part that is ahead of others is of no use, so that nobody need know how its step ended.
                self.leave_step();
                self.find_parts()?
            }
            false => None,
        };
        let standings = self.standings()?;
        // Until here it may have been a wait for a rank that had yet to start.
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
        // Parts of a state that is in use are those of the end, too; an older state is not at the end yet.
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

    /// The step that was begun does not count.
    pub(super) fn leave_step(&self) {
        self.progress.in_step.take().into_iter().for_each(|entries| roll_back(&entries));
    }

    /// The words of all ranks.
    fn standings(&self) -> Result<Vec<Standing>> {
        let progress = &self.progress;
        let own = [
            progress.has_state.get().into(),
            progress.position.get() as i64,
            progress.syncs.get() as i64,
            progress.base_ranks.get() as i64,
            self.is_over_early().into(),
        ];
        let standing = |word: Vec<i64>| Standing {
            has_state: word[0] != 0,
            position: word[1] as u64,
            syncs: word[2] as u64,
            base_ranks: word[3] as usize,
            is_over: word[4] != 0,
        };
        Ok(gather(&own, &self.worker)?.into_iter().map(standing).collect())
    }

    /// The state of the rank that has come furthest, on those that lack it.
    fn catch_up(&self, source: usize, lacking: &[usize], own: &Standing, newest: &Standing) -> Result<()> {
        let lacks = own.place() != newest.place();
        let has_measures = own.has_measures_of(newest);
        // Another rank got through the step that this one was in: so has this one but for the end, and what it measured counts.
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
