//! The agent's clock. Time during which the process was stopped or the machine asleep does not
//! count.

use std::time::{Duration, Instant};

/// Delay of a wake-up beyond which the process must have been stopped or the machine asleep.
const LATE: Duration = Duration::from_secs(1);

pub(super) struct Clock {
    start: Instant,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Returns the time since the start.
    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn instant(&self, at: Duration) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.start + at)
    }

    /// Records a wake-up for `deadline`. If the wake-up is late because the process did not run,
    /// the delay is taken out of the clock.
    pub(super) fn woke(&mut self, deadline: Duration) {
        let late = self.now().saturating_sub(deadline);
        if late > LATE {
            self.start += late;
        }
    }

    /// Runs `wait` and takes its duration out of the clock.
    pub(super) fn pause(&mut self, wait: impl FnOnce()) {
        let before = Instant::now();
        wait();
        self.start += before.elapsed();
    }
}
