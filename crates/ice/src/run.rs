use std::rc::Rc;

use ice_core::{HyperGraph, Run, TaskItem};
use ice_launch::{LaunchPlan, Program};
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
    /// # Errors
    /// [`Error::Usage`] before anything is started, [`Error::Job`] where the ranks failed, [`Error::Run`] on a rank.
    fn run(self, tasks: impl TaskItem, options: &RunOptions) -> Result<(), Error>;
}

impl Launch for HyperGraph {
    fn run(self, tasks: impl TaskItem, options: &RunOptions) -> Result<(), Error> {
        // Before anything is started, since options may not fit.
        let config = options.config()?;
        if !Worker::is_rank() {
            // The ranks make graphs of their own; this one's memory is better given back.
            drop(self);
            let plan = Program::current().and_then(|program| LaunchPlan::new(&options.launch, program));
            let plan = plan.inspect_err(|error| ice_launch::record_failure(error))?;
            return match ice_launch::run(plan)? {
                ExitCode::Success => Ok(()),
                failed => Err(Error::Job(failed)),
            };
        }
        let worker = Rc::new(Worker::start()?);
        let outcome = Run::execute(&self, &tasks, Rc::clone(&worker), config);
        if outcome.is_err() {
            // Stay in the group until the process ends: the others' errors about a rank that left would hide this one.
            std::mem::forget(Rc::clone(&worker));
        }
        outcome?;
        worker.leave();
        Ok(())
    }
}
