//! The link: messages between a rank and its agent over the socket pair that the rank inherits.
//!
//! A program that ignores the link is a plain worker. A rank that reads end of file from its link
//! has lost its agent and exits.
//!
//! In the book: `docs/elasticity.md#rounds`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// From a rank to its agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromRank {
    /// First message: the rank uses the link.
    Hello {
        /// Process id of the rank.
        pid: u32,
        /// Rank within the world, from the environment of the process; `None` for a spare.
        rank: Option<u32>,
    },
    /// From now on the rank keeps its state when a round ends, and takes part in the next one.
    Stays,
    /// The rank has no process group, and waits for [`ToRank::Round`].
    Parked {
        /// The round that it was in, or was to be in; `None` for a spare that was in none.
        round: Option<u64>,
    },
    /// The process group of the round has failed, and the rank has not received the end of the
    /// round.
    RoundLost {
        /// Number of the round.
        round: u64,
        /// The failure.
        reason: String,
    },
    /// The first training step of a round is applied.
    FirstStep {
        /// Number of the round.
        round: u64,
        /// Applied steps.
        step: u64,
        /// Steps that are repeated, including this one: they were begun in a round that ended.
        repeated: u64,
    },
    /// Sent every second by a live rank.
    Heartbeat {
        /// Applied steps since the start of the job.
        step: u64,
        /// Counter that increases with everything that the rank completes.
        activity: u64,
        /// Current work of the rank, which says whether the counter should increase.
        doing: Doing,
        /// Milliseconds that this process has spent in applied steps.
        applied_ms: u64,
    },
    /// Position of the rank in its work; rank 0 sends it for the console.
    Progress(TrainingProgress),
    /// A checkpoint is complete on disk.
    CheckpointSaved {
        /// Path of the checkpoint.
        path: String,
        /// Applied steps of its state.
        step: u64,
    },
    /// All ranks stand at a step boundary until [`BoundaryRequest::Resume`].
    Paused,
    /// The rank has resumed.
    Resumed,
    /// The rank is about to fail.
    Error {
        /// The error and its causes, one line each.
        message: String,
    },
    /// The rank has finished its work and is about to exit with code 0.
    Done,
    /// The rank has received SIGTERM, alone or together with all processes of the job. It asks the
    /// agent for the meaning of SIGTERM to the agent.
    Terminated,
}

/// The current work of a rank, which decides how a lack of progress is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Doing {
    /// Works alone for any length of time: it loads data, saves, or runs a closure of the program.
    /// Other ranks may have to wait for it.
    Alone,
    /// Approaches or waits in the next collective operation, and has completed no step since it was
    /// [`Doing::Alone`].
    Meeting,
    /// Runs training steps.
    Steps,
    /// Idle, and no other rank waits for it: it is paused, between two rounds, or has finished.
    Resting,
}

/// Progress of a rank in its current task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingProgress {
    /// Name of the running phase for the console: `train`, `val`.
    pub task: String,
    /// Current epoch, from 1, and number of epochs. Each is 0 if it is unknown.
    pub epoch: (u64, u64),
    /// Iterations completed in this epoch, and their number, or 0 if it is unknown.
    pub iteration: (u64, u64),
    /// Samples per second over all ranks, since the last report; 0 if unknown.
    pub samples_per_second: f64,
    /// Last loss, if there is one.
    pub loss: Option<f64>,
}

/// From an agent to its rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToRank {
    /// The round is over: drop the process group. A rank that [stays](FromRank::Stays) answers with
    /// [`FromRank::Parked`], other ranks exit.
    RoundBroken {
        /// Number of the round that ended.
        round: u64,
        /// Reason, for messages.
        reason: String,
    },
    /// The next round, with the environment of a rank that would be started now.
    Round {
        /// Variables by name.
        variables: BTreeMap<String, String>,
    },
    /// The job is over: exit.
    End {
        /// Why, for a person.
        reason: String,
    },
    /// A request that the ranks of the job perform together. One rank that receives it is enough.
    Ask(BoundaryRequest),
    /// Restore the default action of SIGTERM: the next one ends the rank.
    Terminate,
}

/// A request that all ranks of a job perform at the same step boundary, on which they agree through
/// the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BoundaryRequest {
    /// Save a checkpoint.
    Save,
    /// Pause until [`BoundaryRequest::Resume`].
    Pause,
    /// Resume.
    Resume,
    /// Checkpoint all ranks, then end the ranks of one node.
    Stop {
        /// Rank of the node.
        node: u32,
        /// Whether to save the checkpoint.
        save: bool,
    },
    /// End the round without the loss of a rank, since nodes are to join or leave.
    Regroup,
    /// Leave a task before its end, or end the run. Sent by a rank, not by the agent.
    Leave {
        /// Whether the whole run ends.
        all: bool,
        /// Number of the task. Ranks that run another task at that boundary ignore the request.
        task: u64,
    },
    /// Sent by a rank that has left a step before its end: asks whether all ranks have left it.
    Left {
        /// Number of boundaries that the rank has passed.
        step: u64,
        /// Number of the step's collectives in which the rank took part.
        collectives: u64,
    },
}
