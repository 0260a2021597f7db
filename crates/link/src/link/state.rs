//! State of the round, and requests to the rank.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

use ice_proto::env::RankEnv;
use ice_proto::link::{BoundaryRequest, Doing};

use crate::Store;
use crate::consensus::{self, Boundaries};
use crate::process::Connections;

/// Aborts a wait.
pub(super) type CancelHook = Arc<dyn Fn() + Send + Sync>;

/// The process group of a round. The link drops it, outside of its lock, when the rank leaves the
/// round.
pub trait Group: Send + Sync {
    /// Aborts collectives in progress. Called from another thread than the rank's own.
    fn abort(&self);
}

/// The store of a round, as far as requests of the agent need it.
pub(super) trait Requests: Send + Sync {
    /// Publishes a request to all ranks, over a connection of its own: the rank's own thread may
    /// occupy the other one during a wait.
    fn publish(&self, request: BoundaryRequest) -> Result<(), Box<dyn Error>>;
}

impl<S: Store> Requests for S {
    fn publish(&self, request: BoundaryRequest) -> Result<(), Box<dyn Error>> {
        Ok(consensus::publish(&self.reconnect()?, request)?)
    }
}

/// The next round of a rank that stays.
#[derive(Debug)]
pub struct NextRound {
    /// The contract of the round.
    pub env: RankEnv,
    /// All variables of a rank that would be started now.
    pub variables: BTreeMap<String, String>,
}

/// State shared by the threads of the link and of the rank, behind one mutex.
#[derive(Default)]
pub(super) struct State {
    /// The round that the rank is in, or was in last.
    pub(super) round: Option<u64>,
    /// The last round known to be over.
    pub(super) over: Option<u64>,
    pub(super) next_round: Option<NextRound>,
    /// Whether no further round will start.
    pub(super) ended: bool,
    /// Whether the rank stops at this boundary.
    pub(super) stopping: bool,
    /// Whether the agent alone ends a rank that does not notice the end of its round.
    pub(super) agent_ends_stuck: bool,
    /// Whether the rank's own thread has noticed that it is to stop.
    pub(super) noticed: bool,
    /// Connections of the round, as far as they are open.
    pub(super) connections: Option<Connections>,
    /// Further waits of the round to abort at its end.
    pub(super) cancel_hooks: Vec<CancelHook>,
    pub(super) group: Option<Arc<dyn Group>>,
    pub(super) store: Option<Arc<dyn Requests>>,
    /// Error file of the round.
    pub(super) error_file: Option<PathBuf>,
    /// Number of [`super::ExitGuard`]s: running writes that must be finished.
    pub(super) exit_guards: usize,
    pub(super) boundaries: Boundaries,
    /// Work before the pause that was reported to the agent; `None` if the rank is not paused.
    pub(super) work_before_pause: Option<Doing>,
    /// Node rank of this node.
    pub(super) node: u32,
}

/// Why a rank is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The rank has reached the step boundary at which the ranks of its node end.
    Requested,
    /// The round is over: another rank is gone, so no collective will succeed.
    Broken,
}

/// The action at a step boundary, equal on all ranks of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Continue with the next step.
    Continue,
    /// Save a checkpoint, then ask again.
    Save,
    /// Save a checkpoint if `save` is set, then end if `here` is set.
    Stop {
        /// Whether this rank ends. Other ranks ask again, and find the round broken.
        here: bool,
        /// Whether all ranks save.
        save: bool,
    },
    /// All ranks leave the round, since nodes are to join or leave.
    Regroup,
    /// The round is over: another rank is gone.
    Broken,
    /// A rank [asked](crate::publish) all ranks to leave a task, or to end the run.
    Leave {
        /// Whether the whole run ends.
        all: bool,
        /// Number of the task, from the rank that asked.
        task: u64,
    },
}

impl State {
    /// Returns why the rank is to stop, if it is.
    pub(super) fn stop(&self) -> Option<Stop> {
        match self.stopping {
            _ if self.ended || (self.over.is_some() && self.over >= self.round) => Some(Stop::Broken),
            true => Some(Stop::Requested),
            false => None,
        }
    }
}
