//! Replicas of sharded state in the memory of other ranks, and recovery from them.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use ice_checkpoint::{CHECKPOINTS, candidates};
use ice_worker::replica::{ReplicaStore, Replication, ShardReplica, assign_buddies};

use super::Run;
use super::recovery_plan::{LiveShard, RankInventory, RecoverySource, ReplicaId, find};
use crate::Result;
use crate::checkpoint::{Label, pack, unpack};
use crate::collectives::{broadcast, gather, gather_all};

/// The replicas that this rank keeps and exchanges during a run.
#[derive(Default)]
pub(super) struct Copies {
    shelf: ReplicaStore,
    /// Connections of the current round for replicas. `None` if the round makes no replicas.
    exchange: RefCell<Option<Replication>>,
    /// Number of the next replica, the same on all ranks. 0 before the first round.
    next: Cell<u64>,
    /// Numbers of the last replica known to be complete on all ranks, and of the replica in
    /// transit.
    whole: Cell<Option<u64>>,
    under_way: Cell<Option<u64>>,
    /// The rank and the world size for which this process holds its shard of the state.
    part: Cell<Option<(usize, usize)>>,
}

/// Shards in memory from which the ranks are about to reassemble a state.
pub(super) struct Parts {
    parcels: Vec<Arc<ShardReplica>>,
    /// The rank that supplies each shard, by owner.
    suppliers: Vec<usize>,
    pub(super) are_copies: bool,
}

impl Run<'_> {
    /// Whether a node of the graph has shards, which no other rank has.
    pub(super) fn is_sharded(&self) -> bool {
        self.graph.entries().iter().any(|entry| entry.node.borrow().is_sharded())
    }

    /// Finds, at the start of a round, the state to continue from if it is sharded, and opens the
    /// connections for replicas of the round. Collective.
    ///
    /// Returns the shards in memory that the ranks must reassemble. With `None`, either the state
    /// of every rank is still usable or the run needs a checkpoint.
    pub(super) fn find_parts(&self) -> Result<Option<Parts>> {
        let copies = &self.copies;
        let is_partially_updated =
            self.graph.entries().iter().any(|entry| entry.node.borrow().is_partially_updated());
        let in_use = copies.part.get().filter(|_| self.progress.has_state.get() && !is_partially_updated);
        let live = in_use.map(|(owner, of)| LiveShard { position: self.progress.position.get(), owner, of });
        let parcels = copies.shelf.all();
        let copy = |parcel: &Arc<ShardReplica>| ReplicaId {
            number: parcel.number,
            step: parcel.step,
            owner: parcel.owner,
            of: parcel.of,
        };
        let own = RankInventory {
            node: self.worker.node(),
            live,
            copies: parcels.iter().map(copy).collect(),
            next: copies.next.get(),
        };
        let offers = gather_all(&own, &self.worker)?;
        let (mut found, whole) = find(&offers);
        if let RecoverySource::Copied { step, .. } = found {
            let newest = self.is_main().then(|| self.newest_saved_step());
            // A node that left may have saved a checkpoint that is newer than the replica.
            if broadcast(newest, 0, &self.worker)? > step {
                found = RecoverySource::Lost;
            }
        }
        tracing::debug!(?found, ?whole, "the parts of the state");
        copies.next.set(offers.iter().map(|offer| offer.next).max().unwrap_or(0).max(1));
        copies.whole.set(whole);
        copies.under_way.set(None);
        copies.part.set(Some((self.worker.rank(), self.worker.world_size())));
        copies.shelf.keep(whole);
        if found != RecoverySource::AsItWas {
            self.progress.has_state.set(false);
        }
        let parts = match found {
            RecoverySource::Nothing | RecoverySource::AsItWas | RecoverySource::Lost => None,
            RecoverySource::LiveShard(suppliers) => {
                let packed = live.map(|live| self.pack(0, live.owner, live.of, Vec::new())).transpose()?;
                let parcels = packed.into_iter().map(Arc::new).collect();
                Some(Parts { parcels, suppliers, are_copies: false })
            }
            RecoverySource::Copied { number, suppliers, .. } => {
                let parcels = copies.shelf.all().into_iter().filter(|parcel| parcel.number == number);
                Some(Parts { parcels: parcels.collect(), suppliers, are_copies: true })
            }
        };
        if self.config.copy_shards_every.is_some() && self.worker.can_stay() && offers.len() > 1 {
            let nodes: Vec<_> = offers.iter().map(|offer| offer.node).collect();
            let exchange = Replication::open(&self.worker, &assign_buddies(&nodes), &copies.shelf)?;
            copies.exchange.replace(Some(exchange));
        }
        Ok(parts)
    }

    /// Reassembles the state from shards in memory, and continues from it. Collective.
    pub(super) fn put_together(&self, parts: &Parts) -> Result<()> {
        let (manifest, kept) = unpack(&parts.parcels, &parts.suppliers, self.graph, &self.worker)?;
        self.unclaimed.borrow_mut().extend(kept);
        self.tasks.load_state(&manifest.tasks, false)?;
        self.take_up(&manifest);
        Ok(())
    }

    /// Copies this rank's shard, and sends the replica to the rank that holds it while training
    /// continues. Waits for the previous replica first. Collective.
    ///
    /// Does nothing if the round makes no replicas (see
    /// [`RunConfig::copy_shards_every`](crate::RunConfig)).
    pub(super) fn copy_parts(&self) -> Result<()> {
        let copies = &self.copies;
        let exchange = copies.exchange.borrow();
        let Some(exchange) = &*exchange else { return Ok(()) };
        if let Some(number) = copies.under_way.take() {
            let outcome = exchange.wait();
            if let Err(problem) = &outcome {
                tracing::warn!(
                    "{problem}; should a rank be lost, all would go back to an older copy or a checkpoint"
                );
            }
            let is_whole =
                gather(&[i64::from(outcome.is_ok())], &self.worker)?.concat().iter().all(|ok| *ok != 0);
            if is_whole {
                copies.whole.set(Some(number));
            }
        }
        self.graph.sync_measures(&self.worker)?;
        self.synced();
        let (number, whole) = (copies.next.get(), copies.whole.get());
        let (rank, ranks) = (self.worker.rank(), self.worker.world_size());
        let old = copies.shelf.release(rank, whole);
        let parcel = Arc::new(self.pack(number, rank, ranks, old)?);
        copies.next.set(number + 1);
        copies.under_way.set(Some(number));
        copies.shelf.put(Arc::clone(&parcel));
        exchange.send(parcel, whole);
        Ok(())
    }

    /// Calls [`Run::copy_parts`] every [`RunConfig::copy_shards_every`](crate::RunConfig) training
    /// steps.
    pub(crate) fn copy_if_due(&self) -> Result<()> {
        match self.config.copy_shards_every {
            Some(every) if self.counters.train_steps().is_multiple_of(every.get()) => self.copy_parts(),
            _ => Ok(()),
        }
    }

    /// Closes the connections for replicas, which belong to the round that ends.
    pub(super) fn end_copies(&self) {
        self.copies.exchange.replace(None);
    }

    fn pack(&self, number: u64, owner: usize, of: usize, old: Vec<ShardReplica>) -> Result<ShardReplica> {
        pack(&Label { number, owner, of }, self.manifest(None), self.graph, &self.unclaimed.borrow(), old)
    }

    /// Returns the training step of the newest checkpoint of the run, or 0 if there is none.
    fn newest_saved_step(&self) -> u64 {
        let newest = candidates(&self.folder.join(CHECKPOINTS)).pop();
        newest.and_then(|newest| newest.manifest.ok()).map_or(0, |manifest| manifest.counters.train_steps)
    }
}
