use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use ice_core::{HyperGraph, Runs, TaskItem};
use ice_launch::{LaunchArgs, LaunchPlan, Program};
use ice_proto::exit::ExitCode;
use ice_worker::Worker;

use crate::{Error, RunOptions};

/// Running a graph on many devices.
pub trait Launch {
    /// Runs the tasks on every device that the options name.
    ///
    /// Outside a launcher this process becomes the launcher and starts its own program, with the same arguments, once per
    /// rank. Inside one it is a rank: it binds its device, joins the others and runs the tasks.
    ///
    /// A program may run several graphs, one after the other, on one thread: folds, or training before fine-tuning. Each rank does all
    /// of them in the same order, in one job: in the launcher, the first call launches it, and the others return the outcome of the
    /// first. A rank that is started again, or a job that resumes, skips the runs that are done. In the book: `docs/nodes.md#several-runs-in-one-program`.
    ///
    /// # Errors
    /// [`Error::Usage`] before anything is started, [`Error::Job`] where the ranks failed, [`Error::Run`] on a rank.
    fn run(self, tasks: impl TaskItem, options: &RunOptions) -> Result<(), Error>;
}

/// The job that this process has launched, and how it ended.
static LAUNCHED: Mutex<Option<(LaunchArgs, ExitCode)>> = Mutex::new(None);

thread_local! {
    /// The runs of this rank. They are never dropped, so that a rank which fails stays in the group until its process ends: the others'
    /// errors about a rank that left would hide its own.
    static RUNS: Cell<Option<&'static Runs>> = const { Cell::new(None) };
}

impl Launch for HyperGraph {
    fn run(self, tasks: impl TaskItem, options: &RunOptions) -> Result<(), Error> {
        // Before anything is started, since options may not fit.
        let config = options.config()?;
        if !Worker::is_rank() {
            // The ranks make graphs of their own; this one's memory is better given back.
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

/// Launches the job, unless this process has done so: its ranks have done all runs of the program then.
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

/// Leaves the job at the end of the program, after its runs.
pub(crate) fn finish() -> Result<(), Error> {
    let Some(runs) = RUNS.take() else { return Ok(()) };
    runs.finish()?;
    runs.worker().leave();
    Ok(())
}
