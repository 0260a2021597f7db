//! The agent's clock. Time that the process was stopped for, or the machine asleep, does not count.

use std::time::{Duration, Instant};

/// A wake-up that is later than this was not the scheduler's doing.
const LATE: Duration = Duration::from_secs(1);

pub(super) struct Clock {
    start: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Time since the start.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn instant(&self, at: Duration) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.start + at)
    }

    /// To be told when a deadline has passed: if the process slept through it, its sleep is taken out.
    pub(super) fn woke(&mut self, deadline: Duration) {
        let late = self.now().saturating_sub(deadline);
        if late > LATE {
            self.start += late;
        }
    }

    /// Takes out the time that this takes.
    pub(super) fn pause(&mut self, wait: impl FnOnce()) {
        let before = Instant::now();
        wait();
        self.start += before.elapsed();
    }
}
