//! `ice-launch`: the agent of a node. The agent starts a program once per device, agrees with the
//! other agents on rank assignment, watches the ranks, and ends all of their processes at the end.
//! The crate is never linked to libtorch.
//!
//! In the book: `docs/torchrun.md`, `docs/clusters.md`, `docs/elasticity.md`.

pub mod cli;
mod cluster;
mod dispatcher;
mod error;
mod logging;
mod logs;
mod placement;
mod preempt;
mod report;
mod supervise;
mod warm;

pub use cli::{LaunchArgs, LaunchPlan, Program, UsageError};
pub use error::Error;
use ice_proto::exit::ExitCode;
pub use logging::log_to_stderr;

/// Carries out a plan. Blocks until the job is over on this node. Failures are reported on stderr.
///
/// # Errors
/// Returns an [`Error`] if the agent itself cannot work. No process of the job is left in that case
/// either.
pub fn run(plan: LaunchPlan) -> Result<ExitCode, Error> {
    supervise::raise_open_files();
    supervise::survive_file_size();
    supervise::check_limits(plan.local_world_size())?;
    // The current thread carries the whole runtime, because ranks die with the thread that spawned
    // them.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let outcome = runtime.block_on(dispatcher::run(plan));
    runtime.shutdown_background();
    if let Err(error) = &outcome {
        record_failure(error);
    }
    outcome
}

/// Writes an error that keeps a job from starting to the file that `TORCHELASTIC_ERROR_FILE` names
/// for the launcher, if any. [`run`] does this itself for its own errors and for failed jobs.
pub fn record_failure(error: &dyn std::error::Error) {
    report::ErrorDocument::of_launcher(&error.to_string()).write();
}
