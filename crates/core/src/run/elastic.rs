//! What the number of ranks means for batches and learning rates.

use ice_checkpoint::{CHECKPOINTS, candidates};

use super::Run;
use crate::Result;
use crate::ranks::broadcast;

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
    pub(super) fn on(self, ranks: usize, base: usize) -> (usize, f64) {
        let k = ranks as f64 / base as f64;
        match self {
            Self::KeepGlobal => (base, 1.0),
            Self::KeepLocal(LrRule::Keep) => (ranks, 1.0),
            Self::KeepLocal(LrRule::Linear) => (ranks, k),
            Self::KeepLocal(LrRule::Sqrt) => (ranks, k.sqrt()),
        }
    }
}

impl Run<'_> {
    /// Says what the batches are where there are other ranks than before, or, in a new process, than the run began with.
    pub(super) fn tell_batch(&self, base: usize, lr_factor: f64) {
        let ranks = self.worker.world_size();
        let before = self.progress.ranks.replace(Some(ranks)).unwrap_or(base);
        if !self.is_main() || ranks == before {
            return;
        }
        match self.config.elastic_batch {
            ElasticBatch::KeepGlobal => println!(
                "{ranks} {noun} the batches of the {base} that the run began with: the global batch stays",
                noun = if ranks == 1 { "rank has" } else { "ranks share" }
            ),
            ElasticBatch::KeepLocal(_) => println!(
                "{ranks} {noun} instead of the {base} that the run began with: the global batch of datasets that give one per rank is {:.3} \
                 times what it was, learning rates {lr_factor:.3} times",
                ranks as f64 / base as f64,
                noun = if ranks == 1 { "rank" } else { "ranks" }
            ),
        }
    }

    /// The ranks that the run began with, as its newest checkpoint has it; rank 0 looks.
    pub(super) fn saved_base(&self) -> Result<Option<usize>> {
        let newest = || candidates(&self.folder.join(CHECKPOINTS)).pop()?.manifest.ok()?.base_ranks;
        if self.worker.world_size() == 1 {
            return Ok(newest());
        }
        broadcast(self.is_main().then(newest), 0, &self.worker)
    }
}
