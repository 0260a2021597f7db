//! The link: what a rank and its agent say to each other over the socket pair that the rank inherits.
//!
//! A program that does not know the link ignores the descriptor and is a plain worker. A rank whose link reads end of file
//! has lost its agent and leaves.
//!
//! In the book: `docs/elasticity.md#rounds`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// From a rank to its agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Up {
    /// The first message: the rank knows the link.
    Hello {
        /// The rank's process id.
        pid: u32,
        /// The rank within the world, as the rank understood it; `None` for a spare.
        rank: Option<u32>,
    },
    /// From now on the rank keeps its state when its round ends, and takes part in the next one.
    Stays,
    /// The rank has no process group and waits for [`Down::Round`].
    Parked {
        /// The round that it was in, or was to be in; `None` for a spare that was in none yet.
        round: Option<u64>,
    },
    /// The process group of the round does not work any more, and nobody has said that the round is over.
    RoundLost {
        /// Which round.
        round: u64,
        /// What failed.
        reason: String,
    },
    /// The first training step in a round has been applied.
    FirstStep {
        /// Which round.
        round: u64,
        /// Applied steps.
        step: u64,
        /// Steps that are done again, that one included: they were begun before, in a round that ended.
        repeated: u64,
    },
    /// Sent every second: the rank is alive and has applied this many optimizer steps.
    Heartbeat {
        /// Applied steps since the start of the job.
        step: u64,
        /// Grows with everything that the rank gets done.
        activity: u64,
        /// Whether it is expected to grow.
        doing: Doing,
        /// Milliseconds that this process has spent in steps that were applied.
        applied_ms: u64,
    },
    /// Where the rank is in its work; rank 0 sends it for the console.
    Progress(Progress),
    /// A checkpoint is whole on disk.
    CheckpointSaved {
        /// Where.
        path: String,
        /// Applied steps that it holds.
        step: u64,
    },
    /// The rank stands at a step boundary, with all others, until [`Request::Resume`].
    Paused,
    /// It goes on.
    Resumed,
    /// The rank is about to fail and says why.
    Error {
        /// The error and its causes, one line each.
        message: String,
    },
    /// The rank has finished its work and is about to exit with code 0.
    Done,
    /// SIGTERM came to the rank, alone or together with all processes of the job. It asks for what
    /// SIGTERM to the agent means.
    Terminated,
}

/// What a rank is about, and so what is expected of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Doing {
    /// Work of its own that takes as long as it takes: it loads data, saves, or runs a closure of
    /// the program. Other ranks may have to wait for it.
    Alone,
    /// On its way to the next thing that all ranks do together, or waits for the others in it, and
    /// has done no step since it was [`Doing::Alone`].
    Meeting,
    /// One step after the other.
    Steps,
    /// Nothing, and no other rank waits for it: it is paused, between two rounds, or has finished.
    Resting,
}

/// How far a rank is in the task that it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is running, for a person: `train`, `val`.
    pub task: String,
    /// The epoch, from 1, and how many there will be.
    pub epoch: (u64, u64),
    /// Iterations done in this epoch, and how many there will be.
    pub iteration: (u64, u64),
    /// Samples per second over all ranks, since the last report.
    pub samples_per_second: f64,
    /// The last loss, where there is one.
    pub loss: Option<f64>,
}

/// From an agent to its rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Down {
    /// The agents have declared the round over: drop the process group. A rank that [stays](Up::Stays) says [`Up::Parked`] then, others end.
    RoundBroken {
        /// The round that ended.
        round: u64,
        /// Why, for a person.
        reason: String,
    },
    /// The next round: what the environment of a rank that is started now would say.
    Round {
        /// By name.
        variables: BTreeMap<String, String>,
    },
    /// The job is over: end.
    End {
        /// Why, for a person.
        reason: String,
    },
    /// Something that the ranks of the job are to do together. It is enough to tell one of them.
    Ask(Request),
    /// SIGTERM has its default action again: the one that follows ends the rank.
    Terminate,
}

/// What all ranks of a job do at the same step boundary. They agree over the store on which one that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Save a checkpoint.
    Save,
    /// Wait for [`Request::Resume`].
    Pause,
    /// Go on.
    Resume,
    /// The ranks of one node end, after a checkpoint of all.
    Stop {
        /// Rank of the node.
        node: u32,
        /// Whether to save one.
        save: bool,
    },
    /// End the round, though no rank is lost: nodes are to come or to go.
    Regroup,
    /// Leave a task before its end, or end the run. A rank asks for it, not the agent.
    Leave {
        /// Whether the whole run ends.
        all: bool,
        /// Number of the task. Ranks that run another one by then ignore the request.
        task: u64,
    },
    /// A rank has left a step before its end, and asks whether all ranks have left this one.
    Left {
        /// Boundaries that the rank has left behind.
        step: u64,
        /// Collectives of the step that the rank took part in.
        collectives: u64,
    },
}
