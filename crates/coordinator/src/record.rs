//! The record of a job, from which another coordinator continues it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::restarts::Restarts;

/// The verdict on the last judged failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RoundVerdict {
    /// Round of the failure.
    pub(super) round: u64,
    /// Reason that the agents received.
    pub(super) text: String,
}

/// State of a job between two coordinators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Time of the record, since the start of the job.
    pub(super) now: Duration,
    /// Number of the next round.
    pub(super) next_round: u64,
    /// Earliest start of the next round.
    pub(super) not_before: Duration,
    /// Whether a node of the last round was preempted.
    pub(super) preempted: bool,
    pub(super) restarts: Restarts,
    pub(super) verdict: Option<RoundVerdict>,
    pub(super) run_stamp: String,
    /// Whether a node has finished the running round.
    pub(super) finished: bool,
    /// Outcome of the job; `None` while it is open.
    pub(super) closed: Option<Outcome>,
}

/// The outcome of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) success: bool,
    pub(super) reason: String,
    /// Why there was no restart; `None` if none was allowed in the first place.
    pub(super) no_restart: Option<String>,
    /// Whether the job ended by preemption and is to be started again.
    pub(super) preempted: bool,
}

impl Record {
    /// Returns the time of the record, since the start of the job.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Returns whether the job is over.
    pub fn is_closed(&self) -> bool {
        self.closed.is_some()
    }

    /// Returns whether the two records are equal apart from their time.
    pub fn differs_only_in_time(&self, other: &Self) -> bool {
        // Destructured, so that a new field cannot be forgotten here. Compares without cloning,
        // since the coordinator asks at every message.
        let Self {
            now: _,
            next_round,
            not_before,
            preempted,
            restarts,
            verdict,
            run_stamp,
            finished,
            closed,
        } = self;
        (*next_round, *not_before, *preempted, *finished)
            == (other.next_round, other.not_before, other.preempted, other.finished)
            && (restarts, verdict, run_stamp, closed)
                == (&other.restarts, &other.verdict, &other.run_stamp, &other.closed)
    }
}
