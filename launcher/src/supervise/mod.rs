//! Processes: how a rank is started, watched and ended, so that nothing is left behind.

mod environment;
mod orphans;
mod process;

pub(crate) use environment::Environment;
pub(crate) use orphans::Orphans;
pub(crate) use process::{Stdio, spawn};
