//! What is known of the round, and what is wanted of the rank.

use std::path::PathBuf;
use std::sync::Arc;

use ice_c10d::{Connections, ProcessGroup, Store};
use ice_proto::env::RankEnv;
use ice_proto::link::Doing;

use crate::agree::Boundaries;

/// Ends what somebody may wait for.
pub(super) type Cut = Arc<dyn Fn() + Send + Sync>;

/// What the agent wants, and what the rank is about.
#[derive(Default)]
pub(super) struct State {
    /// The round that the rank is in, or was in last.
    pub(super) round: Option<u64>,
    /// The last round that is known to be over.
    pub(super) over: Option<u64>,
    /// The next one.
    pub(super) given: Option<RankEnv>,
    /// No more rounds will come.
    pub(super) ended: bool,
    /// Whether the rank stops at this boundary.
    pub(super) stopping: bool,
    /// Whether the rank's work has seen that.
    pub(super) noticed: bool,
    /// Of the round, as far as they are there.
    pub(super) connections: Option<Connections>,
    /// What else of the round is to be cut.
    pub(super) cuts: Vec<Cut>,
    pub(super) group: Option<ProcessGroup>,
    pub(super) store: Option<Store>,
    /// Where the last words go.
    pub(super) error_file: Option<PathBuf>,
    /// Writes under way that are not to be cut off.
    pub(super) holds: usize,
    pub(super) boundaries: Boundaries,
    /// Where the agent was told that this rank is paused: what it was about before.
    pub(super) rests: Option<Doing>,
    /// Rank of this node.
    pub(super) node: u32,
}

/// Why a rank is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It has come to the step boundary at which the ranks of its node end.
    Requested,
    /// The round is over: another rank is gone, and no collective will succeed any more.
    Broken,
}

/// What is to be done at a step boundary, by all ranks of the job at the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Nothing: go on to the next step.
    GoOn,
    /// Save a checkpoint, and ask again.
    Save,
    /// Save a checkpoint where that is said, and end if this rank is one of those that are to.
    Stop {
        /// Whether this rank ends; others ask again, and will find the round broken.
        here: bool,
        /// Whether all ranks save.
        save: bool,
    },
    /// The round ends here, for all ranks: nodes are to come or to go.
    Regroup,
    /// The round is over: another rank is gone.
    Broken,
    /// A rank [asked](crate::Worker::ask_to_leave) all ranks to leave a task, or to end the run.
    Leave {
        /// Whether the whole run ends.
        all: bool,
        /// Number of the task, as the rank that asked gave it.
        task: u64,
    },
}

impl State {
    /// Whether the rank is to end, and why.
    pub(super) fn stop(&self) -> Option<Stop> {
        match self.stopping {
            _ if self.ended || (self.over.is_some() && self.over >= self.round) => Some(Stop::Broken),
            true => Some(Stop::Requested),
            false => None,
        }
    }
}
