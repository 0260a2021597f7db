//! Exit codes of `ice-launch`.
//!
//! `README.md` lists their meaning. In the book: `docs/elasticity.md#preemption`,
//! `docs/troubleshooting.md`.

use std::process;

/// The exit code of an agent, which tells how the job ended.
///
/// | code | meaning |
/// |---|---|
/// | 0 | every rank ended with code 0 |
/// | 1 | the job failed, and no rank has an exit code of its own to pass on (a lost node, a rendezvous that timed out, an internal error) |
/// | 2 | nothing was started: the command line, the environment or a file it names is wrong |
/// | 126 | the program is there and cannot be executed |
/// | 127 | the program was not found |
/// | 75, or `--requeue-exit-code` | the job, or this node, was preempted and saved what it could: start it again |
/// | 128 + n | the root-cause rank was killed by signal n, or the agent was stopped by signal n |
/// | other | the root-cause rank's own exit code |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// Every rank ended with code 0.
    Success,
    /// The job failed without a rank's code to pass on.
    Failure,
    /// Wrong usage: nothing was started.
    Usage,
    /// The program cannot be executed.
    NotExecutable,
    /// The program was not found.
    NotFound,
    /// A rank's own exit code, never 0.
    Rank(u8),
    /// Preempted, to be started again; with the exit code that requests that.
    Requeue(u8),
    /// Ended by this signal.
    Signal(u8),
}

impl ExitCode {
    /// Returns the exit code as a number.
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::NotExecutable => 126,
            Self::NotFound => 127,
            Self::Rank(code) | Self::Requeue(code) => code,
            Self::Signal(signal) => 128_u8.saturating_add(signal),
        }
    }
}

impl From<ExitCode> for process::ExitCode {
    fn from(code: ExitCode) -> Self {
        Self::from(code.code())
    }
}
