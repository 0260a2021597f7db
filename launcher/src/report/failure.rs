use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::cli::Command;
use ice_agent::{Cause, Exit, OutOfMemory};

/// A failed attempt: details of the rank that failed first, and how the others ended.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Failure {
    /// Number of restarts before this attempt.
    pub(crate) attempt: u32,
    pub(crate) round: u64,
    pub(crate) host: String,
    /// Node rank.
    pub(crate) node: u32,
    #[serde(flatten)]
    pub(crate) command: Command,
    pub(crate) root_cause: RankFailure,
    pub(crate) others: Vec<OtherRank>,
    /// The first log or report of the job that could not be written, and the error.
    pub(crate) log_failure: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct RankFailure {
    pub(crate) rank: u32,
    pub(crate) local_rank: u32,
    pub(crate) pid: Option<u32>,
    #[serde(flatten)]
    pub(crate) exit: ExitRecord,
    /// Message of the rank itself, from its error file or over the link.
    pub(crate) message: Option<String>,
    /// Traceback of the rank, or its chain of causes.
    pub(crate) callstack: Option<String>,
    /// Last lines of its stderr.
    pub(crate) stderr: Vec<String>,
    /// File or folder with output of the rank or its stacks.
    pub(crate) logs: Option<PathBuf>,
}

/// A rank that did not fail first.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct OtherRank {
    pub(crate) rank: u32,
    pub(crate) local_rank: u32,
    pub(crate) end: OtherEnd,
    #[serde(flatten)]
    pub(crate) exit: ExitRecord,
    pub(crate) message: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OtherEnd {
    /// The rank failed too, later.
    Failed,
    /// The rank ended because it was asked to.
    Stopped,
    /// The rank had finished its work.
    Finished,
}

/// How a process ended, for programs: one of the two numbers, or neither if the process never ran
/// or its job hung.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct ExitRecord {
    pub(crate) exit_code: Option<i32>,
    pub(crate) signal: Option<i32>,
    /// The same in words.
    pub(crate) exit: String,
    /// Details if the kernel killed the process for lack of memory.
    pub(crate) out_of_memory: Option<OutOfMemory>,
}

impl From<&Exit> for ExitRecord {
    fn from(exit: &Exit) -> Self {
        let (exit_code, signal) = match exit.status() {
            Exit::Code(code) => (Some(*code), None),
            Exit::Signal(signal) => (None, Some(*signal)),
            Exit::NotStarted { .. } | Exit::Hung(_) | Exit::Explained(..) => (None, None),
        };
        let out_of_memory = match exit {
            Exit::Explained(_, Cause::OutOfMemory(memory)) => Some(memory.clone()),
            _ => None,
        };
        Self { exit_code, signal, exit: exit.to_string(), out_of_memory }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let root = &self.root_cause;
        let pid = root.pid.map_or_else(|| "none".into(), |pid| pid.to_string());
        writeln!(f, "ice-launch: rank {} failed: {}", root.rank, root.exit.exit)?;
        writeln!(f, "  node     {} ({})", self.node, self.host)?;
        writeln!(f, "  rank     {} (local rank {}), pid {pid}", root.rank, root.local_rank)?;
        writeln!(f, "  program  {}", self.command)?;
        if let Some(message) = &root.message {
            writeln!(f, "  error    {message}")?;
        }
        if !root.stderr.is_empty() {
            writeln!(f, "  stderr   (last {} lines)", root.stderr.len())?;
            for line in &root.stderr {
                writeln!(f, "    {line}")?;
            }
        }
        match &root.logs {
            Some(logs) => writeln!(f, "  logs     {}", logs.display())?,
            None => writeln!(f, "  logs     none: --tee 3 and --redirects 3 keep what ranks write")?,
        }
        if let Some(failure) = &self.log_failure {
            writeln!(f, "  missing  {failure}")?;
        }
        let those = |end| self.others.iter().filter(move |other| other.end == end);
        for other in those(OtherEnd::Failed) {
            let message = other.message.as_deref().map(|text| format!(": {text}")).unwrap_or_default();
            writeln!(f, "  later    rank {}: {}{message}", other.rank, other.exit.exit)?;
        }
        for (end, word) in [(OtherEnd::Stopped, "stopped"), (OtherEnd::Finished, "finished")] {
            let ranks: Vec<_> = those(end).map(|other| other.rank.to_string()).collect();
            let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
            if !ranks.is_empty() {
                writeln!(f, "  {word:<8} {noun} {}", ranks.join(", "))?;
            }
        }
        Ok(())
    }
}
