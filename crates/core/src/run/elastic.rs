//! Effects of a changed number of ranks on batches and learning rates.

use ice_checkpoint::{CHECKPOINTS, candidates};

use super::Run;
use crate::Result;
use crate::collectives::broadcast;

/// How a changed number of ranks affects batches that are given per rank, when nodes join or leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ElasticBatch {
    /// The global batch stays. Fewer ranks process it in several passes and add up the gradients,
    /// so that no rank has more samples at a time than its given batch.
    #[default]
    KeepGlobal,
    /// Each rank's share stays. The global batch changes, and the learning rates follow the rule.
    KeepLocal(LrRule),
}

/// How learning rates follow a global batch that has become `k` times as large.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LrRule {
    /// Learning rates stay.
    #[default]
    Keep,
    /// Learning rates are multiplied by `k`, as for SGD (Goyal et al., 2017).
    Linear,
    /// Learning rates are multiplied by the square root of `k`, as for Adam (Malladi et al., 2022).
    Sqrt,
}

impl ElasticBatch {
    /// Returns the factor from a batch per rank to the global batch, and the factor of the learning
    /// rates, on `ranks` ranks of a run that began with `base`.
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
    /// Prints the effect on batches if the number of ranks has changed since the previous round. In
    /// a new process, compares with the number of ranks at the start of the run.
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

    /// Returns the number of ranks at the start of the run, from its newest checkpoint. Rank 0
    /// reads it.
    pub(super) fn saved_base(&self) -> Result<Option<usize>> {
        let newest = || candidates(&self.folder.join(CHECKPOINTS)).pop()?.manifest.ok()?.base_ranks;
        if self.worker.world_size() == 1 {
            return Ok(newest());
        }
        broadcast(self.is_main().then(newest), 0, &self.worker)
    }
}
