//! What outlives a coordinator.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::restarts::Restarts;

/// The failure that was judged last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Judged {
    /// The round that it happened in.
    pub(super) round: u64,
    /// What agents were told.
    pub(super) said: String,
}

/// What the next coordinator of a job needs in order to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The coordinator's clock, from the start of the job.
    pub(super) now: Duration,
    /// The number of the round that comes next.
    pub(super) next_round: u64,
    /// It does not start before.
    pub(super) not_before: Duration,
    /// Whether a node is missed because it was preempted.
    pub(super) preempted: bool,
    pub(super) restarts: Restarts,
    pub(super) judged: Option<Judged>,
    pub(super) run_stamp: String,
    /// Whether a node has finished the round that runs.
    pub(super) finished: bool,
    /// How the job ended.
    pub(super) closed: Option<Ending>,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ending {
    pub(super) success: bool,
    pub(super) reason: String,
    /// Why there was no restart, where there might have been one.
    pub(super) no_restart: Option<String>,
    /// Whether it is to be started again.
    pub(super) preempted: bool,
}

impl Record {
    /// The coordinator's clock, from the start of the job.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Whether the job is over.
    pub fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Whether there is nothing in this one that is not in the other but the time.
    pub fn is_like(&self, other: &Self) -> bool {
        // It is asked at every message.
        let Self { now: _, next_round, not_before, preempted, restarts, judged, run_stamp, finished, closed } =
            self;
        (*next_round, *not_before, *preempted, *finished)
            == (other.next_round, other.not_before, other.preempted, other.finished)
            && (restarts, judged, run_stamp, closed)
                == (&other.restarts, &other.judged, &other.run_stamp, &other.closed)
    }
}
