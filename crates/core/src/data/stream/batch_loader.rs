use std::sync::Arc;

use tch::Device;

use super::BatchStream;
pub(crate) use super::walk::StreamOrder;
use super::walk::{Plan, Reader};
use crate::data::batch::{pin, to_device};
use crate::data::worker_pool::{OrderedWorkerPool, StopOnDrop};
use crate::data::{Pass, PrefetchOptions, RankSlot, SamplerCursor};
use crate::{BatchShare, Error, Result};

/// Feeds one rank from a [`BatchStream`]: its position, and the batches that are made ahead.
///
/// One thread at a time finds samples, in order. Several threads load them in parallel.
pub(crate) struct StreamLoader<S: BatchStream> {
    samples: Option<u64>,
    order: StreamOrder,
    iterations: Option<u64>,
    place: SamplerCursor,
    /// Position of the oldest batch in progress, or else of the next batch to submit.
    expected: Option<(u64, u64)>,
    /// Position after the batch that was taken last.
    next: Option<SamplerCursor>,
    pending: usize,
    ahead: PrefetchOptions,
    seat: RankSlot,
    _stop: StopOnDrop,
    lane: OrderedWorkerPool<Option<SamplerCursor>, Plan<S::LocatedSample>, Made<S::Batch>>,
}

/// A batch, and the position of the next one.
struct Made<B> {
    batch: B,
    share: BatchShare,
    next: SamplerCursor,
}

impl<S: BatchStream + 'static> StreamLoader<S> {
    pub(crate) fn new(
        stream: Arc<S>,
        order: StreamOrder,
        iterations: Option<u64>,
        seed: u64,
        ahead: PrefetchOptions,
        seat: RankSlot,
    ) -> Result<Self> {
        let samples = stream.samples();
        let stop = StopOnDrop::default();
        let make_on = if ahead.workers == 0 { seat.device } else { Device::Cpu };
        let mut reader = Reader::new(Arc::clone(&stream), order, seat.rank, seat.world_size);
        let flag = Pass::new(seed, 0).until(&stop.0);
        let find = move |from| reader.read(from, &flag);
        let flag = Arc::clone(&stop.0);
        let load = move |plan: Plan<S::LocatedSample>| {
            let pass = Pass::new(seed, plan.pass).until(&flag);
            let batch = stream.batch_in(&pass, plan.samples, make_on)?;
            let batch = if make_on == seat.device { batch } else { pin(batch, seat.device)? };
            Ok(Made { batch, share: plan.share, next: plan.next })
        };
        let lane = OrderedWorkerPool::new(ahead.workers, find, load)?;
        Ok(Self {
            samples,
            order,
            iterations,
            place: SamplerCursor::default(),
            expected: None,
            next: None,
            pending: 0,
            ahead,
            seat,
            _stop: stop,
            lane,
        })
    }

    #[cfg(test)]
    pub(crate) fn stop(&self) -> Arc<std::sync::atomic::AtomicBool> {
        Arc::clone(&self._stop.0)
    }

    pub(crate) fn place(&self) -> SamplerCursor {
        self.place
    }

    pub(crate) fn seek(&mut self, place: SamplerCursor) {
        self.place = place;
        self.next = None;
    }

    /// Returns the remaining iterations of the epoch, if the epoch has an end.
    pub(crate) fn remaining(&self) -> Option<u64> {
        if let Some(iterations) = self.iterations {
            return Some(iterations.saturating_sub(self.place.iteration));
        }
        let left = self.samples?.saturating_sub(self.place.cursor);
        let StreamOrder { global_batch, drop_last, .. } = self.order;
        Some(if drop_last { left / global_batch } else { left.div_ceil(global_batch) })
    }

    /// Returns the number of samples of all ranks in the next iterations of the epoch, if the
    /// number of samples is known.
    pub(crate) fn samples_in(&self, iterations: u64) -> Option<u64> {
        let left = self.samples?.saturating_sub(self.place.cursor);
        // With a number of iterations, a pass may end anywhere within the epoch.
        self.iterations.is_none().then(|| left.min(iterations.saturating_mul(self.order.global_batch)))
    }

    /// Consumes the batch that was taken last.
    pub(crate) fn advance(&mut self) {
        if let Some(SamplerCursor { pass, cursor, .. }) = self.next.take() {
            self.place = SamplerCursor { pass, cursor, iteration: self.place.iteration + 1 };
        }
    }

    pub(crate) fn next_epoch(&mut self) {
        let SamplerCursor { pass, cursor, .. } = self.place;
        self.place = match (self.iterations, self.samples) {
            (None, Some(_)) => SamplerCursor { pass: pass + 1, cursor: 0, iteration: 0 },
            _ => SamplerCursor { pass, cursor, iteration: 0 },
        };
    }

    /// Returns the batch of this rank at its position.
    pub(crate) fn next(&mut self) -> Result<(S::Batch, BatchShare)> {
        let remaining = self.remaining();
        if remaining == Some(0) {
            return Err(Error::Graph("a batch was asked for after the last one of the epoch".into()));
        }
        let mut from = None;
        if self.expected != Some((self.place.pass, self.place.cursor)) {
            self.lane.clear();
            self.pending = 0;
            from = Some(self.place);
        }
        let wanted =
            remaining.map_or(usize::MAX, |remaining| usize::try_from(remaining).unwrap_or(usize::MAX));
        while self.pending < wanted.min(1 + self.ahead.batches()) {
            self.lane.submit(from.take());
            self.pending += 1;
        }
        // Reset first: after an error, the next call finds the batch again from its position.
        self.expected = None;
        self.pending -= 1;
        let Made { batch, share, next } = self.lane.take()?;
        self.expected = Some((next.pass, next.cursor));
        self.next = Some(next);
        Ok((to_device(batch, self.seat.device)?, share))
    }
}
