use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::Share;

/// The order of a dataset, and how far it was read: one permutation per epoch and one cursor of consumed samples, the
/// same on all ranks.
///
/// A change of the number of ranks moves nothing twice and skips nothing, since ranks take their share of the next global
/// batch from the cursor.
#[derive(Debug, Clone)]
pub struct Sampler {
    samples: u64,
    global_batch: u64,
    seed: Option<u64>,
    drop_last: bool,
    epoch: u64,
    cursor: u64,
    order: Vec<u32>,
}

impl Sampler {
    /// The order of `samples` samples, of which an iteration takes `global_batch` over all ranks; shuffled where there is
    /// a seed.
    pub fn new(samples: u64, global_batch: u64, seed: Option<u64>, drop_last: bool) -> Self {
        let mut sampler =
            Self { samples, global_batch, seed, drop_last, epoch: 0, cursor: 0, order: Vec::new() };
        sampler.seek(0, 0);
        sampler
    }

    /// How many samples there are.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The epoch that the cursor is in, from 0.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Samples of the epoch that were consumed, by all ranks together.
    pub fn cursor(&self) -> u64 {
        self.cursor
    }

    /// Iterations left in the epoch.
    pub fn remaining(&self) -> u64 {
        let left = self.samples - self.cursor;
        if self.drop_last { left / self.global_batch } else { left.div_ceil(self.global_batch) }
    }

    /// Goes to a place in an epoch.
    pub fn seek(&mut self, epoch: u64, cursor: u64) {
        if self.order.is_empty() || self.epoch != epoch {
            self.order = permutation(self.samples, self.seed, epoch);
        }
        (self.epoch, self.cursor) = (epoch, cursor.min(self.samples));
    }

    /// Consumes the batch.
    pub fn advance(&mut self) {
        self.cursor = (self.cursor + self.global_batch).min(self.samples);
    }

    /// Goes to the start of the next epoch.
    pub fn next_epoch(&mut self) {
        self.seek(self.epoch + 1, 0);
    }

    /// The samples of a rank in the batch at the cursor, and how the batch is shared. A rank without a share gets one
    /// sample that counts for nothing.
    pub fn batch(&self, rank: u64, world_size: u64) -> (Vec<i64>, Share) {
        let total = self.global_batch.min(self.samples - self.cursor);
        let (each, extra) = (total / world_size, total % world_size);
        let here = each + u64::from(rank < extra);
        let start = self.cursor + rank * each + rank.min(extra);
        let range = match here {
            0 => self.cursor..self.cursor + 1,
            _ => start..start + here,
        };
        let indices =
            range.filter_map(|at| self.order.get(at as usize)).map(|&index| i64::from(index)).collect();
        (indices, Share { here, total })
    }
}

/// Fisher–Yates over a ChaCha8 stream keyed by the seed and the epoch, so that the order is the same on every machine.
fn permutation(samples: u64, seed: Option<u64>, epoch: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..samples as u32).collect();
    let Some(seed) = seed else { return order };
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    for i in (1..order.len()).rev() {
        // The high half of a 128-bit product is uniform to within 2^-64 × len.
        let j = (u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64;
        order.swap(i, j as usize);
    }
    order
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
            second.seek(first.epoch(), first.cursor());
            prop_assert_eq!(epoch_of(&mut first, 2), epoch_of(&mut second, 2));
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
