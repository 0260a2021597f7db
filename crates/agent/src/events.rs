//! Inputs (events) and outputs (actions) of the agent's state machine.

use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::rendezvous::{Round, ToAgent, ToCoordinator};

use super::exit::Exit;

pub(crate) const SIGINT: i32 = 2;
pub(crate) const SIGQUIT: i32 = 3;
pub(crate) const SIGTERM: i32 = 15;

/// An input of the agent.
#[derive(Debug, Clone)]
pub enum Event {
    /// A message of the coordinator.
    Coordinator(ToAgent),
    /// The connection to the coordinator is lost, for this reason.
    CoordinatorLost(String),
    /// The agent has a connection again, to the same coordinator or to another one.
    Reconnected,
    /// The search for a coordinator ended without one.
    ReconnectFailed(String),
    /// A rank ended.
    Exited {
        /// The rank on this node.
        local_rank: u32,
        /// How it ended.
        exit: Exit,
        /// Time at which it failed, according to its own report.
        failed_at: Option<Duration>,
    },
    /// A rank will keep its process when its round ends, and take part in the next round.
    Survivor(u32),
    /// A survivor has left this round and waits for the next one.
    Parked {
        /// The rank on this node.
        local_rank: u32,
        /// Number of the round that it has left.
        round: u64,
    },
    /// The first training step of a round is applied.
    FirstStep {
        /// Number of the round.
        round: u64,
    },
    /// A rank's process group no longer works, although its round is not known to be over.
    RoundLost {
        /// The rank on this node.
        local_rank: u32,
        /// Number of its round.
        round: u64,
        /// The failure.
        reason: String,
    },
    /// This rank hangs, or is the one that a hanging job waits for.
    Hung {
        /// The rank on this node.
        local_rank: u32,
        /// Why it counts as hanging.
        reason: String,
    },
    /// The user, a scheduler or a notice asks for the end of the job.
    Stop {
        /// The signal that asked, or that stands for the notice.
        signal: i32,
        /// Whether ranks that are able to save a checkpoint do so first.
        save: bool,
        /// Whether all ranks of this node end at the same step boundary, agreed on with the ranks
        /// of other nodes.
        together: bool,
        /// Text of the notice that this node's machine, or the job's time, will be taken away.
        /// `None` if the stop has another reason.
        notice: Option<String>,
    },
    /// A rank received SIGTERM and asks the agent what to do.
    RankTerminated {
        /// The rank on this node.
        local_rank: u32,
        /// Like `together` of [`Event::Stop`].
        together: bool,
    },
    /// The user wants the job to end at once.
    Abort(i32),
    /// A signal to pass on to the ranks.
    Forward(i32),
    /// The deadline of the agent has passed.
    Tick,
}

/// An output of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a message to the coordinator.
    Send(ToCoordinator),
    /// Look for the coordinator again.
    Reconnect,
    /// Start the missing ranks of this node, and notify its survivors of the round.
    Spawn(Round),
    /// Ask all live ranks to end: over the link if they know it, by a signal otherwise.
    RequestStop(StopRequest),
    /// Send SIGTERM to the ranks that still have to end and have not received it yet.
    Terminate,
    /// Send SIGTERM to this rank.
    TerminateRank(u32),
    /// Kill all ranks now.
    Kill,
    /// Kill the ranks now that do not wait for the next round.
    KillUnparked,
    /// Exit without waiting for the killed ranks.
    GiveUp,
    /// Pass a signal on to the ranks that handle it.
    Forward(i32),
    /// Print how the ranks ended, the first failure at the front.
    Report(Vec<End>),
    /// Print a decision and its reason.
    Notify(String),
    /// Exit with this code.
    Exit(ExitCode),
}

/// Why ranks are asked to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopRequest {
    /// The user wants it, by this signal. The flag says whether ranks save a checkpoint first.
    Stop(i32, bool),
    /// The round is over: survivors leave it, other ranks exit.
    Broken(String),
    /// The round ends at a step that the ranks agree on.
    Regroup,
    /// The job is over.
    End(String),
}

impl StopRequest {
    /// Returns the signal for ranks that do not know the link.
    pub fn signal(&self) -> i32 {
        match self {
            Self::Stop(signal, _) => *signal,
            Self::Broken(_) | Self::Regroup | Self::End(_) => SIGTERM,
        }
    }
}

/// How a rank of the attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The rank on this node.
    pub local_rank: u32,
    /// Its exit.
    pub exit: Exit,
    /// Whether the rank had been asked to end.
    pub asked: bool,
    /// Time of its failure or end. Zero for a hang, `Duration::MAX` if the rank ended only because
    /// it was asked to.
    pub at: Duration,
}

/// Settings that stay the same over the life of an agent.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// Number of ranks of this node.
    pub local_world_size: u32,
    /// Whether `--max-restarts` is above 0.
    pub may_restart: bool,
    /// Time after which ranks that were asked to end are killed.
    pub shutdown_timeout: Duration,
    /// Exit codes after which no restart can help.
    pub fatal_exit_codes: BTreeSet<u8>,
    /// Time for which a lost coordinator is looked for: it may be on another agent then, or be
    /// reachable again. `None` if the agent does not look.
    pub reconnect_timeout: Option<Duration>,
    /// Exit code of the agent of a preempted job.
    pub requeue_exit_code: u8,
}
