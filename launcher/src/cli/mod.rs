//! The command line: raw arguments become one validated [`LaunchPlan`]. Every mistake that can be
//! found before a process is started is found here.
//!
//! In the book: `docs/torchrun.md#options`.

mod args;
mod cluster_defaults;
mod devices;
mod generate;
mod plan;
mod program;
mod python;
mod rendezvous;
mod std_streams;
mod value_parsers;

pub use args::{Cli, CompletionShell, Generate, LaunchArgs, PythonArgs, RdzvArgs, TorchrunArgs, defaults};
pub use generate::generate;
pub(crate) use plan::{FileTimer, Rotation};
pub use plan::{LaunchPlan, UsageError};
pub use program::Program;
pub(crate) use program::{Command, in_path};
pub(crate) use std_streams::PerRank;
pub(crate) use value_parsers::signals;

impl Cli {
    /// Returns the plan that the command line asks for.
    ///
    /// # Errors
    /// Returns a [`UsageError`] that names the option.
    pub fn plan(self) -> Result<LaunchPlan, UsageError> {
        let (mut args, mut notes) = (self.launch, Vec::new());
        self.torchrun.translate(&mut args, &mut notes)?;
        notes.extend(args::ignored_variables(&|name| std::env::var(name).ok()));
        let program = Program::find(self.command, self.torchrun.form()?)?;
        let mut plan = LaunchPlan::new(&args, program)?;
        plan.preload = self.python.modules()?;
        plan.notes.splice(0..0, notes);
        Ok(plan)
    }
}
