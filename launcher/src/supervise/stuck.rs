//! Processes that were killed and have not ended.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::proc::Process;

/// Time within which a killed process ends, unless something is wrong.
const FIRST: Duration = Duration::from_secs(1);
/// Longest time between two messages.
const LONGEST: Duration = Duration::from_secs(60);

/// Times of messages about processes that do not end.
pub(crate) struct Stuck {
    next: Instant,
    pause: Duration,
}

impl Stuck {
    /// Starts to count now.
    pub(crate) fn new() -> Self {
        Self { next: Instant::now() + FIRST, pause: FIRST }
    }

    /// Waits until a message is due. Cancel-safe.
    pub(crate) async fn due(&mut self) {
        sleep_until(self.next).await;
        self.pause = (self.pause * 2).min(LONGEST);
        self.next = Instant::now() + self.pause;
    }
}

/// Names killed processes that have not ended, and the reasons.
pub(crate) fn obstacles(processes: &[Process]) -> String {
    const NAMED: usize = 5;
    let name = |process: &Process| format!("process {process} is {}", process.obstacle());
    let named: Vec<_> = processes.iter().take(NAMED).map(name).collect();
    let more = processes.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    format!("killed, but not ended: {}{more}", named.join(", "))
}
