//! What the machine is told, and what it wants done.

use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::rendezvous::{Round, ToAgent, ToCoordinator};

use super::exit::Exit;

pub(super) const SIGINT: i32 = 2;
pub(super) const SIGQUIT: i32 = 3;
pub(super) const SIGTERM: i32 = 15;

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Coordinator(ToAgent),
    CoordinatorLost(String),
    /// The coordinator was found again, or another one was.
    Met,
    /// None was found.
    NotMet(String),
    /// A rank ended. `failed_at` is when it failed by its own account.
    Exited {
        local_rank: u32,
        exit: Exit,
        failed_at: Option<Duration>,
    },
    /// A rank will keep its state when its round ends, and take part in the next one.
    Stays(u32),
    /// One that stays has left this round.
    Parked {
        local_rank: u32,
        round: u64,
    },
    /// The first training step in a round is applied.
    FirstStep {
        round: u64,
    },
    /// A rank's process group does not work any more, though its round is not known to be over.
    RoundLost {
        local_rank: u32,
        round: u64,
        reason: String,
    },
    /// The job stands still, and this rank is behind.
    Hung {
        local_rank: u32,
        reason: String,
    },
    /// The user wants the job to end.
    Stop {
        signal: i32,
        /// After a checkpoint, where the ranks know how.
        save: bool,
        /// Whether all ranks of this node will end at the same step boundary, which they agree on with those of other nodes.
        together: bool,
        /// What says that this node's machine, or the job's time, will be taken away, where that is why.
        notice: Option<String>,
    },
    /// A rank got SIGTERM and asks for what that means.
    RankTerminated {
        local_rank: u32,
        /// As for [`Event::Stop`].
        together: bool,
    },
    /// The user wants the job to end at once.
    Abort(i32),
    /// The user has a signal for the ranks.
    Forward(i32),
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Send(ToCoordinator),
    /// Look for the coordinator again.
    Meet,
    /// Start the ranks of this node, and tell those that live of the round.
    Spawn(Round),
    /// Ask all ranks that live to end: over the link those that know it, by a signal the others.
    Ask(Ask),
    /// Send SIGTERM to those that have not had it, and still have to end.
    Terminate,
    /// Send SIGTERM to this rank.
    TerminateRank(u32),
    /// End them now.
    Kill,
    /// End those now that do not wait for the next round.
    KillUnparked,
    /// End without waiting for what was killed.
    GiveUp,
    /// Pass a signal on to the ranks that handle it.
    Forward(i32),
    /// Tell the user how the ranks ended, the one that failed first at the front.
    Report(Vec<End>),
    /// Tell the user a decision and its reason.
    Say(String),
    Exit(ExitCode),
}

/// Why ranks are asked to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ask {
    /// The user wants it, by this signal, and with a checkpoint or without.
    Stop(i32, bool),
    /// The round is over: those that stay leave it, the others end.
    Broken(String),
    /// The round ends once the ranks have agreed on a step for that.
    Regroup,
    /// The job is over.
    End(String),
}

impl Ask {
    pub(crate) fn signal(&self) -> i32 {
        match self {
            Self::Stop(signal, _) => *signal,
            Self::Broken(_) | Self::Regroup | Self::End(_) => SIGTERM,
        }
    }
}

/// How a rank of the attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) local_rank: u32,
    pub(crate) exit: Exit,
    /// Whether it had been asked to.
    pub(crate) asked: bool,
    /// When it failed, or ended.
    pub(crate) at: Duration,
}

/// What does not change over the life of an agent.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) local_world_size: u32,
    pub(crate) may_restart: bool,
    pub(crate) shutdown_timeout: Duration,
    /// Exit codes that no restart can help.
    pub(crate) fatal_exit_codes: BTreeSet<u8>,
    /// How long the coordinator is looked for when it is lost: it may be another agent then, or be reached again. `None` if it is not.
    pub(crate) looks_again: Option<Duration>,
    /// What the agent of a job that was preempted ends with.
    pub(crate) requeue_exit_code: u8,
}
