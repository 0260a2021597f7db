//! `--events`: a log of everything that happens, one JSON object per line, documented in
//! `docs/events.md`.

use ice_proto::link::BoundaryRequest;
use serde::Serialize;

use super::failure::ExitRecord;
use crate::cli::Command;
use crate::logs::{Files, LogFile};

/// Version of the format, which increases when a field changes its meaning or is removed. New
/// events and fields may appear without a new version.
const VERSION: u32 = 1;

/// An event.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum JobEvent {
    /// The agent has started.
    AgentStarted {
        pid: u32,
        host: String,
        ranks: usize,
        #[serde(flatten)]
        command: Command,
    },
    /// The nodes have agreed on a round.
    RoundStarted { round: u64, attempt: u32, nodes: u32, node: u32, world_size: u32 },
    /// A process was started.
    RankStarted { rank: u32, local_rank: u32, pid: u32 },
    /// A process was started that waits to become a rank.
    SpareStarted { pid: u32 },
    /// A process ended.
    RankEnded {
        rank: u32,
        local_rank: u32,
        #[serde(flatten)]
        exit: ExitRecord,
    },
    /// The first training step in a round was applied.
    FirstStep { round: u64, step: u64, repeated: u64 },
    /// A rank wrote a checkpoint.
    CheckpointSaved { rank: u32, path: String, step: u64 },
    /// The agent received a signal.
    Signal { signal: i32 },
    /// The user sent a request to all ranks.
    Requested { request: BoundaryRequest },
    /// A rank waits at a step boundary until the job continues.
    Paused { rank: u32 },
    /// A paused rank continues.
    Resumed { rank: u32 },
    /// The job hangs.
    Hang { rank: u32, reason: String },
    /// The attempt failed on this node.
    AttemptFailed { attempt: u32, rank: u32, exit: String, message: Option<String> },
    /// A decision of the agent, with its reason.
    Decision { text: String },
    /// Ranks are being asked to end, or are killed.
    Stopping { how: &'static str },
    /// The agent exits.
    AgentEnded { exit_code: u8 },
}

#[derive(Serialize)]
struct Line<'a> {
    version: u32,
    /// Time in RFC 3339, UTC.
    time: String,
    run_id: &'a str,
    #[serde(flatten)]
    happened: &'a JobEvent,
}

/// The log of events, if the user wants one.
pub(crate) struct Events {
    run_id: String,
    out: Option<(Files, LogFile)>,
}

impl Events {
    pub(crate) fn new(run_id: &str, out: Option<(Files, LogFile)>) -> Self {
        Self { run_id: run_id.to_owned(), out }
    }

    pub(crate) fn add(&self, happened: &JobEvent) {
        let Some((files, file)) = &self.out else { return };
        let time = timestamp();
        let line = Line { version: VERSION, time, run_id: &self.run_id, happened };
        match serde_json::to_vec(&line) {
            Ok(mut bytes) => {
                bytes.push(b'\n');
                files.add(file, bytes);
            }
            Err(error) => tracing::warn!(%error, "an event was not written"),
        }
    }
}

/// Returns the current time in UTC, in the form of RFC 3339.
pub(super) fn timestamp() -> String {
    tz::UtcDateTime::now().map(|now| now.to_string()).unwrap_or_default()
}
