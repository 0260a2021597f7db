//! Detection of stragglers, from the time that each rank spends on its own in a step before it
//! waits for the others.

use std::cell::Cell;
use std::time::Duration;

use crate::collectives::gather;
use crate::{Result, Run};

/// A rank is a straggler if it takes this many times as long as the median of the others.
const SLOW: f64 = 1.5;
/// Smaller differences do not matter, in milliseconds per step.
const MATTERS: f64 = 5.0;
/// Number of checks after which a rank that stays slow is named again.
const AGAIN: u32 = 20;

/// Time and steps of this rank since the last check.
#[derive(Default)]
pub(super) struct Pace {
    steps: Cell<u32>,
    own: Cell<Duration>,
    /// The slow rank of the last check, and the number of checks in a row before it that also found
    /// this rank.
    slow: Cell<Option<(usize, u32)>>,
}

impl Run<'_> {
    /// Adds the time that this rank took before it waited for others in a step.
    pub(crate) fn took(&self, own: Duration) {
        self.pace.steps.set(self.pace.steps.get() + 1);
        self.pace.own.set(self.pace.own.get() + own);
    }

    /// Compares the ranks, and names a straggler in a warning. Collective.
    pub(super) fn look_for_stragglers(&self) -> Result<()> {
        let (steps, own) = (self.pace.steps.replace(0), self.pace.own.take());
        let mean = own.as_secs_f64() * 1e3 / f64::from(steps.max(1));
        let all = gather(&[mean], &self.worker)?.concat();
        if !self.is_main() {
            return Ok(());
        }
        let Some((rank, own, others)) = straggler(&all) else {
            self.pace.slow.set(None);
            return Ok(());
        };
        let looks = match self.pace.slow.get() {
            Some((before, looks)) if before == rank => looks + 1,
            _ => 0,
        };
        self.pace.slow.set(Some((rank, looks)));
        if looks.is_multiple_of(AGAIN) {
            tracing::warn!(
                "rank {rank} holds up the others: it takes {own:.1} ms of its own per step, over the last {steps} steps, and the median of \
                 the others is {others:.1} ms"
            );
        }
        Ok(())
    }
}

/// Returns the slowest rank if it is a straggler, with its time and the median of the others.
fn straggler(all: &[f64]) -> Option<(usize, f64, f64)> {
    let (rank, own) = all.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let mut others: Vec<f64> =
        all.iter().copied().enumerate().filter(|(i, _)| *i != rank).map(|(_, t)| t).collect();
    others.sort_by(f64::total_cmp);
    let median = *others.get(others.len() / 2)?;
    (own > SLOW * median && own - median > MATTERS).then_some((rank, own, median))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_straggler_is_far_behind_the_median_of_the_others() {
        assert_eq!(straggler(&[10.0, 11.0, 40.0, 10.0]), Some((2, 40.0, 10.0)));
        assert_eq!(straggler(&[10.0, 40.0]), Some((1, 40.0, 10.0)));
        assert_eq!(straggler(&[100.0, 104.0, 103.0]), None, "not much slower");
        assert_eq!(straggler(&[1.0, 1.0, 4.0]), None, "too little to matter");
        assert_eq!(straggler(&[1.0]), None);
    }
}
