//! Messages between the agents of a job and its coordinator.
//!
//! The coordinator runs in the agent that holds the endpoint, on the same port as the store. An
//! agent sends [`Hello`], and then [`ToCoordinator::Join`] once per round. The coordinator answers
//! with [`ToAgent::RoundStarted`] once there are enough nodes, or with [`ToAgent::Waiting`]. Any
//! loss, failure or arrival ends the round for all members with [`ToAgent::RoundBroken`]; then
//! agents stop their ranks and join again. An agent whose connection ends is lost.
//!
//! In the book: `docs/clusters.md`.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::text;

/// Maximum number of nodes of a job.
pub const MAX_NODES: u32 = 100_000;
/// Maximum length of [`Hello::role`] in bytes.
pub const MAX_ROLE_LEN: usize = 256;

/// Description of an agent; its first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Identifier of the job; agents of another job are refused.
    #[serde(deserialize_with = "text::read")]
    pub run_id: String,
    /// Node rank that the user requests, if any.
    pub node_rank: Option<u32>,
    /// Minimum and maximum of nodes of a round. Must be equal on all agents.
    pub nnodes: (u32, u32),
    /// Number of ranks of this agent.
    pub local_world_size: u32,
    /// Role of its ranks. Ranks of one role are numbered over all nodes.
    #[serde(deserialize_with = "text::read")]
    pub role: String,
    /// Address of the ranks' store, if this agent names one other than the endpoint.
    pub ranks_store: Option<RanksStore>,
    /// Restart policy. Must be equal on all agents.
    pub restarts: RestartPolicy,
    /// Keepalives of the connection. Must be equal on all agents.
    pub keep_alive: KeepAlive,
    /// Random number of the agent, drawn at its start. If two connections have the same number, the
    /// later one replaces the earlier one.
    pub agent_id: u64,
    /// Run stamp of the job that the agent belongs to, under any coordinator. A coordinator of
    /// another job refuses it.
    #[serde(deserialize_with = "text::read_option")]
    pub run_stamp: Option<String>,
    /// Node rank in the last round that the agent was in, under any coordinator.
    pub last_node_rank: Option<u32>,
    /// Addresses from which the agent's ranks may connect.
    pub addresses: Vec<IpAddr>,
    /// Host name, for messages.
    #[serde(deserialize_with = "text::read")]
    pub host: String,
    /// Process id of the agent, for messages.
    pub pid: u32,
}

/// Address of the store of a round's ranks: `MASTER_ADDR` and `MASTER_PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RanksStore {
    /// Name or address of the host.
    #[serde(deserialize_with = "text::read")]
    pub host: String,
    /// Port of the store.
    pub port: u16,
    /// Whether rank 0 serves the store instead of the agent at the endpoint. Must be equal on all
    /// agents.
    pub by_rank: bool,
}

/// Keepalives, by which each end of a connection detects the loss of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {
    /// Maximum time between two messages of each end.
    pub interval: Duration,
    /// Number of silent intervals after which an end is lost.
    pub attempts: u32,
}

impl Default for KeepAlive {
    /// torchrun's values.
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), attempts: 3 }
    }
}

/// Policy of restarts after failures. Nodes that join or leave are not failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// Maximum number of failures that are followed by a restart.
    pub max_restarts: u32,
    /// Time within which failures count; `None` for the whole job.
    pub window: Option<Duration>,
    /// Pause before the second consecutive restart of an attempt that failed soon after its start;
    /// doubled for each further one.
    pub backoff: Duration,
    /// Number of consecutive attempts that fail soon after their start, after which the job ends; 0
    /// for no limit.
    pub crash_loop: u32,
}

/// From an agent to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// First message of a connection.
    Hello(Hello),
    /// The agent has no running rank, and wants to be in the next round.
    Join,
    /// A rank of this agent failed. Sent again on the next connection, and to the next coordinator,
    /// until another round starts or the job is over.
    Failed {
        /// Number of the round.
        round: u64,
        /// The failure in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Uptime of the ranks of this node.
        uptime: Duration,
        /// Why a restart cannot help, if that is known.
        #[serde(deserialize_with = "text::read_option")]
        fatal_reason: Option<String>,
    },
    /// All ranks of this agent exited with code 0.
    Finished {
        /// Number of the round.
        round: u64,
    },
    /// The agent is stopped by its user or preempted, and leaves for good.
    Leave {
        /// Reason in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Whether the node is preempted, so that a job which cannot continue is to be started
        /// again.
        preempted: bool,
    },
    /// Keepalive without content.
    KeepAlive,
    /// The progress of this agent's ranks has changed. At the start of a round they work. An agent
    /// that loses the connection leaves its round, so it does not repeat the progress.
    Progress {
        /// Number of the round.
        round: u64,
        /// Their progress.
        progress: NodeProgress,
    },
}

/// Progress of the ranks of a node, as far as their agent can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeProgress {
    /// At least one rank made progress within the hang timeout, or works alone.
    Working,
    /// All ranks were idle for the hang timeout, and none waits for another rank.
    Resting,
    /// No rank made progress within the hang timeout, and at least one waits for other ranks.
    Waiting(Achieved),
}

/// Progress of a rank in its round. The rank furthest behind has the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Achieved {
    /// Training steps completed.
    pub step: u64,
    /// Activity within steps or between them, as in a heartbeat.
    pub activity: u64,
}

/// The ranks of one node in a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAssignment {
    /// Rank of the node.
    pub group_rank: u32,
    /// Rank of its first process; the others follow.
    pub first_rank: u32,
    /// Number of its processes.
    pub local_world_size: u32,
    /// Number of the job's processes on its host, over all nodes there.
    pub ranks_on_host: u32,
    /// Rank of its first process within the role; the others follow.
    pub first_role_rank: u32,
    /// Number of processes of the role on all nodes.
    pub role_world_size: u32,
}

/// A round, from the view of one member. Its size does not depend on the number of nodes, since
/// each of them receives one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Number of the round, from 0.
    pub number: u64,
    /// Number of restarts so far.
    pub restart_count: u32,
    /// Number of nodes.
    pub nodes: u32,
    /// Number of processes on all nodes.
    pub world_size: u32,
    /// `<MMDDHHmm>_<random>`: equal for all rounds of a job.
    #[serde(deserialize_with = "text::read")]
    pub run_stamp: String,
    /// Address of the ranks' store; `None` for the endpoint.
    pub ranks_store: Option<RanksStore>,
    /// Ranks of the receiver.
    pub assignment: NodeAssignment,
}

/// From the coordinator to an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// The agent is refused; the connection closes.
    Refused {
        /// Reason and remedy.
        #[serde(deserialize_with = "text::read")]
        reason: String,
    },
    /// The round has no free rank. The agent stays connected, and is in a later round if a rank
    /// becomes free.
    Waiting {
        /// Run stamp, like in [`Round`].
        #[serde(deserialize_with = "text::read")]
        run_stamp: String,
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
    },
    /// A round starts: start the ranks.
    RoundStarted(Round),
    /// The round is over: stop the ranks, or let those that can leave it, and join the next one.
    RoundBroken {
        /// Number of the round that ended.
        round: u64,
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Whether all ranks are alive, so that they may agree on a last common step before they
        /// leave the round.
        graceful: bool,
    },
    /// The job is over: stop the ranks and leave.
    Closed {
        /// Whether all nodes have finished.
        success: bool,
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Why there is no restart, if one was possible.
        #[serde(deserialize_with = "text::read_option")]
        no_restart: Option<String>,
        /// Whether it ended by the preemption of a node.
        preempted: bool,
    },
    /// Nothing to say.
    KeepAlive,
    /// All nodes of the round wait or rest, and this one is furthest behind of those that wait.
    Standstill {
        /// Number of the round.
        round: u64,
    },
}
