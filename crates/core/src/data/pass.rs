use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::{Error, Result};

/// One pass over a dataset, as seen by the code that makes batches.
///
/// Random numbers of a transform must come from here, and not from libtorch's generator, which
/// belongs to the steps. They are a function of the seed of the run, the pass and the sample. They
/// are therefore the same for any number of worker threads and ranks, and after a resume.
///
/// ```
/// use ice_core::data::Pass;
/// let pass = Pass::new(7, 0);
/// assert_eq!(pass.rng(3).next_u64(), Pass::new(7, 0).rng(3).next_u64());
/// assert_ne!(pass.rng(3).next_u64(), pass.rng(4).next_u64());
/// ```
#[derive(Debug, Clone)]
pub struct Pass {
    seed: u64,
    number: u64,
    stop: Option<Arc<AtomicBool>>,
}

impl Pass {
    /// Creates the pass with this number, from 0, of a run with this seed.
    pub fn new(seed: u64, number: u64) -> Self {
        Self { seed, number, stop: None }
    }

    /// Returns the number of the pass, from 0. Without `iterations`, this is the epoch.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns the random numbers of a sample in this pass.
    pub fn rng(&self, sample: u64) -> SampleRng {
        SampleRng(generator(self.seed, self.number, sample, *b"sample"))
    }

    /// Fails if the batch is no longer needed, so that its making can end early.
    ///
    /// # Errors
    /// [`Error::Stopped`] if the node is being dropped.
    pub fn check(&self) -> Result<()> {
        match &self.stop {
            Some(stop) if stop.load(Ordering::Relaxed) => Err(Error::Stopped),
            _ => Ok(()),
        }
    }

    pub(super) fn until(self, stop: &Arc<AtomicBool>) -> Self {
        Self { stop: Some(Arc::clone(stop)), ..self }
    }
}

/// Random numbers for the transforms of one sample, from their own ChaCha8 stream.
#[derive(Debug, Clone)]
pub struct SampleRng(ChaCha8Rng);

impl SampleRng {
    /// Creates numbers that depend only on the index of a sample.
    pub(super) fn of_index(index: u64) -> Self {
        Self(generator(0, 0, index, *b"cached"))
    }

    /// Returns 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Returns a number from 0 to `bound - 1`, or 0 if the bound is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        below(&mut self.0, bound)
    }

    /// Returns a number in the range 0 (included) to 1 (excluded).
    pub fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 * (1.0 / (1_u64 << 53) as f64)
    }

    /// Returns true with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }
}

/// Creates a ChaCha8 stream keyed by the seed, the pass and a third number, the same on every
/// machine. The purpose separates streams with equal numbers.
pub(super) fn generator(seed: u64, pass: u64, third: u64, purpose: [u8; 6]) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&pass.to_le_bytes());
    key[16..24].copy_from_slice(&third.to_le_bytes());
    key[24..30].copy_from_slice(&purpose);
    ChaCha8Rng::from_seed(key)
}

/// Returns the high half of a 128-bit product, which is uniform to within 2^-64 × bound.
pub(super) fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    ((u128::from(rng.next_u64()) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_depend_on_seed_pass_and_sample_and_keep_to_their_ranges() {
        let first = |seed, pass, sample| Pass::new(seed, pass).rng(sample).next_u64();
        let all = [first(1, 2, 3), first(2, 2, 3), first(1, 3, 3), first(1, 2, 4), first(3, 2, 1)];
        for (at, value) in all.iter().enumerate() {
            assert!(!all[..at].contains(value));
        }
        let mut rng = Pass::new(0, 0).rng(0);
        let draws: Vec<u64> = (0..1000).map(|_| rng.below(3)).collect();
        for value in 0..3 {
            assert!(draws.iter().filter(|&&draw| draw == value).count() > 250);
        }
        assert_eq!(rng.below(0), 0);
        assert!((0..1000).map(|_| rng.uniform()).all(|u| (0.0..1.0).contains(&u)));
        assert!(!rng.chance(0.0) && rng.chance(1.0));
    }
}
