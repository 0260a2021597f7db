//! The order of a stream: shards one after the other, and a buffer that shuffles the samples found.

use std::sync::Arc;

use rand_chacha::ChaCha8Rng;

use super::{BatchStream, ShardIter};
use crate::data::pass::{below, generator};
use crate::data::sampler::shuffle;
use crate::data::{Pass, SamplerCursor};
use crate::{BatchShare, Error, Result};

/// Order and batch size in which a stream is read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StreamOrder {
    /// Seed of the run and size of the buffer, if the stream is shuffled.
    pub(crate) shuffled: Option<(u64, usize)>,
    pub(crate) global_batch: u64,
    pub(crate) drop_last: bool,
}

/// A pass in progress. It is a function of the stream, the seed and the number of the pass: every
/// walk over the same pass finds the same samples.
struct Walk<S: BatchStream> {
    number: u64,
    cursor: u64,
    shards: std::vec::IntoIter<usize>,
    open: Option<ShardIter<S::LocatedSample>>,
    buffer: Vec<S::LocatedSample>,
    capacity: usize,
    rng: Option<ChaCha8Rng>,
}

impl<S: BatchStream> Walk<S> {
    fn new(stream: &S, order: StreamOrder, number: u64) -> Self {
        let mut shards: Vec<usize> = (0..stream.shards()).collect();
        let rng = order.shuffled.map(|(seed, _)| {
            shuffle(&mut shards, &mut generator(seed, number, 0, *b"shards"));
            generator(seed, number, 0, *b"buffer")
        });
        let capacity = order.shuffled.map_or(1, |(_, size)| size.max(1));
        Self { number, cursor: 0, shards: shards.into_iter(), open: None, buffer: Vec::new(), capacity, rng }
    }

    /// Returns the next sample, or `None` at the end of the pass.
    fn next(&mut self, stream: &S) -> Result<Option<S::LocatedSample>> {
        while self.buffer.len() < self.capacity {
            match self.find(stream)? {
                Some(found) => self.buffer.push(found),
                None => break,
            }
        }
        if self.buffer.is_empty() {
            return Ok(None);
        }
        let at = self.rng.as_mut().map_or(0, |rng| below(rng, self.buffer.len() as u64) as usize);
        self.cursor += 1;
        Ok(Some(self.buffer.swap_remove(at)))
    }

    fn find(&mut self, stream: &S) -> Result<Option<S::LocatedSample>> {
        loop {
            if let Some(open) = &mut self.open {
                if let Some(found) = open.next() {
                    return found.map(Some);
                }
                self.open = None;
            }
            match self.shards.next() {
                Some(shard) => self.open = Some(stream.open(shard)?),
                None => return Ok(None),
            }
        }
    }
}

/// The share of a rank in a batch of a stream.
pub(super) struct Plan<T> {
    pub(super) pass: u64,
    /// The samples with their positions in the pass.
    pub(super) samples: Vec<(u64, T)>,
    pub(super) share: BatchShare,
    /// Position of the next batch.
    pub(super) next: SamplerCursor,
}

/// Finds the batches of a rank, one after the other.
pub(super) struct Reader<S: BatchStream> {
    stream: Arc<S>,
    order: StreamOrder,
    rank: u64,
    world_size: u64,
    walk: Option<Walk<S>>,
}

impl<S: BatchStream> Reader<S> {
    pub(super) fn new(stream: Arc<S>, order: StreamOrder, rank: u64, world_size: u64) -> Self {
        Self { stream, order, rank, world_size, walk: None }
    }

    /// Finds the batch at `from`, or the batch after the last one. After the end of a pass, the
    /// next pass begins.
    ///
    /// To move to a position, the reader finds all samples of the pass before it again.
    pub(super) fn read(
        &mut self,
        from: Option<SamplerCursor>,
        stop: &Pass,
    ) -> Result<Plan<S::LocatedSample>> {
        let walk = match (from, self.walk.take()) {
            (Some(from), _) => self.walk_to(from, stop)?,
            (None, Some(walk)) => walk,
            (None, None) => return Err(Error::Graph("the batch before was not found".into())),
        };
        // After an error there is no walk, so the next batch needs a position to start from.
        let (walk, plan) = self.batch(walk, stop)?;
        self.walk = Some(walk);
        Ok(plan)
    }

    fn walk_to(&self, place: SamplerCursor, stop: &Pass) -> Result<Walk<S>> {
        let mut walk = Walk::new(&*self.stream, self.order, place.pass);
        while walk.cursor < place.cursor {
            stop.check()?;
            if walk.next(&self.stream)?.is_none() {
                return Err(self.shorter(place.cursor, walk.cursor));
            }
        }
        Ok(walk)
    }

    fn batch(&self, mut walk: Walk<S>, stop: &Pass) -> Result<(Walk<S>, Plan<S::LocatedSample>)> {
        let StreamOrder { global_batch, drop_last, .. } = self.order;
        loop {
            let start = walk.cursor;
            let mut found = Vec::new();
            while (found.len() as u64) < global_batch {
                stop.check()?;
                match walk.next(&self.stream)? {
                    Some(sample) => found.push((start + found.len() as u64, sample)),
                    None => break,
                }
            }
            let total = found.len() as u64;
            let ended = total < global_batch;
            self.check_size(&mut walk, ended)?;
            if total == 0 || (drop_last && ended) {
                if start == 0 {
                    return Err(Error::Usage(format!(
                        "the stream has {total} samples in {} shards, which do not fill one batch of {global_batch}",
                        self.stream.shards()
                    )));
                }
                walk = Walk::new(&*self.stream, self.order, walk.number + 1);
                continue;
            }
            let (range, share) = crate::data::sampler::share_of(total, self.rank, self.world_size);
            let samples = found.drain(range.start as usize..range.end as usize).collect();
            let next = SamplerCursor { pass: walk.number, cursor: walk.cursor, iteration: 0 };
            return Ok((walk, Plan { pass: next.pass, samples, share, next }));
        }
    }

    /// Checks that the stream has as many samples as it says. Otherwise, ranks would wait for each
    /// other forever.
    fn check_size(&self, walk: &mut Walk<S>, ended: bool) -> Result<()> {
        let Some(samples) = self.stream.samples() else { return Ok(()) };
        let more =
            walk.cursor > samples || (walk.cursor == samples && !ended && !walk.at_end(&self.stream)?);
        if more {
            return Err(Error::Usage(format!("the stream says that it has {samples} samples and has more")));
        }
        if ended && walk.cursor < samples {
            return Err(self.shorter(samples, walk.cursor));
        }
        Ok(())
    }

    fn shorter(&self, expected: u64, found: u64) -> Error {
        Error::Usage(format!(
            "the stream ended after {found} samples of {expected}: its {} shards are not what they were",
            self.stream.shards()
        ))
    }
}

impl<S: BatchStream> Walk<S> {
    /// Whether no sample follows. A sample found by the check is kept in the buffer, and comes
    /// next.
    fn at_end(&mut self, stream: &S) -> Result<bool> {
        if !self.buffer.is_empty() {
            return Ok(false);
        }
        match self.find(stream)? {
            Some(found) => {
                self.buffer.push(found);
                Ok(false)
            }
            None => Ok(true),
        }
    }
}
