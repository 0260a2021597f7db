use std::fmt;

use ice_proto::exit::ExitCode;

use super::cause::Cause;

/// How a rank ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// The rank was never started.
    NotStarted {
        /// The exit code of the launcher that follows.
        code: ExitCode,
        /// Why it could not be started.
        reason: String,
    },
    /// The rank was ended because the job stood still.
    Hung(String),
    /// The inner exit, and the cause that the agent found for it.
    Explained(Box<Self>, Cause),
}

impl Exit {
    /// Whether the rank exited with code 0.
    pub fn is_success(&self) -> bool {
        *self == Self::Code(0)
    }

    /// Returns the exit without the cause that the agent found.
    pub fn status(&self) -> &Self {
        match self {
            Self::Explained(exit, _) => exit.status(),
            exit => exit,
        }
    }

    /// Returns the exit code of the launcher if this exit is the cause of the failure.
    pub fn code(&self) -> ExitCode {
        match self {
            Self::Code(code) => u8::try_from(*code).map_or(ExitCode::Failure, ExitCode::Rank),
            Self::Signal(signal) => u8::try_from(*signal).map_or(ExitCode::Failure, ExitCode::Signal),
            Self::NotStarted { code, .. } => *code,
            Self::Hung(_) => ExitCode::Failure,
            Self::Explained(exit, _) => exit.code(),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "killed by {name}"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::NotStarted { reason, .. } => write!(f, "not started: {reason}"),
            Self::Hung(reason) => write!(f, "hung: {reason}"),
            Self::Explained(exit, cause) => write!(f, "{exit}: {cause}"),
        }
    }
}

/// Returns the name of a signal that ends programs or is passed on, with Linux numbers.
pub(crate) fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 => "SIGUSR1",
        11 => "SIGSEGV",
        12 => "SIGUSR2",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 => "SIGSYS",
        _ => return None,
    })
}
