//! What the agents of a job and its coordinator say to each other.
//!
//! The coordinator lives in the agent that holds the endpoint, on the same port as the store. An agent says [`Hello`]
//! and then [`ToCoordinator::Join`] once per round; the coordinator answers with [`ToAgent::RoundStarted`] when there are
//! enough nodes, or with [`ToAgent::Waiting`]. Any loss, failure or arrival ends the round for everybody with
//! [`ToAgent::RoundBroken`]; agents stop their ranks and join again. A connection that ends is a lost agent.
//!
//! In the book: `docs/clusters.md`.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::text;

/// Nodes that a job can have.
pub const MOST_NODES: u32 = 100_000;
/// Most bytes of [`Hello::role`].
pub const LONGEST_ROLE: usize = 256;

/// Who an agent is; its first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Identifier of the job; agents of another job are refused.
    #[serde(deserialize_with = "text::read")]
    pub run_id: String,
    /// The node's place among the nodes, where the user gave one.
    pub node_rank: Option<u32>,
    /// Fewest and most nodes of a round. All agents must say the same.
    pub nnodes: (u32, u32),
    /// How many ranks this agent will start.
    pub local_world_size: u32,
    /// Name of the role of its ranks. Ranks of one role are numbered over all nodes.
    #[serde(deserialize_with = "text::read")]
    pub role: String,
    /// Where the ranks find their store, if this agent names a place other than the endpoint.
    pub ranks_store: Option<RanksStore>,
    /// When the worker group is started again. All agents must say the same.
    pub restarts: RestartPolicy,
    /// How each end knows that the other lives. All agents must say the same.
    pub keep_alive: KeepAlive,
    /// Drawn by the agent when it starts. Of two connections that say the same, the later one is the agent's, and the other is lost.
    pub agent: u64,
    /// The run stamp of the job that the agent has been told of, under another coordinator too: it gets into no other one.
    #[serde(deserialize_with = "text::read_option")]
    pub run_stamp: Option<String>,
    /// The node's rank in the last round that the agent was in, under another coordinator too.
    pub place: Option<u32>,
    /// Addresses that the agent's ranks may come from.
    pub addresses: Vec<IpAddr>,
    /// Host name, for messages.
    #[serde(deserialize_with = "text::read")]
    pub host: String,
    /// Process id of the agent, for messages.
    pub pid: u32,
}

/// The address of the store that the ranks of a round meet in: `MASTER_ADDR` and `MASTER_PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RanksStore {
    /// Name or address of its host.
    #[serde(deserialize_with = "text::read")]
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Whether rank 0 serves it, and not the agent that has the endpoint. All agents must say the
    /// same.
    pub by_rank: bool,
}

/// How each end of a connection knows that the other lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepAlive {
    /// Each end says something this often.
    pub interval: Duration,
    /// An end that says nothing for so many intervals is gone.
    pub attempts: u32,
}

impl Default for KeepAlive {
    /// torchrun's.
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), attempts: 3 }
    }
}

/// When the worker group is started again after a failure. Nodes that come or go are no failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// How many failures are answered with a restart.
    pub max_restarts: u32,
    /// Only failures within this time count; all where `None`.
    pub window: Option<Duration>,
    /// Pause before the second restart in a row whose attempt failed soon after its start; doubled for each further one.
    pub backoff: Duration,
    /// The job ends after so many attempts in a row that failed soon after their start; 0 for never.
    pub crash_loop: u32,
}

/// From an agent to the coordinator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToCoordinator {
    /// The first message of a connection.
    Hello(Hello),
    /// The agent has no rank running and wants to be in the next round.
    Join,
    /// A rank of this agent failed. It is said again on the next connection, and to the next coordinator, until another round starts or
    /// the job is over.
    Failed {
        /// The round that it failed in.
        round: u64,
        /// What failed, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// How long the ranks of this node had been running.
        uptime: Duration,
        /// Why a restart cannot help, where that is known.
        #[serde(deserialize_with = "text::read_option")]
        hopeless: Option<String>,
    },
    /// All ranks of this agent ended with code 0.
    Finished {
        /// The round that they finished.
        round: u64,
    },
    /// The agent was told to stop and leaves for good.
    Leave {
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Whether its machine, or its time, is taken away, so that the job is to be started again where it cannot go on.
        preempted: bool,
    },
    /// Nothing to say.
    KeepAlive,
    /// The progress of this agent's ranks has changed. At the start of a round they work. The agent
    /// leaves its round if the connection is lost, so it sends no progress again on the next one.
    Progress {
        /// The round that the ranks are in.
        round: u64,
        /// Their progress now.
        progress: NodeProgress,
    },
}

/// Whether the ranks of a node get anything done, as far as their agent can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeProgress {
    /// At least one rank has got something done within the hang timeout, or does work of its own.
    Working,
    /// No rank has had anything to do for the hang timeout, and none waits for another one.
    Resting,
    /// No rank has got anything done for the hang timeout, and at least one waits for other ranks.
    Waiting(Achieved),
}

/// Achievement of a rank in its round. The rank furthest behind has the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Achieved {
    /// Training steps done.
    pub step: u64,
    /// Things done within steps or on the way to them, as in a heartbeat.
    pub activity: u64,
}

/// One node's part in a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Rank of the node.
    pub group_rank: u32,
    /// Rank of its first process; the others follow.
    pub first_rank: u32,
    /// How many processes it has.
    pub local_world_size: u32,
    /// How many processes of the job are on its host, whichever nodes they belong to.
    pub ranks_on_host: u32,
    /// Rank of its first process among those of its role; the others follow.
    pub first_role_rank: u32,
    /// How many processes of its role there are on all nodes.
    pub role_world_size: u32,
}

/// What the members of a round have agreed on, and the receiver's part. It does not grow with the number of nodes, since each of them is
/// told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Its number, from 0.
    pub number: u64,
    /// Failures of the worker group so far.
    pub restart_count: u32,
    /// How many nodes there are.
    pub nodes: u32,
    /// How many processes there are on all of them.
    pub world_size: u32,
    /// `<MMDDHHmm>_<random>`: constant over the rounds of a job.
    #[serde(deserialize_with = "text::read")]
    pub run_stamp: String,
    /// Where the ranks find their store; at the endpoint where `None`.
    pub ranks_store: Option<RanksStore>,
    /// The receiver's part.
    pub you: Member,
}

/// From the coordinator to an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// The agent cannot take part; the connection ends.
    Refused {
        /// Why and what to do.
        #[serde(deserialize_with = "text::read")]
        reason: String,
    },
    /// There is no place for the agent now; it stays connected and gets one when there is.
    Waiting {
        /// As in [`Round`].
        #[serde(deserialize_with = "text::read")]
        run_stamp: String,
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
    },
    /// The round is agreed: start the ranks.
    RoundStarted(Round),
    /// The round is over: stop the ranks, where they run, or let those that can leave it, and join the next one.
    RoundBroken {
        /// The round that ended.
        round: u64,
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Whether no rank is gone, so that ranks which agree on it may leave the round after a step that all of them do.
        gentle: bool,
    },
    /// The job is over: stop the ranks and leave.
    Closed {
        /// Whether all nodes finished.
        success: bool,
        /// Why, in one line.
        #[serde(deserialize_with = "text::read")]
        reason: String,
        /// Why there is no restart, where there might have been one.
        #[serde(deserialize_with = "text::read_option")]
        no_restart: Option<String>,
        /// Whether it ended because a node was preempted.
        preempted: bool,
    },
    /// Nothing to say.
    KeepAlive,
    /// All nodes of the round wait or rest, and of those that wait this one is furthest behind.
    Standstill {
        /// The round that stands still.
        round: u64,
    },
}
