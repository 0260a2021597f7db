//! `ice-launch`: the agent of a node. It starts a program once per device, agrees with the other agents who is which rank, watches
//! the ranks, and stops everything cleanly. Never linked to libtorch.
//!
//! In the book: `docs/torchrun.md`, `docs/clusters.md`, `docs/elasticity.md`.

mod agent;
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

/// Carries out a plan: blocks until the job is over on this node. Whatever fails is reported on stderr.
///
/// # Errors
/// [`Error`] where the agent itself cannot work; no process is left then either.
pub fn run(plan: LaunchPlan) -> Result<ExitCode, Error> {
    supervise::raise_open_files();
    supervise::survive_file_size();
    supervise::check_limits(plan.local_world_size())?;
    // The current thread carries the whole runtime: ranks die with the thread that spawned them.
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
/// for the launcher, if any. [`run`] does so itself for errors of its own and for failed jobs.
pub fn record_failure(error: &dyn std::error::Error) {
    report::ErrorDocument::of_launcher(&error.to_string()).write();
}
