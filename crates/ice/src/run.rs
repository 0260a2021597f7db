use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use ice_core::{HyperGraph, Runs, TaskItem};
use ice_launch::{LaunchArgs, LaunchPlan, Program};
use ice_proto::exit::ExitCode;
use ice_worker::Worker;

use crate::{Error, RunOptions};

/// Runs a graph on many devices.
pub trait Launch {
    /// Runs the tasks on every device that the options name.
    ///
    /// If no launcher has started this process, it becomes the launcher, and starts its own program
    /// once per rank, with the same arguments. Otherwise it is a rank: it binds its device, joins
    /// the other ranks and runs the tasks.
    ///
    /// A program may run several graphs, one after the other, on one thread: folds, or training
    /// before fine-tuning. Each rank does all of them in the same order, in one job. In the
    /// launcher, the first call launches the job, and the later calls return the outcome of the
    /// first. A rank that is started again, or a job that resumes, skips the runs that are done. In
    /// the book: `docs/nodes.md#several-runs-in-one-program`.
    ///
    /// # Errors
    /// - [`Error::Run`]: an option of the run is wrong, or two runs have different options of the
    ///   launcher, or the run failed on this rank.
    /// - [`Error::Usage`]: an option of the launcher is wrong. Nothing was started.
    /// - [`Error::Launch`]: the launcher failed.
    /// - [`Error::Job`]: the launched ranks failed.
    fn run(self, tasks: impl TaskItem, options: &RunOptions) -> Result<(), Error>;
}

/// The options of the job that this process has launched, and the job's exit code.
static LAUNCHED: Mutex<Option<(LaunchArgs, ExitCode)>> = Mutex::new(None);

thread_local! {
    /// The runs of this rank. They are never dropped, so that a rank that fails stays in the group
    /// until its process ends. If it left, the other ranks' errors about that would hide its own
    /// error.
    static RUNS: Cell<Option<&'static Runs>> = const { Cell::new(None) };
}

impl Launch for HyperGraph {
    fn run(self, tasks: impl TaskItem, options: &RunOptions) -> Result<(), Error> {
        // Checks the options before any process starts.
        let config = options.config()?;
        if !Worker::is_rank() {
            // Each rank builds a graph of its own. The launcher needs none, and gives back the
            // memory.
            drop(self);
            return match launch(&options.launch)? {
                ExitCode::Success => Ok(()),
                failed => Err(Error::Job(failed)),
            };
        }
        let runs = match RUNS.get() {
            Some(runs) => runs,
            None => {
                let runs: &'static Runs = Box::leak(Box::new(Runs::new(Rc::new(Worker::start()?))));
                RUNS.set(Some(runs));
                runs
            }
        };
        Ok(runs.execute(&self, &tasks, config)?)
    }
}

/// Launches the job, or returns the exit code of the job that this process has launched already:
/// its ranks have done all runs of the program.
fn launch(options: &LaunchArgs) -> Result<ExitCode, Error> {
    let mut launched = LAUNCHED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((before, outcome)) = &*launched {
        if before != options {
            return Err(Error::Run(ice_core::Error::Usage(
                "the runs of a program have the same options of the launcher, since one job does them all: \
                 give each run the LaunchArgs of the first, or write a program for each"
                    .into(),
            )));
        }
        return Ok(*outcome);
    }
    let plan = Program::current().and_then(|program| LaunchPlan::new(options, program));
    let plan = plan.inspect_err(|error| ice_launch::record_failure(error))?;
    let outcome = ice_launch::run(plan)?;
    *launched = Some((options.clone(), outcome));
    Ok(outcome)
}

/// Whether this rank has completed a step of one of its runs.
pub(crate) fn has_begun() -> bool {
    RUNS.get().is_some_and(Runs::has_begun)
}

/// Leaves the job at the end of the program, after all runs.
pub(crate) fn finish() -> Result<(), Error> {
    let Some(runs) = RUNS.take() else { return Ok(()) };
    runs.finish()?;
    runs.worker().leave();
    Ok(())
}
