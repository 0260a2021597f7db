//! The command line: raw arguments become one validated [`LaunchPlan`]. All that can be known to be wrong is found here, before
//! anything is started.

mod args;
mod devices;
mod plan;
mod program;
mod streams;

pub use args::{Cli, LaunchArgs};
pub use plan::{LaunchPlan, UsageError};
pub use program::Program;
pub use streams::{PerRank, Streams};
