use std::sync::Arc;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::pass::below;
use crate::BatchShare;

/// The order of a dataset, and the position in it: one permutation per pass and one cursor of
/// consumed samples, the same on all ranks.
///
/// Ranks take their share of the next global batch from the cursor. If the number of ranks changes,
/// no sample is therefore repeated or skipped.
///
/// By default, an epoch is a pass over all samples. With a number of iterations, the passes
/// continue across the ends of epochs: samples left over from one epoch come first in the next, and
/// an epoch longer than a pass continues into the next pass. The batches are those of a run without
/// that number.
///
/// ```
/// use ice_core::data::Sampler;
/// let mut sampler = Sampler::new(10, 4, None, false).batches_per_epoch(2);
/// let mut epoch = || {
///     let mut seen = Vec::new();
///     while sampler.remaining() > 0 {
///         seen.push(sampler.batch(0, 1).0);
///         sampler.advance();
///     }
///     sampler.next_epoch();
///     seen
/// };
/// assert_eq!(epoch(), [[0, 1, 2, 3], [4, 5, 6, 7]]);
/// assert_eq!(epoch(), [vec![8, 9], vec![0, 1, 2, 3]]);
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    samples: u64,
    global_batch: u64,
    seed: Option<u64>,
    drop_last: bool,
    iterations: Option<u64>,
    place: SamplerCursor,
    order: Arc<[u32]>,
    /// The pass that `order` belongs to.
    ordered: u64,
}

/// Position of all ranks together in a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SamplerCursor {
    /// Number of the pass over all samples, from 0.
    pub pass: u64,
    /// Number of consumed samples of the pass.
    pub cursor: u64,
    /// Number of completed iterations of the epoch.
    pub iteration: u64,
}

impl Sampler {
    /// Largest number of samples of a dataset.
    pub const MAX_SAMPLES: u64 = u32::MAX as u64;

    /// Creates the order of `samples` samples, shuffled if there is a seed. Each iteration takes
    /// `global_batch` samples (at least 1) over all ranks. Samples beyond [`Sampler::MAX_SAMPLES`]
    /// are ignored.
    pub fn new(samples: u64, global_batch: u64, seed: Option<u64>, drop_last: bool) -> Self {
        let samples = samples.min(Self::MAX_SAMPLES);
        Self {
            samples,
            global_batch: global_batch.max(1),
            seed,
            drop_last,
            iterations: None,
            place: SamplerCursor::default(),
            order: permutation(samples, seed, 0),
            ordered: 0,
        }
    }

    /// Sets the number of iterations of an epoch. Has no effect if a pass has no batch.
    #[must_use]
    pub fn batches_per_epoch(mut self, iterations: u64) -> Self {
        self.iterations = Some(iterations);
        self
    }

    /// Returns the number of samples.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Returns the position.
    pub fn place(&self) -> SamplerCursor {
        self.place
    }

    /// Returns the remaining iterations of the epoch.
    pub fn remaining(&self) -> u64 {
        match self.iterations {
            Some(iterations) if self.batches_from(0) > 0 => iterations.saturating_sub(self.place.iteration),
            _ => self.batches_from(self.place.cursor),
        }
    }

    /// Moves to a position.
    pub fn seek(&mut self, place: SamplerCursor) {
        let SamplerCursor { mut pass, mut cursor, iteration } = place;
        if self.begins_again(cursor) {
            (pass, cursor) = (pass + 1, 0);
        }
        if self.ordered != pass && self.seed.is_some() {
            self.order = permutation(self.samples, self.seed, pass);
        }
        self.ordered = pass;
        self.place = SamplerCursor { pass, cursor: cursor.min(self.samples), iteration };
    }

    /// Consumes the batch.
    pub fn advance(&mut self) {
        let SamplerCursor { pass, cursor, iteration } = self.place;
        self.seek(SamplerCursor { pass, cursor: cursor + self.global_batch, iteration: iteration + 1 });
    }

    /// Moves to the start of the next epoch.
    pub fn next_epoch(&mut self) {
        let SamplerCursor { pass, cursor, .. } = self.place;
        match self.iterations {
            Some(_) => self.seek(SamplerCursor { pass, cursor, iteration: 0 }),
            None => self.seek(SamplerCursor { pass: pass + 1, cursor: 0, iteration: 0 }),
        }
    }

    /// Returns the samples of a rank in the batch at the cursor, and their share of it. A rank
    /// without a share gets one sample that does not count.
    pub fn batch(&self, rank: u64, world_size: u64) -> (Vec<i64>, BatchShare) {
        self.micro_batch(0, 1, rank, world_size)
    }

    /// Returns the number of micro_batches of the batch at the cursor: at most `most`, each with at least
    /// one sample.
    pub(crate) fn micro_batches(&self, most: u64) -> u64 {
        most.min(self.global_batch.min(self.samples - self.place.cursor)).max(1)
    }

    /// Like [`Sampler::batch`], for one micro_batch of the batch. The micro_batches are as equal as possible.
    pub(crate) fn micro_batch(
        &self,
        micro_batch: u64,
        most: u64,
        rank: u64,
        world_size: u64,
    ) -> (Vec<i64>, BatchShare) {
        let batch = self.global_batch.min(self.samples - self.place.cursor);
        let (of_part, micro_batch) = share_of(batch, micro_batch, self.micro_batches(most));
        let (cursor, total) = (self.place.cursor + of_part.start, micro_batch.here);
        let (range, share) = share_of(total, rank, world_size);
        let indices = range
            .filter_map(|at| self.order.get((cursor + at) as usize))
            .map(|&index| i64::from(index))
            .collect();
        (indices, share)
    }

    /// Returns the number of samples of all ranks in the next iterations.
    pub(crate) fn samples_in(&self, iterations: u64) -> u64 {
        let mut cursor = self.place.cursor;
        let batch = |_| {
            cursor = if self.begins_again(cursor) { 0 } else { cursor.min(self.samples) };
            let batch = self.global_batch.min(self.samples - cursor);
            cursor += self.global_batch;
            batch
        };
        (0..iterations).map(batch).sum()
    }

    /// Whether the next pass begins at `cursor`. If passes continue across epochs, no position
    /// exists behind the last batch.
    fn begins_again(&self, cursor: u64) -> bool {
        self.iterations.is_some() && self.batches_from(cursor) == 0 && self.batches_from(0) > 0
    }

    /// Returns the number of batches of a pass that start at `cursor` or later.
    fn batches_from(&self, cursor: u64) -> u64 {
        let left = self.samples.saturating_sub(cursor);
        if self.drop_last { left / self.global_batch } else { left.div_ceil(self.global_batch) }
    }
}

/// Returns the range of a rank's samples within a global batch: micro_batches as equal as possible, in
/// order of rank. A rank without a share gets the first sample, which does not count there.
pub(super) fn share_of(total: u64, rank: u64, world_size: u64) -> (std::ops::Range<u64>, BatchShare) {
    let (each, extra) = (total / world_size, total % world_size);
    let here = each + u64::from(rank < extra);
    let start = rank * each + rank.min(extra);
    let range = if here == 0 { 0..1 } else { start..start + here };
    (range, BatchShare { here, total })
}

/// Shuffles by a ChaCha8 stream keyed by the seed and the pass, so that the order is the same on
/// every machine.
fn permutation(samples: u64, seed: Option<u64>, pass: u64) -> Arc<[u32]> {
    let mut order: Vec<u32> = (0..samples as u32).collect();
    let Some(seed) = seed else { return order.into() };
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&pass.to_le_bytes());
    shuffle(&mut order, &mut ChaCha8Rng::from_seed(key));
    order.into()
}

/// Shuffles with the Fisher–Yates algorithm.
pub(super) fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn epoch_of(sampler: &mut Sampler, world_size: u64) -> Vec<i64> {
        let mut seen = Vec::new();
        while sampler.remaining() > 0 {
            let mut total = 0;
            for rank in 0..world_size {
                let (indices, share) = sampler.batch(rank, world_size);
                assert_eq!(indices.len() as u64, share.here.max(1));
                seen.extend(&indices[..share.here as usize]);
                total += share.here;
            }
            assert_eq!(total, sampler.batch(0, world_size).1.total);
            sampler.advance();
        }
        seen
    }

    proptest! {
        #[test]
        fn every_sample_is_seen_once_in_an_epoch_in_the_same_order_for_any_world_size(
            samples in 1_u64..200, batch in 1_u64..17, world_size in 1_u64..9, seed: u64,
        ) {
            let global = batch * world_size;
            let seen = epoch_of(&mut Sampler::new(samples, global, Some(seed), false), world_size);
            let alone = epoch_of(&mut Sampler::new(samples, global, Some(seed), false), 1);
            prop_assert_eq!(&seen, &alone);
            let mut sorted = seen;
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..samples as i64).collect::<Vec<_>>());
        }

        #[test]
        fn a_resumed_sampler_goes_on_where_it_was(samples in 1_u64..200, stop in 0_u64..50, seed: u64) {
            let mut first = Sampler::new(samples, 8, Some(seed), false);
            first.next_epoch();
            for _ in 0..stop.min(first.remaining()) {
                first.advance();
            }
            let mut second = Sampler::new(samples, 8, Some(seed), false);
            second.seek(first.place());
            prop_assert_eq!(epoch_of(&mut first, 2), epoch_of(&mut second, 2));
        }

        #[test]
        fn a_batch_is_shared_in_equal_parts_without_gaps(total in 1_u64..100, world_size in 1_u64..12) {
            let mut next = 0;
            for rank in 0..world_size {
                let (range, share) = share_of(total, rank, world_size);
                prop_assert_eq!(share.total, total);
                prop_assert!(share.here == total / world_size || share.here == total / world_size + 1);
                if share.here == 0 {
                    prop_assert_eq!(range, 0..1);
                } else {
                    prop_assert_eq!(range, next..next + share.here);
                    next += share.here;
                }
            }
            prop_assert_eq!(next, total);
        }

        #[test]
        fn parts_of_a_batch_are_the_batch_in_its_order(
            samples in 1_u64..100, global in 1_u64..40, most in 1_u64..7, world_size in 1_u64..5, seed: u64,
        ) {
            let mut sampler = Sampler::new(samples, global, Some(seed), false);
            while sampler.remaining() > 0 {
                let (whole, share) = sampler.batch(0, 1);
                let mut seen: Vec<i64> = Vec::new();
                let mut total = 0;
                for micro_batch in 0..sampler.micro_batches(most) {
                    for rank in 0..world_size {
                        let (indices, share) = sampler.micro_batch(micro_batch, most, rank, world_size);
                        prop_assert!(share.total > 0);
                        seen.extend(&indices[..share.here as usize]);
                        total += share.here;
                    }
                }
                prop_assert_eq!(seen, whole);
                prop_assert_eq!(total, share.total);
                sampler.advance();
            }
        }

        #[test]
        fn iterations_only_move_the_ends_of_epochs(
            samples in 1_u64..100, global in 1_u64..40, iterations in 1_u64..20, drop_last: bool, seed: u64,
        ) {
            let new = || Sampler::new(samples, global, Some(seed), drop_last);
            prop_assume!(new().remaining() > 0);
            let mut passes = new();
            let mut epochs = new().batches_per_epoch(iterations);
            for step in 0..60 {
                if passes.remaining() == 0 {
                    passes.next_epoch();
                }
                prop_assert_eq!(epochs.remaining(), iterations - step % iterations);
                prop_assert_eq!(epochs.batch(0, 1), passes.batch(0, 1));
                passes.advance();
                epochs.advance();
                let mut resumed = new().batches_per_epoch(iterations);
                resumed.seek(epochs.place());
                prop_assert_eq!(resumed.batch(0, 2), epochs.batch(0, 2));
                if epochs.remaining() == 0 {
                    epochs.next_epoch();
                }
            }
        }
    }

    #[test]
    fn epochs_differ_and_drop_last_drops() {
        let mut sampler = Sampler::new(100, 30, Some(1), true);
        assert_eq!(sampler.remaining(), 3);
        let first = epoch_of(&mut sampler, 2);
        sampler.next_epoch();
        assert_eq!(first.len(), 90);
        assert_ne!(first, epoch_of(&mut sampler, 2));
    }
}
