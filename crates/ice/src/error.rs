use std::process;

use ice_proto::exit::ExitCode;
use ice_worker::Worker;

/// The reason for which a training program ended before its work was done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run failed on this rank, or its graph, tasks or options are wrong.
    #[error(transparent)]
    Run(#[from] ice_core::Error),
    /// The launcher could not start.
    #[error(transparent)]
    Usage(#[from] ice_launch::UsageError),
    /// The launcher failed.
    #[error(transparent)]
    Launch(#[from] ice_launch::Error),
    /// The launched ranks failed. The launcher has already reported the reason.
    #[error("the job ended with exit code {}", .0.code())]
    Job(ExitCode),
}

impl From<ice_worker::Error> for Error {
    fn from(error: ice_worker::Error) -> Self {
        Self::Run(error.into())
    }
}

impl Error {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Job(code) => *code,
            Self::Usage(_) => ExitCode::Usage,
            Self::Run(error) if error.is_usage() => ExitCode::Usage,
            Self::Run(_) => ExitCode::Failure,
            Self::Launch(error) => error.exit_code(),
        }
    }
}

/// Runs the body of a program's `main`, prints its error, and returns the exit code.
///
/// The exit code is 2 if an option, or a file that an option names, is wrong and the rank has done
/// no step yet: the same command would fail again. After its first step, a rank that cannot read a
/// file exits with 1. If the launched ranks failed, the exit code is that of their job.
///
/// Diagnostics go to standard error, unless the program has a `tracing` subscriber. `ICE_LOG`
/// selects them.
///
/// In a rank, this function reports an error or a panic to the agent, and writes it to the error
/// file. If the body succeeds, the rank leaves the job.
pub fn main(body: impl FnOnce() -> Result<(), Error>) -> process::ExitCode {
    ice_launch::log_to_stderr();
    if Worker::is_rank() {
        report_panics();
    }
    match body().and_then(|()| crate::run::finish()) {
        Ok(()) => ExitCode::Success.into(),
        Err(error) => {
            if !matches!(error, Error::Job(_)) {
                eprintln!("error: {error}");
                if Worker::is_rank() {
                    Worker::report_failure(&error.to_string(), &format!("{error:?}"));
                }
            }
            match error.exit_code() {
                // Job managers do not start a job again after code 2. A file that cannot be read
                // after hours of training may be readable then.
                ExitCode::Usage if crate::run::has_begun() => ExitCode::Failure.into(),
                code => code.into(),
            }
        }
    }
}

/// The exit code of a Rust program that panicked.
const PANIC: i32 = 101;

fn report_panics() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        let text = panic.payload_as_str().unwrap_or("a panic without a message");
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        Worker::report_failure(&format!("panic: {text}"), &place);
        // Unwinding would first leave the process group. The other ranks' errors about that would
        // then hide this panic.
        process::exit(PANIC);
    }));
}
