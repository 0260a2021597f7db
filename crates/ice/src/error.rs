use std::process;

use ice_proto::exit::ExitCode;
use ice_worker::Worker;

/// Why a training program ended before its work was done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The run failed on this rank, or could not be put together.
    #[error(transparent)]
    Run(#[from] ice_core::Error),
    /// The launcher could not start.
    #[error(transparent)]
    Usage(#[from] ice_launch::UsageError),
    /// The launcher failed.
    #[error(transparent)]
    Launch(#[from] ice_launch::Error),
    /// The launched ranks failed; the launcher has said how.
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

/// Runs the body of a program's `main` and maps its error to a message and an exit code: 2 where an option or a file that it
/// names is wrong, the ranks' own code where they failed.
///
/// Diagnostics go to standard error, unless the program has a `tracing` subscriber; `ICE_LOG` selects them.
///
/// In a rank, an error or a panic is also told to the agent and left in the error file, and a body that succeeds ends with the rank leaving
/// the job.
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
            error.exit_code().into()
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
        // Unwinding would leave the process group first, and the others' errors about that would hide this one.
        process::exit(PANIC);
    }));
}
