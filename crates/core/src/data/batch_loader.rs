//! The batches of a rank: its position in the order, and the batches that are made ahead.

use std::collections::VecDeque;
use std::sync::Arc;

use tch::Device;

use super::batch::{pin, to_device};
use super::worker_pool::{OrderedWorkerPool, StopOnDrop, guard};
use super::{Dataset, Pass, Sampler, SamplerCursor};
use crate::{BatchShare, Error, Result};

/// The threads that make batches, and how many batches they make ahead.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PrefetchOptions {
    pub(crate) workers: usize,
    pub(crate) prefetch: Option<usize>,
}

impl PrefetchOptions {
    /// Returns the most batches that are made ahead.
    pub(super) fn batches(self) -> usize {
        match self.workers {
            0 => 0,
            workers => self.prefetch.unwrap_or(2 * workers),
        }
    }
}

/// Number of samples per iteration.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BatchSize {
    PerRank(usize),
    InTotal(usize),
}

impl BatchSize {
    /// Returns the number of samples of all ranks.
    pub(crate) fn global(self, world_size: u64) -> Result<u64> {
        match self {
            Self::PerRank(0) => {
                Err(Error::Usage("a batch size of 0: give at least 1 sample per rank".into()))
            }
            Self::InTotal(0) => {
                Err(Error::Usage("a batch size of 0 in total: give at least 1 sample for all ranks".into()))
            }
            Self::PerRank(samples) => Ok(samples as u64 * world_size),
            Self::InTotal(samples) => Ok(samples as u64),
        }
    }
}

impl BatchSize {
    /// Returns the number of micro_batches of an iteration. If fewer ranks share a batch than it was made
    /// for, no rank thereby has more samples at a time than its given batch.
    pub(crate) fn micro_batches(self, batch_ranks: u64, world_size: u64) -> u64 {
        match self {
            Self::PerRank(_) => batch_ranks.div_ceil(world_size).max(1),
            Self::InTotal(_) => 1,
        }
    }
}

/// The rank that is fed, the number of ranks, and the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RankSlot {
    pub(crate) rank: u64,
    pub(crate) world_size: u64,
    pub(crate) device: Device,
}

impl RankSlot {
    pub(crate) fn of(worker: &ice_worker::Worker) -> Self {
        Self { rank: worker.rank() as u64, world_size: worker.world_size() as u64, device: worker.device() }
    }
}

/// Feeds one rank from a [`Dataset`].
///
/// A checkpoint stores the sampler's position, which counts only consumed samples. Batches ahead
/// are planned from there. They are discarded if the position turns out to differ from the planned
/// one: after a resume, or when an epoch ends early.
pub(crate) struct BatchLoader<D: Dataset> {
    sampler: Sampler,
    /// Position of the next batch to plan.
    planner: Sampler,
    /// Positions of the batches in progress.
    planned: VecDeque<(SamplerCursor, u64)>,
    /// Number of micro_batches of an iteration, and number of the next micro_batch.
    micro_batches: u64,
    micro_batch: u64,
    /// Number of the micro_batch that is planned next.
    planner_micro_batch: u64,
    ahead: PrefetchOptions,
    seat: RankSlot,
    _stop: StopOnDrop,
    lane: OrderedWorkerPool<Job, Job, D::Batch>,
}

/// The samples of a batch.
struct Job {
    pass: u64,
    indices: Vec<i64>,
}

impl<D: Dataset + 'static> BatchLoader<D> {
    pub(crate) fn new(
        dataset: Arc<D>,
        sampler: Sampler,
        seed: u64,
        ahead: PrefetchOptions,
        seat: RankSlot,
        micro_batches: u64,
    ) -> Result<Self> {
        let stop = StopOnDrop::default();
        let flag = Arc::clone(&stop.0);
        let make_on = if ahead.workers == 0 { seat.device } else { Device::Cpu };
        let make = move |job: Job| {
            let pass = Pass::new(seed, job.pass).until(&flag);
            let made = guard(|| dataset.batch_in(&pass, &job.indices, make_on));
            let batch = made.map_err(|error| match error {
                named @ Error::Sample { .. } => named,
                source => Error::Batch { samples: job.indices, source: Box::new(source) },
            })?;
            if make_on == seat.device { Ok(batch) } else { pin(batch, seat.device) }
        };
        let lane = OrderedWorkerPool::new(ahead.workers, Ok, make)?;
        Ok(Self {
            planner: sampler.clone(),
            sampler,
            planned: VecDeque::new(),
            micro_batches,
            micro_batch: 0,
            planner_micro_batch: 0,
            ahead,
            seat,
            _stop: stop,
            lane,
        })
    }

    pub(crate) fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// Moves to a position.
    pub(crate) fn seek(&mut self, place: SamplerCursor) {
        self.sampler.seek(place);
        self.micro_batch = 0;
    }

    /// Moves to the start of the next epoch.
    pub(crate) fn next_epoch(&mut self) {
        self.sampler.next_epoch();
        self.micro_batch = 0;
    }

    /// Consumes the batch.
    pub(crate) fn advance(&mut self) {
        self.micro_batch = next_micro_batch(&mut self.sampler, self.micro_batch, self.micro_batches);
    }

    /// Returns the number of batches of the iteration that are not yet consumed.
    pub(crate) fn parts_left(&self) -> u64 {
        self.sampler.micro_batches(self.micro_batches) - self.micro_batch
    }

    /// Returns the batch of this rank at the position of the sampler.
    pub(crate) fn next(&mut self) -> Result<(D::Batch, BatchShare)> {
        let RankSlot { rank, world_size, device } = self.seat;
        if self.sampler.remaining() == 0 {
            return Err(Error::Graph("a batch was asked for after the last one of the epoch".into()));
        }
        if self.planned.front() != Some(&(self.sampler.place(), self.micro_batch)) {
            self.lane.clear();
            self.planned.clear();
            (self.planner, self.planner_micro_batch) = (self.sampler.clone(), self.micro_batch);
        }
        while self.planned.len() <= self.ahead.batches()
            && (self.planned.is_empty() || self.planner.remaining() > 0)
        {
            let (place, micro_batch) = (self.planner.place(), self.planner_micro_batch);
            let (indices, _) = self.planner.micro_batch(micro_batch, self.micro_batches, rank, world_size);
            self.lane.submit(Job { pass: place.pass, indices });
            self.planned.push_back((place, micro_batch));
            self.planner_micro_batch = next_micro_batch(&mut self.planner, micro_batch, self.micro_batches);
        }
        self.planned.pop_front();
        let (_, share) = self.sampler.micro_batch(self.micro_batch, self.micro_batches, rank, world_size);
        let batch = self.lane.take()?;
        Ok((to_device(batch, device)?, share))
    }
}

/// Moves to the micro_batch after `micro_batch`. After the last micro_batch, that is the first micro_batch of the next
/// iteration.
fn next_micro_batch(sampler: &mut Sampler, micro_batch: u64, micro_batches: u64) -> u64 {
    if micro_batch + 1 < sampler.micro_batches(micro_batches) {
        return micro_batch + 1;
    }
    sampler.advance();
    0
}
