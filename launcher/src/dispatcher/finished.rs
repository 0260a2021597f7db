//! Ranks that have exited with code 0 long before the others.

use std::collections::BTreeMap;
use std::time::Duration;

/// Time after which the early end of a rank is printed.
const LONG: Duration = Duration::from_secs(60);

/// The ranks of this node that have finished in the round.
#[derive(Default)]
pub(super) struct Finished {
    /// Time of their ends, by rank.
    ended: BTreeMap<u32, Duration>,
    is_said: bool,
}

impl Finished {
    /// Records a rank that exited with code 0.
    pub(super) fn add(&mut self, rank: u32, now: Duration) {
        self.ended.insert(rank, now);
    }

    /// Returns the time at which a line is due.
    pub(super) fn deadline(&self) -> Option<Duration> {
        let first = self.ended.values().min().filter(|_| !self.is_said);
        first.map(|first| *first + LONG)
    }

    /// Returns the line if it is due and other ranks still run. There is one line per round.
    pub(super) fn line(&mut self, now: Duration, running: &[u32]) -> Option<String> {
        self.deadline().filter(|due| *due <= now)?;
        self.is_said = true;
        if running.is_empty() {
            return None;
        }
        let list = |ranks: &[u32]| {
            let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
            let ranks: Vec<String> = ranks.iter().map(ToString::to_string).collect();
            format!("{noun} {}", ranks.join(", "))
        };
        let ended: Vec<u32> = self.ended.keys().copied().collect();
        let (ended, runs) = (list(&ended), if running.len() == 1 { "runs" } else { "run" });
        let first = if self.ended.len() == 1 { "" } else { "the first " };
        let seconds = LONG.as_secs();
        Some(format!(
            "{ended} ended with exit code 0, {first}{seconds} s ago, and {} still {runs}",
            list(running)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn ranks_that_finish_much_earlier_are_named_once() {
        let mut finished = Finished::default();
        assert_eq!(finished.deadline(), None);
        finished.add(3, s(20));
        finished.add(1, s(10));
        assert_eq!(finished.deadline(), Some(s(70)));
        assert_eq!(finished.line(s(69), &[0]), None);
        let line = finished.line(s(70), &[0, 2]).unwrap();
        assert_eq!(line, "ranks 1, 3 ended with exit code 0, the first 60 s ago, and ranks 0, 2 still run");
        assert_eq!((finished.line(s(99), &[0]), finished.deadline()), (None, None));
        finished = Finished::default();
        finished.add(1, s(100));
        let line = finished.line(s(160), &[0]).unwrap();
        assert_eq!(line, "rank 1 ended with exit code 0, 60 s ago, and rank 0 still runs");
    }
}
